"""A product with frozen weights, by whichever of torch's two libraries is faster at it on a CPU.

In float32 torch multiplies by MKL, which puts a transposed weight into an order of its own at every call; with few
rows, as where tokens are drawn, that is most of the time. oneDNN, by which torch multiplies bfloat16, reads it as it
lies. GFLOP/s of two cores (AMD EPYC with AVX-512, weights that are in no cache), MKL and oneDNN:

    rows      16          64          350         992
    [rows, 512] x [512, 32000]      41, 92      94, 157     134, 163    147, 168
    [rows, 512] x [512, 2048]       50, 78      87, 129     117, 147    141, 167
    and back  [rows, 2048] x [2048, 512]        57, 85      114, 155    174, 182    192, 192

Small weights stay with MKL, whose calls cost less.
"""

import platform
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

FEWEST = 1 << 16        # weights; at 64 x 64 MKL is faster, at 256 x 256 oneDNN by a tenth to a half
ONEDNN = (
    platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``functional.linear``: x Wᵀ + b; [..., in] x [out, in] -> [..., out]. Differentiable in x as often as it is."""
    if not _serves(x, weight, bias):
        return functional.linear(x, weight, bias)
    return _Product.apply(x, weight, bias) if torch.is_grad_enabled() else _by_onednn(x, weight, bias)


class FrozenLinear(nn.Linear):
    """A linear layer whose product is ``product``."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return product(x, self.weight, self.bias)


LINEAR = (nn.Linear, FrozenLinear)      # layers that are a product with a weight and nothing else


def linear_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A plain linear layer as a direct call of ``product``; with an adapter in it, or quantised, the module."""
    plain = type(module) in LINEAR and type(module.weight) is nn.Parameter
    return partial(product, weight=module.weight, bias=module.bias) if plain else module


def _serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN may take it: plain tensors of float32 in the memory of a CPU, of which only x has a gradient."""
    return (
        ONEDNN and weight.numel() >= FEWEST and x.dtype == weight.dtype == torch.float32 and weight.device.type == "cpu"
        and type(weight) in (Tensor, nn.Parameter) and type(x) is Tensor
        and not (weight.requires_grad or (bias is not None and bias.requires_grad))
    )


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """oneDNN's operation knows no gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return _by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        """∂/∂x = g W, a product itself, so that it can be differentiated again."""
        (weight,) = ctx.saved_tensors
        return product(gradient, weight.t()), None, None
