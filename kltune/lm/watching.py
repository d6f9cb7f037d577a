"""What an evaluation says besides the KL: scores on the reference's scale, diversity, length, entropy.

All of it is read off the responses that the KL was measured on; nothing more is sampled for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kltune.core.diversity import diversity
from kltune.core.intervals import clustered_mean
from kltune.lm.measurement import Measurement
from kltune.lm.scorers import Scorer

Metrics = dict[str, float | None]
Scales = Mapping[str, tuple[float, float]]

LEAST_SPREAD = 1e-6  # of the reference's scores, below which there is no scale to put others on


@dataclass(frozen=True)
class Reference:
    """What evaluations hold the policy against: the reference's own answers to the same prompts, and the same texts.

    metrics: named as in the metrics, ``eval/reference_...``. scales: mean and sd of each judge's scores of its answers,
    where they have a spread. text_nats: of each held-out text, [D] nats; None without texts.
    """

    metrics: Metrics
    scales: Scales
    text_nats: Tensor | None


def judged(judges: Mapping[str, Scorer], measured: Measurement, missing_end_penalty: float) -> dict[str, Tensor]:
    """Each judge's score of each response, less the penalty where it never ended. [B] each."""
    texts = measured.texts()
    return {
        name: judge.total(*texts, measured.rollouts, measured.truncated, missing_end_penalty)
        for name, judge in judges.items()
    }


def scales_of(scores: Mapping[str, Tensor]) -> Scales:
    """Mean and sd of each judge's scores, of those that have a spread."""
    found = {name: (row.mean().item(), row.std().item()) for name, row in scores.items() if len(row) > 1}
    return {name: (mean, spread) for name, (mean, spread) in found.items() if spread > LEAST_SPREAD}


def score_metrics(prefix: str, scores: Mapping[str, Tensor], prompt_index: Tensor, scales: Scales) -> Metrics:
    """Mean of each judge's scores with its standard error: as they come, and in standard deviations of the reference's.

        z = (mean − mean of the reference's) / sd of the reference's,    gold_gap = score_z − gold_z

    Args:
        prefix: of the names.
        scores: of each judge, [B].
        prompt_index: which prompt a response answers. [B].
        scales: from ``scales_of`` the reference's scores; a judge without one has no z.
    """
    metrics: Metrics = {}
    for name, row in scores.items():
        mean, error = clustered_mean(row, prompt_index)
        centre, spread = scales.get(name, (None, None))
        metrics |= {
            f"{prefix}{name}_mean": mean,
            f"{prefix}{name}_stderr": error,
            f"{prefix}{name}_z": None if spread is None else (mean - centre) / spread,
            f"{prefix}{name}_z_stderr": None if spread is None or error is None else error / spread,
        }
    if "score" in scores and "gold" in scores:
        both = metrics[f"{prefix}score_z"], metrics[f"{prefix}gold_z"]
        metrics[f"{prefix}gold_gap"] = None if None in both else both[0] - both[1]
    return metrics


def text_metrics(prefix: str, measured: Measurement, vocabulary: int) -> Metrics:
    """How much the responses repeat each other, how sure they were, how long they are and whether they end."""
    found = diversity(response_tokens(measured), measured.prompt_index.tolist(), vocabulary)
    tokens = measured.tokens.sum().item()
    return {
        f"{prefix}distinct_1": found.distinct_1,
        f"{prefix}distinct_2": found.distinct_2,
        f"{prefix}distinct_2_adjusted": found.distinct_2_adjusted,
        f"{prefix}self_bleu": found.self_bleu,
        f"{prefix}distinct_2_per_input": found.per_input,
        f"{prefix}distinct_2_across_input": found.across_input,
        f"{prefix}duplicate_fraction": found.duplicates,
        f"{prefix}entropy_nats_per_token": measured.entropy.double().sum().item() / tokens,
        f"{prefix}response_tokens": tokens / len(measured.tokens),
        f"{prefix}end_fraction": 1.0 - measured.truncated.double().mean().item(),
    }


def response_tokens(measured: Measurement) -> list[list[int]]:
    """Each response's tokens, in order, without its end token."""
    found = []
    for rollout in measured.rollouts:
        said = (rollout.lengths - (~rollout.truncated).long()).tolist()
        rows = zip(rollout.ids.cpu(), rollout.scored.cpu(), said, strict=True)
        found += [ids[scored][:count].tolist() for ids, scored, count in rows]
    return found
