"""What PPO, TRPO and DPO do alike around their own updates: data, the batch of a step, the cap, recording, saving."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch.optim import Optimizer

from kltune.core.control.controllers import feed_forward
from kltune.core.kl.gate import standing
from kltune.errors import Interrupted, JudgeError, RecipeError, ScorerError
from kltune.lm.data.examples import Prompt, RowRules, counts_line, distinct_prompts, load_prompts
from kltune.lm.model.opening import check_fresh_policy
from kltune.lm.model.policy import Policy
from kltune.lm.rewards.judge import Judge
from kltune.recipe import PPOSection, TRPOSection
from kltune.run.checkpoint import latest_checkpoint, save_checkpoint, saved_step
from kltune.run.optimizer import make_optimizer
from kltune.run.recorder import Clock, Report
from kltune.run.session import Run
from kltune.train.alarms import watch_over
from kltune.train.batch import (
    UNMEASURED,
    Batch,
    batch_metrics,
    response_kl,
    sample_rows,
    standardize,
)
from kltune.train.budget import ROLLBACK_RAISE, kl_text, priced
from kltune.train.evaluation import HeldOut, evaluate, load_held_out
from kltune.train.finish import finish, stop
from kltune.train.learner import BudgetRecipe, Job, Learner, about


def load_data(recipe: BudgetRecipe, policy: Policy, run: Run) -> tuple[list[Prompt], HeldOut]:
    """Training prompts, those of the pairs where there are no others, and what evaluations are made on.

    Raises:
        RecipeError: a cap could never be proven on so few prompts.
    """
    data = recipe.data
    limit = policy.prompt_limit(data.max_prompt_tokens, recipe.sampling.max_new_tokens)
    source = data.prompts or data.pairs
    prompts, counts = load_prompts(source, policy.tokenizer, RowRules.of(data, policy.tokenizer.eos_token_id, limit))
    prompts = prompts if data.prompts else distinct_prompts(prompts)
    note = counts_line(source, counts)
    held_out = load_held_out(
        recipe.eval, data, policy, prompts, prompt_limit=limit, folder=recipe.folder, note=note, answers=run.answers,
        ref_logprobs=run.ref_logprobs,
    )
    measured = min(len(held_out.prompts), held_out.responses)
    if recipe.kl.hard_cap is not None and measured < 2:
        raise RecipeError(
            "kl.hard_cap: final would be measured on one prompt, which gives no error and so no proof; wanted at least "
            "2 rows in eval.prompts (or data.prompts, data.pairs) and eval.responses of at least 2."
        )
    return prompts, held_out


def add_values(recipe: BudgetRecipe, policy: Policy, section: PPOSection | TRPOSection) -> Optimizer | None:
    """Give the policy the value function that a stage's section asks for, and an optimizer of its own; None without."""
    if section.baseline != "value":
        return None
    policy.add_value_function(recipe.lora if section.value_function == "lora" else None)
    return make_optimizer(policy.value_parameters(), recipe.optim, "value function")


def begin(recipe: BudgetRecipe, learner: Learner, prompts: list[Prompt], run: Run) -> None:
    """Set a learner where the run starts: checked and fresh, or as a checkpoint left it."""
    if learner.scorer is not None:
        run.record(rewards=learner.scorer.identity)
    if learner.judge is not None:
        run.record(rewards=[{"name": learner.judge.name, "kind": "judge", **learner.judge.identity}])
    if recipe.eval.stop_at_gold_peak:
        learner.peak = learner.policy_copied()
    if recipe.kl.hard_cap is not None:
        learner.guard(recipe.kl.hard_cap, recipe.kl.unit)
    if run.resume_from is not None:
        learner.restore(run.resume_from)
        return
    check_fresh_policy(learner.policy, prompts)
    if learner.scorer is not None and learner.scorer.wants_reference_samples:
        rng = run.rng("reference", 0)
        learner.scorer = standardize(
            learner.scorer, learner.policy, prompts, recipe.sampling, seed=recipe.run.seed, rng=rng
        )


def make_job(
    recipe: BudgetRecipe, run: Run, prompts: list[Prompt], held_out: HeldOut, steps: int, baseline: str | None = None
) -> Job:
    """The job of a run, whose report waits to be opened."""
    target = recipe.kl.target if recipe.kl.control == "target" else None
    report = Report(
        run.folder, recipe.stage, steps, target=target, start_step=run.start_step, unit=recipe.kl.unit,
        loggers=recipe.run.loggers,
    )
    return Job(recipe, run, report, prompts, held_out, steps, baseline)


def take_steps(
    job: Job, learner: Learner, take_step: Callable[[Job, Learner, int], None], notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Take the steps that are not done yet, and finish.

    Args:
        job, learner: of the run.
        take_step: the stage's own.
        notes: what the stage has to say before the first of them.

    Returns:
        The object of ``result.json``.
    """
    notes = [learner.policy.fingerprint.describe(), *notes, *job.held_out.notes]
    notes += () if learner.scorer is None else learner.scorer.notes
    notes += () if learner.judge is None else [learner.judge.note]
    with job.report:
        for line in dict.fromkeys(notes):  # one file may serve two purposes
            job.report.say(line)
        step = job.run.start_step
        while step < job.steps and learner.stopped_early is None:
            step += 1
            with whole_step(job, learner, step):
                take_step(job, learner, step)
        with whole_step(job, learner, step + 1):
            return finish(job, learner, step)


@contextlib.contextmanager
def whole_step(job: Job, learner: Learner, step: int) -> Iterator[None]:
    """A step that an AI judge cuts short, evaluation included, leaves everything as it was before it, and saved.

    The end of a run counts as one more step. Resumed, the run takes the step again: the same responses, of which the
    judge is asked what it did not answer.

    Raises:
        JudgeError, ScorerError: the judge's, with what was saved.
    """
    judges = judges_of(job, learner)
    before = learner.kept() if judges else None
    try:
        yield
    except (JudgeError, ScorerError) as error:
        if before is None:
            raise
        learner.go_back(before)
        newest = latest_checkpoint(job.run.folder)
        if step > 1 and (newest is None or saved_step(newest) < step - 1):
            save(job, learner, step - 1, None)
        goes_on = f"after step {step - 1}" if step > 1 else "from the start, with the answers that were given"
        raise type(error)(f"{error} Nothing is lost: --resume goes on {goes_on}.") from error


def judges_of(job: Job, learner: Learner) -> tuple[Judge, ...]:
    """The AI judges that a step may ask."""
    scorers = [scorer for scorer in (learner.scorer, job.held_out.gold) if scorer is not None]
    comparing = () if learner.judge is None else (learner.judge,)
    return (*comparing, *(judge for scorer in scorers for judge in scorer.judges))


def save(job: Job, learner: Learner, step: int, kl: dict[str, Any] | None) -> None:
    """Save a checkpoint of after a step, its KL as ``asdict`` of a KLSummary where it is known."""
    save_checkpoint(
        job.run.folder, step, learner.policy.save, info=about(job.recipe, learner.policy, kl),
        tensors=learner.tensors(), state=learner.state(), keep=job.recipe.run.keep,
    )


def reprice(job: Job, learner: Learner, batch: Batch) -> float:
    """The price of a nat for this batch, once the controller has seen it; score per nat."""
    learner.controller = priced(
        learner.controller, job.recipe.kl, batch.rollout, batch.distance.nats_per_response, batch.spread
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
    found = f"KL to the reference is {kl_text(batch.distance, job)}, beyond kl.hard_cap, {learner.cap.limit:g}"
    if job.recipe.kl.on_cap == "stop":
        job.report.step(step, batch_metrics(batch.rollout, batch.scores, batch.distance, learner.controller.beta))
        stop(job, learner, f"step {step}: {found}")
    learner.controller = learner.controller.raised(ROLLBACK_RAISE, least=_price_at_cap(learner, batch))
    job.report.warn(
        f"step {step}: {found}. Went back to the policy after step {safe.step} ({safe.kl['nats_per_response']:.3g} "
        f"nats per response), and a nat now costs {learner.controller.beta:.3g}."
    )
    return True


def close_step(
    job: Job,
    learner: Learner,
    step: int,
    batch: Batch | None,
    update: dict[str, float | None],
    clock: Clock,
    *,
    went_back: bool = False,
    examples: int | None = None,
) -> None:
    """Record a step; evaluate, save and stop where it is time.

    Args:
        job, learner: of the run.
        step: counted from 1.
        batch: its responses; None where none were sampled, and so no KL measured.
        update: what the stage has to say of its update.
        clock: of the step.
        went_back: the policy is another now than the one that sampled.
        examples: rows of data learnt from, to count a step's speed by; None counts responses.

    Raises:
        Interrupted: a signal came, and everything is saved.
    """
    recipe = job.recipe
    metrics = UNMEASURED | {"kl/beta": learner.controller.beta} if batch is None else batch_metrics(
        batch.rollout, batch.scores, batch.distance, learner.controller.beta
    )
    metrics |= update
    if learner.cap is not None:
        metrics |= {"kl/cap_rollbacks": learner.cap.rollbacks, "kl/cap_refusals": learner.cap.refusals}
    # After the last step `finish` evaluates what is final, and where that may be gold's peak it has to know before.
    last = step == job.steps
    evaluates = recipe.eval.stop_at_gold_peak if last else step % recipe.run.eval_every == 0
    if evaluates:
        found, _ = evaluate(learner.policy, job.held_out, recipe.sampling, learner.scorer, seed=recipe.run.seed)
        watch_over(job, learner, step, found)
        metrics |= found
        clock.lap("eval")
    for judge in judges_of(job, learner):
        metrics |= judge.reported()
    counted = (len(batch.rollout.lengths),) if examples is None else (examples, "examples")
    job.report.step(step, metrics | clock.metrics(*counted))
    if batch is not None and (evaluates or step in (1, job.steps)):
        kl = response_kl(batch.rollout)
        job.report.samples(step, sample_rows(batch.rollout, batch.scores, kl, learner.policy.tokenizer))
    ends = last or learner.stopped_early is not None
    if step % recipe.run.save_every == 0 or ends or job.run.stop_signal:
        # A batch measures the policy before the step's update; one that went back was measured when it was remembered.
        kl = learner.cap.safe.kl if went_back else None if batch is None else asdict(batch.distance)
        save(job, learner, step, kl)
    if job.run.stop_signal and not ends:
        raise Interrupted(
            f"stopped after step {step} of {job.steps}; --resume goes on from there.", job.run.stop_signal
        )


def _price_at_cap(learner: Learner, batch: Batch) -> float:
    """What would hold an ideal policy at the cap, score per nat: a price near 0 would take many doublings."""
    per_token = learner.cap.unit == "nats_per_token"
    limit = learner.cap.limit * (batch.rollout.lengths.float().mean().item() if per_token else 1.0)
    return feed_forward(batch.spread, limit)
