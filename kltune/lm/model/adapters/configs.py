"""What PEFT is told of a recipe's adapter."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from kltune.errors import ModelError
from kltune.recipe import LoraSection


def lora_config(lora: LoraSection, model: nn.Module, path: str) -> LoraConfig:
    """PEFT's configuration of a recipe's adapter on a model; ModelError for a target or layer that it has not."""
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    chosen = {} if lora.layers == "all" else _chosen(lora.layers, model, path)
    names = [name for name, _ in model.named_modules()]
    if chosen:      # only of what lies in them
        names = _within(names, chosen)
        if targets == "all-linear":     # beside which PEFT takes no numbers
            linear = (name for name in names if isinstance(model.get_submodule(name), nn.Linear | Conv1D))
            targets = sorted({name.rpartition(".")[2] for name in linear})
    if isinstance(targets, list):       # PEFT is content if one of several names matches
        unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
        if unknown:
            where = f" that lora.layers chooses, {lora.layers}" if chosen else ""
            raise ModelError(f"lora.targets: {', '.join(unknown)} names no layer of {path}{where}.")
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM",
        **chosen,
    )


def _within(names: Iterable[str], chosen: Mapping[str, list]) -> list[str]:
    """Those of the names that lie in the layers of ``_chosen``."""
    (called,), numbers = chosen["layers_pattern"], "|".join(map(str, chosen["layers_to_transform"]))
    return [name for name in names if re.match(rf"(.*\.)?{called}\.({numbers})\.", name)]


def _chosen(
    layers: float | Sequence[int], model: nn.Module, path: str, key: str = "lora.layers", other: str = "all"
) -> dict[str, list]:
    """What PEFT is told of the layers that a key names: their numbers, and what their list is called.

    By its last name, or where another list has that too, as a vision tower's, by its full path. other: what to write
    where there is no such list.
    """
    marked = {name: layer for name, layer in model.named_modules() if isinstance(layer, GradientCheckpointingLayer)}
    lists = _lists(marked)
    if len(lists) > 1:
        lists = _lists(_called(model, marked))
    if len(lists) != 1:
        raise ModelError(f"{key}: {path} has no one list of layers to choose from; write {other}.")
    (called,), (count,) = lists, lists.values()
    if isinstance(layers, float):
        layers = range(count - max(1, round(layers * count)), count)
    unknown = [number for number in layers if number >= count]
    if unknown:
        raise ModelError(
            f"lora.layers: found {', '.join(map(str, unknown))}; {path} has {count} layers, numbered from 0; wanted "
            f"numbers up to {count - 1}, or an upper share of them, as 0.25."
        )
    last = called.rpartition(".")[2]
    others = _lists(name for name, _ in model.named_modules()).keys() - {called}
    return {"layers_to_transform": sorted(set(layers)),
            "layers_pattern": [called if any(other.rpartition(".")[2] == last for other in others) else last]}


def _lists(names: Iterable[str]) -> Counter[str]:
    """The lists that modules called name.0, name.1 and so on lie in, and how many of them do."""
    return Counter(match[1] for match in (re.fullmatch(r"(.+)\.\d+", name) for name in names) if match)


@torch.no_grad()
def _called(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Which of some layers a pass over token ids calls: what reads pictures or sound is not among them."""
    called: list[str] = []
    hooks = [layer.register_forward_pre_hook(lambda *_, name=name: called.append(name))
             for name, layer in layers.items()]
    try:
        model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(called))


def config_beside(model: nn.Module, name: str, lora: LoraSection, upper: float | None, path: str) -> LoraConfig:
    """The configuration of one more adapter, of a recipe's size, on the layers of another, or those in an upper share.

    Raises:
        ModelError: the other is on no layer of that share.
    """
    own = model.peft_config[name]
    size = {"r": lora.rank, "lora_alpha": lora.alpha, "task_type": "CAUSAL_LM"}
    if upper is None:
        chosen = {"layers_to_transform": own.layers_to_transform, "layers_pattern": own.layers_pattern}
        return LoraConfig(**size, **chosen, target_modules=own.target_modules)
    base = model.get_base_model()
    # Of experts, whose matrices are no layers, PEFT takes one set of names for all adapters, wherever they lie.
    adapted = [name for name, layer in base.named_modules()
               if isinstance(layer, BaseTunerLayer) and not isinstance(layer, ParamWrapper)]
    targets = _within(adapted, _chosen(upper, base, path, "value_layers", "value_function: lora"))
    if not targets:
        raise ModelError(f"value_layers: lora.layers leaves the upper {upper:g} of the layers of {path} without an "
                         "adapter; wanted a larger share, or value_function: lora.")
    return LoraConfig(**size, target_modules=targets)


def sort_targets(folder: Path) -> None:
    """Sort the names of layers in a saved configuration, which PEFT keeps as a set: equal runs leave equal files."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
