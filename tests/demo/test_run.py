"""The demo's walk in small: a world hardly trained, a few steps, and the table at the end."""

import json
from functools import partial

import pytest

import kltune.demo.run
from kltune.demo.world import make_tiny_world
from kltune.errors import StorageError
from kltune.run.screen import number

SFT = """
stage: sft
model: {path: model}
data: {texts: data/texts.jsonl}
sampling: {max_new_tokens: 8}
optim: {lr: 1.0e-3, batch_size: 8}
run: {steps: 2, output: runs/sft}
eval: {prompts: data/eval_prompts.jsonl, texts: data/heldout.jsonl, responses: 8}
"""
PPO = """
stage: ppo
model: {path: model, sft_adapter: runs/sft/final}
data: {prompts: data/prompts.jsonl}
sampling: {prompts_per_step: 8, max_new_tokens: 8}
reward: [{kind: function, path: "rewards.py:score"}]
kl: {target: 1.0}
ppo: {epochs: 1, minibatch_size: 8}
run: {steps: 2, output: runs/ppo_target}
eval:
  prompts: data/eval_prompts.jsonl
  responses: 8
  texts: data/heldout.jsonl
  gold: {kind: function, path: "rewards.py:gold"}
"""


@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    """A folder whose own small recipes the demo leaves alone, and a world of three pretraining steps."""
    monkeypatch.setattr(kltune.demo.run, "make_tiny_world", partial(make_tiny_world, steps=3))
    (tmp_path / "sft.yaml").write_text(SFT)
    (tmp_path / "ppo_target.yaml").write_text(PPO)
    return tmp_path


def test_the_demo_walks_from_nothing_to_a_verdict_and_a_second_call_trains_nothing(small_demo):
    result = kltune.demo.run.run_demo(small_demo, seed=7)
    assert (small_demo / "runs" / "ppo_target" / "report.html").exists()
    assert (small_demo / "ppo_fixed.yaml").exists()
    assert result["eval_kl"]["gate"]["max_kl"] == pytest.approx(1.25)
    assert result["reference"]["sft_adapter"] == str(small_demo / "runs" / "sft" / "final")

    text = kltune.demo.run.demo_text(result)
    assert "before" in text
    assert result["eval_kl"]["gate"]["verdict"] in text
    assert "Reward hacking: held to its target the run " in text
    assert (result["target"], result["free"]["target"]) == (1.0, None)
    assert json.loads((small_demo / "runs" / "no_penalty" / "run.json").read_text())["seed"] == 7
    assert number(result["gold"]) in text
    assert str(small_demo / "runs" / "no_penalty" / "report.html") in text
    assert "init ppo --model" in text

    metrics = small_demo / "runs" / "ppo_target" / "metrics.jsonl"
    written = metrics.stat().st_mtime_ns
    again = kltune.demo.run.run_demo(small_demo, seed=7)
    assert metrics.stat().st_mtime_ns == written
    assert json.dumps(again["eval_kl"]["kl"]) == json.dumps(result["eval_kl"]["kl"])


@pytest.mark.parametrize(
    ("raised", "verdict", "said"),
    [
        (True, "pass", "PPO raised the score and is within its KL budget:"),
        (False, "fail", "PPO did not raise the score and is over its KL budget:"),
        (True, "inconclusive", "PPO raised the score and is perhaps within, perhaps over its KL budget:"),
    ],
)
def test_the_headline_says_what_happened(raised, verdict, said):
    assert kltune.demo.run.score_and_gate(raised=raised, verdict=verdict) == said


def run_folder(folder, gold, *looks):
    """A finished run whose gold was 0 ± 0.1 under the reference, ``gold`` at its end and ``looks`` on the way."""
    folder.mkdir()
    rows = [{"step": step, "eval/gold_mean": look, "eval/gold_stderr": 0.1, "eval/score_mean": step / 10}
            for step, look in enumerate(looks, start=1)]
    evaluated = {"eval/gold_mean": gold, "eval/gold_stderr": 0.1, "eval/reference_gold_stderr": 0.1,
                 "eval/score_mean": 9.0, "eval/prompts": 64}
    result = {"gold": gold, "reference_gold": 0.0, "eval": evaluated}
    (folder / "run.json").write_text(json.dumps({"schema": "kltune.run/1", "status": "finished"}))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("gold", "looks", "said"),
    [
        (0.3, (), "raised gold"), (0.28, (), "left gold where it was"), (-0.3, (), "lowered gold"),
        (0.3, (1.5, 0.9), "let gold fall from 1.5 after step 1 to 0.3"),       # though above the reference's
        (0.3, (0.5, 0.4), "raised gold"),                                      # the best of several is high by luck
    ],
)
def test_what_happened_to_gold_and_no_more_than_that(tmp_path, gold, looks, said):
    assert kltune.demo.run.gold_moved(run_folder(tmp_path / "run", gold, *looks)) == said


def test_a_folder_with_other_things_in_it_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(StorageError, match=r"thesis\.tex, which no demo made"):
        kltune.demo.run.run_demo(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
