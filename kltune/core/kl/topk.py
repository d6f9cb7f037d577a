"""KL from the log-probabilities of a few tokens, which is all that a server gives: exact head, sampled tail.

    KL_t ≈ Σ_{v∈S} p(v) log(p(v)/q(v)) + 1[y ∉ S] log(p(y)/q(y)),    y ~ p

S may be any set that the context fixes, as the k likeliest tokens of p, of q, or those of both. Then this is unbiased:
the sum is the head's share of the KL, and the second term's mean is the tail's. To renormalise the head, or to count
the tail as one token, would not be: at k = 5 both lose a fifth of the KL.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kltune.core.tensors import expect_same_shape


class TopKDivergence(NamedTuple):
    """What N sampled tokens tell; each [N], nats but the mass.

    kl: the estimate above, of either sign. k1: log p(y) − log q(y). mass: p(S). surprise: what −log p(y) is above its
    mean within the head, 1[y ∈ S] (−log p(y)) + Σ_S p log p; 0 on average if y was drawn from p. missed: 1[y ∉ S] −
    p(not S), likewise, as k1 − kl. The variances are those that these three have then.
    """

    kl: Tensor
    k1: Tensor
    mass: Tensor
    surprise: Tensor
    missed: Tensor
    gap_variance: Tensor
    surprise_variance: Tensor
    missed_variance: Tensor


def topk_divergence(
    head: Tensor, ref_head: Tensor, sampled: Tensor, ref_sampled: Tensor, inside: Tensor
) -> TopKDivergence:
    """Estimate KL(p ‖ q) at each sampled token from the log-probabilities of a set S and of the token.

    Args:
        head: log p of the tokens in S; −∞ where S has fewer. [N, K].
        ref_head: log q of the same. [N, K].
        sampled: log p of the token that was drawn. [N].
        ref_sampled: log q of it. [N].
        inside: whether it is in S. [N] bool.

    Returns:
        [N] each, float64.

    Raises:
        ValueError: the shapes differ.
    """
    expect_same_shape(head=head, ref_head=ref_head)
    expect_same_shape(sampled=sampled, ref_sampled=ref_sampled, inside=inside)
    a, b = head.double(), ref_head.double()
    there = a > -torch.inf
    p = a.exp()
    k1 = sampled.double() - ref_sampled.double()
    own, gap = torch.where(there, a, 0.0), torch.where(there, a - b, 0.0)
    mass, surprise, kl = p.sum(-1), (p * own).sum(-1), (p * gap).sum(-1)
    return TopKDivergence(
        kl=kl + torch.where(inside, 0.0, k1),
        k1=k1,
        mass=mass,
        surprise=torch.where(inside, -sampled.double(), 0.0) + surprise,
        missed=(~inside).double() - (1.0 - mass),
        gap_variance=(p * gap.square()).sum(-1) - kl.square(),
        surprise_variance=(p * own.square()).sum(-1) - surprise.square(),
        missed_variance=(mass * (1.0 - mass)).clamp(min=0.0),
    )
