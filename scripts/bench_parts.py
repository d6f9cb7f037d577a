"""What the benchmarks share: models to measure on, memory, a process for each row, and the floor under it."""

import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path


def memory_mb(which: str) -> float:
    """The process's resident set, MB: VmRSS now, VmHWM its largest since the last reset."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(which)) / 1024


def reset_peak() -> None:
    """Start counting the peak again from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def stamped(threads: int) -> dict[str, str | int]:
    """Of which commit figures are, and when and on what they were measured."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True,
                         text=True, check=False)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "commit": git.stdout.strip() or "unknown", "date": f"{datetime.now(UTC):%Y-%m-%d}", "threads": threads,
        "machine": f"{processor}, {os.cpu_count()} cores",
    }


def counted(work: Callable[[], object]) -> dict[str, int]:
    """What some work costs in numbers that do not depend on the machine's mood.

    kernels: operations that compute, not views. waits: those for which a GPU would have to be waited for. largest:
    elements of the largest tensor that was made.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    waiting = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2"}
    counts = {"kernels": 0, "waits": 0, "largest": 0}

    class Counting(TorchDispatchMode):
        """Sees every operation below autograd, those of backward passes included."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            """Run the operation and count it."""
            out = func(*args, **(kwargs or {}))
            if not func.is_view:
                counts["kernels"] += 1
                counts["waits"] += func.overloadpacket.__name__ in waiting
                sizes = (leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
                counts["largest"] = max(counts["largest"], *sizes, 0)
            return out

    with Counting():
        work()
    return counts


def random_llama(
    folder: Path, *, hidden: int, layers: int, vocabulary: int, dtype: str = "float32", logits: float | None = None,
    **shape: int | bool,
) -> Path:
    """A Llama of random weights and a tokenizer of as many words.

    Args:
        logits: standard deviation that its logits have, as a trained model's; None leaves them near 0.
        shape: keys of its configuration besides these, as ``num_key_value_heads``.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    settings = {
        "intermediate_size": 4 * hidden, "num_attention_heads": max(1, hidden // 64), "max_position_embeddings": 1024,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, dtype=dtype, **(settings | shape)
    ))
    if logits is not None:      # what the last norm gives the head has components of size 1
        model.lm_head.weight.data.normal_(std=logits / hidden**0.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def open_policy(model: str, responses: int, prompt_tokens: int):
    """A policy with a LoRA on all linear layers that does something, and random prompts for it."""
    import torch

    from kltune.lm.data.examples import Prompt
    from kltune.lm.model.loading import pick_device
    from kltune.lm.model.opening import load_policy
    from kltune.recipe import LoraSection, ModelSection

    torch.manual_seed(0)
    policy = load_policy(ModelSection(path=model), LoraSection(), device=pick_device("auto"))
    for name, tensor in policy.trainable_parameters().items():
        if "lora_B" in name:
            tensor.data.normal_(std=0.01)
    ids = torch.randint(2, policy.network.vocabulary, (responses, prompt_tokens)).tolist()
    return policy, [Prompt(tuple(row), "", "bench") for row in ids]


def products_seconds(policy, rows: int, steps: int = 1, *, of_head: bool) -> float:
    """Seconds of the trunk's matrix products over so many positions, or the head's; ``steps`` times over."""
    import torch
    from torch.nn.functional import linear

    head = policy.network.head
    with policy.network.merged():
        weights = [
            module.weight for module in policy.network.causal.modules()
            if isinstance(module, torch.nn.Linear) and (module is head) == of_head
        ]
    inputs = {weight: torch.randn(rows, weight.shape[1]).to(weight) for weight in weights}
    began = time.perf_counter()
    with torch.no_grad():
        for _ in range(steps):
            for weight in weights:
                last = linear(inputs[weight], weight)
        last.sum().item()  # waits for a GPU
    return time.perf_counter() - began


def decoding_floor(policy, responses: int, new_tokens: int) -> float:
    """Seconds of the products of so many decoding steps."""
    return sum(products_seconds(policy, responses, new_tokens, of_head=head) for head in (False, True))


def scoring_floor(policy, tokens: int, scored: int, passes: float, head_passes: float) -> float:
    """Seconds of the products of passes over whole sequences, the head on scored positions only."""
    trunk, head = products_seconds(policy, tokens, of_head=False), products_seconds(policy, scored, of_head=True)
    return passes * trunk + head_passes * head


def in_own_process(function, *arguments) -> dict:
    """Call a function in a fresh process: its memory is not that of the rows before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)
