"""A trunk with its adapter added into the weights, for as long as it samples: in tensors of their own.

A LoRA layer takes three matrix products where W + BA takes one, and for one token a row, adding up first would not pay.
So the sum is written to a buffer once for all tokens of a batch, and a linear layer over it stands in the LoRA layer's
place; the base's tensors are neither written nor replaced, so the reference cannot move. (PEFT's merge and unmerge
write them: a hundred rounds moved float32 weights by 1e-7 and bfloat16 ones by 1 %.)

Only in float32 and on the CPU. In bfloat16 the sum rounds away what was trained: 78 % of an update of a thousandth of
the weights. On a GPU small products wait for their launch, not for arithmetic.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from kltune.lm.lora import LoraLinear


class MergedTrunk:
    """Puts merged layers in the place of a trunk's LoRA layers and takes them out again; their buffers are kept."""

    def __init__(self, trunk: nn.Module):
        self._places = [
            (parent, name, layer)
            for parent in trunk.modules()
            for name, layer in parent.named_children()
            if type(layer) in (PeftLinear, LoraLinear)
        ]
        self._merged: dict[PeftLinear, nn.Linear] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within: layers whose adapter is on and can be added in are merged. After, exceptions included: as before.

        Switching adapters within would reach only the layers that are left, so nothing may.
        """
        places = [(parent, name, layer) for parent, name, layer in self._places if _can_merge(layer)]
        try:
            for parent, name, layer in places:
                parent._modules[name] = self._filled(layer)
            yield
        finally:
            for parent, name, layer in places:
                parent._modules[name] = layer

    @torch.no_grad()
    def _filled(self, layer: PeftLinear) -> nn.Linear:
        """The layer's stand-in, holding W + scaling · B A as they are now."""
        base, adapter = layer.get_base_layer(), layer.active_adapters[0]
        if layer not in self._merged:
            empty = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            empty.weight = nn.Parameter(torch.empty(layer.out_features, layer.in_features), requires_grad=False)
            empty.bias = base.bias
            self._merged[layer] = empty
        merged = self._merged[layer]
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        up, down = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
        torch.addmm(weight, up, down, alpha=layer.scaling[adapter], out=merged.weight)
        return merged


def _can_merge(layer: PeftLinear) -> bool:
    """Whether the layer computes (W + scaling · B A) x + bias and nothing else, in float32 on the CPU."""
    base, adapter = layer.get_base_layer(), layer.active_adapters[0]
    return (
        not layer.disable_adapters
        and adapter in layer.lora_A
        and adapter not in layer.lora_variant  # DoRA and its kin
        and not layer.lora_bias[adapter]
        and not layer.lora_dropout[adapter].training
        and type(base) in (nn.Linear, Conv1D)
        and base.weight.dtype == torch.float32
        and base.weight.device.type == "cpu"
    )
