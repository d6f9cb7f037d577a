"""What the reference's own responses say without any training: the best of n of them, and how their scores spread."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kltune.core.hacking.overoptimization import best_of, best_of_n_kl, best_of_n_kl_of_levels, within_prompt_spread
from kltune.core.kl.intervals import clustered_mean, prompt_shares
from kltune.lm.data.examples import Prompt
from kltune.lm.measure.measurement import Measurement, Progress, Round
from kltune.lm.model.batches import Samples
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import Draw, sample
from kltune.lm.rewards.scorers import Scorer

MOST_PROMPTS = 128
SEED = 2_000_003    # beyond the measurements' own: best of n is not read off the responses they were scored on


@dataclass(frozen=True)
class Scorers:
    """The scorers of a frontier: the runs' own reward, or that of ``--recipe``, and gold. penalty: without an end."""

    score: Scorer | None
    gold: Scorer | None
    penalty: float

    @property
    def want_reference_samples(self) -> bool:
        """True if a source is to be standardised and has not been yet."""
        return any(scorer.wants_reference_samples for scorer in self._present().values())

    def standardized(self, sampled: Measurement) -> "Scorers":
        """With sources marked ``normalize`` on the scale of the reference's responses, as in training."""
        fitted = {
            name: scorer.standardized(*sampled.texts(), sampled.rollouts)
            for name, scorer in self._present().items() if scorer.wants_reference_samples
        }
        return replace(self, **fitted)

    def scores(
        self, texts: tuple[list[str], list[str]], samples: Sequence[Samples], truncated: Tensor
    ) -> dict[str, np.ndarray]:
        """Scores of responses by each scorer there is. {"score": [B], "gold": [B]} of float64 arrays."""
        return {
            name: scorer.total(*texts, samples, truncated, self.penalty).double().cpu().numpy()
            for name, scorer in self._present().items()
        }

    def means(self, measured: Measurement) -> tuple[dict[str, float | None], dict[str, np.ndarray]]:
        """Mean of each scorer's scores and its standard error by prompt; and the ``prompt_shares`` of each."""
        figures: dict[str, float | None] = {}
        shares = {}
        for name, values in self.scores(measured.texts(), measured.rollouts, measured.truncated).items():
            side = torch.from_numpy(values), measured.prompt_index
            mean, stderr = clustered_mean(*side)
            figures |= {name: mean, f"{name}_stderr": stderr}
            shares[name] = prompt_shares(side)
        return figures, shares

    def _present(self) -> dict[str, Scorer]:
        named = {"score": self.score, "gold": self.gold}
        return {name: scorer for name, scorer in named.items() if scorer is not None}


def best_of_n_round(prompts: Sequence[Prompt], per_prompt: int, seed: int) -> Round:
    """Which prompts are answered for best of n, and how often each."""
    return replace(Round.of(prompts, min(len(prompts), MOST_PROMPTS), seed), per_prompt=per_prompt)


def measure_best_of_n(
    policy: Policy, answered: Round, scorers: Scorers, draw: Draw, progress: Progress
) -> dict[str, Any]:
    """Best of n by the score (by gold where there is no score), for n = 1, 2, 4, ... of the reference's responses.

    answered: from ``best_of_n_round``; at least 2 responses to each prompt. Returned is the document's best_of_n;
    by_prompt: the estimates of each scorer for each n, [P] each; prompt_numbers: which prompts are the same, [P].
    """
    count, per_prompt = answered.count, answered.per_prompt
    parts: list[dict[str, np.ndarray]] = []
    with policy.reference():
        for prompts, uniforms, done in answered.parts(replace(draw, seed=draw.seed + SEED)):
            samples = sample(policy, prompts, uniforms, temperature=draw.temperature)
            texts = list(samples.prompts), list(samples.responses)
            parts.append(scorers.scores(texts, (samples,), samples.truncated.cpu()))
            progress(done)
    scores = {name: np.concatenate([part[name] for part in parts]).reshape(count, per_prompt) for name in parts[0]}
    ranked = scores.get("score", scores.get("gold"))
    sizes = [2**power for power in range(per_prompt.bit_length()) if 2**power <= per_prompt]
    estimates = {name: [best_of(ranked, n, values) for n in sizes] for name, values in scores.items()}
    levels = list(_levels(ranked))
    lines = answered.prompt_index()[::per_prompt]
    points = []
    for place, n in enumerate(sizes):
        bound = best_of_n_kl(n)
        ties = float(np.mean([best_of_n_kl_of_levels(shares, n, tied) for shares, tied in levels]))
        point: dict[str, Any] = {"n": n, "kl_bound": bound, "kl_with_ties": min(ties, bound)}
        for name in ("score", "gold"):
            mean, stderr = (None, None)
            if name in estimates:
                mean, stderr = clustered_mean(torch.from_numpy(estimates[name][place]), lines)
            point |= {name: mean, f"{name}_stderr": stderr}
        points.append(point)
    return {
        "prompts": count,
        "responses_per_prompt": per_prompt,
        "ranked_by": "score" if "score" in scores else "gold",
        "sigma": {name: within_prompt_spread(values) for name, values in scores.items()},
        "points": points,
        "by_prompt": estimates,
        "prompt_numbers": lines.tolist(),
    }


def _levels(scores: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each prompt's scores, [P, N]: the levels' shares, and which are of scores that repeat anywhere. [L] each"""
    values, counts = np.unique(scores, return_counts=True)
    repeated = values[counts > 1]
    for row in scores:
        level, count = np.unique(row, return_counts=True)
        yield count / row.size, np.isin(level, repeated)
