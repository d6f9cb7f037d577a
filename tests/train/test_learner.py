"""What a run is made of is saved, restored, undone and put back to the last bit, whatever its parts are."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from random import Random

import pytest
import torch
from torch import Tensor

from kltune.core.control.adaptation import AdaptiveRadius, Damping
from kltune.core.kl.intervals import summarize
from kltune.errors import CheckpointError
from kltune.lm.model.opening import load_policy
from kltune.lm.model.policy import Policy
from kltune.lm.model.snapshot import Snapshot
from kltune.lm.rewards.scorers import Scorer, ScoreSource
from kltune.recipe import KLSection, LoraSection, ModelSection, OptimSection
from kltune.run import files
from kltune.run.checkpoint import save_checkpoint
from kltune.run.optimizer import guarded_step, make_optimizer
from kltune.stages.dpo import LossReference, RunningMeans
from kltune.stages.trpo import TrustRegion
from kltune.train.budget import Budget
from kltune.train.evaluation.alarms import Alarms
from kltune.train.learner import Learner, Part
from kltune.train.value_function import ValueFunction
from tests.tiny_policies import randomize

SECTIONS = {
    "fixed": {"control": "fixed", "beta": 0.1, "target": None}, "log_pi": {}, "ziegler": {"controller": "ziegler"},
    "dual": {"controller": "dual"},
}
BUDGETS = [f"budget {name}{cap}" for name in SECTIONS for cap in ("", " capped")]
OPTIMIZERS = ("policy optimizer", "value optimizer")
EVERYTHING = (
    *BUDGETS, "alarms", "trust_region at rest", "alarms with a peak", "scorer", "value", "trust_region",
    "loss_reference", "means", *OPTIMIZERS,
)
SLOTS = ("budget", *EVERYTHING[len(BUDGETS) + 2 :])


def some_of_it() -> list[tuple[str, ...]]:
    """Each part alone, every two, and a dozen larger sets; of budgets, one after the other."""
    numbers = Random(0)
    larger = [tuple(name for name in SLOTS if numbers.random() < 0.6) for _ in range(12)]
    sets = [*((name,) for name in EVERYTHING), *combinations(SLOTS, 2), *larger, SLOTS]
    return [tuple(BUDGETS[n % len(BUDGETS)] if name == "budget" else name for name in s) for n, s in enumerate(sets)]


@pytest.fixture(scope="module")
def policies(tiny_model: Callable[[str], str]) -> list[Policy]:
    """Two that are alike: one that is saved, and one that is restored."""
    lora, made = LoraSection(rank=2, alpha=4.0), []
    for _ in range(2):
        made.append(load_policy(ModelSection(path=str(tiny_model("llama"))), lora, device=torch.device("cpu")))
        made[-1].add_value_function(lora)
    return made


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch):
    monkeypatch.setattr(files.os, "fsync", lambda _: None)


def drawn(name: str, policy: Policy, seed: int, now: Part | None) -> Part:
    """A part whose every number is random; what an update would write into is written into."""
    x = Random(f"{name} {seed}").random
    if name == "value":
        randomize(policy.value_parameters(), seed)
        return ValueFunction(policy)
    if name == "loss_reference":
        reference = now or LossReference(Snapshot(policy.trainable_parameters()))
        randomize(reference.snapshot.tensors, seed)
        return reference
    if name == "scorer":
        return Scorer([ScoreSource(n, lambda *_: [], 1.0, True, {"kind": n}, shift=x(), scale=x()) for n in ("a", "b")])
    if name.startswith("trust_region"):
        step = torch.tensor([x(), x()]) if (seed % 2 == 0) == (name == "trust_region") else None
        return TrustRegion(Damping(100.0 * x(), seed % 2 > 0), AdaptiveRadius(x(), seed, x()), step)
    if name == "means":
        return RunningMeans(x(), x())
    alarms = Alarms(peak=Learner(policy).model_copied() if "peak" in name else None)
    for step in range(1, 4):
        metrics = {"eval/gold_mean": x(), "eval/gold_stderr": 0.01 * x(), "eval/reference_gold_mean": x(),
                   "eval/reference_gold_stderr": 0.01, "eval/response_tokens": 9.0 * x(), "eval/end_fraction": x(),
                   "eval/reference_response_tokens": 1.0, "eval/duplicate_fraction": x(),
                   "eval/reference_duplicate_fraction": 0.0, "eval/score_mean": x()}
        randomize(policy.trainable_parameters(), 10 * seed + step)
        quiet = {"nearer": "", "warn": lambda _: None}
        alarms = alarms.observed(step, metrics, 2, **quiet, copied=Learner(policy).model_copied)
    return alarms


def drawn_budget(name: str, learner: Learner, seed: int) -> Budget:
    """A budget that has seen a few batches, been refused and rolled back, and remembers the learner as it is."""
    numbers, (kind, *capped) = Random(f"{name} {seed}"), name.split()[1:]
    budget = Budget.of(KLSection(**SECTIONS[kind], hard_cap=2.0 if capped else None), steps=50)
    for _ in range(numbers.randrange(1, 4)):
        updated = budget.controller.updated(numbers.random(), 1.0, pull=numbers.random(), responses=8)
        budget = replace(budget, controller=updated, rollbacks=numbers.randrange(9)).refused()
    if capped:
        nats = torch.tensor([numbers.random() for _ in range(6)])
        kl = summarize("exact", nats, torch.full((6,), 3), torch.arange(6))
        budget = budget.remembered(numbers.randrange(9), kl, learner.copied())
    return budget


def stir(learner: Learner, names: Sequence[str], seed: int) -> Learner:
    """Let everything in a learner be other than it was."""
    policy = learner.policy
    for name in names:
        if name not in OPTIMIZERS and not name.startswith("budget"):
            slot = name.split()[0]
            learner.parts[slot] = drawn(name, policy, seed, learner.parts.get(slot))
    randomize(policy.trainable_parameters(), seed)
    for number, (name, optimizer) in enumerate(learner.optimizers.items()):
        for _ in range(seed + 1 - number):      # one that has taken no step yet, too
            for tensor in optimizer.param_groups[0]["params"]:
                tensor.grad = torch.full_like(tensor, 0.1 * (seed + 1))
            guarded_step(optimizer, max_grad_norm=1e9, what=name)
    for name in names:
        if name.startswith("budget"):
            learner.budget = drawn_budget(name, learner, seed)
    return learner


def make(policy: Policy, names: Sequence[str], seed: int) -> Learner:
    """A learner of these parts, of random numbers."""
    tensors = {"policy optimizer": policy.trainable_parameters(), "value optimizer": policy.value_parameters()}
    wanted = [name for name in OPTIMIZERS if name in names]
    optimizers = {name.split()[0]: make_optimizer(tensors[name], OptimSection(), name) for name in wanted}
    return stir(Learner(policy, optimizers), names, seed)


def everything(learner: Learner) -> tuple[dict, dict[str, Tensor]]:
    """All that a learner is: its plain values, and copies of its tensors by group and name."""
    groups = {"model": learner.policy.trainable_parameters()} | learner.tensors()
    tensors = {f"{g}/{n}": tensor.detach().clone() for g, named in groups.items() for n, tensor in named.items()}
    return json.loads(json.dumps(learner.state())), tensors


def differences(one: tuple[dict, dict], other: tuple[dict, dict]) -> list[str]:
    """Names of what is not the same to the last bit."""
    found = [name for name in one[0] | other[0] if one[0].get(name) != other[0].get(name)]
    names = one[1].keys() | other[1].keys()
    return found + sorted(
        name for name in names
        if name not in one[1] or name not in other[1] or one[1][name].dtype != other[1][name].dtype
        or not torch.equal(one[1][name], other[1][name])
    )


@pytest.mark.parametrize("names", some_of_it(), ids=", ".join)
def test_any_parts_are_saved_and_restored_undone_and_put_back_bit_for_bit(policies, tmp_path, names):
    learner = make(policies[0], names, seed=0)
    before, undo, groups = everything(learner), learner.undo(), learner.copied()
    folder = save_checkpoint(
        tmp_path, 1, learner.model.save, info={}, tensors=learner.tensors(), state=learner.state(), keep=1
    )
    fresh = make(policies[1], names, seed=1)
    assert differences(before, everything(fresh))
    fresh.restore(folder)
    assert differences(before, everything(fresh)) == []
    assert differences(before, everything(learner)) == []     # restoring one touches no other
    if fresh.budget is not None and fresh.budget.cap is not None:
        randomize(fresh.policy.trainable_parameters(), seed=9)
        fresh.put_back(fresh.budget.last_within.tensors)
        assert differences(before, everything(fresh)) == []

    for seed in (2, 4):     # an undo may be used again
        assert differences(before, everything(stir(learner, names, seed)))
        learner.go_back(undo)
        assert differences(before, everything(learner)) == []

    stir(learner, names, seed=3)
    stirred = everything(learner)
    learner.put_back(groups)
    moving = tuple(f"{group}/" for group in groups)
    changed = differences(stirred, everything(learner))
    assert all(name.startswith(moving) for name in changed)     # budget and memory of the run do not go back
    assert not any(name.startswith(moving) for name in differences(before, everything(learner)))


@pytest.mark.parametrize(("tensors", "words"), [
    ({}, "does not hold the state of budget, does not hold the state of trust_region: another version"),
    ({"optimizer": {"0.weight/exp_avg": torch.zeros(1)}}, "holds optimizer, which this run does not have: another"),
])
def test_a_checkpoint_of_other_parts_is_refused_by_their_names(policies, tmp_path, tensors, words):
    learner = make(policies[0], ("means", "policy optimizer"), seed=0)
    folder = save_checkpoint(tmp_path, 1, learner.model.save, info={}, tensors=tensors, state=learner.state(), keep=1)
    more = () if tensors else ("trust_region", "budget dual")
    with pytest.raises(CheckpointError, match=words):
        make(policies[1], ("means", "policy optimizer", *more), seed=1).restore(folder)
