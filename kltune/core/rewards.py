"""From one score per response to one reward per token, and how much reward still lies ahead of each token."""

import torch
from torch import Tensor

from kltune.core.masking import at_least_float32, expect_leading_mask, expect_same_shape


def penalize(scores: Tensor, ref_kl: Tensor, beta: float, mask: Tensor) -> Tensor:
    """Charge every token for its distance from the reference; pay the score on the last one.

        r_t = −β · ref_kl_t + [t = L] · score

    With ``ref_kl`` = k1 and everything after a token credited to it, the policy gradient of these rewards is that of
    E[score] − β KL(policy ‖ reference). k3 or an exact KL in its place would give another gradient (MATH 2.1).

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2.

    Args:
        scores: one judgement per response. [B], any unit.
        ref_kl: k1 of each sampled token. [B, T], nats; never differentiated through.
        beta: the price of one nat, in units of score.
        mask: True on response tokens. [B, T], bool; the score lands on the last True of each row.

    Returns:
        [B, T], unit of score, no gradient; exactly 0 outside the mask.

    Raises:
        ValueError: the shapes do not fit, or a row of ``mask`` is empty or has a hole (its score would be lost).
    """
    expect_same_shape(ref_kl=ref_kl, mask=mask)
    expect_same_shape(scores=scores, responses=mask[:, 0])
    expect_leading_mask(mask)
    rewards = torch.where(mask, -beta * at_least_float32(ref_kl.detach()), 0.0)
    last = (mask.sum(-1) - 1).unsqueeze(-1)                         # [B, 1]
    return rewards.scatter_add(-1, last, scores.detach().to(rewards.dtype).unsqueeze(-1))


def to_go(x: Tensor, mask: Tensor) -> Tensor:
    """The sum from each token to the end of its response.

        G_t = Σ_{s ≥ t} x_s

    Args:
        x: one number per token. [B, T], any unit.
        mask: True on response tokens. [B, T], bool.

    Returns:
        [B, T] in the unit of ``x``; exactly 0 outside the mask.

    Raises:
        ValueError: the shapes differ.
    """
    expect_same_shape(x=x, mask=mask)
    kept = torch.where(mask, at_least_float32(x), 0.0)
    return torch.where(mask, kept.flip(-1).cumsum(-1).flip(-1), 0.0)


def strictly_future(x: Tensor, mask: Tensor) -> Tensor:
    """The sum over the tokens *after* each token: what its choice brings about.

        F_t = Σ_{s > t} x_s

    An exact KL at t does not depend on the token chosen at t, so only the strictly later ones are its consequence.

    Args:
        x: one number per token. [B, T], any unit.
        mask: True on response tokens. [B, T], bool.

    Returns:
        [B, T] in the unit of ``x``; exactly 0 outside the mask and on the last token of each response.

    Raises:
        ValueError: the shapes differ.
    """
    ahead = to_go(x, mask)
    return torch.where(mask, torch.nn.functional.pad(ahead[:, 1:], (0, 1)), 0.0)
