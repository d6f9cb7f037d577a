"""``kltune compare``: how often a judge prefers one of two, counted by hand; both orders, ties, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from kltune.core.kl.intervals import clustered_share
from kltune.report.pages import write_page
from kltune.stages.ppo import run_ppo
from kltune.train.evaluation.held_out import EVALUATION_SEED
from tests.judges import part, serving
from tests.stages.conftest import REWARDS, read_jsonl, write_rows


def more_as(_: int, question: str) -> str:
    """A judge who prefers the response with more a's."""
    counts = [part(question, f"response {name}").count("a") for name in "AB"]
    return '{"better": "tie"}' if counts[0] == counts[1] else f'{{"better": "{"AB"[counts[1] > counts[0]]}"}}'


@pytest.fixture
def compare(command, tmp_path, monkeypatch):
    """``kltune compare ...`` in a folder with prompts and rewards."""
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{a}{b}"} for a in "abcdefgh" for b in "wxyz"])
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, as_json: bool = True):
        return command("compare", *arguments, "--prompts", "prompts.jsonl", as_json=as_json)

    return call


def test_a_judge_and_a_rule_that_agree_count_alike(compare, run_folder):
    with serving(more_as) as endpoint:
        code, judged, err = compare(run_folder, "reference", "--judge", f"{endpoint.url}#m", "--responses", 64)
        asked = len(endpoint.asked)
    assert code == 0
    assert "asks m at" in err
    assert judged["schema"] == "kltune.compare/1"
    assert (judged["prompts"], judged["pairs"]) == (32, 64)
    assert judged["wins"] + judged["ties"] + judged["losses"] == 64
    assert judged["win_rate"] == (judged["wins"] + 0.5 * judged["ties"]) / 64
    assert judged["win_rate"] > 0.6         # it was trained to say a
    assert judged["ci"][0] < judged["win_rate"] < judged["ci"][1]
    assert asked <= 2 * 64
    _, ruled, _ = compare(run_folder, "reference", "--judge", "rewards.py:score", "--responses", 64)
    assert [ruled[key] for key in ("wins", "ties", "losses")] == [judged[key] for key in ("wins", "ties", "losses")]


def test_the_interval_is_by_prompt():
    outcomes, prompts = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]), torch.arange(8) // 2
    both, alone = clustered_share(outcomes, prompts), clustered_share(outcomes, torch.arange(8))
    assert both[0] == alone[0] == 0.75
    assert both[2] - both[1] > alone[2] - alone[1]      # the two answers to a prompt say the same


def test_equal_answers_are_ties_of_which_nobody_is_asked(compare, run_folder):
    with serving(more_as) as endpoint:
        code, document, _ = compare(run_folder, run_folder / "final", "--judge", f"{endpoint.url}#m")
        assert endpoint.asked == []
    assert (code, document["ties"], document["win_rate"]) == (0, document["pairs"], 0.5)


def test_a_judge_that_goes_by_the_order_decides_nothing(compare, run_folder):
    with serving(lambda *_: '{"better": "A"}') as endpoint:
        code, text, _ = compare(run_folder, "reference", "--judge", f"{endpoint.url}#m", as_json=False)
    assert code == 0
    assert "undecided" in text
    assert " 0 wins, " in f" {text}".replace("\n", " ")


@pytest.mark.parametrize(("judge", "said"), [
    ("http://127.0.0.1:9/v1", "wanted URL#MODEL"),
    ("http://me@127.0.0.1:9/v1#m", "a user, a query or a fragment"),
    ("rewards.py:absent", "has no function"),
])
def test_what_is_no_judge(compare, run_folder, judge, said):
    code, _, err = compare(run_folder, "reference", "--judge", judge)
    assert code in (2, 5)
    assert said in err


def test_what_only_an_ai_judge_reads_is_not_taken_in_silence(compare, run_folder):
    code, _, err = compare(run_folder, "reference", "--judge", "rewards.py:score", "--rubric", "Be kind.")
    assert code == 2
    assert "--rubric: read only beside --judge URL#MODEL" in err


def test_a_run_measures_its_own_win_rate_as_compare_does_and_the_page_shows_it(ppo_recipe, command, compare):
    """The same answers, judged by the same judge: the share that the run says is the one that compare counts."""
    with serving(more_as) as endpoint:
        judge = {"kind": "judge", "url": endpoint.url, "model": "m", "mode": "pair"}
        recipe = ppo_recipe("kl.target=2", "run.steps=8", "run.eval_every=3", "eval.responses=32",
                            f"eval.judge={json.dumps(judge)}", 'eval.prompts="prompts.jsonl"')
        result = run_ppo(recipe, resume=False)
    low, high = result["win_rate_ci95"]
    assert 0.5 < low < result["win_rate"] < high
    folder = Path(result["output"])
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "eval/win_rate" in row]
    assert [row["step"] for row in rows if row["judge/m_asked"] > 0] == [3, 6]
    seed = recipe.run.seed + EVALUATION_SEED
    with serving(more_as) as endpoint:
        counted = command("compare", folder, "reference", "--judge", f"{endpoint.url}#m", "--responses", 32,
                          "--seed", seed)[1]
    assert (counted["win_rate"], counted["ci"]) == (result["win_rate"], result["win_rate_ci95"])
    page = write_page(folder).read_text()
    assert "m prefers its answers to the reference&#39;s in" in page
    assert "Win rate over the reference" in page
    code, document, _ = command("frontier", folder, "--best-of", 0, "--output", folder / "frontier")
    assert (code, document["points"][0]["win_rate"]) == (0, result["win_rate"])
    assert document["settings"][0]["win_rate_stderr"] == pytest.approx((high - low) / 3.92)
    assert document["reference"]["win_rate"] == 0.5
    assert "win rate over the reference against KL" in (folder / "frontier" / "frontier.html").read_text()
