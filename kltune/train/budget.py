"""The KL budget of a run: what a nat costs, what must not be passed, and the last state that was within it.

    target     where the controller steers KL(policy ‖ reference)        kl.target
    price      what one nat costs, score per nat                         kl.beta, or the controller's
    cap        what no state that is called final may pass               kl.hard_cap
    room       how far one step may move the policy                      what is left to the target, or the cap
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from kltune.core.control.controllers import NEAR, Controller, Dual, FixedBeta, LogPI, Ziegler, feed_forward
from kltune.core.control.step_size import StepSize, step_limit
from kltune.core.kl.gate import Standing, standing, verdict
from kltune.core.kl.intervals import KLSummary
from kltune.lm.model.batches import Rollout
from kltune.recipe import KLSection
from kltune.run.screen import apart, interval

RAISE = 1.1             # of the price, when the policy was found beyond the cap, or a line search met it
AGAIN = 2.0             # the same of a price that was fixed, when the policy is found beyond the cap once more
BELOW_CAP = 0.9         # of the cap: where a price that was fixed is steered once the cap was met
FREE = 0.8              # of the cap: below it that price is the recipe's again, which led up to the cap before
WIDE = 6.0              # limit of the integral from then on: pairs are held by a hundredth of what scores would need
PLAN = 0.5              # of the steps: by then the KL should have arrived at its target
BAND = 0.15             # of the target: within it the KL counts as held
HELD = 0.9              # share of the last third of the steps that is within the band once the target is met
GROWTH = 1.05           # of the KL's mean from the middle third of the steps to the last: less is none
LEAST_STEPS = 9         # before as many, a third of them says nothing
LOSS_PULL = 0.5         # of a loss whose slope is about 1 where its data pull most; where nothing is scored

Groups = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class LastWithinCap:
    """The last state whose own batch proved it to be within the cap.

    step: steps it had done. kl: its KL, as ``asdict`` of a KLSummary. tensors: of ``Learner.copied``.
    """

    step: int
    kl: dict[str, Any]
    tensors: Groups


@dataclass(frozen=True)
class Budget:
    """A recipe's ``kl`` section at work; whatever happens to it gives a new one.

    steps: of the recipe. below_cap: the controller once the cap was met, where the price is fixed until then: a nat
    costs no less than the recipe says, and as much as keeps the policy within. size: how far a learning rate moves the
    policy. last_within: None without a cap. rollbacks: how often the run went back to it. refusals: steps that a line
    search cut or left out because of the cap. course: the KL of each batch that was priced, in the section's unit. due:
    the share of ``below_cap``'s price above the recipe's that is asked, by how near to the cap the last batch was.
    """

    section: KLSection
    controller: Controller
    steps: int
    below_cap: LogPI | None = None
    size: StepSize = field(default_factory=StepSize)
    last_within: LastWithinCap | None = None
    rollbacks: int = 0
    refusals: int = 0
    course: tuple[float, ...] = ()
    due: float = 1.0
    inherent: float = 0.0
    moves: ClassVar[bool] = False

    @classmethod
    def of(cls, section: KLSection, steps: int, updates_per_step: int = 1, inherent: float = 0.0) -> Self:
        """The budget of a recipe; the controller looks ahead in updates, of which a step makes so many, and plans."""
        beta = None if section.beta == "auto" else inherent + float(section.beta)
        bounds = {"beta_min": inherent + section.beta_min, "beta_max": inherent + section.beta_max}
        ahead = section.look_ahead / updates_per_step
        gains = {"kp": section.kp, "ki": section.ki, "look_ahead": ahead, "plan": PLAN * steps}
        if section.control == "fixed":
            least = max(beta, inherent + section.beta_min)
            # Nothing to look ahead for: where it begins is the cap, and what the KL did before was at another price.
            gains |= {"ki": 2.0 * section.ki, "look_ahead": 0.0}
            bounds = {"beta_min": least, "beta_max": max(least, inherent + section.beta_max)}
            below_cap = LogPI(beta, **gains, **bounds, limit=WIDE, near=1, arrived=True)
            return cls(section, FixedBeta(float(section.beta)), steps, below_cap, inherent=inherent)
        if section.controller == "ziegler":
            return cls(section, Ziegler(beta, horizon=section.horizon, **bounds), steps, inherent=inherent)
        if section.controller == "dual":
            return cls(section, Dual(beta, lr=section.dual_lr, **bounds), steps, inherent=inherent)
        return cls(section, LogPI(beta, fixed_feed_forward=beta, **gains, **bounds), steps, inherent=inherent)

    @property
    def price(self) -> float:
        """What one nat of KL(policy ‖ reference) per response costs now beside what is inherent, unit of score."""
        beta = self.controller.beta
        if beta is None or isinstance(self.controller, FixedBeta):
            return beta
        own = beta if self.below_cap is None else self.below_cap.beta_min
        return own + self.due * (beta - own) - self.inherent

    @property
    def target(self) -> float | None:
        """Where the KL is steered, in the section's unit; None where the price is fixed."""
        return self.section.target if self.section.control == "target" else None

    @property
    def cap(self) -> float | None:
        """What the KL must not pass, in the section's unit."""
        return self.section.hard_cap

    def priced(self, rollout: Rollout, kl: KLSummary, pull: float) -> Self:
        """The budget once its controller has seen a batch, and before that batch is priced.

        Args:
            rollout: the batch; a target per token becomes one per response by its mean length.
            kl: its KL(policy ‖ reference).
            pull: what drives the policy away, as ``Controller.updated`` takes it.
        """
        aim, responses = self.aim(rollout), len(rollout.lengths)
        updated = self.controller.updated(kl.nats_per_response, aim, pull=pull, responses=responses)
        due = 1.0
        if self.below_cap is not None and self.cap is not None:
            due = min(max((self.in_unit(kl) / self.cap - FREE) / (BELOW_CAP - FREE), 0.0), 1.0)
        return replace(self, controller=updated, course=(*self.course, self.in_unit(kl)), due=due)

    def aim(self, rollout: Rollout) -> float:
        """Where the KL should be, nats per response: at the target, or just below the cap; ∞ where there is neither."""
        if self.target is not None:
            return self.target * self._tokens(rollout)
        return math.inf if self.cap is None else BELOW_CAP * self.cap * self._tokens(rollout)

    def short_of_target(self, rollout: Rollout, kl: KLSummary, share: float = 1.0) -> bool:
        """Whether a batch's KL is below its target, or a share of it."""
        return self.target is not None and kl.nats_per_response < share * self.aim(rollout)

    def on_its_way(self, rollout: Rollout, kl: KLSummary) -> bool:
        """Whether the target is still so far that there is nothing to hold."""
        return self.short_of_target(rollout, kl, NEAR)

    def room(self, rollout: Rollout, kl: KLSummary, share: float) -> float:
        """How far one step may move the policy that sampled a batch; see ``step_limit``."""
        aim, late = self.aim(rollout), 0.0
        if self.target is not None:
            late = min(1.0, len(self.course) / (PLAN * self.steps))
        return aim if math.isinf(aim) else step_limit(kl.nats_per_response, aim, share, late)

    def standing(self, kl: KLSummary) -> Standing:
        """Where a measured KL lies: "within" the cap with its whole 95 % interval, "beyond" it, or "open"."""
        return "within" if self.cap is None else standing(kl, self.cap, self.section.unit)

    def guarded(self, tensors: Groups) -> Self:
        """With the state at the start, the reference's own, as the last one within the cap; no other without a cap."""
        if self.cap is None:
            return self
        nothing = {"nats_per_response": 0.0, "stderr": 0.0, "nats_per_token": 0.0}
        return replace(self, last_within=LastWithinCap(0, nothing, tensors))

    def remembered(self, step: int, kl: KLSummary, tensors: Groups) -> Self:
        """With the state after so many steps, of that KL, as the one to go back to."""
        return replace(self, last_within=LastWithinCap(step, asdict(kl), tensors))

    def rolled_back(self, rollout: Rollout, pull: float) -> Self:
        """After a batch beyond the cap: a nat costs a tenth more, and a price that was fixed is steered from then on.

        At this price the KL grew, and one that would hold an ideal policy at the cap may be ten times too high for this
        one: a nat costs no less than halfway between them, in its logarithm. Where that was not enough for a price that
        was fixed, it is doubled.
        """
        ideal = feed_forward(pull, self.cap * self._tokens(rollout))
        least = math.sqrt((self.inherent + max(self.price, self.section.beta_min)) * ideal)
        again = self.below_cap is not None and self.rollbacks > 0
        controller = self._raised(AGAIN, 0.0) if again else self._raised(RAISE, least)
        return replace(self, controller=controller, rollbacks=self.rollbacks + 1, due=1.0)

    def refused(self) -> Self:
        """After a step that a line search cut or left out because of the cap: a nat costs a tenth more."""
        return replace(self, controller=self._raised(RAISE, 0.0), refusals=self.refusals + 1, due=1.0)

    def is_unused(self, kl: KLSummary) -> bool:
        """Whether a measured KL lies below the target with its whole interval."""
        return self.target is not None and standing(kl, self.target, self.section.unit) == "within"

    def holds(self) -> bool:
        """Whether the last third of the steps held the target."""
        last = self.course[-(len(self.course) // 3):]
        near = sum(abs(kl - self.target) <= BAND * self.target for kl in last)
        return len(self.course) >= LEAST_STEPS and near >= HELD * len(last)

    def is_spent(self) -> bool:
        """Whether the reward pulls no further: the price is as low as it gets, and the KL grows no more."""
        third = len(self.course) // 3
        if len(self.course) < LEAST_STEPS or not self.controller.at_bottom():
            return False
        return sum(self.course[-third:]) <= GROWTH * sum(self.course[-2 * third : -third])

    def is_passed(self, kl: KLSummary) -> bool:
        """Whether a measured KL lies above the target with its whole interval."""
        return self.target is not None and verdict(kl, self.target, self.section.unit).verdict == "fail"

    def counts(self) -> dict[str, float]:
        """Metrics of the cap; none without one."""
        return {} if self.cap is None else {"kl/cap_rollbacks": self.rollbacks, "kl/cap_refusals": self.refusals}

    def advice(self) -> str:
        """What to change in the recipe so that the policy stays nearer to its reference."""
        return "Raise kl.beta, or write kl.control: target" if self.target is None else "Lower kl.target"

    def in_unit(self, kl: KLSummary) -> float:
        """A measured KL in the section's unit."""
        return kl.nats_per_response if self.section.unit == "nats_per_response" else kl.nats_per_token

    @property
    def unit_text(self) -> str:
        """The section's unit in words."""
        return self.section.unit.replace("_per_", " per ")

    def describe(self, kl: KLSummary) -> str:
        """A measured KL with its 95 % interval in words, in the section's unit, told apart from target and cap."""
        ci = kl.ci if self.section.unit == "nats_per_response" else kl.token_ci
        limits = self.target, self.cap
        spread = "" if ci is None else f" (95 %: {interval(ci, against=limits)})"
        return f"{apart(self.in_unit(kl), *limits)[0]} {self.unit_text}{spread}"

    def state(self) -> dict[str, Any]:
        """Controller, counts and the last state within the cap but for its tensors; see ``Part.state``."""
        last = None if self.last_within is None else {"step": self.last_within.step, "kl": self.last_within.kl}
        counts = {"rollbacks": self.rollbacks, "refusals": self.refusals, "course": list(self.course), "due": self.due}
        return {"controller": asdict(self.controller), "size": asdict(self.size), "last_within": last, **counts}

    def tensors(self) -> dict[str, Tensor]:
        """Those of the last state within the cap, as ``group/name``; see ``Part.tensors``."""
        groups = {} if self.last_within is None else self.last_within.tensors
        return {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}

    def restored(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See ``Part.restored``."""
        last = None
        if state["last_within"] is not None:
            groups: dict[str, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                group, _, name = key.partition("/")
                groups.setdefault(group, {})[name] = tensor
            last = LastWithinCap(**state["last_within"], tensors=groups)
        met_cap = self.below_cap is not None and state["rollbacks"] + state["refusals"] > 0
        controller = replace(self.below_cap if met_cap else self.controller, **state["controller"])
        return replace(
            self, controller=controller, size=StepSize(**state["size"]), last_within=last,
            rollbacks=state["rollbacks"], refusals=state["refusals"], course=tuple(state["course"]), due=state["due"],
        )

    def _raised(self, factor: float, least: float) -> Controller:
        """The controller once the cap was met, the price at least ``factor`` times as high, and ``least``."""
        if isinstance(self.controller, FixedBeta):
            return replace(self.below_cap, beta=max(factor * (self.inherent + self.price), least))
        return self.controller.raised(factor, least)

    def _tokens(self, rollout: Rollout) -> float:
        """What turns the section's unit into nats per response."""
        return rollout.lengths.float().mean().item() if self.section.unit == "nats_per_token" else 1.0
