"""The objective of a reward model, and what its scores are worth: accuracy, calibration, rank correlation.

Each loss is one number per row, so that the sums of micro-batches add up to the batch's: the Bradley-Terry loss of a
pair, the logistic loss of a label, a centring penalty.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from kltune.core.tensors import at_least_float32, expect_same_shape


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Score the chosen response of a pair above the rejected one, by its margin or more.

        −(1 − ε) log σ(Δ − m) − ε log σ(−Δ − m),    Δ = r_chosen − r_rejected

    dL/dΔ = −(1 − ε) σ(m − Δ) + ε σ(m + Δ). With m = 0 and ε = 0 it is the negative log-likelihood of the Bradley-Terry
    model, P(chosen) = σ(Δ); with ε the pair counts as the wrong way round with that probability, and Δ has a finite
    optimum, log((1 − ε)/ε).

    Sources: Bradley and Terry 1952; Christiano et al. 2017, arXiv 1706.03741 (label noise); Touvron et al. 2023,
    arXiv 2307.09288, section 3.2.2 (margin).

    Args:
        chosen: r of the chosen responses, carrying the gradient. [N], unit of score.
        rejected: r of the rejected responses, carrying the gradient. [N], unit of score.
        margins: m, how much better the chosen one is said to be. [N], unit of score, not negative.
        label_smoothing: ε, from 0 to below ½.

    Returns:
        [N], nats.

    Raises:
        ValueError: the shapes differ, or ``label_smoothing`` is out of range.
    """
    expect_same_shape(chosen=chosen, rejected=rejected, margins=margins)
    _expect_smoothing(label_smoothing)
    gap, margins = at_least_float32(chosen) - at_least_float32(rejected), at_least_float32(margins)
    loss = (1.0 - label_smoothing) * softplus(margins - gap)
    return loss + label_smoothing * softplus(margins + gap) if label_smoothing else loss


def label_loss(scores: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Let the score be the log-odds of a good response (logistic regression).

        −y log σ(r) − (1 − y) log σ(−r),    y = (1 − ε) label + ε (1 − label)

    dL/dr = σ(r) − y.

    Args:
        scores: r, carrying the gradient. [N], unit of score (log-odds).
        labels: 1 for good, 0 for bad. [N].
        label_smoothing: ε, from 0 to below ½.

    Returns:
        [N], nats.

    Raises:
        ValueError: the shapes differ, or ``label_smoothing`` is out of range.
    """
    expect_same_shape(scores=scores, labels=labels)
    _expect_smoothing(label_smoothing)
    scores = at_least_float32(scores)
    target = label_smoothing + (1.0 - 2.0 * label_smoothing) * labels.to(scores.dtype)
    return softplus(scores) - target * scores


def centring_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Hold the two scores of a pair around 0: the loss of a pair knows their difference only, and lets both drift.

        (r_chosen + r_rejected)²

    Source: Eisenstein et al. 2023, arXiv 2312.09244, appendix A (η = 0.01).

    Args:
        chosen: r of the chosen responses, carrying the gradient. [N], unit of score.
        rejected: r of the rejected responses, carrying the gradient. [N], unit of score.

    Returns:
        [N], unit of score squared.

    Raises:
        ValueError: the shapes differ.
    """
    expect_same_shape(chosen=chosen, rejected=rejected)
    return (at_least_float32(chosen) + at_least_float32(rejected)).square()


def _expect_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}, must be from 0 to below 0.5")


class Bin(NamedTuple):
    """Predictions from ``low`` to ``high``: how many, their mean, and the share of them that came true."""

    low: float
    high: float
    count: int
    predicted: float
    observed: float


def win_share(gaps: Tensor) -> float:
    """The share of gaps above 0, a gap of exactly 0 counting half: the accuracy on pairs.

    Args:
        gaps: r_chosen − r_rejected. [N], N at least 1, unit of score.

    Raises:
        ValueError: there are none.
    """
    if not gaps.numel():
        raise ValueError("no gaps: there is no share of none")
    return wins(gaps).mean().item()


def wins(gaps: Tensor) -> Tensor:
    """1 where a gap is above 0, ½ where it is 0, else 0. [N] float64"""
    return (gaps > 0).double() + 0.5 * (gaps == 0).double()


def reliability(predicted: Tensor, came_true: Tensor, bins: int, low: float = 0.0) -> list[Bin]:
    """Predicted probabilities against what happened, in bins of equal width from ``low`` to 1; empty bins left out.

    Args:
        predicted: probabilities, ``low`` or more. [N].
        came_true: 1 where what was predicted happened, 0 where not, ½ for a tie. [N].
        bins: how many, at least 1.
        low: 0.5 where the likelier of two outcomes is what is predicted.

    Raises:
        ValueError: the shapes differ, or a probability is outside.
    """
    expect_same_shape(predicted=predicted, came_true=came_true)
    predicted, came_true = predicted.double(), came_true.double()
    if not ((predicted >= low) & (predicted <= 1.0)).all():
        raise ValueError(f"a probability lies outside {low} to 1")
    width = (1.0 - low) / bins
    place = ((predicted - low) / width).long().clamp(max=bins - 1)
    table = []
    for number in place.unique().tolist():
        inside = place == number
        means = predicted[inside].mean().item(), came_true[inside].mean().item()
        table.append(Bin(low + number * width, low + (number + 1) * width, int(inside.sum()), *means))
    return table


def calibration_error(table: list[Bin]) -> float:
    """Expected calibration error: |predicted − observed| of each bin, weighted by its count. 0 is perfect.

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3.
    """
    total = sum(row.count for row in table)
    return sum(row.count * abs(row.predicted - row.observed) for row in table) / total


def pair_reliability(gaps: Tensor, bins: int = 5) -> list[Bin]:
    """Reliability of P(the one scored higher is the chosen one) = σ(|Δ|), from ½ to 1.

    Args:
        gaps: Δ = r_chosen − r_rejected. [N], unit of score.
        bins: how many.
    """
    gaps = gaps.double()
    return reliability(torch.sigmoid(gaps.abs()), (gaps > 0) + 0.5 * (gaps == 0), bins, low=0.5)


def correlation(x: Tensor, y: Tensor) -> float | None:
    """Pearson's correlation of two [B] tensors; None where one of them does not vary."""
    x, y = (v.double() - v.double().mean() for v in (x, y))
    scale = (x.norm() * y.norm()).item()
    return (x @ y).item() / scale if scale > 0.0 else None


def rank_correlation(x: Tensor, y: Tensor) -> float | None:
    """Spearman's: Pearson's correlation of the ranks, equal values sharing theirs. None where one does not vary."""
    return correlation(_ranks(x), _ranks(y))


def _ranks(x: Tensor) -> Tensor:
    """The mean rank of each value among all, from 0. [B] float64."""
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double() - 1.0
    return (last - 0.5 * (counts.double() - 1.0))[place]
