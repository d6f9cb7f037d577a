"""From one score per response to an advantage per token: rewards with KL priced in, and what each token did better.

    rewards  ->  returns and advantages of a value function (GAE), or of the other answers to the prompt (RLOO, GRPO)
"""

import torch
from torch import Tensor

from kltune.core.tensors import at_least_float32, expect_leading_mask, expect_same_shape

ROUNDING = 2e-7     # of the largest score: two of float32's steps


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


def group_centred(returns: Tensor, group_size: int) -> Tensor:
    """Each response against the mean of all answers to the same prompt, its own included.

        A_i = G_i − mean_j G_j

    Args, returns and errors as ``leave_one_out``, of which it is (group_size − 1) / group_size.
    """
    groups = _groups(returns, group_size)
    return (groups - groups.mean(-1, keepdim=True)).flatten()


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
    return _groups(scores, group_size).var(-1).mean().sqrt().item() if group_size > 1 else spread(scores)


def spread(scores: Tensor) -> float:
    """Standard deviation of scores (n − 1): [B], unit of score; 0 for one, and where rounding alone tells them apart.

    In float32 the plain one of 64 times 0.1 is 7.5e-9, which is as good as any other spread to what divides by it.
    """
    if len(scores) < 2:
        return 0.0
    found, largest = torch.stack(((scores - scores[0]).double().std(), scores.abs().max().double())).tolist()
    return found if found > ROUNDING * largest else 0.0


def penalize(scores: Tensor, ref_kl: Tensor, beta: float, mask: Tensor) -> Tensor:
    """Charge every token for its distance from the reference; pay the score on the last one.

        r_t = −β · ref_kl_t + [t = L] · score

    With ``ref_kl`` = k1 and everything after a token credited to it, the policy gradient of these rewards is that of
    E[score] − β KL(policy ‖ reference). k3 or an exact KL in its place would give another gradient (docs/maths.md 9).

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
