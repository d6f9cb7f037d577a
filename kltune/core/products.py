"""A product with frozen weights, by whichever of torch's ways is fastest at it on a CPU.

Float32, few rows: torch multiplies by MKL, which puts a transposed weight into an order of its own at every call; with
few rows, as where tokens are drawn or a chunk of logits is made, that is half of the time. oneDNN, by which torch
multiplies bfloat16, reads it as it lies. GFLOP/s of two cores (AMD EPYC with AVX-512), MKL and oneDNN:

    rows      16          64          350
    [rows, 512] x [512, 32000]      41, 92      94, 157     134, 163
    [rows, 512] x [512, 2048]       50, 78      87, 129     117, 147
    [rows, 32000] x [32000, 512]    61, 86      128, 160    182, 191

oneDNN compiles code for each number of rows, 0.6 MB of it and a millisecond, and of float32 never drops it: 4,000
numbers took 3.7 GB. So rows are filled up to one of a few numbers, and products of many rows stay with MKL.

Half precision without AVX-512: no oneDNN, and torch falls back on loops. Widened to float32 a piece at a time, each sum
is rounded once all the same, as by hardware that multiplies bfloat16. GFLOP/s of one core (AMD EPYC with AVX2), in
bfloat16 by torch and widened, and of float32:

    [16, 576] x [576, 49152]        5.9, 22, 17
    [128, 576] x [576, 49152]       4.2, 48, 28
    [1024, 576] x [576, 1536]       5.8, 50, 50
"""

import platform
from collections.abc import Callable
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional

FEWEST_WEIGHTS = 1 << 18
FEWEST_ROWS, MOST_ROWS, STEP = 9, 128, 16
PIECE = 1 << 20     # weights in float32 at once
X86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
ONEDNN = X86 and hasattr(torch.ops.mkldnn, "_linear_pointwise")
WIDENED = {
    dtype for dtype, known in (
        (torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported"),
    )
    if X86 and hasattr(torch.ops.mkldnn, known) and not getattr(torch.ops.mkldnn, known)()
}


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``functional.linear``: x Wᵀ + b. [..., in] x [out, in] -> [..., out]."""
    if _widens(weight) and x.dtype == weight.dtype and x.numel():
        return _widened(x, weight, bias, 1.0)
    if not _serves(x, weight):
        return functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    filled = functional.pad(rows, (0, 0, 0, -len(rows) % STEP))
    out = torch.ops.mkldnn._linear_pointwise(filled, weight, bias, "none", [], "")
    return out[: len(rows)].view(*x.shape[:-1], len(weight))


def with_update(out: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """out + s · B A x, rounded once where it is added up. [..., out], [..., in] x [r, in], [out, r] -> [..., out]."""
    inner = product(x.reshape(-1, x.shape[-1]), a)
    flat = out.reshape(len(inner), -1)
    if _widens(b) and inner.dtype == b.dtype and inner.numel():
        return _widened(inner, b, flat, scale).view(out.shape)
    return torch.addmm(flat, inner, b.t(), alpha=scale).view(out.shape)


def linear_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A plain linear layer as a direct call of ``product``; with an adapter in it, or quantised, the module."""
    plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter
    return partial(product, weight=module.weight, bias=module.bias) if plain else module


def widen(model: nn.Module) -> None:
    """Let a model's plain linear layers multiply by ``product`` where it widens them."""
    for module in model.modules():
        if type(module) is nn.Linear and _widens(module.weight):
            module.forward = MethodType(lambda layer, x: product(x, layer.weight, layer.bias), module)


def _serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN may take it: a few rows of float32 in the memory of a CPU, and no gradient to remember."""
    return (
        ONEDNN and weight.numel() >= FEWEST_WEIGHTS and x.dtype == weight.dtype == torch.float32
        and weight.device.type == "cpu" and type(weight) in (Tensor, nn.Parameter) and type(x) is Tensor
        and FEWEST_ROWS <= x.numel() // x.shape[-1] <= MOST_ROWS
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


def _widens(weight: Tensor) -> bool:
    return weight.dtype in WIDENED and weight.device.type == "cpu" and type(weight) in (Tensor, nn.Parameter)


def _widened(x: Tensor, weight: Tensor, added: Tensor | None, scale: float) -> Tensor:
    """added + s · x Wᵀ by float32, rounded once."""
    rows = x.reshape(-1, x.shape[-1])
    if added is not None and added.dim() > 1:
        added = added.reshape(-1, len(weight))
    tensors = (rows, weight) if added is None else (rows, weight, added)
    remembered = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    total = (_Widened.apply if remembered else _by_float32)(rows, weight, added, scale)
    return total.view(*x.shape[:-1], -1)    # not inside the function: a model may add to it in place


def _by_float32(rows: Tensor, weight: Tensor, added: Tensor | None, scale: float) -> Tensor:
    """A piece at a time of the longer side of the weight: of the outputs, or of what is summed over."""
    (out, inside), dtype, linear = weight.shape, rows.dtype, functional.linear
    if out * inside <= PIECE:
        total = linear(rows.float(), weight.float())
    elif out >= inside:
        rows = rows.float()
        total = torch.cat([linear(rows, piece.float()) for piece in weight.split(max(1, PIECE // inside))], dim=1)
    else:
        pieces = zip(*(side.split(max(1, PIECE // out), dim=1) for side in (rows, weight)), strict=True)
        total = sum(linear(some.float(), piece.float()) for some, piece in pieces)
    if scale != 1.0:
        total = total * scale
    if added is not None:
        total = total + added
    return total.to(dtype)


class _Widened(torch.autograd.Function):
    """``_by_float32``, which keeps for its gradients what is as narrow as what it was given."""

    @staticmethod
    def forward(x, weight, added, scale):
        """The sum."""
        return _by_float32(x, weight, added, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep the input only for weights that are trained."""
        x, weight, added, ctx.scale = inputs
        ctx.flat = added is not None and added.dim() == 1
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        """Gradients of what wants one, by products of the same kind: differentiable again."""
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_added, _ = ctx.needs_input_grad
        by_x = _widened(gradient, weight.t(), None, ctx.scale) if for_x else None
        by_weight = _widened(gradient.t(), x.t(), None, ctx.scale) if for_weight else None
        return by_x, by_weight, (gradient.sum(0) if ctx.flat else gradient) if for_added else None, None

    @staticmethod
    def jvp(ctx, of_x, of_weight, of_added, _):
        """How the sum moves with what is in it."""
        x, weight = ctx.saved_tensors
        moved = None if of_x is None else _widened(of_x, weight, of_added, ctx.scale)
        if of_weight is None:
            return of_added if moved is None else moved
        return _widened(x, of_weight, of_added if moved is None else moved, ctx.scale)
