"""A policy at a share α of its adapter, from the reference (0) to itself (1): measured, and searched for a KL budget.

The result is an adapter like any other, its scale baked in, so every loader gets it right.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kltune.core.kl.gate import AlphaPoint, Figures, Search, Unit, figures_in, largest_alpha, looks
from kltune.core.kl.intervals import KLSummary, clustered_mean
from kltune.errors import ModelError
from kltune.lm.data.examples import Prompt
from kltune.lm.measure.measurement import Round, measure_kl, measured_scores
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import Draw
from kltune.lm.rewards.scorers import Scorer

AGAIN = math.sqrt(2.0)      # standard errors of the answers by which two measurements of the same prompts differ
MARGIN = 0.05               # of the budget: as many responses are drawn as keep the aim's distance from it below
NEAR_FLOOR = 1.1            # times the distance that the prompts' own differences leave: more answers buy no more
CHECKS = 4                  # with fresh random numbers, of what the search found
UNUSED = 0.03               # of the budget: a check that leaves no more is the last
# By the kind of tensor: what α acts on, and what is left as it is. Of A and B, that is the one which starts at 0: in
# PEFT it is B in linear layers and A in embeddings.
SCALED = {"lora_B", "lora_embedding_A", "lora_magnitude_vector", "ia3_l"}
LEFT = {"lora_A", "lora_embedding_B"}


@dataclass(frozen=True)
class Look:
    """One measurement: at which α, of how many responses, and the mean score where there is a scorer.

    purpose: search, check (random numbers that the search never saw) or curve.
    """

    alpha: float
    purpose: str
    kl: KLSummary
    score: float | None
    score_stderr: float | None

    def figures(self, unit: Unit) -> Figures:
        """KL, its standard errors and interval in a unit."""
        return figures_in(self.kl, unit)

    def upper(self, unit: Unit) -> float:
        """The upper end of its interval, ∞ where that cannot be known."""
        ci = self.figures(unit).ci
        return math.inf if ci is None else ci[1]

    def distance(self, unit: Unit, responses: int) -> tuple[float, float]:
        """How far the upper end of so many responses would lie above the KL, and how far another measurement of as many
        answers to the same prompts from this one; ∞ where that cannot be known.

        Of the standard error, the part falls that the answers have; see ``KLSummary.floor``.
        """
        figures = self.figures(unit)
        if not figures.stderr:
            return (math.inf, math.inf) if figures.stderr is None else (0.0, 0.0)
        floor = figures.floor or 0.0
        answers = math.sqrt(max(0.0, figures.stderr**2 - floor**2) * self.kl.responses / responses)
        reach = (figures.ci[1] - figures.estimate) / figures.stderr
        return reach * math.hypot(floor, answers), AGAIN * answers


class Interpolation:
    """A policy that can be measured at any α; every measurement is kept in ``looks``."""

    def __init__(
        self,
        policy: Policy,
        prompts: list[Prompt],
        draw: Draw,
        *,
        confidence: float = 0.95,
        unit: Unit = "nats_per_response",
        scorer: Scorer | None = None,
        missing_end_penalty: float = 0.0,
        say: Callable[[str], None] = lambda text: None,
    ):
        """Take the policy as it is: that is α = 1.

        draw: how responses are drawn in the search; the checks after it have random numbers of their own. unit: of
        budgets. scorer: also score the responses, less ``missing_end_penalty`` where one never ended. say: told of each
        measurement. Raises as ``AdapterScale``.
        """
        self.scale = AdapterScale(policy)
        self.policy, self.prompts, self.draw = policy, prompts, draw
        self.confidence, self.unit = confidence, unit
        self.looks: list[Look] = []
        self._scorer, self._penalty, self._say = scorer, missing_end_penalty, say

    @property
    def rewards(self) -> list[dict[str, Any]]:
        """Where the scores come from; [] where nothing is scored."""
        return [] if self._scorer is None else self._scorer.identity

    def measure(self, alpha: float, responses: int, purpose: str, seed: int) -> Look:
        """Set the adapter to α and measure it there."""
        self.scale.set(alpha)
        measured = measure_kl(self.policy, self._answered(responses), replace(self.draw, seed=seed))
        score = score_error = None
        if self._scorer is not None:
            scores = measured_scores({"score": self._scorer}, measured, self._penalty)["score"]
            score, score_error = clustered_mean(scores, measured.prompt_index)
        kl = measured.summary("exact", self.confidence)
        look = Look(alpha, purpose, kl, score, score_error)
        self.looks.append(look)
        figures = look.figures(self.unit)
        error = "" if figures.stderr is None else f" ± {figures.stderr:.2g}"
        scored = "" if score is None else f", score {score:.3f}"
        self._say(
            f"alpha {alpha:.4f}: KL {figures.estimate:.4g}{error} {self.unit.replace('_', ' ')}{scored} "
            f"({kl.responses} responses, {purpose})"
        )
        return look

    def _answered(self, responses: int) -> Round:
        """The same prompts in the search and in the checks, whatever the random numbers of the responses."""
        return Round.of(self.prompts, responses, self.draw.seed)

    def standardize(self, responses: int) -> None:
        """Give sources marked ``normalize`` their scale, on responses of the reference."""
        if self._scorer is not None and self._scorer.wants_reference_samples:
            self.scale.set(0.0)
            sampled = measure_kl(self.policy, self._answered(responses), self.draw)
            self._scorer = self._scorer.standardized(*sampled.texts(), sampled.rollouts)

    def land(self, budget: float, responses: int, most: int) -> tuple[Search, Look | None]:
        """Find the largest α whose KL meets a budget, and leave the adapter there.

        Met means that the upper end of the interval is within the budget, on random numbers that the search never saw.
        The search aims at that end: at each α, as ``responses`` answers show it, it foretells where the end of a check
        of many more will lie. A check that fails, or leaves more than ``UNUSED`` of the budget, corrects the aim; there
        are at most ``CHECKS``. For the α that comes out to be beyond the budget, the aim must err as well as the check:
        of 800 simulated searches none to 2 % end there (docs/project.md), so the checks' intervals are no wider.

        responses: for a measurement of the search; ``most`` for a check. Returned are the search, and the check of the
        largest α that passed; None where none did.
        """
        search = largest_alpha(
            lambda alpha: self._point(self.measure(alpha, responses, "search", self.draw.seed), budget, most),
            budget, tolerance=UNUSED,
        )
        if search.alpha == 0.0:
            return search, None
        aim = next(look for look in self.looks if look.purpose == "search" and look.alpha == search.alpha)
        alpha, count, passed = search.alpha, self._count(aim, budget, most), None
        for number in range(1, CHECKS + 1):
            look = self.measure(alpha, count, "check", self.draw.seed + number)
            upper = look.upper(self.unit)
            if upper <= budget and (passed is None or alpha > passed.alpha):
                passed = look
            if upper <= budget and (alpha == 1.0 or upper >= (1.0 - UNUSED) * budget):
                break
            if upper == 0.0:        # rounded away: that says nothing of how much further there is to go
                break
            _, again = look.distance(self.unit, count)
            alpha = min(1.0, alpha * math.sqrt(max(0.25, (budget - number * again) / upper)))
        if passed is not None:
            self.scale.set(passed.alpha)
            alpha = passed.alpha
        return replace(search, alpha=alpha), passed

    def meet(self, target: float, responses: int) -> float:
        """Find the α, at most 1, whose measured KL is a target, and leave the adapter there."""

        def point(alpha: float) -> AlphaPoint:
            figures = self.measure(alpha, responses, "search", self.draw.seed).figures(self.unit)
            return AlphaPoint(alpha, figures.estimate, figures.stderr or 0.0, figures.estimate)

        alpha = largest_alpha(point, target, grid=(1.0, 0.9), tolerance=0.01).alpha
        self.scale.set(alpha)
        return alpha

    def _point(self, look: Look, budget: float, most: int) -> AlphaPoint:
        """The look with the end that a check would have there, and the chance of a check that comes out higher."""
        figures = look.figures(self.unit)
        stderr = math.inf if figures.stderr is None else figures.stderr
        ahead = sum(look.distance(self.unit, self._count(look, budget, most)))
        return AlphaPoint(look.alpha, figures.estimate, stderr, figures.estimate + ahead)

    def _count(self, look: Look, budget: float, most: int) -> int:
        """Responses of a check: until its distances are small beside the budget, or beside what the prompts leave."""
        figures, count = look.figures(self.unit), look.kl.responses
        if not figures.stderr:
            return count
        reach = (figures.ci[1] - figures.estimate) / figures.stderr
        enough = max(MARGIN * budget, NEAR_FLOOR * reach * (figures.floor or 0.0))
        return next((n for n in looks(count, most) if sum(look.distance(self.unit, n)) <= enough), max(count, most))


class AdapterScale:
    """A policy whose adapter can be set to any share of what it was.

        W_α = W + α s B A       LoRA, rsLoRA: exact
        m_α = (1 − α) ‖W‖ + α m with the same B_α      DoRA: the magnitudes go along a straight line too
        l_α = 1 + α (l − 1)     IA3

    Source: docs/maths.md 17.
    """

    def __init__(self, policy: Policy):
        """Remember the adapter as it is: that is α = 1. ModelError where it has no scale."""
        if policy.full:
            raise ModelError(
                f"{policy.fingerprint.path}: only an adapter that leaves its base alone can be scaled down; this "
                "checkpoint has weights of its own."
            )
        tensors = policy.trainable_parameters()
        roles = {name: name.split(".")[1] for name in tensors}
        if strange := sorted(set(roles.values()) - SCALED - LEFT):
            raise ModelError(f"an adapter with {', '.join(strange)} has no scale; LoRA, rsLoRA, DoRA and IA3 have one.")
        self._tensors = {name: tensor for name, tensor in tensors.items() if roles[name] in SCALED}
        self._on = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
        self._off = {name: policy.untrained[name].to(tensor.device) for name, tensor in self._tensors.items()}

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        """Make the adapter α times what it was; 0 and 1 are exact."""
        for name, tensor in self._tensors.items():
            on, off = self._on[name], self._off[name]
            tensor.copy_(on if alpha == 1.0 else off if alpha == 0.0 else off + alpha * (on - off))
