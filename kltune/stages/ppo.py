"""PPO under a KL budget: sample, score, penalise, clip, repeat.

    maximise  E[score] − beta · KL(policy ‖ reference)

with clipped policy steps on responses the policy itself sampled. ``beta`` is fixed, or steered so that the measured KL
meets a target. Sources: Schulman et al. 2017, arXiv 1707.06347 (clipping); Ziegler et al. 2019, arXiv 1909.08593,
section 2.2 (KL in the reward, and a target for it).
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kltune.core.divergence import kl_k3
from kltune.core.intervals import KLSummary
from kltune.core.losses import clip_fraction, clipped_policy_loss, clipped_value_loss, exact_kl_loss, k2_kl_loss
from kltune.core.masking import per_response
from kltune.errors import Interrupted, ModelError, RecipeError
from kltune.lm.batches import Rollout, response_scatter
from kltune.lm.data import Prompt, load_prompts
from kltune.lm.evaluate import HeldOut, described, evaluate, kl_result, load_held_out, measure_settings
from kltune.lm.experience import (
    Experience,
    batch_metrics,
    collect,
    controller_of,
    measured_kl,
    priced,
    response_kl,
    sample_rows,
    score,
    shape,
    standardize,
)
from kltune.lm.loading import pick_device
from kltune.lm.opening import load_policy
from kltune.lm.optim import check_optimizer, guarded_step, learning_rate_share, make_optimizer, total_steps
from kltune.lm.policy import Policy
from kltune.lm.scorers import load_scorer
from kltune.lm.selftest import check_fresh_policy, check_frozen
from kltune.recipe import PPORecipe
from kltune.run.checkpoint import save_checkpoint, save_final
from kltune.run.clock import Clock
from kltune.run.learner import Learner
from kltune.run.page import write_page
from kltune.run.report import Report
from kltune.run.session import Run, finished_result, open_run

# Largest |change of a log-prob| when nothing was updated yet: rounding that depends on the batch's shape.
FIRST_RATIO_GAP = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


@dataclass(frozen=True)
class Job:
    """What stays the same from step to step."""

    recipe: PPORecipe
    run: Run
    report: Report
    prompts: list[Prompt]
    held_out: HeldOut
    steps: int


def run_ppo(recipe: PPORecipe, resume: bool) -> dict[str, Any]:
    """``kltune ppo``: train a policy within its KL budget, save it, and measure what was saved.

    Args:
        recipe: what to do.
        resume: go on from the newest checkpoint in the output folder.

    Returns:
        The object of ``result.json``.
    """
    if recipe.kl.hard_cap is not None:
        raise RecipeError("kl.hard_cap: this version of kltune ppo has no hard cap; remove the key and use kl.target.")
    done = finished_result(recipe)
    if done is not None:
        return done
    with open_run(recipe, resume=resume) as run:
        torch.manual_seed(recipe.run.seed)  # the adapter's initial weights; everything later has its own numbers
        policy = load_policy(recipe.model, recipe.lora, device=pick_device(recipe.run.device))
        run.set_reference(policy.fingerprint.as_dict())
        prompts, held_out = load_data(recipe, policy)
        learner = make_learner(recipe, policy, prompts, run)
        steps = total_steps(recipe.run, len(prompts), recipe.sampling.prompts_per_step)
        target = recipe.kl.target if recipe.kl.control == "target" else None
        with Report(run.folder, "ppo", steps, target=target, start_step=run.start_step, unit=recipe.kl.unit) as report:
            for note in (policy.fingerprint.describe(), *held_out.notes):
                report.say(note)
            job = Job(recipe, run, report, prompts, held_out, steps)
            for step in range(run.start_step + 1, steps + 1):
                take_step(job, learner, step)
            return finish(job, learner)


def load_data(recipe: PPORecipe, policy: Policy) -> tuple[list[Prompt], HeldOut]:
    """Training prompts, and what evaluations are made on."""
    data = recipe.data
    limit = policy.prompt_limit(data.max_prompt_tokens, recipe.sampling.max_new_tokens)
    rules = {"template": data.template, "on_overlong": data.on_overlong, "on_bad_row": data.on_bad_row}
    prompts, counts = load_prompts(data.prompts, policy.tokenizer, max_tokens=limit, **rules)
    note = described(data.prompts, counts)
    held_out = load_held_out(recipe.eval, data, policy, prompts, prompt_limit=limit, folder=recipe.folder, note=note)
    return prompts, held_out


def make_learner(recipe: PPORecipe, policy: Policy, prompts: list[Prompt], run: Run) -> Learner:
    """Value function, optimizers, controller and scorer; checked at the start, or restored from a checkpoint."""
    value_optimizer = None
    if recipe.ppo.baseline == "value":
        policy.add_value_function(recipe.lora)
        value_optimizer = make_optimizer(policy.value_parameters(), recipe.optim)
        check_optimizer(value_optimizer, policy.value_parameters(), "value function")
    optimizer = make_optimizer(policy.trainable_parameters(), recipe.optim)
    check_optimizer(optimizer, policy.trainable_parameters(), "policy")
    scorer = load_scorer(recipe.reward, recipe.folder, policy.device)
    responses = recipe.sampling.prompts_per_step * recipe.sampling.responses_per_prompt
    controller = controller_of(recipe.kl, updates_per_step=recipe.ppo.epochs * responses // recipe.ppo.minibatch_size)
    run.record(rewards=scorer.identity)
    learner = Learner(policy, optimizer, value_optimizer, controller, scorer)
    if run.resume_from is not None:
        learner.restore(run.resume_from)
        return learner
    check_fresh_policy(policy, prompts)
    if scorer.wants_reference_samples:
        rng = run.rng("reference", 0)
        learner.scorer = standardize(scorer, policy, prompts, recipe.sampling, seed=recipe.run.seed, rng=rng)
    return learner


def take_step(job: Job, learner: Learner, step: int) -> None:
    """One turn of the loop: respond, measure, score, price, improve, record."""
    recipe, run, sampling, ppo = job.recipe, job.run, job.recipe.sampling, job.recipe.ppo
    clock = Clock()
    rng = run.rng("sampling", step)
    rollout = collect(
        learner.policy, job.prompts, sampling, step=step, seed=recipe.run.seed, rng=rng, exact=recipe.kl.exact
    )
    clock.lap("sample")
    scores = score(learner.scorer, rollout, sampling.missing_end_penalty)
    clock.lap("score")

    distance = measured_kl(rollout)
    group = {"baseline": ppo.baseline, "per_prompt": sampling.responses_per_prompt}
    learner.controller = priced(
        learner.controller, recipe.kl, rollout, scores, distance.nats_per_response, **group
    )
    beta = learner.controller.beta
    experience = shape(
        rollout, scores, beta, placement=recipe.kl.placement, gamma=ppo.gamma, gae_lambda=ppo.gae_lambda, **group
    )
    share = learning_rate_share(recipe.optim, step, job.steps)
    learner.set_learning_rates(share * recipe.optim.lr, share * (ppo.value_lr or recipe.optim.lr))
    update = improve(recipe, learner, experience, run.rng("minibatches", step))
    clock.lap("update")

    metrics = batch_metrics(rollout, scores, distance, beta) | update | {"optim/lr": share * recipe.optim.lr}
    evaluates = step % recipe.run.eval_every == 0 and step < job.steps  # after the last step, `finish` evaluates
    if evaluates:
        metrics |= evaluate(learner.policy, job.held_out, sampling, learner.scorer, seed=recipe.run.seed)[0]
        clock.lap("eval")
    job.report.step(step, metrics | clock.metrics(len(scores)))
    if evaluates or step in (1, job.steps):
        job.report.samples(step, sample_rows(rollout, scores, response_kl(rollout)))
    if step % recipe.run.save_every == 0 or step == job.steps or run.stop_signal:
        save(job, learner, step, distance)
    if run.stop_signal and step < job.steps:
        raise Interrupted(f"stopped after step {step} of {job.steps}; --resume goes on from there.", run.stop_signal)


def improve(recipe: PPORecipe, learner: Learner, experience: Experience, rng: np.random.Generator) -> dict[str, float]:
    """Several epochs of clipped minibatch steps on one batch of experience."""
    ppo, total = recipe.ppo, len(experience.advantages)
    done: list[dict[str, float]] = []
    for _ in range(ppo.epochs):
        order = torch.from_numpy(rng.permutation(total)).to(experience.advantages.device)
        for rows in order.split(ppo.minibatch_size):
            part = experience.select(rows)
            stats = policy_step(recipe, learner, part, first=not done)
            if learner.value_optimizer is not None:
                stats |= value_step(recipe, learner, part)
            done.append(stats)
            # The step KL is measured before the minibatch's own step, so this stops one step after the limit is passed.
            if ppo.stop_step_kl is not None and stats["kl/step_nats_per_response"] > 1.5 * ppo.stop_step_kl:
                return averaged(done)
    return averaged(done)


def averaged(done: list[dict[str, float]]) -> dict[str, float]:
    """Means over the minibatches of one step; the step KL is that of the last one, after all the others' updates."""
    means = {name: sum(stats[name] for stats in done) / len(done) for name in done[0]}
    return means | {
        "kl/step_nats_per_response": done[-1]["kl/step_nats_per_response"],
        "ppo/minibatches": float(len(done)),
    }


def policy_step(recipe: PPORecipe, learner: Learner, part: Experience, *, first: bool) -> dict[str, float]:
    """One clipped step on a minibatch, in micro-batches that add up to it exactly."""
    policy, rows = learner.policy, part.rollout.response_mask.shape[0]
    tokens = int(part.rollout.response_mask.sum())
    sums = dict.fromkeys(("ppo/policy_loss", "ppo/clip_fraction", "kl/step_nats_per_response"), 0.0)
    for micro in torch.arange(rows, device=policy.device).split(recipe.optim.micro_batch_size or rows):
        piece = part.select(micro)
        old, mask = piece.rollout, piece.rollout.response_mask
        logprobs, kl_loss = current_logprobs(recipe, policy, piece)
        if first:
            check_first_ratio(logprobs, old, policy)
        loss = clipped_policy_loss(logprobs, old.logprobs, piece.advantages, mask, recipe.ppo.clip_range, tokens)
        # The clipped loss averages over tokens, the KL is per response: rows / tokens puts both on one scale.
        (loss + piece.kl_weight * kl_loss * len(micro) / tokens).backward()
        step_kl = per_response(kl_k3(old.logprobs, logprobs.detach(), mask), mask).sum() / rows
        sums["ppo/policy_loss"] += loss.item()
        sums["ppo/clip_fraction"] += clip_fraction(logprobs, old.logprobs, mask, recipe.ppo.clip_range, tokens).item()
        sums["kl/step_nats_per_response"] += step_kl.item()
    norm = guarded_step(learner.optimizer, recipe.optim.max_grad_norm, "policy")
    return sums | {"ppo/policy_grad_norm": norm}


def current_logprobs(recipe: PPORecipe, policy: Policy, part: Experience) -> tuple[Tensor, Tensor]:
    """Log-probabilities under the policy as it is now [B, T], and the mean KL loss (0 where the reward is priced)."""
    old, mask, temperature = part.rollout, part.rollout.response_mask, recipe.sampling.temperature
    rows = len(mask)
    if part.kl_weight and recipe.kl.estimator == "exact":
        flat, exact = policy.logprobs_and_ref_kl(old.ids, old.scored, temperature)
        logprobs = response_scatter(flat, mask)
        return logprobs, exact_kl_loss(response_scatter(exact, mask), logprobs, mask, rows)
    logprobs = response_scatter(policy.logprobs(old.ids, old.scored, temperature), mask)
    if part.kl_weight:
        return logprobs, k2_kl_loss(logprobs, old.ref_logprobs, mask, rows)
    return logprobs, logprobs.new_zeros(())


def value_step(recipe: PPORecipe, learner: Learner, part: Experience) -> dict[str, float]:
    """One step of the value function, which shares frozen weights with the policy and no trainable ones."""
    rows, tokens = len(part.advantages), int(part.rollout.response_mask.sum())
    total = 0.0
    for micro in torch.arange(rows, device=learner.policy.device).split(recipe.optim.micro_batch_size or rows):
        piece = part.select(micro)
        old, mask = piece.rollout, piece.rollout.response_mask
        values = response_scatter(learner.policy.values(old.ids, old.scored), mask)
        loss = clipped_value_loss(values, old.values, piece.returns, mask, recipe.ppo.value_clip_range, tokens)
        (recipe.ppo.value_coef * loss).backward()
        total += loss.item()
    norm = guarded_step(learner.value_optimizer, recipe.optim.max_grad_norm, "value function")
    return {"ppo/value_loss": total, "ppo/value_grad_norm": norm}


def check_first_ratio(logprobs: Tensor, old: Rollout, policy: Policy) -> None:
    """Before the first update of a step, the policy is the one that sampled: every ratio is 1.

    Raises:
        ModelError: it is not, so the clipped objective would start from the wrong place.
    """
    gap = (logprobs.detach() - old.logprobs).abs().max().item()
    allowed = FIRST_RATIO_GAP[policy.dtype]
    if gap > allowed:
        raise ModelError(
            f"Before any update, a log-probability differs by {gap:.3g} nats from the rollout's (allowed: {allowed}): "
            "the model's output depends on the batch it is in. kltune cannot train it."
        )


def save(job: Job, learner: Learner, step: int, distance: KLSummary) -> None:
    """A checkpoint that an exact resume can start from. Its KL is the batch's: before the step's update."""
    info = about(job.recipe, learner.policy, asdict(distance))
    save_checkpoint(
        job.run.folder, step, learner.policy.save, info=info, tensors=learner.tensors(), state=learner.state(),
        keep=job.recipe.run.keep,
    )


def about(recipe: PPORecipe, policy: Policy, kl: dict[str, Any]) -> dict[str, Any]:
    """What kltune.json says of a checkpoint: its reference, its KL, and how that is measured again."""
    settings = measure_settings(recipe.eval.prompts or recipe.data.prompts, recipe.data, recipe.sampling)
    return {"stage": "ppo", "kind": "adapter", "reference": policy.fingerprint.as_dict(), "kl": kl, "measure": settings}


def finish(job: Job, learner: Learner) -> dict[str, Any]:
    """Prove the reference is untouched, save ``final``, measure it afresh, and write the result."""
    recipe, policy = job.recipe, learner.policy
    check_frozen(policy)
    job.report.say(f"measuring final on {job.held_out.responses} responses")
    metrics, measured = evaluate(
        policy, job.held_out, recipe.sampling, learner.scorer, seed=recipe.run.seed, compare=True
    )
    kl = kl_result(measured)
    final = save_final(job.run.folder, policy.save, info=about(recipe, policy, kl))
    result = job.run.finish({
        "schema": "kltune.result/1",
        "status": "finished",
        "stage": "ppo",
        "output": str(job.run.folder),
        "final": str(final),
        "steps": job.steps,
        "kl": kl,
        "target": recipe.kl.target if recipe.kl.control == "target" else None,
        "unit": recipe.kl.unit,
        "beta": learner.controller.beta,
        "score": metrics["eval/score_mean"],
        "score_stderr": metrics["eval/score_stderr"],
        "reference_score": metrics["eval/reference_score_mean"],
        "reference": policy.fingerprint.as_dict(),
        "eval": metrics,
        "held_out": recipe.eval.prompts is not None,
        "seconds": job.run.seconds(),
    })
    write_page(job.run.folder)
    return result
