"""``kltune trpo`` from recipe to result: no step leaves its ball, and what is refused leaves no trace."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kltune.core.control.adaptation import FIRST_SEEN, AdaptiveRadius
from kltune.core.kl.divergence import kl_exact
from kltune.core.tensors import per_response
from kltune.errors import DivergedError, RecipeError
from kltune.lm.model.batches import response_scatter
from kltune.lm.model.opening import load_saved_policy
from kltune.lm.rewards.scorers import Scorer
from kltune.report.pages import write_page
from kltune.stages import trpo
from kltune.stages.trpo import run_trpo
from kltune.train.evaluation import finish as finishing
from tests.oracles import kl
from tests.stages.conftest import ran, rows_of
from tests.stages.test_oracles import BEST, BEST_KL, RHO, spoken

STEP_KEYS = {
    "kl/ref_nats_per_response", "kl/ref_stderr", "kl/beta", "kl/step_nats_per_response", "score/mean",
    "trpo/first_try_nats_per_response", "trpo/predicted_gain", "trpo/gain", "trpo/gradient_norm",
    "trpo/mean_curvature", "trpo/damping", "trpo/cg_residual", "trpo/cg_iterations", "trpo/line_search_tries",
    "trpo/accepted", "time/step_seconds", "time/update_seconds",
}


def test_a_run_leaves_what_every_run_leaves(trpo_recipe, monkeypatch):
    recipe = trpo_recipe("run.save_every=2", "run.eval_every=3")
    monkeypatch.setattr(finishing, "write_page", write_page)
    result = run_trpo(recipe, resume=False)
    folder = Path(recipe.run.output)
    rows = rows_of(recipe)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row.keys() >= STEP_KEYS | {"trpo/value_loss"} and "nonfinite" not in row for row in rows)
    assert (result["status"], result["stage"], result["final_step"]) == ("finished", "trpo", 4)
    assert result["hard_cap"] is None
    assert result["kl"]["nats_per_response"] > 0.0
    assert json.loads((folder / "final" / "kltune.json").read_text())["stage"] == "trpo"
    assert not list((folder / "checkpoints" / "step-000004" / "state").glob("policy_optimizer*"))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(title in page for title in ("Gain of the surrogate", "Damping", "Tries of the line search"))


@pytest.mark.parametrize("baseline", ["value", "rloo"])
def test_a_batch_of_like_scores_moves_nothing_below_the_target(trpo_recipe, baseline):
    keys = () if baseline == "value" else ("optim.lr=1e-4", "trpo.value_minibatch_size=64")
    _, rows = ran(trpo_recipe(
        "reward.0.path=rewards.py:flat", f"trpo.baseline={baseline}", "sampling.responses_per_prompt=4", *keys
    ))
    for row in rows:
        assert (row["kl/ref_nats_per_response"], row["kl/step_nats_per_response"]) == (0.0, 0.0)
        assert row.get("trpo/gain") is None


def test_on_the_way_to_a_target_steps_are_as_long_as_the_room_whatever_the_last_ones_gained(trpo_recipe, monkeypatch):
    monkeypatch.setattr(AdaptiveRadius, "allowed", lambda *_: pytest.fail("asked how long a step may be"))
    recipe = trpo_recipe("kl.target=4", "run.steps=5")
    _, rows = ran(recipe)
    limit = 0.06 * 4.0
    assert all(row["kl/ref_nats_per_response"] < 0.7 * 4.0 for row in rows)
    assert all(row["trpo/radius_nats_per_response"] >= 0.9 * min(limit, recipe.trpo.max_step_kl) for row in rows)


@pytest.mark.parametrize("baseline", ["value", "rloo", "grpo"])
def test_a_reward_is_raised_and_no_step_leaves_the_ball(trpo_recipe, baseline):
    keys = () if baseline == "value" else ("optim.lr=1e-4", "trpo.value_minibatch_size=64")
    recipe = trpo_recipe(
        f"trpo.baseline={baseline}", "kl.target=4", "run.steps=12", "sampling.responses_per_prompt=4",
        "trpo.max_step_kl=0.2", *keys,
    )
    _, rows = ran(recipe)
    assert sum(row["score/mean"] for row in rows[-3:]) > 2 * sum(row["score/mean"] for row in rows[:3])
    assert all(row["kl/step_nats_per_response"] <= row["trpo/radius_nats_per_response"] <= 0.2 for row in rows)
    assert [row["trpo/radius_nats_per_response"] for row in rows[:FIRST_SEEN]] == [0.2] * FIRST_SEEN
    assert all(row["trpo/gain"] > 0.0 for row in rows if row["trpo/accepted"])
    assert sum(row["trpo/accepted"] for row in rows) > 6


def test_the_recorded_step_kl_is_what_the_two_policies_say(trpo_recipe, monkeypatch):
    # Whole logits of both, by themselves, on the same responses.
    step, seen = trpo.trust_region_step, []

    def logits_of(policy, rollout):
        with torch.no_grad():
            return policy.network.logits(policy.network.before(rollout.ids, rollout.scored))

    def spy(job, learner, batch, experience, rng):
        before = logits_of(learner.policy, batch.rollout)
        update = step(job, learner, batch, experience, rng)
        after, mask = logits_of(learner.policy, batch.rollout), batch.rollout.response_mask
        seen.append(per_response(response_scatter(kl_exact(before, after, 1.0), mask), mask).mean().item())
        return update

    monkeypatch.setattr(trpo, "trust_region_step", spy)
    recorded = [row["kl/step_nats_per_response"] for row in ran(trpo_recipe())[1]]
    assert recorded == pytest.approx(seen, rel=1e-3, abs=1e-7)
    assert 0.01 < max(seen) <= 0.05


def test_a_refused_step_leaves_the_policy_as_it_was_to_the_last_bit(trpo_recipe, monkeypatch):
    effect = trpo.effect
    monkeypatch.setattr(trpo, "effect", lambda *args: replace(effect(*args), gain=-1.0))
    recipe = trpo_recipe("run.steps=2", "run.save_every=1", "trpo.line_search_steps=3")
    run_trpo(recipe, resume=False)
    first, second = (
        load_file(Path(recipe.run.output) / f"checkpoints/step-00000{n}/adapter_model.safetensors") for n in (1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(tensor.abs().max().item() == 0.0 for name, tensor in first.items() if "lora_B" in name)
    rows = rows_of(recipe)
    assert [row["trpo/accepted"] for row in rows] == [0.0, 0.0]
    assert [row["trpo/line_search_tries"] for row in rows] == [3.0, 3.0]
    assert [row["kl/step_nats_per_response"] for row in rows] == [0.0, 0.0]
    assert [row["trpo/damping"] for row in rows] == [pytest.approx(100.0), pytest.approx(200.0)]
    assert rows[1]["kl/ref_nats_per_response"] == 0.0


def test_equal_scores_move_nothing(trpo_recipe, monkeypatch):
    monkeypatch.setattr(Scorer, "total", lambda self, prompts, *rest: torch.ones(len(prompts)))
    recipe = trpo_recipe(
        "run.steps=2", "trpo.baseline=rloo", "optim.lr=1e-4", "trpo.value_minibatch_size=64", "kl.control=fixed",
        "kl.beta=1.0",
    )
    assert [(row["trpo/accepted"], row["trpo/line_search_tries"]) for row in ran(recipe)[1]] == [(0.0, 0.0)] * 2


def test_a_step_that_rounding_hides_is_taken_to_be_as_long_as_foretold(trpo_recipe, monkeypatch, tmp_path):
    plain = ran(trpo_recipe())[1]
    monkeypatch.setattr(trpo, "rounding_of", lambda rollout: 10.0)      # nats: nothing is seen of any step
    hidden = ran(trpo_recipe(output=str(tmp_path / "hidden")))[1]
    assert [row["kl/step_nats_per_response"] for row in hidden] == [0.0] * len(hidden)
    assert hidden[1]["trpo/gain_rate"] == pytest.approx(plain[1]["trpo/gain_rate"], rel=0.3)


def test_fitting_values_does_not_move_the_policy(trpo_recipe, monkeypatch):
    fit, moved = trpo.fit_values, []

    def spy(recipe, learner, experience, rng):
        before = {name: tensor.detach().clone() for name, tensor in learner.policy.trainable_parameters().items()}
        stats = fit(recipe, learner, experience, rng)
        now = learner.policy.trainable_parameters()
        moved.append(any(not torch.equal(now[name], before[name]) for name in before))
        return stats

    monkeypatch.setattr(trpo, "fit_values", spy)
    run_trpo(trpo_recipe("run.steps=2"), resume=False)
    assert moved == [False, False]


def test_a_gradient_that_is_no_number_stops_the_run(trpo_recipe, monkeypatch):
    gain = trpo.surrogate
    monkeypatch.setattr(trpo, "surrogate", lambda *args: gain(*args) * math.nan)
    recipe = trpo_recipe("run.save_every=1")
    with pytest.raises(DivergedError, match="gradient"):
        run_trpo(recipe, resume=False)
    assert not (Path(recipe.run.output) / "final").exists()


def test_the_first_bandit_step_is_the_listed_one(bandit_trpo):
    # δ = .01 with hardly any damping: the LoRA of rank 4 on the head can be any table, so the step is ORACLE-A's,
    # 0.010268 nats, but for the noise of 4,096 responses.
    _, (row,) = ran(bandit_trpo("run.steps=1", "sampling.responses_per_prompt=4096", "trpo.max_step_kl=0.01"))
    assert row["trpo/first_try_nats_per_response"] == pytest.approx(0.010268, rel=0.01)
    assert row["kl/step_nats_per_response"] <= 0.01
    assert row["trpo/line_search_tries"] == 2.0


def test_trust_region_steps_find_the_optimum_of_tiny_lm(tiny_trpo):
    recipe = tiny_trpo("run.steps=30", "trpo.max_step_kl=0.05")
    result = run_trpo(recipe, resume=False)
    policy = load_saved_policy(Path(result["final"]), recipe.model, device=torch.device("cpu"), is_adapter=True)
    assert kl(spoken(policy), BEST) < 1e-4
    assert kl(spoken(policy), RHO) == pytest.approx(BEST_KL, abs=1e-3)


# --- recipes ---------------------------------------------------------------------------------------------------------


ALONE = ("trpo.baseline=rloo", "optim.lr=1e-4", "trpo.value_minibatch_size=64")


@pytest.mark.parametrize(("keys", "named"), [
    (("kl.placement=loss",), r"kl\.placement"),
    (("trpo.baseline=rloo",), r"optim\.lr"),
    (("trpo.baseline=rloo", "optim.lr=1e-4"), r"trpo\.value_minibatch_size"),
    ((*ALONE, "trpo.value_function=head"), r"trpo\.value_function"),
    ((*ALONE, "trpo.value_function=upper", "trpo.value_layers=0.5"), r"trpo\.value_layers"),
    (("optim.batch_size=8",), r"optim\.batch_size"),
    (("trpo.fisher_fraction=0",), r"trpo\.fisher_fraction"),
])
def test_what_trpo_does_not_read_is_refused_by_name(trpo_recipe, keys, named):
    with pytest.raises(RecipeError, match=named):
        trpo_recipe(*keys)
