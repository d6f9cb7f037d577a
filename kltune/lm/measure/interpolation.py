"""A policy at a share α of its adapter, from the reference (0) to itself (1): measured, and searched for a KL budget.

The result is an adapter like any other, its scale baked in, so every loader gets it right.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kltune.core.kl.gate import GRID, AlphaPoint, Search, Unit, confidence_per_look, largest_alpha, verdict
from kltune.core.kl.intervals import KLSummary, clustered_mean
from kltune.errors import ModelError
from kltune.lm.data.examples import Prompt
from kltune.lm.measure.measurement import Round, measure_kl, measured_scores
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import Draw
from kltune.lm.rewards.scorers import Scorer

AGAIN = math.sqrt(2.0) * 1.645      # standard errors by which two measurements alike differ, once in twenty times
MARGIN = 0.08                         # of the budget: as many responses are drawn as keep the bound's distance below it
CHECKS = 3                          # with fresh random numbers, of what the search found
AROUND = (1.15, 1.0, 0.85)          # of the first search's α, where the second begins
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

    def figures(self, unit: Unit) -> tuple[float, float, float]:
        """KL, its standard error and the upper end of its interval, in a unit; ∞ where they cannot be known."""
        if unit == "nats_per_token":
            nats, stderr, ci = self.kl.nats_per_token, self.kl.token_stderr, self.kl.token_ci
        else:
            nats, stderr, ci = self.kl.nats_per_response, self.kl.stderr, self.kl.ci
        return nats, math.inf if stderr is None else stderr, math.inf if ci is None else ci[1]


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

    def measure(
        self, alpha: float, responses: int, purpose: str, seed: int, confidence: float | None = None
    ) -> Look:
        """Set the adapter to α and measure it there."""
        self.scale.set(alpha)
        measured = measure_kl(self.policy, Round.of(self.prompts, responses), replace(self.draw, seed=seed))
        score = error = None
        if self._scorer is not None:
            scores = measured_scores({"score": self._scorer}, measured, self._penalty)["score"]
            score, error = clustered_mean(scores, measured.prompt_index)
        kl = measured.summary("exact", confidence or self.confidence)
        look = Look(alpha, purpose, kl, score, error)
        self.looks.append(look)
        nats, stderr, _ = look.figures(self.unit)
        scored = "" if score is None else f", score {score:.3f}"
        self._say(
            f"alpha {alpha:.4f}: KL {nats:.4g} ± {stderr:.2g} {self.unit.replace('_', ' ')}{scored} "
            f"({kl.responses} responses, {purpose})"
        )
        return look

    def standardize(self, responses: int) -> None:
        """Give sources marked ``normalize`` their scale, on responses of the reference."""
        if self._scorer is not None and self._scorer.wants_reference_samples:
            self.scale.set(0.0)
            sampled = measure_kl(self.policy, Round.of(self.prompts, responses), self.draw)
            self._scorer = self._scorer.standardized(*sampled.texts(), sampled.rollouts)

    def land(self, budget: float, responses: int, most: int) -> tuple[Search, Look | None]:
        """Find the largest α whose KL meets a budget, and leave the adapter there.

        Met means: so far below it that a later measurement of as many responses will pass the gate too. The interval's
        upper end must keep its distance, and so must the next measurement's, which differs from this one by chance: in
        all about 4.3 standard errors. Where that would give away more than ``MARGIN`` of the budget, more responses are
        drawn. What was found is then checked on random numbers that it was not chosen by.

        responses: for a measurement; ``most`` where the budget calls for more. Returned are the search, and the check
        that passed; None where none did.
        """
        search = largest_alpha(lambda alpha: self._point(alpha, responses), budget, grid=GRID, tolerance=0.05)
        if search.alpha == 0.0:
            return search, None
        wanted = min(most, self._wanted(search, budget, responses))
        if search.alpha < 1.0 and wanted > responses:
            grid = sorted({min(1.0, factor * search.alpha) for factor in AROUND})
            closer = largest_alpha(lambda alpha: self._point(alpha, wanted), budget, grid=grid, tolerance=0.01)
            search = replace(closer, falls=(*search.falls, *closer.falls))
            responses = wanted
        confidence, alpha = confidence_per_look(self.confidence, CHECKS), search.alpha
        for number in range(1, CHECKS + 1):
            look = self.measure(alpha, responses, "check", self.draw.seed + number, confidence)
            if verdict(look.kl, budget, self.unit, confidence).verdict == "pass":
                return replace(search, alpha=alpha), look
            alpha *= 0.99 * math.sqrt(budget / look.figures(self.unit)[2])
        return replace(search, alpha=alpha), None

    def meet(self, target: float, responses: int) -> float:
        """Find the α, at most 1, whose measured KL is a target, and leave the adapter there."""

        def point(alpha: float) -> AlphaPoint:
            nats, stderr, _ = self.measure(alpha, responses, "search", self.draw.seed).figures(self.unit)
            return AlphaPoint(alpha, nats, stderr, nats)

        alpha = largest_alpha(point, target, grid=(1.0, 0.9), tolerance=0.01).alpha
        self.scale.set(alpha)
        return alpha

    def _point(self, alpha: float, responses: int) -> AlphaPoint:
        nats, stderr, upper = self.measure(alpha, responses, "search", self.draw.seed).figures(self.unit)
        return AlphaPoint(alpha, nats, stderr, upper + AGAIN * stderr)

    def _wanted(self, search: Search, budget: float, responses: int) -> int:
        """Responses with which the bound is no more than ``MARGIN`` of the budget above the KL measured there."""
        point = next(point for point in search.points if point.alpha == search.alpha)
        return math.ceil(responses * ((point.bound - point.nats) / (MARGIN * budget)) ** 2)


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
