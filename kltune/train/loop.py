"""What every trainer does around its own updates: begin, repeat, undo a step cut short, hold the cap, record, save."""

import contextlib
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kltune.core import ranks
from kltune.core.control.controllers import feed_forward
from kltune.errors import (
    Interrupted,
    JudgeError,
    OutOfMemory,
    RecipeError,
    SamplerError,
    ScoreOverflow,
    ScorerError,
    ServerError,
)
from kltune.lm.data.examples import Prompt, counts_line, distinct_prompts, load_prompts
from kltune.lm.machine.device_memory import device_bytes, device_name, held_bytes, peak_bytes, planned_bytes
from kltune.lm.machine.out_of_memory import SAMPLING, phase
from kltune.lm.measure.measurement import Measurement
from kltune.lm.model.opening import check_fresh_policy
from kltune.lm.model.policy import Policy
from kltune.lm.rewards.judge import Judge
from kltune.lm.rewards.scorers import Scorer
from kltune.recipe import PPOSection, TRPOSection
from kltune.run.checkpoint import drop_oldest, latest_checkpoint, refuse_nonfinite, save_checkpoint, saved_step
from kltune.run.files import read_jsonl
from kltune.run.optimizer import learning_rate_share, make_optimizer, most_steps
from kltune.run.recorder import Clock
from kltune.run.screen import doing, number, out_of
from kltune.run.session import Run
from kltune.train.batch import UNMEASURED, Batch, batch_metrics, response_kl, sample_rows, standardize
from kltune.train.evaluation.finish import finish, stop, watch_over
from kltune.train.evaluation.held_out import HeldOut, load_held_out
from kltune.train.learner import ALARMS, SCORER, VALUES, BudgetRecipe, Job, Learner, expect_finite_metrics
from kltune.train.plan import shard_of
from kltune.train.value_function import ValueFunction

FLAT_STEPS = 3      # whose responses all score alike: then something is wrong with the reward
FLAT = 1e-6         # share of their mean by which equal scores may differ in float32


@dataclass(frozen=True)
class Taken:
    """What one turn of a stage's loop has done.

    update: metrics of its update. clock: of the step. batch: the responses it sampled; None where there are none, and
    so no KL. went_back: the policy is another now than the one that sampled them. examples: rows of data learnt from,
    to count a step's speed by; None counts responses. tokens: of these, prompts included; of a batch they are known.
    """

    update: Mapping[str, float | None]
    clock: Clock
    batch: Batch | None = None
    went_back: bool = False
    examples: int | None = None
    tokens: int = 0

    @property
    def counted(self) -> tuple[int, str, int]:
        """What its speed is counted by, as ``Clock.metrics`` takes it: rows, what they are, and tokens."""
        read = self.tokens
        if self.batch is not None:
            starts = self.batch.rollout.scored.int().argmax(dim=1)
            read += int(starts.sum() + self.batch.rollout.lengths.sum())
        if self.examples is not None:
            return self.examples, "examples", read
        return len(self.batch.rollout.lengths), "responses", read


TakeStep = Callable[[Job, Learner, int], Taken]


def load_data(recipe: BudgetRecipe, policy: Policy, run: Run) -> tuple[list[Prompt], HeldOut]:
    """Training prompts, those of the pairs where there are no others, and what evaluations are made on.

    Raises:
        RecipeError: a cap could never be proven on so few prompts.
    """
    data = recipe.data
    limit = policy.prompt_limit(data.max_prompt_tokens, recipe.sampling.max_new_tokens)
    source = data.prompts or data.pairs
    rules = policy.row_rules(data, limit)
    prompts, counts = load_prompts(source, policy.tokenizer, rules)
    prompts = prompts if data.prompts else distinct_prompts(prompts)
    held_out = load_held_out(recipe, policy, run, prompts, rules, counts_line(source, counts))
    measured = min(len(held_out.prompts), held_out.responses)
    if recipe.kl.hard_cap is not None and measured < 2:
        raise RecipeError(
            "kl.hard_cap: final would be measured on one prompt, which gives no error and so no proof; wanted at least "
            "2 rows in eval.prompts (or data.prompts, data.pairs) and eval.responses of at least 2."
        )
    return prompts, held_out


def add_value_function(recipe: BudgetRecipe, section: PPOSection | TRPOSection, learner: Learner) -> None:
    """Give a learner the value function that a stage's section asks for, with an optimizer of its own; or nothing."""
    if section.baseline != "value":
        return
    learner.policy.add_value_function(*section.value_adapter(recipe.lora))
    learner.parts[VALUES] = ValueFunction(learner.policy)
    learner.optimizers[VALUES] = make_optimizer(learner.policy.value_parameters(), recipe.optim, "value function")


def begin(job: Job, learner: Learner) -> None:
    """Set a learner where the run starts: checked and fresh, or as a checkpoint left it."""
    recipe, run = job.recipe, job.run
    if job.server is not None:
        job.server.greet(learner.policy, job.prompts)
    if learner.scorer is not None:
        run.record(rewards=learner.scorer.identity)
    if job.pair_judge is not None:
        run.record(rewards=[{"name": job.pair_judge.name, "kind": "judge", **job.pair_judge.identity}])
    if learner.alarms is not None and recipe.eval.stop_at_gold_peak:
        learner.parts[ALARMS] = replace(learner.alarms, peak=learner.model_copied())
    if learner.budget is not None:
        learner.budget = learner.budget.guarded(learner.copied())
    if run.resume_from is not None:
        learner.restore(run.resume_from)
        if ranks.is_first():
            drop_oldest(run.resume_from, recipe.run.keep)      # a kill may have come between a save and this
        return
    if job.prompts:
        with phase(SAMPLING, learner.policy.device):
            check_fresh_policy(learner.policy, job.prompts)
    if learner.scorer is not None and learner.scorer.wants_reference_samples:
        learner.parts[SCORER] = standardize(learner.scorer, learner.policy, job)


def take_steps(
    job: Job, learner: Learner, take_step: TakeStep, notes: Sequence[str] = (), finish: Callable[..., Any] = finish
) -> dict[str, Any]:
    """Begin, take the steps that are not done yet, and finish.

    Args:
        job, learner: of the run.
        take_step: the stage's own.
        notes: what the stage has to say before the first of them.
        finish: how it ends.

    Returns:
        The object of ``result.json``.

    Raises:
        Interrupted: a signal came while models were loaded, which may take longer than a step. Others: see the parts.
    """
    doing("looking at the model before the first step")
    begin(job, learner)
    if job.run.stop_signal:
        raise Interrupted(f"before step {job.run.start_step + 1}; --resume begins there.", job.run.stop_signal)
    said = [learner.policy.fingerprint.describe(), planned(job, learner), learner.policy.ends.note]
    notes = [*said, *notes, *job.held_out.notes]
    notes += () if learner.scorer is None else (*learner.scorer.notes, *learner.scorer.examples(job.prompts))
    notes += () if job.pair_judge is None else [job.pair_judge.note]
    notes += (spread_base(job, learner),)
    expect_same_model(learner)
    with job.report, contextlib.nullcontext() if job.server is None else contextlib.closing(job.server):
        for line in dict.fromkeys(filter(None, notes)):  # one file may serve two purposes
            job.report.say(line)
        step = job.run.start_step
        while goes_on(job, learner, step):
            step += 1
            doing(f"step {step}{out_of(step, job.steps)}")
            seed_others(job.run.rng("others", step))
            with ranks.phase(f"updating in step {step}"), whole_step(job, learner, step, evaluates(job, step)):
                close_step(job, learner, step, take_step(job, learner, step))
        seed_others(job.run.rng("others", step + 1))
        with whole_step(job, learner, step + 1, evaluates=True):
            return finish(job, learner, step)


def seed_others(rng: np.random.Generator) -> None:
    """Seed the generators that belong to everyone, as those a reward function draws from, anew at each step.

    A resumed run has then the numbers of the unbroken one, and nothing of them to save.
    """
    number = int(rng.integers(2**32))
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def planned(job: Job, learner: Learner) -> str:
    """What is computed on, in what, with how much memory; one line, put in run.json too."""
    policy = learner.policy
    there, held = device_bytes(policy.device), held_bytes(policy.model)
    ours = planned_bytes(policy.device, job.recipe.run.memory_fraction)
    trained = sum(tensor.numel() for tensor in learner.model.trainable_parameters().values())
    whole = sum(tensor.numel() for tensor in policy.model.parameters())
    facts = {
        "device": str(policy.device), "name": device_name(policy.device), "dtype": str(policy.dtype)[6:],
        "parameters": whole, "trained_parameters": trained, "memory_bytes": there,
        "planned_bytes": int(ours), "held_bytes": held,
    }
    job.run.record(machine=facts)
    chosen = " (model.dtype: auto)" if job.recipe.model.dtype == "auto" and policy.dtype != torch.float32 else ""
    return (f"{facts['name']}, {facts['dtype']}{chosen}: {whole:,} parameters, {trained:,} trained; "
            f"{held / 1e9:.2f} GB for them, {ours / 1e9:.2f} GB planned with of {there / 1e9:.2f}")


def spread_base(job: Job, learner: Learner) -> str | None:
    """Spread the base over the processes as ``run.shard`` has it; a line on that where there is something to say."""
    shard, line = ranks.from_first(lambda: shard_of(job.recipe))
    if shard == "full":
        learner.policy.shard()
    return line


def goes_on(job: Job, learner: Learner, step: int) -> bool:
    """Whether there is a step after this one: the recipe's, or one more until the target has been held.

    It is not where an evaluation has ended the run early, or where the reward pulls no further.
    """
    if learner.alarms is not None and learner.alarms.stopped is not None:
        return False
    if step < job.steps or job.recipe.run.until == "steps":
        return step < job.steps
    return step < most_steps(job.recipe.run, job.steps) and not (learner.budget.holds() or learner.budget.is_spent())


def schedule_share(job: Job, step: int) -> float:
    """Share of the recipe's learning rate at a step; it does not fall in a run that ends when its target is held."""
    optim = job.recipe.optim
    if job.recipe.run.until == "target":
        optim = optim.model_copy(update={"schedule": "constant"})
    return learning_rate_share(optim, step, job.steps)


def step_size(job: Job, learner: Learner, step: int, batch: Batch | None) -> tuple[float, float]:
    """The learning rate of a step, and how far it may move the policy, KL(old ‖ new) in nats per response; ∞: any.

    The schedule shortens the steps of a policy that has come to its target, or near its cap; on the way there they are
    as long as the room allows, however late it is.
    """
    optim, share = job.recipe.optim, schedule_share(job, step)
    room = math.inf if batch is None else learner.budget.room(batch.rollout, batch.kl, share)
    if math.isinf(room):
        return share * optim.lr, room
    most = optim.lr * (share if step <= optim.warmup_steps else 1.0)
    return learner.budget.size.learning_rate(most, room), room


@contextlib.contextmanager
def whole_step(job: Job, learner: Learner, step: int, evaluates: bool) -> Iterator[None]:
    """A step that scoring cuts short, evaluation included, leaves everything as it was before it, and saved.

    The end of a run counts as one more step. Resumed, the run takes the step again: the same responses, of which an AI
    judge is asked what it did not answer.

    Raises:
        JudgeError, ScorerError, ScoreOverflow: a scorer's, with what was saved. OutOfMemory: with the step to go on
            from.
    """
    # Responses are scored before the update that learns from them: only what is scored after it, in an evaluation or
    # where a run may end at its cap, wants a copy of model and optimizer to go back to.
    may_end = learner.budget is not None and learner.budget.cap is not None
    scored_after = (evaluates or may_end) and (learner.scorer is not None or job.held_out.scored)
    before = learner.undo(copied=scored_after)
    try:
        yield
    except OutOfMemory as error:
        newest = ranks.from_first(lambda: _newest_step(job.run.folder))
        way = f"--resume goes on after step {newest}" if newest else "Nothing is saved yet"
        raise OutOfMemory(f"step {step}: {error} {way}.") from error
    except (JudgeError, SamplerError, ScorerError, ScoreOverflow, ServerError) as error:
        learner.go_back(before)
        if step > 1 and ranks.from_first(lambda: _newest_step(job.run.folder)) < step - 1:
            save(job, learner, step - 1, None)
        goes_on = f"after step {step - 1}" if step > 1 else "from the start"
        raise type(error)(f"{error} Nothing is lost: --resume goes on {goes_on}.") from error


def _newest_step(folder: Path) -> int:
    newest = latest_checkpoint(folder)
    return 0 if newest is None else saved_step(newest)


def evaluates(job: Job, step: int) -> bool:
    """Whether a step ends with an evaluation.

    After the last one ``finish`` evaluates what is final, and where that may be gold's peak it has to know before.
    """
    recipe = job.recipe
    last = step == job.steps and recipe.run.until == "steps"
    return recipe.eval.stop_at_gold_peak if last else step % recipe.run.eval_every == 0


def warn_of_flat_scores(job: Job, scorer: Scorer) -> None:
    """Say so, naming the reward, where all responses of each of the first steps scored alike."""
    rows = read_jsonl(job.run.folder / "metrics.jsonl")[:FLAT_STEPS]
    means, spreads = zip(*((row["score/mean"], row["score/sd"]) for row in rows), strict=True)
    if all(sd is not None and sd <= FLAT * max(1.0, abs(mean)) for mean, sd in zip(means, spreads, strict=True)):
        names = " + ".join(source.name for source in scorer.sources)
        when = f"each of the first {len(rows)} steps" if len(rows) > 1 else "the first step"
        job.report.warn(
            f"in {when} all responses score alike (the last {means[-1]:.4g}): reward "
            f"{names} tells them apart by nothing, so that there is nothing to learn. Does it read the responses?"
        )


def judges_of(job: Job, learner: Learner) -> tuple[Judge, ...]:
    """The AI judges that a run may ask, in its evaluations included."""
    scoring = () if learner.scorer is None else learner.scorer.judges
    comparing = () if job.pair_judge is None else (job.pair_judge,)
    return (*comparing, *scoring, *job.held_out.judges)


def save(job: Job, learner: Learner, step: int, kl: dict[str, Any] | None) -> None:
    """Save a checkpoint of after a step, its KL as ``asdict`` of a KLSummary where it is known."""
    with ranks.phase(f"saving step {step}"):
        expect_same_model(learner)
        info = job.about(learner.model, kl)
        learner.policy.network.close()      # in all processes: a state_dict closes the layers of whoever saves

        def write() -> None:
            job.report.keep()
            save_checkpoint(
                job.run.folder, step, learner.model.save, info=info, tensors=learner.tensors(), state=learner.state(),
                keep=job.recipe.run.keep,
            )

        ranks.from_first(write)     # who went on meanwhile might leave, and whoever started both would end this one
        job.run.record(saved_step=step, seconds=job.run.seconds())


def expect_same_model(learner: Learner) -> None:
    """Raise PeerError unless all processes of the run hold the same of what updates write into, to the last bit."""

    def digest() -> str:
        found = hashlib.sha256()
        for group, named in learner.moving().items():
            refuse_nonfinite({f"{group}/{name}": tensor for name, tensor in named.items()})
            for tensor in named.values():
                found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    if ranks.size() > 1:
        ranks.expect_equal("model or optimizer", digest)


def enforce_cap(job: Job, learner: Learner, step: int, batch: Batch, pull: float) -> bool:
    """Hold the batch's policy against the cap: remember it if it is within, go back and raise the price if beyond.

    Beyond is an estimate above the cap; within, the whole 95 % interval below it. What lies between goes on but is
    never gone back to.

    Args:
        job, learner, step: of the run.
        batch: of the step.
        pull: what drives the policy away, as ``Budget.rolled_back`` takes it.

    Returns:
        Whether the policy is another now than the one that sampled the batch.

    Raises:
        DivergedError: beyond, and the recipe says stop; ``final`` is the last state within the cap.
    """
    if learner.budget.cap is None:
        return False
    standing = learner.budget.standing(batch.kl)
    if standing == "within":
        learner.budget = learner.budget.remembered(step - 1, batch.kl, learner.copied())
    if standing != "beyond":
        return False
    last, price = learner.budget.last_within, learner.budget.price
    learner.put_back(last.tensors)
    learner.budget = learner.budget.rolled_back(batch.rollout, pull)
    found = f"KL to the reference is {learner.budget.describe(batch.kl)}, beyond kl.hard_cap, {learner.budget.cap:g}"
    if job.recipe.kl.on_cap == "stop":
        job.report.step(step, batch_metrics(batch, price))
        stop(job, learner, f"step {step}: {found}")
    job.report.warn(
        f"step {step}: {found}. Went back to the policy after step {last.step} ({number(last.kl[job.recipe.kl.unit])} "
        f"{learner.budget.unit_text}), and a nat now costs {learner.budget.price:.3g}."
    )
    return True


def kl_known(learner: Learner, taken: Taken, measured: Any) -> dict[str, Any] | None:
    """The KL that a checkpoint of a step is saved with, of its batch or else of its evaluation; None where neither is.

    A batch measures the policy before the step's update; one that went back was measured when it was remembered.
    """
    if taken.went_back:
        return learner.budget.last_within.kl
    if taken.batch is not None:
        return asdict(taken.batch.kl)
    return asdict(measured.summary()) if isinstance(measured, Measurement) else None


def close_step(job: Job, learner: Learner, step: int, taken: Taken) -> None:
    """Record a step; evaluate, save and stop where it is time.

    Raises:
        Interrupted: a signal came, and everything is saved.
        DivergedError: a metric is not finite; nothing of the step is written.
    """
    recipe, batch, budget, clock = job.recipe, taken.batch, learner.budget, taken.clock
    metrics: dict[str, float | None] = {}
    if batch is not None:
        metrics |= batch_metrics(batch, budget.price)
        if budget.target is not None and job.baseline is not None:      # a price of scores, not of a loss
            metrics["kl/beta_feed_forward"] = feed_forward(batch.spread, budget.aim(batch.rollout))
    elif budget is not None:
        metrics |= UNMEASURED | {"kl/beta": budget.price}
    metrics |= taken.update
    metrics |= {} if budget is None else budget.counts()
    expect_finite_metrics(metrics)
    looks, measured = evaluates(job, step), None
    if looks:
        found, measured = job.measured(learner.model, learner.scorer)
        watch_over(job, learner, step, found)
        metrics |= found
        clock.lap("eval")
    for name, count in (pair for judge in judges_of(job, learner) for pair in judge.reported().items()):
        metrics[name] = count + (metrics.get(name) or 0.0)      # two judges may be called alike
    metrics["memory/peak_gb"] = peak_bytes(learner.policy.device) / 1e9
    job.report.step(step, metrics | clock.metrics(*taken.counted))
    if learner.scorer is not None and step == min(FLAT_STEPS, job.steps) and ranks.is_first():
        warn_of_flat_scores(job, learner.scorer)
    ends = not goes_on(job, learner, step)
    if batch is not None and (looks or ends or step == 1):
        kl = response_kl(batch.rollout)
        job.report.samples(step, sample_rows(batch.rollout, batch.scores, kl, learner.policy.tokenizer))
    stops = job.run.agree_on_stop()
    if step % recipe.run.save_every == 0 or ends or stops:
        save(job, learner, step, kl_known(learner, taken, measured))
    if stops and not ends:
        of = out_of(step, job.steps)
        raise Interrupted(f"after step {step}{of}, which is saved; --resume goes on from there.", stops)
