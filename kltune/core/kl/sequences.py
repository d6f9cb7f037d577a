"""Divergences of whole responses from the sum of a response's log-ratios, and how unevenly a KL is spread over them.

A mixture of two language models is not one token after the other, so JS and TV have no chain rule: the mean over
positions of a per-token JS is another quantity. All of these are expectations over whole responses.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from kltune.core.tensors import expect_same_shape

FOLDS = 5               # of prompts, for the coefficient of the control variate
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
LARGE_SHARE = 0.1       # of all the KL, in one response: beyond it the interval rests on whether that one was drawn


class Estimate(NamedTuple):
    """A mean over independent responses and its standard error; None where there is only one response."""

    value: float
    stderr: float | None


def jensen_shannon(policy_log_ratio: Tensor, ref_log_ratio: Tensor) -> Estimate:
    """Jensen-Shannon divergence of whole responses, in [0, log 2].

        JS = ½ E_π[log 2 − softplus(−U)] + ½ E_ρ[log 2 − softplus(U)],    U = log π(y) − log ρ(y)

    Args:
        policy_log_ratio: U of responses that the policy π sampled. [B], nats.
        ref_log_ratio: U, the same way round, of responses that the reference ρ sampled. [B'], nats.

    Returns:
        The estimate, nats.
    """
    halves = [_mean(math.log(2.0) - softplus(-u)) for u in (policy_log_ratio.double(), -ref_log_ratio.double())]
    return _halved(halves)


def total_variation(policy_log_ratio: Tensor, ref_log_ratio: Tensor | None = None) -> Estimate:
    """Total variation distance of whole responses, in [0, 1].

        TV = E_π[(1 − e^{−U})₊] = E_ρ[(1 − e^U)₊],    U = log π(y) − log ρ(y)

    Args:
        policy_log_ratio: U of responses that the policy π sampled. [B], nats.
        ref_log_ratio: U, the same way round, of responses that the reference ρ sampled, if there are any: then the
            estimate is the mean of the two expectations. [B'], nats.

    Returns:
        The estimate, no unit.
    """
    sides = [policy_log_ratio.double()] + ([] if ref_log_ratio is None else [-ref_log_ratio.double()])
    means = [_mean(-torch.expm1(-u).clamp(max=0.0)) for u in sides]
    return means[0] if len(means) == 1 else _halved(means)


def control_variate(exact: Tensor, k1: Tensor, prompt_index: Tensor) -> Tensor:
    """The exact KL of each response, corrected by the part of its luck that k1 shows.

        C + λ (U − C),    λ = −Cov(C, M) / Var(M),    M = U − C

    M has mean 0, so every λ chosen without looking at the response itself leaves the mean alone: λ comes from the
    prompts of the other folds. λ = 0 is the exact estimate and λ = 1 is k1; it matters where the exact sum is the
    noisier of the two, as in the example of docs/maths.md 4.

    Args:
        exact: C, exact KL summed over each response's tokens. [B], nats.
        k1: U, the sampled log-ratios summed likewise. [B], nats.
        prompt_index: which prompt a response answers; responses of one prompt stay in one fold. [B].

    Returns:
        [B] float64, nats. With a single prompt, C itself: there are no other folds.

    Raises:
        ValueError: the tensors differ in shape.
    """
    expect_same_shape(exact=exact, k1=k1, prompt_index=prompt_index)
    c, m = exact.double(), k1.double() - exact.double()
    fold = prompt_index.unique(return_inverse=True)[1] % FOLDS
    corrected = c.clone()
    for number in fold.unique():
        here = fold == number
        corrected[here] += _coefficient(c[~here], m[~here]) * m[here]
    return corrected


def _coefficient(c: Tensor, m: Tensor) -> float:
    """−Cov(C, M) / Var(M); 0 where M does not vary."""
    if len(m) < 2:
        return 0.0
    spread = m - m.mean()
    variance = spread.square().sum().item()
    return -((c - c.mean()) * spread).sum().item() / variance if variance > 0.0 else 0.0


def _mean(x: Tensor) -> Estimate:
    return Estimate(x.mean().item(), x.std().item() / math.sqrt(len(x)) if len(x) > 1 else None)


def _halved(pair: list[Estimate]) -> Estimate:
    """The mean of two independent estimates."""
    errors = [part.stderr for part in pair]
    stderr = None if None in errors else 0.5 * math.hypot(*errors)
    return Estimate(0.5 * (pair[0].value + pair[1].value), stderr)


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
