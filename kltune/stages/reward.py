"""A reward model from judgements: a score for responses, greater where people (or whoever judged) prefer them.

    minimise  −log σ(r(chosen) − r(rejected) − margin)   over pairs, or the logistic loss over labelled responses

r is read off the last token of a response through an adapter and a small head, on weights that stay frozen: trained on
the policy's own reference, it later scores the policy without a second model in memory. Source: Bradley and Terry 1952;
Ouyang et al. 2022, arXiv 2203.02155.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kltune.core.objectives.bradley_terry import bradley_terry_loss, centring_penalty, label_loss, win_share
from kltune.errors import RecipeError
from kltune.lm.data.examples import counts_line, seen_note, shuffled_positions
from kltune.lm.data.pairs import Comparison, Pair, answers, hold_out, load_comparisons, reads_text, sequences, sides
from kltune.lm.measure.likelihood import text_rules
from kltune.lm.model.opening import check_frozen
from kltune.lm.model.policy import Policy
from kltune.lm.rewards.reward_evaluation import HeldOutRows, reward_result, sample_pairs
from kltune.lm.rewards.reward_model import RewardModel
from kltune.recipe import RewardRecipe
from kltune.run.optimizer import (
    accumulate,
    guarded_step,
    learning_rate_share,
    make_optimizer,
    set_learning_rate,
    total_steps,
)
from kltune.run.recorder import Clock
from kltune.run.screen import doing
from kltune.run.session import Run, run_stage
from kltune.train.evaluation.finish import conclude
from kltune.train.learner import Job, Learner, make_job
from kltune.train.loop import Taken, take_steps

# Training rows at most, over which the saved scores have mean 0: over all it is 0 to a tenth of their spread then, and
# no policy hears of it. Of a 135M model 256 rows took a sixth as long as the 80 steps before, 1,400 longer than these.
CENTRED_ON = 64


def run_reward(recipe: RewardRecipe, resume: bool) -> dict[str, Any]:
    """``kltune reward``: fit a reward model to pairs or labels, save it, and measure it on rows held out.

    Arguments and result are those of ``run_stage``.
    """
    return run_stage(recipe, resume, train)


def train(recipe: RewardRecipe, policy: Policy, run: Run) -> dict[str, Any]:
    """Load what the recipe names, take the steps that are not done yet, and finish."""
    rows, held_out = load_data(recipe, policy)
    learner = make_learner(recipe, policy)
    steps = total_steps(recipe.run, len(rows), recipe.optim.batch_size)
    encoder = replace(text_rules(policy, recipe.data), template="none", others=()).encoder(policy.tokenizer)
    about = partial(about_model, reads_text(rows, encoder), bool(rows[0].prompt.messages))
    job = make_job(recipe, run, held_out, steps, about=about)
    return take_steps(job, learner, partial(take_step, rows=rows), finish=partial(finish, rows=rows))


def load_data(recipe: RewardRecipe, policy: Policy) -> tuple[list[Comparison], HeldOutRows]:
    """Rows to train on, and rows held out.

    Raises:
        RecipeError: one file has pairs and the other labelled responses.
    """
    data, tokenizer = recipe.data, policy.tokenizer
    rules = text_rules(policy, data)
    rows, counts = load_comparisons(data.pairs, tokenizer, rules)
    notes = [counts_line(data.pairs, counts)]
    if recipe.eval.pairs is None:
        rows, held_out = hold_out(rows, recipe.eval.pairs_share, recipe.run.seed, data.pairs)
        return rows, HeldOutRows(held_out, (*notes, f"{len(held_out)} of them held out, prompt by prompt"))
    held_out, counts = load_comparisons(recipe.eval.pairs, tokenizer, rules)
    if type(held_out[0]) is not type(rows[0]):
        raise RecipeError(
            f"eval.pairs: {recipe.eval.pairs} and {data.pairs} are not of one kind; wanted pairs in both, or labelled "
            "responses in both."
        )
    seen = seen_note(recipe.eval.pairs, "rows", sides(held_out), trained := {*sides(rows)})
    notes += [counts_line(recipe.eval.pairs, counts), *filter(None, [seen])]
    return rows, HeldOutRows(held_out, notes, apart=not trained.issuperset(sides(held_out)))


def make_learner(recipe: RewardRecipe, policy: Policy) -> Learner:
    """The reward model and its optimizer.

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
    return Learner(model, {"reward": make_optimizer(model.trainable_parameters(), recipe.optim, "reward model")})


def take_step(job: Job, learner: Learner, step: int, rows: Sequence[Comparison]) -> Taken:
    """One batch of rows, one update."""
    recipe, size = job.recipe, job.recipe.optim.batch_size
    clock = Clock()
    positions = shuffled_positions(len(rows), (step - 1) * size, size, recipe.run.seed)
    lr = learning_rate_share(recipe.optim, step, job.steps) * recipe.optim.lr
    set_learning_rate(learner.optimizers["reward"], lr)
    seeds = job.run.rng("dropout", step).integers(2**62, size=size).tolist()     # keyed by the step: resuming is exact
    update = learner.update(partial(learn, recipe, learner, [rows[i] for i in positions], seeds)) | {"optim/lr": lr}
    clock.lap("update")
    return Taken(update, clock, examples=size, tokens=sum(map(len, sequences([rows[i] for i in positions]))))


def learn(
    recipe: RewardRecipe, learner: Learner, batch: Sequence[Comparison], seeds: Sequence[int]
) -> dict[str, float | None]:
    """One step on a batch, in micro-batches whose gradients add up to that of the mean over its rows.

    seeds: of the dropout in each micro-batch, as many as rows.
    """
    model: RewardModel = learner.model
    lengths = [max(map(len, sequences([row]))) for row in batch]
    group = len(answers(batch[0]))
    parts = model.policy.network.micro_batches(lengths, recipe.optim.micro_batch_size, group=group)

    def one(place: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seeds[place])
        part = [batch[row] for row in parts[place]]
        found = model.scores(*model.batch(sequences(part)))
        loss, penalty = objective(recipe, part, found)
        return (loss.sum() + penalty.sum()) / len(batch), loss, found.reshape(-1, len(part))       # [sides, rows]

    with model.policy.dropout() if recipe.lora.dropout > 0.0 else nullcontext():
        trained = model.trainable_parameters().values()
        told = accumulate(model.policy.network, trained, range(len(parts)), one, "reward model")
    _, losses, scores = zip(*told, strict=True)
    norm = guarded_step(learner.optimizers["reward"], recipe.optim.max_grad_norm, "reward model")
    whole = torch.cat(scores, dim=1)
    metrics = {"loss/mean": torch.cat(losses).mean().item(), "score/mean": whole.mean().item()}
    if len(whole) == 2:
        gaps = whole[0] - whole[1]
        metrics |= {"accuracy/mean": win_share(gaps), "reward/gap": gaps.mean().item()}
    else:
        wanted = torch.tensor([batch[place].wanted for places in parts for place in places])
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


def about_model(reads_text: bool, templated: bool, model: RewardModel, kl: None, **more: Any) -> dict[str, Any]:
    """What kltune.json says of a checkpoint: its frozen base, what it reads, and a score to try it on.

    reads_text: text alone gives the rows' tokens again. templated: a chat template wrote the rows. kl: a reward model
    says nothing, and so has none.
    """
    reward = {
        "score_at": "the last token of the response: its end token, or the last one of a response that was cut",
        "reads_text": reads_text,
        "templated": templated,
        "probe": model.probe(),
        **more,
    }
    reference = model.policy.fingerprint.as_dict()
    return {"stage": "reward", "kind": "reward", "reference": reference, "kl": kl, "reward": reward}


def finish(job: Job, learner: Learner, steps: int, rows: Sequence[Comparison]) -> dict[str, Any]:
    """Prove the base is untouched, centre the model, measure it, save it as ``final``, and write the result.

    What was learnt of responses one by one is not centred: its score is the log-odds of being wanted.
    """
    model: RewardModel = learner.model
    check_frozen(model.policy)
    shifted = None
    if isinstance(rows[0], Pair):
        seen = shuffled_positions(len(rows), 0, min(len(rows), CENTRED_ON), job.recipe.run.seed)
        doing(f"centring the scores on {len(seen)} training rows")
        shifted = {"rows": len(seen), "shift": -model.centre(sequences([rows[i] for i in seen]))}
    metrics, evaluation = job.measured(model, None)
    samples = [] if evaluation is None else sample_pairs(evaluation, job.held_out.rows)
    result = reward_result(evaluation)
    told = {"kl": None, "target": None, "score": None, **result, "held_out": job.held_out.apart, "centred": shifted}
    more = {name: told[name] for name in ("centred", "accuracy", "accuracy_ci95")}
    job = replace(job, about=partial(job.about, **more))
    return conclude(job, learner, steps, metrics, samples=samples, told=told)
