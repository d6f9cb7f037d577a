"""The responses of one step: sampled, scored, measured, learnt from in minibatches, and how they are reported."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kltune.core import ranks
from kltune.core.kl.divergence import kl_k1, kl_k3
from kltune.core.kl.intervals import KLSummary, cluster_numbers, summarize
from kltune.core.objectives.advantages import spread_within_groups
from kltune.core.objectives.bradley_terry import correlation
from kltune.core.tensors import expect_finite, masked_mean, per_response
from kltune.errors import ScoreOverflow
from kltune.lm.data.examples import shuffled_positions
from kltune.lm.machine.out_of_memory import SAMPLING, SCORING, phase
from kltune.lm.measure.breakdown import transcript
from kltune.lm.model.batches import Rollout, response_scatter
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import sample, sample_rollout, uniform_numbers
from kltune.lm.rewards.scorers import Scorer
from kltune.recipe import DistillSection, PPOSection
from kltune.run.optimizer import set_learning_rate
from kltune.run.recorder import Clock
from kltune.train.learner import VALUES, BudgetRecipe, Job, Learner

REFERENCE_SAMPLES = 256  # responses a reward is standardised on (lm-human-preferences: 256)
MOVED_RESPONSES = 32    # responses that tell how far a step moved the policy
UNMEASURED = dict.fromkeys(("kl/ref_nats_per_response", "kl/ref_stderr", "kl/ref_nats_per_token"))


@dataclass(frozen=True)
class Batch:
    """The responses of a step, and how far their policy is from the reference.

    scores: [B]; None where nothing scores them. spread: standard deviation of the scores of answers to one prompt, in
    the unit that a price is in; None where there are no scores. alike: no scores of answers to one prompt differ. more:
    metrics of how they were sampled.
    """

    rollout: Rollout
    kl: KLSummary
    scores: Tensor | None = None
    spread: float | None = None
    alike: bool = False
    more: Mapping[str, float | None] = field(default_factory=dict)


def sample_batch(job: Job, learner: Learner, step: int, clock: Clock, keep: Sequence[str] = ()) -> Batch:
    """Respond to the step's prompts, measure and, where something scores, score.

    keep: hidden states that the update wants again, as ``sample_rollout`` takes them.
    """
    sampling = job.recipe.sampling
    with ranks.phase(f"sampling for step {step}"), phase(SAMPLING, learner.policy.device):
        rollout = sample_responses(job, learner.policy, step, keep)
    more = {} if job.server is None else job.server.reported()
    clock.lap("sample")
    if learner.scorer is None:
        return Batch(rollout, kl_of(rollout), more=more)
    with ranks.phase(f"scoring the responses of step {step}"), phase(SCORING, learner.policy.device):
        scores = learner.scorer.total(
            rollout.prompts, rollout.responses, [rollout], rollout.truncated, sampling.missing_end_penalty
        )
    clock.lap("score")
    if VALUES in learner.parts:
        learner.parts[VALUES] = learner.parts[VALUES].started(scores)
    alike = spread_within_groups(scores, sampling.responses_per_prompt) == 0.0
    spread = 0.0 if alike else pulling_spread(job, learner, rollout, scores)
    return Batch(rollout, kl_of(rollout), scores, spread, alike, more)


def only_noise(job: Job, learner: Learner, batch: Batch) -> bool:
    """Whether a step on a batch would follow noise alone: all answers to a prompt score alike, and no price matters.

    Values that a value function foretold differ all the same, and so do log-ratios that are priced; a step as long as
    any other went along them. Of a reward that 1 in 100 responses earns, a quarter of the first batches are such, and
    0.17 nats went on each. Above the target, or where a fixed price holds the policy, the price is no noise.
    """
    budget = learner.budget
    found = batch.alike and (budget.price == 0.0 or budget.short_of_target(batch.rollout, batch.kl))
    if found and ranks.is_first():
        job.report.note("all answers to a prompt scored alike: nothing to follow, so such steps are not taken")
    return found


def pulling_spread(job: Job, learner: Learner, rollout: Rollout, scores: Tensor) -> float:
    """How far apart the scores of answers to one prompt lie, in the unit that a price is in.

    grpo divides the scores of a prompt's answers by their spread, which leaves 1 of it. Where most answers score alike
    that is too much on average; but an optimizer that normalises its step makes a full one of the few that do not, and
    with less a reward that hardly ever comes was overspent by half. With one answer to a prompt the spread cannot be
    told from how prompts differ; where the value function has learnt that, what is left of a score beside its value of
    the prompt is nearer to it than the spread of the whole batch.
    """
    count = job.recipe.sampling.responses_per_prompt
    whole = spread_within_groups(scores, count)
    # Finite scores may have an infinite spread.
    advice = "Scale the reward down, or lower reward.N.weight."
    expect_finite("the spread of the scores", whole, advice=advice, error=ScoreOverflow)
    if job.baseline == "grpo":
        return 1.0
    if count > 1 or rollout.values is None:
        return whole
    _, unit = learner.parts[VALUES].unit
    return min(whole, spread_within_groups(scores - unit * rollout.values[:, 0], 1))


def sample_responses(job: Job, policy: Policy, step: int, keep: Sequence[str] = ()) -> Rollout:
    """The responses of a step, measured under policy, reference and, if there is one, the value function.

    Each epoch goes through all training prompts in a new order; a step's random numbers are its own.
    """
    sampling, seed = job.recipe.sampling, job.recipe.run.seed
    size = sampling.prompts_per_step
    chosen = [job.prompts[i] for i in shuffled_positions(len(job.prompts), (step - 1) * size, size, seed)]
    rng = job.run.rng("sampling", step)
    uniforms = uniform_numbers(rng, size * sampling.responses_per_prompt, sampling.max_new_tokens)
    exact = job.recipe.kl.exact
    # Before any update policy and reference differ by nothing, and only passes over the same batches say so.
    keep = ["lower", *(name for name in keep if step > 1 or name != "ref_states")]
    keep += ["states"] if policy.head_reads_states and "states" not in keep else []
    respond = partial(sample_rollout, temperature=sampling.temperature) if job.server is None else job.server.respond
    rollout = respond(policy, chosen, uniforms, exact=exact, keep=keep)
    if policy.value_head is None:
        return rollout
    mask = rollout.response_mask
    kept = rollout.states[mask] if policy.head_reads_states else None
    lower = policy.lower_of_values(rollout)
    values, states = (
        None if flat is None else response_scatter(flat, mask)
        for flat in policy.measure_values(rollout.ids, rollout.scored, kept, lower)
    )
    return replace(rollout, values=values, value_states=states, value_lower=lower)


def standardize(scorer: Scorer, policy: Policy, job: Job) -> Scorer:
    """The scorer with its ``normalize`` sources shifted and scaled to mean 0, sd 1 on responses of the reference."""
    sampling, seed = job.recipe.sampling, job.recipe.run.seed
    chosen = [job.prompts[i] for i in shuffled_positions(len(job.prompts), 0, REFERENCE_SAMPLES, seed)]
    uniforms = uniform_numbers(job.run.rng("reference", 0), len(chosen), sampling.max_new_tokens)
    with policy.reference():
        samples = sample(policy, chosen, uniforms, temperature=sampling.temperature)
    return scorer.standardized(samples.prompts, samples.responses, [samples])


def kl_of(rollout: Rollout) -> KLSummary:
    """KL(policy ‖ reference) of a batch with its standard error: exact where measured, else k1."""
    name = "k1" if rollout.ref_kl is None else "exact"
    return summarize(name, response_kl(rollout), rollout.lengths, cluster_numbers(rollout.prompts))


def rounding_of(rollout: Rollout) -> float:
    """KL between two roundings of one policy, nats per response: what no step that is measured can be told from.

    It is that of sampling and measuring. Before an update a pass may round as the one before, so that nothing shows;
    after the least of updates everything is rounded anew. In bfloat16 that was 0.022 nats per response of 48 tokens of
    stories260K at any change of the weights from 1e-4 on, and this says 0.025; as a step's own it would stop a run.
    """
    return 0.0 if rollout.rounding is None else per_response(rollout.rounding, rollout.response_mask).mean().item()


def rounding_scatter(rollout: Rollout, responses: int) -> float:
    """How far ``rounding_of`` so many responses may lie from that of all by chance: two standard errors, nats."""
    if rollout.rounding is None:
        return 0.0
    each = per_response(rollout.rounding, rollout.response_mask)
    return 2.0 * each.std(correction=0).item() / math.sqrt(responses)


@torch.no_grad()
def moved_since(policy: Policy, rollout: Rollout, recipe: BudgetRecipe) -> float:
    """How far updates have moved a policy since it sampled a batch: KL(old ‖ new) by k3, nats per response.

    On the first few responses: it is read for its order of magnitude. ``rounding_of`` them is in it.
    """
    rows = min(MOVED_RESPONSES, len(rollout.lengths))
    some = rollout.select(torch.arange(rows, device=rollout.lengths.device))

    def one(micro: Tensor) -> tuple[Tensor]:
        old = some.select(micro)
        flat = policy.logprobs(old.ids, old.scored, recipe.sampling.temperature, old.lower)
        new, mask = response_scatter(flat, old.response_mask), old.response_mask
        return (per_response(kl_k3(old.logprobs, new, mask), mask).sum(),)

    micros = policy.micro_batches(some, recipe.optim.micro_batch_size)
    policy.network.open()
    moved = sum(nats.item() for (nats,) in ranks.spread(micros, one))
    expect_finite("KL(old ‖ new) of the step", moved)
    return moved / rows


def minibatch_updates(
    recipe: BudgetRecipe, learner: Learner, data: Any, section: PPOSection | DistillSection,
    take: Callable[..., tuple[float, dict[str, float] | None]], *, lr: float, limit: float, rng: np.random.Generator,
    rests: bool = False, also: Callable[[Any], None] | None = None,
) -> dict[str, float | None]:
    """Several epochs of minibatch steps on one batch, until the policy has come as far as it may; then it rests.

    Args:
        recipe, learner: of the run; the learner's budget hears how far a learning rate has moved the policy.
        data: what was made of the batch, with its ``rollout`` and ``minibatches``.
        section: of the stage: epochs, minibatch_size.
        take: ``take(part, first, limit)`` makes a step on a minibatch. It returns KL(old ‖ new) of the updates before,
            nats per response, and metrics; None, and makes no step, where the first passes ``limit``.
        lr: of the policy.
        limit: nats per response; see ``step_size``.
        rng: for the order of the minibatches.
        rests: from the start.
        also: what is fitted to each minibatch, whether the policy rests or not.
    """
    set_learning_rate(learner.optimizers["policy"], lr)
    planned = section.epochs * len(data.rollout.lengths) // section.minibatch_size
    steps: list[dict[str, float]] = []
    moved, rounding = 0.0, rounding_of(data.rollout)
    scatter = rounding_scatter(data.rollout, section.minibatch_size)
    for part in (part for _ in range(section.epochs) for part in data.minibatches(section.minibatch_size, rng)):
        if not rests:
            most = limit + rounding + scatter if steps else math.inf
            measured, stats = learner.update(partial(take, part, first=not steps, limit=most))
            rounding = rounding if steps else max(rounding, measured)       # before any update it is nothing else
            moved, rests = max(measured - rounding, 0.0), stats is None
            steps += [] if rests else [stats]
        if also is not None:
            also(part)
        elif rests:
            break
    made = len(steps) if rests else len(steps) - 1      # updates that the last measurement saw
    if planned == 1 and not rests:
        made, moved = 1, max(moved_since(learner.policy, part.rollout, recipe) - rounding, 0.0)
    learner.budget = replace(learner.budget, size=learner.budget.size.observed(lr, moved, made / planned, rounding))
    unseen = 1.0 if rests else planned / made       # the last update's part: KL grows with the square; 4 times of two
    return mean_of(steps) | {
        "kl/step_nats_per_response": moved * unseen**2,
        "kl/step_limit_nats_per_response": None if math.isinf(limit) else limit,
        f"{recipe.stage}/minibatches": float(len(steps)),
    }


def mean_of(done: list[dict[str, float]]) -> dict[str, float]:
    """Means over the minibatches of one step; nothing of none."""
    return {name: sum(stats[name] for stats in done) / len(done) for name in (done[0] if done else ())}


def batch_metrics(batch: Batch, beta: float) -> dict[str, float | None]:
    """What a batch says of the policy that sampled it; names carry direction and unit."""
    rollout, scores, kl = batch.rollout, batch.scores, batch.kl
    mask = rollout.response_mask
    log_ratio = per_response(kl_k1(rollout.logprobs, rollout.ref_logprobs, mask), mask)
    scored = {} if scores is None else {
        "kl/score_correlation": correlation(*(_within_prompts(x, rollout.prompt_index) for x in (scores, log_ratio))),
        "score/mean": scores.mean().item(),
        "score/sd": scores.std().item() if len(scores) > 1 else None,
    }
    return scored | batch.more | {
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


def _within_prompts(values: Tensor, prompt_index: Tensor) -> Tensor:
    """What sets each response apart from the others to its prompt; the values themselves where it has no others."""
    values, none = values.double(), torch.zeros_like(values, dtype=torch.float64)
    sums, counts = (none.index_add(0, prompt_index, each) for each in (values, torch.ones_like(values)))
    return torch.where((counts > 1.0).any(), values - (sums / counts)[prompt_index], values)
