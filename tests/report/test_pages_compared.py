"""Several runs on one page: what differs is shown, what cannot be compared is said, and nothing is loaded."""

import json
import re

import pytest

from kltune.cli import main
from kltune.errors import CheckpointError, RecipeError
from kltune.recipe import dump_recipe
from kltune.report.pages import write_comparison
from tests.report.test_pages import HOSTILE, RECORD, ROWS, WATCHED, WATCHED_RESULT, Tags, result_of


@pytest.fixture
def write_run(make_recipe, tmp_path):
    """A function that writes a run folder of a name, and returns it."""
    def write(name, *overrides, rows=ROWS, result=None, sha256="ab" * 32):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(dump_recipe(make_recipe(f"run.output={folder}", *overrides)))
        record = {**RECORD, "stage": "ppo", "seed": 0, "status": "finished" if result else "running"}
        record["reference"] = {"path": "some/model", "sha256": sha256}
        (folder / "run.json").write_text(json.dumps(record))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if result:
            (folder / "result.json").write_text(json.dumps(result))
        return folder

    return write


def text_of(page):
    return " ".join(Tags(page.read_text()).text.split())


def test_a_table_the_curves_together_and_only_what_differs(write_run, tmp_path):
    runs = [
        write_run("two", "kl.target=2", rows=[*ROWS, *WATCHED], result=WATCHED_RESULT),
        write_run("six", "run.seed=1", result=result_of(5.7, 5.5, 5.9)),
    ]
    page = write_comparison(runs, tmp_path / "page.html")
    text = text_of(page)
    assert "2 runs compared All against one reference: some/model , sha256 abababababab ." in text
    assert "two above target score rose, gold fell 6.00 ± 0.10 95 %: 5.9 to 6.1 2 3.00 ± 0.05 reference 0.1" in text
    assert "six on target 5.70 ± 0.10 95 %: 5.5 to 5.9 6 1.5" in text
    differences = text.partition("Where the recipes differ")[2].partition("Each run")[0]
    assert differences.split() == ["key", "two", "six", "kl.target", "2.0", "6.0", "run.seed", "0", "1"]
    figures = dict(re.findall(r"<figcaption>([^<]*)</figcaption>(<svg.*?</svg>)", page.read_text(), re.DOTALL))
    assert list(figures)[:2] == ["KL to the reference", "Score"]
    for colour in ("#3b7dd8", "#2f8f5b"):
        assert colour in figures["KL to the reference"]
    assert "#2f8f5b" not in figures["Gold score"]      # which one of them alone has measured


def test_runs_of_different_references_are_shown_with_a_note(write_run, tmp_path):
    runs = [write_run("a"), write_run("b", sha256="cd" * 32)]
    text = text_of(write_comparison(runs, tmp_path / "page.html"))
    assert "These runs have 2 different references." in text
    assert "some/model abababababab a some/model cdcdcdcdcdcd b" in text
    assert "running" in text


def test_runs_of_one_name_are_told_apart_by_their_folders(write_run, tmp_path):
    text = text_of(write_comparison([write_run("x/run"), write_run("y/run")], tmp_path / "page.html"))
    assert "x/run" in text
    assert "y/run" in text
    assert "They do not differ, but for where they are kept." in text


def test_the_page_loads_nothing_and_runs_nothing(write_run, tmp_path):
    rows = [*ROWS, {"step": 11, HOSTILE: 1.0, "loss/mean": 1.0}, {"step": 12, HOSTILE: 2.0, "loss/mean": 2.0}]
    page = write_comparison([write_run("<script>a"), write_run("b", rows=rows)], tmp_path / "page.html").read_text()
    tags = Tags(page).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "base", "image"}
    loads = [attributes[name] for _, attributes in tags for name in ("src", "href", "xlink:href") if name in attributes]
    assert all(load.startswith("#") for load in loads)
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_what_cannot_be_compared(write_run, tmp_path):
    folder = write_run("a")
    with pytest.raises(RecipeError, match="more than once"):
        write_comparison([folder, folder / "."], tmp_path / "page.html")
    with pytest.raises(CheckpointError, match=r"no run\.json"):
        write_comparison([folder, tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_command_writes_where_it_is_told(write_run, tmp_path, capsys, monkeypatch):
    one, two = (write_run(name, rows=[]) for name in "ab")
    monkeypatch.chdir(tmp_path)
    for arguments, written in (
        ((one,), one / "report.html"), ((one, "-o", "one.html"), "one.html"), ((one, two), "comparison.html"),
        ((one, two, "--output", "two.html"), "two.html"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["report", *map(str, arguments)])
        assert (caught.value.code, capsys.readouterr().out) == (0, f"{written}\n")
        assert (tmp_path / written).stat().st_size > 1000
