"""An optimizer's memory by the names of its parameters, as checkpoints hold it."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from kltune.errors import CheckpointError


def optimizer_tensors(optimizer: Optimizer, parameter_names: Iterable[str]) -> dict[str, Tensor]:
    """The optimizer's memory by parameter name, as ``{"layer.weight/exp_avg": ...}``, for `save_checkpoint`.

    Args:
        optimizer: AdamW, or any whose state is tensors. Learning rate and betas are not in it: they are the recipe's.
        parameter_names: one for each parameter, in the order in which the optimizer was given them.
    """
    return {
        f"{name}/{entry}": tensor
        for name, parameter, _ in _named_parameters(optimizer, parameter_names)
        for entry, tensor in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: Optimizer, parameter_names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, bit for bit; the next step is the one an unbroken run would take.

    Not ``optimizer.load_state_dict``: it goes by position, and rounds the state to the parameter's dtype.

    Raises:
        CheckpointError: a name or a shape does not fit this optimizer's parameters.
    """
    rest: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        rest[name][entry] = tensor
    for name, parameter, group in _named_parameters(optimizer, parameter_names):
        optimizer.state[parameter] = {
            entry: _placed(f"{name}/{entry}", tensor, parameter, group) for entry, tensor in rest.pop(name, {}).items()
        }
    if rest:
        raise CheckpointError(f"the optimizer state is of {len(rest)} parameters that are not trained, as {min(rest)}.")


def _placed(key: str, tensor: Tensor, parameter: Tensor, group: dict[str, Any]) -> Tensor:
    if tensor.ndim and tensor.shape != parameter.shape:
        raise CheckpointError(f"optimizer state {key} is {list(tensor.shape)}, its parameter {list(parameter.shape)}.")
    # AdamW's step counter stays on the CPU unless the kernel reads it; all else lies beside its parameter.
    on_cpu = key.endswith("/step") and not (group.get("fused") or group.get("capturable"))
    return tensor.clone() if on_cpu else tensor.to(parameter.device, copy=True)


def _named_parameters(optimizer: Optimizer, names: Iterable[str]) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    pairs = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    return ((name, parameter, group) for name, (parameter, group) in zip(list(names), pairs, strict=True))
