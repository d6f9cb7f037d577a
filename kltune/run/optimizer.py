"""Optimizer, learning-rate schedule, the guarded step, and an optimizer's memory as checkpoints hold it."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from kltune.core import ranks
from kltune.core.tensors import expect_finite
from kltune.errors import CheckpointError, DivergedError
from kltune.lm.model.network import Network
from kltune.recipe import OptimSection, RunSection

Part = TypeVar("Part")
UNTIL_MOST = 5      # times run.steps: a run until its target takes no more
WIDE = {"mps": torch.float32}   # which knows no float64


def make_optimizer(parameters: Mapping[str, nn.Parameter], optim: OptimSection, what: str) -> AdamW:
    """AdamW over exactly these tensors; where an assertion about them fails, that is a bug in kltune."""
    assert parameters, f"{what}: nothing is trainable"
    assert all(tensor.requires_grad for tensor in parameters.values()), f"{what}: a tensor is frozen"
    assert all(tensor.dtype == torch.float32 for tensor in parameters.values()), f"{what}: not float32"
    # fused: one call for all tensors. On a CPU a step of stories260K's adapter takes 1.1 ms instead of 4.8.
    return AdamW(parameters.values(), lr=optim.lr, weight_decay=optim.weight_decay, fused=True)


def total_steps(run: RunSection, rows: int, rows_per_step: int) -> int:
    """Turns of the loop: the recipe's ``steps``, or as many as its ``epochs`` take."""
    if run.steps is not None:
        return run.steps
    return max(1, math.ceil(round(run.epochs * rows / rows_per_step, 6)))  # 0.07 · 100 is 7.000000000000001


def most_steps(run: RunSection, steps: int) -> int:
    """The most turns of the loop that a run of ``total_steps`` may take, where it goes on until its target is held."""
    return UNTIL_MOST * steps if run.until == "target" else steps


def learning_rate_share(optim: OptimSection, step: int, steps: int) -> float:
    """Share of the recipe's learning rate at a step (1 … steps): warm-up, then the schedule towards 0 after the last.

    A function of the step alone, so that resuming needs no scheduler state.
    """
    if step <= optim.warmup_steps:
        return step / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    done = (step - 1 - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return 1.0 - done if optim.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Use ``lr`` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def accumulate(
    network: Network, parameters: Iterable[nn.Parameter], parts: Sequence[Part],
    work: Callable[[Part], tuple[Tensor, ...]], what: str,
) -> list[tuple[Tensor, ...]]:
    """Let the gradient of each parameter be that of a loss which falls into parts, each process doing its share.

    Parts are added up in float64 and rounded once, so that the sum does not depend on who did which.

    Args:
        network: that ``work`` goes through.
        parameters: without gradients; one that no part reaches has none afterwards either.
        parts: of a batch; what goes through the model at once.
        work: from a part to its share of the loss, and whatever is to be known of it.
        what: the loss is of, as "policy".

    Returns:
        What ``work`` gave of each part, its loss first, detached and on the CPU.

    Raises:
        DivergedError: a part of the loss is not finite. It can be NaN while its gradient is finite, as one that is
            clipped: of that a gradient's own guard hears nothing.
    """
    parameters = list(parameters)
    sums: list[Tensor | None] = [None] * len(parameters)

    def one(part: Part) -> tuple[Tensor, ...]:
        loss, *told = work(part)
        expect_finite(f"the loss of the {what}", loss)
        loss.backward()
        for at, parameter in enumerate(parameters):
            if parameter.grad is not None:
                wide = parameter.grad.to(WIDE.get(parameter.device.type, torch.float64))
                sums[at] = wide if sums[at] is None else sums[at].add_(wide)
                parameter.grad = None
        return tuple(tensor.detach().cpu() for tensor in (loss, *told))

    def idle(part: Part) -> None:
        work(part)[0].backward()
        for parameter in parameters:
            parameter.grad = None

    with network.in_step() as in_step:
        rows = ranks.spread(parts, one, idle=idle if in_step else None)
    for parameter, total in zip(parameters, _over_ranks(parameters, sums), strict=True):
        parameter.grad = None if total is None else total.to(parameter.dtype)
    return rows


def _over_ranks(parameters: Sequence[Tensor], sums: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The sums of all processes together; None where none has one."""
    if ranks.size() == 1:
        return sums
    known = torch.tensor([total is not None for total in sums], dtype=torch.float64, device=parameters[0].device)
    flat = [torch.zeros_like(p, dtype=torch.float64) if s is None else s for p, s in zip(parameters, sums, strict=True)]
    whole = ranks.summed(torch.cat([known, *(tensor.flatten() for tensor in flat)]))
    pieces = whole[len(known):].split([tensor.numel() for tensor in flat])
    return [
        piece.view_as(tensor) if known else None
        for known, piece, tensor in zip(whole[: len(known)].tolist(), pieces, flat, strict=True)
    ]


def guarded_step(optimizer: Optimizer, max_grad_norm: float, what: str) -> float:
    """Clip the gradients, step, clear them; their norm before clipping.

    Raises:
        DivergedError: it is not finite, and no step was made; or what the step left is not: weights, or the optimizer's
            memory, in which one infinite square would freeze a weight for good without a word.
    """
    parameters = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if not math.isfinite(norm):
        raise DivergedError(f"the gradient of the {what} is {norm}; nothing was updated. Lower optim.lr.")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    left = {"weights": parameters}
    for entries in optimizer.state.values():
        for name, tensor in entries.items():
            left.setdefault(name, []).append(tensor)
    for name, tensors in left.items():
        # The largest magnitude, in one pass: NaN and infinity are kept by it, and no finite number overflows.
        expect_finite(f"{name} of the {what} after its step", nn.utils.get_total_norm(tensors, math.inf))
    return norm


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's memory as ``{"0/exp_avg": ...}``, parameters counted in their order; not copies.

    Learning rate and betas are not in it: they are the recipe's.
    """
    return {
        f"{index}/{entry}": tensor
        for index, entries in optimizer.state_dict()["state"].items() for entry, tensor in entries.items()
    }


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` gave, bit for bit; CheckpointError if a tensor does not fit its parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        index, _, entry = key.partition("/")
        known = index.isdecimal() and int(index) < len(parameters)
        if not known or (tensor.ndim and tensor.shape != parameters[int(index)].shape):
            raise CheckpointError(f"optimizer state {key}, {list(tensor.shape)}, belongs to no parameter trained here.")
        state[int(index)][entry] = tensor.clone()
    optimizer.load_state_dict({"state": dict(state), "param_groups": optimizer.state_dict()["param_groups"]})
