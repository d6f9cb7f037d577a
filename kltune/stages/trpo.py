"""TRPO under a KL budget: the loop of PPO, with one natural-gradient step per batch that cannot leave a KL ball.

    maximise  E[score] − beta · KL(policy ‖ reference)    so that in each step    KL(old ‖ new) ≤ max_step_kl

measured exactly, in nats per response, on the responses of the step; a step that would be longer, or gain nothing, or
pass ``kl.hard_cap``, is shortened until it does not, or left out. No learning rate and no schedule is involved: how
long a step may be within ``max_step_kl`` follows what the next batches say of the steps before
(``core/control/adaptation.py``). The value function, where there is one, is fitted apart: its adapter and optimizer are
its own, so that it cannot move the policy; ``optim`` is about nothing else.

Source: Schulman et al. 2015, arXiv 1502.05477; what is different for language models on adapters:
docs/maths.md 13 to 16.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from kltune.core import ranks
from kltune.core.control.adaptation import FIRST_DAMPING, AdaptiveRadius, Damping
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
from kltune.core.kl.intervals import cluster_numbers, summarize
from kltune.core.tensors import expect_finite, per_response
from kltune.lm.machine.out_of_memory import CURVATURE, phase
from kltune.lm.model.batches import response_scatter
from kltune.lm.model.curvature import Fisher, from_vector, to_vector
from kltune.lm.model.opening import check_first_ratio, rounding_metrics
from kltune.lm.model.policy import Policy
from kltune.lm.model.snapshot import Snapshot, StepKL
from kltune.lm.rewards.scorers import load_scorer
from kltune.recipe import TRPORecipe
from kltune.run.optimizer import set_learning_rate, total_steps
from kltune.run.recorder import Clock
from kltune.run.session import Run, run_stage
from kltune.train.batch import Batch, only_noise, rounding_of, sample_batch
from kltune.train.budget import Budget
from kltune.train.evaluation.alarms import Alarms
from kltune.train.experience import Experience, centred, compute_advantages, explained_variance
from kltune.train.learner import ALARMS, SCORER, VALUES, Job, Learner, make_job
from kltune.train.loop import Taken, add_value_function, enforce_cap, load_data, schedule_share, take_steps
from kltune.train.value_function import ValueFunction, unit_of_values

TRUST_REGION = "trust_region"   # the stage's own part of a learner
PROBES = 2  # random vectors for the mean curvature: damping only needs its order of magnitude


@dataclass(frozen=True)
class TrustRegion:
    """What the steps so far say of the next one's shape and length. last_step: [P], which the next batch judges."""

    damping: Damping
    radius: AdaptiveRadius
    last_step: Tensor | None = None
    moves: ClassVar[bool] = False

    def observed(self, gradient: Tensor, price: float) -> tuple[Self, float | None]:
        """Update with a fresh batch's gradient; also what it says that the step before gained, unit of score."""
        if self.last_step is None:
            return self, None
        slope = gradient.dot(self.last_step).item()
        radius = self.radius.observed(slope, price)
        return replace(self, radius=radius), radius.fresh_gain(slope, price)

    def state(self) -> dict[str, Any]:
        """See ``Part.state``."""
        return {"damping": asdict(self.damping), "radius": asdict(self.radius)}

    def tensors(self) -> dict[str, Tensor]:
        """See ``Part.tensors``."""
        return {} if self.last_step is None else {"last_step": self.last_step}

    def restored(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See ``Part.restored``."""
        return TrustRegion(Damping(**state["damping"]), AdaptiveRadius(**state["radius"]), tensors.get("last_step"))


def run_trpo(recipe: TRPORecipe, resume: bool) -> dict[str, Any]:
    """``kltune trpo``: train a policy by natural-gradient steps within its KL budget, save it, measure what was saved.

    Arguments and result are those of ``run_stage``.
    """
    return run_stage(recipe, resume, train)


def train(recipe: TRPORecipe, policy: Policy, run: Run) -> dict[str, Any]:
    """Load what the recipe names, take the steps that are not done yet, and finish."""
    prompts, held_out = load_data(recipe, policy, run)
    steps = total_steps(recipe.run, len(prompts), recipe.sampling.prompts_per_step)
    learner = make_learner(recipe, policy, run, steps)
    job = make_job(recipe, run, held_out, steps, prompts=prompts, baseline=recipe.trpo.baseline)
    return take_steps(job, learner, take_step)


def make_learner(recipe: TRPORecipe, policy: Policy, run: Run, steps: int) -> Learner:
    """The policy with its trust region, budget and scorer and, where the recipe wants one, a value function."""
    adapts = recipe.trpo.damping == "auto"
    damping = Damping(FIRST_DAMPING if adapts else float(recipe.trpo.damping), adapts)
    parts = {ALARMS: Alarms(), TRUST_REGION: TrustRegion(damping, AdaptiveRadius())}
    learner = Learner(policy, budget=Budget.of(recipe.kl, steps), parts=parts)
    add_value_function(recipe, recipe.trpo, learner)
    learner.parts[SCORER] = load_scorer(recipe.reward, recipe.folder, policy.device, policy, run.answers)
    return learner


def take_step(job: Job, learner: Learner, step: int) -> Taken:
    """One turn of the loop: respond, measure, score, price, step within the ball, fit the values."""
    recipe, trpo = job.recipe, job.recipe.trpo
    clock = Clock()
    keep = ["states"] if learner.budget.cap is None else ["states", "ref_states"]
    batch = sample_batch(job, learner, step, clock, keep)
    if enforce_cap(job, learner, step, batch, pull=batch.spread):
        learner.parts[TRUST_REGION] = replace(learner.parts[TRUST_REGION], last_step=None)
        return Taken({}, clock, batch, went_back=True)
    learner.budget = learner.budget.priced(batch.rollout, batch.kl, pull=batch.spread)
    experience = compute_advantages(
        batch, learner.budget.price, trpo, per_prompt=recipe.sampling.responses_per_prompt,
        unit=unit_of_values(learner),
    )
    update: dict[str, float | None] = {"kl/step_nats_per_response": 0.0}
    if not only_noise(job, learner, batch):
        update = trust_region_step(job, learner, batch, experience, job.run.rng("curvature", step))
    if VALUES in learner.parts:
        lr = schedule_share(job, step) * recipe.optim.lr
        set_learning_rate(learner.optimizers[VALUES], lr)
        update |= {"trpo/value_explained": explained_variance(experience)}
        update |= fit_values(recipe, learner, experience, job.run.rng("minibatches", step))
    clock.lap("update")
    return Taken(update, clock, batch)


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
    trpo, price, region = job.recipe.trpo, learner.budget.price, learner.parts[TRUST_REGION]
    parameters = learner.policy.trainable_parameters()
    old = Snapshot(parameters)
    experience = centred(experience)
    gradient, rounding = learner.update(partial(policy_gradient, job.recipe, learner.policy, experience))
    region, fresh_gain = region.observed(gradient, price)
    radius = min(trpo.max_step_kl, learner.budget.room(batch.rollout, batch.kl, share=1.0))
    if not learner.budget.on_its_way(batch.rollout, batch.kl):
        radius = region.radius.allowed(radius, price)
    with phase(CURVATURE, learner.policy.device):       # nobody holds its graphs while a step is tried
        natural = natural_gradient(
            fisher_on_some(job.recipe, learner.policy, experience, rng), gradient, region.damping, trpo.cg_iterations,
            rng,
        )
    first = step_scale(natural.curvature_along, natural.slope, radius, price)
    expect_finite("the length of the step", first)
    direction = dict(zip(parameters, from_vector(natural.direction, list(parameters.values())), strict=True))
    capped = learner.budget.cap is not None
    move = StepKL(learner.policy, old, batch.rollout, job.recipe.sampling.temperature, reference=capped)

    def measure(scale: float) -> Trial:
        old.step(direction, scale)
        return effect(learner, batch, experience, move)

    # Where nothing tells the responses apart there is no direction, and so nothing to search.
    movable = first > 0.0 and natural.direction.any().item()
    result = line_search(measure, first, radius, trpo.line_search_steps) if movable else SearchResult(0.0, ())
    if not result.accepted:
        old.restore()
    if not all(trial.within_cap for trial in result.trials):
        learner.budget = learner.budget.refused()
    done = result.trials[-1] if result.accepted else Trial(step_kl=0.0, gain=0.0)
    length = done.step_kl
    if result.accepted and length <= rounding_of(batch.rollout):    # which hides it: as long as was foretold
        length = 0.5 * result.scale**2 * natural.curvature_along
    region = learner.parts[TRUST_REGION] = TrustRegion(
        region.damping.updated(result, first) if movable else region.damping, region.radius.stepped(length),
        result.scale * natural.direction if result.accepted else None,
    )
    return {
        "kl/step_nats_per_response": done.step_kl,
        "trpo/radius_nats_per_response": radius,
        "trpo/first_try_nats_per_response": result.trials[0].step_kl if result.trials else 0.0,
        "trpo/predicted_gain": result.scale * natural.slope,
        "trpo/gain": done.gain,
        "trpo/last_gain_on_new_responses": fresh_gain,
        "trpo/gain_rate": region.radius.rate,
        "trpo/gradient_norm": gradient.norm().item(),
        "trpo/line_search_tries": float(len(result.trials)),
        "trpo/accepted": float(result.accepted),
        **natural.metrics(),
        **rounding,
    }


@dataclass(frozen=True)
class NaturalGradient:
    """The direction x ≈ (F + λ)⁻¹ g of steepest gain per nat of KL(old ‖ new).

    direction: x, [P]. slope: g·x, score. curvature_along: x·F x, nats. mean_curvature: tr F / P. damping: λ.
    """

    direction: Tensor
    slope: float
    curvature_along: float
    mean_curvature: float
    damping: float
    residual: float
    iterations: int

    def metrics(self) -> dict[str, float]:
        """The curvature that was found, and how well the direction was solved for."""
        return {
            "trpo/mean_curvature": self.mean_curvature,
            "trpo/damping": self.damping / self.mean_curvature if self.mean_curvature > 0.0 else 0.0,
            "trpo/cg_residual": self.residual,
            "trpo/cg_iterations": float(self.iterations),
        }


def natural_gradient(
    fisher: Fisher, gradient: Tensor, damping: Damping, iterations: int, rng: np.random.Generator
) -> NaturalGradient:
    """Solve for the natural gradient by conjugate gradients, at most so many iterations; rng draws the probes."""
    signs = torch.from_numpy(rng.integers(0, 2, size=(PROBES, len(gradient))) * 2.0 - 1.0).to(gradient)
    curvature = mean_curvature(fisher, signs)
    added = damping.relative * curvature
    solution = conjugate_gradient(lambda v: fisher(v) + added * v, gradient, iterations)
    x = solution.x
    along = x.dot(fisher(x)).item()
    return NaturalGradient(x, gradient.dot(x).item(), along, curvature, added, solution.residual, solution.iterations)


def policy_gradient(
    recipe: TRPORecipe, policy: Policy, experience: Experience
) -> tuple[Tensor, dict[str, float]]:
    """Gradient of the surrogate on the whole batch, micro-batches added up: [P], score per parameter. And metrics.

    The policy is the one that sampled, so its ratios are taken to be 1: what they differ by is rounding.

    Raises:
        DivergedError: it is not finite.
        ModelError: the policy is not the one that sampled.
    """
    parameters = list(policy.trainable_parameters().values())
    rows = len(experience.advantages)
    total = torch.zeros(sum(tensor.numel() for tensor in parameters), dtype=torch.float64, device=policy.device)

    def one(micro: Tensor) -> tuple[Tensor]:
        piece = experience.select(micro)
        batch, mask = piece.rollout, piece.rollout.response_mask
        flat = policy.logprobs(batch.ids, batch.scored, recipe.sampling.temperature, batch.lower)
        logprobs = response_scatter(flat, mask)
        gaps = check_first_ratio(logprobs, batch, policy)
        gain = surrogate(logprobs, logprobs.detach(), piece.advantages, mask, rows)
        total.add_(to_vector(torch.autograd.grad(gain, parameters, allow_unused=True, materialize_grads=True)))
        return (gaps,)

    micros = policy.micro_batches(experience.rollout, recipe.optim.micro_batch_size)
    policy.network.open()
    gaps = [gap.cpu() for (gap,) in ranks.spread(micros, one)]
    total = ranks.summed(total).float()
    expect_finite("the policy gradient", total)
    return total, rounding_metrics(gaps)


def fisher_on_some(recipe: TRPORecipe, policy: Policy, experience: Experience, rng: np.random.Generator) -> Fisher:
    """The curvature on a random share of the responses; gradient, KL and gain are always on all of them."""
    rows = len(experience.advantages)
    some = np.sort(rng.choice(rows, size=max(1, round(recipe.trpo.fisher_fraction * rows)), replace=False))
    chosen = experience.rollout.select(torch.from_numpy(some).to(policy.device))
    return Fisher(policy, chosen.ids, chosen.scored, recipe.sampling.temperature, recipe.optim.micro_batch_size)


def effect(learner: Learner, batch: Batch, experience: Experience, move: StepKL) -> Trial:
    """What the step that was just made does, on all responses: exact KL(old ‖ new), gain, and the cap.

    A step that brings the policy nearer to its reference is within the cap wherever it ends. A token that can no longer
    be said, of log-probability −∞, has a finite part in the gain: such a step has neither KL nor gain.
    """
    rollout, budget, mask = batch.rollout, learner.budget, batch.rollout.response_mask
    logprobs, step_kl, ref_kl = move.measure()
    if not torch.isfinite(logprobs).all():
        return Trial(math.nan, math.nan)
    rows = len(mask)
    gain = surrogate(logprobs, rollout.logprobs, experience.advantages, mask, rows).item()
    size = per_response(step_kl, mask).mean().item()
    if math.isfinite(size):     # −∞ is no step of length 0
        size = max(size - rounding_of(rollout), 0.0)
    if budget.cap is None or not math.isfinite(size):
        return Trial(size, gain)
    carried = carried_ref_kl(ref_kl, logprobs, rollout.logprobs, mask)
    after = summarize("exact", carried, rollout.lengths, cluster_numbers(rollout.prompts))
    nearer = after.nats_per_response <= batch.kl.nats_per_response
    return Trial(size, gain, within_cap=nearer or budget.standing(after) == "within")


def fit_values(
    recipe: TRPORecipe, learner: Learner, experience: Experience, rng: np.random.Generator
) -> dict[str, float]:
    """A few passes of the value function over the step's returns."""
    values: ValueFunction = learner.parts[VALUES]
    done: list[tuple[float, float]] = []
    for _ in range(recipe.trpo.value_epochs):
        for part in experience.minibatches(recipe.trpo.value_minibatch_size, rng):
            take = partial(values.step, learner.optimizers[VALUES], part, recipe.optim, clip_range=math.inf, coef=1.0)
            done.append(learner.update(take))
    loss, norm = (sum(column) / len(done) for column in zip(*done, strict=True))
    return {"trpo/value_loss": loss, "trpo/value_grad_norm": norm}
