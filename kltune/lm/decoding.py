"""One more token for many responses, without what a model's own forward pass does around each layer's arithmetic.

A decoding step of a small model, or of few rows, is bookkeeping: masks made anew, wrappers, arguments handed through.
For models built like Llama the step here does the same arithmetic in the same order, in float32 on a CPU to the last
bit, and one row of a 260,000-parameter model takes 1.25 ms instead of 2.0. That part is paid per step and not per row,
so it is what a batch costs whose responses have mostly ended. Whether it fits a model is tried (``can_decode``), and
others take their own way.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from kltune.lm.kv_cache import give_room
from kltune.lm.shared_prefix import attends_to_all, close

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # pre-norm layers of plain attention with rotary positions


class Decoder:
    """Rows that have read their prompts and are fed one token at a time, until they are dropped."""

    compact_below = 0.8  # drop finished rows from the cache once fewer than this share is still going

    def __init__(self, step: Callable[..., tuple[Tensor, Cache]], cache: Cache, mask: Tensor, limit: int):
        """Take over a cache of left-padded prompts.

        Args:
            step: ``Network.step``.
            cache: of the prompts.
            mask: 0 on their padding. [R, width].
            limit: how many tokens a row is fed at most.
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
        self._cache.batch_select_indices(rows)
        self._mask, self._next = self._mask[rows], self._next[rows]


def one_more(trunk: nn.Module, ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache) -> Tensor:
    """Feed one token to each row and extend the cache by it: last hidden states.

    Args:
        trunk: a model of one of ``FAMILIES`` without its head.
        ids: [B, 1].
        attention_mask: 0 on the padding of prompts; the new token's column included. [B, S].
        position_ids: of the new tokens. [B, 1].
        cache: keys and values of the S - 1 tokens before.

    Returns:
        [B, H].
    """
    hidden = trunk.embed_tokens(ids)
    cos, sin = trunk.rotary_emb(hidden, position_ids)
    unseen = torch.zeros(attention_mask.shape, dtype=hidden.dtype, device=hidden.device)
    unseen = unseen.masked_fill_(attention_mask == 0, float("-inf"))[:, None, None]
    hidden = hidden.squeeze(1)
    for index, layer in enumerate(trunk.layers):
        hidden = hidden + _attend(layer.self_attn, layer.input_layernorm(hidden), cos, sin, unseen, cache, index)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return trunk.norm(hidden)


def _attend(
    attention: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor, unseen: Tensor, cache: Cache, index: int
) -> Tensor:
    """Attention of one new token a row. [B, H] -> [B, H]."""
    rows, size = len(hidden), attention.head_dim
    queries = attention.q_proj(hidden).view(rows, -1, size)
    keys = attention.k_proj(hidden).view(rows, -1, size)
    values = attention.v_proj(hidden).view(rows, -1, 1, size)
    if hasattr(attention, "q_norm"):
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    heads, groups = queries.shape[1], keys.shape[1]
    both = torch.cat([queries, keys], dim=1)
    front, back = both.chunk(2, dim=-1)
    both = both * cos + torch.cat([-back, front], dim=-1) * sin
    keys, values = cache.layers[index].update(both[:, heads:, None], values)
    # The queries that share keys lie side by side as if they were positions, so keys are not repeated for them.
    queries = both[:, :heads].reshape(rows, groups, heads // groups, size)
    read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=unseen, scale=attention.scaling)
    return attention.o_proj(read.reshape(rows, heads * size))


@torch.no_grad()
def can_decode(causal: nn.Module, trunk: nn.Module) -> bool:
    """Whether ``one_more`` gives what the trunk's own forward pass gives; it is tried, on prompts of two lengths."""
    config = causal.config.get_text_config()
    plain = config.model_type in FAMILIES and config._attn_implementation == "sdpa" and attends_to_all(config)
    if not plain:
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
    return close(one_more(trunk, ids[:, :1], **inputs, cache=prompts()), wanted)
