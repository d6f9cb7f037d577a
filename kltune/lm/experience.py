"""From prompts to experience: sample and measure, score, price the KL, and say how each token did.

What PPO and TRPO have in common; what they do with an Experience is theirs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kltune.core.advantages import gae, group_normalized, leave_one_out, spread_within_groups
from kltune.core.controllers import Controller, Dual, FixedBeta, LogPI, Ziegler
from kltune.core.correlation import correlation
from kltune.core.divergence import kl_k1
from kltune.core.intervals import KLSummary, summarize
from kltune.core.masking import masked_mean, masked_whiten, per_response
from kltune.core.rewards import penalize
from kltune.errors import ModelError
from kltune.lm.batches import Rollout, response_scatter
from kltune.lm.data import Prompt, shuffled_positions
from kltune.lm.policy import Policy
from kltune.lm.rollout import sample_rollout
from kltune.lm.sampler import sample, uniform_numbers
from kltune.lm.scorers import Scorer
from kltune.lm.transcript import transcript
from kltune.recipe import KLSection, SamplingSection

REFERENCE_SAMPLES = 256  # responses a reward is standardised on (lm-human-preferences: 256)
# Largest |change of a log-prob| when nothing was updated yet: rounding that depends on the batch's shape.
FIRST_RATIO_GAP = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
WHITEN_FLOOR = 0.01  # of the spread of the scores: near the optimum all shaped returns coincide (MATH 2.4)


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
        """So many rows at a time, in random order; the responses to one prompt stay together, for they share it."""
        owner = self.rollout.prompt_index
        place = np.argsort(rng.permutation(int(owner.max()) + 1))
        order = torch.from_numpy(place).to(owner.device)[owner].argsort(stable=True)
        return (self.select(rows) for rows in order.split(size))


def collect(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: SamplingSection,
    *,
    step: int,
    seed: int,
    rng: np.random.Generator,
    exact: bool,
) -> Rollout:
    """The responses of one step, measured under policy, reference and, if there is one, the value function.

    Args:
        policy: adapter on.
        prompts: all training prompts; each epoch goes through them in a new order.
        sampling: the recipe's section.
        step: counted from 1; says which prompts are next.
        seed: of the order of the prompts.
        rng: this step's random numbers for sampling.
        exact: measure exact KL.
    """
    size = sampling.prompts_per_step
    chosen = [prompts[i] for i in shuffled_positions(len(prompts), (step - 1) * size, size, seed)]
    uniforms = uniform_numbers(rng, size * sampling.responses_per_prompt, sampling.max_new_tokens)
    rollout = sample_rollout(policy, chosen, uniforms, temperature=sampling.temperature, exact=exact)
    if policy.value_head is None:
        return rollout
    values, states = (
        None if found is None else response_scatter(found, rollout.response_mask)
        for found in policy.measure_values(rollout.ids, rollout.scored)
    )
    return replace(rollout, values=values, value_states=states)


def standardize(
    scorer: Scorer,
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: SamplingSection,
    *,
    seed: int,
    rng: np.random.Generator,
) -> Scorer:
    """The scorer with its ``normalize`` sources shifted and scaled to mean 0, sd 1 on responses of the reference."""
    chosen = [prompts[i] for i in shuffled_positions(len(prompts), 0, REFERENCE_SAMPLES, seed)]
    uniforms = uniform_numbers(rng, len(chosen), sampling.max_new_tokens)
    with policy.reference():
        samples = sample(policy, chosen, uniforms, temperature=sampling.temperature)
    return scorer.standardized(samples.prompts, samples.responses, [samples])


def score(scorer: Scorer, rollout: Rollout, missing_end_penalty: float) -> Tensor:
    """The score of each response, less the penalty where it never ended. [B]."""
    return scorer.total(rollout.prompts, rollout.responses, [rollout], rollout.truncated, missing_end_penalty)


def controller_of(kl: KLSection, updates_per_step: int) -> Controller:
    """The controller that a recipe's ``kl`` section asks for; ``look_ahead`` turns from updates into steps."""
    beta = None if kl.beta == "auto" else float(kl.beta)
    bounds = {"beta_min": kl.beta_min, "beta_max": kl.beta_max}
    if kl.control == "fixed":
        return FixedBeta(beta)
    if kl.controller == "ziegler":
        return Ziegler(beta, horizon=kl.horizon, **bounds)
    if kl.controller == "dual":
        return Dual(beta, lr=kl.dual_lr, **bounds)
    ahead = kl.look_ahead / updates_per_step
    return LogPI(beta, kp=kl.kp, ki=kl.ki, look_ahead=ahead, fixed_feed_forward=beta, **bounds)


def measured_kl(rollout: Rollout) -> KLSummary:
    """KL(policy ‖ reference) of a batch with its standard error: exact where measured, else k1."""
    name = "k1" if rollout.ref_kl is None else "exact"
    return summarize(name, response_kl(rollout), rollout.lengths, rollout.prompt_index)


def priced(controller: Controller, kl: KLSection, rollout: Rollout, ref_kl: float, spread: float) -> Controller:
    """The controller after it has seen a batch and before the batch is priced.

    A target per token becomes one per response by the batch's mean length.
    """
    tokens = rollout.lengths.float().mean().item() if kl.unit == "nats_per_token" else 1.0
    return controller.updated(ref_kl, (kl.target or 0.0) * tokens, spread=spread, responses=len(rollout.lengths))


def score_spread(scores: Tensor, *, baseline: str, per_prompt: int) -> float:
    """How far apart the scores of answers to one prompt lie, in the unit that beta prices: grpo divides by it, so 1."""
    return 1.0 if baseline == "grpo" else spread_within_groups(scores, per_prompt)


def shape(
    rollout: Rollout,
    scores: Tensor,
    beta: float,
    *,
    baseline: str,
    placement: str,
    per_prompt: int,
    gamma: float,
    gae_lambda: float,
) -> Experience:
    """Advantages of a batch, its KL priced in the reward (k1, detached) or left to the loss.

    ``value``: GAE on per-token rewards. ``rloo``: score − β·U against the mean of the prompt's other
    answers, U the response's log-ratio. ``grpo``: the score in standard deviations of the prompt's answers, and the
    price against their mean, so that dividing does not change what a nat costs.
    """
    mask, in_reward = rollout.response_mask, placement == "reward"
    log_ratio = kl_k1(rollout.logprobs, rollout.ref_logprobs, mask) * in_reward
    kl_weight = 0.0 if in_reward else beta
    if baseline == "value":
        advantages, returns = gae(penalize(scores, log_ratio, beta, mask), rollout.values, mask, gamma, gae_lambda)
        return Experience(rollout, advantages, returns, kl_weight)
    price = beta * per_response(log_ratio, mask)
    if baseline == "rloo":
        whole = leave_one_out(scores - price, per_prompt)
    else:
        whole = group_normalized(scores, per_prompt) - leave_one_out(price, per_prompt)
    return Experience(rollout, torch.where(mask, whole[:, None], 0.0), None, kl_weight)


def whitened(experience: Experience, scores: Tensor) -> Experience:
    """With advantages of mean 0 and spread 1 over the batch's tokens: for an optimizer whose step follows their size.

    Not for a KL in the loss, which dividing the advantages would reprice.
    """
    floor = max(WHITEN_FLOOR * scores.std().item(), 1e-8)
    mask = experience.rollout.response_mask
    return replace(experience, advantages=masked_whiten(experience.advantages, mask, floor))


def centred(experience: Experience) -> Experience:
    """With advantages of mean 0 over the tokens, in units of score: a value function still at 0 adds no noise."""
    mask = experience.rollout.response_mask
    shifted = experience.advantages - masked_mean(experience.advantages, mask)
    return replace(experience, advantages=torch.where(mask, shifted, 0.0))


def check_first_ratio(logprobs: Tensor, old: Rollout, policy: Policy) -> None:
    """Before the first update of a step, the policy is the one that sampled: every ratio is 1.

    Raises:
        ModelError: it is not, so the objective would start from the wrong place.
    """
    gap = (logprobs.detach() - old.logprobs).abs().max().item()
    allowed = FIRST_RATIO_GAP[policy.dtype]
    if gap > allowed:
        raise ModelError(
            f"Before any update, a log-probability differs by {gap:.3g} nats from the rollout's (allowed: {allowed}): "
            "the model's output depends on the batch it is in. kltune cannot train it."
        )


def batch_metrics(rollout: Rollout, scores: Tensor | None, kl: KLSummary, beta: float) -> dict[str, float | None]:
    """What a batch says of the policy that sampled it; names carry direction and unit."""
    mask = rollout.response_mask
    log_ratio = per_response(kl_k1(rollout.logprobs, rollout.ref_logprobs, mask), mask)
    scored = {} if scores is None else {
        "kl/score_correlation": correlation(scores, log_ratio),
        "score/mean": scores.mean().item(),
        "score/sd": scores.std().item() if len(scores) > 1 else None,
    }
    return scored | {
        "kl/ref_nats_per_response": kl.nats_per_response,
        "kl/ref_stderr": kl.stderr,
        "kl/ref_nats_per_token": kl.nats_per_token,
        "kl/ref_k1_nats_per_response": log_ratio.mean().item(),
        "kl/beta": beta,
        "policy/entropy_nats_per_token": None if rollout.entropy is None else masked_mean(rollout.entropy, mask).item(),
        "response/tokens": rollout.lengths.float().mean().item(),
        "response/truncated_fraction": rollout.truncated.float().mean().item(),
    }


def response_kl(rollout: Rollout) -> Tensor:
    """KL(policy ‖ reference) of each response: exact where measured, else k1. [B], nats."""
    mask = rollout.response_mask
    exact = rollout.ref_kl is not None
    return per_response(rollout.ref_kl if exact else kl_k1(rollout.logprobs, rollout.ref_logprobs, mask), mask)


def sample_rows(
    rollout: Rollout, scores: Tensor | None, kl: Tensor, tokenizer, count: int = 4
) -> list[dict[str, object]]:
    """The first few responses with score and KL (nats per response), and token by token, for people to read."""
    known = [None] * len(kl) if scores is None else scores.tolist()
    rows = zip(rollout.prompts, rollout.responses, known, kl.tolist(), strict=True)
    return [
        {"prompt": p, "response": r, "score": s, "ref_kl": k, **transcript(rollout, row, tokenizer)}
        for row, (p, r, s, k) in enumerate(list(rows)[:count])
    ]
