"""report.html says how the run ended, loads nothing from anywhere, and shows text as text."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kltune.errors import CheckpointError
from kltune.recipe import dump_recipe
from kltune.run.page import write_page
from kltune.run.words import duration, number

HOSTILE = '<script src="http://evil/x.js">alert(1)</script> & "quoted" \x1b[31m'


class Tags(HTMLParser):
    """Every tag with its attributes, every id, and the text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


@pytest.fixture
def run_folder(make_recipe):
    """A function that writes a run folder from its parts, and returns it."""
    def write(*overrides: str, rows=(), samples=(), result=None, **record: object) -> Path:
        recipe = make_recipe(*overrides)
        folder = Path(recipe.run.output)
        folder.mkdir()
        (folder / "recipe.yaml").write_text(dump_recipe(recipe))
        whole = {"schema": "kltune.run/1", "stage": "ppo", "status": "running", "seed": 0, **RECORD, **record}
        (folder / "run.json").write_text(json.dumps(whole))
        for name, lines in (("metrics.jsonl", rows), ("samples.jsonl", samples)):
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        if result is not None:
            (folder / "result.json").write_text(json.dumps(result))
        return folder

    return write


RECORD = {
    "reference": {"path": "some/model", "sha256": "0123456789abcdef" * 4, "template_sha256": None},
    "versions": {"torch": "2.13.0"}, "started": "2026-11-22T15:00:00+00:00", "ended": None, "recipe_sha256": "ab",
    "command": "kltune ppo --recipe r.yaml", "resumed_at": [], "error": None,
}
ROWS = [
    {"step": step, "kl/ref_nats_per_response": 0.6 * step, "kl/ref_stderr": 0.1, "kl/beta": 0.01 * step,
     "score/mean": None, "time/step_seconds": 10.0, "time/sample_seconds": 7.5, "time/update_seconds": 2.5}
    for step in range(1, 11)
]


def result_of(nats: float | None, low: float | None, high: float | None) -> dict:
    kl = {"nats_per_response": nats, "stderr": 0.1, "ci95": [low, high]}
    return {"kl": kl, "score": 1.5, "steps": 10, "seconds": 200.0}


@pytest.mark.parametrize(
    ("overrides", "result", "word", "words"),
    [
        ((), result_of(5.7, 5.5, 5.9), "on target",
         "is 5.7 nats per response from its reference (95 % interval 5.5 to 5.9)"),
        ((), result_of(7.5, 7.3, 7.7), "above target", "25 % above the target of 6"),
        ((), result_of(3.0, 2.9, 3.1), "below target", "50 % below the target of 6"),
        (("kl.hard_cap=7",), result_of(7.5, 7.3, 7.7), "over the hard cap", "beyond the hard cap of 7"),
        (("kl.hard_cap=7",), result_of(6.0, 5.9, 6.1), "on target", "within the hard cap of 7"),
        (("kl.control=fixed", "kl.beta=0.1"), result_of(3.0, 2.9, 3.1), "measured", "no target"),
        ((), result_of(None, None, None), "KL not measured", "was not measured"),
        ((), {"kl": None}, "KL not measured", "was not measured"),
    ],
)
def test_the_verdict_in_plain_words(run_folder, overrides, result, word, words):
    folder = run_folder(*overrides, result=result, status="finished")
    page = write_page(folder)
    assert page == folder / "report.html"
    text = " ".join(Tags(page.read_text()).text.split())
    assert f"kltune ppo: out {word}" in text
    assert words in text
    assert "sha256 0123456789ab ." in text


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"status": "running"}, "At step 10 of 10 when this page was written"),
        ({"status": "interrupted"}, "Stopped at step 10 of 10; --resume continues it."),
        ({"status": "failed", "error": "DivergedError: NaN"}, "Failed at step 10 of 10: DivergedError: NaN."),
    ],
)
def test_a_run_without_a_result_says_where_it_is(run_folder, record, words):
    rows = [{"step": 10, "kl/ref_nats_per_response": 6.0, "kl/ref_stderr": 0.1}]
    text = Tags(write_page(run_folder(rows=rows, **record)).read_text()).text
    assert words in text
    assert "KL to the reference when last measured: 6.00 ± 0.10 nats per response." in text


def test_a_page_from_almost_nothing(tmp_path):
    with pytest.raises(CheckpointError, match=r"no run\.json"):
        write_page(tmp_path)
    (tmp_path / "run.json").write_text('{"schema": "kltune.run/1"}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "sco')
    assert "No step has been recorded yet." in write_page(tmp_path).read_text()


def test_text_of_models_and_users_is_shown_and_never_run(run_folder):
    sample = {"step": 1, "prompt": HOSTILE, "response": HOSTILE * 100, "score": 1.0, "ref_kl": None}
    row = {"step": 1, HOSTILE: 1.0, "loss/mean": 2.0, f"eval/loss{HOSTILE}": 2.0}
    reference = {"path": HOSTILE, "sha256": HOSTILE}
    folder = run_folder(
        rows=[row], samples=[sample], command=HOSTILE, reference=reference, error=HOSTILE, status="failed")
    page = write_page(folder).read_text()
    tags = Tags(page)
    assert "script" not in {tag for tag, _ in tags.tags}
    assert 'alert(1)</script> & "quoted" \\x1b[31m' in tags.text
    assert "more characters in samples.jsonl" in tags.text
    assert "\x1b" not in page


def test_the_page_loads_nothing(run_folder):
    page = write_page(run_folder(rows=ROWS, result=result_of(6.0, 5.9, 6.1), status="finished")).read_text()
    tags = Tags(page).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "base", "image"}
    loads = [attributes[name] for _, attributes in tags for name in ("src", "href", "xlink:href") if name in attributes]
    assert all(load.startswith("#") for load in loads)
    assert all(load.startswith("#") for load in re.findall(r"url\(([^)]*)\)", page))
    assert "@import" not in page
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {load[1:] for load in loads} <= set(ids)


def test_the_same_numbers_give_the_same_page(run_folder):
    folder = run_folder(rows=ROWS, status="finished", result=result_of(6.0, 5.9, 6.1))
    assert write_page(folder).read_bytes() == write_page(folder).read_bytes()


def test_pictures_follow_what_was_measured(run_folder):
    rows = [{"step": 1, "loss/mean": 2.0}, {"step": 2, "loss/mean": 1.5, "eval/perplexity": 9.0, "kl/beta": None},
            {"step": 3, "eval/perplexity": 8.0, "score/mean": 1.0}]      # one point is no curve
    page = write_page(run_folder(rows=rows)).read_text()
    assert re.findall(r"<figcaption>([^<]*)", page) == ["Loss", "Held-out perplexity"]
    assert page.count("<svg ") == 2


def test_times_by_phase(run_folder):
    text = " ".join(Tags(write_page(run_folder(rows=ROWS)).read_text()).text.split())
    assert "sample 1 min 15 s 75 %" in text
    assert "update 25 s 25 %" in text


def test_numbers_and_durations_as_people_write_them():
    shown = [number(value) for value in (None, float("nan"), 5.934, 12, 12345, 123456.7, 0.000123)]
    assert shown == ["–", "–", "5.93", "12", "12,345", "123,457", "0.000123"]
    assert [duration(seconds) for seconds in (0.5, 59.4, 200, 7500)] == ["0.5 s", "59.4 s", "3 min 20 s", "2 h 5 min"]
