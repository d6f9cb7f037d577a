"""How much memory work takes, told from the tensors that live while it runs: of real ones, or of shapes alone.

On the meta device a model computes shapes and no numbers: the work of a phase is done in a second for a model of any
size, and what lives at its worst moment is what a device will have to hold. Kernels' own scratch space is not seen.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ITEM = torch.ops.aten._local_scalar_dense.default
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class LiveBytes(TorchDispatchMode):
    """Within: the bytes of the tensors that operations touch, counted while they live; shared memory once.

    now: that live. peak: the most that did. before: what was counted when the work began.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.before = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Do it, and count what went in and what came out."""
        kwargs = kwargs or {}
        if func is ITEM and args[0].is_meta:
            return True     # of a check that stops at False, as that no row is padded; there is no number to read
        out = func(*args, **kwargs)
        self.count(args, kwargs, out)
        return out

    def count(self, *what: Any) -> None:
        """Count the tensors in nested containers."""
        for leaf in tree_leaves(what):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class MasksOnly(TorchFunctionMode):
    """Within: a mask of which only the shape is known selects so many positions; no operation on shapes can tell."""

    def __init__(self, selected: int):
        super().__init__()
        self.selected = selected

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Do it, masks in their own way."""
        if func is Tensor.__getitem__ and is_meta_mask(args[1]):
            rows = args[0].flatten(0, args[1].dim() - 1)
            return rows.index_select(0, torch.empty(self.selected, dtype=torch.long, device="meta"))
        return func(*args, **(kwargs or {}))


def is_meta_mask(index: Any) -> bool:
    """Whether an index is a mask of which only the shape is known."""
    return isinstance(index, Tensor) and index.is_meta and index.dtype == torch.bool


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within: attention on the meta device keeps no square, as the kernels of devices do not; there it would take the
    plain way. By the function's name, since a layer that is computed again in a backward pass sees no mode.
    """
    plain = functional.scaled_dot_product_attention

    def fused(query: Tensor, *rest: Any, **known: Any) -> Tensor:
        if not query.is_meta:
            return plain(query, *rest, **known)
        more = {name: known[name] for name in ("attn_mask", "scale") if known.get(name) is not None}
        return FLASH(query, *rest[:2], 0.0, known.get("is_causal", False), **more)[0]

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


@contextmanager
def traced(selected: int, *known: Any, fused: bool = True) -> Iterator[LiveBytes]:
    """Within: work on the meta device, its memory counted.

    selected: positions that a mask selects. known: tensors that lie there before. fused: attention keeps no square.
    """
    live = LiveBytes()
    live.count(*known)
    live.before = live.now
    with live, MasksOnly(selected), fused_attention() if fused else nullcontext():
        yield live
