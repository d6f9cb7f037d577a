"""A reward model from judgements: a score for responses, greater where people (or whoever judged) prefer them.

    minimise  −log σ(r(chosen) − r(rejected) − margin)   over pairs, or the logistic loss over labelled responses

r is read off the last token of a response through an adapter and a small head, on weights that stay frozen: trained on
the policy's own reference, it later scores the policy without a second model in memory. Source: Bradley and Terry 1952;
Ouyang et al. 2022, arXiv 2203.02155.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kltune.core.objectives.bradley_terry import bradley_terry_loss, centring_penalty, label_loss, win_share
from kltune.errors import Interrupted, RecipeError
from kltune.lm.data.examples import counts_line, shuffled_positions
from kltune.lm.data.pairs import Comparison, Pair, answers, hold_out, load_comparisons, reads_text, sequences
from kltune.lm.model.likelihood import text_rules
from kltune.lm.model.opening import check_frozen
from kltune.lm.model.policy import Policy
from kltune.lm.rewards.reward_evaluation import judge, reward_result, sample_pairs
from kltune.lm.rewards.reward_model import RewardModel
from kltune.recipe import RewardRecipe
from kltune.report.pages import write_page
from kltune.run.checkpoint import read_state, save_checkpoint, save_final
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

CENTRED_ON = 4096       # training rows at most, over which the saved scores have mean 0


@dataclass(frozen=True)
class Job:
    """What stays the same from step to step. reads_text: text alone gives the rows' tokens again."""

    recipe: RewardRecipe
    run: Run
    report: Report
    rows: list[Comparison]
    held_out: list[Comparison]
    reads_text: bool
    steps: int


def run_reward(recipe: RewardRecipe, resume: bool) -> dict[str, Any]:
    """``kltune reward``: fit a reward model to pairs or labels, save it, and measure it on rows held out.

    Arguments and result are those of ``run_stage``.
    """
    return run_stage(recipe, resume, train)


def train(recipe: RewardRecipe, policy: Policy, run: Run) -> dict[str, Any]:
    """Load what the recipe names, take the steps that are not done yet, and finish."""
    rows, held_out, notes = load_data(recipe, policy)
    model, optimizer = make_model(recipe, policy, run)
    steps = total_steps(recipe.run, len(rows), recipe.optim.batch_size)
    with Report(run.folder, "reward", steps, start_step=run.start_step, loggers=recipe.run.loggers) as report:
        for note in (policy.fingerprint.describe(), *notes):
            report.say(note)
        job = Job(recipe, run, report, rows, held_out, reads_text(rows, policy.tokenizer), steps)
        for step in range(run.start_step + 1, steps + 1):
            take_step(job, model, optimizer, step)
        return finish(job, model)


def load_data(recipe: RewardRecipe, policy: Policy) -> tuple[list[Comparison], list[Comparison], list[str]]:
    """Rows to train on, rows held out, and a line on each file that was read.

    Raises:
        RecipeError: one file has pairs and the other labelled responses.
    """
    data, tokenizer = recipe.data, policy.tokenizer
    rules = text_rules(policy, data)
    rows, counts = load_comparisons(data.pairs, tokenizer, rules)
    notes = [counts_line(data.pairs, counts)]
    if recipe.eval.pairs is None:
        rows, held_out = hold_out(rows, recipe.eval.pairs_share, recipe.run.seed, data.pairs)
        return rows, held_out, [*notes, f"{len(held_out)} of them held out, prompt by prompt"]
    held_out, counts = load_comparisons(recipe.eval.pairs, tokenizer, rules)
    if type(held_out[0]) is not type(rows[0]):
        raise RecipeError(
            f"eval.pairs: {recipe.eval.pairs} and {data.pairs} are not of one kind; wanted pairs in both, or labelled "
            "responses in both."
        )
    return rows, held_out, [*notes, counts_line(recipe.eval.pairs, counts)]


def make_model(recipe: RewardRecipe, policy: Policy, run: Run) -> tuple[RewardModel, Optimizer]:
    """The reward model and its optimizer, checked; fresh, or restored from a checkpoint.

    Raises:
        RecipeError: a layer that the model does not read was to be trained.
    """
    head = policy.network.head
    if head is not None and any(tensor.requires_grad for tensor in head.parameters()):
        raise RecipeError(
            "lora.targets: found the layer that makes logits of hidden states; a reward model reads the hidden states "
            "themselves, so nothing would train it. Name other layers, or write all-linear."
        )
    model = RewardModel(policy)
    optimizer = make_optimizer(model.parameters(), recipe.optim, "reward model")
    if run.resume_from is not None:
        policy.load_adapter(run.resume_from)
        model.load_head(run.resume_from)
        load_optimizer(optimizer, model.parameters(), read_state(run.resume_from)[0]["optimizer"])
    return model, optimizer


def take_step(job: Job, model: RewardModel, optimizer: Optimizer, step: int) -> None:
    """One batch of rows, one update, one row of the report."""
    recipe, run, size = job.recipe, job.run, job.recipe.optim.batch_size
    clock = Clock()
    positions = shuffled_positions(len(job.rows), (step - 1) * size, size, recipe.run.seed)
    lr = learning_rate_share(recipe.optim, step, job.steps) * recipe.optim.lr
    set_learning_rate(optimizer, lr)
    torch.manual_seed(int(run.rng("dropout", step).integers(2**62)))  # keyed by the step, so that resuming is exact
    metrics = learn(recipe, model, optimizer, [job.rows[i] for i in positions]) | {"optim/lr": lr}
    clock.lap("update")

    if job.held_out and step % recipe.run.eval_every == 0 and step < job.steps:  # `finish` evaluates after the last
        metrics |= judge(model, job.held_out).metrics()
        clock.lap("eval")
    job.report.step(step, metrics | clock.metrics(size, "examples"))
    if step % recipe.run.save_every == 0 or step == job.steps or run.stop_signal:
        tensors = {"optimizer": optimizer_tensors(optimizer, model.parameters())}
        info = about(job, model)
        save_checkpoint(run.folder, step, model.save, info=info, tensors=tensors, state={}, keep=recipe.run.keep)
    if run.stop_signal and step < job.steps:
        raise Interrupted(f"stopped after step {step} of {job.steps}; --resume goes on from there.", run.stop_signal)


def learn(
    recipe: RewardRecipe, model: RewardModel, optimizer: Optimizer, batch: Sequence[Comparison]
) -> dict[str, float | None]:
    """One step on a batch, in micro-batches whose gradients add up to that of the mean over its rows."""
    lengths = [max(map(len, sequences([row]))) for row in batch]
    group = len(answers(batch[0]))
    parts = model.policy.network.micro_batches(lengths, recipe.optim.micro_batch_size, group=group)
    losses, scores = [], []
    with model.policy.dropout() if recipe.lora.dropout > 0.0 else nullcontext():
        for places in parts:
            part = [batch[place] for place in places]
            found = model.scores(*model.batch(sequences(part)))
            loss, penalty = objective(recipe, part, found)
            ((loss.sum() + penalty.sum()) / len(batch)).backward()
            losses.append(loss.detach())
            scores.append(found.detach().reshape(-1, len(part)))       # [sides, rows]
    norm = guarded_step(optimizer, recipe.optim.max_grad_norm, "reward model")
    whole = torch.cat(scores, dim=1)
    metrics = {"loss/mean": torch.cat(losses).mean().item(), "score/mean": whole.mean().item()}
    if len(whole) == 2:
        gaps = whole[0] - whole[1]
        metrics |= {"accuracy/mean": win_share(gaps), "reward/gap": gaps.mean().item()}
    else:
        wanted = torch.tensor([batch[place].wanted for places in parts for place in places], device=whole.device)
        metrics["accuracy/mean"] = win_share(torch.where(wanted, whole[0], -whole[0]))
    return metrics | {"reward/grad_norm": norm}


def objective(recipe: RewardRecipe, rows: Sequence[Comparison], scores: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each row and what centring adds to it, from the scores of ``sequences``. Each [rows]."""
    section = recipe.bradley_terry
    if not isinstance(rows[0], Pair):
        wanted = torch.tensor([row.wanted for row in rows], device=scores.device)
        return label_loss(scores, wanted, section.label_smoothing), torch.zeros_like(scores)
    chosen, rejected = scores.chunk(2)
    margins = torch.tensor([row.margin for row in rows], device=scores.device)
    loss = bradley_terry_loss(chosen, rejected, margins, section.label_smoothing)
    return loss, section.centring * centring_penalty(chosen, rejected)


def about(job: Job, model: RewardModel, **more: Any) -> dict[str, Any]:
    """What kltune.json says of a checkpoint: its frozen base, what it reads, and a score to try it on."""
    reward = {
        "score_at": "the last token of the response: its end token, or the last one of a response that was cut",
        "reads_text": job.reads_text,
        "probe": model.probe(),
        **more,
    }
    reference = model.policy.fingerprint.as_dict()
    return {"stage": "reward", "kind": "reward", "reference": reference, "kl": None, "reward": reward}


def finish(job: Job, model: RewardModel) -> dict[str, Any]:
    """Prove the base is untouched, measure the model, centre it, save it as ``final``, and write the result."""
    check_frozen(model.policy)
    judged = judge(model, job.held_out) if job.held_out else None
    if judged is not None:
        job.report.samples(job.steps, sample_pairs(judged, job.held_out))
    seen = shuffled_positions(len(job.rows), 0, min(len(job.rows), CENTRED_ON), job.recipe.run.seed)
    shift = model.centre(sequences([job.rows[i] for i in seen]))
    centred = {"rows": len(seen), "shift": -shift}
    measured = reward_result(judged)
    info = about(job, model, centred=centred, accuracy=measured["accuracy"], accuracy_ci95=measured["accuracy_ci95"])
    final = save_final(job.run.folder, model.save, info=info)
    result = job.run.finish({
        "schema": "kltune.result/1",
        "status": "finished",
        "stage": "reward",
        "output": str(job.run.folder),
        "final": str(final),
        "steps": job.steps,
        "kl": None,
        "target": None,
        "score": None,
        **measured,
        "centred": centred,
        "reference": model.policy.fingerprint.as_dict(),
        "eval": {} if judged is None else judged.metrics(),
        "seconds": job.run.seconds(),
    })
    write_page(job.run.folder)
    return result
