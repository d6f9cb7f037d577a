"""All that training changes, and so all that a checkpoint holds."""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from kltune.core.control.adaptation import Damping, Pace
from kltune.core.control.controllers import Controller
from kltune.core.hacking.detector import Watch
from kltune.core.kl.gate import Unit
from kltune.core.kl.intervals import KLSummary
from kltune.core.objectives.losses import clipped_value_loss
from kltune.errors import CheckpointError
from kltune.lm.data.examples import Prompt
from kltune.lm.model.batches import response_scatter
from kltune.lm.model.policy import Policy
from kltune.lm.model.snapshot import Snapshot
from kltune.lm.rewards.judge import Judge
from kltune.lm.rewards.scorers import Scorer
from kltune.recipe import DPORecipe, PPORecipe, TRPORecipe
from kltune.recipe.stages import prompts_source
from kltune.run.checkpoint import measure_settings, read_state
from kltune.run.optimizer import guarded_step, load_optimizer, optimizer_tensors, set_learning_rate
from kltune.run.recorder import Report
from kltune.run.session import Run
from kltune.train.budget import Cap, Safe
from kltune.train.evaluation import HeldOut
from kltune.train.experience import Experience

BudgetRecipe = PPORecipe | TRPORecipe | DPORecipe
LAST_STEP = "last_step"  # name of the group
PEAK = "gold_peak"  # likewise
SAFE = "safe_"  # in front of the names of groups that belong to the last state within the cap


@dataclass(frozen=True)
class Job:
    """What stays the same from step to step.

    baseline: what a response is compared with, from the stage's section; None in dpo, which has none.
    """

    recipe: BudgetRecipe
    run: Run
    report: Report
    prompts: list[Prompt]
    held_out: HeldOut
    steps: int
    baseline: str | None = None

    @property
    def grouping(self) -> dict[str, Any]:
        """How responses are compared, as the functions of ``lm.experience`` take it."""
        return {"baseline": self.baseline, "per_prompt": self.recipe.sampling.responses_per_prompt}


def about(recipe: BudgetRecipe, policy: Policy, kl: dict[str, Any] | None) -> dict[str, Any]:
    """What kltune.json says of a checkpoint: its reference, its KL, and how that is measured again."""
    sampling = recipe.sampling
    settings = measure_settings(prompts_source(recipe), recipe.data, sampling.max_new_tokens, sampling.temperature)
    reference = policy.fingerprint.as_dict()
    return {"stage": recipe.stage, "kind": "adapter", "reference": reference, "kl": kl, "measure": settings}


@dataclass(frozen=True)
class Kept:
    """A learner between two steps. values: its fields, which a step replaces. tensors: copies of what a step moves."""

    values: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


@dataclass
class Learner:
    """A policy in training. The optimizers hold exactly the policy's and the value function's own tensors."""

    policy: Policy
    controller: Controller
    scorer: Scorer | None = None  # where responses are scored
    judge: Judge | None = None  # where they are compared instead
    optimizer: Optimizer | None = None  # of the policy; a natural-gradient step has none
    value_optimizer: Optimizer | None = None
    damping: Damping | None = None  # of the natural-gradient step
    pace: Pace | None = None  # of the same
    last_step: Tensor | None = None  # the last one, [P], which the next batch judges
    cap: Cap | None = None
    reward_mean: float | None = None  # running, of the rewards that a preference loss implies, where it needs one
    margin_mean: float | None = None  # running, of its pairs' margins, nats, where its beta follows them
    loss_reference: Snapshot | None = None  # what it holds the policy against, where that moves: no budget's reference
    data_sha256: str | None = None  # of what is learnt from, where that is read and not sampled
    watch: Watch = field(default_factory=Watch)  # what evaluations have said
    peak: dict[str, Tensor] | None = None  # the policy of the highest gold score, where the run may end at it
    stopped_early: dict[str, Any] | None = None  # why it did, once it did

    def moving(self) -> dict[str, dict[str, Tensor]]:
        """The tensors that an update changes, by group and name; not copies."""
        policy, values = self.policy.trainable_parameters(), self.policy.value_parameters()
        groups: dict[str, dict[str, Tensor]] = {"policy": dict(policy)}
        if self.optimizer is not None:
            groups["optimizer"] = optimizer_tensors(self.optimizer, policy)
        if self.value_optimizer is not None:
            groups |= {"value": dict(values), "value_optimizer": optimizer_tensors(self.value_optimizer, values)}
        if self.loss_reference is not None:
            groups["loss_reference"] = dict(self.loss_reference.tensors)
        return groups

    def put_back(self, groups: dict[str, dict[str, Tensor]]) -> None:
        """Let the tensors hold what ``moving`` gave at some earlier time, bit for bit; "policy" may be left out."""
        policy, values = self.policy.trainable_parameters(), self.policy.value_parameters()
        self.put_policy_back(groups.get("policy", {}))
        if self.optimizer is not None:
            load_optimizer(self.optimizer, policy, groups.get("optimizer", {}))
        if self.value_optimizer is not None:
            self.policy.load_value_parameters(groups["value"])
            load_optimizer(self.value_optimizer, values, groups.get("value_optimizer", {}))
        if self.loss_reference is not None:
            for name, tensor in self.loss_reference.tensors.items():
                tensor.copy_(groups["loss_reference"][name])

    def put_policy_back(self, tensors: dict[str, Tensor]) -> None:
        """Let the policy be what ``policy_copied`` gave, and leave everything else."""
        here = self.policy.trainable_parameters()
        for name, tensor in tensors.items():
            here[name].data.copy_(tensor)

    def policy_copied(self) -> dict[str, Tensor]:
        """The policy's trainable tensors as they are now."""
        return {name: tensor.detach().clone() for name, tensor in self.policy.trainable_parameters().items()}

    def stop_momentum(self) -> None:
        """Let the policy's optimizer forget which way it was moving, not how large its gradients are."""
        tensors = optimizer_tensors(self.optimizer, self.policy.trainable_parameters())
        for name, tensor in tensors.items():
            if name.endswith("/exp_avg"):
                tensor.zero_()

    def kept(self) -> Kept:
        """This state, to `go_back` to."""
        return Kept({part.name: getattr(self, part.name) for part in fields(self)}, self._copied())

    def go_back(self, kept: Kept) -> None:
        """Be again as when ``kept`` was made, bit for bit."""
        self.put_back(kept.tensors)
        for name, value in kept.values.items():
            setattr(self, name, value)

    def guard(self, limit: float, unit: Unit) -> None:
        """Keep a cap from now on; the policy is its reference still, which is within any."""
        start = Safe(0, {"nats_per_response": 0.0, "stderr": 0.0, "nats_per_token": 0.0}, self._copied())
        self.cap = Cap(limit, unit, start)

    def remember(self, step: int, distance: KLSummary) -> None:
        """This state, after ``step`` steps, is the one to go back to."""
        self.cap = replace(self.cap, safe=Safe(step, asdict(distance), self._copied()))

    def _copied(self) -> dict[str, dict[str, Tensor]]:
        return {group: {k: v.detach().clone() for k, v in named.items()} for group, named in self.moving().items()}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What an exact resume needs besides the adapter itself."""
        named = {group: tensors for group, tensors in self.moving().items() if group != "policy"}
        if self.cap is not None:
            named |= {SAFE + group: tensors for group, tensors in self.cap.safe.tensors.items() if tensors}
        if self.last_step is not None:
            named[LAST_STEP] = {"step": self.last_step}
        if self.peak is not None:
            named[PEAK] = self.peak
        return named

    def state(self) -> dict[str, Any]:
        """The rest, as plain values."""
        values: dict[str, Any] = {"controller": asdict(self.controller), "watch": asdict(self.watch)}
        if self.scorer is not None:
            values["scorer"] = self.scorer.state()
        if self.reward_mean is not None:
            values["reward_mean"] = self.reward_mean
        if self.margin_mean is not None:
            values["margin_mean"] = self.margin_mean
        if self.data_sha256 is not None:
            values["data_sha256"] = self.data_sha256
        if self.damping is not None:
            values["damping"] = asdict(self.damping)
        if self.pace is not None:
            values["pace"] = asdict(self.pace)
        if self.cap is not None:
            safe = {"step": self.cap.safe.step, "kl": self.cap.safe.kl}
            values["cap"] = {"rollbacks": self.cap.rollbacks, "refusals": self.cap.refusals, "safe": safe}
        if self.stopped_early is not None:
            values["stopped_early"] = self.stopped_early
        return values

    def restore(self, checkpoint: Path) -> None:
        """Go on exactly from what ``tensors``, ``state`` and the adapter of a checkpoint say.

        Raises:
            CheckpointError: it is damaged, or was learnt from other data.
        """
        tensors, state = read_state(checkpoint)
        if state.get("data_sha256") != self.data_sha256:
            raise CheckpointError(
                f"{checkpoint} was learnt from other data than the recipe's file holds now: sha256 "
                f"{state.get('data_sha256')}, now {self.data_sha256}. Put the file back, or choose another --output."
            )
        self.policy.load_adapter(checkpoint)
        if LAST_STEP in tensors:
            # A copy lies in memory as the original did; a file's does not, and sums depend on that in the last bit.
            self.last_step = tensors.pop(LAST_STEP)["step"].clone().to(self.policy.device)
        if self.peak is not None:
            self.peak = {name: tensor.to(self.policy.device) for name, tensor in tensors.pop(PEAK).items()}
        self.watch, self.stopped_early = Watch.of(state["watch"]), state.get("stopped_early")
        self.put_back({group: named for group, named in tensors.items() if not group.startswith(SAFE)})
        self.controller = replace(self.controller, **state["controller"])
        if self.scorer is not None:
            self.scorer = self.scorer.restored(state["scorer"])
        if self.reward_mean is not None:
            self.reward_mean = state["reward_mean"]
        if self.margin_mean is not None:
            self.margin_mean = state["margin_mean"]
        if self.damping is not None:
            self.damping = replace(self.damping, **state["damping"])
        if self.pace is not None:
            self.pace = replace(self.pace, **state["pace"])
        if self.cap is not None:
            kept = {group.removeprefix(SAFE): named for group, named in tensors.items() if group.startswith(SAFE)}
            counts = {name: state["cap"][name] for name in ("rollbacks", "refusals")}
            self.cap = replace(self.cap, safe=Safe(**state["cap"]["safe"], tensors=kept), **counts)

    def set_learning_rates(self, policy_lr: float, value_lr: float) -> None:
        """Use these from the next step on."""
        if self.optimizer is not None:
            set_learning_rate(self.optimizer, policy_lr)
        if self.value_optimizer is not None:
            set_learning_rate(self.value_optimizer, value_lr)

    def value_step(
        self, part: Experience, *, clip_range: float, coef: float, max_grad_norm: float, micro_batch: int | None
    ) -> tuple[float, float]:
        """One step of the value function, which shares frozen weights with the policy and no trainable ones.

        A head alone is fitted to the hidden states that its values were read off, so that it takes no pass of its own.

        Args:
            part: a minibatch.
            clip_range: how far a value may gain from moving, unit of score; ∞ for no limit.
            coef: factor of the loss.
            max_grad_norm: a larger gradient is scaled down to this norm.
            micro_batch: rows in memory at once; None: as many as fit.

        Returns:
            (loss, unit of score squared; norm of the gradient before clipping).
        """
        tokens = int(part.rollout.response_mask.sum())
        total = 0.0
        for micro in self.policy.micro_batches(part.rollout, micro_batch):
            piece = part.select(micro)
            old, mask = piece.rollout, piece.rollout.response_mask
            states = old.value_states
            flat = self.policy.values(old.ids, old.scored) if states is None else self.policy.value_head(states[mask])
            values = response_scatter(flat, mask)
            loss = clipped_value_loss(values, old.values, piece.returns, mask, clip_range, tokens)
            (coef * loss).backward()
            total += loss.item()
        return total, guarded_step(self.value_optimizer, max_grad_norm, "value function")
