"""What PPO and TRPO do alike around their own updates: the data, the batch of a step, the cap, recording and saving."""

from dataclasses import asdict, replace

from kltune.core.controllers import feed_forward
from kltune.core.gate import standing
from kltune.errors import Interrupted, RecipeError
from kltune.lm.data import Prompt, load_prompts
from kltune.lm.evaluate import HeldOut, described, evaluate, load_held_out
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
from kltune.lm.policy import Policy
from kltune.lm.selftest import check_fresh_policy
from kltune.run.checkpoint import save_checkpoint
from kltune.run.clock import Clock
from kltune.run.finishing import stop
from kltune.run.job import Batch, Job, RLRecipe, about, kl_text
from kltune.run.learner import Learner
from kltune.run.session import Run

ROLLBACK_RAISE = 2.0  # of the price, when the policy was found beyond the cap (MATH 3.5)
REFUSAL_RAISE = 1.1  # of the price, when a line search met the cap: at no loss, and again at the next step


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
    found = f"KL to the reference is {kl_text(batch.distance, job)}, beyond kl.hard_cap, {learner.cap.limit:g}"
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


def _price_at_cap(job: Job, learner: Learner, batch: Batch) -> float:
    """What would hold an ideal policy at the cap, score per nat: a price near 0 would take many doublings."""
    per_token = learner.cap.unit == "nats_per_token"
    limit = learner.cap.limit * (batch.rollout.lengths.float().mean().item() if per_token else 1.0)
    return feed_forward(score_spread(batch.scores, **job.grouping), limit)
