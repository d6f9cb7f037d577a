"""LoRA on a linear layer in fewer passes over its positions than PEFT's own layer makes: the same function.

PEFT's  W x + s · B (A x)  makes three temporaries as large as the output and backs through each. Here the last product
adds onto the first. And where a layer is small beside its adapter the update is added to the weight first,
(W + s · B A) x: in the forward pass one product over the positions instead of three, and two in the backward pass
instead of five. That is not for bfloat16, where W + s · B A would lose most of the update (PERF 0.3).
"""

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

EXACT = (torch.float32, torch.float64)


class LoraLinear(Linear):
    """PEFT's layer, with a forward of its own for one plain adapter at a time; all else is PEFT's."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The base layer's output and the adapter's. [..., in] -> [..., out]."""
        name = self._active_adapter[0]
        if args or kwargs or self.merged or len(self._active_adapter) > 1 or not self._plain(name, x):
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        if self._disable_adapters or name not in self.lora_A:
            return base(x)
        a, b, scaling = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        positions = x.numel() // x.shape[-1]
        if x.dtype in EXACT and _adds_first(*base.weight.shape, len(a), positions, torch.is_grad_enabled()):
            return nn.functional.linear(x, torch.addmm(base.weight, b, a, alpha=scaling), base.bias)
        flat = x.reshape(-1, x.shape[-1])
        out = nn.functional.linear(flat, base.weight, base.bias)
        return torch.addmm(out, nn.functional.linear(flat, a), b.t(), alpha=scaling).view(*x.shape[:-1], -1)

    def _plain(self, name: str, x: Tensor) -> bool:
        """Whether the adapter is nothing but two matrices now, of the same dtype as the base."""
        if name not in self.lora_A:
            return True
        dropout = self.lora_dropout[name]
        return (
            name not in self.lora_variant
            and self.lora_B[name].bias is None
            and self.lora_A[name].weight.dtype == self.base_layer.weight.dtype == x.dtype
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
    """Let PEFT's plain LoRA layers on linear layers go the faster way."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear and not module.fan_in_fan_out:
            module.__class__ = LoraLinear
