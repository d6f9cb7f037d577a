"""Gradient checkpointing: a layer keeps its input alone, and its backward pass computes the layer again.

It is for sequences whose backward pass would not fit otherwise: six layers of 256 took 1.37 times as long and kept
16 MB instead of 336. transformers' own switch works only in training mode, which would turn every dropout on.

The trap is that the layer is computed again later: by then another adapter may be on, and the gradient would silently
be that of another function. So a layer remembers how its adapters were switched.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from kltune.lm.adapters import AdapterSwitch


class CheckpointedLayers:
    """The layers of a trunk that can be computed twice; none, where its author did not mark them."""

    def __init__(self, trunk: nn.Module):
        found = (module for module in trunk.modules() if isinstance(module, GradientCheckpointingLayer))
        self._layers = [(layer, AdapterSwitch(layer)) for layer in found]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within: forward passes keep each layer's input alone. Their backward passes may come later."""
        for layer, switch in self._layers:
            layer.forward = partial(_checkpointed, layer.forward, switch)
        try:
            yield
        finally:
            for layer, _ in self._layers:
                del layer.forward   # back to that of its class


def _checkpointed(forward: Callable[..., Any], switch: AdapterSwitch, *args, **kwargs) -> Any:
    state = switch.state()

    def again(*args, **kwargs) -> Any:
        with switch.as_in(state):
            return forward(*args, **kwargs)

    return checkpoint(again, *args, use_reentrant=False, **kwargs)
