"""DPO under a KL budget: learn from pairs, written down or of the policy's own, and hold what no preference loss holds.

    minimise  L(pairs) / beta + c · KL(policy ‖ reference)

``beta`` (``dpo.beta``) scales the loss's own reward and bounds nothing: pairs that never contradict each other drive
the policy on for every beta, and mass moves to responses that no pair shows (MATH 6.3). So the KL is measured where it
is defined, on responses that the policy samples, and its price c (``kl.beta``) is fixed, or steered by ``kl.target``;
with ``kl: {control: fixed, beta: 0}`` it is plain DPO, and nothing is sampled but for evaluations and a cap.

With ``dpo.source: online`` the policy's answers are scored, or compared by a judge, and of those to one prompt the best
is chosen over the worst; the KL is that of the same answers.

The sum is minimised times beta, so that plain DPO is plain DPO. The gradient of the KL is the exact one of PPO's
``placement: loss``. With ``dpo.dynamic_beta`` each batch has a beta of its own. With ``dpo.reference_alpha`` the loss
is held against a copy of the adapter that follows it; the KL that is measured, priced and capped stays the one to the
frozen weights.

Sources: Rafailov et al. 2023, arXiv 2305.18290; Song et al. 2024, arXiv 2406.01462 (offline pairs with an online KL);
Guo et al. 2024, arXiv 2402.04792 (online pairs); Wu et al. 2024, arXiv 2407.08639 (dynamic beta); Gorbatovski et al.
2024, arXiv 2404.09656 (TR-DPO, of all weights; here of the adapter's tensors, so that with an alpha below 1 the loss's
reference is no average of the two models); MATH 6.6 (a target for the KL).
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kltune.core.objectives.bradley_terry import win_share
from kltune.core.objectives.losses import exact_kl_loss
from kltune.core.objectives.preferences import dynamic_beta, mismatch_point
from kltune.errors import DivergedError
from kltune.lm.data.examples import Prompt, shuffled_positions
from kltune.lm.model.batches import Rollout, response_scatter
from kltune.lm.model.policy import Policy
from kltune.lm.model.snapshot import Snapshot, kl_to
from kltune.lm.rewards.judge import Judge
from kltune.lm.rewards.scorers import load_scorer, name_of
from kltune.recipe import DPORecipe, DPOSection, asks_for_pairs
from kltune.run.optimizer import guarded_step, learning_rate_share, make_optimizer, total_steps
from kltune.run.recorder import Clock
from kltune.run.session import Run, run_stage
from kltune.train.batch import Batch, sample_batch
from kltune.train.budget import NORMALISED_SPREAD, controller_of
from kltune.train.learner import Job, Learner
from kltune.train.loop import begin, close_step, load_data, make_job, reprice, stepped_back, take_steps
from kltune.train.preferences import (
    Preferences,
    best_against_worst,
    check_first_log_ratios,
    load_preferences,
    log_ratios,
    log_ratios_of,
    margins,
    preference_losses,
    response_logprobs,
    scale_of,
    win_rates,
)

LABELLED = ("kto", "bco")  # losses of responses judged one by one
MEMORY = 0.9  # share of a running mean that a step leaves
BALANCE_SHARE = {"file": 0.4, "online": 1.0}  # of the price that balances the gradients of pairs and KL


def run_dpo(recipe: DPORecipe, resume: bool) -> dict[str, Any]:
    """``kltune dpo``: learn from preferences within a KL budget, save the policy, and measure what was saved.

    Arguments and result are those of ``run_stage``.
    """
    return run_stage(recipe, resume, train)


def train(recipe: DPORecipe, policy: Policy, run: Run) -> dict[str, Any]:
    """Load what the recipe names, take the steps that are not done yet, and finish."""
    prompts, held_out = load_data(recipe, policy, run)
    if recipe.dpo.source == "online":
        pairs, notes = None, []
        steps = total_steps(recipe.run, len(prompts), recipe.sampling.prompts_per_step)
    else:
        pairs, *notes = load_preferences(
            recipe.data.pairs, policy, recipe.data, labelled=recipe.dpo.loss in LABELLED
        )
        steps = total_steps(recipe.run, len(pairs), recipe.optim.batch_size)
        pairs = pairs.measured(policy, positions(recipe, pairs, 1, steps), run.ref_logprobs)
    learner = make_learner(recipe, policy, pairs, prompts, run)
    job = make_job(recipe, run, prompts, held_out, steps)
    return take_steps(job, learner, partial(take_step, pairs=pairs), notes)


def make_learner(
    recipe: DPORecipe, policy: Policy, pairs: Preferences | None, prompts: list[Prompt], run: Run
) -> Learner:
    """Optimizer, controller and, for online pairs, who scores or compares; checked at the start, or restored."""
    dpo, parameters = recipe.dpo, policy.trainable_parameters()
    learner = Learner(
        policy, controller_of(recipe.kl, updates_per_step=1),
        optimizer=make_optimizer(parameters, recipe.optim, "policy"),
        data_sha256=None if pairs is None else pairs.sha256(),
        reward_mean=0.0 if dpo.loss == "bco" else None,
        margin_mean=0.0 if dpo.dynamic_beta > 0.0 else None,
        loss_reference=None if dpo.reference_alpha is None else Snapshot(parameters),
    )
    if recipe.reward and asks_for_pairs(recipe.reward[0]):
        learner.judge = Judge(recipe.reward[0], name_of(recipe.reward[0]), run.answers)
    elif recipe.reward:
        learner.scorer = load_scorer(recipe.reward, recipe.folder, policy.device, policy, run.answers)
    begin(recipe, learner, prompts, run)
    return learner


def positions(recipe: DPORecipe, pairs: Preferences, step: int, steps: int = 1) -> list[int]:
    """Which pairs are learnt from in a step, or in several from there on; of these, no more than an epoch of them."""
    size = recipe.optim.batch_size
    count = size if steps == 1 else min(steps * size, len(pairs))
    return shuffled_positions(len(pairs), (step - 1) * size, count, recipe.run.seed)


def take_step(job: Job, learner: Learner, step: int, pairs: Preferences | None) -> None:
    """One turn of the loop: respond where the KL has a price or a cap or there are no pairs, improve, record."""
    recipe, online = job.recipe, pairs is None
    clock = Clock()
    priced = recipe.kl.control == "target" or learner.controller.beta > 0.0
    batch = None
    if online or priced or learner.cap is not None:
        # Whatever the scores' own spread: the price stands beside a loss.
        batch = replace(sample_batch(job, learner, step, clock), spread=NORMALISED_SPREAD)
    lr = learning_rate_share(recipe.optim, step, job.steps) * recipe.optim.lr
    update: dict[str, float | None] = {"optim/lr": lr}
    if learner.loss_reference is not None:
        update["kl/loss_ref_nats_per_response"] = None if batch is None else kl_to(
            learner.policy, learner.loss_reference, batch.rollout, recipe.sampling.temperature
        )
    went_back = batch is not None and stepped_back(job, learner, step, batch)
    if went_back:
        # With one update in a step, momentum would carry the policy out again before the new price is felt.
        learner.stop_momentum()
    else:
        learner.set_learning_rates(lr, lr)
        if online:
            part = sampled_pairs(job, learner, batch, clock)
            count = 0 if part is None else len(part)
            update |= {"pairs/count": count, "pairs/ties": recipe.sampling.prompts_per_step - count}
        else:
            part = pairs.select(positions(recipe, pairs, step))
        if part is not None:
            update |= improve(job, learner, part, batch if priced else None, step)
        if learner.loss_reference is not None and step % recipe.dpo.reference_every == 0:
            learner.loss_reference.approach(recipe.dpo.reference_alpha)
        clock.lap("update")
    examples = None if online else recipe.optim.batch_size
    close_step(job, learner, step, batch, update, clock, went_back=went_back, examples=examples)


def sampled_pairs(job: Job, learner: Learner, batch: Batch, clock: Clock) -> Preferences | None:
    """Pairs of a step's own responses, by their scores or by a judge who compares them; None if all are ties."""
    sampling, scores = job.recipe.sampling, batch.scores
    if learner.judge is not None:
        rollout = batch.rollout
        scores = win_rates(learner.judge, rollout.prompts, rollout.responses, sampling.responses_per_prompt)
        clock.lap("score")
    return best_against_worst(batch.rollout, scores, sampling.responses_per_prompt, sampling.temperature)


def improve(
    job: Job, learner: Learner, part: Preferences, batch: Batch | None, step: int
) -> dict[str, float | None]:
    """One step against the loss of some pairs and, with a batch of responses, against what their KL costs."""
    recipe, parameters = job.recipe, list(learner.policy.trainable_parameters().values())
    has_moved = learner.loss_reference is not None and step > recipe.dpo.reference_every
    held = part.against(loss_reference(learner), learner.policy) if has_moved else part
    if learner.margin_mean is not None:
        recipe = with_beta_of_batch(recipe, learner, held)
    stats = add_loss_gradient(recipe, learner, part, first=step == 1, held=held)
    if batch is not None:
        own = [parameter.grad for parameter in parameters]
        learner.optimizer.zero_grad(set_to_none=True)
        add_kl_gradient(recipe, learner.policy, batch.rollout)
        scale = scale_of(recipe.dpo)
        share = BALANCE_SHARE[recipe.dpo.source]
        spread = balance(own, [parameter.grad for parameter in parameters], batch, scale, share)
        price = reprice(job, learner, replace(batch, spread=spread))
        for parameter, gradient in zip(parameters, own, strict=True):
            parameter.grad.mul_(price * scale).add_(gradient)
    norm = guarded_step(learner.optimizer, recipe.optim.max_grad_norm, "policy")
    if learner.reward_mean is not None:
        learner.reward_mean = running(learner.reward_mean, stats["pairs/reward_mean"])
    if learner.margin_mean is not None:
        stats |= {"dpo/beta": recipe.dpo.beta, "dpo/margin_mean_nats": learner.margin_mean}
    return stats | {"dpo/grad_norm": norm}


def with_beta_of_batch(recipe: DPORecipe, learner: Learner, held: Preferences) -> DPORecipe:
    """The recipe with this batch's own beta, of whose margin the running mean has heard by then."""
    dpo, margin = recipe.dpo, margins(log_ratios(learner.policy, held)).mean().item()
    learner.margin_mean = running(learner.margin_mean, margin)
    beta = dynamic_beta(dpo.beta, dpo.dynamic_beta, margin, learner.margin_mean)
    return recipe.model_copy(update={"dpo": dpo.model_copy(update={"beta": beta})})


def running(mean: float, new: float) -> float:
    """A running mean that has heard one more number."""
    return mean + (1.0 - MEMORY) * (new - mean)


def loss_reference(learner: Learner) -> AbstractContextManager[None]:
    """Within: the policy is what its loss is held against."""
    moving = learner.loss_reference
    return learner.policy.reference() if moving is None else moving.in_place()


def add_loss_gradient(
    recipe: DPORecipe, learner: Learner, part: Preferences, *, first: bool, held: Preferences | None = None
) -> dict[str, float | None]:
    """Add the gradient of the mean loss over some pairs, micro-batches summed to it, and say what they say.

    Args:
        recipe, learner: of the run.
        part: the pairs, under the reference that metrics are held against.
        first: before any update.
        held: the same under the loss's reference, where that is another.

    Raises:
        ModelError: ``first``, before any update, and a response is not as likely as under the reference.
    """
    policy = learner.policy
    held = part if held is None else held
    point = reference_point(recipe.dpo, learner, part)
    values, nats = [], torch.empty(len(part.examples), dtype=torch.float64)
    for groups in policy.network.micro_batches(part.lengths, recipe.optim.micro_batch_size, group=part.group):
        micro = held.select(groups)
        logprobs, lengths = response_logprobs(policy, micro)
        ratio = logprobs - micro.ref_logprobs
        if first:
            check_first_log_ratios(ratio, lengths, policy)
        each = preference_losses(recipe.dpo, ratio, logprobs / lengths, micro.wanted, point)
        (each.sum() / len(part)).backward()
        values.append(each.detach())
        nats[[part.group * at + side for at in groups for side in range(part.group)]] = logprobs.detach()
    metrics = preference_metrics(recipe.dpo, torch.cat(values), nats - part.ref_logprobs, part)
    own = nats - held.ref_logprobs
    if learner.loss_reference is not None:
        metrics["dpo/margin_nats"] = by_side(own, part)[2]
    if recipe.dpo.loss == "bco":
        metrics["pairs/reward_mean"] = recipe.dpo.beta * own.mean().item()
    return metrics


def add_kl_gradient(recipe: DPORecipe, policy: Policy, rollout: Rollout) -> None:
    """Add the gradient of KL(policy ‖ reference), nats per response, on fresh responses."""
    rows = len(rollout.response_mask)
    for micro in policy.micro_batches(rollout, recipe.optim.micro_batch_size):
        some = rollout.select(micro)
        logprobs, exact = (
            response_scatter(found, some.response_mask)
            for found in policy.logprobs_and_ref_kl(some.ids, some.scored, recipe.sampling.temperature)
        )
        exact_kl_loss(exact, logprobs, some.response_mask, rows).backward()


def balance(own: Sequence[Tensor], kl: Sequence[Tensor], batch: Batch, scale: float, share: float) -> float:
    """A share of the price at which both gradients, of KL and pairs, are as large, times √(2·KL): ``Batch.spread``.

    Their inner product, which says at which price a small step leaves the KL alone, is no guide: what drives the KL is
    also the noise of steps that an optimizer makes equally long, and noise has no direction. Nor is the whole of this
    price: much of the pairs' gradient is noise that a step averages out. A toy held at 0.4, 1.2 and 2.1 nats needed 0.7
    to 1.5 of it (and up to ten times the other), the model of ``make demo`` 0.5, hh-harmless 0.1 to 0.2. At a share of
    0.25 the highest KL of a run was 1.4 times its target, at 0.4 1.2 times; at 1, hh-harmless stayed 40 % below. Online
    pairs are of the policy's own best and worst and pull more alike: with 0.4 a toy stayed 31 % above.

    Args:
        own: gradient of the loss, by parameter.
        kl: gradient of the KL, likewise.
        batch: whose KL it is; its own spread is the answer where that has no gradient yet.
        scale: of the loss, from ``scale_of``.
        share: from ``BALANCE_SHARE``.

    Raises:
        DivergedError: a gradient is not finite.
    """
    size, size_kl = (math.sqrt(sum(g.double().square().sum().item() for g in side)) for side in (own, kl))
    if not math.isfinite(size + size_kl):
        raise DivergedError("the gradient of pairs or KL is not finite; nothing was updated. Lower optim.lr.")
    if size_kl == 0.0:
        return batch.spread
    return share * size / (scale * size_kl) * math.sqrt(2.0 * batch.distance.nats_per_response)


def reference_point(dpo: DPOSection, learner: Learner, part: Preferences) -> float:
    """What responses judged one by one are held against: kto's z₀, in nats, or bco's δ, in reward; 0 for pairs."""
    if dpo.loss == "kto":
        return mismatch_point(log_ratios_of(learner.policy, part.mismatched(), loss_reference(learner)))
    return learner.reward_mean or 0.0


def preference_metrics(
    dpo: DPOSection, values: Tensor, ratio: Tensor, part: Preferences
) -> dict[str, float | None]:
    """What a step's pairs say of the policy before its update; log-ratios in nats per response."""
    chosen, rejected, margin = by_side(ratio, part)
    metrics = {
        "loss/mean": values.mean().item(),
        "accuracy/mean": win_share(margins(ratio)) if part.group == 2 else None,
        "pairs/margin_nats": margin,
        "pairs/chosen_log_ratio_nats": chosen,
        "pairs/rejected_log_ratio_nats": rejected,
    }
    if dpo.from_reference:
        metrics["kl/fwd_offline_nats_per_response"] = -ratio.mean().item()
    return metrics


def by_side(ratio: Tensor, part: Preferences) -> tuple[float | None, float | None, float | None]:
    """Mean log-ratio of chosen and of rejected responses, and their difference; None where there are none of a side."""
    chosen, rejected = (ratio[side].mean().item() if side.any() else None for side in (part.wanted, ~part.wanted))
    return chosen, rejected, None if chosen is None or rejected is None else chosen - rejected
