"""report.html says how the run ended, loads nothing from anywhere, and shows text as text."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kltune.errors import CheckpointError
from kltune.report.outcome import alarm_of, read_files, verdict_of
from kltune.report.pages import write_comparison, write_page
from kltune.report.plots import legend_layout

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


def text_of(page: Path) -> str:
    """What is read on a page, with single spaces."""
    return " ".join(Tags(page.read_text()).text.split())


def assert_loads_and_runs_nothing(page: str) -> None:
    """No script, no tag that fetches, and links to what is on the page alone."""
    tags = Tags(page).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "base", "image"}
    loads = [attributes[name] for _, attributes in tags for name in ("src", "href", "xlink:href") if name in attributes]
    assert all(load.startswith("#") for load in [*loads, *re.findall(r"url\(([^)]*)\)", page)])
    assert "@import" not in page
    assert "\x1b" not in page
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {load[1:] for load in loads} <= set(ids)


ROWS = [
    {"step": step, "kl/ref_nats_per_response": 0.6 * step, "kl/ref_stderr": 0.1, "kl/beta": 0.01 * step,
     "score/mean": None, "time/step_seconds": 10.0, "time/sample_seconds": 7.5, "time/update_seconds": 2.5}
    for step in range(1, 11)
]


SAID = {
    "step": 10, "prompt": "Once", "response": " a cat & I.", "score": 1.0, "ref_kl": 2.05, "held_out": True,
    "tokens": [" a", " cat", " & I", "."], "token_kl": [0.0, 0.05, 1.4, 0.6], "reference_response": " a dog.",
    "reference_score": 0.0,
}


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
        (("kl.hard_cap=5", "kl.target=4.5"), result_of(5.004, 4.9, 5.1), "over the hard cap",
         "is 5.004 nats per response from its reference (95 % interval 4.90 to 5.10). That is 11 % above the target of "
         "4.5: on target (within 15 %). It is beyond the hard cap of 5."),
        (("kl.target=2",), result_of(2.303, 2.2, 2.4), "above target", "15.1 % above the target of 2, more"),
        ((), result_of(1.15 * 6, 6.8, 7.0), "on target", "is 6.9 nats per response"),
        (("kl.control=fixed", "kl.beta=0.1"), result_of(3.0, 2.9, 3.1), "measured", "no target"),
        ((), result_of(None, None, None), "KL not measured", "was not measured"),
        ((), {"kl": None}, "KL not measured", "was not measured"),
    ],
)
def test_the_verdict_in_plain_words(run_folder, overrides, result, word, words):
    folder = run_folder(*overrides, result=result)
    page = write_page(folder)
    assert page == folder / "report.html"
    text = text_of(page)
    assert f"kltune ppo: out {word}" in text
    assert words in text
    assert "sha256 0123456789ab ." in text


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"status": "running"}, "At step 10 of 10 when this page was written"),
        ({"status": "interrupted"}, "Stopped after step 10 of 10; --resume continues it."),
        ({"status": "failed", "error": "DivergedError: NaN"}, "Failed after step 10 of 10: DivergedError: NaN. KL to"),
        ({"status": "failed", "error": "ScorerError: no."}, "Failed after step 10 of 10: ScorerError: no. KL to"),
    ],
)
def test_a_run_without_a_result_says_where_it_is(run_folder, record, words):
    rows = [{"step": 10, "kl/ref_nats_per_response": 6.0, "kl/ref_stderr": 0.1}]
    text = text_of(write_page(run_folder(rows=rows, **record)))
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
    said = SAID | {"tokens": [HOSTILE, "b"], "token_kl": [1.0, None], "reference_response": HOSTILE}
    row = {"step": 1, HOSTILE: 1.0, "loss/mean": 2.0, f"eval/loss{HOSTILE}": 2.0}
    page = write_page(run_folder(
        rows=[row], samples=[sample, said, said | {"token_kl": [1.0]}], command=HOSTILE, error=HOSTILE, status="failed",
        reference={"path": HOSTILE, "sha256": HOSTILE},
    )).read_text()
    assert_loads_and_runs_nothing(page)
    text = Tags(page).text
    assert 'alert(1)</script> & "quoted" \\x1b[31m' in text
    assert "more characters in samples.jsonl" in text


def test_the_page_loads_nothing_and_is_the_same_for_the_same_numbers(run_folder):
    folder = run_folder(rows=ROWS, result=result_of(6.0, 5.9, 6.1))
    page = write_page(folder).read_text()
    assert_loads_and_runs_nothing(page)
    assert write_page(folder).read_text() == page


def test_pictures_follow_what_was_measured(run_folder):
    rows = [{"step": 1, "loss/mean": 2.0}, {"step": 2, "loss/mean": 1.5, "eval/perplexity": 9.0, "kl/beta": None},
            {"step": 3, "eval/perplexity": 8.0, "score/mean": 1.0}]      # one point is no curve
    page = write_page(run_folder(rows=rows)).read_text()
    assert re.findall(r"<figcaption>([^<]*)", page) == ["Loss", "Held-out perplexity"]
    assert page.count("<svg ") == 2


def test_times_by_phase(run_folder):
    text = text_of(write_page(run_folder(rows=ROWS)))
    assert "sample 1 min 15 s 75 %" in text
    assert "update 25.0 s 25 %" in text


WATCHED = [
    {"step": step, "eval/prompts": 128, "eval/score_mean": 0.5 * step, "eval/score_stderr": 0.05,
     "eval/gold_mean": 1.0 - 0.2 * step, "eval/gold_stderr": 0.05, "eval/reference_gold_mean": 0.9,
     "eval/score_z": 0.5 * step, "eval/gold_z": -0.2 * step,
     "eval/score_z_stderr": 0.05, "eval/gold_z_stderr": 0.05, "eval/distinct_2_adjusted": 0.8 - 0.1 * step,
     "eval/reference_distinct_2_adjusted": 0.82, "eval/distinct_2_per_input": None, "eval/response_tokens": 20.0 + step,
     "eval/tax_nats_per_token": 0.01 * step, "eval/tax_stderr": 0.002}
    for step in (2, 4, 6)
]
WATCHED_RESULT = result_of(6.0, 5.9, 6.1) | {
    "score": 3.0, "score_stderr": 0.05, "reference_score": 0.1,
    "gold": -0.2, "gold_stderr": 0.05, "reference_gold": 0.9,
    "eval": {**WATCHED[-1], "eval/reference_score_mean": 0.1},
    "stopped_early": {"step": 6, "reason": "gold fell", "gold_peak_step": 2},
}


def test_over_optimisation_is_said_at_the_top_and_drawn(run_folder):
    page = write_page(run_folder(rows=WATCHED, result=WATCHED_RESULT))
    text = text_of(page)
    assert "kltune ppo: out on target score rose, gold fell" in text
    assert "The score rose from 0.10 (the reference's) to 3.00." in text
    assert "The gold score, never trained on, fell from 0.90 (the reference's) to −0.20, after a peak" in text
    assert "It stopped early, at step 6: gold fell. final is the policy after step 2, where gold was highest." in text
    assert re.findall(r"<figcaption>([^<]*)", page.read_text()) == [
        "Score", "Gold score", "Proxy and gold", "Different tokens and pairs", "Length", "Alignment tax",
    ]
    assert "the same, adjusted for length 0.82 0.20 " in text
    assert "alignment tax, nats per token 0.0000 0.0600 ± 0.0020" in text


@pytest.mark.parametrize(("gold", "word"), [(1.4, "rose from"), (0.85, "did not clearly move:")])
def test_a_gold_score_that_rises_or_is_unsure_raises_no_alarm(run_folder, gold, word):
    result = WATCHED_RESULT | {"gold": gold, "stopped_early": None}
    files = read_files(run_folder(result=result))
    assert f"never trained on, {word} 0.9" in verdict_of(files).sentences
    assert alarm_of(files) == ""


def test_a_gold_score_that_fell_from_its_best_is_told_though_it_beats_the_reference(run_folder):
    best = {"step": 4, "eval/gold_mean": 3.0, "eval/gold_stderr": 0.1, "eval/score_mean": 2.0}
    result = WATCHED_RESULT | {"gold": 1.6, "eval": WATCHED[-1] | {"eval/gold_mean": 1.6}, "stopped_early": None}
    files = read_files(run_folder(rows=[best], result=result))
    assert "fell from its peak of 3.00 at step 4 to 1.60; the reference's is 0.90." in verdict_of(files).sentences
    assert alarm_of(files) == "score rose, gold fell from its peak"
    unmoved = replace(files, result=files.result | {"reference_score": files.result["score"]})
    assert alarm_of(unmoved) == "gold fell from its peak"      # as the sentence on it says
    for other in ({"eval/gold_mean": 1.8}, {"eval/score_mean": 3.5}):      # within two errors; the score fell as well
        assert alarm_of(replace(files, metrics=[best | other])) == ""


def test_before_and_after_stand_side_by_side_each_token_shaded_by_its_kl(run_folder):
    older = SAID | {"step": 5, "response": "older", "tokens": None, "token_kl": None}
    during = {**SAID, "step": 1, "reference_response": None, "response": "while it trained", "tokens": None}
    folder = run_folder(rows=ROWS, samples=[during, older, SAID, SAID], result=result_of(6, 5, 7))
    page = write_page(folder)
    assert re.findall(r'<span(?: class="(k\d)")? title="([^"]*)">([^<]*)</span>', page.read_text()) == [
        ("", "0 nats", "a"), ("k1", "0.05 nats", " cat"), ("k4", "1.4 nats", " &amp; I"), ("k3", "0.6 nats", "."),
    ]
    text = text_of(page)
    assert "Once reference score 0 a dog. policy score 1 · KL 2.05 nats" in text
    assert "most at “& I” 1.4, “.” 0.6" in text
    assert "KL at each token, nats: 0.02 to 0.1" in text
    assert "older" not in text
    assert "Samples while it trained" in text
    assert "while it trained" in text.partition("Samples while it trained")[2]


def test_a_very_long_response_is_cut(run_folder):
    row = SAID | {"tokens": ["word "] * 1000, "token_kl": [0.2] * 1000}
    page = write_page(run_folder(samples=[row])).read_text()
    assert page.count("word </span>") == 301
    assert "… (699 more tokens in samples.jsonl)" in page


def test_the_gauge_puts_kl_target_and_cap_on_one_scale(run_folder):
    pages = [write_page(folder).read_text() for folder in (
        run_folder("kl.target=4", "kl.hard_cap=8", result=result_of(4.4, 4.0, 4.8)), run_folder(name="unfinished"),
    )]
    # where the marks stand, % from the left end
    marks, none = (dict(re.findall(r'<i class="(\w+)" style="left: ([\d.]+)%', page)) for page in pages)
    wanted = {"band": 0.85 * 4, "target": 4, "cap": 8, "interval": 4.0, "value": 4.4}
    end = 1.1 * 8
    found = {name: float(left) for name, left in marks.items()}
    assert found == pytest.approx({name: 100 * nats / end for name, nats in wanted.items()}, abs=0.01)
    assert none == {}


def test_the_gauge_says_its_numbers_and_the_rule(run_folder):
    text = text_of(write_page(run_folder("kl.target=4", "kl.hard_cap=8", result=result_of(4.4, 4.0, 4.8))))
    assert "0 4 8 8.8 KL of the final policy, nats per response: 4.4 (95 %: 4.0 to 4.8)" in text
    assert "target 4; on target from 3.4 to 4.6 hard cap 8" in text
    assert "That is 10 % above the target of 4: on target (within 15 %)." in text
    close = text_of(write_page(run_folder("kl.target=4", "kl.hard_cap=4.2", name="b", result=result_of(3.0, 2.9, 3.1))))
    assert "0 4 6 KL of" in close      # the cap's number would stand in the target's
    assert "25 % below the target of 4, more than the 15 % that count as on target." in close


def test_no_statement_on_kl_or_score_contradicts_its_own_numbers(run_folder):
    moved = {"score": 2.0004, "reference_score": 2.0001, "eval": {"eval/score_stderr": 1.4e-4}}
    text = text_of(write_page(run_folder("kl.target=2", result=result_of(2.303, 2.2, 2.4) | moved)))
    assert "nats per response: 2.303 (95 %: 2.20 to 2.40) target 2; on target from 1.7 to 2.3" in text
    assert "The score rose from 2.0001 (the reference's) to 2.0004." in text


PER_TOKEN = ("kl.unit=nats_per_token", "kl.target=0.2")


def test_a_target_in_nats_per_token_stands_beside_a_kl_in_nats_per_token(run_folder, tmp_path):
    kl = {"nats_per_response": 1.88, "stderr": 0.15, "ci95": [1.6, 2.2], "nats_per_token": 0.188}
    token = run_folder(*PER_TOKEN, name="token", result={"kl": kl})
    text = text_of(write_page(token))
    assert "is 0.188 nats per token from its reference. That is 6 % below the target of 0.2" in text
    assert "KL, nats per token 0.188 target 0.2 KL, nats per response 1.88 ± 0.15 95 %: 1.60 to 2.20" in text
    page = write_comparison([token, run_folder(name="response", result=result_of(5.7, 5.5, 5.9))], tmp_path / "p.html")
    heads = re.findall(r'<th class="n">([^<]*)</th>', page.read_text())
    cells = dict(re.findall(r'data-name="(target[^"]*)"><span>([^<]*)', page.read_text()))      # of the second run
    assert heads[:4] == ["KL, nats per response", "target", "KL, nats per token", "target, nats per token"]
    assert cells == {"target": "6", "target, nats per token": "–"}
    running = run_folder(*PER_TOKEN, name="running", rows=[
        {"step": 8, "kl/ref_nats_per_response": 2.0, "kl/ref_nats_per_token": 0.21, "kl/ref_stderr": 0.1},
    ])
    assert "KL to the reference when last measured: 0.21 nats per token." in text_of(write_page(running))


def test_a_run_that_stopped_at_its_cap_shows_its_end_and_its_final(run_folder):
    folder = run_folder("kl.hard_cap=7", rows=[{"step": 3, "kl/ref_nats_per_response": 8.0}], status="failed",
                        error="DivergedError: step 3: beyond kl.hard_cap, 7.")
    (folder / "final").mkdir()
    (folder / "final" / "kltune.json").write_text(json.dumps({"kl": result_of(5.7, 5.5, 5.9)["kl"]}))
    text = text_of(write_page(folder))
    assert "of 10: DivergedError: step 3: beyond kl.hard_cap, 7. The final policy is 5.7 nats per response" in text
    assert "KL of the final policy, nats per response: 5.7 (95 %: 5.5 to 5.9)" in text
    assert "KL, nats per response 5.70 ± 0.10" in text


def test_a_step_beyond_the_planned_ones_is_of_no_number_on_the_page(run_folder):
    rows = [{"step": 18, "kl/ref_nats_per_response": 6.0}]
    assert "Stopped after step 18; --resume" in text_of(write_page(run_folder(rows=rows, status="interrupted")))


def test_examples_come_by_how_much_changed_and_a_long_prompt_is_folded(run_folder):
    prompts = {"little": 0.5, "much": 8.0, "\n\nHuman: " + "word " * 100 + "Assistant:": 2.0}
    samples = [SAID | {"prompt": prompt, "ref_kl": nats, "score": None} for prompt, nats in prompts.items()]
    page = write_page(run_folder(samples=samples))
    text = text_of(page)
    assert text.index("much") < text.index("Human:") < text.index("little")
    summary, = re.findall(r'<summary class="said">(.*?)</summary>', page.read_text())
    assert summary.startswith("Human: word")
    assert summary.endswith("word Assistant:")
    assert len(summary) < 300
    assert "policy KL 8 nats" in text      # no score, so nothing to divide it from


def test_a_reward_models_page_speaks_of_no_kl(run_folder):
    sides = [
        {"step": 4, "prompt": "Once", "response": said, "side": side, "score": score}
        for side, said, score in (("chosen", "well", 1.0), ("rejected", "ill", -1.0))
    ]
    rows = [{"step": step, "loss/mean": 1.0 / step, "score/mean": 0.1 * step, "optim/lr": 1.0} for step in (1, 2, 3, 4)]
    free = ("kl.control=fixed", "kl.beta=0")
    page = write_page(run_folder(*free, rows=rows, samples=sides, stage="reward", result={
        "accuracy": 0.8, "accuracy_ci95": [0.7, 0.9], "held_out_rows": 100, "steps": 4, "seconds": 2.0,
        "eval": {"eval/score_mean": -0.1},
    }))
    text = text_of(page).partition("Again")[0].partition("kltune reward: out")[2].partition("kltune reward: out")[2]
    assert "KL" not in text
    assert "Reference" not in text
    assert "step 4 Once chosen score 1 well rejected score −1 ill" in text      # one card


def test_no_picture_stands_alone_under_a_heading(run_folder):
    rows = [{"step": step, "loss/mean": 1.0 / step, "optim/lr": 1.0 / step} for step in (1, 2, 3)]
    page = write_page(run_folder(rows=rows)).read_text()
    assert "<h3>" not in page
    assert re.findall(r"<figcaption>([^<]*)", page) == ["Loss", "Learning rate"]
    rows = [row | {"kl/ref_nats_per_response": 0.1, "score/mean": row["step"]} for row in rows]
    page = write_page(run_folder(name="b", rows=rows)).read_text()
    assert re.findall(r"<h3>([^<]*)|<figcaption>([^<]*)", page) == [
        ("", "KL to the reference"), ("", "Score"), ("", "Loss"), ("", "Learning rate"),
    ]


def test_a_legend_reads_from_left_to_right():
    assert legend_layout(["training", "held out"]) == (2, ["training", "held out"])
    columns, order = legend_layout(["a" * 20, "b" * 20, "c" * 20, "d" * 20])
    assert columns == 2
    assert [label[0] for label in order] == ["a", "c", "b", "d"]      # matplotlib fills column by column
