"""The fast ways of one model, each tried on it first. lm/model has a plain way to the same numbers for each of them.

``Network`` asks here and nowhere else; within ``off`` it is told that there is nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import Cache

from kltune.core.products import linear_of
from kltune.lm.fast.cuda_graph import CapturedDecoder, can_capture
from kltune.lm.fast.decoding import FusedStep, GrowingDecoder, Step, can_decode, joined
from kltune.lm.fast.lora import MergedTrunk, speed_up
from kltune.lm.fast.lower_layers import LowerLayers
from kltune.lm.fast.memory import Batching
from kltune.lm.fast.shared_prefix import can_share, shared_prefixes, states_before
from kltune.lm.machine.sharding import trunk_of

wanted = True


@contextmanager
def off() -> Iterator[None]:
    """Within: models that are opened take the plain ways, for good."""
    global wanted
    before, wanted = wanted, False
    try:
        yield
    finally:
        wanted = before


class FastWays:
    """What a model does faster than by its own forward pass, PEFT's layers and transformers' cache."""

    def __init__(self, causal: nn.Module, step: Step | None, *, split: bool):
        """Try which ways fit a model with its adapters as they are on; ``step`` and ``split`` as of its ``Network``.

        step: None for a model without a cache that serves.
        """
        self.causal, self.step = causal, step
        cut = split and step is not None
        self.shares_prefixes = cut and can_share(causal)
        self.decodes = cut and can_decode(causal)
        self.batching = Batching(causal, step, split=split, shares_prefixes=self.shares_prefixes)
        self.refresh()

    def refresh(self) -> None:
        """Take the model's layers as they are now, after an adapter may have wrapped them."""
        speed_up(self.causal)
        self.merged_trunk = MergedTrunk(self.causal.base_model)
        self._lower_layers: dict[str | None, LowerLayers] = {}
        self.batching.refresh()
        # Anew for each adapter: some, as those that go through a Fourier transform, cannot be captured.
        device = next(self.causal.parameters()).device
        self.captures = self.decodes and can_capture(self.step, self.next_step, device)

    def states_before(self, ids: Tensor, scored: Tensor) -> Tensor | None:
        """Hidden states that predict the scored tokens, shared prompts read once; None where that does not pay."""
        rows = shared_prefixes(ids, scored) if self.shares_prefixes else None
        return None if rows is None else states_before(self.causal.base_model, rows)

    def lower_layers(self, adapter: str | None = None) -> LowerLayers:
        """The layers below any adapter, or below this one, for passes that have no other on."""
        if adapter not in self._lower_layers:
            self._lower_layers[adapter] = LowerLayers(trunk_of(self.causal), adapter)
        return self._lower_layers[adapter]

    def lower_states(
        self, ids: Tensor, scored: Tensor, adapter: str | None = None
    ) -> Callable[[Tensor], Tensor] | None:
        """What gives the states that passes over these rows go on from; None where there are none, or where reading
        shared prompts once, which cannot go on from them, takes less. adapter: as ``lower_layers``.
        """
        lower = self.lower_layers(adapter)
        if not lower.there:
            return None
        rows = shared_prefixes(ids, scored) if self.shares_prefixes else None
        shared = 1.0 if rows is None else (rows.prompts.numel() + rows.responses.numel()) / ids.numel()
        return lower.states if lower.share_above < shared else None

    def read_prompts(self, ids: Tensor, mask: Tensor, places: Tensor) -> tuple[Tensor, Cache]:
        """``step`` for left-padded prompts, as many at once as go through the model: logits [B, V], and cache."""
        rows = self.batching.prompt_rows(ids)
        parts = zip(ids.split(rows), mask.split(rows), places.split(rows), strict=True)
        logits, caches = zip(*(self.step(*part, None) for part in parts), strict=True)
        return torch.cat(logits), joined(caches)

    def decoder(self, cache: Cache, mask: Tensor, limit: int) -> GrowingDecoder | CapturedDecoder:
        """What feeds the rows of a cache one token at a time. See ``GrowingDecoder``."""
        kind = CapturedDecoder if self.captures else GrowingDecoder
        return kind(self.next_step(mask.shape[1] + limit), cache, mask, limit)

    def next_step(self, positions: int) -> Step:
        """``step`` for one more token of each row, with the weights as they are now; rows have so many positions."""
        if not self.decodes:
            return self.step
        fused, head = FusedStep(self.causal.base_model, positions), linear_of(self.causal.get_output_embeddings())
        return lambda ids, mask, places, cache: (head(fused(ids, mask, places, cache)), cache)
