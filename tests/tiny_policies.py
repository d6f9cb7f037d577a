"""Models of a few thousand random weights, one of each kind that matters, and plain numbers to hold against kltune.

Nothing that computes a number here uses kltune: the logits come from the transformers model as it is, and all that
follows is float64.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

BOS, EOS, UNKNOWN = 0, 1, 2
VOCABULARY = 40
CONTEXT = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,  # the usual 0.02 makes every distribution nearly uniform, and most mistakes invisible
}
SPECIAL = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}


def tiny_config(architecture: str) -> PreTrainedConfig:
    """What is special about each: see the line."""
    if architecture == "llama":
        return LlamaConfig(**SIZES, **SPECIAL)
    if architecture == "gpt2":  # learned positions, tied head, Conv1D layers, and dropout 0.1 in the config
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
        return GPT2Config(vocab_size=VOCABULARY, initializer_range=0.15, **sizes, **SPECIAL)
    if architecture == "gemma2":  # a soft cap behind the head, a sliding window of 8
        return Gemma2Config(
            **SIZES,
            **SPECIAL,
            head_dim=8,
            final_logit_softcapping=2.0,
            attn_logit_softcapping=5.0,
            sliding_window=8,
            query_pre_attn_scalar=8,
        )
    if architecture == "qwen3":  # norms on queries and keys
        return Qwen3Config(**SIZES, **SPECIAL, head_dim=8, tie_word_embeddings=True)
    if architecture == "granite":  # the head's output is divided by logits_scaling
        return GraniteConfig(**SIZES, **SPECIAL, logits_scaling=4.0, embedding_multiplier=2.0)
    if architecture == "cohere":  # the head's output is multiplied by logit_scale
        return CohereConfig(**SIZES, **SPECIAL, logit_scale=0.25)
    raise ValueError(architecture)


ARCHITECTURES = ("llama", "gpt2", "gemma2", "qwen3", "granite", "cohere")


def word_tokenizer(words: int = VOCABULARY - 3) -> PreTrainedTokenizerFast:
    """Words "w3", "w4", ... split at spaces; nothing is put around a text, and there is no padding token."""
    vocabulary = {"<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN} | {f"w{i}": i for i in range(3, 3 + words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=CONTEXT
    )


def random_model(config: PreTrainedConfig, seed: int = 0) -> nn.Module:
    """A causal model with random weights, biases and norms included, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.dim() == 1:
                    tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def save_tiny_model(folder: Path, architecture: str = "llama", seed: int = 0, **config_changes) -> Path:
    """A model and its tokenizer as a folder that ``from_pretrained`` opens."""
    config = tiny_config(architecture)
    config.update(config_changes)
    random_model(config, seed).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def randomize(parameters: dict[str, Tensor], seed: int = 1, spread: float = 0.15) -> None:
    """Give trainable tensors random values, as if they had been trained for long."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in parameters.values():
            tensor.copy_(spread * torch.randn(tensor.shape, generator=generator))


def random_batch(rows: int = 5, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Right-padded sequences of unequal length, and which of their tokens are scored (a run at the end of each)."""
    numbers = np.random.default_rng(seed)
    lengths = numbers.integers(6, 24, size=rows)
    ids = torch.full((rows, int(lengths.max())), EOS)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.from_numpy(numbers.integers(0, VOCABULARY, size=length))
        scored[row, numbers.integers(1, length) : length] = True
    return ids, scored


def plain_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's own logits, float64; position i − 1 predicts token i, so the last is left out. [B, S − 1, V]."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[:, :-1].double()


def plain_logprobs(model: nn.Module, ids: Tensor, scored: Tensor, temperature: float = 1.0) -> Tensor:
    """log π of the scored tokens from the full logits. [N] float64."""
    table = torch.log_softmax(plain_logits(model, ids) / temperature, -1)
    return table.gather(-1, ids[:, 1:, None])[..., 0][scored[:, 1:]]


def plain_distributions(model: nn.Module, ids: Tensor, scored: Tensor, temperature: float = 1.0) -> Tensor:
    """log π of every word at the scored positions. [N, V] float64."""
    return torch.log_softmax(plain_logits(model, ids) / temperature, -1)[scored[:, 1:]]


def plain_sample(
    model: nn.Module, prompt: Sequence[int], uniforms: Sequence[float], end_ids: Sequence[int], temperature: float = 1.0
) -> list[int]:
    """One response, the whole sequence through the model for every token: the inverse of the CDF at each number."""
    ids, response = list(prompt), []
    for uniform in uniforms:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double() / temperature
        cumulative = np.cumsum(torch.softmax(logits, -1).numpy())
        word = int(np.argmax(cumulative > uniform * cumulative[-1]))
        ids.append(word)
        response.append(word)
        if word in end_ids:
            break
    return response
