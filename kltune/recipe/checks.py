"""Whether the keys of a recipe fit together: each rule names the keys it concerns, what is wrong and what to write.

A rule that concerns a key which is already faulty keeps quiet: it would judge a value nobody wrote.
"""

import os
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from kltune.recipe.faults import Clash
from kltune.recipe.method_checks import (
    budget_clashes,
    control,
    natural_gradient_clashes,
    policy_update,
    preference_clashes,
    teacher_clashes,
)
from kltune.recipe.rewards import HOW, judges, templates
from kltune.recipe.sections.fields import is_changed
from kltune.recipe.stages import PATH_KEYS, REFERENCE, Recipe

FUNCTION = re.compile(r"(?P<file>[^:]+\.py):(?P<name>[A-Za-z_]\w*)")
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".gz", ".jinja")
MADE = ("run.output", "sampling.publish")       # keys of folders that are made where they are not there
NO_MPS = ("found mps, which has no float64, in which probabilities are summed over the vocabulary, and KL over "
          "responses; write cpu")
SOURCES = {"sft": "texts", "reward": "pairs", "ppo": "prompts", "trpo": "prompts", "distill": "prompts"}
NO_PAIRS = dict.fromkeys(("eval.pairs", "eval.pairs_share"), "it learns from no pairs")
NO_TARGET = "it has no target: run.steps or run.epochs is its length"
NO_PEAK = "it trains on no score that could be exploited"
NO_POLICY = "a reward model is measured on held-out pairs: write eval.pairs, or eval.pairs_share"
UNREAD = {
    "sft": {"sampling.prompts_per_step": "sft learns from texts: optim.batch_size is the batch",
            "eval.stop_at_gold_peak": NO_PEAK, "run.until": NO_TARGET} | NO_PAIRS,
    "ppo": {"optim.batch_size": "the batch of ppo is sampling.prompts_per_step x responses_per_prompt"} | NO_PAIRS,
    "trpo": {"optim.batch_size": "the batch of trpo is sampling.prompts_per_step x responses_per_prompt"} | NO_PAIRS,
    "dpo": {"eval.pairs_share": "write eval.pairs"},
    "distill": {"optim.batch_size": "the batch of distill is sampling.prompts_per_step x responses_per_prompt",
                "sampling.missing_end_penalty": "nothing scores its responses",
                "eval.stop_at_gold_peak": NO_PEAK} | NO_PAIRS,
    "reward": {"eval.stop_at_gold_peak": NO_PEAK, "run.until": NO_TARGET}
    | dict.fromkeys(("eval.prompts", "eval.responses", "eval.texts", "eval.gold", "eval.judge"), NO_POLICY),
}

def clashes(recipe: Recipe, folder: Path, trusted: bool = False, packaged: bool = False) -> Iterator[Clash]:
    """Every pair of keys that cannot stand together, in a recipe whose sections are sound and paths as written.

    Args:
        folder: the recipe's folder.
        trusted: the recipe is the one kltune wrote into a run folder, so absolute paths of functions are its own.
        packaged: it comes with kltune, and what it names is still to be put beside a copy of it.
    """
    yield from sources(recipe)
    yield from lengths(recipe)
    if recipe.run.shard == "full" and recipe.lora is None:
        yield ("run.shard", "lora"), "found full with lora: null, wanted none: only a base that is frozen is spread"
    yield from unread(recipe)
    yield from kept_adapter(recipe)
    yield from judges(recipe)
    if not trusted:     # what was run is read as it was
        yield from gold_apart(recipe, folder)
    yield from templates(recipe)
    if recipe.run.device == "mps":
        yield ("run.device",), NO_MPS
    if recipe.stage == "trpo":
        yield from natural_gradient_clashes(recipe)
    if recipe.stage == "dpo":
        yield from preference_clashes(recipe)
    if recipe.stage == "distill":
        yield from teacher_clashes(recipe)
    for key, value, is_function in path_values(recipe):
        if is_function:
            yield from function_file(key, value, folder, trusted)
        elif not packaged:
            yield from misplaced(key, value, folder)
    if hasattr(recipe, "sampling"):
        yield from server(recipe)
    if hasattr(recipe, "kl"):
        yield from budget_clashes(recipe.kl)
        yield from control(recipe.kl)
        yield from policy_update(recipe)
        if recipe.run.until == "target" and recipe.kl.control == "fixed":
            yield ("run.until", "kl.control"), "found target with control: fixed: there is no target to meet"
        if recipe.kl.hard_cap is not None and recipe.sampling.prompts_per_step < 2:
            yield (("kl.hard_cap", "sampling.prompts_per_step"), "found 1 prompt per step, wanted at least 2: a cap is "
                   "held with an error, and responses to one prompt give none")


def kept_adapter(recipe: Recipe) -> Iterator[Clash]:
    """An SFT adapter can only be kept beside the weights where there is one, and where they are not trained."""
    if recipe.model.merge:
        return
    if recipe.model.sft_adapter is None:
        yield ("model.merge",), "found false without model.sft_adapter: there is nothing to keep beside the weights"
    elif recipe.lora is None:
        yield ("model.merge", "lora"), "found merge: false with lora: null: where every weight is trained, merge first"


def sources(recipe: Recipe) -> Iterator[Clash]:
    """Each stage needs its rows, and refuses rows that it would not read."""
    needed = SOURCES.get(recipe.stage)
    if needed is None:
        needed = "pairs" if recipe.dpo.source == "file" else "prompts"
    if getattr(recipe.data, needed) is None:
        yield (f"data.{needed}",), f"missing; the {recipe.stage} stage reads its rows from data.{needed}"
    allowed = {"prompts", "pairs"} if recipe.stage == "dpo" and needed == "pairs" else {needed}
    for other in {"prompts", "texts", "pairs"} - allowed:
        if getattr(recipe.data, other) is not None:
            yield (f"data.{other}",), f"the {recipe.stage} stage does not read it; data.{needed} is what it reads"
    if not hasattr(recipe, "reward"):
        return
    if needed == "prompts" and not recipe.reward:
        yield (("reward",), "missing; the score has to come from somewhere: write reward: [{kind: function, path: "
               "rewards.py:score}]")
    if needed == "pairs" and recipe.reward:
        yield ("reward",), "read only with dpo.source: online; pairs from a file are judged already"


def lengths(recipe: Recipe) -> Iterator[Clash]:
    """The run has one length, and the warm-up ends within it."""
    run = recipe.run
    if run.steps is None and run.epochs is None:
        yield ("run.steps", "run.epochs"), "found neither run.steps nor run.epochs, wanted one of them"
    if run.steps is not None and run.epochs is not None:
        yield ("run.steps", "run.epochs"), f"found steps {run.steps} and epochs {run.epochs:g}, wanted one of them"
    if run.steps is not None and recipe.optim.warmup_steps > run.steps:
        yield (("optim.warmup_steps", "run.steps"),
               f"found {recipe.optim.warmup_steps}, wanted at most run.steps, {run.steps}")


def unread(recipe: Recipe) -> Iterator[Clash]:
    """A key that the stage shares with others but does not read may only hold its default."""
    for key, why in UNREAD.get(recipe.stage, {}).items():
        section, name = key.split(".")
        if is_changed(getattr(recipe, section), name):
            yield (key,), f"the {recipe.stage} stage does not read it; {why}"
    if recipe.eval.stop_at_gold_peak and recipe.eval.gold is None:
        yield (("eval.stop_at_gold_peak", "eval.gold"),
               "found true without eval.gold: write the scorer whose peak is meant, or remove it")
    try:
        date.fromisoformat(recipe.data.date or "2000-01-01")
    except ValueError:
        yield ("data.date",), f"found {recipe.data.date}, which is no day; wanted one as 2026-01-31"
    if is_changed(recipe.data, "turns") and recipe.data.texts is None and recipe.eval.texts is None:
        yield ("data.turns",), "read only for conversations in data.texts or eval.texts; remove it"
    if recipe.stage == "reward" and recipe.eval.pairs is not None and is_changed(recipe.eval, "pairs_share"):
        yield ("eval.pairs_share", "eval.pairs"), "read only without eval.pairs, which are held out; remove it"


def gold_apart(recipe: Recipe, folder: Path) -> Iterator[Clash]:
    """Gold is never trained on: it is none of the entries of reward, however much those weigh."""

    def what(entry: Any) -> dict[str, Any]:
        found = entry.model_dump(exclude=HOW)
        path = found.get("path")
        return found | ({} if path is None else {"path": os.path.realpath(folder / os.path.expanduser(path))})

    for place, entry in enumerate(getattr(recipe, "reward", ()) if recipe.eval.gold is not None else ()):
        if what(entry) == what(recipe.eval.gold):
            yield (("eval.gold", f"reward.{place}"), f"found the scorer of reward.{place}, which is trained on, so it "
                   "cannot tell when the reward is exploited; write another scorer, or remove eval.gold")


def path_values(recipe: Recipe) -> Iterator[tuple[str, str, bool]]:
    """Every key whose value may be a path, with its value, and whether that is one of a Python function."""
    values = by_dotted_key(recipe.model_dump(mode="json"))
    for key, value in values.items():
        if value is not None and re.sub(r"\.\d+\.", ".*.", key) in PATH_KEYS and (
            key != "distill.teacher" or not (value == REFERENCE or recipe.distill.served)
        ):
            yield key, value, values.get(f"{key.removesuffix('path')}kind") == "function"


def by_dotted_key(value: Any, key: str = "") -> dict[str, Any]:
    """Nested sections and lists as one dict of dotted keys."""
    if isinstance(value, dict) and value:
        entries = value.items()
    elif isinstance(value, list) and value:
        entries = enumerate(value)
    else:
        return {key: value}
    return {
        name: leaf for step, child in entries
        for name, leaf in by_dotted_key(child, f"{key}.{step}".strip(".")).items()
    }


def absolute(value: str, folder: Path) -> str:
    """A path made absolute from the recipe's folder; a name that is no path there is kept, for the hub."""
    path = os.path.abspath(folder / os.path.expanduser(value))
    only_a_path = value.startswith(("./", "../", "/", "~/")) or value in (".", "..")
    return path if only_a_path or value.lower().endswith(DATA_SUFFIXES) or os.path.exists(path) else value


def misplaced(key: str, value: str, folder: Path) -> Iterator[Clash]:
    """Refuse addresses, and paths that only exist from where the command was started."""
    if "://" in value:
        yield (key,), f"found the address {value}, wanted a file, a folder or a hub name; download it first"
    elif key not in MADE and not os.path.exists(folder / os.path.expanduser(value)) and os.path.exists(value):
        yield ((key,), f"found {value}, which is in the current folder but not in the recipe's; paths start at the "
               f"recipe: write {os.path.relpath(value, folder)}")


def server(recipe: Any) -> Iterator[Clash]:
    """A server samples where a step's responses are what is learnt from; what only it reads is read only then."""
    sampling = recipe.sampling
    if sampling.engine == "torch":
        for name in ("url", "publish", "timeout_s"):
            if is_changed(sampling, name):
                yield (f"sampling.{name}", "sampling.engine"), "read only with engine: vllm; write that, or remove it"
        return
    if recipe.stage in ("sft", "distill") or (recipe.stage == "dpo" and recipe.dpo.source == "file"):
        yield ("sampling.engine",), "found vllm, wanted torch: a server samples for ppo, trpo and dpo.source: online"
    for name, example in (("url", "http://127.0.0.1:8000"), ("publish", "/shared/adapters")):
        if getattr(sampling, name) is None:
            yield (f"sampling.{name}", "sampling.engine"), f"missing with engine: vllm; wanted one such as {example}"


def function_file(key: str, value: str, folder: Path, trusted: bool) -> Iterator[Clash]:
    """A reward function lies beside the recipe: a recipe alone never chooses which code of this machine runs."""
    match = FUNCTION.fullmatch(value)
    if not match:
        signs = "" if value.isascii() else "; quotes and dashes have to be those of a keyboard"
        yield (key,), f"found {value}, wanted file.py:function, such as rewards.py:score{signs}"
        return
    file = folder / match["file"]
    home = os.path.realpath(folder)
    inside = os.path.realpath(file).startswith(os.path.join(home, "")) and ".." not in Path(match["file"]).parts
    # A run's recipe names it by its place on this machine, which whoever hands a forged run over cannot know.
    if not inside and not (trusted and os.path.isabs(match["file"])):
        yield (key,), f"found {match['file']}, wanted a file in the recipe's own folder; copy it beside the recipe"
