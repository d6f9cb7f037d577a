"""How fast and how large: one row per piece of work, on the model and shape that are asked for.

    python scripts/bench.py sample score eval-kl --model MODEL [--responses 64 256 1024] [--new-tokens 64]
    python scripts/bench.py ppo trpo dpo distill --model MODEL [--responses 128] [--set ppo.epochs=4]...
    python scripts/bench.py --compare BEFORE.json AFTER.json

``sample`` draws responses of full length, then ragged ones, which end at tokens chosen for a mean length of a quarter
of the limit: what a token costs there, against full length, the pass over the prompts left out; on a GPU, also without
the captured graph. ``score`` teacher-forces responses through policy and reference for log-probabilities and exact KL;
``eval-kl`` samples them first. ``ppo``, ``trpo``, ``dpo`` and ``distill`` are whole steps of a run with the recipe's
defaults, as the run times them; two responses make a pair of ``dpo``, whose KL is not held here, and the teacher of
``distill`` is an adapter on the same weights. --set of a stage's own section is for that stage alone.

The floor under each is the model's own matrix products over as many positions, one after the other with nothing between
them, timed in the same process: one pass for each token decoded, one for policy and reference each to score a response,
two to train on one (once more for a value function's adapter); attention and the adapters' own products are not in it.

kernels and waits count operations, and those for which a GPU would be waited for, in one more repeat that is not timed:
they are the same on a busy machine. --compare says what moved between two documents of --json, here or of
``bench_peers.py``, and ends with 1 where a count grew.

Without --model a random Llama of the asked shape is made. Prints a table; --json prints one JSON document. Each row is
measured in a process of its own after one warm-up, the median of --repeat; peak memory is that of the process above
what it held once the model was loaded. Ratios of rows of one run mean something, seconds of different days do not.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench_compare import compare
from bench_parts import (
    counted,
    decoding_floor,
    in_own_process,
    memory_mb,
    open_policy,
    random_llama,
    reset_peak,
    scoring_floor,
    stamped,
)

STEPS = ("ppo", "trpo", "dpo", "distill")
WORKS = ("sample", "score", "eval-kl", *STEPS)


def ends_for(responses: list[list[int]], mean: float) -> tuple[int, ...]:
    """Tokens to end at, so that these responses would be about so long: the rarest of them, as many as it takes."""
    import bisect
    from collections import Counter

    import numpy as np

    drawn = np.array(responses)
    by_count = [token for token, _ in Counter(drawn.flatten().tolist()).most_common()][::-1]

    def length(ends: int) -> float:
        hit = np.isin(drawn, by_count[:ends])
        return float(np.where(hit.any(1), hit.argmax(1) + 1, drawn.shape[1]).mean())

    return tuple(by_count[: bisect.bisect_left(range(len(by_count)), -mean, key=lambda ends: -length(ends))])


def sample_row(model: str, responses: int, new_tokens: int, repeat: int, prompt_tokens: int) -> dict:
    """Sampling alone: full length, ragged, and on a GPU full length without the captured graph, in turns; the floor."""
    import numpy as np

    from kltune.lm.data.chat import EndTokens
    from kltune.lm.model.sampler import sample, uniform_numbers

    policy, prompts = open_policy(model, responses, prompt_tokens)
    uniforms = uniform_numbers(np.random.default_rng(0), responses, new_tokens)
    policy.ends = EndTokens((-1,), None)
    whole = sample(policy, prompts, uniforms, temperature=1.0)
    ends = {"full": (-1,), "ragged": ends_for(whole.ids[whole.scored].view(responses, -1).tolist(), new_tokens / 4)}
    captures = policy.network.fast.captures
    if captures:
        ends["uncaptured"] = (-1,)
    seconds, tokens = {kind: [] for kind in (*ends, "prompts", "floor")}, {}
    held = memory_mb("VmRSS")
    reset_peak()
    for _ in range(repeat):
        for kind, ids in ends.items():
            policy.ends = EndTokens(ids, None)
            policy.network.fast.captures = captures and kind != "uncaptured"
            began = time.perf_counter()
            tokens[kind] = int(sample(policy, prompts, uniforms, temperature=1.0).lengths.sum())
            seconds[kind].append(time.perf_counter() - began)
        began = time.perf_counter()
        sample(policy, prompts, uniforms[:, :1], temperature=1.0)
        seconds["prompts"].append(time.perf_counter() - began)
        seconds["floor"].append(decoding_floor(policy, responses, new_tokens))
    median = {kind: statistics.median(found) for kind, found in seconds.items()}
    full, ragged = ((median[kind] - median["prompts"]) / tokens[kind] for kind in ("full", "ragged"))
    row = {
        "work": "sample", "model": Path(model).name, "vocabulary": policy.network.vocabulary, "responses": responses,
        "tokens": tokens["full"], "seconds": median["full"], "range": [min(seconds["full"]), max(seconds["full"])],
        "responses_per_second": responses / median["full"], "tokens_per_second": tokens["full"] / median["full"],
        "share_of_floor": median["floor"] / median["full"], "ragged_seconds": median["ragged"],
        "ragged_tokens": tokens["ragged"], "prompts_seconds": median["prompts"], "ragged_token_cost": ragged / full,
        "peak_mb_above_model": memory_mb("VmHWM") - held,
        **counted(lambda: sample(policy, prompts, uniforms, temperature=1.0)),
    }
    return row | ({"uncaptured_seconds": median["uncaptured"]} if captures else {})


def score_row(model: str, responses: int, new_tokens: int, repeat: int, prompt_tokens: int) -> dict:
    """Teacher forcing alone: log-probabilities, exact KL and entropies of responses that are there already."""
    import torch

    policy, prompts = open_policy(model, responses, prompt_tokens)
    asked = torch.tensor([prompt.ids for prompt in prompts])
    ids = torch.cat([asked, torch.randint(2, policy.network.vocabulary, (responses, new_tokens))], dim=1)
    ids = ids.to(policy.device)
    scored = (torch.arange(ids.shape[1], device=ids.device) >= prompt_tokens).expand(ids.shape)
    policy.measure(ids[:8], scored[:8])
    seconds, floor = [], []
    held = memory_mb("VmRSS")
    reset_peak()
    for _ in range(repeat):
        began = time.perf_counter()
        policy.measure(ids, scored).ref_kl.sum().item()
        seconds.append(time.perf_counter() - began)
    peak = memory_mb("VmHWM") - held
    tokens = responses * new_tokens
    for _ in range(repeat):
        floor.append(scoring_floor(policy, ids.numel(), tokens, 2, 2))
    whole = statistics.median(seconds)
    return {
        "work": "score", "model": Path(model).name, "vocabulary": policy.network.vocabulary, "responses": responses,
        "tokens": tokens, "seconds": whole, "range": [min(seconds), max(seconds)],
        "responses_per_second": responses / whole, "tokens_per_second": tokens / whole,
        "share_of_floor": statistics.median(floor) / whole, "peak_mb_above_model": peak,
        **counted(lambda: policy.measure(ids, scored)),
        "mb_of_all_logits_of_one_model": 4 * tokens * policy.network.vocabulary / 2**20,
    }


def eval_kl_row(model: str, responses: int, new_tokens: int, repeat: int, prompt_tokens: int) -> dict:
    """Sampling and exact measuring of a policy with a LoRA on all linear layers: what ``kltune eval-kl`` does."""
    import torch

    from kltune.lm.measure.measurement import Round, measure_kl
    from kltune.lm.model.sampler import Draw

    policy, prompts = open_policy(model, responses, prompt_tokens)
    vocabulary = policy.network.vocabulary
    draw = Draw(new_tokens)
    measure_kl(policy, Round.of(prompts[:8], 8), draw)
    seconds, tokens = [], 0
    held = memory_mb("VmRSS")
    reset_peak()
    for _ in range(repeat):
        began = time.perf_counter()
        measured = measure_kl(policy, Round.of(prompts, responses), draw, by_token=True)
        seconds.append(time.perf_counter() - began)
        tokens = int(measured.tokens.sum())
    whole = statistics.median(seconds)
    logits = 4 * tokens * vocabulary / 2**20
    row = {
        "work": "eval-kl", "model": Path(model).name, "vocabulary": vocabulary, "responses": responses,
        "tokens": tokens, "seconds": whole, "range": [min(seconds), max(seconds)],
        "responses_per_second": responses / whole, "tokens_per_second": tokens / whole,
        "peak_mb_above_model": memory_mb("VmHWM") - held, "mb_of_all_logits_of_one_model": logits,
        **counted(lambda: measure_kl(policy, Round.of(prompts, responses), draw, by_token=True)),
    }
    if torch.cuda.is_available():
        row["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return row


SCORE = """def score(prompts, responses):
    return [len(set(response)) / 10 for response in responses]
"""


def write_recipe(
    folder: Path, stage: str, model: str, responses: int, new_tokens: int, steps: int, prompt_tokens: int
) -> Path:
    """A recipe of so many steps on random text, with the recipe's defaults for all that is not asked for."""
    import numpy as np
    from transformers import AutoTokenizer

    tokenizer, numbers = AutoTokenizer.from_pretrained(model), np.random.default_rng(0)

    readable = [number for number in range(3, len(tokenizer)) if tokenizer.decode([number]).isprintable()]

    def text(count: int) -> str:
        return tokenizer.decode(numbers.choice(readable, count))

    common = {
        "stage": stage, "model": {"path": model}, "run": {"steps": steps, "output": "run"}, "eval": {"responses": 8},
        "data": {"prompts": "prompts.jsonl"},
    }
    rows = [{"prompt": text(prompt_tokens)} for _ in range(responses)]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "rewards.py").write_text(SCORE)
    if stage == "dpo":
        pairs = [row | {"chosen": text(new_tokens), "rejected": text(new_tokens)} for row in rows[: responses // 2]]
        (folder / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
        recipe = common | {
            "data": {"pairs": "pairs.jsonl"}, "optim": {"batch_size": responses // 2},
            "kl": {"control": "fixed", "beta": 0}, "sampling": {"max_new_tokens": 8},
        }
    else:
        recipe = common | {
            "sampling": {"prompts_per_step": responses, "max_new_tokens": new_tokens},
        }
        recipe |= {"reward": [{"kind": "function", "path": "rewards.py:score"}]} if stage != "distill" else {}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def save_teacher(model: str, folder: str) -> str:
    """An adapter of random weights on a model, in a folder."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    return folder


def step_row(
    stage: str, model: str, responses: int, new_tokens: int, repeat: int, prompt_tokens: int, changes: list[str]
) -> dict:
    """Steps of a run of a stage, the first of them to warm up, the last to count."""
    import importlib

    from kltune.recipe import load_recipe
    from kltune.train.loop import Taken

    module = importlib.import_module(f"kltune.stages.{stage}")
    inner = module.take_step
    held: list[float] = []
    counts: dict[str, int] = {}

    def take_step(job, learner, step: int, **options) -> Taken:
        """The stage's own, between what the process held before the first step and the peak so far."""
        if step == 1:
            held.append(memory_mb("VmRSS"))
            reset_peak()
        if step == repeat + 2:
            taken = []
            counts.update(counted(lambda: taken.append(inner(job, learner, step, **options))))
            return taken[0]
        taken = inner(job, learner, step, **options)
        held.append(memory_mb("VmHWM"))
        return taken

    module.take_step = take_step
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_recipe(folder, stage, model, responses, new_tokens, repeat + 2, prompt_tokens)
        others = {*STEPS} - {stage}
        recipe = load_recipe(path, overrides=[one for one in changes if one.partition(".")[0] not in others])
        with contextlib.redirect_stderr(io.StringIO()):
            getattr(module, f"run_{stage}")(recipe, resume=False)
        rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()][1:-1]
    seconds = [row["time/step_seconds"] - row.get("time/eval_seconds", 0.0) for row in rows]
    whole = statistics.median(seconds)
    policy, _ = open_policy(model, 1, prompt_tokens)
    if stage == "dpo":
        tokens = responses * new_tokens
        positions, sampled = (responses // 2) * (prompt_tokens + 2 * new_tokens), 0.0
    else:
        tokens = round(statistics.median(row["response/tokens"] for row in rows) * responses)
        positions, sampled = responses * prompt_tokens + tokens, decoding_floor(policy, responses, new_tokens)
    floor = sampled + scoring_floor(policy, positions, tokens, *passes_of(recipe))
    return {
        "work": stage, "model": Path(model).name, "responses": responses, "tokens": tokens, "seconds": whole,
        "range": [min(seconds), max(seconds)], "responses_per_second": responses / whole,
        "tokens_per_second": tokens / whole, "share_of_floor": floor / whole,
        "sample_seconds": statistics.median(row.get("time/sample_seconds", 0.0) for row in rows),
        "update_seconds": statistics.median(row["time/update_seconds"] for row in rows),
        "peak_mb_above_model": held[-1] - held[0], **counts,
    }


def passes_of(recipe) -> tuple[float, float]:
    """How often one step of a stage goes through trunk and head at least, over all positions: (trunk, head).

    Forward is one pass and backward another; what is measured once, as the reference of dpo, is not in it. TRPO: the
    gradient, a product with the Fisher matrix of a share of the responses (as much as a gradient) for each iteration,
    one look along the line, and the value function's epochs.
    """
    if recipe.stage in ("dpo", "sft", "reward"):
        return 2, 0 if recipe.stage == "reward" else 2
    section = getattr(recipe, recipe.stage)
    if recipe.stage == "distill":       # policy, reference and teacher
        return 3 + 2 * section.epochs, 3 + 2 * section.epochs
    values, below = section.baseline == "value" and section.value_function != "head", 0
    if section.value_function == "upper":       # what is below is read once
        values, below = values * section.value_layers, values * (1 - section.value_layers)
    if recipe.stage == "ppo":
        return 2 + 2 * section.epochs + below + values * (1 + 2 * section.epochs), 2 + 2 * section.epochs
    policy = 2 + 2 + 2 * section.cg_iterations * section.fisher_fraction + 1
    return policy + below + values * (1 + 2 * section.value_epochs), policy


def main() -> None:
    """Measure what was asked for and print it."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="*", metavar="WORK", help=f"of {', '.join(WORKS)}")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="documents of --json")
    parser.add_argument("--model", help="a model folder; without one a random Llama is made")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--dtype", default="float32", help="of a random Llama")
    parser.add_argument("--responses", type=int, nargs="+", default=[128])
    parser.add_argument("--prompt-tokens", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="a recipe's key=value, for whole steps")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.compare:
        raise SystemExit(compare(*arguments.compare))
    if not arguments.work or set(arguments.work) - set(WORKS):
        parser.error(f"wanted WORK, one or more of {', '.join(WORKS)}; or --compare")
    with tempfile.TemporaryDirectory() as folder:
        model = os.path.abspath(arguments.model) if arguments.model else str(random_llama(
            Path(folder) / f"llama-h{arguments.hidden}-l{arguments.layers}", hidden=arguments.hidden,
            layers=arguments.layers, vocabulary=arguments.vocabulary, dtype=arguments.dtype,
        ))
        rows, changes = [], arguments.set
        if "distill" in arguments.work:     # in another process than the one that is measured
            teacher = in_own_process(save_teacher, model, str(Path(folder) / "teacher"))
            changes = [*changes, f"distill.teacher={teacher}"]
        for work, count in itertools.product(arguments.work, arguments.responses):
            common = (model, count, arguments.new_tokens, arguments.repeat, arguments.prompt_tokens)
            if work in STEPS:
                rows.append(in_own_process(step_row, work, *common, changes))
            else:
                row_of = {"sample": sample_row, "score": score_row, "eval-kl": eval_kl_row}[work]
                rows.append(in_own_process(row_of, *common))
            print(f"{work}, {count} responses: {rows[-1]['seconds']:.2f} s", file=sys.stderr)
    if arguments.json:
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count())
        print(json.dumps({"schema": "kltune.bench/2", **stamped(threads), "rows": rows}, indent=2))
        return
    shapes = {
        "responses": "d", "tokens": "d", "seconds": ".2f", "sample_seconds": ".2f", "update_seconds": ".2f",
        "responses_per_second": ".1f", "tokens_per_second": ".0f", "peak_mb_above_model": ".0f",
        "mb_of_all_logits_of_one_model": ".0f", "share_of_floor": ".2f", "ragged_token_cost": ".2f",
        "uncaptured_seconds": ".2f", "kernels": "d", "waits": "d",
    }
    columns = {name: shape for name, shape in shapes.items() if any(name in row for row in rows)}
    print(f"{'work':<9}{'model':<16}" + "".join(f"{name.replace('_', ' '):>{len(name) + 2}}" for name in columns))
    for row in rows:
        cells = (format(row[name], shape) if name in row else "" for name, shape in columns.items())
        print(f"{row['work']:<9}{row['model']:<16}"
              + "".join(f"{cell:>{len(name) + 2}}" for cell, name in zip(cells, columns, strict=True)))


if __name__ == "__main__":
    main()
