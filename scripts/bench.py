"""How fast and how large: one row per piece of work, on the model and shape that are asked for.

    python scripts/bench.py sample --model MODEL [--responses 128] [--new-tokens 64]
    python scripts/bench.py eval-kl --model MODEL [--responses 64 256 1024] [--vocabulary 32000] [--new-tokens 64]
    python scripts/bench.py ppo trpo --model MODEL [--responses 128] [--set ppo.epochs=4]...

``sample`` draws responses of full length; its floor is the model's matrix products alone, timed beside it. Then it
draws ragged ones, which end at tokens chosen for a mean length of a quarter of the limit: what a token costs there,
against full length. ``ppo`` and ``trpo`` are whole steps of a run with the recipe's defaults, as the run times them.
Without --model a random Llama of the asked shape is made. Prints a table; --json prints one JSON document. Each row is
measured in a process of its own after one warm-up, the median of --repeat; peak memory is that of the process above
what it held once the model was loaded. Ratios of rows of one run mean something, seconds of different days do not.
"""

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

PROMPT_TOKENS = 12


def memory_mb(which: str) -> float:
    """The process's resident set, MB: VmRSS now, VmHWM its largest since the last reset."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(which)) / 1024


def reset_peak() -> None:
    """Start counting the peak again from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def random_llama(folder: Path, *, hidden: int, layers: int, vocabulary: int) -> Path:
    """A Llama of random weights and a tokenizer of as many words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64), max_position_embeddings=1024, bos_token_id=0, eos_token_id=1,
        pad_token_id=1, dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def open_policy(model: str, responses: int):
    """A policy with a LoRA on all linear layers that does something, and random prompts for it."""
    import torch

    from kltune.lm.data import Prompt
    from kltune.lm.loading import pick_device
    from kltune.lm.opening import load_policy
    from kltune.recipe import LoraSection, ModelSection

    torch.manual_seed(0)
    policy = load_policy(ModelSection(path=model), LoraSection(), device=pick_device("auto"))
    for name, tensor in policy.trainable_parameters().items():
        if "lora_B" in name:
            tensor.data.normal_(std=0.01)
    ids = torch.randint(2, policy.network.vocabulary, (responses, PROMPT_TOKENS)).tolist()
    return policy, [Prompt(tuple(row), "", "bench") for row in ids]


def products_seconds(policy, responses: int, steps: int) -> float:
    """Seconds of the matrix products of so many decoding steps, one after the other with nothing between them."""
    import torch
    from torch.nn.functional import linear

    with policy.network.merged.active():
        weights = [module.weight for module in policy.network.causal.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {weight: torch.randn(responses, weight.shape[1]).to(weight) for weight in weights}
    began = time.perf_counter()
    with torch.no_grad():
        for _ in range(steps):
            for weight in weights:
                last = linear(inputs[weight], weight)
        last.sum().item()  # waits for a GPU
    return time.perf_counter() - began


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


def sample_row(model: str, responses: int, new_tokens: int, repeat: int) -> dict:
    """Sampling alone: full length, then ragged, in turns; and the floor under the first."""
    import numpy as np

    from kltune.lm.sampler import sample, uniform_numbers

    policy, prompts = open_policy(model, responses)
    uniforms = uniform_numbers(np.random.default_rng(0), responses, new_tokens)
    policy.end_ids = (-1,)
    whole = sample(policy, prompts, uniforms, temperature=1.0)
    ends = {"full": (-1,), "ragged": ends_for(whole.ids[whole.scored].view(responses, -1).tolist(), new_tokens / 4)}
    seconds = {"full": [], "ragged": [], "floor": []}
    tokens = {}
    held = memory_mb("VmRSS")
    reset_peak()
    for _ in range(repeat):
        for kind, policy.end_ids in ends.items():
            began = time.perf_counter()
            tokens[kind] = int(sample(policy, prompts, uniforms, temperature=1.0).lengths.sum())
            seconds[kind].append(time.perf_counter() - began)
        seconds["floor"].append(products_seconds(policy, responses, new_tokens))
    median = {kind: statistics.median(found) for kind, found in seconds.items()}
    return {
        "work": "sample", "model": Path(model).name, "vocabulary": policy.network.vocabulary, "responses": responses,
        "tokens": tokens["full"], "seconds": median["full"], "range": [min(seconds["full"]), max(seconds["full"])],
        "responses_per_second": responses / median["full"], "tokens_per_second": tokens["full"] / median["full"],
        "share_of_floor": median["floor"] / median["full"], "ragged_seconds": median["ragged"],
        "ragged_tokens": tokens["ragged"],
        "ragged_token_cost": median["ragged"] / tokens["ragged"] / (median["full"] / tokens["full"]),
        "peak_mb_above_model": memory_mb("VmHWM") - held,
    }


def eval_kl_row(model: str, responses: int, new_tokens: int, repeat: int) -> dict:
    """Sampling and exact measuring of a policy with a LoRA on all linear layers: what ``kltune eval-kl`` does."""
    import torch

    from kltune.lm.measurement import Draw, measure_kl
    from kltune.lm.measures import VocabularySums

    policy, prompts = open_policy(model, responses)
    vocabulary = policy.network.vocabulary
    options = {"max_new_tokens": new_tokens, "temperature": 1.0, "seed": 0}
    measure_kl(policy, Draw.of(prompts[:8], 8), **options)
    seconds, tokens = [], 0
    held = memory_mb("VmRSS")
    reset_peak()
    for _ in range(repeat):
        began = time.perf_counter()
        measured = measure_kl(policy, Draw.of(prompts, responses), sums=VocabularySums.zero(vocabulary), **options)
        seconds.append(time.perf_counter() - began)
        tokens = int(measured.tokens.sum())
    whole = statistics.median(seconds)
    logits = 4 * tokens * vocabulary / 2**20
    row = {
        "work": "eval-kl", "model": Path(model).name, "vocabulary": vocabulary, "responses": responses,
        "tokens": tokens, "seconds": whole, "range": [min(seconds), max(seconds)],
        "responses_per_second": responses / whole, "tokens_per_second": tokens / whole,
        "peak_mb_above_model": memory_mb("VmHWM") - held, "mb_of_all_logits_of_one_model": logits,
    }
    if torch.cuda.is_available():
        row["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return row


SCORE = """def score(prompts, responses):
    return [len(set(response)) / 10 for response in responses]
"""


def step_row(stage: str, model: str, responses: int, new_tokens: int, repeat: int, changes: list[str]) -> dict:
    """Steps of a run of ``kltune ppo`` or ``trpo``, the first of them to warm up."""
    import importlib

    import numpy as np
    from transformers import AutoTokenizer

    from kltune.recipe import load_recipe

    module = importlib.import_module(f"kltune.stages.{stage}")
    inner = module.take_step
    held: list[float] = []

    def take_step(job, learner, step: int) -> None:
        """The stage's own, between what the process held before the first step and the peak so far."""
        if step == 1:
            held.append(memory_mb("VmRSS"))
            reset_peak()
        inner(job, learner, step)
        held.append(memory_mb("VmHWM"))

    module.take_step = take_step
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = AutoTokenizer.from_pretrained(model)
        ids = np.random.default_rng(0).integers(3, len(tokenizer), (responses, PROMPT_TOKENS))
        prompts = [json.dumps({"prompt": tokenizer.decode(row)}) for row in ids]
        (folder / "prompts.jsonl").write_text("\n".join(prompts))
        (folder / "rewards.py").write_text(SCORE)
        (folder / "recipe.yaml").write_text(
            f"stage: {stage}\nmodel: {{path: {model}}}\ndata: {{prompts: prompts.jsonl}}\n"
            f"sampling: {{prompts_per_step: {responses}, max_new_tokens: {new_tokens}}}\n"
            "reward: [{kind: function, path: rewards.py:score}]\n"
            f"run: {{steps: {repeat + 1}, output: run}}\neval: {{responses: 8}}\n"
        )
        with contextlib.redirect_stderr(io.StringIO()):
            getattr(module, f"run_{stage}")(load_recipe(folder / "recipe.yaml", overrides=changes), resume=False)
        rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()][1:]
    seconds = [row["time/step_seconds"] - row.get("time/eval_seconds", 0.0) for row in rows]
    whole = statistics.median(seconds)
    tokens = statistics.median(row["response/tokens"] for row in rows) * responses
    return {
        "work": stage, "model": Path(model).name, "responses": responses, "tokens": round(tokens), "seconds": whole,
        "range": [min(seconds), max(seconds)], "responses_per_second": responses / whole,
        "tokens_per_second": tokens / whole,
        "sample_seconds": statistics.median(row["time/sample_seconds"] for row in rows),
        "update_seconds": statistics.median(row["time/update_seconds"] for row in rows),
        "peak_mb_above_model": held[-1] - held[0],
    }


def in_own_process(function, *arguments) -> dict:
    """Call a function in a fresh process: its memory is not that of the rows before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    """Measure what was asked for and print it."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="+", choices=["sample", "eval-kl", "ppo", "trpo"])
    parser.add_argument("--model", help="a model folder; without one a random Llama is made")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--responses", type=int, nargs="+", default=[128])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="a recipe's key=value, for ppo and trpo")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = os.path.abspath(arguments.model) if arguments.model else str(random_llama(
            Path(folder) / f"llama-h{arguments.hidden}-l{arguments.layers}", hidden=arguments.hidden,
            layers=arguments.layers, vocabulary=arguments.vocabulary,
        ))
        rows = []
        for work, count in itertools.product(arguments.work, arguments.responses):
            common = (model, count, arguments.new_tokens, arguments.repeat)
            if work in ("ppo", "trpo"):
                rows.append(in_own_process(step_row, work, *common, arguments.set))
            else:
                rows.append(in_own_process(sample_row if work == "sample" else eval_kl_row, *common))
            print(f"{work}, {count} responses: {rows[-1]['seconds']:.2f} s", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"schema": "kltune.bench/1", "rows": rows}, indent=2))
        return
    columns = {
        "responses": "d", "tokens": "d", "seconds": ".2f", "sample_seconds": ".2f", "update_seconds": ".2f",
        "responses_per_second": ".1f", "tokens_per_second": ".0f", "peak_mb_above_model": ".0f",
        "mb_of_all_logits_of_one_model": ".0f", "share_of_floor": ".2f", "ragged_token_cost": ".2f",
    }
    print(f"{'work':<9}{'model':<16}" + "".join(f"{name.replace('_', ' '):>{len(name) + 2}}" for name in columns))
    for row in rows:
        cells = (format(row[name], shape) if name in row else "" for name, shape in columns.items())
        print(f"{row['work']:<9}{row['model']:<16}"
              + "".join(f"{cell:>{len(name) + 2}}" for cell, name in zip(cells, columns, strict=True)))


if __name__ == "__main__":
    main()
