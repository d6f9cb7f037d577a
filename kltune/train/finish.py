"""How PPO, TRPO and DPO end: the newest state within the cap, landed on its target, saved as ``final`` and measured."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from kltune.core.kl.gate import standing, verdict
from kltune.core.kl.intervals import KLSummary
from kltune.errors import DivergedError
from kltune.lm.measure.interpolation import Interpolation
from kltune.lm.measure.measurement import Measurement, kl_result
from kltune.lm.model.opening import check_frozen
from kltune.lm.model.sampler import Draw
from kltune.report.pages import write_page
from kltune.run.checkpoint import save_final, saved_step, whole_checkpoints
from kltune.train.alarms import return_to_peak, watch_over
from kltune.train.budget import dearer, kl_text, unit_text
from kltune.train.evaluation import before_and_after, evaluate, gold_result
from kltune.train.learner import Job, Learner, about

MORE_RESPONSES = 4  # times as many, where the first measurement of a final state leaves it open, and in a landing
LANDING_SEED = 1_000_003  # beyond the run's own: a landing is not measured on the numbers that it was found on


@dataclass(frozen=True)
class Final:
    """A state that may be called final, as it was evaluated.

    step: steps it had done. alpha: the share of its adapter, 1 unless it was dialled back.
    """

    step: int
    metrics: dict[str, float | None]
    measured: Measurement
    alpha: float = 1.0

    @property
    def kl(self) -> KLSummary:
        """KL(policy ‖ reference) of this state."""
        return self.measured.summary()


def finish(job: Job, learner: Learner, steps: int) -> dict[str, Any]:
    """Prove the reference is untouched, save ``final``, measured afresh, and write the result.

    Args:
        job, learner: of the run.
        steps: steps done.
    """
    recipe, policy = job.recipe, learner.policy
    newest = steps if learner.stopped_early is None else return_to_peak(job, learner)
    found = land_on_target(job, learner, settle(job, learner, newest))
    if learner.peak is None:
        watch_over(job, learner, found.step, found.metrics)
    kl, metrics = kl_result(found.measured), found.metrics
    cap, target = learner.cap, recipe.kl.target if recipe.kl.control == "target" else None
    unused = target is not None and found.alpha == 1.0 and verdict(found.kl, target, recipe.kl.unit).verdict == "pass"
    if unused:
        job.report.say(
            f"final is {kl_text(found.kl, job)} from its reference, below the target {target:g}: the rest of the "
            "budget is not used."
        )
    final = save_final(job.run.folder, policy.save, info=about(recipe, policy, kl))
    job.report.samples(steps, before_and_after(
        policy, job.held_out.prompts, recipe.sampling, learner.scorer, seed=recipe.run.seed
    ))
    result = job.run.finish({
        "schema": "kltune.result/1",
        "status": "finished",
        "stage": recipe.stage,
        "output": str(job.run.folder),
        "final": str(final),
        "final_step": found.step,
        "alpha": found.alpha,
        "steps": steps,
        "stopped_early": learner.stopped_early,
        "kl": kl,
        "target": target,
        "target_unused": unused,
        "hard_cap": None if cap is None else cap.limit,
        "cap_rollbacks": None if cap is None else cap.rollbacks,
        "unit": recipe.kl.unit,
        "beta": learner.controller.beta,
        "score": metrics.get("eval/score_mean"),
        "score_stderr": metrics.get("eval/score_stderr"),
        "reference_score": metrics.get("eval/reference_score_mean"),
        **gold_result(metrics),
        "reference": policy.fingerprint.as_dict(),
        "eval": metrics,
        "held_out": recipe.eval.prompts is not None or recipe.eval.pairs is not None,
        "seconds": job.run.seconds(),
    })
    write_page(job.run.folder)
    return result


def stop(job: Job, learner: Learner, reason: str) -> NoReturn:
    """End a run at its cap: ``final`` is the state gone back to, once it is measured afresh."""
    found = settle(job, learner, learner.cap.safe.step)
    save_final(job.run.folder, learner.policy.save, info=about(job.recipe, learner.policy, kl_result(found.measured)))
    write_page(job.run.folder)
    size = "trpo.max_step_kl" if job.recipe.stage == "trpo" else "optim.lr"
    raise DivergedError(
        f"{reason}, and kl.on_cap is stop. final is the policy after step {found.step}, measured at "
        f"{kl_text(found.kl, job)}. {dearer(job)}, lower {size}, or write kl.on_cap: rollback."
    )


def settle(job: Job, learner: Learner, newest: int) -> Final:
    """Find the newest state that a fresh measurement leaves within the cap; the policy holds it from then on.

    With ``kl.land``, the newest one that is not is dialled back until it is. Without a cap it is the policy as it is.

    Raises:
        DivergedError: none is; nothing is called final.
    """
    cap, lands = learner.cap, job.recipe.kl.land
    check_frozen(learner.policy)
    nearest = math.inf
    for step in _states(job, learner, newest):
        found = measure(job, learner, step)
        if cap is None:
            return found
        found = decided(job, learner, found)
        if within_cap(learner, found):
            return found
        kl = found.kl
        nearest = min(nearest, kl.nats_per_response if cap.unit == "nats_per_response" else kl.nats_per_token)
        job.report.warn(
            f"the policy after step {step} is {kl_text(kl, job)} from its reference: not within kl.hard_cap, "
            f"{cap.limit:g}, at 95 % confidence, so it is not final."
        )
        if lands:
            lands = False       # one landing is enough: what comes next is older, and was itself within the cap once
            landed = land_within_cap(job, learner, step)
            if landed is not None:
                return landed
    raise DivergedError(
        f"kl.hard_cap: no state that this run has kept is within {cap.limit:g} {unit_text(job)} at 95 % confidence "
        f"(the nearest was measured at {nearest:.3g}), so nothing is called final. {dearer(job)}; or give "
        "eval.prompts more rows and raise eval.responses, for a narrower interval."
    )


def measure(job: Job, learner: Learner, step: int, times: int = 1) -> Final:
    """Evaluate the policy, of after some step, on ``times`` as many held-out responses as the recipe says."""
    held_out = replace(job.held_out, responses=times * job.held_out.responses)
    job.report.say(f"measuring final on {held_out.responses} responses")
    sampling, seed = job.recipe.sampling, job.recipe.run.seed
    return Final(step, *evaluate(learner.policy, held_out, sampling, learner.scorer, seed=seed))


def within_cap(learner: Learner, found: Final) -> bool:
    """Whether the whole 95 % interval lies below the cap."""
    return standing(found.kl, learner.cap.limit, learner.cap.unit) == "within"


def decided(job: Job, learner: Learner, found: Final) -> Final:
    """The evaluation, or one on more responses where it leaves open whether the cap is held."""
    undecided = standing(found.kl, learner.cap.limit, learner.cap.unit) == "open"
    return measure(job, learner, found.step, MORE_RESPONSES) if undecided else found


def land_within_cap(job: Job, learner: Learner, step: int) -> Final | None:
    """Dial the policy back until it is within the cap, as ``kltune project`` does.

    Returns:
        Its evaluation; None, and the policy as it was, if that could not be shown.
    """
    count, interpolation = job.held_out.responses, make_interpolation(job, learner)
    search, check = interpolation.land(learner.cap.limit, count, MORE_RESPONSES * count)
    if check is not None:
        found = decided(job, learner, measure(job, learner, step))
        if within_cap(learner, found):
            job.report.say(f"landing: final is {search.alpha:.4f} times the adapter after step {step}.")
            return replace(found, alpha=search.alpha)
    interpolation.scale.set(1.0)
    return None


def land_on_target(job: Job, learner: Learner, found: Final) -> Final:
    """Dial a policy that was measured beyond its target back to it.

    Beyond is an interval that lies above the target altogether. A policy below its target stays where it is: an adapter
    times more than 1 is no policy that was ever trained.
    """
    kl = job.recipe.kl
    if not kl.land or kl.control != "target" or verdict(found.kl, kl.target, kl.unit).verdict != "fail":
        return found
    alpha = make_interpolation(job, learner).meet(kl.target, MORE_RESPONSES * job.held_out.responses)
    job.report.say(
        f"landing: {kl_text(found.kl, job)} is beyond the target {kl.target:g}; final is {alpha:.4f} times the adapter."
    )
    return replace(measure(job, learner, found.step), alpha=alpha)


def make_interpolation(job: Job, learner: Learner) -> Interpolation:
    """The policy ready to be dialled back, with random numbers that its evaluation does not use."""
    sampling = job.recipe.sampling
    draw = Draw(sampling.max_new_tokens, sampling.temperature, job.recipe.run.seed + LANDING_SEED)
    return Interpolation(learner.policy, job.held_out.prompts, draw, unit=job.recipe.kl.unit)


def _states(job: Job, learner: Learner, newest: int) -> Iterator[int]:
    """Steps of the states that could be final, newest first; the policy holds each while it is looked at."""
    if learner.cap is None:
        yield newest
        return
    safe = learner.cap.safe
    here = learner.policy.trainable_parameters()
    if not all(torch.equal(here[name], tensor) for name, tensor in safe.tensors["policy"].items()):
        yield newest
    learner.put_back(safe.tensors)
    yield safe.step
    for folder in whole_checkpoints(job.run.folder):
        if saved_step(folder) < safe.step:
            learner.policy.load_adapter(folder)
            yield saved_step(folder)
