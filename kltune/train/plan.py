"""What a recipe would take, told before a weight is loaded: rows, steps, tokens, memory by phase, disk.

Rows become tokens as in a run; the memory is that of the worst moment of the worst step, with the longest rows there
are (``lm/measure/footprint.py``).
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kltune.core import ranks
from kltune.lm.data.chat import read_template
from kltune.lm.data.examples import Counts, Prompt, load_examples, load_prompts
from kltune.lm.data.pairs import answers, hold_out, load_comparisons
from kltune.lm.machine.device_memory import device_bytes
from kltune.lm.measure.footprint import Footprint, Rows, Spread
from kltune.lm.measure.likelihood import text_rules
from kltune.lm.measure.measurement import RESPONSES_PER_PASS
from kltune.lm.model.loading import pick_device
from kltune.lm.model.opening import empty_policy
from kltune.lm.model.policy import Policy
from kltune.recipe import (
    STAGES,
    ClassifierReward,
    DistillRecipe,
    ModelReward,
    ModelSection,
    Recipe,
    dump_recipe,
    scorers_of,
)
from kltune.run.checkpoint import resolve_checkpoint
from kltune.run.optimizer import total_steps
from kltune.run.screen import GB, doing
from kltune.run.subprocesses import device_count
from kltune.train.teacher import rules_of, told

ASKED, ANSWERED = 256, 128      # tokens of a usual row
SAMPLED = "ppo", "trpo", "distill"      # stages that learn from what the policy says
MODEL_STAGES = {"sft": {"texts": "t"}, "ppo": {"prompts": "p"}, "trpo": {"prompts": "p"}, "dpo": {"pairs": "p"},
                "eval-kl": {"texts": "t"}}
MOMENTS = 12            # bytes a trained number of a copy of it and of its optimizer's memory
VECTORS = 36            # of TRPO's gradient, direction and snapshot, the four of its solver, the step before, one more


@dataclass(frozen=True)
class Sizes:
    """What the files of a recipe come to: rows to learn from, and the most tokens that one has.

    rows: distinct ones, of which ``per_step`` are taken in a step. trained: shape of a batch of those that are learnt
    from. asked: longest prompt that is responded to; 0 where nothing is sampled. tokens: of a step, at most.
    """

    rows: int
    per_step: int
    trained: Rows
    asked: int
    tokens: int


@dataclass(frozen=True)
class Processes:
    """How many share the work of a run, and how many of them the memory of one device."""

    count: int = 1
    on_a_device: int = 1

    @classmethod
    def of(cls, recipe: Recipe, device: torch.device) -> "Processes":
        """Those that run, or that the recipe would start."""
        wanted = recipe.run.processes
        count = ranks.size() if ranks.size() > 1 else device_count() if wanted == "auto" else wanted
        beside = ranks.beside() if ranks.size() > 1 else count
        return cls(count, beside if device.type == "cpu" else 1)


ALONE = Processes()


def plan(recipe: Recipe, *, device: torch.device | None = None, there: float | None = None) -> dict[str, Any]:
    """What a run of this recipe would do and take; nothing is written.

    device, there: a device that need not be here, and the bytes of its memory, instead of the recipe's own.

    Raises:
        KltuneError: what the run would raise over its recipe, its rows, its tokenizer or a model's configuration.
    """
    device = device or pick_device(recipe.run.device)
    template = read_template(recipe.data.chat_template)
    policy = empty_policy(recipe.model, recipe.lora, device=device, chat_template=template)
    files: dict[str, dict[str, int]] = {}
    sizes = read_sizes(recipe, policy, files)
    steps = total_steps(recipe.run, sizes.rows, sizes.per_step)
    there = there or device_bytes(device)
    memory = memory_of(
        recipe, policy, sizes, there=there, device=device.type, steps=steps, processes=Processes.of(recipe, device)
    )
    return {
        "schema": "kltune.plan/1",
        "stage": recipe.stage,
        "output": recipe.run.output,
        "device": str(device),
        "dtype": policy.fingerprint.dtype,
        "parameters": memory.pop("parameters"),
        "rows": files,
        "steps": steps,
        "epochs": steps * sizes.per_step / sizes.rows,
        "tokens": {"per_step": sizes.tokens, "total": steps * sizes.tokens},
        "memory": memory,
        "disk": disk_of(recipe, policy),
        "recipe": dump_recipe(recipe),
    }


def read_sizes(recipe: Recipe, policy: Policy, files: dict[str, dict[str, int]]) -> Sizes:
    """Read every file of rows as a run would, and put what became of them into ``files``, by recipe key."""
    data, held, sampling, optim = recipe.data, recipe.eval, getattr(recipe, "sampling", None), recipe.optim
    prompts: dict[str, list[Prompt]] = {}

    def note(key: str, counts: Counts) -> None:
        files[key] = {name: getattr(counts, name) for name in ("read", "kept", "truncated", "dropped", "skipped")}

    if sampling is not None:
        limit = policy.prompt_limit(data.max_prompt_tokens, sampling.max_new_tokens)
        rules = policy.row_rules(data, limit)
        asked = {"data.prompts": data.prompts, "eval.prompts": held.prompts, "data.pairs": data.pairs}
        for key in [key for key in asked if asked[key] is not None]:
            prompts[key], counts = load_prompts(asked[key], policy.tokenizer, rules)
            note(key, counts)
            if recipe.stage == "distill":
                prompts[key] = told(prompts[key], recipe.distill, policy, rules_of(recipe, policy))
    every = [prompt for each in prompts.values() for prompt in each]
    longest = max((max(len(prompt.ids), len(prompt.for_teacher or ())) for prompt in every), default=0)
    if recipe.stage in SAMPLED or (recipe.stage == "dpo" and recipe.dpo.source == "online"):
        new, each = sampling.max_new_tokens, sampling.responses_per_prompt
        count = sampling.prompts_per_step * each
        trained = Rows(count, longest, new, 2 if recipe.stage == "dpo" else each)
        return Sizes(len(prompts["data.prompts"]), sampling.prompts_per_step, trained, longest, count * (longest + new))
    rules, key = text_rules(policy, data), "data.texts" if recipe.stage == "sft" else "data.pairs"
    if recipe.stage == "sft":
        rows, counts = load_examples(data.texts, policy.tokenizer, rules)
        lengths, group = [(len(row.ids) - sum(row.scored), sum(row.scored)) for row in rows], 1
    else:
        rows, counts = load_comparisons(data.pairs, policy.tokenizer, rules)
        if recipe.stage == "reward" and held.pairs is None:
            rows, _ = hold_out(rows, held.pairs_share, recipe.run.seed, data.pairs)
        lengths = [(len(row.prompt.ids), max(len(answer.ids) for answer in answers(row))) for row in rows]
        group = len(answers(rows[0]))
    note(key, counts)
    for key, path in ("eval.texts", held.texts), ("eval.pairs", held.pairs):
        if path is not None:
            load = load_examples if key == "eval.texts" else load_comparisons
            note(key, load(path, policy.tokenizer, rules)[1])
    prompt, response = max(lengths, key=sum)
    mean = sum(map(sum, lengths)) / len(lengths)
    trained = Rows(optim.batch_size * group, prompt, response, group)
    return Sizes(len(rows), optim.batch_size, trained, longest, round(mean * group * optim.batch_size))


def memory_of(
    recipe: Recipe, policy: Policy, sizes: Sizes, *, there: float, device: str, steps: int,
    trains: bool = True, processes: Processes = ALONE,
) -> dict[str, Any]:
    """Bytes of each process by phase, and what is there; how many rows are trained on at once, and how many could be.

    ``shard`` is what ``run.shard`` comes to, and ``whole_peak`` what is at the peak without it.
    """
    stage, section = recipe.stage, getattr(recipe, recipe.stage, None)
    valued = getattr(section, "baseline", None) == "value"
    if valued:
        policy.add_value_function(*section.value_adapter(recipe.lora))
    footprint = Footprint(
        policy, there, fraction=recipe.run.memory_fraction / processes.on_a_device,
        checkpoint_layers=recipe.optim.checkpoint_layers, device=device,
    )
    if not trains:
        return measured_only(footprint, sizes, recipe)
    held = footprint.held(optimizer=stage != "trpo" or valued, copies=copies_of(recipe, steps))
    held += scorer_bytes(recipe) + teacher_bytes(recipe)
    rows, sequences = sizes.trained, recipe.optim.micro_batch_size
    if stage in ("ppo", "distill"):
        rows = rows.of(section.minibatch_size)
    size, checkpointed = footprint.micro_rows(rows, sequences)
    scalar = stage == "reward"
    kind = {"checkpointed": checkpointed, "scalar": scalar, "accumulates": size < rows.count,
            "beside": 2 if stage == "distill" else int(stage == "ppo" and exact_kl_is_priced(recipe))}
    trained = partial(training_phases, recipe, footprint, sizes, rows, size)
    phases, merged = trained(kind), 0
    if stage == "trpo":
        count = max(1, round(section.fisher_fraction * rows.count))
        phases["curvature"] = footprint.curvature(rows.of(count), sequences) + kept_of(recipe, footprint, sizes)
    if sizes.asked:
        answered = list(answered_rows(recipe, sizes))
        phases["sample"] = max(footprint.sampling(some) for some in answered)
        phases["measure"] = max(footprint.measuring(some) for some in answered)
        if len(answered) > 1 or recipe.run.eval_every < steps:
            merged = footprint.merged
            held += merged
        else:       # what is sampled with comes after the last step
            phases |= {name: phases[name] + footprint.merged for name in ("sample", "measure")}
    shard, gathered = recipe.run.shard if processes.count > 1 and recipe.lora is not None else "none", 0
    whole_peak = held + max(phases.values())
    peak, unit = whole_peak, rows.of(rows.group)
    if shard == "full" or (shard == "auto" and whole_peak > footprint.planned):
        layers, closes = footprint.spread_over(processes.count), stage != "trpo"
        alike = kind | {"shares": False, "checkpointed": recipe.optim.checkpoint_layers == "always"} if closes else kind
        closed = trained(alike)     # passes of all processes at once, of one kind
        pieces = spread(layers, merged, held, phases | closed, closed if closes else ())
        spread_peak = pieces[0] + max(pieces[1].values())
        if shard == "full" or spread_peak < whole_peak:
            shard, peak, gathered, kind, (held, phases) = "full", spread_peak, layers.gathered, alike, pieces
    return {
        "processes": processes.count, "processes_on_a_device": processes.on_a_device,
        "shard": "full" if shard == "full" else "none", "whole_peak": whole_peak,
        "parameters": {"all": numbers(policy, trained=False), "trained": numbers(policy, trained=True)},
        "there": int(there), "planned": int(footprint.planned), "held": held, "phases": phases, "peak": peak,
        "fits": peak <= footprint.planned, "trained_at_once": size, "tokens_of_a_row": rows.length,
        "checkpointed": kind["checkpointed"],
        "largest_micro_batch": footprint.largest(unit, held + gathered, **kind),
    }


def training_phases(
    recipe: Recipe, footprint: Footprint, sizes: Sizes, rows: Rows, size: int, kind: dict[str, Any]
) -> dict[str, int]:
    """Training on so many rows at once, and where DPO's KL has a price on responses too, each beside what is kept.

    kind: arguments of ``Footprint.training``.
    """
    phases = {"train": footprint.training(rows.of(size), **kind) + kept_of(recipe, footprint, sizes, rows.count, size)}
    if recipe.stage == "dpo" and exact_kl_is_priced(recipe):
        *_, step = answered_rows(recipe, sizes)
        part, _ = footprint.micro_rows(step, recipe.optim.micro_batch_size)
        own = kind | {"accumulates": True, "beside": 1}
        phases["KL"] = footprint.training(step.of(part), **own) + kept_of(recipe, footprint, sizes, part)
    return phases


def kept_of(recipe: Recipe, footprint: Footprint, sizes: Sizes, *selected: int) -> int:
    """Hidden states that the rollout of a step keeps, and those of some rows that are selected from it."""
    section, priced = getattr(recipe, recipe.stage, None), exact_kl_is_priced(recipe)
    if not (recipe.stage in SAMPLED or priced):
        return 0
    *_, step = answered_rows(recipe, sizes)
    by_head = getattr(section, "baseline", None) == "value" and section.value_function == "head"
    states = priced + (recipe.stage == "trpo" or (recipe.stage == "distill" and not section.served)) + by_head
    return footprint.kept(step, states) + sum(footprint.kept(step.of(some), states) for some in {*selected})


def spread(
    layers: Spread, merged: int, held: int, phases: Mapping[str, int], closed: Iterable[str]
) -> tuple[int, dict[str, int]]:
    """What is held, and the phases, of a process that keeps a piece of each layer.

    Phases that are not ``closed`` gather all layers beside the pieces, and have the ``merged`` ones, which are held
    otherwise; closed ones gather one at a time.
    """
    phases = {**phases, "gather": 0}        # in a stage that neither samples nor measures KL, to evaluate
    more = dict.fromkeys(phases, layers.whole + merged) | dict.fromkeys(closed, layers.gathered)
    return held - merged - layers.whole + layers.pieces, {name: size + more[name] for name, size in phases.items()}


def shard_of(recipe: Recipe) -> tuple[str, str | None]:
    """What ``run.shard`` comes to among the processes that run, and a line on why where the recipe does not say it."""
    wanted = recipe.run.shard
    if wanted == "none":
        return wanted, None
    if ranks.size() == 1:
        return "none", f"run.shard: {wanted} is none: one process has nobody to share with"
    if recipe.lora is None:
        return "none", f"run.shard: {wanted} is none: lora: null trains all weights, and only frozen ones are spread"
    if wanted == "full":
        return wanted, None
    doing("estimating memory")
    memory = plan(recipe)["memory"]
    return memory["shard"], shard_line(memory)


def shard_line(memory: Mapping[str, Any]) -> str:
    """Why ``run.shard: auto`` came to what it did."""
    there = f"{memory['planned'] / GB:.2f} GB are planned with"
    whole, peak = (f"{memory[name] / GB:.2f} GB" for name in ("whole_peak", "peak"))
    start = f"run.shard: auto is {memory['shard']}: with a whole base each of {memory['processes']} processes takes"
    if memory["shard"] == "full":
        also = "" if memory["fits"] else ", which does not fit either"
        return f"{start} {whole} at the peak, where {there}; with pieces {peak}{also}"
    also = "" if memory["fits"] else ", and pieces would take no less, for sampling and measuring gather them"
    return f"{start} {whole} at the peak, where {there}{also}"


def measured_only(footprint: Footprint, sizes: Sizes, recipe: Recipe) -> dict[str, Any]:
    """The same of ``eval-kl``, which trains nothing."""
    held = footprint.weights + footprint.merged
    some = Rows(RESPONSES_PER_PASS, sizes.asked, recipe.sampling.max_new_tokens)
    phases = {"sample": footprint.sampling(some), "measure": footprint.measuring(some, by_token=True)}
    peak = held + max(phases.values())
    return {"there": int(footprint.there), "planned": int(footprint.planned), "held": held, "phases": phases,
            "peak": peak, "fits": peak <= footprint.planned}


def answered_rows(recipe: Recipe, sizes: Sizes) -> Iterator[Rows]:
    """Batches of responses: those of an evaluation and, where a step samples, of a step."""
    sampling = recipe.sampling
    count = min(RESPONSES_PER_PASS, recipe.eval.responses)
    yield Rows(count, sizes.asked, sampling.max_new_tokens)
    kl = getattr(recipe, "kl", None)
    if recipe.stage in SAMPLED or (kl is not None and (kl.control == "target" or kl.beta or kl.hard_cap)):
        each = sampling.responses_per_prompt
        yield Rows(sampling.prompts_per_step * each, sizes.asked, sampling.max_new_tokens, each)


def exact_kl_is_priced(recipe: Recipe) -> bool:
    """Whether a loss has the exact KL in it, for which the reference's hidden states are kept."""
    kl = getattr(recipe, "kl", None)
    if recipe.stage == "dpo":
        return kl.control == "target" or kl.beta != 0
    return recipe.stage == "distill" or (recipe.stage == "ppo" and kl.placement == "loss" and kl.estimator == "exact")


def copies_of(recipe: Recipe, steps: int) -> float:
    """Bytes a trained number of copies to go back to, and of what an update keeps beside its gradient."""
    kl, scored = getattr(recipe, "kl", None), bool(getattr(recipe, "reward", ())) or recipe.eval.gold is not None
    capped = kl is not None and kl.hard_cap is not None
    total = 2 * MOMENTS if capped else 0
    if scored and (capped or recipe.run.eval_every <= steps):
        total += MOMENTS
    total += 4 if recipe.eval.stop_at_gold_peak else 0
    total += VECTORS if recipe.stage == "trpo" else 0
    if recipe.stage == "dpo":
        total += 4 * (recipe.dpo.reference_alpha is not None) + 4 * (kl.control == "target" or kl.beta != 0)
    return total


def scorer_bytes(recipe: Recipe) -> int:
    """Bytes of the files of scorers that are here; one that is a name on the hub is not known."""
    entries = scorers_of(recipe).values()
    folders = [Path(entry.path) for entry in entries if isinstance(entry, ModelReward | ClassifierReward)]
    return sum(file.stat().st_size for folder in folders if folder.is_dir() for file in folder.glob("*.safetensors"))


def teacher_bytes(recipe: Recipe) -> int:
    """Bytes of the files of the teacher of a distillation; one that is a name on the hub is not known."""
    if not isinstance(recipe, DistillRecipe) or not Path(recipe.distill.teacher).is_dir():
        return 0
    return sum(file.stat().st_size for file in resolve_checkpoint(recipe.distill.teacher).glob("*.safetensors"))


def numbers(policy: Policy, *, trained: bool) -> int:
    """Parameters of the model with its adapters, or those that are trained."""
    own = [*policy.trainable_parameters().values(), *policy.value_parameters().values()]
    return sum(tensor.numel() for tensor in (own if trained else policy.model.parameters()))


def disk_of(recipe: Recipe, policy: Policy) -> dict[str, int]:
    """Bytes that a run leaves in its folder at most, and those that are free there."""
    trained = numbers(policy, trained=True)
    checkpoint = trained * (4 + 8)
    folder = Path(recipe.run.output)
    while not folder.exists():
        folder = folder.parent
    return {"needed": checkpoint * (recipe.run.keep + 1) + 4 * trained, "free": shutil.disk_usage(folder).free}


def plans_for(model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each stage would take on a model with its default keys, on rows of a usual length; raises as ``plan``."""
    section, device = ModelSection(path=model), pick_device("auto")
    for stage, data in MODEL_STAGES.items():
        recipe = STAGES["sft" if stage == "eval-kl" else stage].model_validate(
            {"stage": "sft" if stage == "eval-kl" else stage, "model": {"path": model}, "data": data}
        )
        policy = empty_policy(section, recipe.lora, device=device)
        context = (policy.max_context or ASKED + ANSWERED) - 1
        prompt, response = min(ASKED, context // 2), min(ANSWERED, context - context // 2)
        said = recipe.sampling.model_copy(update={"max_new_tokens": response})
        recipe = recipe.model_copy(update={"sampling": said})
        count, group = (64, 1) if stage in ("ppo", "trpo") else (2 * recipe.optim.batch_size, 2)
        sizes = Sizes(count, count, Rows(count, prompt, response, group), prompt, count * (prompt + response))
        yield stage, memory_of(
            recipe, policy, sizes, there=device_bytes(device), device=device.type, steps=1, trains=stage != "eval-kl"
        )
