"""What PPO and TRPO do alike around their own updates: the data, the batch of a step, the cap, saving and finishing."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from kltune.core.controllers import feed_forward
from kltune.core.gate import standing
from kltune.core.intervals import KLSummary
from kltune.errors import DivergedError, Interrupted, RecipeError
from kltune.lm.batches import Rollout
from kltune.lm.data import Prompt, load_prompts
from kltune.lm.evaluate import (
    HeldOut,
    described,
    evaluate,
    kl_result,
    load_held_out,
    measure_settings,
)
from kltune.lm.experience import (
    batch_metrics,
    collect,
    measured_kl,
    priced,
    response_kl,
    sample_rows,
    score,
    score_spread,
    standardize,
)
from kltune.lm.measurement import Measurement
from kltune.lm.policy import Policy
from kltune.lm.selftest import check_fresh_policy, check_frozen
from kltune.recipe import PPORecipe, TRPORecipe
from kltune.run.checkpoint import save_checkpoint, save_final, saved_step, whole_checkpoints
from kltune.run.clock import Clock
from kltune.run.learner import Learner
from kltune.run.page import write_page
from kltune.run.report import Report
from kltune.run.session import Run

RLRecipe = PPORecipe | TRPORecipe
ROLLBACK_RAISE = 2.0  # of the price, when the policy was found beyond the cap (MATH 3.5)
MORE_RESPONSES = 4  # times as many, where the first measurement of a final state leaves it open
REFUSAL_RAISE = 1.1  # of the price, when a line search met the cap: at no loss, and again at the next step


@dataclass(frozen=True)
class Job:
    """What stays the same from step to step. baseline: what a response is compared with; the stage's section has it."""

    recipe: RLRecipe
    run: Run
    report: Report
    prompts: list[Prompt]
    held_out: HeldOut
    steps: int
    baseline: str

    @property
    def grouping(self) -> dict[str, Any]:
        """How responses are compared, as the functions of ``lm.experience`` take it."""
        return {"baseline": self.baseline, "per_prompt": self.recipe.sampling.responses_per_prompt}


@dataclass(frozen=True)
class Batch:
    """The responses of a step, their scores [B], and how far their policy is from the reference."""

    rollout: Rollout
    scores: Tensor
    distance: KLSummary


def load_data(recipe: RLRecipe, policy: Policy) -> tuple[list[Prompt], HeldOut]:
    """Training prompts, and what evaluations are made on.

    Raises:
        RecipeError: a cap could never be proven on so few prompts.
    """
    data = recipe.data
    limit = policy.prompt_limit(data.max_prompt_tokens, recipe.sampling.max_new_tokens)
    rules = {"template": data.template, "on_overlong": data.on_overlong, "on_bad_row": data.on_bad_row}
    prompts, counts = load_prompts(data.prompts, policy.tokenizer, max_tokens=limit, **rules)
    note = described(data.prompts, counts)
    held_out = load_held_out(recipe.eval, data, policy, prompts, prompt_limit=limit, folder=recipe.folder, note=note)
    measured = min(len(held_out.prompts), held_out.responses)
    if recipe.kl.hard_cap is not None and measured < 2:
        raise RecipeError(
            "kl.hard_cap: final would be measured on one prompt, which gives no error and so no proof; wanted at least "
            "2 rows in eval.prompts (or data.prompts) and eval.responses of at least 2."
        )
    return prompts, held_out


def begin(recipe: RLRecipe, learner: Learner, prompts: list[Prompt], run: Run) -> None:
    """Set a learner where the run starts: checked and fresh, or as a checkpoint left it."""
    run.record(rewards=learner.scorer.identity)
    if recipe.kl.hard_cap is not None:
        learner.guard(recipe.kl.hard_cap, recipe.kl.unit)
    if run.resume_from is not None:
        learner.restore(run.resume_from)
        return
    check_fresh_policy(learner.policy, prompts)
    if learner.scorer.wants_reference_samples:
        rng = run.rng("reference", 0)
        learner.scorer = standardize(
            learner.scorer, learner.policy, prompts, recipe.sampling, seed=recipe.run.seed, rng=rng
        )


def sample_batch(job: Job, learner: Learner, step: int, clock: Clock) -> Batch:
    """Respond, measure and score."""
    recipe, sampling = job.recipe, job.recipe.sampling
    rng = job.run.rng("sampling", step)
    rollout = collect(
        learner.policy, job.prompts, sampling, step=step, seed=recipe.run.seed, rng=rng, exact=recipe.kl.exact
    )
    clock.lap("sample")
    scores = score(learner.scorer, rollout, sampling.missing_end_penalty)
    clock.lap("score")
    return Batch(rollout, scores, measured_kl(rollout))


def reprice(job: Job, learner: Learner, batch: Batch) -> float:
    """The price of a nat for this batch, once the controller has seen it; score per nat."""
    learner.controller = priced(
        learner.controller, job.recipe.kl, batch.rollout, batch.scores, batch.distance.nats_per_response, **job.grouping
    )
    return learner.controller.beta


def stepped_back(job: Job, learner: Learner, step: int, batch: Batch) -> bool:
    """Hold the batch's policy against the cap: remember it if it is within, go back and raise the price if beyond.

    Beyond is an estimate above the cap; within, the whole 95 % interval below it. What lies between goes on but is
    never gone back to.

    Returns:
        Whether the policy is another now than the one that sampled the batch.

    Raises:
        DivergedError: beyond, and the recipe says stop; ``final`` is the last state within the cap.
    """
    if learner.cap is None:
        return False
    place = standing(batch.distance, learner.cap.limit, learner.cap.unit)
    if place == "within":
        learner.remember(step - 1, batch.distance)
    if place != "beyond":
        return False
    safe = learner.cap.safe
    learner.put_back(safe.tensors)
    learner.cap = replace(learner.cap, rollbacks=learner.cap.rollbacks + 1)
    found = f"KL to the reference is {_kl_text(batch.distance, job)}, beyond kl.hard_cap, {learner.cap.limit:g}"
    if job.recipe.kl.on_cap == "stop":
        job.report.step(step, batch_metrics(batch.rollout, batch.scores, batch.distance, learner.controller.beta))
        stop(job, learner, f"step {step}: {found}")
    learner.controller = learner.controller.raised(ROLLBACK_RAISE, least=_price_at_cap(job, learner, batch))
    job.report.warn(
        f"step {step}: {found}. Went back to the policy after step {safe.step} ({safe.kl['nats_per_response']:.3g} "
        f"nats per response), and a nat now costs {learner.controller.beta:.3g}."
    )
    return True


def close_step(
    job: Job, learner: Learner, step: int, batch: Batch, update: dict[str, float], clock: Clock, *, went_back: bool
) -> None:
    """Record a step; evaluate, save and stop where it is time.

    Raises:
        Interrupted: a signal came, and everything is saved.
    """
    recipe = job.recipe
    metrics = batch_metrics(batch.rollout, batch.scores, batch.distance, learner.controller.beta) | update
    if learner.cap is not None:
        metrics |= {"kl/cap_rollbacks": learner.cap.rollbacks, "kl/cap_refusals": learner.cap.refusals}
    evaluates = step % recipe.run.eval_every == 0 and step < job.steps  # after the last step, `finish` evaluates
    if evaluates:
        metrics |= evaluate(
            learner.policy, job.held_out, recipe.sampling, learner.scorer, seed=recipe.run.seed
        )[0]
        clock.lap("eval")
    job.report.step(step, metrics | clock.metrics(len(batch.scores)))
    if evaluates or step in (1, job.steps):
        job.report.samples(step, sample_rows(batch.rollout, batch.scores, response_kl(batch.rollout)))
    if step % recipe.run.save_every == 0 or step == job.steps or job.run.stop_signal:
        # A batch measures the policy before the step's update; one that went back was measured when it was remembered.
        kl = learner.cap.safe.kl if went_back else asdict(batch.distance)
        save_checkpoint(
            job.run.folder, step, learner.policy.save, info=about(recipe, learner.policy, kl),
            tensors=learner.tensors(), state=learner.state(), keep=recipe.run.keep,
        )
    if job.run.stop_signal and step < job.steps:
        raise Interrupted(
            f"stopped after step {step} of {job.steps}; --resume goes on from there.", job.run.stop_signal
        )


def about(recipe: RLRecipe, policy: Policy, kl: dict[str, Any]) -> dict[str, Any]:
    """What kltune.json says of a checkpoint: its reference, its KL, and how that is measured again."""
    settings = measure_settings(recipe.eval.prompts or recipe.data.prompts, recipe.data, recipe.sampling)
    reference = policy.fingerprint.as_dict()
    return {"stage": recipe.stage, "kind": "adapter", "reference": reference, "kl": kl, "measure": settings}


def finish(job: Job, learner: Learner) -> dict[str, Any]:
    """Prove the reference is untouched, save ``final``, measured afresh, and write the result."""
    recipe, policy = job.recipe, learner.policy
    step, metrics, measured = settle(job, learner, job.steps)
    kl = kl_result(measured)
    cap = learner.cap
    final = save_final(job.run.folder, policy.save, info=about(recipe, policy, kl))
    result = job.run.finish({
        "schema": "kltune.result/1",
        "status": "finished",
        "stage": recipe.stage,
        "output": str(job.run.folder),
        "final": str(final),
        "final_step": step,
        "steps": job.steps,
        "kl": kl,
        "target": recipe.kl.target if recipe.kl.control == "target" else None,
        "hard_cap": None if cap is None else cap.limit,
        "cap_rollbacks": None if cap is None else cap.rollbacks,
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


def stop(job: Job, learner: Learner, reason: str) -> NoReturn:
    """End a run at its cap: ``final`` is the state gone back to, once it is measured afresh."""
    step, _, measured = settle(job, learner, learner.cap.safe.step)
    save_final(job.run.folder, learner.policy.save, info=about(job.recipe, learner.policy, kl_result(measured)))
    write_page(job.run.folder)
    size = "trpo.max_step_kl" if job.recipe.stage == "trpo" else "optim.lr"
    raise DivergedError(
        f"{reason}, and kl.on_cap is stop. final is the policy after step {step}, measured at "
        f"{_kl_text(measured.summary(), job)}. {_dearer(job)}, lower {size}, or write kl.on_cap: rollback."
    )


def settle(job: Job, learner: Learner, newest: int) -> tuple[int, dict[str, float | None], Measurement]:
    """Find the newest state that a fresh measurement leaves within the cap; the policy holds it from then on.

    Returns:
        (steps it had done, metrics of its evaluation, its KL). Without a cap it is the policy as it is.

    Raises:
        DivergedError: none is; nothing is called final.
    """
    recipe, cap = job.recipe, learner.cap
    check_frozen(learner.policy)
    nearest = math.inf

    def measure(held_out: HeldOut) -> tuple[dict[str, float | None], Measurement]:
        job.report.say(f"measuring final on {held_out.responses} responses")
        return evaluate(
            learner.policy, held_out, recipe.sampling, learner.scorer, seed=recipe.run.seed, compare=True
        )

    for step in _states(job, learner, newest):
        metrics, measured = measure(job.held_out)
        if cap is None:
            return step, metrics, measured
        if standing(measured.summary(), cap.limit, cap.unit) == "open":  # undecided, and more responses would decide it
            metrics, measured = measure(replace(job.held_out, responses=MORE_RESPONSES * job.held_out.responses))
        kl = measured.summary()
        if standing(kl, cap.limit, cap.unit) == "within":
            return step, metrics, measured
        nearest = min(nearest, kl.nats_per_response if cap.unit == "nats_per_response" else kl.nats_per_token)
        job.report.warn(
            f"the policy after step {step} is {_kl_text(kl, job)} from its reference: not within kl.hard_cap, "
            f"{cap.limit:g}, at 95 % confidence, so it is not final."
        )
    raise DivergedError(
        f"kl.hard_cap: no state that this run has kept is within {cap.limit:g} {_unit_text(job)} at 95 % confidence "
        f"(the nearest was measured at {nearest:.3g}), so nothing is called final. {_dearer(job)}; or give "
        "eval.prompts more rows and raise eval.responses, for a narrower interval."
    )


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


def _price_at_cap(job: Job, learner: Learner, batch: Batch) -> float:
    """What would hold an ideal policy at the cap, score per nat: a price near 0 would take many doublings."""
    per_token = learner.cap.unit == "nats_per_token"
    limit = learner.cap.limit * (batch.rollout.lengths.float().mean().item() if per_token else 1.0)
    return feed_forward(score_spread(batch.scores, **job.grouping), limit)


def _unit_text(job: Job) -> str:
    return job.recipe.kl.unit.replace("_per_", " per ")


def _kl_text(kl: KLSummary, job: Job) -> str:
    per_response = job.recipe.kl.unit == "nats_per_response"
    value, ci = (kl.nats_per_response, kl.ci) if per_response else (kl.nats_per_token, kl.token_ci)
    spread = "" if ci is None else f" (95 %: {ci[0]:.3g} to {ci[1]:.3g})"
    return f"{value:.3g} {_unit_text(job)}{spread}"


def _dearer(job: Job) -> str:
    """What to change in the recipe so that the policy stays nearer."""
    return "Lower kl.target" if job.recipe.kl.control == "target" else "Raise kl.beta, or write kl.control: target"
