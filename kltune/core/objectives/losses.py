"""What is minimised: PPO's two clipped losses, and the two losses whose gradient is that of KL(policy ‖ reference).

Each is a sum over its own rows divided by a count the caller gives (tokens or responses of the *whole* minibatch), so
that the losses, and gradients, of micro-batches add up to the minibatch's.
"""

import torch
from torch import Tensor

from kltune.core.kl.divergence import log_ratios
from kltune.core.tensors import at_least_float32, expect_same_shape, per_response


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float, tokens: int,
    clip_high: float | None = None,
) -> Tensor:
    """Raise the probability of tokens with a positive advantage, but gain nothing by moving further than the clip.

        −(1/tokens) Σ_{b,t} min(w A, clip(w, 1 − ε, 1 + ε) A),    w = π(a) / π_old(a)

    At π = π_old its gradient is the policy gradient, −(1/tokens) Σ A ∇log π. With ``clip_high`` the upper end is
    1 + ε_high: a token that was rare may gain more before its gradient is taken away, which keeps responses diverse.

    Source: Schulman et al. 2017, arXiv 1707.06347, equation 7; Yu et al. 2025, arXiv 2503.14476 (DAPO's upper end).

    Args:
        logprobs: log π now, carrying the gradient. [B, T], nats.
        old_logprobs: log π_old of the same tokens, from the rollout. [B, T], nats.
        advantages: A. [B, T], any unit.
        mask: True on response tokens. [B, T], bool.
        clip_range: ε, above 0.
        tokens: mask tokens of the whole minibatch, at least 1.
        clip_high: ε_high, above 0; None: ε.

    Returns:
        A scalar, in the unit of the advantages.

    Raises:
        ValueError: the shapes differ, or ``tokens`` is below 1.
    """
    expect_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    _expect_count("tokens", tokens)
    ratio = log_ratios(logprobs, old_logprobs.detach(), mask).exp()
    advantages = torch.where(mask, at_least_float32(advantages.detach()), 0.0)
    high = clip_range if clip_high is None else clip_high
    gain = torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_range, 1.0 + high) * advantages)
    return -gain.sum() / tokens


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float, tokens: int
) -> Tensor:
    """Fit values to returns, with nothing to gain by leaving the old values by more than the clip.

        (1/tokens) Σ_{b,t} ½ max((V − R)², (V_old + clip(V − V_old, −ε, ε) − R)²)

    Source: lm-human-preferences and baselines (``ppo2``); Huang et al. 2024.

    Args:
        values: V now, carrying the gradient. [B, T], unit of score.
        old_values: V of the rollout. [B, T], unit of score.
        returns: R, from ``gae``. [B, T], unit of score.
        mask: True on response tokens. [B, T], bool.
        clip_range: ε, above 0, unit of score; ∞ for no clip.
        tokens: mask tokens of the whole minibatch, at least 1.

    Returns:
        A scalar, unit of score squared.

    Raises:
        ValueError: the shapes differ, or ``tokens`` is below 1.
    """
    expect_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    _expect_count("tokens", tokens)
    values, old_values, returns = (
        torch.where(mask, at_least_float32(x), 0.0) for x in (values, old_values.detach(), returns.detach())
    )
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    error = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * error.sum() / tokens


def clip_fraction(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, clip_range: float, tokens: int, clip_high: float | None = None
) -> Tensor:
    """The share of tokens whose ratio has left the clip range.

        (1/tokens) Σ_{b,t} [ |w − 1| > ε ],    w = π(a) / π_old(a)

    Args:
        logprobs: log π now. [B, T], nats.
        old_logprobs: log π_old of the same tokens. [B, T], nats.
        mask: True on response tokens. [B, T], bool.
        clip_range: ε, above 0.
        tokens: mask tokens of the whole minibatch, at least 1.
        clip_high: ε above 1, where it is another.

    Returns:
        A scalar from 0 to 1, no gradient.

    Raises:
        ValueError: the shapes differ, or ``tokens`` is below 1.
    """
    _expect_count("tokens", tokens)
    ratio = log_ratios(logprobs.detach(), old_logprobs.detach(), mask).exp()      # exactly 1 outside the mask
    change = ratio - 1.0
    limit = clip_range if clip_high is None else torch.where(change > 0.0, clip_high, clip_range)
    return (change.abs() > limit).sum() / tokens


def exact_kl_loss(
    exact_kl: Tensor, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, responses: int
) -> Tensor:
    """KL(policy ‖ reference) of whole responses, with its unbiased gradient, on responses of an earlier policy.

        (1/responses) Σ_b Σ_t W_t D_t,    W_t = Π_{s<t} π_s / π_old,s

    W_t says how much likelier the prefix of token t has become. Its gradient carries the half that D_t does not: that a
    token leads to the tokens after it; without it the gradient is off by 18 % on the enumerated model of
    docs/maths.md 9. Where the policy is the one that sampled, every W is 1 and this is the Rao-Blackwell estimate
    D_t + (log π_t − sg log π_t) · sg(Σ_{s>t} D_s). Without W, later epochs on the same responses would have a gradient
    that is off by 13 % at a KL(old ‖ new) of 0.003 and by 30 to 40 % at 0.03.

    Source: docs/maths.md 9; Amini et al. 2025, arXiv 2504.10637.

    Args:
        exact_kl: D, ``kl_exact`` at every response token, carrying the gradient. [B, T], nats.
        logprobs: log π of the sampled tokens, carrying the gradient. [B, T], nats.
        old_logprobs: the same under the policy that sampled them. [B, T], nats.
        mask: True on response tokens. [B, T], bool.
        responses: responses in the whole minibatch, at least 1.

    Returns:
        A scalar, nats per response.

    Raises:
        ValueError: the shapes differ, or ``responses`` is below 1.
    """
    expect_same_shape(exact_kl=exact_kl, logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    _expect_count("responses", responses)
    change = log_ratios(logprobs, old_logprobs.detach(), mask)
    prefix = (change.cumsum(dim=1) - change).exp()
    return per_response(prefix * exact_kl, mask).sum() / responses


def k2_kl_loss(
    logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, responses: int
) -> Tensor:
    """Half the squared log-ratio of whole responses: its gradient is that of KL(policy ‖ reference), its value is not.

        (1/responses) Σ_b sg(W_b) ½ U_b²,    U_b = Σ_t (log π_t − log π_ref,t),    W_b = Π_t π_t / π_old,t

    The square is taken of the *response's* log-ratio; a sum of ½ u_t² would ignore how the prefixes drift
    (docs/maths.md 9). Per response the gradient is W U Σ_t ∇log π_t, the one of k1 in the reward with full returns. W
    is 1 where the policy is the one that sampled.

    Source: Liu et al. 2025, arXiv 2510.01555; Tang & Munos 2025, arXiv 2506.09477.

    Args:
        logprobs: log π of the sampled tokens, carrying the gradient. [B, T], nats.
        ref_logprobs: log π_ref of the same tokens. [B, T], nats.
        old_logprobs: the same under the policy that sampled them. [B, T], nats.
        mask: True on response tokens. [B, T], bool.
        responses: responses in the whole minibatch, at least 1.

    Returns:
        A scalar, nats² per response.

    Raises:
        ValueError: the shapes differ, or ``responses`` is below 1.
    """
    _expect_count("responses", responses)
    log_ratio = per_response(log_ratios(logprobs, ref_logprobs.detach(), mask), mask)
    weight = per_response(log_ratios(logprobs.detach(), old_logprobs.detach(), mask), mask).exp()
    return 0.5 * (weight * log_ratio.square()).sum() / responses


def _expect_count(name: str, count: int) -> None:
    if not count >= 1:
        raise ValueError(f"{name} is {count}, must be at least 1: it is what the sum is divided by")
