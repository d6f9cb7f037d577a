"""From prompts to experience: sample and measure, score, price the KL, and say how each token did.

What PPO and TRPO have in common; what they do with an Experience is theirs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kltune.core.kl.divergence import kl_k1
from kltune.core.objectives.advantages import gae, group_centred, group_normalized, leave_one_out, penalize, spread
from kltune.core.tensors import expect_finite, masked_mean, masked_whiten, per_response
from kltune.lm.model.batches import Rollout
from kltune.recipe import PPOSection, TRPOSection
from kltune.train.batch import Batch

WHITEN_FLOOR = 0.01  # of the spread of the scores: near the optimum all shaped returns coincide (docs/maths.md 10)


@dataclass(frozen=True)
class Experience:
    """A rollout ready for an update. advantages, returns: [B, T]; returns is None without a value function.

    kl_weight: what one nat per response costs in the loss; 0 where the rewards carry the price already.
    """

    rollout: Rollout
    advantages: Tensor
    returns: Tensor | None
    kl_weight: float

    def select(self, rows: Tensor) -> "Experience":
        """The experience of some rows."""
        rollout = self.rollout.select(rows)
        width = rollout.response_mask.shape[1]
        returns = None if self.returns is None else self.returns[rows, :width]
        return replace(self, rollout=rollout, advantages=self.advantages[rows, :width], returns=returns)

    def minibatches(self, size: int, rng: np.random.Generator) -> Iterator["Experience"]:
        """``Rollout.minibatches`` with their advantages."""
        return (self.select(rows) for rows in self.rollout.minibatches(size, rng))


def compute_advantages(
    batch: Batch, beta: float, section: PPOSection | TRPOSection, *, per_prompt: int, placement: str = "reward",
    unit: tuple[float, float] = (0.0, 1.0), entropy_price: float = 0.0,
) -> Experience:
    """The advantages of a batch, its KL priced in the reward (k1, detached) or left to the loss.

    ``value``: GAE on per-token rewards, which the value function counts in a unit of its own. ``rloo``: score − β·U
    against the mean of the prompt's other answers, U the response's log-ratio. ``dr_grpo``: the same against the mean
    of all of them; ``reinforce_pp``: and in standard deviations of the whole batch. ``grpo``: the score in standard
    deviations of the prompt's answers, and the price; both from their mean over all of these, so that a nat costs what
    it costs.

    Args:
        batch: of a step, with scores.
        beta: price of a nat, score per nat.
        section: of the stage: baseline, gamma, gae_lambda.
        per_prompt: responses to each prompt.
        placement: where the price is paid, "reward" or "loss".
        unit: (mean, sd) of the scores that the value function counts in; its returns are in it, the advantages are not.
        entropy_price: what a nat of entropy earns, above ``section.entropy_floor`` at each token.
    """
    rollout, scores, baseline = batch.rollout, batch.scores, section.baseline
    expect_finite("what a nat costs", beta)
    mask, in_reward = rollout.response_mask, placement == "reward"
    log_ratio = kl_k1(rollout.logprobs, rollout.ref_logprobs, mask) * in_reward
    kl_weight = 0.0 if in_reward else beta
    below = torch.zeros_like(log_ratio)
    if entropy_price > 0.0:     # −log π is a sample of the entropy; held against the floor, no length pays for itself
        below = entropy_price * torch.where(mask, rollout.logprobs + section.entropy_floor, 0.0)
    if baseline == "value":
        mean, sd = unit
        rewards = penalize((scores - mean) / sd, log_ratio, beta / sd, mask) - below / sd
        advantages, returns = gae(rewards, rollout.values, mask, section.gamma, section.gae_lambda)
        expect_finite("advantages and returns", advantages, returns)
        return Experience(rollout, sd * advantages, returns, kl_weight)
    if baseline != "rloo":      # against a mean that has the response in it an advantage is (k − 1)/k of itself
        kl_weight *= (per_prompt - 1) / per_prompt
    price = beta * per_response(log_ratio, mask) + per_response(below, mask)
    if baseline == "rloo":
        whole = leave_one_out(scores - price, per_prompt)
    elif baseline in ("dr_grpo", "reinforce_pp"):
        whole = group_centred(scores - price, per_prompt)
    else:
        whole = group_normalized(scores, per_prompt) - group_centred(price, per_prompt)
    expect_finite("advantages", whole)
    return Experience(rollout, torch.where(mask, whole[:, None], 0.0), None, kl_weight)


def whitened(experience: Experience, scores: Tensor) -> Experience:
    """With advantages of mean 0 and spread 1 over the batch's tokens: for an optimizer whose step follows their size.

    Not for a KL in the loss, which dividing the advantages would reprice.
    """
    floor = max(WHITEN_FLOOR * spread(scores), 1e-8)
    mask = experience.rollout.response_mask
    return replace(experience, advantages=masked_whiten(experience.advantages, mask, floor))


def spread_of(experience: Experience, scores: Tensor) -> float:
    """Standard deviation of a batch's advantages, of which a response has one; floored as in ``whitened``."""
    return max(spread(experience.advantages[:, 0]), WHITEN_FLOOR * spread(scores))


def rescaled(experience: Experience, spread: float) -> Experience:
    """With advantages, and a price in the loss, in units of the scores' spread: the limit on the gradient's norm and
    the optimizer's memory then hear nothing of the unit that scores are in.

    Args:
        experience: with advantages in units of score.
        spread: of the scores among answers to one prompt; 0 leaves all as it is.
    """
    if spread <= 0.0:
        return experience
    return replace(
        experience, advantages=experience.advantages / spread, kl_weight=experience.kl_weight / spread
    )


def centred(experience: Experience) -> Experience:
    """With advantages of mean 0 over the tokens, in units of score: a value function still at 0 adds no noise."""
    mask = experience.rollout.response_mask
    shifted = experience.advantages - masked_mean(experience.advantages, mask)
    return replace(experience, advantages=torch.where(mask, shifted, 0.0))


def explained_variance(experience: Experience) -> float | None:
    """How much of the returns' variance over tokens the values foretold; None without values, or where none varies.

        1 − Σ (R − V)² / Σ (R − R̄)²        1: all of it; 0: no more than their mean; below 0: less than that
    """
    returns, mask = experience.returns, experience.rollout.response_mask
    if returns is None:
        return None
    left, whole = (returns - experience.rollout.values)[mask].double(), returns[mask].double()
    total = (whole - whole.mean()).square().sum().item()
    return 1.0 - left.square().sum().item() / total if total > 0.0 else None
