"""The responses of one step: sampled, scored, measured, and how they are reported."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from kltune.core.kl.divergence import kl_k1
from kltune.core.kl.intervals import KLSummary, summarize
from kltune.core.objectives.advantages import spread_within_groups
from kltune.core.objectives.bradley_terry import correlation
from kltune.core.tensors import masked_mean, per_response
from kltune.lm.data.examples import Prompt, shuffled_positions
from kltune.lm.measure.breakdown import transcript
from kltune.lm.model.batches import Rollout, response_scatter
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import sample, sample_rollout, uniform_numbers
from kltune.lm.rewards.scorers import Scorer
from kltune.recipe import SamplingSection
from kltune.run.recorder import Clock
from kltune.train.budget import NORMALISED_SPREAD
from kltune.train.learner import Job, Learner

REFERENCE_SAMPLES = 256  # responses a reward is standardised on (lm-human-preferences: 256)
UNMEASURED = dict.fromkeys(("kl/ref_nats_per_response", "kl/ref_stderr", "kl/ref_nats_per_token"))


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


def measured_kl(rollout: Rollout) -> KLSummary:
    """KL(policy ‖ reference) of a batch with its standard error: exact where measured, else k1."""
    name = "k1" if rollout.ref_kl is None else "exact"
    return summarize(name, response_kl(rollout), rollout.lengths, rollout.prompt_index)


def score_spread(scores: Tensor, *, baseline: str, per_prompt: int) -> float:
    """How far apart the scores of answers to one prompt lie, in the unit that beta prices: grpo divides by it, so 1."""
    return 1.0 if baseline == "grpo" else spread_within_groups(scores, per_prompt)


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


@dataclass(frozen=True)
class Batch:
    """The responses of a step, and how far their policy is from the reference.

    scores: [B]; None where nothing scores them. spread: what pulls the policy away, in what beta prices: at a price of
    spread/√(2·KL) an ideal policy stays at that KL. Of scores it is their spread among answers to one prompt.
    """

    rollout: Rollout
    scores: Tensor | None
    distance: KLSummary
    spread: float


def sample_batch(job: Job, learner: Learner, step: int, clock: Clock) -> Batch:
    """Respond, measure and score, where there is something that scores."""
    recipe, sampling = job.recipe, job.recipe.sampling
    rng = job.run.rng("sampling", step)
    rollout = collect(
        learner.policy, job.prompts, sampling, step=step, seed=recipe.run.seed, rng=rng, exact=recipe.kl.exact
    )
    clock.lap("sample")
    if learner.scorer is None:
        return Batch(rollout, None, measured_kl(rollout), NORMALISED_SPREAD)
    scores = score(learner.scorer, rollout, sampling.missing_end_penalty)
    clock.lap("score")
    return Batch(rollout, scores, measured_kl(rollout), score_spread(scores, **job.grouping))
