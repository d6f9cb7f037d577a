"""Adapters over one set of frozen weights: which are on, which are refused, and how one becomes part of the weights.

Only adapters that leave the base weights as they are can serve: then the model with every adapter off *is* the
reference, bit for bit.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from kltune.core.kl.divergence import kl_exact
from kltune.core.products import product, with_update
from kltune.core.tensors import at_least_float32, close, log_distribution
from kltune.errors import ModelError
from kltune.lm.data.documents import AdapterSettings
from kltune.lm.data.foreign import read_json, time_limit
from kltune.lm.model.files import NAMES_CODE, reading, refuse_code

POLICY = "default"  # PEFT saves an adapter of this name at the root of the folder, where every loader looks
# Others lie beside it under names that no layer of a model has: PEFT leaves out of a file every tensor that has one of
# their names in its own, and of BERT's kind each attention has a layer called value.
VALUE = "kltune_value"
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
SAID_ROWS, SAID_TOKENS = 8, 16      # on which a merged adapter is held against the same one unmerged
ANOTHER_MODEL = (
    "{}: merged into its base, this adapter gives another model than on it: {}. Layers that share a matrix would take "
    "its update twice; leave them out of lora.targets."
)
ROUNDED = 0.1           # of the mean logit that merging in a narrow dtype may move logits by
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


@dataclass(frozen=True)
class Merge:
    """What became of an adapter that was merged.

    survived: share of its update that rounding to the dtype of the weights left; 1 in float32. untied: head and
    embedding were one matrix and are two now. kl: from the base with the adapter on to the merged one, nats per token
    of what the first says; None in float32, where they are one.
    """

    survived: float = 1.0
    untied: bool = False
    kl: float | None = None


def merge_adapter(
    model: nn.Module, folder: Path, *, where: str = "model.sft_adapter", whole: bool = False,
    rounded: torch.dtype | None = None,
) -> tuple[nn.Module, Merge]:
    """Add an adapter into the weights of its base: an SFT adapter, and the result is the reference from then on.

    Done once, before anything is frozen or hashed, a layer at a time: in float32, and rounded to the layer's dtype. In
    bfloat16 small updates are partly lost to that rounding, so what survived is measured: as a projection on what was
    asked for, and as a KL.

    Args:
        model, folder: the base and its adapter.
        where: who asks, for errors.
        whole: take also an adapter that trained parts of the base.
        rounded: what the result is rounded to in the end, if not as its layers are.

    Raises:
        ModelError: it changes the base in other ways, does not fit it one to one, changes nothing, or changes more
            merged than on its base.
    """
    weights = load_weights(folder) if whole else load_compatible(folder, model)
    adapted = wrap(model, config_to_fill(folder), str(folder)).eval()
    fill(adapted, weights, folder)
    del weights
    untied = _untie(model)
    narrow = next(model.parameters()).dtype not in (torch.float32, torch.float64)
    layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    updates: list[tuple[float, float]] = []
    with torch.no_grad(), reading(folder, where, failed="cannot be merged into its base"):
        ids = probe_ids(model, adapted.peft_config[POLICY])
        wanted, unread = _logits_and_unread(adapted, ids, layers)
        kl, said = None, _spoken(adapted) if narrow else None
        spoken = None if said is None else adapted(input_ids=said, use_cache=False).logits
        if narrow:
            _expect_own_matrices(layers, folder)
        for layer in layers:
            layer.merge = partial(_merge_wide, layer, layer.merge, updates, rounded)
        for layer in unread:    # what the model reads past the adapter must not change with it, by a single bit
            layer.merge()
        if unread:
            _expect_same(adapted(input_ids=ids, use_cache=False).logits, wanted, folder, exactly=True)
        merged = adapted.merge_and_unload()
        _expect_same(merged(input_ids=ids, use_cache=False).logits, wanted, folder)
        if said is not None:
            kl = kl_exact(spoken, merged(input_ids=said, use_cache=False).logits, 1.0).mean().item()
    # None of an adapter that is made of parts of the base alone.
    asked, arrived = map(sum, zip(*updates, strict=True)) if updates else (1.0, 1.0)
    if asked == 0.0:
        raise ModelError(f"{folder}: this adapter changes nothing (every merged update is 0); is it the trained one?")
    return merged, Merge(arrived / asked, untied, kl)


class UpdatedLinear(nn.Linear):
    """A linear layer with a frozen update, W x + bias + s B A x: to whatever adapts it, one layer."""

    update_scale: float

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        out = product(x, self.weight, self.bias)
        return with_update(out, x, self.update_a, self.update_b, self.update_scale)


def keep_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """Make an SFT adapter part of the reference beside its weights, which nothing rounds then.

    Raises:
        ModelError: it changes the base in other ways, does not fit it one to one, or is more than two matrices a layer.
    """
    weights = load_compatible(folder, model)
    adapted = wrap(model, config_to_fill(folder), str(folder)).eval()
    fill(adapted, weights, folder)
    for name, layer in adapted.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        plain = isinstance(layer, LoraLayer) and not layer.lora_variant and type(layer.get_base_layer()) is nn.Linear
        if not plain or layer.lora_bias[POLICY]:
            raise ModelError(
                f"{folder}: its layer {name} is more than a LoRA on a linear layer, which model.merge: false cannot "
                "keep beside the weights; write merge: true."
            )
        base, dtype = layer.get_base_layer(), layer.get_base_layer().weight.dtype
        base.__class__, base.update_scale = UpdatedLinear, layer.scaling[POLICY]
        for letter, matrix in (("a", layer.lora_A), ("b", layer.lora_B)):
            base.register_parameter(f"update_{letter}", nn.Parameter(matrix[POLICY].weight.detach().to(dtype), False))
    return adapted.unload()


def _merge_wide(
    layer: BaseTunerLayer, merge: Callable, updates: list, rounded: torch.dtype | None, *how: Any, **more: Any
) -> None:
    """Merge one layer in float32 and round it; put |asked|² and asked · arrived of its update to the others."""
    before = {name: tensor.data for name, tensor in layer.get_base_layer().named_parameters()}
    for tensor in layer.get_base_layer().parameters():
        tensor.data = at_least_float32(tensor.data).clone()
    merge(*how, **more)
    for name, tensor in layer.get_base_layer().named_parameters():
        old, new = before[name], tensor.data
        tensor.data = new.to(old.dtype)
        asked, arrived = new - old, tensor.data if rounded is None else new.to(rounded)
        updates.append((asked.square().sum().item(), ((arrived - old.to(new.dtype)) * asked).sum().item()))


def _logits_and_unread(adapted: PeftModel, ids: Tensor, layers: Sequence[BaseTunerLayer]) -> tuple[Tensor, list]:
    """Logits on some tokens, and the layers that were not called for them."""
    called: set[nn.Module] = set()
    hooks = [layer.register_forward_pre_hook(lambda layer, _: called.add(layer)) for layer in layers]
    logits = adapted(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, [layer for layer in layers if layer not in called]


def _expect_same(found: Tensor, wanted: Tensor, folder: Path, exactly: bool = False) -> None:
    """Raise ModelError unless merging left a model's logits as they were: but for rounding, or to the bit."""
    gap, size = (found - wanted).float().abs(), wanted.float().abs()
    # In a narrow dtype, through many layers, the largest may be far off.
    near = close(found, wanted) if found.dtype == torch.float32 else gap.mean() <= ROUNDED * size.mean()
    if not (torch.equal(found, wanted) if exactly else near):
        raise ModelError(ANOTHER_MODEL.format(folder, f"a logit differs by {gap.max().item():.3g}"))


def _expect_own_matrices(layers: Sequence[BaseTunerLayer], folder: Path) -> None:
    """Raise ModelError if two layers share a weight: in a narrow dtype the logits may not tell."""
    bases = {id(base): base for base in (layer.get_base_layer() for layer in layers)}
    weights = [tensor.data_ptr() for base in bases.values() for tensor in base.parameters()]
    if len(set(weights)) < len(weights):
        raise ModelError(ANOTHER_MODEL.format(folder, "two of its layers have one weight"))


def _spoken(adapted: PeftModel) -> Tensor:
    """A few short texts that a model says, always the same. [SAID_ROWS, SAID_TOKENS] int64"""
    rng, config = np.random.default_rng(0), adapted.config.get_text_config()
    first = config.bos_token_id if isinstance(config.bos_token_id, int) else 0
    ids = torch.full((SAID_ROWS, 1), first, device=next(adapted.parameters()).device)
    while ids.shape[1] < SAID_TOKENS:
        cumulative = log_distribution(adapted(input_ids=ids, use_cache=False).logits[:, -1], 1.0).exp().cumsum(-1)
        at = torch.tensor(rng.random((SAID_ROWS, 1)), dtype=cumulative.dtype, device=ids.device) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, at, right=True).clamp(max=cumulative.shape[-1] - 1)
        ids = torch.cat([ids, token], dim=1)
    return ids
