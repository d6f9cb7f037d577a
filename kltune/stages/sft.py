"""Supervised fine-tuning: the reference of the stages that follow.

    minimise  −Σ log π(token)  over the scored tokens, per token

on responses only where there is a prompt. With ``lora`` the base stays frozen under an adapter; with ``lora: null``
every weight is trained and a frozen copy is kept. Either way the KL from the model it started from is measured, like
everywhere else: a supervised stage moves a model too.
"""

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from kltune.core.hacking.detector import Watch
from kltune.errors import Interrupted
from kltune.lm.data.examples import Example, counts_line, load_examples, shuffled_positions
from kltune.lm.measure.measurement import kl_result
from kltune.lm.model.likelihood import example_batch, text_rules
from kltune.lm.model.opening import check_frozen
from kltune.lm.model.policy import Policy
from kltune.recipe import SFTRecipe
from kltune.report.pages import write_page
from kltune.run.checkpoint import measure_settings, read_state, save_checkpoint, save_final
from kltune.run.optimizer import (
    guarded_step,
    learning_rate_share,
    load_optimizer,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
    total_steps,
)
from kltune.run.recorder import Clock, Report
from kltune.run.session import Run, run_stage
from kltune.train.alarms import looks, observe
from kltune.train.evaluation import HeldOut, before_and_after, evaluate, gold_result, load_held_out

NEARER = "Train for fewer steps, or with a lower optim.lr"


@dataclass(frozen=True)
class Job:
    """What stays the same from step to step."""

    recipe: SFTRecipe
    run: Run
    report: Report
    examples: list[Example]
    held_out: HeldOut
    steps: int


def run_sft(recipe: SFTRecipe, resume: bool) -> dict[str, Any]:
    """``kltune sft``: imitate texts, save the adapter (or the model), and measure what was saved.

    Arguments and result are those of ``run_stage``.
    """
    return run_stage(recipe, resume, train)


def train(recipe: SFTRecipe, policy: Policy, run: Run) -> dict[str, Any]:
    """Load what the recipe names, take the steps that are not done yet, and finish."""
    examples, held_out = load_data(recipe, policy, run)
    optimizer = make_optimizer(policy.trainable_parameters(), recipe.optim, "model" if policy.full else "adapter")
    watch = Watch()
    if run.resume_from is not None:
        policy.load_trained(run.resume_from)
        tensors, state = read_state(run.resume_from)
        load_optimizer(optimizer, policy.trainable_parameters(), tensors["optimizer"])
        watch = Watch.of(state["watch"])
    steps = total_steps(recipe.run, len(examples), recipe.optim.batch_size)
    with Report(run.folder, "sft", steps, start_step=run.start_step, loggers=recipe.run.loggers) as report:
        for note in (policy.fingerprint.describe(), *held_out.notes):
            report.say(note)
        job = Job(recipe, run, report, examples, held_out, steps)
        for step in range(run.start_step + 1, steps + 1):
            watch = take_step(job, policy, optimizer, step, watch)
        return finish(job, policy, watch)


def load_data(recipe: SFTRecipe, policy: Policy, run: Run) -> tuple[list[Example], HeldOut]:
    """Training texts, and what evaluations are made on."""
    data, rules = recipe.data, text_rules(policy, recipe.data)
    examples, counts = load_examples(data.texts, policy.tokenizer, rules)
    limit, note = rules.max_prompt_tokens, counts_line(data.texts, counts)
    held_out = load_held_out(
        recipe.eval, data, policy, [], prompt_limit=limit, folder=recipe.folder, note=note, answers=run.answers
    )
    return examples, held_out


def take_step(job: Job, policy: Policy, optimizer: Optimizer, step: int, watch: Watch) -> Watch:
    """One batch of texts, one update, one row of the report; what evaluations have said by then."""
    recipe, run, size = job.recipe, job.run, job.recipe.optim.batch_size
    clock = Clock()
    positions = shuffled_positions(len(job.examples), (step - 1) * size, size, recipe.run.seed)
    lr = learning_rate_share(recipe.optim, step, job.steps) * recipe.optim.lr
    set_learning_rate(optimizer, lr)
    torch.manual_seed(int(run.rng("dropout", step).integers(2**62)))  # keyed by the step, so that resuming is exact
    metrics = imitate(recipe, policy, optimizer, [job.examples[i] for i in positions]) | {"optim/lr": lr}
    clock.lap("update")

    if step % recipe.run.eval_every == 0 and step < job.steps:  # after the last step, `finish` evaluates
        found, _ = evaluate(policy, job.held_out, recipe.sampling, None, seed=recipe.run.seed)
        watch, _ = observe(watch, step, found, looks(recipe.run, job.steps), job.report.warn, NEARER)
        metrics |= found
        clock.lap("eval")
    job.report.step(step, metrics | clock.metrics(size, "examples"))
    if step % recipe.run.save_every == 0 or step == job.steps or run.stop_signal:
        tensors = {"optimizer": optimizer_tensors(optimizer, policy.trainable_parameters())}
        info = about(recipe, policy, None)
        state = {"watch": asdict(watch)}
        save_checkpoint(run.folder, step, policy.save, info=info, tensors=tensors, state=state, keep=recipe.run.keep)
    if run.stop_signal and step < job.steps:
        raise Interrupted(f"stopped after step {step} of {job.steps}; --resume goes on from there.", run.stop_signal)
    return watch


def imitate(recipe: SFTRecipe, policy: Policy, optimizer: Optimizer, batch: list[Example]) -> dict[str, float | None]:
    """One step on a batch, in micro-batches whose gradients add up to that of the mean over all its scored tokens."""
    tokens = sum(sum(example.scored) for example in batch)
    parts = policy.network.micro_batches([len(row.ids) for row in batch], recipe.optim.micro_batch_size)
    loss = 0.0
    with policy.dropout() if recipe.lora is not None and recipe.lora.dropout > 0.0 else nullcontext():
        for places in parts:
            ids, scored = example_batch([batch[place] for place in places], policy)
            part = -policy.logprobs(ids, scored).sum() / tokens
            part.backward()
            loss += part.item()
    norm = guarded_step(optimizer, recipe.optim.max_grad_norm, "policy")
    return {"loss/mean": loss, "sft/grad_norm": norm, "sft/tokens": float(tokens)}


def about(recipe: SFTRecipe, policy: Policy, kl: dict[str, Any] | None) -> dict[str, Any]:
    """What kltune.json says of a checkpoint: what it started from, its KL, and how that is measured again."""
    sampling = recipe.sampling
    settings = measure_settings(recipe.eval.prompts, recipe.data, sampling.max_new_tokens, sampling.temperature)
    kind = "full" if policy.full else "adapter"
    return {"stage": "sft", "kind": kind, "reference": policy.fingerprint.as_dict(), "kl": kl, "measure": settings}


def finish(job: Job, policy: Policy, watch: Watch) -> dict[str, Any]:
    """Prove the start is untouched, save ``final``, measure it afresh, and write the result."""
    recipe = job.recipe
    check_frozen(policy)
    metrics, measured = evaluate(policy, job.held_out, recipe.sampling, None, seed=recipe.run.seed)
    observe(watch, job.steps, metrics, looks(recipe.run, job.steps), job.report.warn, NEARER)
    kl = None if measured is None else kl_result(measured)
    final = save_final(job.run.folder, policy.save, info=about(recipe, policy, kl))
    shown = before_and_after(policy, job.held_out.prompts, recipe.sampling, None, seed=recipe.run.seed)
    job.report.samples(job.steps, shown)
    result = job.run.finish({
        "schema": "kltune.result/1",
        "status": "finished",
        "stage": "sft",
        "output": str(job.run.folder),
        "final": str(final),
        "steps": job.steps,
        "kl": kl,
        "target": None,
        "score": None,
        **gold_result(metrics),
        "perplexity": metrics.get("eval/perplexity"),
        "reference": policy.fingerprint.as_dict(),
        "eval": metrics,
        "seconds": job.run.seconds(),
    })
    write_page(job.run.folder)
    return result
