"""DPO under a KL budget: learn from pairs, written down or of the policy's own, and hold what no preference loss holds.

    minimise  L(pairs) / beta + c · KL(policy ‖ reference)

``beta`` (``dpo.beta``) scales the loss's own reward and bounds nothing: pairs that never contradict each other drive
the policy on for every beta, and mass moves to responses that no pair shows (docs/maths.md 18). So the KL is measured
where it is defined, on responses that the policy samples, and its price c (``kl.beta``) is fixed, or steered by
``kl.target``; with ``kl: {control: fixed, beta: 0}`` it is plain DPO, and nothing is sampled but for evaluations and a
cap.

With ``dpo.source: online`` the policy's answers are scored, or compared by a judge, and of those to one prompt the best
is chosen over the worst; the KL is that of the same answers.

The sum is minimised times beta, so that plain DPO is plain DPO. The gradient of the KL is the exact one of PPO's
``placement: loss``. With ``dpo.dynamic_beta`` each batch has a beta of its own. With ``dpo.reference_alpha`` the loss
is held against a copy of the adapter that follows it; the KL that is measured, priced and capped stays the one to the
frozen weights.

Sources: Rafailov et al. 2023, arXiv 2305.18290; Song et al. 2024, arXiv 2406.01462 (offline pairs with an online KL);
Guo et al. 2024, arXiv 2402.04792 (online pairs); Wu et al. 2024, arXiv 2407.08639 (dynamic beta); Gorbatovski et al.
2024, arXiv 2404.09656 (TR-DPO, of all weights; here of the adapter's tensors, so that with an alpha below 1 the loss's
reference is no average of the two models); docs/maths.md 19 (a target for the KL).
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from kltune.core.control.controllers import pull_at
from kltune.core.objectives.bradley_terry import win_share
from kltune.core.objectives.losses import exact_kl_loss
from kltune.core.objectives.preferences import dynamic_beta, mismatch_point
from kltune.core.tensors import expect_finite
from kltune.errors import DivergedError
from kltune.lm.data.examples import shuffled_positions
from kltune.lm.model.batches import Rollout, response_scatter
from kltune.lm.model.policy import Policy
from kltune.lm.model.snapshot import Snapshot, kl_to
from kltune.lm.rewards.judge import Judge
from kltune.lm.rewards.scorers import judged_prompts, load_scorer, name_of
from kltune.recipe import DPORecipe, DPOSection, asks_for_pairs
from kltune.run.optimizer import (
    accumulate,
    guarded_step,
    make_optimizer,
    most_steps,
    set_learning_rate,
    total_steps,
)
from kltune.run.recorder import Clock
from kltune.run.screen import doing
from kltune.run.session import Run, run_stage
from kltune.train.batch import Batch, moved_since, rounding_of, sample_batch
from kltune.train.budget import LOSS_PULL, Budget
from kltune.train.evaluation.alarms import Alarms
from kltune.train.learner import ALARMS, SCORER, Job, Learner, Part, make_job
from kltune.train.loop import Taken, enforce_cap, load_data, step_size, take_steps
from kltune.train.preferences import (
    Preferences,
    best_against_worst,
    check_first_log_ratios,
    load_preferences,
    log_ratios_against,
    margins,
    preference_losses,
    response_log_ratios,
    response_logprobs,
    scale_of,
    win_rates,
)

LABEL_LOSSES = ("kto", "bco")  # losses of responses judged one by one
MEAN_MEMORY = 0.9  # share of a running mean that a step leaves
BALANCE_SHARE = {"file": 0.4, "online": 1.0}  # of the price that balances the gradients of pairs and KL
LOSS_REFERENCE, MEANS = "loss_reference", "means"  # the stage's own parts of a learner


@dataclass(frozen=True)
class LossReference:
    """What the loss holds the policy against where that moves; no reference of the budget's."""

    snapshot: Snapshot
    moves: ClassVar[bool] = True

    def state(self) -> dict[str, Any]:
        """See ``Part.state``."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """See ``Part.tensors``."""
        return self.snapshot.tensors

    def restored(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See ``Part.restored``."""
        for name, tensor in self.snapshot.tensors.items():
            tensor.copy_(tensors[name])
        return self


@dataclass(frozen=True)
class RunningMeans:
    """Means over the batches so far, of the rewards that the loss implies and of the pairs' margins in nats."""

    reward: float = 0.0
    margin: float = 0.0
    moves: ClassVar[bool] = False

    def with_reward(self, reward: float) -> Self:
        """After a batch whose responses have this mean reward."""
        return replace(self, reward=self.reward + (1.0 - MEAN_MEMORY) * (reward - self.reward))

    def with_margin(self, margin: float) -> Self:
        """After a batch whose pairs have this mean margin."""
        return replace(self, margin=self.margin + (1.0 - MEAN_MEMORY) * (margin - self.margin))

    def state(self) -> dict[str, float]:
        """See ``Part.state``."""
        return asdict(self)

    def tensors(self) -> dict[str, Tensor]:
        """See ``Part.tensors``."""
        return {}

    def restored(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See ``Part.restored``."""
        return RunningMeans(**state)


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
            recipe.data.pairs, policy, recipe.data, labelled=recipe.dpo.loss in LABEL_LOSSES
        )
        steps = total_steps(recipe.run, len(pairs), recipe.optim.batch_size)
        held_out = held_out.against(pairs, recipe.eval.pairs)
        learnt = positions(recipe, pairs, 1, most_steps(recipe.run, steps))
        doing(f"measuring the reference on {len(learnt)} rows of {recipe.data.pairs}")
        pairs = pairs.measured(policy, learnt, run.ref_logprobs)
    learner = make_learner(recipe, policy, steps)
    pair_judge = None
    if recipe.reward and asks_for_pairs(recipe.reward[0]):
        pair_judge = Judge(recipe.reward[0], name_of(recipe.reward[0]), run.answers)
    elif recipe.reward:
        learner.parts[SCORER] = load_scorer(recipe.reward, recipe.folder, policy.device, policy, run.answers)
    job = make_job(recipe, run, held_out, steps, prompts=prompts, pair_judge=pair_judge)
    return take_steps(job, learner, partial(take_step, pairs=pairs), notes)


def make_learner(recipe: DPORecipe, policy: Policy, steps: int) -> Learner:
    """The policy with its optimizer and budget, and what the loss needs to know of the steps before."""
    dpo, parameters = recipe.dpo, policy.trainable_parameters()
    parts: dict[str, Part] = {ALARMS: Alarms()}
    if dpo.loss == "bco" or dpo.dynamic_beta > 0.0:
        parts[MEANS] = RunningMeans()
    if dpo.reference_alpha is not None:
        parts[LOSS_REFERENCE] = LossReference(Snapshot(parameters))
    optimizers = {"policy": make_optimizer(parameters, recipe.optim, "policy")}
    return Learner(policy, optimizers, Budget.of(recipe.kl, steps), parts)


def positions(recipe: DPORecipe, pairs: Preferences, step: int, steps: int = 1) -> list[int]:
    """Which pairs are learnt from in a step, or in several from there on; of these, no more than an epoch of them."""
    size = recipe.optim.batch_size
    count = size if steps == 1 else min(steps * size, len(pairs))
    return shuffled_positions(len(pairs), (step - 1) * size, count, recipe.run.seed)


def take_step(job: Job, learner: Learner, step: int, pairs: Preferences | None) -> Taken:
    """One turn of the loop: respond where the KL has a price or a cap or there are no pairs, and improve."""
    recipe, online, moving = job.recipe, pairs is None, learner.parts.get(LOSS_REFERENCE)
    clock = Clock()
    priced = recipe.kl.control == "target" or learner.budget.price > 0.0
    sampled = online or priced or learner.budget.cap is not None
    keep = ["ref_states"] if priced else []
    keep += [] if moving is None else ["states"]
    batch = sample_batch(job, learner, step, clock, keep) if sampled else None
    examples = None if online else recipe.optim.batch_size
    lr, room = step_size(job, learner, step, batch)
    update: dict[str, float | None] = {"optim/lr": lr}
    if moving is not None:
        update["kl/loss_ref_nats_per_response"] = None if batch is None else kl_to(
            learner.policy, moving.snapshot, batch.rollout, recipe.sampling.temperature
        )
    # Whatever the scores' own spread: the price stands beside a loss.
    if batch is not None and enforce_cap(job, learner, step, batch, pull=LOSS_PULL):
        # With one update in a step, momentum would carry the policy out again before the new price is felt.
        stop_momentum(learner.optimizers["policy"])
        return Taken(update, clock, batch, went_back=True, examples=examples)
    set_learning_rate(learner.optimizers["policy"], lr)
    if online:
        part = sampled_pairs(job, batch, clock)
        count = 0 if part is None else len(part)
        update |= {"pairs/count": count, "pairs/ties": recipe.sampling.prompts_per_step - count}
    else:
        part = pairs.select(positions(recipe, pairs, step))
    if part is not None:
        limited = not math.isinf(room)
        rounding = rounding_of(batch.rollout) if limited else 0.0
        update |= learner.update(partial(improve, job, learner, part, batch if priced else None, step))
        if limited:
            moved = max(moved_since(learner.policy, batch.rollout, recipe) - rounding, 0.0)
            learner.budget = replace(learner.budget, size=learner.budget.size.observed(lr, moved, 1.0, rounding))
            update |= {"kl/step_nats_per_response": moved, "kl/step_limit_nats_per_response": room}
    if moving is not None and step % recipe.dpo.reference_every == 0:
        moving.snapshot.approach(recipe.dpo.reference_alpha)
    clock.lap("update")
    tokens = 0 if online else sum(len(example.ids) for example in part.examples)
    return Taken(update, clock, batch, examples=examples, tokens=tokens)


def sampled_pairs(job: Job, batch: Batch, clock: Clock) -> Preferences | None:
    """Pairs of a step's own responses, by their scores or by a judge who compares them; None if all are ties."""
    sampling, scores = job.recipe.sampling, batch.scores
    if job.pair_judge is not None:
        rollout = batch.rollout
        asked = judged_prompts(job.pair_judge, rollout.prompts, [rollout])
        scores = win_rates(job.pair_judge, asked, rollout.responses, sampling.responses_per_prompt)
        clock.lap("score")
    return best_against_worst(batch.rollout, scores, sampling.responses_per_prompt, sampling.temperature)


def improve(
    job: Job, learner: Learner, part: Preferences, batch: Batch | None, step: int
) -> dict[str, float | None]:
    """One step against the loss of some pairs and, with a batch of responses, against what their KL costs."""
    recipe, dpo, parameters = job.recipe, job.recipe.dpo, list(learner.policy.trainable_parameters().values())
    has_moved = LOSS_REFERENCE in learner.parts and step > dpo.reference_every
    held = part.against(loss_reference(learner), learner.policy) if has_moved else part
    beta = beta_of_batch(dpo, learner, held) if dpo.dynamic_beta > 0.0 else dpo.beta
    stats = add_loss_gradient(recipe, learner, part, beta, first=step == 1, held=held)
    if batch is not None:
        own = [parameter.grad for parameter in parameters]
        learner.optimizers["policy"].zero_grad(set_to_none=True)
        add_kl_gradient(recipe, learner.policy, batch.rollout)
        scale = scale_of(dpo.loss, beta)
        share = BALANCE_SHARE[dpo.source]
        price = starting_price(own, [parameter.grad for parameter in parameters], scale, share)
        pull = LOSS_PULL if price is None else pull_at(price, batch.kl.nats_per_response)
        learner.budget = learner.budget.priced(batch.rollout, batch.kl, pull)
        for parameter, gradient in zip(parameters, own, strict=True):
            parameter.grad.mul_(learner.budget.price * scale).add_(gradient)
    norm = guarded_step(learner.optimizers["policy"], recipe.optim.max_grad_norm, "policy")
    if dpo.loss == "bco":
        learner.parts[MEANS] = learner.parts[MEANS].with_reward(stats["pairs/reward_mean"])
    if dpo.dynamic_beta > 0.0:
        stats |= {"dpo/beta": beta, "dpo/margin_mean_nats": learner.parts[MEANS].margin}
    return stats | {"dpo/grad_norm": norm}


def beta_of_batch(dpo: DPOSection, learner: Learner, held: Preferences) -> float:
    """This batch's own beta, of whose margin the running mean has heard by then."""
    margin = margins(response_log_ratios(learner.policy, held)).mean().item()
    means = learner.parts[MEANS] = learner.parts[MEANS].with_margin(margin)
    return dynamic_beta(dpo.beta, dpo.dynamic_beta, margin, means.margin)


def loss_reference(learner: Learner) -> AbstractContextManager[None]:
    """Within: the policy is what its loss is held against."""
    moving = learner.parts.get(LOSS_REFERENCE)
    return learner.policy.reference() if moving is None else moving.snapshot.in_place()


def stop_momentum(optimizer: Optimizer) -> None:
    """Let an optimizer forget which way it was moving, not how large its gradients are."""
    for entries in optimizer.state.values():
        entries["exp_avg"].zero_()


def add_loss_gradient(
    recipe: DPORecipe, learner: Learner, part: Preferences, beta: float, *, first: bool, held: Preferences
) -> dict[str, float | None]:
    """Add the gradient of the mean loss over some pairs, micro-batches summed to it, and say what they say.

    Args:
        recipe, learner: of the run.
        part: the pairs, under the reference that metrics are held against.
        beta: of the loss.
        first: before any update.
        held: the same under the loss's reference, which may be another.

    Raises:
        ModelError: ``first``, before any update, and a response is not as likely as under the reference.
    """
    policy, dpo = learner.policy, recipe.dpo
    point = reference_point(dpo, learner, part)

    def one(groups: list[int]) -> tuple[Tensor, ...]:
        micro = held.select(groups)
        logprobs, lengths = response_logprobs(policy, micro)
        expect_finite("the reference's log-probabilities of pairs", micro.ref_logprobs)
        ratio = logprobs - micro.ref_logprobs
        if first:
            check_first_log_ratios(ratio, lengths, policy)
        told = ratio / lengths if dpo.average_logprobs else ratio
        each = preference_losses(dpo, told, logprobs / lengths, micro.wanted, beta=beta, point=point)
        return each.sum() / len(part), each, logprobs

    micros = policy.network.micro_batches(part.lengths, recipe.optim.micro_batch_size, group=part.group)
    told = accumulate(policy.network, policy.trainable_parameters().values(), micros, one, "pairs")
    _, values, found = zip(*told, strict=True)
    nats = torch.empty(len(part.examples), dtype=torch.float64)
    for groups, logprobs in zip(micros, found, strict=True):
        nats[[part.group * at + side for at in groups for side in range(part.group)]] = logprobs
    # Before any update the two are one policy: what is left of a log-ratio is rounding, and its sign wins no pair.
    ratio = torch.zeros_like(nats) if first else nats - part.ref_logprobs
    metrics = preference_metrics(dpo, torch.cat(values), ratio, part)
    own = ratio if held is part else nats - held.ref_logprobs
    if LOSS_REFERENCE in learner.parts:
        metrics["dpo/margin_nats"] = by_side(own, part)[2]
    if dpo.loss == "bco":
        metrics["pairs/reward_mean"] = beta * own.mean().item()
    return metrics


def add_kl_gradient(recipe: DPORecipe, policy: Policy, rollout: Rollout) -> None:
    """Add the gradient of KL(policy ‖ reference), nats per response, on fresh responses."""
    rows = len(rollout.response_mask)

    def one(micro: Tensor) -> tuple[Tensor]:
        some = rollout.select(micro)
        logprobs, exact = (
            response_scatter(found, some.response_mask)
            for found in policy.logprobs_and_ref_kl(
                some.ids, some.scored, recipe.sampling.temperature, ref_states=some.kept("ref_states"),
                lower=some.lower,
            )
        )
        # Nothing was updated since they were sampled: old and new differ by rounding alone, in bfloat16 by a hundredth.
        return (exact_kl_loss(exact, logprobs, logprobs.detach(), some.response_mask, rows),)

    micros = policy.micro_batches(rollout, recipe.optim.micro_batch_size)
    accumulate(policy.network, policy.trainable_parameters().values(), micros, one, "KL")


def starting_price(own: Sequence[Tensor], kl: Sequence[Tensor], scale: float, share: float) -> float | None:
    """A share of the price at which the gradients of KL and pairs are equally large; None where the KL has none yet.

    Their inner product, which says at which price a small step leaves the KL alone, is no guide: what drives the KL is
    also the noise of steps that an optimizer makes equally long, and noise has no direction. Nor is the whole of this
    price: much of the pairs' gradient is noise that a step averages out. A toy held at 0.4, 1.2 and 2.1 nats needed 0.7
    to 1.5 of it (and up to ten times the other), the model of ``make demo`` 0.5, hh-harmless 0.1 to 0.2. At a share of
    0.25 the highest KL of a run was 1.4 times its target, at 0.4 1.2 times; at 1, hh-harmless stayed 40 % below. Online
    pairs are of the policy's own best and worst and pull more alike: with 0.4 a toy stayed 31 % above.

    Args:
        own: gradient of the loss, by parameter.
        kl: gradient of the KL, likewise.
        scale: of the loss, from ``scale_of``.
        share: from ``BALANCE_SHARE``.

    Raises:
        DivergedError: a gradient is not finite.
    """
    size, size_kl = (math.sqrt(sum(g.double().square().sum().item() for g in side)) for side in (own, kl))
    if not math.isfinite(size + size_kl):
        raise DivergedError("the gradient of pairs or KL is not finite; nothing was updated. Lower optim.lr.")
    return None if size_kl == 0.0 else share * size / (scale * size_kl)


def reference_point(dpo: DPOSection, learner: Learner, part: Preferences) -> float:
    """What responses judged one by one are held against: kto's z₀, in nats, or bco's δ, in reward; 0 for pairs."""
    if dpo.loss == "kto":
        return mismatch_point(log_ratios_against(learner.policy, part.mismatched(), loss_reference(learner)))
    return learner.parts[MEANS].reward if dpo.loss == "bco" else 0.0


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
