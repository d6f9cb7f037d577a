"""kltune's side of ``bench_peers.py``, and what both sides start from.

    python scripts/peers_kltune.py prepare|prepare-gate FOLDER         base weights, initial adapter, token ids in order
    python scripts/peers_kltune.py gate|run FOLDER OUTPUT [--settings SETTINGS] [--set key=value]...

``run`` is the stage itself as ``kltune dpo`` and ``kltune ppo`` run it, with a clock at the ends of its steps.
"""

import argparse
import contextlib
import importlib
import io
import json
import shutil
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch
from bench import SCORE
from bench_parts import random_llama
from peers_watch import SETTINGS, Watch
from safetensors.torch import save_file

from kltune.core.objectives import preferences as losses
from kltune.lm.data.chat import EndTokens
from kltune.lm.data.examples import load_prompts, shuffled_positions
from kltune.lm.measure.likelihood import example_batch
from kltune.lm.model.opening import load_policy
from kltune.lm.model.policy import Policy
from kltune.recipe import load_recipe
from kltune.train.learner import Learner
from kltune.train.loop import Taken
from kltune.train.preferences import Preferences, load_preferences, response_logprobs

NEVER = 1_000_000
NO_TOKEN = (-1,)  # end tokens of a response whose length is fixed
ADAPTER_SIZE = 0.002  # standard deviation of B where policy and reference shall differ: a few nats per response


def recipe_of(work: SimpleNamespace, settings: str) -> dict:
    """The recipe; unless matched, nothing but what the work is, and no more of KL than DPO elsewhere knows."""
    common = {
        "stage": work.stage, "model": {"path": work.model}, "eval": {"responses": 8},
        "run": {"steps": work.steps, "eval_every": NEVER, "save_every": NEVER, "output": f"run-{settings}"},
    }
    matched = settings == "matched"
    optim = {"lr": work.lr, "schedule": "constant"} if matched else {}
    if work.stage == "dpo":
        rows = {"pairs": "raw.jsonl", "max_prompt_tokens": work.prompt_tokens, "max_response_tokens": work.new_tokens}
        return common | {
            "data": rows | {"on_bad_row": "skip"}, "dpo": {"beta": work.beta} if matched else {},
            "kl": {"control": "fixed", "beta": 0}, "optim": optim | {"batch_size": work.batch},
            "sampling": {"max_new_tokens": 8},
        }
    groups = {"responses_per_prompt": work.group} if work.group > 1 else {}
    ppo = {"epochs": work.epochs, "minibatch_size": work.minibatch}
    return common | {
        "data": {"prompts": "raw.jsonl"}, "reward": [{"kind": "function", "path": "rewards.py:score"}],
        "sampling": {"prompts_per_step": work.batch // work.group, "max_new_tokens": work.new_tokens} | groups,
        "kl": {"control": "fixed", "beta": work.beta} if matched else {},
        "ppo": ppo | ({"baseline": "grpo"} if work.group > 1 else {}), "optim": optim,
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
    rows = random_rows(work) if work.random else list(islice(Path(work.data).read_text().splitlines(), work.rows))
    (folder / "raw.jsonl").write_text("\n".join(rows))
    (folder / "rewards.py").write_text(SCORE)
    recipe = open_recipe(folder)
    policy = fresh_policy(recipe)
    if gate:
        for name, tensor in policy.trainable_parameters().items():
            if "lora_B" in name:
                tensor.data.normal_(std=ADAPTER_SIZE)
    policy.save(folder / "adapter")
    if work.stage == "dpo":
        pairs = load_preferences(recipe.data.pairs, policy, recipe.data)[0]
        order = range(len(pairs)) if gate else order_of(len(pairs), work.batch, recipe)
        (folder / "pairs.json").write_text(json.dumps([pair_ids(pairs, at) for at in order]))
        if gate:
            (folder / "labelled.json").write_text(json.dumps(labelled_ids(pairs)))
            uncut = recipe.data.model_copy(update={"max_prompt_tokens": None, "max_response_tokens": NEVER})
            policy.max_context = 2 * NEVER
            whole = load_preferences(recipe.data.pairs, policy, uncut)[0]
            (folder / "whole.json").write_text(json.dumps([pair_ids(whole, at) for at in order]))
        return
    prompts = load_prompts(recipe.data.prompts, policy.tokenizer, policy.row_rules(recipe.data, 256))[0]
    chosen = [prompts[at] for at in order_of(len(prompts), work.batch // work.group, recipe)]
    (folder / "prompts.json").write_text(json.dumps([prompt.ids for prompt in chosen]))
    (folder / "texts.json").write_text(json.dumps([prompt.text for prompt in chosen]))


def order_of(rows: int, per_step: int, recipe) -> list[int]:
    """Which rows the steps of a run take, one after the other."""
    return shuffled_positions(rows, 0, per_step * recipe.run.steps, recipe.run.seed)


def random_rows(work: SimpleNamespace) -> list[str]:
    """Rows of random words of a random Llama's vocabulary, all of the same length in tokens."""
    torch.manual_seed(1)

    def words(count: int) -> str:
        return " ".join(f"w{number}" for number in torch.randint(3, work.random["vocabulary"], (count,)).tolist())

    if work.stage != "dpo":
        return [json.dumps({"prompt": words(work.prompt_tokens)}) for _ in range(work.rows)]
    sides = {"prompt": work.prompt_tokens, "chosen": work.new_tokens - 1, "rejected": work.new_tokens - 1}
    return [json.dumps({side: words(count) for side, count in sides.items()}) for _ in range(work.rows)]


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
    from kltune.stages.dpo import add_loss_gradient

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
        learner = Learner(policy, None, reward_mean=0.0 if asked.dpo.loss == "bco" else None)
        policy.model.zero_grad()
        return add_loss_gradient(asked, learner, pairs, first=False)["loss/mean"]

    found = {"sigmoid": value()}
    tensors |= {f"gradient/{n}": p.grad.clone() for n, p in policy.model.named_parameters() if p.requires_grad}
    smoothing = f"dpo.label_smoothing={work.label_smoothing}"
    divergence = "dpo.loss=f_dpo", f"dpo.alpha={work.alpha}"
    found |= {
        "sigmoid, label smoothing": value(smoothing),
        "robust": value("dpo.loss=robust", smoothing),
        "hinge": value("dpo.loss=hinge"),
        "ipo": value("dpo.loss=ipo"),
        "bco": value("dpo.loss=bco"),
        "kto": value("dpo.loss=kto"),
        "simpo": value("dpo.loss=simpo", f"dpo.beta={work.simpo_beta}", f"dpo.gap={work.simpo_gap}"),
        **{f"f_dpo {name}": value(*divergence, f"dpo.divergence={name}") for name in ("forward_kl", "js", "alpha")},
    }
    mean, ratio = per_response / lengths, (per_response - pairs.ref_logprobs) / lengths
    odds = losses.orpo_loss(mean[0::2], mean[1::2], work.beta) + mean[0::2]
    per_token = losses.ipo_loss(ratio[0::2] - ratio[1::2], work.beta)
    found |= {"orpo, odds ratio": odds.mean().item(), "ipo, margin per token": per_token.mean().item()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output.with_suffix(".safetensors"))
    output.write_text(json.dumps({"losses": found}))


def run(folder: Path, output: Path, settings: str, changes: list[str]) -> None:
    """The stage, watched."""
    work = load_work(folder)
    module = importlib.import_module(f"kltune.stages.{work.stage}")
    rollout = importlib.import_module("kltune.lm.model.sampler")
    watch = Watch()
    opening = importlib.import_module("kltune.run.session")
    load, take_step, measured = opening.load_policy, module.take_step, Preferences.measured

    def watched_load(*arguments, **options) -> Policy:
        policy = load(*arguments, **options)
        if work.stage != "dpo":
            policy.ends = EndTokens(NO_TOKEN, None)
        watch.loaded()
        return policy

    def watched_step(*arguments, **options) -> Taken:
        if not watch.began:
            watch.stamp()
        taken = take_step(*arguments, **options)
        watch.stamp()
        return taken

    opening.load_policy, module.take_step = watched_load, watched_step
    Preferences.measured = watch.timed("once", measured)
    rollout.sample = watch.timed("generate", rollout.sample)
    recipe = open_recipe(folder, settings, tuple(changes))
    shutil.rmtree(recipe.run.output, ignore_errors=True)
    with contextlib.redirect_stderr(io.StringIO()):
        getattr(module, f"run_{work.stage}")(recipe, resume=False)
    rows = [json.loads(line) for line in (Path(recipe.run.output) / "metrics.jsonl").read_text().splitlines()]
    watch.losses = [row["loss/mean"] for row in rows if "loss/mean" in row]
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
    else:
        run(arguments.folder, arguments.output, arguments.settings, arguments.set)


if __name__ == "__main__":
    main()
