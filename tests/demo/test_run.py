"""The demo's walk in small: a world hardly trained, a few steps, and the table at the end."""

import json
from functools import partial

import pytest

import kltune.demo.run
from kltune.demo.world import make_tiny_world

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
"""
REWARD = """
stage: reward
model: {path: model, sft_adapter: runs/sft/final}
data: {pairs: data/noisy_pairs.jsonl}
optim: {batch_size: 8}
run: {steps: 2, output: runs/hacking_reward}
eval: {pairs: data/eval_pairs.jsonl}
"""
HACKING = PPO.replace('function, path: "rewards.py:score"', "model, path: runs/hacking_reward/final")
HACKING = HACKING.replace("runs/ppo_target", "runs/hacking") + """\
  texts: data/heldout.jsonl
  gold: {kind: function, path: "rewards.py:score"}
"""


@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    """A folder whose own small recipes the demo leaves alone, and a world of three pretraining steps."""
    monkeypatch.setattr(kltune.demo.run, "make_tiny_world", partial(make_tiny_world, steps=3))
    (tmp_path / "sft.yaml").write_text(SFT)
    (tmp_path / "ppo_target.yaml").write_text(PPO)
    (tmp_path / "hacking_reward.yaml").write_text(REWARD)
    (tmp_path / "hacking.yaml").write_text(HACKING)
    return tmp_path


def test_the_demo_walks_from_nothing_to_a_verdict_and_a_second_call_trains_nothing(small_demo):
    result = kltune.demo.run.run_demo(small_demo)
    assert (small_demo / "runs" / "ppo_target" / "report.html").exists()
    assert (small_demo / "ppo_fixed.yaml").exists()
    assert result["eval_kl"]["gate"]["max_kl"] == pytest.approx(1.25)
    assert result["reference"]["sft_adapter"] == str(small_demo / "runs" / "sft" / "final")

    text = kltune.demo.run.demo_text(result)
    assert "before" in text
    assert result["eval_kl"]["gate"]["verdict"] in text
    assert "Reward hacking: the proxy alone " in text
    free, held = (result["hacking"][name] for name in ("free", "held"))
    assert (free["target"], held["target"]) == (None, 1.0)
    assert f"{held['gold']:.2f}" in text
    assert str(small_demo / "runs" / "hacking_free" / "report.html") in text

    metrics = small_demo / "runs" / "ppo_target" / "metrics.jsonl"
    written = metrics.stat().st_mtime_ns
    again = kltune.demo.run.run_demo(small_demo)
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


@pytest.mark.parametrize(("gold", "moved"), [(0.3, "rose"), (0.28, "stayed"), (-0.28, "stayed"), (-0.3, "fell")])
def test_gold_has_moved_beyond_two_standard_errors_of_the_difference(gold, moved):
    found = {"eval/gold_mean": gold, "eval/gold_stderr": 0.1, "eval/reference_gold_mean": 0.0,
             "eval/reference_gold_stderr": 0.1}
    assert kltune.demo.run.gold_moved(found) == moved


def test_the_hacking_headline_says_what_happened_to_gold():
    fell = {"eval/gold_mean": -1.0, "eval/gold_stderr": 0.1, "eval/reference_gold_mean": 0.0,
            "eval/reference_gold_stderr": 0.1}
    assert kltune.demo.run.gold_in_both(fell, fell | {"eval/gold_mean": 1.0}) == (
        "Reward hacking: the proxy alone lowered gold; held to a KL target, the same proxy raised gold too:"
    )
