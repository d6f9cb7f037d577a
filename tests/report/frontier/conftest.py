"""Finished runs with the figures that a frontier reads."""

import pytest

REFERENCE = {"path": "base", "sha256": "a" * 64, "tokenizer_sha256": "b" * 64, "template_sha256": "c" * 64}
REWARDS = [{"name": "score", "weight": 1.0, "kind": "function", "path": "rewards.py:score", "sha256": "d" * 64}]


@pytest.fixture
def make_run(run_folder):
    """A finished run that was never run: its overrides, KL and score, and what run.json says otherwise."""

    def make(name: str, *overrides: str, kl=1.0, score=0.5, target=6.0, steps=(), **record) -> str:
        result = {
            "kl": {"nats_per_response": kl, "stderr": 0.1, "ci95": [kl - 0.2, kl + 0.2]}, "score": score,
            "target": target, "alpha": 1.0,
            "eval": {"eval/score_mean": score, "eval/score_stderr": 0.05, "eval/reference_score_mean": 0.1,
                     "eval/reference_score_stderr": 0.02, "eval/gold_mean": 2.0, "eval/gold_stderr": 0.3},
        }
        rows = [{"step": step, "kl/ref_nats_per_response": nats} for step, nats in enumerate(steps, 1)]
        record = {"reference": REFERENCE, "rewards": REWARDS} | record
        return str(run_folder(*overrides, name=name, rows=rows, result=result, **record))

    return make
