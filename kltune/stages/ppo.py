"""PPO under a KL budget: sample, score, penalise, clip, repeat.

    maximise  E[score] − beta · KL(policy ‖ reference)

with clipped policy steps on responses the policy itself sampled. ``beta`` is fixed, or steered so that the measured KL
meets a target. Sources: Schulman et al. 2017, arXiv 1707.06347 (clipping); Ziegler et al. 2019, arXiv 1909.08593,
section 2.2 (KL in the reward, and a target for it).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from kltune.core.control.controllers import LogPI
from kltune.core.kl.divergence import kl_k3
from kltune.core.objectives.group_losses import averaged, sequence_logprobs, weighted_policy_loss
from kltune.core.objectives.losses import clip_fraction, clipped_policy_loss, exact_kl_loss, k2_kl_loss
from kltune.core.tensors import expect_finite, masked_mean, per_response
from kltune.lm.model.batches import response_scatter
from kltune.lm.model.opening import check_first_ratio, rounding_metrics
from kltune.lm.model.policy import Policy
from kltune.lm.rewards.scorers import load_scorer
from kltune.recipe import PPORecipe
from kltune.run.optimizer import accumulate, guarded_step, make_optimizer, set_learning_rate, total_steps
from kltune.run.recorder import Clock
from kltune.run.session import Run, run_stage
from kltune.train.batch import Batch, mean_of, minibatch_updates, only_noise, sample_batch
from kltune.train.budget import Budget
from kltune.train.evaluation.alarms import Alarms
from kltune.train.experience import (
    Experience,
    compute_advantages,
    explained_variance,
    rescaled,
    spread_of,
    whitened,
)
from kltune.train.learner import ALARMS, SCORER, VALUES, Job, Learner, make_job
from kltune.train.loop import Taken, add_value_function, enforce_cap, load_data, schedule_share, step_size, take_steps
from kltune.train.value_function import ValueFunction, unit_of_values

STOP = 1.5  # times ppo.stop_step_kl: minibatches scatter
ENTROPY_KP, ENTROPY_KI = 3.0, 0.5       # an entropy moves by shares of itself where a KL doubles
ENTROPY = "entropy_floor"       # the stage's own part of a learner
NEAR_FLOOR = 1.1        # times the floor: from here on entropy has a price, until that is as low as it gets


@dataclass(frozen=True)
class EntropyFloor:
    """The price of entropy: the controller of the KL's, which holds floor / entropy at 1 from above."""

    floor: float
    controller: LogPI
    active: bool = False
    moves: ClassVar[bool] = False

    @classmethod
    def of(cls, recipe: PPORecipe) -> Self:
        """The floor of a recipe, far from which nothing is paid."""
        bounds = {"beta_min": recipe.kl.beta_min, "beta_max": recipe.kl.beta_max}
        gains = {"kp": ENTROPY_KP, "ki": ENTROPY_KI, "look_ahead": 0.0, "plan": 1.0}
        return cls(recipe.ppo.entropy_floor, LogPI(None, **gains, **bounds, near=1, arrived=True))

    def observed(self, entropy: float, pull: float, responses: int) -> Self:
        """After a batch of such an entropy, nats per token, whose scores pull as far apart."""
        near = entropy < NEAR_FLOOR * self.floor
        if not (near or self.active):
            return self
        distance = self.floor / max(entropy, 1e-6 * self.floor)     # of a policy that says one thing alone it is 0
        controller = self.controller.updated(distance, 1.0, pull=pull, responses=responses)
        return replace(self, controller=controller, active=near or not controller.at_bottom())

    @property
    def price(self) -> float:
        """What a nat of entropy earns, score per nat."""
        return self.controller.beta if self.active else 0.0

    def state(self) -> dict[str, Any]:
        """See ``Part.state``."""
        return {"controller": asdict(self.controller), "active": self.active}

    def tensors(self) -> dict[str, Tensor]:
        """See ``Part.tensors``."""
        return {}

    def restored(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See ``Part.restored``."""
        return replace(self, controller=LogPI(**state["controller"]), active=state["active"])


def run_ppo(recipe: PPORecipe, resume: bool) -> dict[str, Any]:
    """``kltune ppo``: train a policy within its KL budget, save it, and measure what was saved.

    Arguments and result are those of ``run_stage``.
    """
    return run_stage(recipe, resume, train)


def train(recipe: PPORecipe, policy: Policy, run: Run) -> dict[str, Any]:
    """Load what the recipe names, take the steps that are not done yet, and finish."""
    prompts, held_out = load_data(recipe, policy, run)
    steps = total_steps(recipe.run, len(prompts), recipe.sampling.prompts_per_step)
    learner = make_learner(recipe, policy, run, steps)
    job = make_job(recipe, run, held_out, steps, prompts=prompts, baseline=recipe.ppo.baseline)
    return take_steps(job, learner, take_step)


def make_learner(recipe: PPORecipe, policy: Policy, run: Run, steps: int) -> Learner:
    """The policy with its optimizer, budget and scorer and, where the recipe wants one, a value function."""
    responses = recipe.sampling.prompts_per_step * recipe.sampling.responses_per_prompt
    updates = recipe.ppo.epochs * responses // recipe.ppo.minibatch_size
    budget = Budget.of(recipe.kl, steps, updates_per_step=updates)
    learner = Learner(policy, budget=budget, parts={ALARMS: Alarms()})
    if recipe.ppo.entropy_floor is not None:
        learner.parts[ENTROPY] = EntropyFloor.of(recipe)
    add_value_function(recipe, recipe.ppo, learner)
    learner.optimizers["policy"] = make_optimizer(policy.trainable_parameters(), recipe.optim, "policy")
    learner.parts[SCORER] = load_scorer(recipe.reward, recipe.folder, policy.device, policy, run.answers)
    return learner


def take_step(job: Job, learner: Learner, step: int) -> Taken:
    """One turn of the loop: respond, measure, score, price, improve."""
    recipe, ppo = job.recipe, job.recipe.ppo
    clock = Clock()
    batch = sample_batch(job, learner, step, clock, keep=["ref_states"] if prices_exact_kl(recipe) else ())
    went_back = enforce_cap(job, learner, step, batch, pull=batch.spread)
    lr, room = step_size(job, learner, step, batch)
    update: dict[str, float | None] = {"optim/lr": lr}
    if not went_back:
        learner.budget = learner.budget.priced(batch.rollout, batch.kl, pull=batch.spread)
        update |= price_entropy(learner, batch)
        experience = compute_advantages(
            batch, learner.budget.price, ppo, per_prompt=recipe.sampling.responses_per_prompt,
            placement=recipe.kl.placement, unit=unit_of_values(learner),
            entropy_price=update.get("policy/entropy_price", 0.0),
        )
        update |= {"ppo/value_explained": explained_variance(experience)}
        if ppo.baseline == "value" and recipe.kl.placement == "reward":
            experience = whitened(experience, batch.scores)
        elif ppo.baseline in ("rloo", "dr_grpo"):
            experience = rescaled(experience, batch.spread)
        elif ppo.baseline == "reinforce_pp":
            experience = rescaled(experience, spread_of(experience, batch.scores))
        if VALUES in learner.optimizers:
            value_lr = schedule_share(job, step) * (ppo.value_lr or recipe.optim.lr)
            set_learning_rate(learner.optimizers[VALUES], value_lr)
        rests = only_noise(job, learner, batch) and not update.get("policy/entropy_price")
        rng = job.run.rng("minibatches", step)
        update |= improve(recipe, learner, experience, lr=lr, room=room, rng=rng, rests=rests)
        clock.lap("update")
    return Taken(update, clock, batch, went_back)


def price_entropy(learner: Learner, batch: Batch) -> dict[str, float]:
    """Let the entropy's price hear of a batch; nothing where there is no floor."""
    if ENTROPY not in learner.parts:
        return {}
    entropy = masked_mean(batch.rollout.entropy, batch.rollout.response_mask).item()
    floor = learner.parts[ENTROPY].observed(entropy, batch.spread, len(batch.rollout.lengths))
    learner.parts[ENTROPY] = floor
    return {"policy/entropy_price": floor.price}


def improve(
    recipe: PPORecipe, learner: Learner, experience: Experience, *, lr: float, room: float, rng: np.random.Generator,
    rests: bool = False,
) -> dict[str, float | None]:
    """Several epochs of clipped minibatch steps on one batch of experience.

    The policy rests once it has come as far as it may; its value function is fitted on.

    Args:
        recipe, learner: of the run.
        experience: of the step.
        lr, room: from ``step_size``.
        rng: for the order of the minibatches.
        rests: from the start.
    """
    stop = recipe.ppo.stop_step_kl
    limit = min(room, math.inf if stop is None else STOP * stop)
    fits: list[dict[str, float]] = []
    gaps: list[Tensor] = []

    def take(part: Experience, first: bool, limit: float) -> tuple[float, dict[str, float] | None]:
        return policy_step(recipe, learner, part, gaps if first else None, limit=limit)

    def fit(part: Experience) -> None:
        fits.append(learner.update(partial(value_step, recipe, learner, part)))

    taken = minibatch_updates(
        recipe, learner, experience, recipe.ppo, take, lr=lr, limit=limit, rng=rng, rests=rests,
        also=fit if VALUES in learner.parts else None,
    )
    return taken | mean_of(fits) | (rounding_metrics(gaps) if gaps else {})


def policy_step(
    recipe: PPORecipe, learner: Learner, part: Experience, gaps: list[Tensor] | None, *, limit: float
) -> tuple[float, dict[str, float] | None]:
    """One clipped step on a minibatch, in micro-batches that add up to it exactly.

    gaps: before any update, where to put how far log-probs are from the rollout's. The policy is the one that sampled
    then, and its ratios are taken to be 1: what they differ by is rounding, in bfloat16 a hundredth.

    Returns:
        KL(old ‖ new) of the updates before, nats per response, and metrics; None, and no step, if it passes ``limit``.
    """
    policy, rows = learner.policy, part.rollout.response_mask.shape[0]
    tokens = int(part.rollout.response_mask.sum())

    def one(micro: Tensor) -> tuple[Tensor, ...]:
        piece = part.select(micro)
        old, mask = piece.rollout, piece.rollout.response_mask
        logprobs, kl_loss = current_logprobs(recipe, policy, piece, first=gaps is not None)
        nats, found = per_response(kl_k3(old.logprobs, logprobs.detach(), mask), mask).sum(), ()
        if gaps is not None:
            found = (check_first_ratio(logprobs, old, policy),)
            piece = replace(piece, rollout=replace(old, logprobs=logprobs.detach()))
        loss, clipped = policy_loss(recipe, logprobs, piece, tokens=tokens, rows=rows)
        # The clipped loss averages over tokens, the KL is per response: rows / tokens puts both on one scale.
        per = rows * recipe.sampling.max_new_tokens if recipe.ppo.average == "limit" else tokens
        return loss + piece.kl_weight * kl_loss * len(micro) / per, loss, clipped, nats, *found

    micros = policy.micro_batches(part.rollout, recipe.optim.micro_batch_size)
    told = accumulate(policy.network, policy.trainable_parameters().values(), micros, one, "policy")
    _, losses, clipped, nats, *found = zip(*told, strict=True)
    moved = sum(each.item() / rows for each in nats)
    sums = {"ppo/policy_loss": sum(each.item() for each in losses),
            "ppo/clip_fraction": sum(each.item() for each in clipped)}
    if gaps is not None:
        gaps += found[0]
    expect_finite("KL(old ‖ new) of a minibatch", moved)
    if moved > limit:
        learner.optimizers["policy"].zero_grad(set_to_none=True)
        return moved, None
    norm = guarded_step(learner.optimizers["policy"], recipe.optim.max_grad_norm, "policy")
    return moved, sums | {"ppo/policy_grad_norm": norm}


def policy_loss(
    recipe: PPORecipe, logprobs: Tensor, piece: Experience, *, tokens: int, rows: int
) -> tuple[Tensor, Tensor]:
    """The loss that the recipe names on a micro-batch, and the share of the minibatch's tokens that it clips.

    tokens, rows: of the whole minibatch.
    """
    ppo, old, mask = recipe.ppo, piece.rollout.logprobs, piece.rollout.response_mask
    advantages = averaged(
        piece.advantages, mask, ppo.average, tokens=tokens, responses=rows, limit=recipe.sampling.max_new_tokens
    )
    if ppo.loss == "sequence":
        logprobs = sequence_logprobs(logprobs, old, mask)
    clipped = clip_fraction(logprobs, old, mask, ppo.clip_range, tokens, ppo.clip_range_high)
    if ppo.loss == "cispo":
        high = ppo.clip_range_high or ppo.clip_range
        return weighted_policy_loss(logprobs, old, advantages, mask, ppo.clip_range, high, tokens), clipped
    return clipped_policy_loss(logprobs, old, advantages, mask, ppo.clip_range, tokens, ppo.clip_range_high), clipped


def prices_exact_kl(recipe: PPORecipe) -> bool:
    """Whether the exact KL to the reference is a part of the loss."""
    return recipe.kl.placement == "loss" and recipe.kl.estimator == "exact"


def current_logprobs(
    recipe: PPORecipe, policy: Policy, part: Experience, *, first: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities under the policy as it is now [B, T], and the mean KL loss (0 where the reward is priced).

    first: before any update, as in ``policy_step``.
    """
    old, mask, temperature = part.rollout, part.rollout.response_mask, recipe.sampling.temperature
    rows = len(mask)
    if part.kl_weight and recipe.kl.estimator == "exact":
        flat, exact = policy.logprobs_and_ref_kl(
            old.ids, old.scored, temperature, ref_states=old.kept("ref_states"), lower=old.lower
        )
        logprobs = response_scatter(flat, mask)
        behind = logprobs.detach() if first else old.logprobs
        return logprobs, exact_kl_loss(response_scatter(exact, mask), logprobs, behind, mask, rows)
    logprobs = response_scatter(policy.logprobs(old.ids, old.scored, temperature, old.lower), mask)
    if part.kl_weight:
        behind = logprobs.detach() if first else old.logprobs
        return logprobs, k2_kl_loss(logprobs, old.ref_logprobs, behind, mask, rows)
    return logprobs, logprobs.new_zeros(())


def value_step(recipe: PPORecipe, learner: Learner, part: Experience) -> dict[str, float]:
    """One clipped step of the value function, which cannot move the policy."""
    values: ValueFunction = learner.parts[VALUES]
    loss, norm = values.step(
        learner.optimizers[VALUES], part, recipe.optim, clip_range=recipe.ppo.value_clip_range,
        coef=recipe.ppo.value_coef,
    )
    return {"ppo/value_loss": loss, "ppo/value_grad_norm": norm}
