"""TRPO under a KL budget: the loop of PPO, with one natural-gradient step per batch that cannot leave a KL ball.

    maximise  E[score] − beta · KL(policy ‖ reference)    so that in each step    KL(old ‖ new) ≤ max_step_kl

measured exactly, in nats per response, on the responses of the step; a step that would be longer, or gain nothing, or
pass ``kl.hard_cap``, is shortened until it does not, or left out. No learning rate and no schedule is involved: how
long a step may be within ``max_step_kl`` follows what the next batches say of the steps before (``core/pace.py``). The
value function, where there is one, is fitted apart: its adapter and optimizer are its own, so that it cannot move the
policy; ``optim`` is about nothing else.
Source: Schulman et al. 2015, arXiv 1502.05477; what is different for language models on adapters: MATH 4.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kltune.core.control.adaptation import FIRST_DAMPING, Damping, Pace
from kltune.core.control.trust_region import (
    SearchResult,
    Trial,
    carried_ref_kl,
    conjugate_gradient,
    line_search,
    mean_curvature,
    step_scale,
    surrogate,
)
from kltune.core.kl.gate import standing
from kltune.core.kl.intervals import summarize
from kltune.core.tensors import per_response
from kltune.errors import DivergedError
from kltune.lm.data.examples import Prompt
from kltune.lm.model.batches import response_scatter
from kltune.lm.model.curvature import Fisher, from_vector, to_vector
from kltune.lm.model.policy import Policy
from kltune.lm.model.snapshot import Snapshot, StepKL
from kltune.lm.rewards.scorers import load_scorer
from kltune.recipe import TRPORecipe
from kltune.run.optimizer import learning_rate_share, total_steps
from kltune.run.recorder import Clock
from kltune.run.session import Run, run_stage
from kltune.train.batch import Batch, sample_batch
from kltune.train.budget import REFUSAL_RAISE, controller_of
from kltune.train.experience import Experience, centred, check_first_ratio, shape
from kltune.train.learner import Job, Learner
from kltune.train.loop import add_values, begin, close_step, load_data, make_job, reprice, stepped_back, take_steps

PROBES = 2  # random vectors for the mean curvature: damping only needs its order of magnitude


def run_trpo(recipe: TRPORecipe, resume: bool) -> dict[str, Any]:
    """``kltune trpo``: train a policy by natural-gradient steps within its KL budget, save it, measure what was saved.

    Arguments and result are those of ``run_stage``.
    """
    return run_stage(recipe, resume, train)


def train(recipe: TRPORecipe, policy: Policy, run: Run) -> dict[str, Any]:
    """Load what the recipe names, take the steps that are not done yet, and finish."""
    prompts, held_out = load_data(recipe, policy, run)
    learner = make_learner(recipe, policy, prompts, run)
    steps = total_steps(recipe.run, len(prompts), recipe.sampling.prompts_per_step)
    job = make_job(recipe, run, prompts, held_out, steps, recipe.trpo.baseline)
    return take_steps(job, learner, take_step)


def make_learner(recipe: TRPORecipe, policy: Policy, prompts: list[Prompt], run: Run) -> Learner:
    """Value function with its optimizer, damping, controller and scorer; checked at the start, or restored."""
    value_optimizer = add_values(recipe, policy, recipe.trpo)
    adapts = recipe.trpo.damping == "auto"
    damping = Damping(FIRST_DAMPING if adapts else float(recipe.trpo.damping), adapts)
    scorer = load_scorer(recipe.reward, recipe.folder, policy.device, policy, run.answers)
    controller = controller_of(recipe.kl, updates_per_step=1)
    learner = Learner(policy, controller, scorer, value_optimizer=value_optimizer, damping=damping, pace=Pace())
    begin(recipe, learner, prompts, run)
    return learner


def take_step(job: Job, learner: Learner, step: int) -> None:
    """One turn of the loop: respond, measure, score, price, step within the ball, fit the values, record."""
    recipe, trpo = job.recipe, job.recipe.trpo
    clock = Clock()
    batch = sample_batch(job, learner, step, clock)
    went_back = stepped_back(job, learner, step, batch)
    update: dict[str, float] = {}
    if went_back:
        learner.last_step = None
    else:
        beta = reprice(job, learner, batch)
        experience = shape(
            batch.rollout, batch.scores, beta, placement="reward", gamma=trpo.gamma, gae_lambda=trpo.gae_lambda,
            **job.grouping,
        )
        update = trust_region_step(job, learner, batch, experience, job.run.rng("curvature", step))
        if learner.value_optimizer is not None:
            learner.set_learning_rates(0.0, learning_rate_share(recipe.optim, step, job.steps) * recipe.optim.lr)
            update |= fit_values(recipe, learner, experience, job.run.rng("minibatches", step))
        clock.lap("update")
    close_step(job, learner, step, batch, update, clock, went_back=went_back)


def trust_region_step(
    job: Job, learner: Learner, batch: Batch, experience: Experience, rng: np.random.Generator
) -> dict[str, float | None]:
    """Move the policy along the natural gradient as far as the ball allows, or leave it as it was to the last bit.

    Args:
        job, learner: of the run.
        batch: of the step.
        experience: the same with its advantages, unit of score.
        rng: for the share of responses, and the probes, of the curvature.

    Returns:
        Metrics.
    """
    recipe, trpo, beta = job.recipe, job.recipe.trpo, learner.controller.beta
    parameters = learner.policy.trainable_parameters()
    old = Snapshot(parameters)
    experience = centred(experience)
    gradient = policy_gradient(recipe, learner.policy, experience)
    fresh_gain = learn_pace(learner, gradient)
    radius = learner.pace.radius(trpo.max_step_kl, beta)
    fisher = fisher_on_some(recipe, learner.policy, experience, rng)
    signs = torch.from_numpy(rng.integers(0, 2, size=(PROBES, len(gradient))) * 2.0 - 1.0).to(gradient)
    curvature = mean_curvature(fisher, signs)
    damping = learner.damping.relative * curvature
    solution = conjugate_gradient(lambda v: fisher(v) + damping * v, gradient, trpo.cg_iterations)
    slope = gradient.dot(solution.x).item()
    first = step_scale(solution.x.dot(fisher(solution.x)).item(), slope, radius, beta)
    direction = dict(zip(parameters, from_vector(solution.x, list(parameters.values())), strict=True))
    move = StepKL(learner.policy, old, batch.rollout, recipe.sampling.temperature, reference=learner.cap is not None)

    def measure(scale: float) -> Trial:
        old.step(direction, scale)
        return effect(learner, batch, experience, move)

    # Where nothing tells the responses apart there is no direction, and so nothing to search.
    movable = first > 0.0 and solution.x.any().item()
    result = line_search(measure, first, radius, trpo.line_search_steps) if movable else SearchResult(0.0, ())
    if not result.accepted:
        old.restore()
    if movable:
        learner.damping = learner.damping.updated(result, first)
    if not all(trial.within_cap for trial in result.trials):
        learner.cap = replace(learner.cap, refusals=learner.cap.refusals + 1)
        learner.controller = learner.controller.raised(REFUSAL_RAISE, least=0.0)
    done = result.trials[-1] if result.accepted else Trial(step_kl=0.0, gain=0.0)
    learner.last_step = result.scale * solution.x if result.accepted else None
    learner.pace = learner.pace.stepped(done.step_kl)
    return {
        "kl/step_nats_per_response": done.step_kl,
        "trpo/radius_nats_per_response": radius,
        "trpo/first_try_nats_per_response": result.trials[0].step_kl if result.trials else 0.0,
        "trpo/predicted_gain": result.scale * slope,
        "trpo/gain": done.gain,
        "trpo/last_gain_on_new_responses": fresh_gain,
        "trpo/gain_rate": learner.pace.rate,
        "trpo/gradient_norm": gradient.norm().item(),
        "trpo/mean_curvature": curvature,
        "trpo/damping": damping / curvature if curvature > 0.0 else 0.0,
        "trpo/cg_residual": solution.residual,
        "trpo/cg_iterations": float(solution.iterations),
        "trpo/line_search_tries": float(len(result.trials)),
        "trpo/accepted": float(result.accepted),
    }


def learn_pace(learner: Learner, gradient: Tensor) -> float | None:
    """Let this batch's gradient judge the step before; the gain that it finds there, unit of score."""
    if learner.last_step is None:
        return None
    slope, beta = gradient.dot(learner.last_step).item(), learner.controller.beta
    learner.pace = learner.pace.observed(slope, beta)
    return learner.pace.fresh_gain(slope, beta)


def policy_gradient(recipe: TRPORecipe, policy: Policy, experience: Experience) -> Tensor:
    """Gradient of the surrogate on the whole batch, micro-batches added up. [P], score per parameter.

    Raises:
        DivergedError: it is not finite.
        ModelError: the policy is not the one that sampled.
    """
    parameters = list(policy.trainable_parameters().values())
    rows = len(experience.advantages)
    total = torch.zeros(sum(tensor.numel() for tensor in parameters), device=policy.device)
    for micro in policy.micro_batches(experience.rollout, recipe.optim.micro_batch_size):
        piece = experience.select(micro)
        batch, mask = piece.rollout, piece.rollout.response_mask
        logprobs = response_scatter(policy.logprobs(batch.ids, batch.scored, recipe.sampling.temperature), mask)
        check_first_ratio(logprobs, batch, policy)
        gain = surrogate(logprobs, batch.logprobs, piece.advantages, mask, rows)
        total += to_vector(torch.autograd.grad(gain, parameters, allow_unused=True, materialize_grads=True))
    if not torch.isfinite(total).all():
        raise DivergedError("the policy gradient is not finite; nothing was updated. Look at the scores' size.")
    return total


def fisher_on_some(recipe: TRPORecipe, policy: Policy, experience: Experience, rng: np.random.Generator) -> Fisher:
    """The curvature on a random share of the responses; gradient, KL and gain are always on all of them."""
    rows = len(experience.advantages)
    some = np.sort(rng.choice(rows, size=max(1, round(recipe.trpo.fisher_fraction * rows)), replace=False))
    chosen = experience.rollout.select(torch.from_numpy(some).to(policy.device))
    return Fisher(policy, chosen.ids, chosen.scored, recipe.sampling.temperature, recipe.optim.micro_batch_size)


def effect(learner: Learner, batch: Batch, experience: Experience, move: StepKL) -> Trial:
    """What the step that was just made does, on all responses: exact KL(old ‖ new), gain, and the cap.

    A step that brings the policy nearer to its reference is within the cap wherever it ends.
    """
    rollout, cap, mask = batch.rollout, learner.cap, batch.rollout.response_mask
    logprobs, step_kl, ref_kl = move.measure()
    rows = len(mask)
    gain = surrogate(logprobs, rollout.logprobs, experience.advantages, mask, rows).item()
    size = per_response(step_kl, mask).mean().item()
    if cap is None or not math.isfinite(size):
        return Trial(size, gain)
    carried = carried_ref_kl(ref_kl, logprobs, rollout.logprobs, mask)
    after = summarize("exact", carried, rollout.lengths, rollout.prompt_index)
    nearer = after.nats_per_response <= batch.distance.nats_per_response
    return Trial(size, gain, within_cap=nearer or standing(after, cap.limit, cap.unit) == "within")


def fit_values(
    recipe: TRPORecipe, learner: Learner, experience: Experience, rng: np.random.Generator
) -> dict[str, float]:
    """A few passes of the value function over the step's returns."""
    done: list[tuple[float, float]] = []
    for _ in range(recipe.trpo.value_epochs):
        for part in experience.minibatches(recipe.trpo.value_minibatch_size, rng):
            done.append(
                learner.value_step(
                    part, clip_range=math.inf, coef=1.0, max_grad_norm=recipe.optim.max_grad_norm,
                    micro_batch=recipe.optim.micro_batch_size,
                )
            )
    loss, norm = (sum(column) / len(done) for column in zip(*done, strict=True))
    return {"trpo/value_loss": loss, "trpo/value_grad_norm": norm}
