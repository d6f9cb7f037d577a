"""A number that stops being finite ends the run within its step, is named, and reaches no file: every site, one by one.

A site is a function through which a run's numbers go. From the second step on what it gives has one number replaced;
nothing before it is touched, so that its own guard, and no earlier one, has to see it. A few are tried here always, all
of them by ``make stress``.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kltune.errors import KltuneError
from kltune.train import loop
from tests.stages.conftest import RUNS, read_jsonl

BAD = (math.nan, math.inf, -math.inf)
PRICED = ("kl.control=fixed", "kl.beta=0.1")
EVALUATED = ("run.eval_every=1",)
LOSS = (*PRICED, "kl.placement=loss")
RLOO = ("ppo.baseline=rloo",)

# stage -> (what is replaced, "module:name" or "module:Class.name" with the field of what it gives; what the message
# says; overrides). What the message says is the number's own name: a gradient may only be named where one is replaced.
ROLLOUT = "kltune.train.batch:sample_rollout"
STEP, GRADIENT = "torch.optim:AdamW.step", "torch.nn.utils:clip_grad_norm_"
OPTIMIZER = {
    f"{STEP} weights": ("weights of the .* after its step",), f"{STEP} exp_avg": ("exp_avg of the .* after",),
    f"{STEP} exp_avg_sq": ("exp_avg_sq of the .* after",), f"{GRADIENT} gradient": ("the gradient of the .* is",),
}
SAMPLED = {
    f"{ROLLOUT} logprobs": ("advantages|log-probability differs|natural gradient|loss of|KL",),
    f"{ROLLOUT} ref_logprobs": ("advantages|kl/ref_k1|reference's log-probabilities of pairs",),
    f"{ROLLOUT} entropy": ("policy/entropy_nats_per_token: found",),
    "kltune.lm.rewards.scorers:Scorer.__call__": ("the spread of the scores: found",),
}
HELD_OUT = {
    "kltune.train.evaluation.held_out:measure_kl entropy": ("eval/entropy_nats_per_token: found", *EVALUATED),
    "kltune.train.evaluation.held_out:measured_scores score": ("eval/score_mean: found", *EVALUATED),
    "kltune.train.evaluation.held_out:clustered_mean 0": (r"eval/score_mean: found", *EVALUATED),
}
PPO_AND_TRPO = SAMPLED | HELD_OUT | {
    "kltune.lm.model.policy:Policy.measure_values 0": ("advantages|spread of the scores",),
    "kltune.train.experience:gae 0": ("advantages and returns: found",),
    "kltune.train.experience:gae 1": ("advantages and returns: found",),
    "kltune.train.value_function:clipped_value_loss": ("the loss of the value function: found",),
    **OPTIMIZER,
}
SITES: dict[str, dict[str, tuple[str, ...]]] = {
    "ppo": PPO_AND_TRPO | {
        "kltune.lm.model.policy:Policy.logprobs": ("log-probability differs by (nan|inf)",),
        "kltune.stages.ppo:clipped_policy_loss": ("the loss of the policy: found",),
        "kltune.stages.ppo:kl_k3": (r"KL\(old ‖ new\) of a minibatch: found",),
        "kltune.stages.ppo:clip_fraction": ("ppo/clip_fraction: found",),
        "kltune.stages.ppo:exact_kl_loss": ("the loss of the policy: found", *LOSS, *RLOO),
        "kltune.train.experience:leave_one_out": ("advantages: found", *RLOO),
        "kltune.train.experience:group_normalized": ("advantages: found", "ppo.baseline=grpo"),
    },
    "trpo": PPO_AND_TRPO | {
        "kltune.stages.trpo:surrogate": ("the policy gradient|shortest step tried",),
        "kltune.stages.trpo:policy_gradient 0": ("curvature|natural gradient|slope|trpo/gradient_norm",),
        "kltune.stages.trpo:mean_curvature": ("curvature along|natural gradient|the curvature of a step",),
        "kltune.lm.model.curvature:Fisher.__call__": ("the mean curvature: found",),
        "kltune.stages.trpo:conjugate_gradient x": ("the (curvature|slope) of a step|natural gradient",),
        "kltune.stages.trpo:conjugate_gradient residual": ("trpo/cg_residual: found",),
        "kltune.stages.trpo:step_scale": ("the length of the step: found",),
        "kltune.lm.model.snapshot:StepKL.measure 0": (r"KL\(old ‖ new\) and gain of the shortest step tried: found",),
        "kltune.lm.model.snapshot:StepKL.measure 1": (r"KL\(old ‖ new\) and gain of the shortest step tried: found",),
    },
    "dpo": {
        "kltune.lm.model.policy:Policy.logprobs": ("the log-probabilities of pairs: found",),
        "kltune.train.preferences:Preferences.select ref_logprobs": ("reference's log-probabilities of pairs: found",),
        "kltune.stages.dpo:preference_losses": ("the loss of the pairs: found",),
        "kltune.stages.dpo:exact_kl_loss": ("the loss of the KL: found", *PRICED),
        "kltune.stages.dpo:preference_metrics pairs/margin_nats": ("pairs/margin_nats: found",),
        "kltune.stages.dpo:dynamic_beta": ("the loss of the pairs: found", "dpo.dynamic_beta=0.6"),
        f"{ROLLOUT} entropy": ("policy/entropy_nats_per_token: found", *PRICED),
        f"{ROLLOUT} ref_logprobs": ("kl/ref_k1_nats_per_response: found", *PRICED),
        "kltune.train.evaluation.held_out:measure_kl entropy": ("eval/entropy_nats_per_token: found", *EVALUATED),
        "kltune.train.evaluation.held_out:pair_metrics eval/margin_nats": (
            "eval/margin_nats: found", "eval.pairs=held_out_pairs.jsonl", "eval.prompts=null", *EVALUATED),
        **OPTIMIZER,
    },
    "online": SAMPLED | {
        f"{ROLLOUT} logprobs": ("kl/ref_k1_nats_per_response: found|loss of|gradient of",),
        f"{ROLLOUT} ref_logprobs": ("kl/ref_k1|log-probabilities of pairs", *PRICED),
        "kltune.stages.dpo:preference_losses": ("the loss of the pairs: found",),
        "kltune.stages.dpo:response_logprobs 0": ("the loss of the pairs: found",),
        **OPTIMIZER,
    },
    "sft": {
        "kltune.lm.model.policy:Policy.logprobs": ("the loss of the policy: found",),
        "kltune.train.evaluation.held_out:document_nats 0": ("eval/(texts|tax)_nats_per_token: found", *EVALUATED),
        "kltune.train.evaluation.held_out:measure_kl entropy": ("eval/entropy_nats_per_token: found", *EVALUATED),
        "kltune.train.evaluation.held_out:diversity self_bleu": ("eval/self_bleu: found", *EVALUATED),
        **OPTIMIZER,
    },
    "reward": {
        "kltune.lm.rewards.reward_model:RewardModel.scores": ("the loss of the reward model: found",),
        "kltune.stages.reward:bradley_terry_loss": ("the loss of the reward model: found",),
        "kltune.stages.reward:centring_penalty": ("the loss of the reward model: found",),
        "kltune.lm.rewards.reward_model:RewardModel.measure_rows": (
            "the score of a held-out response is not finite", *EVALUATED),
        "kltune.lm.rewards.reward_evaluation:bradley_terry_loss": ("eval/loss: found", *EVALUATED),
        "kltune.lm.rewards.reward_evaluation:rank_correlation": ("eval/length_correlation: found", *EVALUATED),
        **OPTIMIZER,
    },
}
OFTEN = {
    ("ppo", f"{ROLLOUT} entropy"), ("ppo", f"{STEP} exp_avg_sq"), ("ppo", "kltune.train.experience:gae 0"),
    ("trpo", "kltune.lm.model.curvature:Fisher.__call__"), ("trpo", "kltune.stages.trpo:step_scale"),
    ("dpo", "kltune.stages.dpo:preference_losses"), ("sft", "kltune.lm.model.policy:Policy.logprobs"),
    ("dpo", "kltune.train.preferences:Preferences.select ref_logprobs"),
    ("reward", "kltune.stages.reward:bradley_terry_loss"),
}
INJECTIONS = [(stage, site, bad) for stage, sites in SITES.items() for site in sites for bad in BAD]


def with_bad(value: Any, bad: float, at: str = "") -> Any:
    """The same with a number that is not finite: the first of a tensor, or what has this name or place."""
    if at and isinstance(value, Mapping):
        return {**value, at: with_bad(value[at], bad)}
    if at and hasattr(value, "_replace"):
        return value._replace(**{at: with_bad(getattr(value, at), bad)})
    if at and is_dataclass(value):
        assert at in {field.name for field in fields(value)}
        return replace(value, **{at: with_bad(getattr(value, at), bad)})
    if at:
        return tuple(with_bad(item, bad) if place == int(at) else item for place, item in enumerate(value))
    if isinstance(value, Tensor):
        where = torch.zeros_like(value)
        where.view(-1)[0] = bad
        return value + where        # its gradient stays finite
    assert isinstance(value, float)
    return bad


@contextmanager
def injected(site: str, bad: float) -> Iterator[None]:
    """Within: a site gives a bad number from the second step on."""
    path, _, at = site.partition(" ")
    module, _, name = path.partition(":")
    owner: Any = import_module(module)
    *outer, name = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    whole, whole_step = getattr(owner, name), loop.whole_step
    done: list[int] = []

    def next_step(job: loop.Job, learner: loop.Learner, step: int, evaluates: bool) -> AbstractContextManager[None]:
        done.extend([step - 1] if step > 1 else [])
        return whole_step(job, learner, step, evaluates)

    def optimizer_step(self: Any, *arguments: Any, **options: Any) -> Any:
        found = whole(self, *arguments, **options)
        if done:
            parameter, entries = next(iter(self.state.items()))
            tensor = parameter.data if at == "weights" else entries[at]
            tensor.view(-1)[0] = bad
        return found

    def clipped(parameters: list[Tensor], *arguments: Any, **options: Any) -> Any:
        if done:
            parameters[0].grad.view(-1)[0] = bad
        return whole(parameters, *arguments, **options)

    def bad_now(*arguments: Any, **options: Any) -> Any:
        found = whole(*arguments, **options)
        return with_bad(found, bad, at) if done else found

    stand_in: Callable = {STEP: optimizer_step, GRADIENT: clipped}.get(path, bad_now)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stand_in)
        patch.setattr(loop, "whole_step", next_step)
        yield


def not_finite_on_disk(folder: Path) -> list[str]:
    """Files below that hold NaN or infinity, or a null that stands for one."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (safe_open is no dict)
            found += [str(path)] * any(t.is_floating_point() and not torch.isfinite(t).all() for t in tensors)
        elif path.suffix in (".json", ".jsonl"):
            found += [str(path)] * bool(re.search(r'NaN|Infinity|"nonfinite"', path.read_text(encoding="utf-8")))
    return found


def always(stage: str, site: str, bad: float) -> bool:
    """Whether an injection is tried in every run of the tests, and not by ``make stress`` alone."""
    return math.isnan(bad) and (stage, site) in OFTEN


@pytest.mark.parametrize(("stage", "site", "bad"), [
    pytest.param(*one, marks=() if always(*one) else pytest.mark.stress,
                 id="-".join((one[0], one[1].rpartition(":")[2].replace(" ", "."), str(one[2]))))
    for one in INJECTIONS
])
def test_a_number_that_is_not_finite_ends_the_run_in_its_step_by_its_name(request, record_property, stage, site, bad):
    record_property("injections of NaN and infinity", 1)
    said, *overrides = SITES[stage][site]
    recipe = request.getfixturevalue(f"{stage}_recipe")("run.save_every=1", *overrides)
    with injected(site, bad), pytest.raises(KltuneError) as caught:
        RUNS[recipe.stage](recipe, resume=False)
    assert caught.value.exit_code in (5, 6)
    assert re.search(said, str(caught.value)), str(caught.value)
    folder = Path(recipe.run.output)
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [1]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000001"]
    assert not (folder / "final").exists()
    assert not_finite_on_disk(folder) == []
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"


def test_there_are_enough_injections():
    assert len(INJECTIONS) >= 240
    assert {stage for stage, _, _ in INJECTIONS} >= {"ppo", "trpo", "dpo", "sft", "reward"}


@pytest.mark.parametrize(("stage", "bad"), [
    pytest.param(stage, bad, marks=() if (stage, bad) in {("sft", math.inf), ("ppo", math.nan)} or
                 (stage == "reward" and math.isnan(bad)) else pytest.mark.stress)
    for stage in ("ppo", "trpo", "dpo", "sft", "reward") for bad in BAD
])
def test_a_base_whose_weights_are_not_finite_is_refused_by_every_stage(request, llama, tmp_path, stage, bad):
    # The row of a token that no text has: nothing else would ever show it.
    recipe = request.getfixturevalue(f"{stage}_recipe")()
    tensors = load_file(llama / "model.safetensors")
    tensors["model.embed_tokens.weight"][2, 0] = bad
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in llama.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(broken)})})
    with pytest.raises(KltuneError, match=r"broken: .*embed_tokens\.weight has 1 of .* weights that are") as caught:
        RUNS[stage](recipe, resume=False)
    assert caught.value.exit_code == 5
    assert not (Path(recipe.run.output) / "checkpoints").exists()
