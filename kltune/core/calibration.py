"""How often a model is right, and whether it is right in 70 % of the cases where it says 70 %."""

from typing import NamedTuple

import torch
from torch import Tensor

from kltune.core.masking import expect_same_shape


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
    return ((gaps > 0).double() + 0.5 * (gaps == 0).double()).mean().item()


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
