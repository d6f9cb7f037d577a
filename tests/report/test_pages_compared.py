"""Several runs on one page: what differs is shown, what cannot be compared is said, and nothing is loaded."""

import re

import pytest

from kltune.cli import main
from kltune.errors import CheckpointError, RecipeError
from kltune.report.pages import write_comparison
from tests.report.test_pages import (
    HOSTILE,
    ROWS,
    WATCHED,
    WATCHED_RESULT,
    assert_loads_and_runs_nothing,
    result_of,
    text_of,
)


def test_a_table_the_curves_together_and_only_what_differs(run_folder, tmp_path):
    runs = [
        run_folder("kl.target=2", name="two", rows=[*ROWS, *WATCHED], result=WATCHED_RESULT),
        run_folder("run.seed=1", name="six", rows=ROWS, result=result_of(5.7, 5.5, 5.9)),
    ]
    page = write_comparison(runs, tmp_path / "page.html")
    text = text_of(page)
    assert "2 runs compared All against one reference: some/model , sha256 0123456789ab ." in text
    assert "two above target score rose, gold fell 6.00 ± 0.10 95 %: 5.90 to 6.10 2 3.00 ± 0.05 reference 0.10" in text
    assert "Prefer six: score 1.5 at 5.7 nats; left out: two (score rose, gold fell)" in text
    assert "six on target 5.70 ± 0.10 95 %: 5.50 to 5.90 6 1.50" in text
    differences = text.partition("Where the recipes differ")[2].partition("Each run")[0]
    assert "".join(differences.split()) == "keytwosixkl.target2.06.0run.seed01"
    figures = dict(re.findall(r"<figcaption>([^<]*)</figcaption>(<svg.*?</svg>)", page.read_text(), re.DOTALL))
    assert list(figures)[:2] == ["KL to the reference", "Score"]
    for colour in ("#3b7dd8", "#2f8f5b"):
        assert colour in figures["KL to the reference"]
    assert "#2f8f5b" not in figures["Gold score"]      # which one of them alone has measured


def test_runs_of_different_references_are_shown_with_a_note(run_folder, tmp_path):
    runs = [run_folder(name="a"), run_folder(name="b", reference={"path": "some/model", "sha256": "cd" * 32})]
    text = text_of(write_comparison(runs, tmp_path / "page.html"))
    assert "These runs have 2 different references." in text
    assert "some/ model 0123456789ab a some/ model cdcdcdcdcdcd b" in text      # a path may break after a slash
    assert "running" in text


def test_runs_of_one_name_are_told_apart_by_their_folders(run_folder, tmp_path):
    text = text_of(write_comparison([run_folder(name="x/run"), run_folder(name="y/run")], tmp_path / "page.html"))
    assert "x/run" in text
    assert "y/run" in text
    assert "They do not differ, but for where they are kept." in text


def test_the_page_loads_nothing_and_runs_nothing(run_folder, tmp_path):
    rows = [*ROWS, {"step": 11, HOSTILE: 1.0, "loss/mean": 1.0}, {"step": 12, HOSTILE: 2.0, "loss/mean": 2.0}]
    runs = [run_folder(name="<script>a", rows=ROWS), run_folder(name="b", rows=rows)]
    assert_loads_and_runs_nothing(write_comparison(runs, tmp_path / "page.html").read_text())


def test_what_cannot_be_compared(run_folder, tmp_path):
    folder = run_folder(name="a")
    with pytest.raises(RecipeError, match="more than once"):
        write_comparison([folder, folder / "."], tmp_path / "page.html")
    with pytest.raises(CheckpointError, match=r"no run\.json"):
        write_comparison([folder, tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_command_writes_where_it_is_told(run_folder, tmp_path, capsys, monkeypatch):
    one, two = (run_folder(name=name) for name in "ab")
    monkeypatch.chdir(tmp_path)
    for arguments, written in (
        ((one,), one / "report.html"), ((one, "-o", "one.html"), "one.html"), ((one, two), "comparison.html"),
        ((one, two, "--output", "two.html"), "two.html"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["report", *map(str, arguments)])
        assert (caught.value.code, capsys.readouterr().out) == (0, f"{written}\n")
        assert (tmp_path / written).stat().st_size > 1000


@pytest.mark.parametrize("names", [("_b", "a"), ("a$\\frac$", "$x_1$"), ("_$\\frac$", "_")])
def test_names_of_folders_are_no_mathematics_and_none_is_left_out(run_folder, tmp_path, names):
    page = write_comparison([run_folder(name=name, rows=ROWS) for name in names], tmp_path / "page.html").read_text()
    legends = [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", page)]
    assert all(legends.count(name) >= 1 for name in names)
