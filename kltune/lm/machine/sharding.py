"""A frozen base whose layers lie spread over the processes of a run: each keeps a piece of every one.

Closed, a layer is gathered when a pass comes to it and dropped behind it: memory of one layer, but all processes have
to make the same passes. Opened, the layers are whole in each: nothing is exchanged, and each makes whatever passes it
has. First-order updates are made closed; sampling, measuring and what differentiates twice, opened. Adapters and heads
are no part of it: they stay plain tensors, whole everywhere.
"""

import gc
from collections.abc import Set

from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


class ShardedLayers:
    """The layers of a trunk, spread. ``open`` wants all processes, and nothing in which only some would open."""

    def __init__(self, trunk: nn.Module, trained: Set[nn.Parameter]):
        """Spread the layers that a model's author marked as such; ``trained`` stays whole."""
        self.layers = layers_of(trunk)
        for layer in self.layers:
            own = {tensor for tensor in layer.parameters() if tensor in trained}
            fully_shard(layer, reshard_after_forward=True, ignored_params=own)
        gc.collect()        # the whole layers hang in rings, and would take their memory until Python looks for some
        self.is_open = False

    def open(self) -> None:
        """Gather all layers, until ``close``."""
        if self.is_open:
            return
        for layer in self.layers:
            layer.unshard()
            layer.set_reshard_after_forward(False)
            layer.set_reshard_after_backward(False)
        self.is_open = True

    def close(self) -> None:
        """Keep this process's piece alone."""
        for layer in self.layers if self.is_open else ():
            layer.reshard()
            layer.set_reshard_after_forward(True)
            layer.set_reshard_after_backward(True)
        self.is_open = False


def layers_of(trunk: nn.Module) -> list[nn.Module]:
    """Those that are spread."""
    return [module for module in trunk.modules() if isinstance(module, GradientCheckpointingLayer)]


def trunk_of(causal: nn.Module) -> nn.Module | None:
    """The part that gives hidden states: what a model names as its base, else the one model inside it; None without."""
    if causal.base_model is not causal:
        return causal.base_model
    inner = [child for child in causal.children() if isinstance(child, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else None
