"""What the layers below the first adapted one make of rows is computed once, for policy, reference and value function.

With adapters on the upper layers alone (``lora.layers``) the lower ones give the same in every pass over the same rows,
whoever is on. So a pass is given what they gave, and goes on from there: the layers below hand through what comes. A
value function on the upper layers (``value_function: upper``) goes on from what the frozen ones below its own gave.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from kltune.lm.fast.shared_prefix import NO_CACHE
from kltune.lm.machine.sharding import layers_of


class LowerLayers:
    """The layers of a trunk that no adapter is on, up to the first that has one; tried on the trunk.

    there: whether there are any, and passes that go on from what they gave are the same to the last bit. share_above:
    of the layers, that such a pass computes.
    """

    def __init__(self, trunk: nn.Module | None, adapter: str | None = None):
        """Find them; anew after an adapter has come. adapter: the one that passes have on; None: any."""
        self._trunk, layers = trunk, [] if trunk is None else layers_of(trunk)
        adapted = [_adapters_in(layer, adapter) for layer in layers]
        first = next((number for number, count in enumerate(adapted) if count), 0)
        self._lower, self._upper = layers[:first], layers[first:]
        self.share_above = len(self._upper) / max(1, len(layers))
        self.there = first > 0 and sum(adapted) == _adapters_in(trunk, adapter) and self._serve()

    @torch.no_grad()
    def states(self, ids: Tensor) -> Tensor:
        """What the lower layers make of rows. [B, S] -> [B, S, H]."""
        seen: list[Tensor] = []
        with _forward(self._upper, lambda hidden, *_, **__: seen.append(hidden) or hidden):
            self._trunk(input_ids=ids, use_cache=False)
        return seen[0]

    @contextmanager
    def given(self, states: Tensor) -> Iterator[None]:
        """Within: passes over the rows that ``states`` are of go on from there."""
        with _forward(self._lower, lambda *_, **__: states):
            yield

    @torch.no_grad()
    def _serve(self) -> bool:
        """Whether a pass can be cut there: a few tokens are tried; a model of shapes alone is taken to serve."""
        run = partial(self._trunk, use_cache=False)
        ids = torch.tensor([[0, 1, 0], [1, 1, 0]], device=next(self._trunk.parameters()).device)
        if ids.is_meta:
            return True
        whole = run(input_ids=ids).last_hidden_state
        try:
            with self.given(self.states(ids)):
                return torch.equal(run(input_ids=ids).last_hidden_state, whole)
        except NO_CACHE:    # its layers give something else
            return False


def _adapters_in(module: nn.Module, adapter: str | None) -> int:
    """How many layers within have an adapter, or one of this name."""
    layers = [part for part in module.modules() if isinstance(part, BaseTunerLayer)]
    return sum(adapter is None or any(adapter in getattr(part, kind) for kind in part.adapter_layer_names)
               for part in layers)


@contextmanager
def _forward(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Within: layers compute something else. Checkpointing within leaves nothing of it."""
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)    # back to that of its class
