"""``kltune ppo`` from recipe to result: what it leaves behind, what it keeps still, what it refuses."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kltune.core.tensors import per_response
from kltune.errors import DivergedError, ModelError, ScorerError
from kltune.lm.data.examples import Prompt
from kltune.lm.fast.lower_layers import LowerLayers
from kltune.lm.model.opening import load_saved_policy
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import sample_rollout, uniform_numbers
from kltune.recipe import load_recipe
from kltune.report.pages import write_page
from kltune.run import session as opening
from kltune.stages import ppo
from kltune.stages.ppo import run_ppo
from kltune.train import batch as batches
from kltune.train import value_function
from kltune.train.evaluation import finish as finishing
from tests.stages.conftest import ran, read_jsonl, rows_of
from tests.tiny_policies import randomize

STEP_KEYS = {
    "step",
    "kl/ref_nats_per_response",
    "kl/ref_stderr",
    "kl/ref_nats_per_token",
    "kl/beta",
    "kl/step_nats_per_response",
    "score/mean",
    "time/step_seconds",
    "time/sample_seconds",
    "time/update_seconds",
    "responses_per_second",
}
RESULT_KEYS = {"schema", "status", "output", "final", "steps", "kl", "target", "score", "seconds"}
RUN_KEYS = {"schema", "kltune_version", "stage", "status", "seed", "reference", "versions", "started", "ended"}
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@contextmanager
def keeping_policy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Policy]]:
    """The policies that runs load while this lasts."""
    kept: list[Policy] = []
    load = opening.load_policy

    def keep(*args, **keys):
        kept.append(load(*args, **keys))
        return kept[-1]

    with monkeypatch.context() as patch:
        patch.setattr(opening, "load_policy", keep)
        yield kept


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def status(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["status"]


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_the_contract_promises(ppo_recipe, llama, monkeypatch):
    recipe = ppo_recipe("run.steps=4", "run.save_every=2", "run.eval_every=3")
    monkeypatch.setattr(finishing, "write_page", write_page)
    with keeping_policy(monkeypatch) as policies:
        result = run_ppo(recipe, resume=False)
    folder = Path(recipe.run.output)

    assert load_recipe(folder / "recipe.yaml") == recipe
    record = json.loads((folder / "run.json").read_text())
    assert record.keys() >= RUN_KEYS
    assert (record["status"], record["stage"], record["seed"]) == ("finished", "ppo", 0)
    assert record["reference"].keys() >= {"path", "sha256", "tokenizer_sha256", "template_sha256"}

    rows = rows_of(recipe)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row.keys() >= STEP_KEYS and "nonfinite" not in row for row in rows)
    assert [("eval/kl_ref_nats_per_response" in row) for row in rows] == [False, False, True, False]
    samples = read_jsonl(folder / "samples.jsonl")
    assert {row["step"] for row in samples} == {1, 3, 4}
    assert all(row.keys() >= {"prompt", "response", "score", "ref_kl"} for row in samples)

    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert checkpoints == ["step-000002", "step-000004"]
    for saved in (folder / "checkpoints" / "step-000004", folder / "final"):
        info = json.loads((saved / "kltune.json").read_text())
        assert {path.name for path in saved.iterdir()} >= ADAPTER_FILES | {"kltune.json"}
        assert info["reference"] == record["reference"]
        assert info["kl"]["nats_per_response"] >= 0.0
    assert (folder / "checkpoints" / "step-000004" / "state" / "state.json").exists()

    assert result == json.loads((folder / "result.json").read_text())
    assert result.keys() >= RESULT_KEYS
    assert result["kl"].keys() >= {"nats_per_response", "stderr", "ci95"}
    assert (result["status"], result["steps"], result["target"]) == ("finished", 4, 0.5)
    assert result["final"] == str(folder / "final")
    assert result["kl"]["prompts"] == 10  # the held-out ones

    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html")
    assert "http://" not in page.replace("http://www.w3.org/", "")  # one page, nothing fetched

    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).state_dict()
    for name, tensor in policies[0]._reference_tensors.items():
        assert torch.equal(tensor, base[name]), f"{name} moved"
    assert len(policies[0]._reference_tensors) == len(base)


def test_nothing_has_moved_before_step_one(ppo_recipe):
    _, (first, second) = ran(ppo_recipe("run.steps=2"))
    assert first["kl/ref_nats_per_response"] == first["kl/ref_nats_per_token"] == 0.0
    assert first["kl/ref_k1_nats_per_response"] == 0.0
    assert second["kl/ref_nats_per_response"] > 0.0


@pytest.mark.parametrize("baseline", ["value", "rloo", "grpo"])
def test_a_reward_is_raised(ppo_recipe, baseline):
    recipe = ppo_recipe(
        f"ppo.baseline={baseline}", "kl.target=4", "run.steps=15", "sampling.responses_per_prompt=4",
        "ppo.minibatch_size=16", "lora.targets=[lm_head]",
    )
    scores = [row["score/mean"] for row in ran(recipe)[1]]
    assert sum(scores[-3:]) > 2 * sum(scores[:3])


@pytest.mark.parametrize("placement", ["reward", "loss"])
def test_adapters_on_upper_layers_are_saved_as_such_and_what_is_computed_once_changes_nothing(
    ppo_recipe, monkeypatch, tmp_path, placement
):
    changes = ("run.steps=3", "lora.layers=0.5", f"kl.placement={placement}", "sampling.temperature=1.0")
    result, rows = ran(ppo_recipe(*changes, output=str(tmp_path / "once")))
    final = Path(result["final"])
    assert json.loads((final / "adapter_config.json").read_text())["layers_to_transform"] == [1]
    assert all(".layers.1." in name for name in adapter(final))
    recipe = ppo_recipe(*changes, output=str(tmp_path / "anew"))
    policy = load_saved_policy(final, recipe.model, device=torch.device("cpu"), is_adapter=True)
    assert policy.network.fast.lower_layers().there
    monkeypatch.setattr(LowerLayers, "_serve", lambda self: False)
    other, others = ran(recipe)
    assert other["kl"]["nats_per_response"] == pytest.approx(result["kl"]["nats_per_response"], rel=1e-3)
    for name in ("kl/ref_nats_per_response", "ppo/policy_loss", "ppo/value_loss", "kl/step_nats_per_response"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in others], rel=1e-3, abs=1e-6), name


def test_a_finished_run_is_not_run_again(ppo_recipe, monkeypatch):
    recipe = ppo_recipe("run.steps=1")
    result = run_ppo(recipe, resume=False)
    monkeypatch.delattr(ppo, "take_step")
    monkeypatch.delattr(opening, "load_policy")
    assert run_ppo(recipe, resume=False) == result
    assert run_ppo(recipe, resume=True) == result


def test_prompts_go_round_in_reshuffled_epochs(ppo_recipe, monkeypatch):
    seen: list[str] = []
    respond = batches.sample_responses
    monkeypatch.setattr(batches, "sample_responses", lambda *args: seen.append(r := respond(*args)) or r)
    run_ppo(ppo_recipe("run.steps=3", "sampling.prompts_per_step=8"), resume=False)
    asked = [rollout.prompts[i] for rollout in seen for i in range(0, 16, 2)]
    assert len(set(asked[:12])) == len(set(asked[12:24])) == 12
    assert asked[:12] != asked[12:24]


# --- units -----------------------------------------------------------------------------------------------------------


def test_a_target_per_token_is_the_target_per_response_of_its_length(ppo_recipe, monkeypatch):
    targets = []
    from kltune.core.control.controllers import LogPI

    def spy(self, ref_kl, target, *, pull, responses):
        targets.append(target)
        return replace(self, beta=1.0)

    monkeypatch.setattr(LogPI, "updated", spy)
    recipe = ppo_recipe("kl.unit=nats_per_token", "kl.target=0.1", "run.steps=2")
    lengths = [row["response/tokens"] for row in ran(recipe)[1]]
    assert targets == pytest.approx([0.1 * length for length in lengths])


# --- one update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("price", [(), ("kl.placement=loss",), ("kl.placement=loss", "kl.estimator=k2")])
def test_micro_batches_add_up_to_the_minibatch(ppo_recipe, tmp_path, price):
    finals = []
    for name, micro in (("whole", "null"), ("parts", "3")):
        recipe = ppo_recipe(f"optim.micro_batch_size={micro}", "run.steps=2", *price, output=str(tmp_path / name))
        finals.append(adapter(Path(run_ppo(recipe, resume=False)["final"])))
    whole, parts = finals
    gap = max((whole[name] - parts[name]).abs().max().item() for name in whole)
    # Adam turns a gradient's sign into a step of lr = 0.02, so that 1e-4 is a relative error of 5e-3 in one weight;
    # whether rows share their prompt's computation, and so how it is rounded, depends on how they are split.
    assert gap < 1e-4
    assert max(tensor.abs().max().item() for name, tensor in whole.items() if "lora_B" in name) > 0.01


def test_the_gradients_of_micro_batches_add_up(ppo_recipe, monkeypatch):
    gradients: dict[str, list[torch.Tensor]] = {}
    step = ppo.guarded_step

    def spy(optimizer, max_grad_norm, what):
        found = [p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients.setdefault(what, []).append(torch.cat([grad.flatten() for grad in found]))
        return step(optimizer, max_grad_norm, what)

    for module in (ppo, value_function):
        monkeypatch.setattr(module, "guarded_step", spy)
    folder = Path(ppo_recipe().run.output).parent
    for micro in ("null", "3"):
        recipe = ppo_recipe(
            f"optim.micro_batch_size={micro}", "run.steps=1", "ppo.epochs=1", "ppo.minibatch_size=16",
            output=str(folder / f"micro-{micro}"),
        )
        run_ppo(recipe, resume=False)
    for what, (whole, parts) in gradients.items():
        assert whole.norm() > 0, what
        assert torch.allclose(whole, parts, rtol=0, atol=1e-6), what


def test_a_step_is_left_early_once_it_has_gone_far_enough(ppo_recipe):
    for row in ran(ppo_recipe("ppo.epochs=10", "ppo.stop_step_kl=0.01", "optim.lr=0.05", "run.steps=2"))[1]:
        assert 1 <= row["ppo/minibatches"] < 20
        assert row["kl/step_nats_per_response"] > 0.015


def test_a_step_goes_no_further_than_the_target_leaves_room_for(ppo_recipe):
    _, rows = ran(ppo_recipe("ppo.epochs=4", "optim.lr=0.05", "run.steps=8", "kl.target=0.5"))
    for row in rows:
        assert row["kl/step_limit_nats_per_response"] <= 4 * 0.06 * 0.5 + 1e-12
        seen = row["kl/step_nats_per_response"] * (7 / 8) ** 2      # before the last of eight updates
        assert seen <= row["kl/step_limit_nats_per_response"] or row["ppo/minibatches"] < 8
    assert rows[-1]["optim/lr"] < 0.1 * 0.05
    assert max(row["kl/ref_nats_per_response"] for row in rows) < 1.0


@pytest.mark.parametrize("setting", ["kl.control=fixed", "kl.target=1e9"])
def test_without_a_limit_every_epoch_is_walked(ppo_recipe, setting):
    price = ("kl.beta=0.1",) if setting == "kl.control=fixed" else ()
    _, (row,) = ran(ppo_recipe("ppo.epochs=3", "run.steps=1", setting, *price))
    assert row["ppo/minibatches"] == 6
    assert (row["kl/step_limit_nats_per_response"] is None) == (setting == "kl.control=fixed")


def test_log_probs_that_are_not_the_policys_own_are_refused(ppo_recipe, monkeypatch):
    respond = batches.sample_responses

    def tampered(*args):
        rollout = respond(*args)
        return replace(rollout, logprobs=rollout.logprobs - 0.01 * rollout.response_mask)

    monkeypatch.setattr(batches, "sample_responses", tampered)
    recipe = ppo_recipe()
    with pytest.raises(ModelError, match=r"a log-probability differs by 0\.01 nats"):
        run_ppo(recipe, resume=False)
    assert status(Path(recipe.run.output)) == "failed"
    assert not (Path(recipe.run.output) / "checkpoints").exists()


# --- numbers that are none -------------------------------------------------------------------------------------------


def test_a_score_that_is_no_number_stops_the_run(ppo_recipe):
    recipe = ppo_recipe("run.save_every=1", "reward.0.path=rewards.py:nan_later")
    with pytest.raises(ScorerError, match="nan") as caught:
        run_ppo(recipe, resume=False)
    folder = Path(recipe.run.output)
    assert caught.value.exit_code == 5
    assert status(folder) == "failed"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000001"]
    assert not (folder / "final").exists()
    assert not (folder / "result.json").exists()


def test_a_gradient_that_is_no_number_stops_the_run_and_nothing_of_it_is_saved(ppo_recipe, monkeypatch):
    calls = []
    loss = ppo.clipped_policy_loss

    def poisoned(*args):
        calls.append(None)
        return loss(*args) * (math.nan if len(calls) == 6 else 1.0)  # the second minibatch of the second step

    monkeypatch.setattr(ppo, "clipped_policy_loss", poisoned)
    with keeping_policy(monkeypatch) as policies, pytest.raises(DivergedError) as caught:
        run_ppo(recipe := ppo_recipe("run.save_every=1"), resume=False)
    folder = Path(recipe.run.output)
    assert caught.value.exit_code == 6
    assert status(folder) == "failed"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000001"]
    assert not (folder / "final").exists()
    assert all(torch.isfinite(p).all() for p in policies[0].trainable_parameters().values())


def test_weights_that_stop_being_numbers_are_never_saved(ppo_recipe, monkeypatch):
    improve = ppo.improve

    def broken(recipe, learner, experience, **rest):
        stats = improve(recipe, learner, experience, **rest)
        next(iter(learner.policy.trainable_parameters().values())).data[0, 0] = math.nan
        return stats

    monkeypatch.setattr(ppo, "improve", broken)
    recipe = ppo_recipe("run.save_every=1")
    with pytest.raises(DivergedError) as caught:
        run_ppo(recipe, resume=False)
    assert caught.value.exit_code == 6
    assert list((Path(recipe.run.output) / "checkpoints").glob("*")) == []


@pytest.mark.parametrize("baseline", ["value", "rloo", "grpo"])
def test_a_constant_on_all_scores_and_their_unit_change_nothing(ppo_recipe, tmp_path, baseline):
    rows, results = {}, {}
    for name in ("score", "shifted", "scaled"):
        keys = (f"reward.0.path=rewards.py:{name}", f"ppo.baseline={baseline}", "run.steps=5")
        results[name], rows[name] = ran(ppo_recipe(*keys, output=str(tmp_path / name)))
    for name, unit in (("shifted", 1.0), ("scaled", 100.0)):
        assert results[name]["kl"]["nats_per_response"] == pytest.approx(
            results["score"]["kl"]["nats_per_response"], rel=1e-2
        )
        price = 1.0 if baseline == "grpo" else unit     # which divides the scores by their spread
        for mine, plain in zip(rows[name], rows["score"], strict=True):
            assert mine["kl/beta"] == pytest.approx(price * plain["kl/beta"], rel=1e-2)
            assert mine["kl/ref_nats_per_response"] == pytest.approx(plain["kl/ref_nats_per_response"], rel=2e-2)


@pytest.mark.parametrize("baseline", ["value", "rloo", "grpo"])
@pytest.mark.parametrize("price", [(), ("kl.control=fixed", "kl.beta=0")])
def test_a_batch_of_like_scores_moves_no_policy_that_is_below_its_target_or_free(ppo_recipe, capsys, baseline, price):
    keys = ("reward.0.path=rewards.py:flat", f"ppo.baseline={baseline}", "run.steps=3", *price)
    result, rows = ran(ppo_recipe(*keys))
    assert capsys.readouterr().err.count("all answers to a prompt scored alike") == 1
    assert [row["kl/ref_nats_per_response"] for row in rows] == [0.0] * 3
    assert [row["ppo/minibatches"] for row in rows] == [0.0] * 3
    assert not any(tensor.any() for name, tensor in adapter(Path(result["final"])).items() if "lora_B" in name)
    assert all(("ppo/value_loss" in row) == (baseline == "value") for row in rows)      # it is fitted all the same


def test_a_fixed_price_draws_a_policy_back_whatever_the_scores(ppo_recipe):
    keys = ("kl.control=fixed", "kl.beta=1.0", "run.steps=2", "ppo.baseline=rloo", "reward.0.path=rewards.py:flat")
    _, rows = ran(ppo_recipe(*keys))
    assert all(row["ppo/minibatches"] > 0.0 for row in rows)


@pytest.mark.parametrize(("epochs", "close"), [(2, 0.3), (4, 0.15)])
def test_the_length_of_a_step_has_its_last_update_in_it(ppo_recipe, monkeypatch, epochs, close):
    improve, found = ppo.improve, []

    def improved(recipe, learner, experience, **more):
        metrics = improve(recipe, learner, experience, **more)
        found.append((batches.moved_since(learner.policy, experience.rollout, recipe), metrics))
        return metrics

    monkeypatch.setattr(ppo, "improve", improved)
    size = (f"ppo.epochs={epochs}", "ppo.minibatch_size=16", "optim.lr=1e-3", "run.steps=4", "kl.target=50")
    run_ppo(ppo_recipe(*size), resume=False)
    for moved, metrics in found:
        assert metrics["ppo/minibatches"] == epochs
        assert metrics["kl/step_nats_per_response"] == pytest.approx(moved, rel=close)


def test_a_run_until_its_target_goes_on_and_resumes_where_it_was(ppo_recipe):
    settings = ("run.until=target", "run.steps=4", "kl.target=0.3", "optim.lr=0.02", "run.save_every=5")
    recipe = ppo_recipe(*settings)
    result = run_ppo(recipe, resume=False)
    assert 9 <= result["steps"] <= 20
    whole = adapter(Path(result["final"]))

    again = ppo_recipe(*settings, output=f"{recipe.run.output}-again")
    run_ppo(again, resume=False)
    folder = Path(again.run.output)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "final")
    for checkpoint in sorted((folder / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    resumed = run_ppo(again, resume=True)
    assert resumed["steps"] == result["steps"]
    assert all(torch.equal(tensor, whole[name]) for name, tensor in adapter(Path(resumed["final"])).items())


def test_a_reward_that_pulls_nowhere_ends_a_run_until_its_target_and_is_named(ppo_recipe, capsys):
    result = run_ppo(ppo_recipe("run.until=target", "run.steps=9", "reward.0.path=rewards.py:flat"), resume=False)
    assert (result["steps"], result["target_unused"], result["unused_because"]) == (9, True, "reward")
    assert "because the reward pulls no further" in capsys.readouterr().err


def test_what_rounding_makes_of_a_step_ends_none(ppo_recipe, monkeypatch, tmp_path):
    # As in bfloat16, where the same policy gives other log-probs in another batch: more than a step may move it.
    exact, plain = ppo.kl_k3, ran(ppo_recipe())[1]
    monkeypatch.setattr(ppo, "kl_k3", lambda old, new, mask: exact(old, new, mask) + 0.05 * mask)
    rounded = ran(ppo_recipe(output=str(tmp_path / "rounded")))[1]
    for row, other in zip(plain, rounded, strict=True):
        assert other["kl/step_nats_per_response"] == pytest.approx(row["kl/step_nats_per_response"], abs=0.05)
        assert other["ppo/minibatches"] >= 1


def test_in_bfloat16_rounding_is_not_taken_for_a_step(open_policy, ppo_recipe):
    # After the least of updates everything is rounded anew; before it, two passes may round alike.
    policy, recipe = open_policy(dtype="bfloat16"), ppo_recipe()
    randomize(policy.trainable_parameters())
    prompts = [Prompt((5 + n, 6), "", "") for n in range(24)]
    uniforms = uniform_numbers(np.random.default_rng(0), len(prompts), 16)
    rollout = sample_rollout(policy, prompts, uniforms, temperature=1.0)
    generator = torch.Generator().manual_seed(0)
    for tensor in policy.trainable_parameters().values():
        tensor.data.mul_(1.0 + 1e-3 * torch.randn(tensor.shape, generator=generator))
    moved, rounding = batches.moved_since(policy, rollout, recipe), batches.rounding_of(rollout)
    assert 1e-4 < moved < 0.1       # as far as a short step, of which next to nothing is one
    assert rounding == pytest.approx(moved, rel=0.6)
    # Of eight responses it scatters about that of all.
    of_eight = per_response(rollout.rounding, rollout.response_mask).view(3, 8).mean(1)
    assert ((of_eight - rounding).abs() <= batches.rounding_scatter(rollout, 8)).all()
    assert batches.rounding_scatter(rollout, 8) < 3.0 * rounding
