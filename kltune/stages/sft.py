"""Supervised fine-tuning: the reference of the stages that follow.

    minimise  −Σ log π(token)  over the scored tokens, per token

on responses only where there is a prompt. With ``lora`` the base stays frozen under an adapter; with ``lora: null``
every weight is trained and a frozen copy is kept. Either way the KL from the model it started from is measured, like
everywhere else: a supervised stage moves a model too.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kltune.lm.data.examples import Example, counts_line, load_examples, shuffled_positions
from kltune.lm.measure.likelihood import example_batch, text_rules
from kltune.lm.model.policy import Policy
from kltune.recipe import SFTRecipe
from kltune.run.optimizer import (
    accumulate,
    guarded_step,
    learning_rate_share,
    make_optimizer,
    set_learning_rate,
    total_steps,
)
from kltune.run.recorder import Clock
from kltune.run.session import Run, run_stage
from kltune.train.evaluation.alarms import Alarms
from kltune.train.evaluation.held_out import HeldOut, load_held_out
from kltune.train.learner import ALARMS, Job, Learner, make_job
from kltune.train.loop import Taken, take_steps


def run_sft(recipe: SFTRecipe, resume: bool) -> dict[str, Any]:
    """``kltune sft``: imitate texts, save the adapter (or the model), and measure what was saved.

    Arguments and result are those of ``run_stage``.
    """
    return run_stage(recipe, resume, train)


def train(recipe: SFTRecipe, policy: Policy, run: Run) -> dict[str, Any]:
    """Load what the recipe names, take the steps that are not done yet, and finish."""
    examples, held_out = load_data(recipe, policy, run)
    optimizer = make_optimizer(policy.trainable_parameters(), recipe.optim, "model" if policy.full else "adapter")
    learner = Learner(policy, {"policy": optimizer}, parts={ALARMS: Alarms()})
    job = make_job(recipe, run, held_out, total_steps(recipe.run, len(examples), recipe.optim.batch_size))
    return take_steps(job, learner, partial(take_step, examples=examples))


def load_data(recipe: SFTRecipe, policy: Policy, run: Run) -> tuple[list[Example], HeldOut]:
    """Training texts, and what evaluations are made on."""
    texts, rules = recipe.data.texts, text_rules(policy, recipe.data)
    examples, counts = load_examples(texts, policy.tokenizer, rules)
    return examples, load_held_out(recipe, policy, run, [], rules, counts_line(texts, counts), examples)


def take_step(job: Job, learner: Learner, step: int, examples: list[Example]) -> Taken:
    """One batch of texts, one update."""
    recipe, size = job.recipe, job.recipe.optim.batch_size
    clock = Clock()
    positions = shuffled_positions(len(examples), (step - 1) * size, size, recipe.run.seed)
    lr = learning_rate_share(recipe.optim, step, job.steps) * recipe.optim.lr
    set_learning_rate(learner.optimizers["policy"], lr)
    seeds = job.run.rng("dropout", step).integers(2**62, size=size).tolist()     # keyed by the step: resuming is exact
    batch = [examples[i] for i in positions]
    update = learner.update(partial(imitate, recipe, learner, batch, seeds)) | {"optim/lr": lr}
    clock.lap("update")
    return Taken(update, clock, examples=size, tokens=sum(len(examples[i].ids) for i in positions))


def imitate(
    recipe: SFTRecipe, learner: Learner, batch: list[Example], seeds: Sequence[int]
) -> dict[str, float | None]:
    """One step on a batch, in micro-batches whose gradients add up to that of the mean over all its scored tokens.

    seeds: of the dropout in each micro-batch, as many as rows.
    """
    policy = learner.policy
    tokens = sum(sum(example.scored) for example in batch)
    parts = policy.network.micro_batches([len(row.ids) for row in batch], recipe.optim.micro_batch_size)
    trained = "model" if policy.full else "policy"

    def one(place: int) -> tuple[Tensor]:
        torch.manual_seed(seeds[place])
        ids, scored = example_batch([batch[row] for row in parts[place]], policy)
        return (-policy.logprobs(ids, scored).sum() / tokens,)

    with policy.dropout() if recipe.lora is not None and recipe.lora.dropout > 0.0 else nullcontext():
        told = accumulate(policy.network, policy.trainable_parameters().values(), range(len(parts)), one, trained)
    loss = sum(part.item() for (part,) in told)
    norm = guarded_step(learner.optimizers["policy"], recipe.optim.max_grad_norm, trained)
    return {"loss/mean": loss, "sft/grad_norm": norm, "sft/tokens": float(tokens)}
