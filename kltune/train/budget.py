"""The KL budget of a run: its price, its cap, and how both are spoken of."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kltune.core.control.controllers import Controller, Dual, FixedBeta, LogPI, Ziegler
from kltune.core.kl.gate import Unit
from kltune.core.kl.intervals import KLSummary
from kltune.lm.model.batches import Rollout
from kltune.recipe import KLSection

if TYPE_CHECKING:
    from kltune.train.learner import Job

ROLLBACK_RAISE = 2.0  # of the price, when the policy was found beyond the cap (MATH 3.5)
NORMALISED_SPREAD = 0.5  # where nothing is scored: of a loss whose slope is about 1 where its data pull most
REFUSAL_RAISE = 1.1  # of the price, when a line search met the cap: at no loss, and again at the next step


def controller_of(kl: KLSection, updates_per_step: int) -> Controller:
    """The controller that a recipe's ``kl`` section asks for; ``look_ahead`` turns from updates into steps."""
    beta = None if kl.beta == "auto" else float(kl.beta)
    bounds = {"beta_min": kl.beta_min, "beta_max": kl.beta_max}
    if kl.control == "fixed":
        return FixedBeta(beta)
    if kl.controller == "ziegler":
        return Ziegler(beta, horizon=kl.horizon, **bounds)
    if kl.controller == "dual":
        return Dual(beta, lr=kl.dual_lr, **bounds)
    ahead = kl.look_ahead / updates_per_step
    return LogPI(beta, kp=kl.kp, ki=kl.ki, look_ahead=ahead, fixed_feed_forward=beta, **bounds)


def priced(controller: Controller, kl: KLSection, rollout: Rollout, ref_kl: float, spread: float) -> Controller:
    """The controller after it has seen a batch and before the batch is priced.

    A target per token becomes one per response by the batch's mean length.
    """
    tokens = rollout.lengths.float().mean().item() if kl.unit == "nats_per_token" else 1.0
    return controller.updated(ref_kl, (kl.target or 0.0) * tokens, spread=spread, responses=len(rollout.lengths))


def unit_text(job: "Job") -> str:
    """The unit of the recipe's target and cap, in words."""
    return job.recipe.kl.unit.replace("_per_", " per ")


def kl_text(kl: KLSummary, job: "Job") -> str:
    """A measured KL with its interval, in that unit."""
    per_response = job.recipe.kl.unit == "nats_per_response"
    value, ci = (kl.nats_per_response, kl.ci) if per_response else (kl.nats_per_token, kl.token_ci)
    spread = "" if ci is None else f" (95 %: {ci[0]:.3g} to {ci[1]:.3g})"
    return f"{value:.3g} {unit_text(job)}{spread}"


def dearer(job: "Job") -> str:
    """What to change in the recipe so that the policy stays nearer."""
    return "Lower kl.target" if job.recipe.kl.control == "target" else "Raise kl.beta, or write kl.control: target"


@dataclass(frozen=True)
class Safe:
    """The last state that its own batch proved to be within the cap.

    step: steps done. kl: how far it was from the reference, as `asdict` of a KLSummary. tensors: ``Learner.moving``.
    """

    step: int
    kl: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Cap:
    """What the KL to the reference must not pass, and where to go back to when it did.

    limit: in ``unit``. rollbacks: how often the run went back. refusals: steps that a line search cut or gave up
    because of the cap.
    """

    limit: float
    unit: Unit
    safe: Safe
    rollbacks: int = 0
    refusals: int = 0
