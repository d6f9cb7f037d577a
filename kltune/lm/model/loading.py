"""Read models and tokenizers from a folder or the hub, and say exactly which ones they were."""

import importlib.util
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from kltune.errors import ModelError, RecipeError
from kltune.lm.data.chat import EndTokens, template_of
from kltune.lm.data.documents import AdapterSettings, SavedModel
from kltune.lm.data.foreign import read_json
from kltune.lm.machine.out_of_memory import LOADING, phase
from kltune.lm.model.files import (
    check_all_read,
    quantisation_of,
    reading,
    refuse_code,
    refuse_other_heads,
    refuse_oversized,
    refuse_quantised,
    refuse_unmeasured,
    say_once,
)
from kltune.lm.model.fingerprint import (
    config_differences,
    settings_of,
    sha256_text,
    tokenizer_sha256,
    weights_sha256,
)
from kltune.recipe import ModelSection, RunSection
from kltune.recipe.checks import NO_MPS

NO_CAUSAL = "could not be loaded as a causal language model"
CUTS = "The  Ferry's 2,024 lamps — don't\twait...\n\n  naïve cafe\u0301 日本語 Привет שלום 🙂 a_b(c) HTTPServer"
PIPELINE = ("normalizer", "pre_tokenizer", "model", "decoder")
WIDE = 512      # and wider: bfloat16 saves a CPU time
LISTED = "special tokens listed"        # a difference between tokenizers that changes the ids of no text


def pick_device(name: str, where: str = "run.device") -> torch.device:
    """The device that a key or option means: ``auto`` is the first GPU, or the CPU; RecipeError if absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "mps":
        raise RecipeError(f"{where}: {NO_MPS}.")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"{where}: found {name!r}, which is not available here ({str(error).splitlines()[0]})."
        ) from None


def prepare_device(run: RunSection) -> torch.device:
    """The device of a run, its kernels chosen as ``run.tf32`` and ``run.deterministic`` say; raises as ``pick_device``.

    It is the process's setting, not a model's.
    """
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # read when the first product is made
    torch.use_deterministic_algorithms(run.deterministic)
    torch.set_float32_matmul_precision("high" if run.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = run.tf32
    return pick_device(run.device)


def end_tokens(model: nn.Module, tokenizer, vocabulary: int) -> EndTokens:
    """Every token that ends a response, of the generation config, the tokenizer and its chat template.

    Raises:
        ModelError: none of them names one.
    """
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = listed if listed is not None else getattr(model.config, "eos_token_id", None)
    ends = EndTokens.of(tokenizer, listed if isinstance(listed, list | tuple) else [listed], vocabulary)
    if not ends.ids and not ends.unreachable:
        raise ModelError("Neither generation_config.json nor the tokenizer names an end token (eos_token_id).")
    return ends


def context_of(model: nn.Module) -> int | None:
    """How many tokens a row may have, by the model's configuration; None: no limit is known.

    Rotary angles of the kinds ``dynamic`` and ``longrope`` become others for a whole batch as soon as one of its rows
    is longer than the model was first trained for, and do not for what a cache holds: there a row ends.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limits = [getattr(config, "max_position_embeddings", None)]
    for one in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if one.get("rope_type") in ("dynamic", "longrope"):
            limits.append(one.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None))
    return min((limit for limit in limits if limit), default=None)


def load_tokenizer(path: str, trust_remote_code: bool = False, where: str = "model.path"):
    """The tokenizer of a model folder or hub name, with a padding token; ``where`` names the key it came from.

    Raises:
        ModelError: there is none that transformers can read, or it has neither a padding nor an end token.
    """
    refuse_code(path, where, trusted=trust_remote_code)
    with reading(path, where, failed="no tokenizer could be loaded from it"):
        if is_gguf(path):
            with alone(path, where) as source:
                tokenizer = AutoTokenizer.from_pretrained(**source)
            tokenizer.name_or_path = path
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **_locality(path))
            tokenizer = as_in_file(tokenizer, path)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError(f"{where}: the tokenizer of {path} names no end token; set eos_token in its config.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id  # harmless: masks come from lengths, never from ids
    return tokenizer


def as_in_file(tokenizer, path: str):
    """The tokenizer as its tokenizer.json has it, where the class that transformers takes cuts texts in another way.

    Some classes put a pre-tokenizer of their own in the place of the file's, by the name of the model's type: it is
    the file that the model was trained with. A class that makes up its normalizer from options of its own, as BERT's,
    is left as it is.
    """
    if not tokenizer.is_fast or hasattr(tokenizer, "do_lower_case"):
        return tokenizer
    try:
        plain = PreTrainedTokenizerFast.from_pretrained(path, **_locality(path))
    except (OSError, ValueError, KeyError, TypeError):      # there is no such file: the class is all there is
        return tokenizer
    parts = [[repr(getattr(one.backend_tokenizer, part)) for part in PIPELINE] for one in (tokenizer, plain)]
    if parts[0] == parts[1]:
        return tokenizer
    try:
        mine, files = (one.encode(CUTS, add_special_tokens=False) for one in (tokenizer, plain))
    except Exception as error:      # the Rust library raises nothing narrower
        raise ModelError(
            f"{path}: transformers' {type(tokenizer).__name__} does not cut texts as its tokenizer.json does, and one "
            f"of the two cannot cut any text ({error}); tokenizer_class in tokenizer_config.json, or model_type in "
            "config.json, asks for that class: is it the one that the file was made for?"
        ) from error
    if mine == files:
        return tokenizer
    say_once(f"note: {path}: transformers' {type(tokenizer).__name__} does not cut texts into tokens as its "
              "tokenizer.json does; the file is followed.")
    return plain


def load_base(section: ModelSection, device: torch.device, where: str = "model.path") -> nn.Module:
    """A causal LM in its recipe's dtype, from safetensors.

    Raises:
        ModelError: missing, damaged, not a causal LM, pickled weights only, a tensor missing or of another shape, or
            an adapter, which leaves the reference unsaid; quantised in a way that cannot be computed here.
    """
    path = section.path
    if is_gguf(path):
        return _unpacked(section, device, where)
    config = read_config(section, where)
    named = where if section.attention == "auto" else "model.attention"
    rounded = quantisation_of(config) is not None
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)       # or it tells at each product what it rounds
    with phase(LOADING, device), reading(path, named, failed=NO_CAUSAL):
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=_dtype(section.dtype, config, device),
            use_safetensors=True,
            trust_remote_code=section.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below
            **_attention(section.attention, device),
            **_locality(path),
            **({"device_map": {"": device}} if rounded else {}),      # what is packed is put there once, and not moved
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"{where}: {path} is an adapter, not a model; give its base as model.path.")
    check_all_read(model, report, path, where)
    for layer in model.modules():
        # A way of bitsandbytes for such CPUs: rounds to bfloat16, and is wrong once state_dict was called (0.50).
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    with phase(LOADING, device):
        return model if rounded else model.to(device)


def empty_base(section: ModelSection, device: torch.device, where: str = "model.path") -> nn.Module:
    """What ``load_base`` would put on a device, as shapes without weights, on the meta device; raises as it does."""
    config = read_config(section, where)
    with reading(section.path, where, failed=NO_CAUSAL), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=_dtype(section.dtype, config, device), trust_remote_code=section.trust_remote_code,
            **_attention(section.attention, device),
        )
    model.name_or_path = section.path
    return model


def read_config(section: ModelSection, where: str = "model.path", *, to_train: bool = False) -> Any:
    """The configuration of a causal LM that can be loaded, or trained, as far as can be seen without its weights.

    Raises:
        ModelError: missing, no causal LM, an adapter, quantised (to be trained at all, or in a way that nothing here
            measures), or one that would have code run.
    """
    path = section.path
    if is_gguf(path):
        with reading(path, where, failed=NO_CAUSAL), alone(path, where) as source:
            return AutoConfig.from_pretrained(**source)
    if Path(path).is_dir():
        _refuse_adapter(Path(path), where)
    elif Path(path).is_absolute():  # recipes make the paths they know absolute; hub names never are
        raise ModelError(f"{where}: {path} is no folder here; give the folder of a model, or a name on the hub.")
    refuse_code(path, where, trusted=section.trust_remote_code)
    with reading(path, where, failed=NO_CAUSAL):
        config = AutoConfig.from_pretrained(path, trust_remote_code=section.trust_remote_code, **_locality(path))
    (refuse_quantised if to_train else refuse_unmeasured)(config, path, where)
    refuse_other_heads(config, path, where)
    refuse_oversized(config, path, where, ModelError, AutoModelForCausalLM.from_config)
    return config


def compute_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same model, computing in a dtype: its weights rounded to it, but those that its class keeps in float32.

    Raises:
        ModelError: its weights are quantised, and packed in numbers that no rounding may touch.
    """
    if model.get_input_embeddings().weight.dtype == dtype:
        return model
    if method := quantisation_of(model.config):
        raise ModelError(f"--dtype: {model.name_or_path} is quantised ({method}) and was loaded in "
                         f"{model.get_input_embeddings().weight.dtype}; wanted auto, float32 or bfloat16.")
    kept = [*(getattr(model, "_keep_in_fp32_modules", None) or ()),
            *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not any(part in name.split(".") for part in kept):
            tensor.data = tensor.data.to(dtype)
    return model        # buffers stay: angles of positions are float32 in every dtype


def is_gguf(path: str | Path) -> bool:
    """Whether a model is one GGUF file."""
    return str(path).endswith(".gguf") and Path(path).is_file()


@contextmanager
def alone(path: str | Path, where: str) -> Iterator[dict[str, Any]]:
    """Within: what tells transformers to read a GGUF file and nothing that lies beside it.

    Raises:
        ModelError: the package that reads such files is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{where}: {path} is a GGUF file, and the package gguf, which reads them, is not installed: "
                         "pip install 'kltune[quant]'.")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.gguf").symlink_to(Path(path).resolve())
        yield {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf", "local_files_only": True}


def _unpacked(section: ModelSection, device: torch.device, where: str) -> nn.Module:
    """The model in a GGUF file, its weights as the numbers that they stand for: the quantised model, exactly."""
    packed = getattr(transformers, "GgufConfig", None)      # newer versions may keep weights packed unless told not to
    unpacking = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    with reading(section.path, where, failed=NO_CAUSAL), alone(section.path, where) as source:
        config = AutoConfig.from_pretrained(**source)
        model, report = AutoModelForCausalLM.from_pretrained(
            **source, dtype=_dtype(section.dtype, config, device), output_loading_info=True, **unpacking
        )
    model.name_or_path = section.path
    check_all_read(model, report, section.path, where)
    return model.to(device)


def own_tokenizer(folder: Path, trust_remote_code: bool = False):
    """The tokenizer that a checkpoint's folder, or its file, brings; None without one."""
    if not is_gguf(folder) and not (folder / "tokenizer_config.json").exists():
        return None
    return load_tokenizer(str(folder), trust_remote_code)


def tokenizer_differences(mine, others) -> list[str]:
    """What two tokenizers do not have in common: one line each, both sides named; [] if nothing.

    Whether that matters is for the rows to say. Special tokens that one lists and the other does not, as another
    padding token, change no row's ids.

    A chat template counts where both have one: a tokenizer without says nothing about how messages become text.
    """
    faults = []
    a, b = mine.get_vocab(), others.get_vocab()
    if a != b:
        moved = sorted(token for token in a.keys() & b.keys() if a[token] != b[token])
        example = next(iter([*sorted(a.keys() - b.keys()), *sorted(b.keys() - a.keys()), *moved]))
        faults.append(
            f"vocabulary: found {len(a)} tokens, wanted {len(b)}; for example {example!r} is {a.get(example)} here and "
            f"{b.get(example)} there"
        )
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(mine, name) != getattr(others, name):
            faults.append(f"special tokens: {name} is {getattr(mine, name)}, wanted {getattr(others, name)}")
    templates = [template_of(one) for one in (mine, others)]
    if all(templates) and templates[0] != templates[1]:
        digests = [sha256_text(template)[:12] for template in templates]
        faults.append(f"chat template: found sha256 {digests[0]}, wanted {digests[1]}")
    if not faults and tokenizer_sha256(mine) != tokenizer_sha256(others):
        specials = [sorted(one.all_special_ids) for one in (mine, others)]
        same = specials[0] == specials[1]
        faults.append(
            "how text is cut into tokens (normalizer, pre-tokenizer or model)" if same
            else f"{LISTED}: found ids {specials[0]}, wanted {specials[1]}"
        )
    return faults


def check_made_for(folder: Path, model: nn.Module, path: str) -> None:
    """Raise ModelError if kltune made this adapter on other weights; one made elsewhere does not say.

    Weights of another dtype hash differently though they are the same, so only like is compared with like.
    """
    record = folder / "kltune.json"
    if not record.exists():
        return
    content = read_json(record, ModelError, SavedModel, "model.sft_adapter")
    made = content["reference"]
    if content.get("stage") == "reward":
        raise ModelError(f"model.sft_adapter: {folder} is a reward model, which says nothing; give one of kltune sft.")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    digest = weights_sha256(dict(model.state_dict()), path)
    beneath = "" if made["sft_adapter"] is None else f" with {made['sft_adapter']} merged"
    if made["sha256"] != digest and (beneath or made["dtype"] == dtype):
        raise ModelError(
            f"model.sft_adapter: {folder} was trained on {made['path']}{beneath} (weights {made['sha256'][:12]}), but "
            f"model.path is {path} (weights {digest[:12]}); give the model it was trained on."
        )
    mine = settings_of(model.config)
    if not beneath and made.get("config") and (others := config_differences(mine, made["config"], path, made["path"])):
        raise ModelError(f"model.sft_adapter: {folder} was trained on another model:\n  " + "\n  ".join(others))


def _refuse_adapter(path: Path, where: str) -> None:
    if (path / "adapter_config.json").exists():
        config = read_json(path / "adapter_config.json", ModelError, AdapterSettings, where, finite=False)
        base = config.get("base_model_name_or_path")
        raise ModelError(
            f"{where}: {path} is a LoRA adapter, and which model is the reference is not said. For KL against base "
            f"+ this adapter write  model: {{path: {base}, sft_adapter: {path}}};  for KL against the bare base write  "
            f"model: {{path: {base}}}."
        )
    if not (path / "config.json").exists():
        raise ModelError(f"{where}: {path} holds no model (config.json is missing).")


def published_dtype(path: str, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype that a model's files are in, as its config.json has it; float32 where it does not say."""
    with reading(path, "reference", failed=NO_CAUSAL):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **_locality(path))
    return _published(config) or torch.float32


def _published(config: Any) -> torch.dtype | None:
    return getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)


def _dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on a CPU; on a GPU, bfloat16 for models published in half precision."""
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if _published_in_half(config) and device.type == "cuda" else torch.float32


def to_train(section: ModelSection, device: torch.device, *, full: bool = False) -> ModelSection:
    """The section with what ``model.dtype: auto`` comes to in a training, which on a CPU is not what measuring takes.

    A CPU that multiplies bfloat16 itself trains a model that is published in half precision and at least 512 wide as a
    GPU does, in bfloat16: a step took .71 to .5 of the time in float32 at 512 and 576, and .8 at 256. full: every
    weight is trained, which is never done in bfloat16.

    Raises:
        ModelError: quantised; or as ``read_config``.
    """
    if is_gguf(section.path):       # unpacked as it is loaded
        return section
    config = read_config(section, to_train=True)
    processor = getattr(torch.cpu, "get_capabilities", dict)()
    native = processor.get("avx512_bf16") or processor.get("amx_bf16")
    if full or section.dtype != "auto" or device.type != "cpu" or not native:
        return section
    wide = (getattr(config.get_text_config(), "hidden_size", None) or 0) >= WIDE
    return section.model_copy(update={"dtype": "bfloat16"}) if wide and _published_in_half(config) else section


def _published_in_half(config: Any) -> bool:
    return _published(config) in (torch.bfloat16, torch.float16)


def _attention(name: str, device: torch.device) -> dict[str, str]:
    """What transformers is told of ``model.attention``; RecipeError for one that this machine cannot compute."""
    if name == "flash_attention_2" and (device.type != "cuda" or importlib.util.find_spec("flash_attn") is None):
        raise RecipeError(
            f"model.attention: found flash_attention_2, which needs a GPU and the package flash-attn, on {device}; "
            "write auto or sdpa."
        )
    return {} if name == "auto" else {"attn_implementation": name}


def _locality(path: str) -> dict[str, bool]:
    """A local folder never touches the network."""
    return {"local_files_only": True} if Path(path).exists() else {}
