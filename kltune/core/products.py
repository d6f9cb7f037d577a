"""A product of few rows with frozen weights, by whichever of torch's two libraries is faster at it on a CPU.

In float32 torch multiplies by MKL, which puts a transposed weight into an order of its own at every call; with few
rows, as where tokens are drawn or a chunk of logits is made, that is half of the time. oneDNN, by which torch
multiplies bfloat16, reads it as it lies. GFLOP/s of two cores (AMD EPYC with AVX-512), MKL and oneDNN:

    rows      16          64          350
    [rows, 512] x [512, 32000]      41, 92      94, 157     134, 163
    [rows, 512] x [512, 2048]       50, 78      87, 129     117, 147
    [rows, 32000] x [32000, 512]    61, 86      128, 160    182, 191

oneDNN compiles code for each number of rows, 0.6 MB of it and a millisecond, and of float32 never drops it: 4,000
numbers took 3.7 GB. So rows are filled up to one of a few numbers, and products of many rows stay with MKL.
"""

import platform
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

FEWEST_WEIGHTS = 1 << 18
FEWEST_ROWS, MOST_ROWS, STEP = 9, 128, 16
ONEDNN = (
    platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``functional.linear``: x Wᵀ + b. [..., in] x [out, in] -> [..., out]."""
    if not _serves(x, weight):
        return functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    filled = functional.pad(rows, (0, 0, 0, -len(rows) % STEP))
    out = torch.ops.mkldnn._linear_pointwise(filled, weight, bias, "none", [], "")
    return out[: len(rows)].view(*x.shape[:-1], len(weight))


def linear_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A plain linear layer as a direct call of ``product``; with an adapter in it, or quantised, the module."""
    plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter
    return partial(product, weight=module.weight, bias=module.bias) if plain else module


def _serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN may take it: a few rows of float32 in the memory of a CPU, and no gradient to remember."""
    return (
        ONEDNN and weight.numel() >= FEWEST_WEIGHTS and x.dtype == weight.dtype == torch.float32
        and weight.device.type == "cpu" and type(weight) in (Tensor, nn.Parameter) and type(x) is Tensor
        and FEWEST_ROWS <= x.numel() // x.shape[-1] <= MOST_ROWS
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )
