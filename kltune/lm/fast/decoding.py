"""Fused one-token step for Llama-family trunks, and a KV cache that grows in place.

A decoding step of a small model, or of few rows, is bookkeeping: masks and angles made anew, wrappers, arguments handed
through. The step here does the same arithmetic, in float32 to rounding, and one row of a 260,000-parameter model takes
0.7 ms instead of 2.0. That part is paid per step and not per row, so it is what a batch costs whose responses have
mostly ended. Whether it fits a model is tried (``can_decode``), and others take their own way.

transformers' DynamicCache concatenates at every token, which reads and writes the whole cache each time, into fresh
memory; for 128 responses of a six-layer model that took a quarter of all sampling.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from kltune.core.products import linear_of
from kltune.core.tensors import close
from kltune.lm.fast.lora import EXACT
from kltune.lm.fast.shared_prefix import attends_to_all

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # pre-norm layers of plain attention with rotary positions
MOVING_ANGLES = ("dynamic", "longrope")  # of rotary positions that depend on how long the longest row is by now
Step = Callable[[Tensor, Tensor, Tensor, Cache], tuple[Tensor, Cache]]  # ids, mask, positions, cache -> logits, cache
GROWTH = 32  # tokens to grow by: the cache is copied once in so many steps


class GrowingDecoder:
    """Feeds rows that have read their prompts one token at a time; the cache grows in place, rows can be dropped."""

    compact_below = 0.8  # drop finished rows from the cache once fewer than this share is still going

    def __init__(self, step: Step, cache: Cache, mask: Tensor, limit: int):
        """Take over a cache of left-padded prompts, and feed each row at most ``limit`` tokens by ``step``.

        mask: 0 on the padding of prompts. [R, width].
        """
        give_room(cache)
        self._step, self._cache = step, cache
        self._read, self._next = mask.shape[1], mask.sum(dim=1, keepdim=True)
        self._mask = torch.cat([mask, mask.new_ones(len(mask), limit)], dim=1)

    def feed(self, ids: Tensor) -> Tensor:
        """One more token for each row: the logits after it. [R] -> [R, V]."""
        self._read += 1
        logits, self._cache = self._step(ids[:, None], self._mask[:, : self._read], self._next, self._cache)
        self._next = self._next + 1
        return logits

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self._cache.reorder_cache(rows)
        self._mask, self._next = self._mask[rows], self._next[rows]


class FusedStep:
    """Fused one-token step for Llama-family trunks, made for one batch: it holds the weights as they are then."""

    def __init__(self, trunk: nn.Module, positions: int):
        """Take a model of one of ``FAMILIES`` without its head, and how many positions a row may have."""
        words = trunk.embed_tokens
        self._embed = words if isinstance(words, BaseTunerLayer) else partial(F.embedding, weight=words.weight)
        places = torch.arange(positions, device=words.weight.device)[None]
        cos, sin = (table[0] for table in trunk.rotary_emb(words.weight[:1], places))
        front, back = sin.chunk(2, dim=-1)
        self._cos, self._sin = cos, torch.cat([-front, back], dim=-1)   # so that halves are swapped and not negated
        self._layers = [_Layer(layer) for layer in trunk.layers]
        self._norm = _normed(trunk.norm)

    def __call__(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache) -> Tensor:
        """Feed one token to each row and extend the cache of the S − 1 before by it: last hidden states. [B, H].

        ids, position_ids: of the new tokens. [B, 1]. attention_mask: 0 on the padding of prompts. [B, S].
        """
        hidden = self._embed(ids.squeeze(1))
        turned = self._cos[position_ids], self._sin[position_ids]
        unseen = torch.zeros(attention_mask.shape, dtype=hidden.dtype, device=hidden.device)
        unseen = unseen.masked_fill_(attention_mask == 0, float("-inf"))[:, None, None]
        for layer, held in zip(self._layers, cache.layers, strict=True):
            hidden = layer(hidden, *turned, unseen, held)
        return self._norm(hidden)


class _Layer:
    """One layer of a Llama-family trunk, for one new token a row."""

    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self._before, self._between = _normed(layer.input_layernorm), _normed(layer.post_attention_layernorm)
        self._projections = [linear_of(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        own = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self._own_norms = None if None in own else [_normed(norm) for norm in own]
        self._mlp = [linear_of(getattr(mlp, name)) for name in ("gate_proj", "up_proj", "down_proj")]
        self._act, self._size, self._scale = mlp.act_fn, attention.head_dim, attention.scaling

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, unseen: Tensor, held: CacheLayerMixin) -> Tensor:
        hidden = hidden + self._attend(self._before(hidden), cos, sin, unseen, held)
        gate, up, down = self._mlp
        x = self._between(hidden)
        return hidden + down(self._act(gate(x)) * up(x))

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor, unseen: Tensor, held: CacheLayerMixin) -> Tensor:
        """Attention of one new token a row. [B, H] -> [B, H]."""
        rows, size = len(x), self._size
        query, key, value, out = self._projections
        queries, keys = query(x).view(rows, -1, size), key(x).view(rows, -1, size)
        if self._own_norms is not None:
            queries, keys = (norm(part) for norm, part in zip(self._own_norms, (queries, keys), strict=True))
        heads, groups = queries.shape[1], keys.shape[1]
        both = torch.cat([queries, keys], dim=1)
        both = torch.addcmul(both * cos, both.roll(size // 2, dims=-1), sin)
        keys, values = held.update(both[:, heads:, None], value(x).view(rows, groups, 1, size))
        # The queries that share keys lie side by side as if they were positions, so keys are not repeated for them.
        queries = both[:, :heads].reshape(rows, groups, heads // groups, size)
        read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=unseen, scale=self._scale)
        return out(read.reshape(rows, heads * size))


def _normed(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The families' RMS norm as one call. In narrow dtypes it rounds elsewhere than they do, so there the module.

    On a CPU ``rms_norm`` is many small steps; with the mean of squares as a product there are five, and a decoding step
    of a 260,000-parameter model takes 0.92 (1 to 32 rows) to 0.96 (128 and 512 rows) of the time.
    """
    if isinstance(module, BaseTunerLayer) or module.weight.dtype not in EXACT:
        return module
    weight, eps = module.weight, module.variance_epsilon
    if weight.device.type != "cpu":
        return partial(F.rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps)
    mean = torch.full_like(weight, 1 / len(weight))[:, None]
    return lambda x: (x * (x * x).matmul(mean).add_(eps).rsqrt_()).mul_(weight)


@torch.no_grad()
def can_decode(causal: nn.Module) -> bool:
    """Whether ``FusedStep`` gives what the trunk's own forward pass gives; it is tried, on prompts of two lengths."""
    trunk, config = causal.base_model, causal.config.get_text_config()
    plain = config.model_type in FAMILIES and config._attn_implementation == "sdpa" and attends_to_all(config)
    if not plain or trunk.rotary_emb.rope_type in MOVING_ANGLES:
        return False
    device = next(causal.parameters()).device
    ids = torch.tensor([[0, 1, 0], [0, 0, 1]], device=device)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]], device=device)
    places = (mask.cumsum(1) - 1).clamp(min=0)

    def prompts() -> Cache:
        first = {"input_ids": ids, "attention_mask": mask[:, :3], "position_ids": places[:, :3], "use_cache": True}
        return trunk(**first).past_key_values

    inputs = {"attention_mask": mask, "position_ids": places[:, 3:]}
    wanted = trunk(ids[:, :1], **inputs, past_key_values=prompts(), use_cache=True).last_hidden_state[:, -1]
    return close(FusedStep(trunk, positions=4)(ids[:, :1], **inputs, cache=prompts()), wanted)


class GrowingLayer(DynamicLayer):
    """One layer of a KV cache, [rows, heads, tokens, head_dim], at the front of a buffer with room for more tokens."""

    def __init__(self, full: DynamicLayer):
        super().__init__()
        self.lazy_initialization(full.keys, full.values)
        self.keys, self.values = full.keys, full.values
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write the keys and values of new tokens; what attention reads is a view of the buffers."""
        held = self.keys.shape[2]
        total = held + key_states.shape[2]
        if self._buffers is None or self._buffers[0].shape[2] < total:
            self._buffers = (_with_room(self.keys, total), _with_room(self.values, total))
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, held:total] = new
        self.keys, self.values = (buffer[:, :, :total] for buffer in self._buffers)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self._buffers = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._buffers = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows, some of them left out or several times."""
        super().reorder_cache(beam_idx)
        self._buffers = None


def give_room(cache: Cache) -> None:
    """Let the plain layers of a cache grow in place; empty ones and other kinds (sliding windows, states) stay."""
    cache.layers = [
        GrowingLayer(layer) if type(layer) is DynamicLayer and layer.is_initialized else layer for layer in cache.layers
    ]


def is_plain(cache: Cache) -> bool:
    """Whether a cache is nothing but keys and values of all tokens: no windows, no states."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def bytes_held(cache: Cache) -> int:
    """The bytes of a cache's keys and values."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def joined(caches: Sequence[Cache]) -> Cache:
    """Concatenate the rows of plain caches of as many tokens into the first, layer by layer; the others are emptied."""
    first = caches[0]
    if len(caches) > 1:
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            for name in ("keys", "values"):
                whole = torch.cat([getattr(layer, name) for layer in layers])
                for layer in layers:
                    setattr(layer, name, whole if layer is layers[0] else None)
    return first


def _with_room(held: Tensor, total: int) -> Tensor:
    rows, heads, tokens, size = held.shape
    buffer = torch.empty(rows, heads, total + GROWTH - 1, size, dtype=held.dtype, device=held.device)
    buffer[:, :, :tokens] = held
    return buffer
