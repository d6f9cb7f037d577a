"""How much better a response, or a token, did than was to be expected: a critic, or the other answers to the prompt."""

import torch
from torch import Tensor

from kltune.core.masking import at_least_float32, expect_leading_mask, expect_same_shape


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation along each response.

        δ_t = r_t + γ V_{t+1} − V_t  with V_{L+1} = 0,    A_t = Σ_l (γλ)^l δ_{t+l},    return_t = A_t + V_t

    λ = 1 is unbiased; a smaller λ trusts the values more. The returns are those of the advantages *before* any
    whitening.

    Source: Schulman et al. 2016, arXiv 1506.02438.

    Args:
        rewards: one per token. [B, T], unit of score.
        values: expected reward to go, as the rollout saw it. [B, T], unit of score.
        mask: True on response tokens, each row a run of True from the first column on. [B, T], bool.
        gamma: γ, discount per token, 0 to 1.
        gae_lambda: λ, 0 to 1.

    Returns:
        (advantages, returns), each [B, T], unit of score, no gradient; exactly 0 outside the mask.

    Raises:
        ValueError: the shapes differ, or a row of ``mask`` is empty or has a hole.
    """
    expect_same_shape(rewards=rewards, values=values, mask=mask)
    expect_leading_mask(mask)
    rewards = torch.where(mask, at_least_float32(rewards.detach()), 0.0)
    values = torch.where(mask, at_least_float32(values.detach()), 0.0)      # 0 past the end: V_{L+1} = 0

    advantages = torch.zeros_like(values)
    next_advantage = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * gae_lambda * next_advantage
        advantages[:, t] = next_advantage
        next_value = values[:, t]
    return advantages, advantages + values


def leave_one_out(returns: Tensor, group_size: int) -> Tensor:
    """Each response against the mean of the other answers to the same prompt.

        A_i = G_i − mean_{j ≠ i} G_j

    Leaving the response itself out keeps the policy gradient unbiased.

    Source: Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740.

    Args:
        returns: G, one per response, the rows of a group adjacent. [B], unit of score.
        group_size: answers per prompt, at least 2.

    Returns:
        [B], unit of score, summing to 0 in each group; exactly 0 where the group's returns are equal.

    Raises:
        ValueError: ``returns`` is not [B], or does not divide into groups of at least 2.
    """
    groups = _groups(returns, group_size)
    centred = groups - groups.mean(-1, keepdim=True)
    return (centred * (group_size / (group_size - 1))).flatten()


def group_normalized(scores: Tensor, group_size: int, floor: float = 1e-4) -> Tensor:
    """Each response's score in standard deviations of the answers to the same prompt.

        A_i = (s_i − mean) / max(sd, floor)        sd with n − 1, as TRL and verl have it

    Dividing by the sd favours prompts whose answers hardly differ; leave_one_out does not (Liu et al. 2025,
    arXiv 2503.20783). Offered for comparison.

    Source: Shao et al. 2024, arXiv 2402.03300 (GRPO).

    Args:
        scores: one per response, the rows of a group adjacent. [B], any unit.
        group_size: answers per prompt, at least 2.
        floor: the smallest sd to divide by, in the unit of the scores, above 0.

    Returns:
        [B], no unit; exactly 0 where the group's scores are equal.

    Raises:
        ValueError: ``scores`` is not [B], does not divide into groups of at least 2, or ``floor`` is not above 0.
    """
    if not floor > 0.0:
        raise ValueError(f"floor is {floor}, must be above 0")
    groups = _groups(scores, group_size)
    centred = groups - groups.mean(-1, keepdim=True)
    return (centred / groups.std(-1, keepdim=True).clamp(min=floor)).flatten()


def _groups(x: Tensor, group_size: int) -> Tensor:
    """[B] as [prompts, group_size], measured from each group's first row: equal values are then exactly 0."""
    if x.dim() != 1 or group_size < 2 or x.numel() % group_size:
        raise ValueError(
            f"needs [B] with B a multiple of group_size, and group_size at least 2; "
            f"found {list(x.shape)} and group_size {group_size}"
        )
    groups = at_least_float32(x.detach()).view(-1, group_size)
    return groups - groups[:, :1]


def spread_within_groups(scores: Tensor, group_size: int) -> float:
    """How far apart the scores of answers to one prompt lie: the part of the spread that a policy can act on.

        σ = √( mean over prompts of Var(scores of the prompt) )        variances with n − 1

    With one answer per prompt it cannot be told from how prompts differ, and the spread of the whole batch is given:
    an upper bound.

    Args:
        scores: one per response, the rows of a group adjacent. [B], unit of score.
        group_size: answers per prompt, at least 1.

    Returns:
        σ, unit of score; 0 for a single response.
    """
    if group_size > 1:
        return _groups(scores, group_size).var(-1).mean().sqrt().item()
    return at_least_float32(scores).std().item() if len(scores) > 1 else 0.0
