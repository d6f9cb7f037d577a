"""How two columns of numbers go together."""

from torch import Tensor


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
