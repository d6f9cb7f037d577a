"""``kltune dpo`` with ``source: online``: pairs of the policy's own responses, scored or compared on the spot."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kltune.errors import JudgeError
from kltune.lm.rewards import judge as judge_module
from kltune.stages.dpo import run_dpo
from tests.judges import part, serving
from tests.stages.conftest import ran, read_jsonl
from tests.stages.test_judged import Mortal, rewarded_by
from tests.stages.test_resume import assert_same_run


def test_the_score_of_its_own_best_responses_is_what_it_learns(online_recipe):
    result, rows = ran(online_recipe("run.steps=15", "run.eval_every=5"))
    assert rows[0]["loss/mean"] == pytest.approx(math.log(2.0), abs=1e-6)
    assert sum(row["score/mean"] for row in rows[-3:]) > 1.5 * sum(row["score/mean"] for row in rows[:3])
    assert rows[0]["kl/ref_nats_per_response"] == pytest.approx(0.0, abs=1e-6)
    assert rows[-1]["kl/ref_nats_per_response"] > 0.1
    for row in rows:
        assert row["pairs/count"] + row["pairs/ties"] == 12
        assert row["kl/beta"] == 0.0
    assert result["score"] > result["reference_score"]
    assert read_jsonl(Path(result["output"]) / "samples.jsonl")[0]["score"] is not None


def test_a_target_is_held_on_the_same_responses(online_recipe, tmp_path):
    keys = ("run.steps=30", "data.prompts=many.jsonl")
    free = run_dpo(online_recipe(*keys, output=str(tmp_path / "free")), resume=False)
    target = 0.3 * free["kl"]["nats_per_response"]
    recipe = online_recipe(*keys, "kl.control=target", "kl.beta=auto", f"kl.target={target}", "kl.land=false")
    late = [row["kl/ref_nats_per_response"] for row in ran(recipe)[1][20:]]
    assert sum(late) / len(late) == pytest.approx(target, rel=0.25)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_before_the_first_step_every_log_ratio_is_0_at_any_temperature(online_recipe, temperature):
    _, (row,) = ran(online_recipe("run.steps=1", f"sampling.temperature={temperature}", "eval.responses=2"))
    assert row["pairs/chosen_log_ratio_nats"] == pytest.approx(0.0, abs=1e-5)
    assert row["pairs/rejected_log_ratio_nats"] == pytest.approx(0.0, abs=1e-5)


def test_where_all_are_ties_nothing_is_learnt(online_recipe):
    recipe = online_recipe("reward.0.weight=0.0", "run.steps=2", "kl.beta=1")
    for row in ran(recipe)[1]:
        assert (row["pairs/count"], row["pairs/ties"]) == (0, 12)
        assert "loss/mean" not in row
    weights = load_file(Path(recipe.run.output) / "final" / "adapter_model.safetensors")
    assert all(not tensor.any() for name, tensor in weights.items() if "lora_B" in name)


class Comparing(Mortal):
    """Prefers the response with more a's."""

    def __call__(self, number: int, question: str):
        if self.dies_after is not None and number >= self.dies_after:
            return self.trouble
        a, b = (part(question, f"response {side}").count("a") for side in "AB")
        return json.dumps({"better": "tie" if a == b else "A" if a > b else "B"})


def test_a_judge_who_compares_is_enough_and_may_die(online_recipe, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(judge_module, "FIRST_PAUSE", 0.001)
    answer = Comparing()
    gold = "eval.gold={kind: function, path: 'rewards.py:score'}"
    keys = ("sampling.responses_per_prompt=2", "run.steps=12", "run.save_every=100", "eval.responses=100", gold)
    with serving(answer) as endpoint:
        keys = (rewarded_by(endpoint, mode="pair"), *keys)
        unbroken, broken = (online_recipe(*keys, output=str(tmp_path / name)) for name in ("unbroken", "broken"))
        result, rows = ran(unbroken)
        assert rows[0]["judge/j_asked"] + rows[0]["judge/j_kept"] == 24
        answer.dies_after = len(endpoint.asked) + int(rows[0]["judge/j_asked"] + rows[1]["judge/j_asked"]) + 3
        with pytest.raises(JudgeError, match="goes on after step 2"):
            run_dpo(broken, resume=False)
        answer.dies_after = None
        run_dpo(broken, resume=True)
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken", 12)
    assert (result["score"], rows[0]["score/mean"]) == (None, None)
    assert all(row["pairs/count"] + row["pairs/ties"] == 12 and row["pairs/ties"] > 0 for row in rows[:2])
    assert result["eval"]["eval/gold_mean"] > 1.2 * result["eval"]["eval/reference_gold_mean"]
    (who,) = json.loads((tmp_path / "unbroken" / "run.json").read_text())["rewards"]
    assert (who["kind"], who["mode"], who["name"]) == ("judge", "pair", "j")
    assert "reward j: asks m at" in capsys.readouterr().err
