"""What a model takes on other machines than this one: memory, bytes on the wire, seconds of each phase, what bounds it.

    python scripts/plan.py CONFIG... [--gpus 1 8 64] [--memory 80] [--hbm 3350] [--tflops 400] [--wire 50]

CONFIG is a model's folder or its config.json; no weights are read. An estimate: parameters, adapters, keys and values
are counted; what a backward pass keeps was fitted to five shapes of Llama (tests/test_plan.py holds it within 10 % of
what is measured); seconds follow from the rates that are given, of which --efficiency is reached.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GRADIENT_BYTES = 8      # gradients are added up over processes in float64
ADAPTER_BYTES = 4 + 4 + 8 + 8       # per number: weight, gradient, Adam's moments, the sum in float64; in float32
BACKWARD = 1.7          # times what a forward pass keeps: the peak of the backward pass over it
MICRO_TOKENS = 4096     # trained on at once
CACHE = 1.5             # times the keys and values: room to grow


@dataclass(frozen=True)
class Shape:
    """A model with an adapter of a rank on all linear layers but the head. Counts of numbers; per token: floats."""

    name: str
    parameters: int
    adapter: int
    layers: int
    hidden: int
    cache_per_token: int
    kept_per_token: int


@dataclass(frozen=True)
class Work:
    """A step of PPO with a value function: responses of so many tokens after prompts of so many, passes over them.

    minibatch: responses an update, of which each adds up gradients over the GPUs.
    """

    responses: int
    prompt: int
    tokens: int
    epochs: int
    minibatch: int

    @property
    def updates(self) -> int:
        """Of policy and value function each."""
        return self.epochs * math.ceil(self.responses / self.minibatch)

    @property
    def all_tokens(self) -> int:
        """That a pass over the step reads."""
        return self.responses * (self.prompt + self.tokens)


@dataclass(frozen=True)
class Machine:
    """A GPU and what joins it to others: GiB, GB/s, TFLOP/s, GB/s per GPU; efficiency: share of the rates reached."""

    memory: float
    hbm: float
    tflops: float
    wire: float
    efficiency: float
    number_bytes: int = 2


def shape_of(config_path: Path, rank: int) -> Shape:
    """Count a model by its config, on no device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = config_path.parent if config_path.is_file() else config_path
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head]
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys = (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * width
    inner = getattr(text, "intermediate_size", 4 * text.hidden_size)
    return Shape(
        folder.name, sum(tensor.numel() for tensor in model.parameters()),
        sum(rank * (part.in_features + part.out_features) for part in linear), text.num_hidden_layers,
        text.hidden_size, 2 * text.num_hidden_layers * keys,
        text.num_hidden_layers * (6 * text.hidden_size + 4 * inner + 2 * keys + 10 * rank),
    )


def plan(shape: Shape, work: Work, machine: Machine, gpus: int, adapters: int = 2) -> dict[str, float | str]:
    """One row: bytes and seconds of a step on so many GPUs, each with the whole base.

    adapters: the policy's and the value function's.
    """
    size, rows = machine.number_bytes, math.ceil(work.responses / gpus)
    base = size * shape.parameters
    trained = ADAPTER_BYTES * adapters * shape.adapter
    cache = CACHE * size * shape.cache_per_token * rows * (work.prompt + work.tokens)
    kept = BACKWARD * size * shape.kept_per_token * min(MICRO_TOKENS, math.ceil(work.all_tokens / gpus))
    memory = base + trained + max(cache, kept)
    sent = GRADIENT_BYTES * shape.adapter * adapters * work.updates * 2 * (gpus - 1) / gpus
    flops, reads = machine.tflops * 1e12 * machine.efficiency, machine.hbm * 1e9 * machine.efficiency
    share = rows * (work.prompt + work.tokens)
    per_token = max(base / reads, 2 * shape.parameters * rows / flops)      # a decoding step reads all weights
    seconds = {
        "sample": work.tokens * per_token + 2 * shape.parameters * rows * work.prompt / flops,
        "measure": 3 * 2 * shape.parameters * share / flops,        # policy, reference, values
        "update": work.epochs * adapters * 4 * shape.parameters * share / flops,     # no gradients of frozen weights
        "wire": sent / (machine.wire * 1e9),
    }
    slowest = max(seconds, key=seconds.get)
    reading = slowest == "sample" and per_token == base / reads
    bound = {"sample": "reading weights" if reading else "compute", "wire": "the wire"}.get(slowest, "compute")
    if memory > machine.memory * 2**30:
        bound = "does not fit: a server for sampling, or a smaller model"
    elif rows == 1 and gpus > work.responses:
        bound = "too few responses to share"
    whole = sum(seconds.values())
    return {
        "gpus": gpus, "memory_gib": memory / 2**30, "sent_mb": sent / 1e6, "seconds": whole,
        "responses_per_second": work.responses / whole, "bound": bound,
        **{f"{name}_share": spent / whole for name, spent in seconds.items()},
    }


def table(shape: Shape, rows: Sequence[dict[str, float | str]]) -> str:
    """The rows of a shape as text."""
    lines = [
        f"{shape.name}: {shape.parameters:,} parameters, {shape.adapter:,} in an adapter "
        f"({2 * shape.adapter / 1e6:.3g} MB in bfloat16)",
        f"{'GPUs':>6}{'GiB each':>10}{'sent MB':>10}{'s a step':>10}{'resp./s':>9}  sample measure update wire  bound",
    ]
    for row in rows:
        parts = "".join(f"{row[f'{name}_share']:>7.0%}" for name in ("sample", "measure", "update", "wire"))
        lines.append(
            f"{row['gpus']:>6}{row['memory_gib']:>10.1f}{row['sent_mb']:>10.1f}{row['seconds']:>10.3g}"
            f"{row['responses_per_second']:>9.3g}{parts}  {row['bound']}"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table of each model, or all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 8, 64, 256, 1000])
    parser.add_argument("--memory", type=float, default=80.0, help="GiB of a GPU")
    parser.add_argument("--hbm", type=float, default=3350.0, help="GB/s of its memory")
    parser.add_argument("--tflops", type=float, default=990.0, help="TFLOP/s in the weights' type")
    parser.add_argument("--wire", type=float, default=50.0, help="GB/s between GPUs, each way")
    parser.add_argument("--efficiency", type=float, default=0.4, help="share of the rates that is reached")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--responses", type=int, default=512, help="in a step")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--tokens", type=int, default=256, help="of a response")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatch", type=int, default=64, help="responses an update")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    machine = Machine(asked.memory, asked.hbm, asked.tflops, asked.wire, asked.efficiency)
    work = Work(asked.responses, asked.prompt, asked.tokens, asked.epochs, asked.minibatch)
    shapes = [shape_of(config, asked.rank) for config in asked.configs]
    plans = {shape: [plan(shape, work, machine, gpus) for gpus in asked.gpus] for shape in shapes}
    if asked.json:
        print(json.dumps({shape.name: rows for shape, rows in plans.items()}, indent=2))
    else:
        print("\n\n".join(table(shape, rows) for shape, rows in plans.items()))


if __name__ == "__main__":
    main()
