"""What the reference's own responses say without any training: the best of n of them, and how their scores spread."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from kltune.core.hacking.overoptimization import best_of_n, best_of_n_kl, best_of_n_kl_of_levels, within_prompt_spread
from kltune.lm.data.examples import Prompt
from kltune.lm.measure.measurement import Draw, Measurement, Progress
from kltune.lm.model.batches import Samples
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import sample
from kltune.lm.rewards.scorers import Scorer

ANCHOR_PROMPTS = 128       # at most, for best of n
ANCHOR_SEED = 2_000_003    # beyond the measurements' own: best of n is not read off the responses they were scored on


@dataclass(frozen=True)
class Judges:
    """Who scores: the runs' own reward, or that of ``--recipe``; and gold. penalty: off the score without an end."""

    score: Scorer | None
    gold: Scorer | None
    penalty: float

    @property
    def want_reference_samples(self) -> bool:
        """True if a source is to be standardised and has not been yet."""
        return any(judge is not None and judge.wants_reference_samples for judge in (self.score, self.gold))

    def __call__(
        self, texts: tuple[list[str], list[str]], samples: Sequence[Samples], truncated: Tensor
    ) -> dict[str, np.ndarray]:
        """Scores of responses by each judge there is. {"score": [B], "gold": [B]} of float64 arrays."""
        judges = {name: judge for name, judge in (("score", self.score), ("gold", self.gold)) if judge is not None}
        return {
            name: judge.total(*texts, samples, truncated, self.penalty).double().cpu().numpy()
            for name, judge in judges.items()
        }


def standardized(judges: Judges, sampled: Measurement) -> Judges:
    """Sources marked ``normalize`` get their scale on the reference's responses, as in training."""
    fitted = [
        judge.standardized(*sampled.texts(), sampled.rollouts) if judge and judge.wants_reference_samples else judge
        for judge in (judges.score, judges.gold)
    ]
    return Judges(*fitted, judges.penalty)


def judged(judges: Judges, found: Measurement) -> dict[str, np.ndarray]:
    """Scores of measured responses by each judge."""
    return judges(found.texts(), found.rollouts, found.truncated)


def clustered(scores: dict[str, np.ndarray], draw: Draw) -> dict[str, float | None]:
    """Mean of each judge's scores and its standard error, responses to one prompt counting as one."""
    found: dict[str, float | None] = {}
    for name, values in scores.items():
        mean, stderr = over_prompts(values.reshape(draw.count, draw.per_prompt).mean(1))
        found |= {name: mean, f"{name}_stderr": stderr}
    return found


def over_prompts(values: np.ndarray) -> tuple[float, float | None]:
    """Mean and standard error of independent values. [P]"""
    stderr = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return float(values.mean()), stderr


def anchor_draw(prompts: Sequence[Prompt], per_prompt: int) -> Draw:
    """Which prompts are answered for best of n, and how often each."""
    return Draw(prompts, 0, min(len(prompts), ANCHOR_PROMPTS), per_prompt)


def anchored(
    policy: Policy,
    prompts: Sequence[Prompt],
    judges: Judges,
    drawn: dict[str, Any],
    per_prompt: int,
    progress: Progress,
) -> dict[str, Any]:
    """Best of n by the score (by gold where there is no score), for n = 1, 2, 4, ... of the reference's responses.

    Args:
        policy: whose reference responds.
        prompts: the first ``ANCHOR_PROMPTS`` of them are answered.
        judges: at least one.
        drawn: max_new_tokens, temperature and seed, as ``measure_kl`` takes them.
        per_prompt: N, responses to each prompt, at least 2.
        progress: told how many responses are done.

    Returns:
        The document's best_of_n; by_prompt: the estimates of each judge for each n, [P] each.
    """
    draw = anchor_draw(prompts, per_prompt)
    count = draw.count
    uniforms = draw.uniforms(drawn["seed"] + ANCHOR_SEED, drawn["max_new_tokens"])
    parts: list[dict[str, np.ndarray]] = []
    with policy.reference():
        for part, rows in draw.parts():
            samples = sample(policy, part, uniforms[rows], temperature=drawn["temperature"])
            texts = list(samples.prompts), list(samples.responses)
            parts.append(judges(texts, (samples,), samples.truncated.cpu()))
            progress(rows.stop)
    scores = {
        name: np.concatenate([part[name] for part in parts]).reshape(count, per_prompt) for name in parts[0]
    }
    ranked = scores.get("score", scores.get("gold"))
    sizes = [2**power for power in range(per_prompt.bit_length()) if 2**power <= per_prompt]
    estimates = {name: [best_of_n(ranked, n, values) for n in sizes] for name, values in scores.items()}
    points = []
    for place, n in enumerate(sizes):
        levels = [np.unique(row, return_counts=True)[1] / per_prompt for row in ranked]
        ties = float(np.mean([best_of_n_kl_of_levels(shares, n) for shares in levels]))
        point: dict[str, Any] = {"n": n, "kl_bound": best_of_n_kl(n), "kl_with_ties": min(ties, best_of_n_kl(n))}
        for name in ("score", "gold"):
            known = over_prompts(estimates[name][place]) if name in estimates else (None, None)
            point |= {name: known[0], f"{name}_stderr": known[1]}
        points.append(point)
    return {
        "prompts": count,
        "responses_per_prompt": per_prompt,
        "ranked_by": "score" if "score" in scores else "gold",
        "sigma": {name: within_prompt_spread(values) for name, values in scores.items()},
        "points": points,
        "by_prompt": estimates,
    }
