"""How unevenly a KL is spread over responses: what a mean and its standard error do not show."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
LARGE_SHARE = 0.1       # of all the KL, in one response: beyond it the interval rests on whether that one was drawn


@dataclass(frozen=True)
class Tails:
    """quantiles: of the nats per response, by level. minimum, maximum: the extremes, nats per response.

    largest_share: of all nats, what the response with the most has (0 where there are none). kurtosis: fourth moment
    over squared variance, 3 for a normal distribution; None where all responses are alike.
    """

    quantiles: dict[str, float]
    minimum: float
    maximum: float
    largest_share: float
    kurtosis: float | None

    @property
    def heavy(self) -> bool:
        """One response carries so much that the standard error is not to be trusted."""
        return self.largest_share > LARGE_SHARE


def tails(kl_per_response: Tensor) -> Tails:
    """Quantiles, extremes, the largest response's share and the kurtosis of a measured KL.

    Args:
        kl_per_response: exact KL summed over each response's tokens, finite. [B], nats.

    Raises:
        ValueError: no responses, or a value that is not finite.
    """
    nats = torch.as_tensor(kl_per_response).detach().cpu().double().numpy()
    if nats.ndim != 1 or not nats.size or not np.isfinite(nats).all():
        raise ValueError(f"wanted finite nats of at least one response, [B]; found {list(nats.shape)}")
    spread = nats - nats.mean()
    variance, total = float((spread**2).mean()), float(nats.sum())
    return Tails(
        quantiles={f"{level:g}": float(np.quantile(nats, level)) for level in QUANTILES},
        minimum=float(nats.min()),
        maximum=float(nats.max()),
        largest_share=float(nats.max()) / total if total > 0.0 else 0.0,
        kurtosis=float((spread**4).mean()) / variance**2 if variance > 0.0 else None,
    )
