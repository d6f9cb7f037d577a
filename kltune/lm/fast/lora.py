"""LoRA layers in fewer passes over their positions than PEFT's own, and a trunk with its adapter added in for sampling.

PEFT's  W x + s · B (A x)  makes three temporaries as large as the output and backs through each. Here the last product
adds onto the first. Beside a base in bfloat16 the two small matrices are cast to it, and not, as PEFT does, everything
of a position to their float32: half the bytes of a pass and two thirds of what is kept for the backward pass. They are
trained in float32 all the same. On stories260K after PPO the mean KL to the same function in float32 is 3.8e-4 nats a
token, by PEFT's way 3.7e-4. And where a layer is small beside its adapter the update is added to the weight first,
(W + s · B A) x: in the forward pass one product over the positions instead of three, and two in the backward pass
instead of five. That is not for bfloat16, where W + s · B A would lose most of the update.

While it samples, a LoRA layer takes three matrix products where W + BA takes one, and for one token a row, adding up
first would not pay. So the sum is written to a buffer once for all tokens of a batch, and a linear layer over it stands
in the LoRA layer's place; the base's tensors are neither written nor replaced, so the reference cannot move. (PEFT's
merge and unmerge write them: a hundred rounds moved float32 weights by 1e-7 and bfloat16 ones by 1 %.) Only in float32
and on the CPU: in bfloat16 the sum rounds away 78 % of an update of a thousandth of the weights, and on a GPU small
products wait for their launch, not for arithmetic.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kltune.core.products import widen, with_update

EXACT = (torch.float32, torch.float64)
NARROW = {torch.float32, torch.bfloat16}        # of an adapter and its base


class LoraLinear(Linear):
    """PEFT's LoRA layer with a faster forward pass for one plain adapter at a time."""

    cast: tuple[str, Tensor, Tensor] | None = None      # an adapter's matrices in the base's dtype, while none moves

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The base layer's output and the adapter's. [..., in] -> [..., out]."""
        name = self._active_adapter[0]
        if args or kwargs or self.merged or len(self._active_adapter) > 1 or not self._plain(name, x):
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        if self._disable_adapters or name not in self.lora_A:
            return base(x)
        (a, b), scaling = self._matrices(name), self.scaling[name]
        positions = x.numel() // x.shape[-1]
        if x.dtype in EXACT and _adds_first(*base.weight.shape, len(a), positions, torch.is_grad_enabled()):
            return nn.functional.linear(x, torch.addmm(base.weight, b, a, alpha=scaling), base.bias)
        return with_update(base(x), x, a, b, scaling)   # base not of x made flat: that may round another way

    def _matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B in the dtype of the base: [r, in], [out, r]."""
        if self.cast is not None and self.cast[0] == name:
            return self.cast[1:]
        dtype = self.base_layer.weight.dtype
        return self.lora_A[name].weight.to(dtype), self.lora_B[name].weight.to(dtype)

    def _plain(self, name: str, x: Tensor) -> bool:
        """Whether the adapter is nothing but two matrices now, of the base's dtype or beside a narrow one."""
        if name not in self.lora_A:
            return True
        dropout, dtypes = self.lora_dropout[name], {self.lora_A[name].weight.dtype, self.base_layer.weight.dtype}
        return (
            name not in self.lora_variant
            and self.lora_B[name].bias is None
            and x.dtype == self.base_layer.weight.dtype
            and (len(dtypes) == 1 or dtypes == NARROW)
            and not (dropout.training and isinstance(dropout, nn.Dropout) and dropout.p > 0.0)
        )


def _adds_first(out: int, inside: int, rank: int, positions: int, trains: bool) -> bool:
    """Whether W + s · B A takes fewer operations, the backward pass included.

    Per position 2·in·out against 2·in·out + 2·r·(in + out), and backwards 4·in·out against 2·in·out + 4·r·(in + out);
    once 2·r·in·out, and 4·r·in·out backwards.
    """
    saved = 2 * rank * (inside + out)
    if not trains:
        return positions * saved > 2 * rank * inside * out
    return positions * (3 * saved - 2 * inside * out) > 6 * rank * inside * out


def speed_up(model: nn.Module) -> None:
    """Give PEFT's plain LoRA layers on linear layers the forward pass of ``LoraLinear``, and widen narrow products."""
    widen(model)
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear and not module.fan_in_fan_out:
            module.__class__ = LoraLinear


class MergedTrunk:
    """Puts merged layers in the place of a trunk's LoRA layers and takes them out again; their buffers are kept."""

    def __init__(self, trunk: nn.Module):
        places = [
            (parent, name, layer)
            for parent in trunk.modules()
            for name, layer in parent.named_children()
            if type(layer) in (Linear, LoraLinear)
        ]
        called = _called(trunk, [layer for *_, layer in places])
        self._places = [place for place in places if place[2] in called]
        self._merged: dict[Linear, nn.Linear] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within: layers whose adapter is on and can be added in are merged. After, exceptions included: as before.

        Those beside a narrow base hold their adapter in its dtype, so that it is cast once and not at every token.
        Switching adapters within would reach only the layers that are left, so nothing may.
        """
        places = [(parent, name, layer) for parent, name, layer in self._places if _can_merge(layer)]
        narrow = [layer for *_, layer in self._places if _can_cast(layer)]
        try:
            for layer in narrow:
                name = layer._active_adapter[0]
                layer.cast = (name, *(tensor.detach() for tensor in layer._matrices(name)))
            for parent, name, layer in places:
                parent._modules[name] = self._filled(layer)
            yield
        finally:
            for layer in narrow:
                layer.cast = None
            for parent, name, layer in places:
                parent._modules[name] = layer

    def forget(self) -> None:
        """Drop the merged weights, which are made again when they are wanted."""
        self._merged.clear()

    @torch.no_grad()
    def _filled(self, layer: Linear) -> nn.Linear:
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


@torch.no_grad()
def _called(trunk: nn.Module, layers: Sequence[Linear]) -> set[nn.Module]:
    """The layers that a forward pass calls. Where a model reads the base's weight instead, an adapter does nothing."""
    called: set[nn.Module] = set()
    if layers:
        hooks = [layer.register_forward_pre_hook(lambda layer, _: called.add(layer)) for layer in layers]
        trunk(input_ids=torch.zeros(1, 2, dtype=torch.long, device=next(trunk.parameters()).device), use_cache=False)
        for hook in hooks:
            hook.remove()
    return called


def _can_cast(layer: Linear) -> bool:
    """Whether the layer takes the faster way, beside a base of another dtype than its adapter's."""
    name = layer._active_adapter[0]
    plain = isinstance(layer, LoraLinear) and not layer._disable_adapters and name in layer.lora_A
    return plain and layer.lora_A[name].weight.dtype != layer.base_layer.weight.dtype


def _can_merge(layer: Linear) -> bool:
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
