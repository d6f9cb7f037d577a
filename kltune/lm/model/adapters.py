"""Adapters over one set of frozen weights: which are on, which are refused, and layers that are computed twice.

Only adapters that leave the base weights as they are can serve: then the model with every adapter off *is* the
reference, bit for bit.

Gradient checkpointing (a layer keeps its input alone, and its backward pass computes the layer again) is for sequences
whose backward pass would not fit otherwise: six layers of 256 took 1.37 times as long and kept 16 MB instead of 336.
transformers' own switch works only in training mode, which would turn every dropout on. The trap is that the layer is
computed again later: by then another adapter may be on, and the gradient would silently be that of another function.
So a layer remembers how its adapters were switched.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from kltune.core.tensors import close
from kltune.errors import ModelError
from kltune.lm.data.documents import AdapterSettings
from kltune.lm.data.foreign import read_json, time_limit
from kltune.lm.model.files import NAMES_CODE, reading, refuse_code

POLICY = "default"  # PEFT saves an adapter of this name at the root of the folder, where every loader looks
VALUE = "value"
# These rewrite the base weights when the adapter is made, so "adapter off" is no longer the model that was loaded.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# These put virtual tokens in front of a prompt; there is no layer to switch off.
PROMPT_LEARNING = {"ADAPTION_PROMPT"} | {
    kind.value for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if issubclass(config, PromptLearningConfig)
}
# These open others that their configuration names, wherever they are, when they are put on a model.
WANT_OTHERS = ("XLORA", "SHADOW")
OTHER_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")    # as PEFT calls them
PATTERN_SECONDS = 2
PROBED = 16             # tokens on which a model is tried when it is opened
SwitchState = list[tuple[bool, list[str]]]  # by layer: whether adapters are off, and which is on otherwise


class AdapterSwitch:
    """Turns adapters on and off by flag on a list of layers found once.

    PEFT's ``disable_adapter`` walks every module and takes 6-11 ms; during sampling and measuring that adds up. The
    flags are PEFT's own, and ``Policy`` proves at start-up that adapters off gives the base model's logits.
    """

    def __init__(self, model: nn.Module):
        self.layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    def state(self) -> SwitchState:
        """Which adapters are on in each layer, for ``as_in``."""
        return [(layer._disable_adapters, layer._active_adapter) for layer in self.layers]

    @contextmanager
    def as_in(self, state: SwitchState) -> Iterator[None]:
        """Within: adapters are on as they were in a state. After, exceptions included: as before."""
        before = self.state()
        self._set(state)
        try:
            yield
        finally:
            self._set(before)

    def active(self, name: str | None) -> AbstractContextManager[None]:
        """Within: only adapter ``name`` is on, or none. After, exceptions included: as before."""
        return self.as_in([(name is None, layer._active_adapter if name is None else [name]) for layer in self.layers])

    def _set(self, state: SwitchState) -> None:
        for layer, (disabled, adapter) in zip(self.layers, state, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, adapter

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The tensors of one adapter, keyed by layer number and role; objects, not a search through names.

        Only layers that have the adapter are numbered: another one on other layers renames nothing.
        """
        parameters = {}
        holders = [layer for layer in self.layers if any(name in getattr(layer, r) for r in layer.adapter_layer_names)]
        for number, layer in enumerate(holders):
            for role in layer.adapter_layer_names:
                held = getattr(layer, role)
                if name in held:
                    parts = held[name].named_parameters() if isinstance(held[name], nn.Module) else [("", held[name])]
                    parameters |= {f"{number}.{role}.{part}": tensor for part, tensor in parts}
        return parameters


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder.

    Raises:
        ModelError: there is none, it is not JSON, or the adapter is of a kind that puts no layers on a model's own.
    """
    path = folder / "adapter_config.json"
    if not path.exists():
        if not folder.exists():
            raise ModelError(f"{folder}: there is no such folder.")
        hint = f" Did you mean {folder / 'final'}?" if (folder / "final" / "adapter_config.json").exists() else ""
        raise ModelError(f"{folder}: no adapter here (adapter_config.json is missing).{hint}")
    refuse_code(folder, "adapter", trusted=True)
    config = read_json(path, ModelError, AdapterSettings, finite=False)
    if code := [name for name in NAMES_CODE if config.get(name)]:     # nothing an adapter needs, trusted or not
        raise ModelError(f"{path} has {code[0]}, which would have Python code run; take it out.")
    kind = config.get("peft_type")
    if kind in PROMPT_LEARNING or kind not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise ModelError(
            f"{folder}: an adapter of type {kind}; kltune reads those that change a model's layers, as LORA and IA3, "
            "and none that puts tokens before the prompt."
        )
    if config.get("task_type") in OTHER_TASKS:
        raise ModelError(f"{folder}: an adapter made for the task {config['task_type']}; wanted one of a causal LM.")
    wanting = kind if kind in WANT_OTHERS else "LORA with arrow_config" if config.get("arrow_config") else None
    if wanting is not None:
        raise ModelError(f"{folder}: an adapter of type {wanting} works with models or adapters of other folders.")
    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    new = [name for name, value in config.items() if name not in known and (value is True or (value and isinstance(
        value, dict | list)))]
    if new:
        raise ModelError(
            f"{path}: {new[0]} is {json.dumps(config[new[0]])[:80]}, of which PEFT {peft.__version__} knows "
            "nothing: it would leave it out, and load another adapter than this one. Update peft, or take the key out "
            "if it changes nothing."
        )
    return config


def rewritten_base(config: dict[str, Any]) -> list[str]:
    """Reasons why an adapter belongs to other base weights than those of the model it names; [] if it does not.

    Its training began by changing them, and the change is not in its file.
    """
    faults = []
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        faults.append(f"init_lora_weights is {init!r}, which rewrites the base weights; use the default or 'gaussian'")
    if config.get("kasa_config") is not None:
        faults.append("kasa_config is set, which cuts the base weights down; use none")
    return faults


def trained_base(config: dict[str, Any], weights: dict[str, Tensor], model: nn.Module) -> list[str]:
    """Parts of the base that an adapter trained, so that it cannot be switched off; [] if none.

    weights: its tensors by their saved names. model: what it is for, with or without the adapter's layers.
    """
    faults = []
    if config.get("bias", "none") != "none":
        faults.append(f"bias is {config['bias']!r}, which trains the base's own biases; use 'none'")
    if config.get("modules_to_save"):
        faults.append(f"modules_to_save is {config['modules_to_save']}, which trains copies of base layers; use none")
    if config.get("trainable_token_indices"):
        faults.append("trainable_token_indices is set, which trains rows of the base's embedding; use none")
    if config.get("layer_replication"):
        faults.append("layer_replication is set, which gives the base other layers; use none")
    names = {name.removeprefix("base_model.model.") for name in model.state_dict()}
    both = [name for name in weights if name.removeprefix("base_model.model.") in names]
    if both and not faults:
        faults.append(f"its file holds {both[0]}, a tensor of the base itself; save without embedding layers")
    return faults


def load_compatible(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a saved adapter that leaves its base alone; ModelError for another one, or a damaged one."""
    config = read_adapter_config(folder)
    weights = load_weights(folder)
    faults = rewritten_base(config) + trained_base(config, weights, model)
    if faults:
        raise ModelError(
            f"{folder}: with this adapter off, the model is not its frozen base: " + "; ".join(faults) + "."
        )
    return weights


def config_to_fill(folder: Path) -> PeftConfig:
    """The configuration of a saved adapter whose tensors are about to be loaded: it starts as one that does nothing."""
    with reading(folder, "adapter"):
        config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    for name in ("init_lora_weights", "init_ia3_weights"):
        if hasattr(config, name):
            setattr(config, name, True)
    return config


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter, from safetensors only: a pickle could run code. ModelError if damaged."""
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        pickled = (folder / "adapter_model.bin").exists()
        advice = " adapter_model.bin is a pickle, which kltune never opens." if pickled else ""
        raise ModelError(f"{path}: no such file.{advice}")
    with reading(path, "adapter"):
        return load_file(path)


def wrap(model: nn.Module, config: PeftConfig, what: str) -> PeftModel:
    """Put the layers of an adapter on a model, in place.

    Raises:
        ModelError: no layer has one of the names, which come from ``what``, or one is of a kind that cannot serve.
    """
    _try_patterns(config, [name for name, _ in model.named_modules()], what)
    config.base_model_name_or_path = None  # PEFT would warn of another path; hashes tell bases apart
    with reading(what, "adapter", failed=f"does not fit {model.name_or_path}"):
        return get_peft_model(model, config, adapter_name=POLICY)


def _try_patterns(config: PeftConfig, names: list[str], what: str) -> None:
    """Raise ModelError if the expressions of an adapter take too long over a model's names, as PEFT will match them."""
    texts = [getattr(config, name, None) for name in ("target_modules", "exclude_modules", "layers_pattern")]
    patterns = [text for text in texts if isinstance(text, str)]
    patterns += [key for name in ("rank_pattern", "alpha_pattern") for key in getattr(config, name, None) or ()]
    slow = ModelError(f"{what}: its regular expressions take longer than {PATTERN_SECONDS} s over the names of layers.")
    with time_limit(PATTERN_SECONDS, slow), suppress(re.error):     # a wrong one is PEFT's to name
        for pattern in patterns:
            for name in names:
                re.match(rf"(.*\.)?({pattern})$", name)


def fill(model: PeftModel, weights: dict[str, Tensor], folder: Path, name: str = POLICY) -> None:
    """Load tensors into the layers made for them as adapter ``name``: all finite, and one to one, or ModelError."""
    for key, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{folder}: {key} holds NaN or infinity.")
    with reading(folder, "adapter", failed=f"does not fit {model.name_or_path}"):
        outcome = set_peft_model_state_dict(model, weights, adapter_name=name)
    prefix = f".{PEFT_TYPE_TO_PREFIX_MAPPING[model.peft_config[name].peft_type]}"
    held, lacking = model.state_dict(), set(outcome.missing_keys)
    filled = {held[key].data_ptr() for key in held.keys() - lacking}    # what layers share is in the file once
    missing = [
        key for key in lacking
        if name in key.partition(prefix)[2].split(".") and held[key].data_ptr() not in filled
    ]
    if missing or outcome.unexpected_keys:
        raise ModelError(
            f"{folder}: the adapter does not fit {model.name_or_path}: {len(missing)} of its layers have no tensor in "
            f"the file, {len(outcome.unexpected_keys)} tensors in the file have no layer"
            f"{_example(missing, outcome.unexpected_keys)}; was it made for another model, or saved under other names?"
        )


def _example(missing: list[str], unexpected: list[str]) -> str:
    return f" (found {unexpected[0]}, wanted {missing[0]})" if missing and unexpected else ""


def probe_ids(model: nn.Module, config: PeftConfig | None = None) -> Tensor:
    """A few tokens to try a model on; among them those that an adapter waits for. [1, S] int64"""
    words = model.config.get_text_config().vocab_size
    few = [token % words for token in range(PROBED)]
    trigger = getattr(config, "alora_invocation_tokens", None) or ()    # without them, an aLoRA does nothing
    more = [*(token for token in trigger if token < words), *few] if trigger else []
    return torch.tensor([[*few, *more]], device=next(model.parameters()).device)


def _untie(model: nn.Module) -> bool:
    """Give the head a matrix of its own where an adapter acts on it or on the embedding, and they are one; if so, True.

    Merged into the one matrix, what changes one of the two would change the other too.
    """
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    words, head = (end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends)
    tied = None not in ends and getattr(words, "weight", None) is getattr(head, "weight", model)
    if not tied or not any(isinstance(end, BaseTunerLayer) for end in ends):
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    return True


def merge_adapter(
    model: nn.Module, folder: Path, dtype: torch.dtype | None = None, *, where: str = "model.sft_adapter",
    whole: bool = False,
) -> tuple[nn.Module, float, bool]:
    """Add an adapter into the weights of its base: an SFT adapter, and the result is the reference from then on.

    Done once, before anything is frozen or hashed, in float32, and rounded to ``dtype`` (the model's own) at the end:
    in bfloat16 small updates are partly lost to that rounding, so the share that survived is returned too, as a
    projection on what was asked for; 1 in float32. The last says whether head and embedding were one matrix and are two
    now. where: who asks, for errors. whole: also one that trained parts of the base.

    Raises:
        ModelError: it changes the base in other ways, does not fit it one to one, changes nothing, or changes more
            merged than on its base.
    """
    weights = load_weights(folder) if whole else load_compatible(folder, model)
    dtype = dtype or next(model.parameters()).dtype
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters(remove_duplicate=False)}
    adapted = wrap(model.float(), config_to_fill(folder), str(folder))
    fill(adapted, weights, folder)
    untied = _untie(model)
    with torch.no_grad(), reading(folder, where, failed="cannot be merged into its base"):
        ids = probe_ids(model, adapted.peft_config[POLICY])
        wanted = adapted.eval()(input_ids=ids, use_cache=False).logits
        merged = adapted.merge_and_unload()
        found = merged(input_ids=ids, use_cache=False).logits
    if not close(found, wanted):
        raise ModelError(
            f"{folder}: merged into its base, this adapter gives another model than on it: a logit differs by "
            f"{(found - wanted).abs().max().item():.3g}. Layers that share a matrix would take its update twice; "
            "leave them out of lora.targets."
        )
    asked = arrived = 0.0
    for name, tensor in merged.named_parameters():
        delta = tensor.detach() - before[name].float()
        tensor.data = tensor.detach().to(dtype)  # parameters only: rotary buffers stay float32
        asked += delta.square().sum().item()
        arrived += ((tensor.detach().float() - before[name].float()) * delta).sum().item()
    if asked == 0.0:
        raise ModelError(f"{folder}: this adapter changes nothing (every merged update is 0); is it the trained one?")
    return merged, arrived / asked, untied


class CheckpointedLayers:
    """Gradient checkpointing of the layers of a trunk that their author marked for it."""

    def __init__(self, trunk: nn.Module):
        layers = (module for module in trunk.modules() if isinstance(module, GradientCheckpointingLayer))
        self._layers = [(layer, AdapterSwitch(layer)) for layer in layers]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within: forward passes keep each layer's input alone. Their backward passes may come later."""
        for layer, switch in self._layers:
            layer.forward = partial(_checkpointed, layer.forward, switch)
        try:
            yield
        finally:
            for layer, _ in self._layers:
                del layer.forward   # back to that of its class


def _checkpointed(forward: Callable[..., Any], switch: AdapterSwitch, *args, **kwargs) -> Any:
    state = switch.state()

    def again(*args, **kwargs) -> Any:
        with switch.as_in(state):
            return forward(*args, **kwargs)

    return checkpoint(again, *args, use_reentrant=False, **kwargs)
