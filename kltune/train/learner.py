"""All that training changes, and so all that a checkpoint holds."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from kltune.core import ranks
from kltune.core.tensors import expect_finite
from kltune.errors import CheckpointError, OutOfMemory
from kltune.lm.data.examples import Prompt
from kltune.lm.machine.out_of_memory import UPDATING, phase
from kltune.lm.model.policy import Policy
from kltune.lm.rewards.judge import Judge
from kltune.lm.rewards.reward_model import RewardModel
from kltune.lm.rewards.scorers import Scorer
from kltune.recipe import DistillRecipe, DPORecipe, PPORecipe, Recipe, TRPORecipe
from kltune.recipe.stages import prompts_source
from kltune.run.checkpoint import measure_settings, read_state
from kltune.run.optimizer import load_optimizer, optimizer_tensors
from kltune.run.recorder import Report
from kltune.run.screen import doing
from kltune.run.session import Run
from kltune.train.budget import Budget, Groups
from kltune.train.evaluation.alarms import Alarms
from kltune.train.evaluation.held_out import HeldOut, Metrics
from kltune.train.rollout_server import RolloutServer

Result = TypeVar("Result")
BudgetRecipe = PPORecipe | TRPORecipe | DPORecipe | DistillRecipe
MODEL = "model"         # the group of what is trained; a checkpoint holds it as the adapter itself
ALARMS = "alarms"       # names of parts that the loop knows; a stage chooses the others
SCORER = "scorer"
VALUES = "value"        # its optimizer's name too


class Evaluation(Protocol):
    """Held-out rows, and how a model is measured on them. notes: one line on each file that was read.

    scored: whether something of the user's, a function or a judge, scores what the model says on them.
    """

    notes: Sequence[str]
    scored: bool
    judges: Sequence[Judge]     # AI judges that measuring may ask

    def measured(self, model: Any, scorer: Scorer | None, times: int = 1) -> tuple[Metrics, Any]:
        """Metrics of the model, and the measurement they come from; on ``times`` as many responses as usual."""
        ...


@dataclass(frozen=True)
class Job:
    """What stays the same from step to step.

    about: what kltune.json says of a checkpoint, from the model and its KL. prompts: to respond to. pair_judge:
    compares responses where nothing scores them. baseline: what a response is compared with, from the stage's section.
    server: draws the steps' responses; None where the trainer does.
    """

    recipe: Recipe
    run: Run
    report: Report
    steps: int
    held_out: HeldOut | Evaluation
    about: Callable[[Any, dict[str, Any] | None], dict[str, Any]]
    prompts: Sequence[Prompt] = ()
    pair_judge: Judge | None = None
    baseline: str | None = None
    server: RolloutServer | None = None

    def measured(self, model: Any, scorer: Scorer | None, times: int = 1) -> tuple[Metrics, Any]:
        """What ``held_out`` measures of the model; DivergedError names a metric that is not finite."""
        doing("evaluation")
        with ranks.phase("evaluating"):
            metrics, measured = self.held_out.measured(model, scorer, times)
        expect_finite_metrics(metrics)
        return metrics, measured


def expect_finite_metrics(metrics: Mapping[str, float | None]) -> None:
    """Let no metric that is NaN or infinite pass: whatever it comes from is found by then, and nothing is saved yet.

    Raises:
        DivergedError: names it.
    """
    for name, value in metrics.items():
        expect_finite(name, value)


def make_job(recipe: Recipe, run: Run, held_out: HeldOut | Evaluation, steps: int, **rest: Any) -> Job:
    """The job of a run, whose report waits to be opened; ``rest`` are further fields of Job."""
    kl = recipe.kl if isinstance(recipe, BudgetRecipe) else None
    budget = {} if kl is None else {"target": kl.target if kl.control == "target" else None, "unit": kl.unit}
    report = Report(
        run.folder, recipe.stage, steps, start_step=run.start_step, loggers=recipe.run.loggers, **budget
    )
    if getattr(recipe, "sampling", None) is not None and recipe.sampling.engine == "vllm":
        rest["server"] = RolloutServer(recipe.sampling, run.folder.name, lambda: run.stop_signal is not None)
    return Job(recipe, run, report, steps, held_out, **{"about": partial(about_policy, recipe), **rest})


def about_policy(recipe: Recipe, policy: Policy, kl: dict[str, Any] | None) -> dict[str, Any]:
    """What kltune.json says of a policy: its reference, its KL, and how that is measured again."""
    sampling = recipe.sampling
    settings = measure_settings(
        prompts_source(recipe), recipe.data, sampling.max_new_tokens, sampling.temperature, policy.template_day
    )
    kind, reference = "full" if policy.full else "adapter", policy.fingerprint.as_dict()
    return {"stage": recipe.stage, "kind": kind, "reference": reference, "kl": kl, "measure": settings}


class Part(Protocol):
    """Something that changes while a run goes on, and that a run which is resumed needs again.

    A part is immutable, and replaced in ``Learner.parts`` when it changes, but for tensors that an update writes into:
    a part that holds such tensors says so by ``moves``, and goes back with the policy when that does.
    """

    moves: bool

    def state(self) -> Mapping[str, Any]:
        """Plain finite values, fit for JSON."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Its tensors by name; not copies."""
        ...

    def restored(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Part":
        """The part as it was when it gave these, bit for bit; ``tensors`` are not written to.

        Raises:
            InputError: they do not belong to this run.
        """
        ...


@dataclass(frozen=True)
class Undo:
    """A learner between two steps: its budget and parts as they were, and copies of what a step writes into.

    tensors: None where nothing will have been written into.
    """

    budget: Budget | None
    parts: Mapping[str, Part]
    tensors: Groups | None


@dataclass
class Learner:
    """A policy in training.

    model: what is trained, saved and loaded: the policy, or a reward model on it. optimizers: by the name of what they
    train; the one called "policy" is left out where a stage needs none. budget: None in stages that hold none.
    parts: whatever else changes, by name; a stage brings its own.
    """

    model: Policy | RewardModel
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    budget: Budget | None = None
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def policy(self) -> Policy:
        """The policy that is trained, or whose trunk the reward model reads."""
        return self.model.policy if isinstance(self.model, RewardModel) else self.model

    @property
    def scorer(self) -> Scorer | None:
        """What scores responses; None where nothing does."""
        return self.parts.get(SCORER)

    @property
    def alarms(self) -> Alarms | None:
        """What evaluations have said of a reward being exploited; None in stages without responses."""
        return self.parts.get(ALARMS)

    def moving(self) -> dict[str, dict[str, Tensor]]:
        """The tensors that an update writes into, by group and name; not copies."""
        groups = {MODEL: dict(self.model.trainable_parameters())}
        groups |= {f"{name}_optimizer": optimizer_tensors(optimizer) for name, optimizer in self.optimizers.items()}
        return groups | {name: dict(part.tensors()) for name, part in self.parts.items() if part.moves}

    def copied(self) -> Groups:
        """Copies of what ``moving`` gives."""
        return {group: {k: v.detach().clone() for k, v in named.items()} for group, named in self.moving().items()}

    def put_back(self, groups: Groups) -> None:
        """Let the tensors hold what ``copied`` gave at some earlier time, bit for bit; the model may be left out."""
        self.put_model_back(groups.get(MODEL, {}))
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, groups.get(f"{name}_optimizer", {}))
        for name, part in self.parts.items():
            if part.moves:
                self.parts[name] = part.restored(part.state(), groups[name])

    def put_model_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Let the model alone be what it was."""
        here = self.model.trainable_parameters()
        for name, tensor in tensors.items():
            here[name].data.copy_(tensor)

    def model_copied(self) -> dict[str, Tensor]:
        """The model's trainable tensors as they are now."""
        return {name: tensor.detach().clone() for name, tensor in self.model.trainable_parameters().items()}

    def update(self, work: Callable[[], Result]) -> Result:
        """What an update gives. Where memory runs out in one, it is begun again with half as many sequences at once,
        for the rest of the run, and that is said; a second time it is not.

        work: gradients and a step. What it changes before its optimizer's step, ``undo`` puts back.

        Raises:
            OutOfMemory: it ran out once before, or in the halves as well.
        """
        network, before = self.policy.network, self.undo(copied=False)
        try:
            with phase(UPDATING, self.policy.device):
                return work()
        except OutOfMemory as error:
            if network.halved:
                raise
            print(f"warning: {error} Half as many sequences are trained on at once from now on.", file=sys.stderr)
        # Out of the handler, whose traceback holds the tensors of what failed.
        network.halved = True
        self.go_back(before)
        for tensor in (*self.model.trainable_parameters().values(), *self.policy.value_parameters().values()):
            tensor.grad = None
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()
        with phase(UPDATING, self.policy.device):
            return work()

    def undo(self, *, copied: bool = True) -> Undo:
        """This state, to ``go_back`` to; without ``copied`` for as long as no update was made."""
        return Undo(self.budget, dict(self.parts), self.copied() if copied else None)

    def go_back(self, undo: Undo) -> None:
        """Be again as when ``undo`` was made, bit for bit."""
        self.budget, self.parts = undo.budget, dict(undo.parts)
        if undo.tensors is not None:
            self.put_back(undo.tensors)

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """What an exact resume needs besides the model itself, by group."""
        groups: dict[str, Mapping[str, Tensor]] = {
            f"{name}_optimizer": optimizer_tensors(optimizer) for name, optimizer in self.optimizers.items()
        }
        groups |= {name: part.tensors() for name, part in self._named_parts().items()}
        return {group: named for group, named in groups.items() if named}

    def state(self) -> dict[str, Mapping[str, Any]]:
        """The rest, as plain values."""
        return {name: part.state() for name, part in self._named_parts().items()}

    def restore(self, checkpoint: Path) -> None:
        """Go on exactly from what ``tensors``, ``state`` and the model of a checkpoint say.

        Raises:
            CheckpointError: it is damaged, or does not hold what this run needs.
        """
        saved, state = read_state(checkpoint)
        names = self._named_parts().keys()
        known = names | {f"{name}_optimizer" for name in self.optimizers}
        # An optimizer that has taken no step has no tensors, so that a group under another name is all there is to see.
        wrong = [f"does not hold the state of {name}" for name in sorted(names - state.keys())]
        wrong += [f"holds {name}, which this run does not have" for name in sorted(saved.keys() - known)]
        if wrong:
            raise CheckpointError(
                f"{checkpoint} {', '.join(wrong)}: another version of kltune saved it. Choose another --output for a "
                "new run."
            )
        # A copy lies in memory as the original did; a file's does not, and sums depend on that in the last bit.
        device = self.policy.device
        groups = {group: {k: v.clone().to(device) for k, v in named.items()} for group, named in saved.items()}
        self.model.load_trained(checkpoint)
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, groups.get(f"{name}_optimizer", {}))
        self.parts = {name: part.restored(state[name], groups.get(name, {})) for name, part in self.parts.items()}
        if self.budget is not None:
            self.budget = self.budget.restored(state["budget"], groups.get("budget", {}))

    def _named_parts(self) -> dict[str, Part]:
        return self.parts if self.budget is None else {"budget": self.budget, **self.parts}
