"""What PPO, TRPO and DPO hand from one to the next of their functions, and how they speak of it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kltune.core.intervals import KLSummary
from kltune.lm.batches import Rollout
from kltune.lm.data import Prompt
from kltune.lm.evaluate import HeldOut, measure_settings, prompts_source
from kltune.lm.policy import Policy
from kltune.recipe import DPORecipe, PPORecipe, TRPORecipe
from kltune.run.report import Report
from kltune.run.session import Run

BudgetRecipe = PPORecipe | TRPORecipe | DPORecipe


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


@dataclass(frozen=True)
class Batch:
    """The responses of a step, and how far their policy is from the reference.

    scores: [B]; None where nothing scores them. spread: what pulls the policy away, in what beta prices: at a price of
    spread/√(2·KL) an ideal policy stays at that KL. Of scores it is their spread among answers to one prompt.
    """

    rollout: Rollout
    scores: Tensor | None
    distance: KLSummary
    spread: float


def about(recipe: BudgetRecipe, policy: Policy, kl: dict[str, Any] | None) -> dict[str, Any]:
    """What kltune.json says of a checkpoint: its reference, its KL, and how that is measured again."""
    sampling = recipe.sampling
    settings = measure_settings(prompts_source(recipe), recipe.data, sampling.max_new_tokens, sampling.temperature)
    reference = policy.fingerprint.as_dict()
    return {"stage": recipe.stage, "kind": "adapter", "reference": reference, "kl": kl, "measure": settings}


def unit_text(job: Job) -> str:
    """The unit of the recipe's target and cap, in words."""
    return job.recipe.kl.unit.replace("_per_", " per ")


def kl_text(kl: KLSummary, job: Job) -> str:
    """A measured KL with its interval, in that unit."""
    per_response = job.recipe.kl.unit == "nats_per_response"
    value, ci = (kl.nats_per_response, kl.ci) if per_response else (kl.nats_per_token, kl.token_ci)
    spread = "" if ci is None else f" (95 %: {ci[0]:.3g} to {ci[1]:.3g})"
    return f"{value:.3g} {unit_text(job)}{spread}"


def dearer(job: Job) -> str:
    """What to change in the recipe so that the policy stays nearer."""
    return "Lower kl.target" if job.recipe.kl.control == "target" else "Raise kl.beta, or write kl.control: target"
