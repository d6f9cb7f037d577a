"""Decoding on a GPU as a captured graph: one launch for a token, where a model's layers take hundreds.

A step for a few hundred rows is so little arithmetic that a GPU waits for Python to name each kernel; a CUDA graph
names them once. It repeats the very same kernels on the very same memory, so all of a step's inputs lie in buffers that
are written before a replay, and keys and values in a cache of the final size.

A graph is captured anew for each batch, two steps of the usual kind, and dropped with it: its memory is free again when
training starts, and neither an adapter that is switched nor weights that have moved can be replayed as they were. Rows
that have ended are dropped when half have: each new number of rows is one more capture.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from kltune.core.tensors import close
from kltune.lm.fast.decoding import GrowingDecoder, Step

ALIGNED = 8  # attention kernels want widths in multiples of it, and copy the mask where they are not


class FixedLayer(DynamicLayer):
    """One layer of a KV cache with room for all tokens to come; attention reads the whole of it, behind a mask."""

    def __init__(self, full: DynamicLayer, tokens: int, place: Tensor):
        """Copy what a layer holds, with room for so many tokens. place: of the next one; changed from outside. [1]"""
        super().__init__()
        self.lazy_initialization(full.keys, full.values)
        more = (0, 0, 0, tokens - full.keys.shape[2])  # zeros: what is behind the mask is multiplied by 0, so no NaN
        self.keys, self.values = (torch.nn.functional.pad(held, more) for held in (full.keys, full.values))
        self._place = place

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values, in place."""
        self.keys.index_copy_(2, self._place, key_states)
        self.values.index_copy_(2, self._place, value_states)
        return self.keys, self.values


class CapturedDecoder:
    """Decoder of the same interface as ``GrowingDecoder`` whose every step replays a captured CUDA graph."""

    compact_below = 0.5

    def __init__(self, step: Step, cache: Cache, mask: Tensor, limit: int):
        """As ``GrowingDecoder``."""
        rows, width = mask.shape
        total = -(-(width + limit) // ALIGNED) * ALIGNED
        self._step, self._cache, self._read = step, cache, width
        self._place = torch.tensor([width], device=mask.device)
        self._next = mask.sum(dim=1, keepdim=True)
        self._mask = torch.cat([mask, mask.new_zeros(rows, total - width)], dim=1)
        self._ids = mask.new_zeros(rows, 1)
        for index, layer in enumerate(cache.layers):  # one by one: two copies of all of them may not fit
            cache.layers[index] = FixedLayer(layer, total, self._place)
        self._record()

    def feed(self, ids: Tensor) -> Tensor:
        """One more token for each row: the logits after it, until the next call. [R] -> [R, V]."""
        self._ids.copy_(ids[:, None])
        self._mask[:, self._read] = 1
        self._replay()
        self._read += 1
        self._place += 1
        self._next += 1
        return self._logits

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self._cache.reorder_cache(rows)
        self._mask, self._next, self._ids = self._mask[rows], self._next[rows], self._ids[rows]
        self._record()

    def _record(self) -> None:
        """Capture a step on the buffers as they are. It writes the next token's place, which ``feed`` writes again."""

        def once() -> Tensor:
            return self._step(self._ids, self._mask, self._next, self._cache)[0]

        self._mask[:, self._read] = 1
        self._replay, self._logits = recorded(once, self._ids.device)


def recorded(work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Capture work on fixed memory: a function that replays it, and the tensor that then holds its result.

    Elsewhere than on a GPU the work is simply done each time, so that all but the capture is the same everywhere.
    """
    if device.type != "cuda":
        result = work()
        return lambda: result.copy_(work()), result
    with torch.cuda.device(device):     # of the model, which need not be the current one
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):     # libraries set up their workspaces on first use: no capture may hold that
            work()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                result = work()
        except BaseException:
            graph.reset()       # what it has allocated would stay until the process ends
            raise
    return graph.replay, result


def can_capture(step: Step, next_step: Callable[[int], Step], device: torch.device) -> bool:
    """Whether a model decodes by replay as it does otherwise, on this device; it is tried, on GPUs only."""
    if device.type != "cuda":
        return False
    try:
        return captured_agrees(step, next_step, device)
    except RuntimeError:  # what the model does on the way cannot be captured: a wait for the GPU, memory it allocates
        return False


@torch.no_grad()
def captured_agrees(step: Step, next_step: Callable[[int], Step], device: torch.device) -> bool:
    """Whether three tokens for three rows and two for the two that are left get the same logits either way."""
    ids = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 1, 0]], device=device)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]], device=device)

    def logits_of(kind: type[GrowingDecoder | CapturedDecoder]) -> Tensor:
        first, cache = step(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), None)
        rows = kind(next_step(8), cache, mask, limit=5)
        logits = [first] + [rows.feed(ids[:, column]).clone() for column in range(3)]
        rows.keep(torch.tensor([0, 2], device=device))
        return torch.cat(logits + [rows.feed(ids[[0, 2], column]).clone() for column in range(2)])

    return close(logits_of(CapturedDecoder), logits_of(GrowingDecoder))
