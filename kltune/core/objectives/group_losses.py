"""What other policy losses do in place of PPO's clip of each token's ratio, and how tokens of long responses count.

Each says what it changes in the gradient. On the first update of a step, where the policy is the one that sampled,
every ratio is 1 and all of them have the gradient Σ A ∇log π of their average.
"""

from typing import Literal

import torch
from torch import Tensor

from kltune.core.kl.divergence import log_ratios
from kltune.core.tensors import at_least_float32, expect_same_shape, per_response

Average = Literal["tokens", "responses", "limit"]


def sequence_logprobs(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities with which every token of a response has the ratio of the response, as GSPO clips it.

        log π'_t = log π_old,t + (1/L) Σ_s (log π_s − log π_old,s)

    ``clipped_policy_loss`` of these, averaged over responses, is GSPO's. The gradient: a whole response is clipped or
    none of it, and its tokens push alike, by their mean. The ratio is a geometric mean, much nearer to 1 than that of a
    token: its ``clip_range`` is a hundredth of PPO's (the paper has 3e-4 below and 4e-4 above).

    Source: Zheng et al. 2025, arXiv 2507.18071, equations 5 to 7.

    Args:
        logprobs: log π now, carrying the gradient. [B, T], nats.
        old_logprobs: log π_old of the same tokens. [B, T], nats.
        mask: True on response tokens, at least one in each row. [B, T], bool.

    Returns:
        [B, T], nats; exactly 0 outside the mask.

    Raises:
        ValueError: the shapes differ.
    """
    mean = per_response(log_ratios(logprobs, old_logprobs.detach(), mask), mask) / mask.sum(dim=1)
    return torch.where(mask, at_least_float32(old_logprobs.detach()) + mean[:, None], 0.0)


def weighted_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float, clip_high: float,
    tokens: int,
) -> Tensor:
    """The policy gradient with clipped, constant weights: no token is left out, as CISPO has it.

        −(1/tokens) Σ_{b,t} sg(clip(w, 1 − ε, 1 + ε_high)) A log π,    w = π(a) / π_old(a)

    The gradient: where PPO's clip takes a token's gradient away altogether, here it stays, with the weight at the clip;
    rare tokens that a first update made much likelier go on learning. Nothing then stops a step at the clip, which is
    what ``ppo.stop_step_kl`` and the KL target are for.

    Source: MiniMax 2025, arXiv 2506.13585, equation 4 (which leaves out the lower clip: ε of 1 or more).

    Args:
        logprobs: log π now, carrying the gradient. [B, T], nats.
        old_logprobs: log π_old of the same tokens, from the rollout. [B, T], nats.
        advantages: A. [B, T], any unit.
        mask: True on response tokens. [B, T], bool.
        clip_range: ε, above 0.
        clip_high: ε_high, above 0.
        tokens: mask tokens of the whole minibatch, at least 1.

    Returns:
        A scalar, in the unit of the advantages times nats.

    Raises:
        ValueError: the shapes differ, or ``tokens`` is below 1.
    """
    expect_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    if not tokens >= 1:
        raise ValueError(f"tokens is {tokens}, must be at least 1: it is what the sum is divided by")
    weight = log_ratios(logprobs.detach(), old_logprobs.detach(), mask).exp().clamp(1.0 - clip_range, 1.0 + clip_high)
    gain = torch.where(mask, weight * at_least_float32(advantages.detach()) * at_least_float32(logprobs), 0.0)
    return -gain.sum() / tokens


def averaged(advantages: Tensor, mask: Tensor, average: Average, *, tokens: int, responses: int, limit: int) -> Tensor:
    """Advantages with which a loss that divides by ``tokens`` is another average of what its tokens gain.

        tokens      (1/tokens) Σ_{b,t}              as they are: every token counts alike
        responses   (1/responses) Σ_b (1/L_b) Σ_t   every response counts alike, as in GRPO
        limit       (1/(responses · limit)) Σ_{b,t} every token counts alike, whatever its batch, as in Dr. GRPO

    The expected gradient of ``limit`` is that of the expected score, but for a constant. ``tokens`` divides by a number
    that is random: the same in the mean of large batches, off by how it goes with the scores in small ones.
    ``responses`` is another objective's: a token of a long response counts less, so that long wrong answers are
    discouraged less than short ones, and short right ones encouraged more.

    Source: Liu et al. 2025, arXiv 2503.20783, section 3 (the length bias); Yu et al. 2025, arXiv 2503.14476 (DAPO).

    Args:
        advantages: [B, T], any unit.
        mask: True on response tokens, at least one in each row. [B, T], bool.
        average: which.
        tokens, responses: of the whole minibatch.
        limit: the most tokens that a response may have.

    Returns:
        [B, T], the same unit.
    """
    if average == "tokens":
        return advantages
    if average == "limit":
        return advantages * (tokens / (responses * limit))
    return advantages * (tokens / (responses * mask.sum(dim=1, keepdim=True)))
