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

from kltune.core.kl.intervals import mean_of_sides
from kltune.core.tensors import expect_same_shape

FOLDS = 5               # of prompts, for the coefficient of the control variate
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
LARGE_SHARE = 0.1       # of all the KL, in one response: beyond it the interval rests on whether that one was drawn


class Estimate(NamedTuple):
    """A mean over responses and its standard error by prompt; None where there is only one response."""

    value: float
    stderr: float | None


def jensen_shannon(
    policy_log_ratio: Tensor, ref_log_ratio: Tensor, prompt_index: Tensor, ref_prompt_index: Tensor
) -> Estimate:
    """Jensen-Shannon divergence of whole responses, in [0, log 2].

        JS = ½ E_π[log 2 − softplus(−U)] + ½ E_ρ[log 2 − softplus(U)],    U = log π(y) − log ρ(y)

    Args:
        policy_log_ratio: U of responses that the policy π sampled. [B], nats.
        ref_log_ratio: U, the same way round, of responses that the reference ρ sampled. [B'], nats.
        prompt_index, ref_prompt_index: which prompt each of them answers, numbered alike. [B], [B'].

    Returns:
        The estimate, nats.
    """
    sides = (policy_log_ratio.double(), prompt_index), (-ref_log_ratio.double(), ref_prompt_index)
    return Estimate(*mean_of_sides(*((math.log(2.0) - softplus(-u), prompts) for u, prompts in sides)))


def total_variation(
    policy_log_ratio: Tensor, prompt_index: Tensor,
    ref_log_ratio: Tensor | None = None, ref_prompt_index: Tensor | None = None,
) -> Estimate:
    """Total variation distance of whole responses, in [0, 1].

        TV = E_π[(1 − e^{−U})₊] = E_ρ[(1 − e^U)₊],    U = log π(y) − log ρ(y)

    Args:
        policy_log_ratio: U of responses that the policy π sampled. [B], nats.
        prompt_index: which prompt each answers. [B].
        ref_log_ratio, ref_prompt_index: U, the same way round, of responses that the reference ρ sampled, and their
            prompts, numbered alike, if there are any: then the estimate is the mean of the two expectations. [B'].

    Returns:
        The estimate, no unit.
    """
    sides = [(policy_log_ratio.double(), prompt_index)]
    if ref_log_ratio is not None:
        sides.append((-ref_log_ratio.double(), ref_prompt_index))
    return Estimate(*mean_of_sides(*((-torch.expm1(-u).clamp(max=0.0), prompts) for u, prompts in sides)))


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
