"""Distillation under a KL budget: the loop of PPO, with a teacher to imitate in place of a score to raise.

    minimise  KL(policy ‖ teacher) + c · KL(policy ‖ reference)

on responses the policy itself sampled, both exact over the vocabulary and with their whole gradient: a token answers
for the KL of the tokens it leads to (``distill.horizon``). The price c (``kl.beta``) is fixed, or steered so that
KL(policy ‖ reference) meets a target: between the two models, as far from the reference as was asked for, the policy is
then the one nearest to the teacher.

Since KL(policy ‖ teacher) = KL(policy ‖ reference) − E[log teacher / reference], this is what PPO maximises, for the
score log teacher / reference and a price of 1 + c. So the controller is PPO's, and steers that whole price.

Sources: Agarwal et al. 2024, arXiv 2306.13649 (on-policy distillation); docs/maths.md 9 (its gradient).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from kltune.core.kl.divergence import kl_k3
from kltune.core.objectives.advantages import spread_within_groups
from kltune.core.objectives.distillation import expected_after, head_and_tail, token_loss, whole_response_loss
from kltune.core.tensors import expect_finite, per_response
from kltune.lm.model.batches import Rollout, response_scatter
from kltune.lm.model.opening import check_first_ratio
from kltune.lm.model.policy import Policy
from kltune.recipe import DistillRecipe
from kltune.run.optimizer import accumulate, guarded_step, make_optimizer, total_steps
from kltune.run.recorder import Clock
from kltune.run.session import Run, run_stage
from kltune.train.batch import minibatch_updates, sample_batch
from kltune.train.budget import Budget
from kltune.train.evaluation.alarms import Alarms
from kltune.train.learner import ALARMS, Job, Learner, make_job
from kltune.train.loop import Taken, enforce_cap, load_data, step_size, take_steps
from kltune.train.teacher import AnyTeacher, Heads, load_teacher, rules_of, told


@dataclass(frozen=True)
class Lesson:
    """Responses ready for an update.

    expected: what may be expected to follow each token; see ``expected_after``. heads: what a served teacher says.
    """

    rollout: Rollout
    expected: Tensor
    heads: Heads | None = None

    def select(self, rows: Tensor) -> "Lesson":
        """The lesson of some rows."""
        rollout = self.rollout.select(rows)
        width = rollout.response_mask.shape[1]
        heads = None if self.heads is None else self.heads.select(rows, width)
        return Lesson(rollout, self.expected[rows, :width], heads)

    def minibatches(self, size: int, rng: np.random.Generator) -> Iterator["Lesson"]:
        """``Rollout.minibatches`` with what is expected after their tokens."""
        return (self.select(rows) for rows in self.rollout.minibatches(size, rng))


def run_distill(recipe: DistillRecipe, resume: bool) -> dict[str, Any]:
    """``kltune distill``: bring a policy nearer to a teacher within its KL budget, save it, measure what was saved.

    Arguments and result are those of ``run_stage``.
    """
    return run_stage(recipe, resume, train)


def train(recipe: DistillRecipe, policy: Policy, run: Run) -> dict[str, Any]:
    """Load what the recipe names, take the steps that are not done yet, and finish."""
    teacher = load_teacher(recipe, policy)
    prompts, held_out = load_data(recipe, policy, run)
    ask = partial(told, section=recipe.distill, policy=policy, rules=rules_of(recipe, policy))
    steps = total_steps(recipe.run, len(prompts), recipe.sampling.prompts_per_step)
    held_out = replace(held_out, prompts=ask(held_out.prompts), teacher=teacher)
    job = make_job(recipe, run, held_out, steps, prompts=ask(prompts))
    return take_steps(job, make_learner(recipe, policy, steps), partial(take_step, teacher=teacher), [teacher.note])


def make_learner(recipe: DistillRecipe, policy: Policy, steps: int) -> Learner:
    """The policy with its optimizer and budget; a nat from the reference is one from the teacher too."""
    responses = recipe.sampling.prompts_per_step * recipe.sampling.responses_per_prompt
    updates = recipe.distill.epochs * responses // recipe.distill.minibatch_size
    budget = Budget.of(recipe.kl, steps, updates_per_step=updates, inherent=1.0)
    optimizers = {"policy": make_optimizer(policy.trainable_parameters(), recipe.optim, "policy")}
    return Learner(policy, optimizers, budget, {ALARMS: Alarms()})


def take_step(job: Job, learner: Learner, step: int, teacher: AnyTeacher) -> Taken:
    """One turn of the loop: respond, hold against reference and teacher, price, improve."""
    recipe, clock = job.recipe, Clock()
    batch = sample_batch(job, learner, step, clock, keep=["ref_states", *teacher.keeps])
    rollout = batch.rollout
    seen = teacher.agreement(learner.policy, rollout, recipe.sampling.temperature)
    pull = spread_within_groups(seen.pull(rollout), recipe.sampling.responses_per_prompt)
    clock.lap("sample")
    went_back = enforce_cap(job, learner, step, batch, pull=pull)
    lr, room = step_size(job, learner, step, batch)
    update: dict[str, float | None] = {"optim/lr": lr} | seen.metrics(rollout)
    if not went_back:
        learner.budget = learner.budget.priced(rollout, batch.kl, pull=pull)
        price, mask = learner.budget.price, rollout.response_mask
        lesson = Lesson(rollout, expected_after(mixture(seen.kl, rollout.ref_kl, price), mask), seen.heads)
        rng = job.run.rng("minibatches", step)
        update |= improve(recipe, learner, teacher, lesson, lr=lr, room=room, rng=rng)
        clock.lap("update")
    return Taken(update, clock, batch, went_back)


def mixture(teacher_kl: Tensor, ref_kl: Tensor, price: float) -> Tensor:
    """(teacher_kl + price · ref_kl) / (1 + price): the optimizer's memory then hears nothing of the price's size."""
    return (teacher_kl + price * ref_kl) / (1.0 + price)


def improve(
    recipe: DistillRecipe, learner: Learner, teacher: AnyTeacher, lesson: Lesson, *, lr: float, room: float,
    rng: np.random.Generator,
) -> dict[str, float | None]:
    """Minibatch steps on one batch of responses, until the policy has come as far as it may.

    Args:
        recipe, learner, teacher: of the run.
        lesson: of the step.
        lr, room: from ``step_size``.
        rng: for the order of the minibatches.
    """
    def take(part: Lesson, first: bool, limit: float) -> tuple[float, dict[str, float] | None]:
        return policy_step(recipe, learner, teacher, part, first=first, limit=limit)

    return minibatch_updates(recipe, learner, lesson, recipe.distill, take, lr=lr, limit=room, rng=rng)


def policy_step(
    recipe: DistillRecipe, learner: Learner, teacher: AnyTeacher, part: Lesson, *, first: bool, limit: float
) -> tuple[float, dict[str, float] | None]:
    """One step on a minibatch, in micro-batches that add up to it exactly.

    Returns:
        KL(old ‖ new) of the updates before, nats per response, and metrics; None, and no step, if it passes ``limit``.
    """
    policy, rows, temperature = learner.policy, len(part.expected), recipe.sampling.temperature

    def one(micro: Tensor) -> tuple[Tensor, ...]:
        piece = part.select(micro)
        old, mask, heads = piece.rollout, piece.rollout.response_mask, piece.heads
        logprobs, ref_kl, teacher_kl = (
            response_scatter(flat, mask) for flat in policy.logprobs_and_ref_kl(
                old.ids, old.scored, temperature, *([teacher.logits_behind(old)] if heads is None else []),
                heads=() if heads is None else heads.at(mask), ref_states=old.kept("ref_states"), lower=old.lower,
            )
        )
        behind = old.logprobs
        if first:       # what they differ by is rounding, in bfloat16 a hundredth
            check_first_ratio(logprobs, old, policy)
            behind = logprobs.detach()
        if heads is not None:
            teacher_kl = head_and_tail(teacher_kl, logprobs, behind, heads.said, heads.outside, heads.usual)
        cost = mixture(teacher_kl, ref_kl, learner.budget.price)
        if recipe.distill.horizon == "full":
            loss = whole_response_loss(cost, logprobs, behind, mask, rows, piece.expected)
        else:
            loss = token_loss(cost, mask, rows)
        return loss, per_response(kl_k3(old.logprobs, logprobs.detach(), mask), mask).sum()

    micros = policy.micro_batches(part.rollout, recipe.optim.micro_batch_size)
    told = accumulate(policy.network, policy.trainable_parameters().values(), micros, one, "policy")
    moved = sum(nats.item() / rows for _, nats in told)
    total = sum(loss.item() for loss, _ in told)
    expect_finite("KL(old ‖ new) of a minibatch", moved)
    if moved > limit:
        learner.optimizers["policy"].zero_grad(set_to_none=True)
        return moved, None
    norm = guarded_step(learner.optimizers["policy"], recipe.optim.max_grad_norm, "policy")
    return moved, {"distill/loss": total, "distill/grad_norm": norm}
