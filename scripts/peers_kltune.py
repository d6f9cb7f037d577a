"""kltune's side of ``bench_peers.py``, and what both sides start from.

    python scripts/peers_kltune.py prepare|prepare-gate FOLDER         base weights, initial adapter, token ids in order
    python scripts/peers_kltune.py gate|run FOLDER OUTPUT [--settings SETTINGS] [--set key=value]...

``run`` is the stage itself as ``kltune dpo`` and ``kltune ppo`` run it, with a clock at the ends of its steps, or a
part of what ``kltune eval-kl`` does: sampling, scoring with exact KL, both.
"""

import argparse
import contextlib
import importlib
import io
import json
import shutil
from collections.abc import Iterator
from itertools import cycle, islice, repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from bench import SCORE, ends_for, passes_of
from bench_parts import decoding_floor, random_llama, scoring_floor
from peers_watch import SETTINGS, Watch
from safetensors.torch import save_file

from kltune.core.objectives import preferences as losses
from kltune.lm.data.chat import EndTokens
from kltune.lm.data.examples import Prompt, load_examples, load_prompts, shuffled_positions
from kltune.lm.data.pairs import sequences
from kltune.lm.measure.likelihood import example_batch, text_rules
from kltune.lm.measure.measurement import Round, measure_kl
from kltune.lm.model.batches import pad_right
from kltune.lm.model.opening import load_policy
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import Draw, sample, uniform_numbers
from kltune.recipe import load_recipe
from kltune.run.recorder import Clock
from kltune.train.loop import Taken
from kltune.train.preferences import Preferences, load_preferences, response_logprobs

NEVER = 1_000_000
NO_TOKEN = (-1,)  # end tokens of a response whose length is fixed
ANSWER, MOST_ROWS = "\n\nAssistant:", 2000
ADAPTER_SIZE = 0.002  # standard deviation of B where policy and reference shall differ: a few nats per response


def recipe_of(work: SimpleNamespace, settings: str) -> dict:
    """The recipe; unless matched, nothing but what the work is, and no more of KL than DPO elsewhere knows."""
    stage, matched = work.stage, settings == "matched"
    common = {
        "stage": stage, "model": {"path": work.model, "dtype": work.dtype},
        "run": {"steps": work.steps, "eval_every": NEVER, "save_every": NEVER, "output": f"run-{settings}"},
    }
    optim = {"lr": work.lr, "schedule": "constant"} if matched else {}
    if stage in ("dpo", "sft", "reward"):
        limits = {"max_prompt_tokens": work.prompt_tokens, "max_response_tokens": work.new_tokens}
        rows = {"texts" if stage == "sft" else "pairs": "raw.jsonl", "on_bad_row": "skip"} | limits
        own = {
            "dpo": {"dpo": {"beta": work.beta} if matched else {}, "kl": {"control": "fixed", "beta": 0}},
            "sft": {}, "reward": {"bradley_terry": {"centring": 0.0} if matched else {}},
        }[stage]
        if stage != "reward":
            own |= {"sampling": {"max_new_tokens": 8}, "eval": {"responses": 8}}
        return common | own | {"data": rows, "optim": optim | {"batch_size": work.batch}}
    groups = {"responses_per_prompt": work.group} if work.group > 1 else {}
    own = {"value_epochs": work.epochs} if stage == "trpo" else {
        "epochs": work.epochs, "minibatch_size": work.batch // work.minibatches}
    kl = {"control": "fixed", "beta": work.beta} if matched and stage == "ppo" else {}
    return common | {
        "data": {"prompts": "raw.jsonl"}, "reward": [{"kind": "function", "path": "rewards.py:score"}],
        "sampling": {"prompts_per_step": work.batch // work.group, "max_new_tokens": work.new_tokens} | groups,
        "kl": kl, stage: own | work.section, "optim": optim, "eval": {"responses": 8},
    }


def open_recipe(folder: Path, settings: str = "matched", changes: tuple[str, ...] = ()):
    """Write the recipe of the folder's work and read it as a user's."""
    path = folder / f"{settings}.yaml"
    path.write_text(json.dumps(recipe_of(load_work(folder), settings)))  # JSON is YAML
    return load_recipe(path, overrides=changes)


def load_work(folder: Path) -> SimpleNamespace:
    """The sizes of the work and its data."""
    return SimpleNamespace(**json.loads((folder / "work.json").read_text()))


def fresh_policy(recipe) -> Policy:
    """The policy as a stage makes it from the recipe's seed."""
    torch.manual_seed(recipe.run.seed)
    return load_policy(recipe.model, recipe.lora, device=torch.device("cpu"))


def prepare(folder: Path, *, gate: bool) -> None:
    """Write the model where it is random, the initial adapter, and the token ids of both sides, in their order."""
    work = load_work(folder)
    if work.random:
        random_llama(Path(work.model), **work.random)
    (folder / "raw.jsonl").write_text("\n".join(map(json.dumps, raw_rows(work))))
    (folder / "rewards.py").write_text(SCORE)
    recipe = open_recipe(folder)
    policy = fresh_policy(recipe)
    if gate or work.part:
        for name, tensor in policy.trainable_parameters().items():
            if "lora_B" in name:
                tensor.data.normal_(std=ADAPTER_SIZE)
    policy.save(folder / "adapter")
    {"dpo": prepare_pairs, "reward": prepare_comparisons, "sft": prepare_texts}.get(work.stage, prepare_prompts)(
        folder, work, recipe, policy, gate
    )


def write(folder: Path, name: str, rows: list) -> None:
    """Rows as one JSON file of the folder."""
    (folder / f"{name}.json").write_text(json.dumps(rows))


def prepare_pairs(folder: Path, work: SimpleNamespace, recipe, policy: Policy, gate: bool) -> None:
    """Pairs; for the gates also one by one, and whole."""
    pairs = load_preferences(recipe.data.pairs, policy, recipe.data)[0]
    order = range(len(pairs)) if gate else order_of(len(pairs), work.batch, recipe)
    write(folder, "pairs", [pair_ids(pairs, at) for at in order])
    if gate and work.losses:
        write(folder, "labelled", labelled_ids(pairs))
        uncut = recipe.data.model_copy(update={"max_prompt_tokens": None, "max_response_tokens": NEVER})
        policy.max_context = 2 * NEVER
        whole = load_preferences(recipe.data.pairs, policy, uncut)[0]
        write(folder, "whole", [pair_ids(whole, at) for at in order])


def prepare_comparisons(folder: Path, work: SimpleNamespace, recipe, policy: Policy, gate: bool) -> None:
    """Pairs of whole sequences, to score."""
    from kltune.stages.reward import load_data

    rows = load_data(recipe, policy)[0]
    chosen = [rows[at] for at in order_of(len(rows), work.batch, recipe)]
    write(folder, "pairs", [dict(zip(("chosen_ids", "rejected_ids"), sequences([row]), strict=True)) for row in chosen])


def prepare_texts(folder: Path, work: SimpleNamespace, recipe, policy: Policy, gate: bool) -> None:
    """Prompts with a response to imitate."""
    rows = load_examples(recipe.data.texts, policy.tokenizer, text_rules(policy, recipe.data))[0]
    chosen = [rows[at] for at in order_of(len(rows), work.batch, recipe)]
    write(folder, "texts", [{"input_ids": row.ids, "completion_mask": list(map(int, row.scored))} for row in chosen])


def prepare_prompts(folder: Path, work: SimpleNamespace, recipe, policy: Policy, gate: bool) -> None:
    """Prompts; for a part of eval-kl also responses to score, and where ragged ones end."""
    prompts = load_prompts(recipe.data.prompts, policy.tokenizer, policy.row_rules(recipe.data, 256))[0]
    chosen = [prompts[at] for at in order_of(len(prompts), work.batch // work.group, recipe)]
    write(folder, "prompts", [prompt.ids for prompt in chosen])
    write(folder, "texts", [prompt.text for prompt in chosen])
    if work.part:
        policy.ends = EndTokens(NO_TOKEN, None)
        drawn = sample(policy, chosen[: work.batch], uniforms_of(work), temperature=1.0)
        responses = drawn.ids[drawn.scored].view(work.batch, -1).tolist()
        write(folder, "responses", responses)
        write(folder, "ends", list(ends_for(responses, work.new_tokens / 4)) if work.part == "ragged" else [])


def uniforms_of(work: SimpleNamespace):
    """Random numbers for a batch of responses."""
    return uniform_numbers(np.random.default_rng(0), work.batch, work.new_tokens)


def order_of(rows: int, per_step: int, recipe) -> list[int]:
    """Which rows the steps of a run take, one after the other."""
    return shuffled_positions(rows, 0, per_step * recipe.run.steps, recipe.run.seed)


def raw_rows(work: SimpleNamespace) -> Iterator[dict]:
    """Rows of data as a user has them: of the work's file, or of random words in the lengths of that file's."""
    count, pairs = work.rows, work.stage in ("dpo", "reward")
    if not work.random and (pairs or not work.transcripts):
        yield from map(json.loads, islice(Path(work.data).read_text().splitlines(), count))
        return
    torch.manual_seed(1)
    limits = work.prompt_tokens, work.new_tokens - 1, work.new_tokens - 1
    for texts in islice(parted(work), count):
        if work.random:
            lengths = (min(limit, len(text.split()) or 1) for text, limit in zip(texts, limits, strict=True))
            texts = [" ".join(f"w{n}" for n in torch.randint(3, work.random["vocabulary"], (length,)).tolist())
                     for length in lengths]
        row = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
        yield row if pairs else {"prompt": row["prompt"]} | (
            {"response": row["chosen"]} if work.stage == "sft" else {})


def parted(work: SimpleNamespace) -> Iterator[tuple[str, str, str]]:
    """Prompt, chosen and rejected response of hh-harmless's rows whose prompt is short enough; again and again.

    Without a file, texts of one and the same length.
    """
    if not work.transcripts:
        yield from repeat(tuple("w " * count for count in (work.prompt_tokens, work.new_tokens, work.new_tokens)))
    rows = [json.loads(line) for line in islice(Path(work.transcripts).read_text().splitlines(), MOST_ROWS)]
    parts = [(head + ANSWER, chosen, row["rejected"].rpartition(ANSWER)[2])
             for row in rows for head, _, chosen in [row["chosen"].rpartition(ANSWER)]]
    yield from cycle([part for part in parts if len(part[0].split()) <= work.prompt_tokens])


def pair_ids(pairs: Preferences, at: int) -> dict[str, tuple[int, ...]]:
    """A pair under the names of TRL's columns."""
    chosen, rejected = pairs.examples[2 * at : 2 * at + 2]
    start = chosen.scored.index(True)
    return {
        "prompt_ids": chosen.ids[:start], "chosen_ids": chosen.ids[start:],
        "rejected_ids": rejected.ids[rejected.scored.index(True) :],
    }


def labelled_ids(pairs: Preferences) -> list[dict]:
    """The same responses one by one, each prompt also with the response that kltune's kto pairs it with."""
    found = []
    for mine, other, wanted in zip(pairs.examples, pairs.mismatched(), pairs.wanted.tolist(), strict=True):
        start = mine.scored.index(True)
        found.append({
            "prompt_ids": mine.ids[:start], "completion_ids": mine.ids[start:], "KL_completion_ids": other.ids[start:],
            "label": wanted,
        })
    return found


def gate(folder: Path, output: Path) -> None:
    """Log-probabilities, one gradient and the value of each loss on the gate's pairs, by what training calls."""
    from kltune.stages.dpo import add_loss_gradient, make_learner

    work, recipe = load_work(folder), open_recipe(folder)
    policy = fresh_policy(recipe)
    policy.load_adapter(folder / "adapter")
    pairs = load_preferences(recipe.data.pairs, policy, recipe.data)[0]
    pairs = pairs.measured(policy, range(len(pairs)))
    ids, scored = example_batch(pairs.examples, policy)
    with torch.no_grad():
        tensors = {"logprobs": policy.logprobs(ids, scored)}
        with policy.reference():
            tensors["ref_logprobs"] = policy.logprobs(ids, scored)
        per_response, lengths = response_logprobs(policy, pairs)

    def value(*changes: str) -> float:
        asked = open_recipe(folder, changes=changes)
        policy.model.zero_grad()
        learner = make_learner(asked, policy, 1)
        return add_loss_gradient(asked, learner, pairs, asked.dpo.beta, first=False, held=pairs)["loss/mean"]

    found = {"sigmoid": value()}
    tensors |= {f"gradient/{n}": p.grad.clone() for n, p in policy.model.named_parameters() if p.requires_grad}
    if work.losses:
        found |= more_losses(work, value, per_response, lengths, pairs.ref_logprobs)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output.with_suffix(".safetensors"))
    output.write_text(json.dumps({"losses": found}))


def more_losses(work: SimpleNamespace, value, per_response, lengths, ref_logprobs) -> dict[str, float]:
    """The value of each other loss, by name; ``value`` computes what a recipe's changes make of it."""
    smoothing = f"dpo.label_smoothing={work.label_smoothing}"
    divergence = "dpo.loss=f_dpo", f"dpo.alpha={work.alpha}"
    found = {
        "sigmoid, label smoothing": value(smoothing),
        "robust": value("dpo.loss=robust", smoothing),
        "hinge": value("dpo.loss=hinge"),
        "ipo": value("dpo.loss=ipo"),
        "bco": value("dpo.loss=bco"),
        "kto": value("dpo.loss=kto"),
        "simpo": value("dpo.loss=simpo", f"dpo.beta={work.simpo_beta}", f"dpo.gap={work.simpo_gap}"),
        **{f"f_dpo {name}": value(*divergence, f"dpo.divergence={name}") for name in ("forward_kl", "js", "alpha")},
    }
    mean, ratio = per_response / lengths, (per_response - ref_logprobs) / lengths
    odds = losses.orpo_loss(mean[0::2], mean[1::2], work.beta) + mean[0::2]
    per_token = losses.ipo_loss(ratio[0::2] - ratio[1::2], work.beta)
    return found | {"orpo, odds ratio": odds.mean().item(), "ipo, margin per token": per_token.mean().item()}


def run(folder: Path, output: Path, settings: str, changes: list[str]) -> None:
    """The stage, watched."""
    work = load_work(folder)
    module = importlib.import_module(f"kltune.stages.{work.stage}")
    watch, opened = Watch(), []
    opening = importlib.import_module("kltune.run.session")
    load, take_step, measured, lap = opening.load_policy, module.take_step, Preferences.measured, Clock.lap

    def watched_load(*arguments, **options) -> Policy:
        policy = load(*arguments, **options)
        if work.stage in ("ppo", "trpo"):
            policy.ends = EndTokens(NO_TOKEN, None)
        opened.append(policy)
        watch.loaded()
        return policy

    def watched_step(*arguments, **options) -> Taken:
        if not watch.began:
            watch.stamp()
        taken = take_step(*arguments, **options)
        watch.stamp()
        return taken

    def watched_lap(clock: Clock, name: str) -> None:
        lap(clock, name)
        watch.phase("generate" if name == "sample" else name)

    opening.load_policy, module.take_step, Clock.lap = watched_load, watched_step, watched_lap
    Preferences.measured = watch.timed("once", measured)
    recipe = open_recipe(folder, settings, tuple(changes))
    shutil.rmtree(recipe.run.output, ignore_errors=True)
    with contextlib.redirect_stderr(io.StringIO()):
        getattr(module, f"run_{work.stage}")(recipe, resume=False)
    rows = [json.loads(line) for line in (Path(recipe.run.output) / "metrics.jsonl").read_text().splitlines()]
    watch.losses = [row["loss/mean"] for row in rows if "loss/mean" in row]
    watch.floor_seconds = stage_floor(folder, work, recipe, opened[0])
    watch.write(output)


def stage_floor(folder: Path, work: SimpleNamespace, recipe, policy: Policy) -> float:
    """Seconds of the matrix products of a step of mean length, by ``passes_of`` the recipe."""
    def read(name: str) -> list:
        return json.loads((folder / f"{name}.json").read_text())

    sampled = 0.0
    if work.stage in ("dpo", "reward"):
        rows = [sum(map(len, row.values())) for row in read("pairs")]
        scored = 2 * work.new_tokens
    elif work.stage == "sft":
        texts = read("texts")
        rows, scored = [len(row["input_ids"]) for row in texts], sum(sum(row["completion_mask"]) for row in texts)
        scored /= len(texts)
    else:
        rows, scored = [len(ids) + work.new_tokens for ids in read("prompts")], work.new_tokens
        sampled = decoding_floor(policy, work.batch, work.new_tokens)
    positions = round(work.batch * sum(rows) / len(rows))
    return sampled + scoring_floor(policy, positions, round(work.batch * scored), *passes_of(recipe))


def run_part(folder: Path, output: Path) -> None:
    """A part of eval-kl, again and again: sampling, scoring given responses, or both."""
    work, watch = load_work(folder), Watch()
    policy = fresh_policy(open_recipe(folder))
    policy.load_adapter(folder / "adapter")
    asked, answers, ends = (json.loads((folder / f"{name}.json").read_text())
                            for name in ("prompts", "responses", "ends"))
    policy.ends = EndTokens(tuple(ends) or NO_TOKEN, None)
    prompts = [Prompt(tuple(ids), "", "bench") for ids in asked[: work.batch]]
    rows = [(*prompt.ids, *answer) for prompt, answer in zip(prompts, answers, strict=True)]
    ids = policy.padded(rows)
    scored = pad_right([[False] * len(prompt.ids) + [True] * work.new_tokens for prompt in prompts], False, torch.bool)

    def once() -> dict[str, float]:
        if work.part in ("sample", "ragged"):
            return {"tokens": float(sample(policy, prompts, uniforms_of(work), temperature=1.0).lengths.sum())}
        if work.part == "score":
            return {"kl": policy.measure(ids, scored).ref_kl.double().sum().item() / work.batch}
        measured = measure_kl(policy, Round.of(prompts, work.batch), Draw(work.new_tokens))
        return {"sampled_kl": measured.summary().nats_per_response}

    watch.loaded()
    watch.stamp()
    for _ in range(work.steps):
        watch.values = once()
        watch.stamp()
    passes = 0 if work.part in ("sample", "ragged") else 2
    watch.floor_seconds = scoring_floor(policy, ids.numel(), work.batch * work.new_tokens, passes, passes) + (
        0.0 if work.part == "score" else decoding_floor(policy, work.batch, work.new_tokens))
    watch.write(output)


def main() -> None:
    """Do one piece of work and write what it gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["prepare", "prepare-gate", "gate", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--settings", choices=SETTINGS, default="matched")
    parser.add_argument("--set", action="append", default=[], help="a recipe's key=value")
    arguments = parser.parse_args()
    if arguments.work.startswith("prepare"):
        prepare(arguments.folder, gate=arguments.work == "prepare-gate")
    elif arguments.work == "gate":
        gate(arguments.folder, arguments.output)
    elif load_work(arguments.folder).part:
        run_part(arguments.folder, arguments.output)
    else:
        run(arguments.folder, arguments.output, arguments.settings, arguments.set)


if __name__ == "__main__":
    main()
