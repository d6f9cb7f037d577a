"""A KV cache with room to grow: a new token is written into it, and what it holds is not copied.

transformers' DynamicCache concatenates at every token, which reads and writes the whole cache each time, into fresh
memory; for 128 responses of a six-layer model that took a quarter of all sampling.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 32  # tokens to grow by: the cache is copied once in so many steps


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, [rows, heads, tokens, head_dim], at the front of a buffer with more tokens."""

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


def give_room(cache: Cache) -> None:
    """Let the plain layers of a cache grow in place; empty ones and other kinds (sliding windows, states) stay."""
    cache.layers = [
        RoomyLayer(layer) if type(layer) is DynamicLayer and layer.is_initialized else layer for layer in cache.layers
    ]


def is_plain(cache: Cache) -> bool:
    """Whether all of it is keys and values of all tokens: no windows, no states."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def bytes_held(cache: Cache) -> int:
    """The memory of its keys and values."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def joined(caches: Sequence[Cache]) -> Cache:
    """The rows of plain caches of as many tokens, in the first of them."""
    first = caches[0]
    if len(caches) > 1:
        for index, layer in enumerate(first.layers):
            layer.keys = torch.cat([cache.layers[index].keys for cache in caches])
            layer.values = torch.cat([cache.layers[index].values for cache in caches])
    return first


def _with_room(held: Tensor, total: int) -> Tensor:
    rows, heads, tokens, size = held.shape
    buffer = torch.empty(rows, heads, total + ROOM - 1, size, dtype=held.dtype, device=held.device)
    buffer[:, :, :tokens] = held
    return buffer
