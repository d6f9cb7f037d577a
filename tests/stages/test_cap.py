"""``kl.hard_cap``: what is beyond it is never called final, whatever the reward pulls at.

The reward counts a's (and pairs want them) at next to no price of a nat: without a cap every run here ends far beyond.
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kltune.errors import DivergedError, RecipeError
from kltune.lm.data.examples import RowRules, load_prompts
from kltune.lm.measure import interpolation
from kltune.lm.measure.measurement import Round, measure_kl
from kltune.lm.model.opening import load_saved_policy
from kltune.lm.model.sampler import Draw
from kltune.report.outcome import read_files, verdict_of
from kltune.stages import dpo, ppo
from kltune.stages.ppo import run_ppo
from kltune.train.evaluation import finish as finishing
from kltune.train.evaluation import held_out as evaluation
from kltune.train.evaluation.finish import finish
from kltune.train.evaluation.held_out import HeldOut
from tests.stages.conftest import ran, rows_of
from tests.stages.test_resume import timeless

HELD_OUT = ("eval.prompts=many.jsonl", "eval.responses=130")
PULL = (
    "kl.control=fixed", "kl.beta=0.001", "kl.target=null", "run.steps=12", *HELD_OUT,
    "sampling.prompts_per_step=32", "sampling.responses_per_prompt=1",
)
PULLED = {
    "ppo": (*PULL, "optim.lr=0.1", "ppo.minibatch_size=16"),
    "trpo": (*PULL, "trpo.max_step_kl=0.3"),
    "dpo": (*PULL, "optim.lr=0.1", "data.prompts=many.jsonl", "dpo.beta=0.05", "kl.beta=0"),     # no price at all
}


def info_of(folder: Path) -> dict:
    return json.loads((folder / "kltune.json").read_text())


@pytest.fixture(params=PULLED)
def pulled(request):
    """A function from more overrides to a recipe that runs away."""
    make = request.getfixturevalue(f"{request.param}_recipe")
    return lambda *more: make(*PULLED[request.param], *more)


def test_without_a_cap_the_policy_is_pulled_far_beyond(pulled):
    assert ran(pulled())[0]["kl"]["nats_per_response"] > 2.0


def test_final_is_within_the_cap_at_its_confidence(pulled, unlimited):
    recipe = pulled("kl.hard_cap=1")
    result, rows = ran(recipe)
    assert result["hard_cap"] == 1.0
    assert result["kl"]["ci95"][1] <= 1.0
    assert info_of(Path(result["final"]))["kl"]["ci95"][1] <= 1.0
    assert rows[-1]["kl/cap_rollbacks"] + rows[-1]["kl/cap_refusals"] >= 1
    assert rows[-1]["kl/cap_rollbacks"] == result["cap_rollbacks"]
    assert rows[0]["kl/beta"] <= 0.001
    assert max(row["kl/beta"] for row in rows) >= 0.0011     # well below the cap it is the recipe's again

    # The claim on other random numbers: its KL is within the cap there too.
    policy = load_saved_policy(Path(result["final"]), recipe.model, device=torch.device("cpu"), is_adapter=True)
    prompts, _ = load_prompts(recipe.eval.prompts, policy.tokenizer, RowRules(50, 1, None))
    again = measure_kl(policy, Round.of(prompts, 400), Draw(6, seed=99)).summary()
    assert again.nats_per_response <= 1.0


def test_a_cap_that_is_never_met_changes_nothing(ppo_recipe, tmp_path):
    numbers = []
    for name, keys in (("free", ()), ("capped", ("kl.hard_cap=1000",))):
        ran(ppo_recipe(*keys, output=str(tmp_path / name)))
        rows = timeless(tmp_path / name)
        numbers.append([{name: value for name, value in row.items() if "cap" not in name} for row in rows])
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize(("stage", "keys", "groups"), [
    (ppo, (), {"model", "policy_optimizer", "value", "value_optimizer"}),
    (dpo, ("dpo.reference_alpha=1.0",), {"model", "policy_optimizer", "loss_reference"}),
], ids=["ppo", "dpo"])
def test_going_back_restores_every_tensor_and_raises_the_price(request, monkeypatch, unlimited, stage, keys, groups):
    seen, enforce, name = [], stage.enforce_cap, stage.__name__.rpartition(".")[2]

    def spy(job, learner, step, batch, pull):
        last, price = learner.budget.last_within, learner.budget.price
        back = enforce(job, learner, step, batch, pull)
        if back:
            held = learner.moving()
            assert held.keys() == last.tensors.keys() == groups
            assert all(torch.equal(held[g][n], t) for g, named in last.tensors.items() for n, t in named.items())
            assert learner.budget.price >= 1.09 * price
            seen.append(step)
        return back

    monkeypatch.setattr(stage, "enforce_cap", spy)
    _, rows = ran(request.getfixturevalue(f"{name}_recipe")(*PULLED[name], *keys, "kl.hard_cap=1"))
    beyond = [row for row in rows if row["kl/ref_nats_per_response"] > 1.0]
    assert [row["step"] for row in beyond] == seen != []
    assert all(name not in row for row in beyond for name in ("ppo/policy_loss", "loss/mean"))    # they train nothing


@pytest.mark.parametrize("stage", ["ppo", "dpo"])
def test_steps_that_the_cap_leaves_room_for_seldom_meet_it(request, stage):
    recipe = request.getfixturevalue(f"{stage}_recipe")(*PULLED[stage], "kl.hard_cap=1", "run.steps=40")
    result, rows = ran(recipe)
    assert rows[-1]["kl/cap_rollbacks"] <= 8
    assert 0.5 < result["kl"]["nats_per_response"] <= result["kl"]["ci95"][1] <= 1.0


def test_trust_region_steps_do_not_pass_the_cap(trpo_recipe):
    _, rows = ran(trpo_recipe(*PULLED["trpo"], "kl.hard_cap=1", "run.steps=16"))
    assert rows[-1]["kl/cap_refusals"] >= 1
    assert max(row["kl/ref_nats_per_response"] for row in rows) < 1.1  # the line search left only chance
    assert all(row.get("kl/step_nats_per_response", 0.0) <= 0.3 for row in rows)


@pytest.mark.parametrize("stage", ["ppo", "dpo"])
def test_on_cap_stop_ends_with_6_and_final_is_the_last_state_within(request, unlimited, stage, monkeypatch):
    drawn = []
    monkeypatch.setattr(finishing, "write_page", lambda folder: drawn.append(verdict_of(read_files(folder))))
    recipe = request.getfixturevalue(f"{stage}_recipe")(*PULLED[stage], "kl.hard_cap=1", "kl.on_cap=stop")
    said = r"beyond kl\.hard_cap, 1.*kl\.on_cap is stop.*Raise kl\.beta.*lower optim\.lr"
    with pytest.raises(DivergedError, match=said) as caught:
        ran(recipe)
    assert caught.value.exit_code == 6
    folder = Path(recipe.run.output)
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    assert not (folder / "result.json").exists()
    assert info_of(folder / "final")["kl"]["ci95"][1] <= 1.0
    said, = drawn      # what the page says, which is drawn once
    assert said.word == "failed"
    assert "Failed after step" in said.sentences
    assert "The final policy is" in said.sentences
    rows = rows_of(recipe)
    assert rows[-1]["kl/ref_nats_per_response"] > 1.0
    assert all(row["kl/ref_nats_per_response"] <= 1.0 for row in rows[:-1])


def pushed_away(by: float):
    """``take_steps``, but before the end the policy is pushed away from its reference."""

    def worse(job, learner, steps):
        with torch.no_grad():
            for name, tensor in learner.policy.trainable_parameters().items():
                if "lora_B" in name:
                    tensor.add_(by)
        return finish(job, learner, steps)

    return partial(ppo.take_steps, finish=worse)


def test_a_final_beyond_the_cap_is_dialled_back_within_it(ppo_recipe, monkeypatch):
    monkeypatch.setattr(ppo, "take_steps", pushed_away(0.3))
    result, _ = ran(ppo_recipe("kl.hard_cap=1", "kl.target=0.9", "run.steps=4", *HELD_OUT))
    assert result["final_step"] == 4
    assert 0.0 < result["alpha"] < 1.0
    assert result["kl"]["ci95"][1] <= 1.0


def test_a_final_beyond_its_target_lands_on_it(ppo_recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(ppo, "take_steps", pushed_away(0.1))
    results = {}
    for land in ("true", "false"):
        recipe = ppo_recipe(f"kl.land={land}", "kl.target=0.3", "run.steps=4", *HELD_OUT, output=str(tmp_path / land))
        results[land] = run_ppo(recipe, resume=False)
    assert results["false"]["kl"]["ci95"][0] > 0.3
    assert results["false"]["alpha"] == 1.0
    low, high = results["true"]["kl"]["ci95"]
    assert low <= 0.3 <= high
    assert 0.0 < results["true"]["alpha"] < 1.0
    assert results["true"]["target_unused"] is False
    whole, landed = (load_file(Path(results[k]["final"]) / "adapter_model.safetensors") for k in ("false", "true"))
    for name in whole:
        scale = results["true"]["alpha"] if "lora_B" in name else 1.0
        torch.testing.assert_close(landed[name], scale * whole[name])


def test_what_has_landed_is_measured_on_numbers_that_did_not_choose_it(ppo_recipe, monkeypatch):
    monkeypatch.setattr(ppo, "take_steps", pushed_away(0.1))
    looks = {evaluation: [], interpolation: []}
    for module, seen in looks.items():
        def looked(policy, asked, draw, *, seen=seen, measure=module.measure_kl, **more):
            seen.append((draw.seed, asked))
            return measure(policy, asked, draw, **more)

        monkeypatch.setattr(module, "measure_kl", looked)
    result = run_ppo(ppo_recipe("kl.target=0.3", "run.steps=4", *HELD_OUT), resume=False)
    assert result["alpha"] < 1.0
    *chosen, reference, policy = looks[evaluation]
    assert policy == reference      # of which it says the same prompts and numbers
    assert policy[0] not in {seed for seed, _ in chosen + looks[interpolation]}
    assert f"--seed {policy[0]} " in (Path(result["final"]) / "README.md").read_text()


def test_a_final_that_is_landed_twice_says_what_is_left_of_its_adapter(ppo_recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(ppo, "take_steps", pushed_away(0.3))
    results = {}
    for name, key in {"whole": "kl.land=false", "twice": "kl.hard_cap=1"}.items():
        recipe = ppo_recipe("kl.target=0.3", key, "run.steps=4", *HELD_OUT, output=str(tmp_path / name))
        results[name] = run_ppo(recipe, resume=False)
    whole, landed = (
        load_file(Path(results[name]["final"]) / "adapter_model.safetensors") for name in ("whole", "twice")
    )
    for name in (name for name in whole if "lora_B" in name):
        torch.testing.assert_close(landed[name], results["twice"]["alpha"] * whole[name])


def test_a_final_below_its_target_is_left_where_it_is(ppo_recipe):
    result = run_ppo(ppo_recipe("kl.target=50", "run.steps=2", *HELD_OUT), resume=False)
    assert result["alpha"] == 1.0


def test_a_final_beyond_the_cap_is_not_called_final(ppo_recipe, monkeypatch):
    # The last update lands beyond the cap, where no batch would see it: final is what was measured before.
    monkeypatch.setattr(ppo, "take_steps", pushed_away(3.0))
    recipe = ppo_recipe("kl.hard_cap=1.5", "kl.target=0.3", "kl.land=false", "run.steps=4", *HELD_OUT)
    result = run_ppo(recipe, resume=False)
    assert result["final_step"] == 3
    assert result["kl"]["ci95"][1] <= 1.5
    last = load_file(Path(recipe.run.output) / "checkpoints/step-000004/adapter_model.safetensors")
    final = load_file(Path(result["final"]) / "adapter_model.safetensors")
    assert any(not torch.equal(last[name], final[name]) for name in last)


def test_where_no_state_is_within_nothing_is_called_final(ppo_recipe, monkeypatch):
    measured, measure = [], HeldOut.measured

    def far(self, policy, *args):
        with torch.no_grad():
            for name, tensor in policy.trainable_parameters().items():
                if "lora_B" in name:
                    tensor.fill_(0.5)
        measured.append(None)
        return measure(self, policy, *args)

    monkeypatch.setattr(HeldOut, "measured", far)
    recipe = ppo_recipe("kl.hard_cap=2", "kl.land=false", "run.steps=3", "run.save_every=1")
    with pytest.raises(DivergedError, match="nothing is called final") as caught:
        run_ppo(recipe, resume=False)
    assert caught.value.exit_code == 6
    assert not (Path(recipe.run.output) / "final").exists()
    assert len(measured) == 3  # after the last step, the last within, and the checkpoint before it


@pytest.mark.parametrize("keys", [("kl.exact=false",), ("sampling.prompts_per_step=1", "ppo.minibatch_size=2")])
def test_a_cap_that_could_not_be_held_is_refused_with_the_recipe(ppo_recipe, keys):
    with pytest.raises(RecipeError, match=r"kl\.hard_cap"):
        ppo_recipe("kl.hard_cap=5", *keys)


def test_a_cap_that_could_not_be_proven_is_refused_before_the_first_step(ppo_recipe, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "Once"}\n')
    recipe = ppo_recipe("kl.hard_cap=5", f"eval.prompts={tmp_path / 'one.jsonl'}")
    with pytest.raises(RecipeError, match=r"kl\.hard_cap: final would be measured on one prompt"):
        run_ppo(recipe, resume=False)
    assert not (Path(recipe.run.output) / "metrics.jsonl").exists()
