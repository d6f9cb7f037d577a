"""What is in a model's folder: read by libraries that may raise anything, and held against what is wanted of it.

No file of a model or checkpoint is ever run, unless that was asked for by name. transformers, PEFT and the hub can be
led to import Python or to unpickle by a line of JSON; what comes from a stranger is looked through before any of them
opens it: only safetensors and JSON, and nothing that names code or leads out of the folder.

transformers loads what fits and leaves the rest, so a classifier becomes a language model without a word, and a deeper
model a shallower one. What nobody reads is looked at here.
"""

import errno
import hashlib
import importlib.util
import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from kltune.errors import KltuneError, ModelError, is_out_of_memory
from kltune.lm.data.documents import SHAPES
from kltune.lm.data.foreign import LARGEST, read_json
from kltune.lm.data.rows import HUB_NAME, is_place

# Keys by which a JSON file has a library import Python: the model's own (auto_map, custom_*), PEFT's (megatron_core,
# read where megatron_config is set), or kernels that are fetched from the hub and run. Not auto_mapping: ordinary
# adapters have it, and only PEFT's Auto classes, which kltune does not use, import what it names.
NAMES_CODE = {"auto_map", "custom_generate", "custom_pipelines", "megatron_config", "trust_remote_code"}
ATTENTION = {"attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
             "_experts_implementation"}
VOCABULARIES = {"tokenizer.json", "vocab.json", "added_tokens.json"}    # a token may be called anything
READ_WHOLE = (".json", ".jinja", ".txt", ".model")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
OTHER_HEADS = re.compile(r"For(\w*Classification|\w*QuestionAnswering|MultipleChoice|MaskedLM|NextSentencePrediction)$")
# Masks and angles that old checkpoints hold and models now compute; heads that are dropped after pretraining.
NOT_READ = re.compile(r"(attn|attention)\.(masked_)?bias$|inv_freq$|position_ids$|(^|\.)(mtp|pooler)\.")
DIGITS = re.compile(r"\d+")
STORED_AS = re.compile(r"[0-9a-f]{32,64}")
MOST_MADE_UP = 10_000_000       # numbers that a model may have beside those in its files: more are refused unmade
FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
# Ways of quantising that transformers loads without kernels of the hub, and by which packages. Others would fetch code,
# or unpack unasked.
MEASURED = {
    "bitsandbytes": ("bitsandbytes", "accelerate"), "compressed-tensors": ("compressed_tensors", "accelerate"),
    "torchao": ("torchao", "accelerate"), "gptq": ("gptqmodel", "optimum", "accelerate"),
    "awq": ("gptqmodel", "accelerate"),
}
IN_EXTRA = {"bitsandbytes", "compressed_tensors", "accelerate"}      # of kltune[quant]
WAYS_ON = {     # by what an exception's class, or else its text, has in it
    "SafetensorError": "a file is damaged or cut off; download or copy it again",
    "untagged enum": "tokenizer.json is of another version of tokenizers than the one here; upgrade it, or save the "
                     "tokenizer again with this one",
    "ImportError": "install what it names, or give a model that does without",
    "OSError": "look at the files in the folder, or download them again",
}


def refuse_code(path: str | Path, what: str, error: type[KltuneError] = ModelError, *, trusted: bool = False) -> None:
    """Look through the files of a folder before anything loads one; of a name on the hub there is nothing to see.

    trusted: the user asked for its code to be run; then what names code is let through, and nothing else.

    Raises:
        error: there is no such folder, and nothing that may be a name on the hub; a file
            names code to be run, leads out of the folder, is no ordinary file, holds pickled weights and
            nothing beside them, is not JSON or has a field of another kind than wanted. Names the file and the key.
    """
    folder = Path(path)
    if not folder.exists() and is_place(str(path)):
        raise error(f"{what}: {path}: there is no such folder here, and it is no name on the hub.")
    entries = [file for file in sorted(folder.iterdir()) if not file.is_dir()] if folder.is_dir() else []
    for file in (*entries, *folder.glob("additional_chat_templates/*")):
        _refuse_strange(file, folder, what, error)
    pickled = [file.name for file in entries if file.suffix in PICKLES and "model" in file.stem]
    if pickled and not any(file.suffix == ".safetensors" for file in entries):
        raise error(
            f"{what}: {folder / pickled[0]} is a pickle, which kltune never opens; save it again as safetensors."
        )
    for file in (file for file in entries if file.suffix == ".json"):
        content = read_json(file, error, SHAPES.get(file.name), what, finite=False)
        for key, value in () if file.name in VOCABULARIES else _entries(content):
            if file.name.endswith(".safetensors.index.json") and not _is_safetensors(key, value):
                raise error(f"{what}: {file} says that {key} is in {value}; kltune opens only safetensors.")
            if key.endswith("_file") and isinstance(value, str) and _is_outside(value, folder):
                raise error(f"{what}: {file} has {key}: {value}, a file outside of the folder; kltune opens none.")
            names_code = (key in NAMES_CODE and value) or (key in ATTENTION and isinstance(value, str) and "/" in value)
            if names_code and not trusted:
                raise error(
                    f"{what}: {file} has {key}: {json.dumps(value)[:80]}, which would have Python code run that kltune "
                    "has not read. Remove the key if the model works without it, or, if you trust the folder, add "
                    "--trust-remote-code (and model.trust_remote_code: true in a recipe)."
                )


def _refuse_strange(file: Path, folder: Path, what: str, error: type[KltuneError]) -> None:
    """Raise for a pipe, a device, a giant, and for a link out of a folder to what may be private.

    Not for one to weights, which nothing but safetensors opens; nor into a cache of the hub or a store (of DVC, say)
    where a file is called by its hash: checkpoints take other files along, and no private file is called so.
    """
    try:
        target, status = file.resolve(strict=True), file.stat()
    except (OSError, RuntimeError) as cause:
        if file.is_symlink():
            raise error(f"{what}: {file} is a link that leads nowhere; copy the file there.") from cause
        raise error(f"{what}: {file} cannot be read: {cause}.") from cause
    home, linked = folder.resolve(), file.is_symlink() and file.suffix != ".safetensors"
    blobs = [place.parent / "blobs" for place in home.parents if place.name == "snapshots"]
    if linked and not (any(target.is_relative_to(place) for place in (home, *blobs)) or _is_called_by_its_hash(target)):
        raise error(f"{what}: {file} is a link to {target}, outside of the folder; kltune opens nothing there. Copy "
                    "the file in its place if it is the one that is meant.")
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{what}: {file} is a pipe or a device, wanted an ordinary file.")
    if status.st_size > LARGEST and file.suffix in READ_WHOLE:
        raise error(f"{what}: {file} has {status.st_size:,} bytes; no such file of a model has more than {LARGEST:,}.")


def _is_called_by_its_hash(file: Path) -> bool:
    """Whether its name, a part of it, or it and its folder's (ab/cdef...) is the hash of what is in the file."""
    if not file.is_file() or file.stat().st_size > LARGEST:
        return False
    content, names = file.read_bytes(), {*STORED_AS.findall(file.name), file.parent.name + file.name}
    return any(hashlib.new(kind, content).hexdigest() in names for kind in ("md5", "sha256"))


def _is_outside(value: str, folder: Path) -> bool:
    """Whether it names a file that is here, and not in the folder."""
    place = os.path.realpath(folder / value.replace("\0", ""))
    return os.path.exists(place) and not Path(place).is_relative_to(folder.resolve())


def _is_safetensors(key: str, value: Any) -> bool:
    """An entry of an index that is no weight, or one in a safetensors file of the same folder."""
    return not isinstance(value, str) or key == "format" or (value.endswith(".safetensors") and "/" not in value)


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, however deep."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            yield from item.items()
        if isinstance(item, dict | list):
            left += item.values() if isinstance(item, dict) else item


@contextmanager
def reading(
    path: str | Path, where: str, error: type[KltuneError] = ModelError, failed: str = "could not be loaded"
) -> Iterator[None]:
    """Within: whatever a library raises over the files of a folder ends as one line: folder, reason and way on.

    path: the folder, or a name on the hub. where: which key or option named it. failed: what did not succeed. Memory or
    a disk that is full is no fault of the files and goes through.
    """
    try:
        yield
    except KltuneError:
        raise
    except BaseException as cause:
        memory = (isinstance(cause, OSError) and cause.errno in FULL_DISK) or is_out_of_memory(cause)
        # What Rust panics over is no Exception.
        if memory or not (isinstance(cause, Exception) or type(cause).__name__ == "PanicException"):
            raise
        raise error(f"{where}: {path}: {_reason(str(path), failed, cause)}") from cause


def _reason(path: str, failed: str, cause: Exception) -> str:
    if not Path(path).exists() and isinstance(cause, OSError):
        if not HUB_NAME.fullmatch(path):
            return "there is no such folder here, and it is no name on the hub."
        return f"there is no such folder here, and as a name on the hub it gave: {first_line(cause)}"
    kinds = " ".join(kind.__name__ for kind in type(cause).__mro__)
    advice = next((f" ({way})" for sign, way in WAYS_ON.items() if sign in kinds or sign in str(cause)), "")
    named = "" if isinstance(cause, OSError | ValueError) else f"{type(cause).__name__}: "
    return f"{failed}: {named}{first_line(cause)}{advice}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that is not empty; and the next, where it only announces that."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def quantisation_of(config: Any) -> str | None:
    """How the weights of a model are rounded, by its configuration, as ``bitsandbytes, 4 bit``; None: they are not."""
    found = next((q for q in _own(config, "quantization_config") + _own(config, "compression_config") if q), None)
    if found is None:
        return None
    stored = found if isinstance(found, dict) else found.to_dict()
    method = getattr(stored.get("quant_method"), "value", stored.get("quant_method")) or "an unnamed method"
    loads = next((bits for bits in (4, 8) if stored.get(f"load_in_{bits}bit")), None)      # as bitsandbytes has it
    bits = stored.get("bits") or loads
    return f"{method}, {bits} bit" if type(bits) is int else str(method)


def refuse_quantised(config: Any, path: str, where: str, error: type[KltuneError] = ModelError) -> None:
    """Raise unless a model's configuration says that its weights are stored as they are.

    Quantised ones are rounded, some differently on each device; gradients through them are not those of the model.
    """
    if method := quantisation_of(config):
        raise error(
            f"{where}: {path} is quantised ({method}); give the unquantised model, also for an adapter trained on this "
            "one. Quantised models are measured (kltune eval-kl, sample), and nothing is trained on or merged into one."
        )


def refuse_unmeasured(config: Any, path: str, where: str) -> None:
    """Raise ModelError for a model that is quantised in a way that nothing here computes; names what is missing."""
    method = quantisation_of(config)
    if method is None:
        return
    needed = MEASURED.get(method.partition(",")[0])
    if needed is None:
        raise ModelError(f"{where}: {path} is quantised ({method}); kltune measures models of "
                         f"{', '.join(MEASURED)} and GGUF files. Give the unquantised model.")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        named = " ".join(name.replace("_", "-") for name in missing)
        install = "'kltune[quant]'" if IN_EXTRA.issuperset(missing) else named
        raise ModelError(f"{where}: {path} is quantised ({method}), which needs {named} to be computed, not installed "
                         f"here: pip install {install}.")


def _own(config: Any, name: str) -> list[Any]:
    return [getattr(part, name, None) for part in (config, config.get_text_config())]


def refuse_oversized(config: Any, path: str, where: str, error: type[KltuneError], build: Any) -> None:
    """Raise for a configuration of far more layers or numbers than a folder's files hold, before memory is taken.

    build: makes a model of a configuration; here without memory.
    """
    sizes = [_held(file, error, where) for file in Path(path).glob("*.safetensors")] if Path(path).is_dir() else []
    tensors, numbers = (sum(size[part] for size in sizes) for part in (0, 1))
    own = config.get_text_config()
    counts = {name: value for name, value in vars(own).items() if type(value) is int}
    layers = getattr(own, "num_hidden_layers", None)
    if not sizes or not isinstance(layers, int):
        return
    if layers > tensors:
        raise error(f"{where}: {path}/config.json: num_hidden_layers: found {layers:,}, but its files hold {tensors:,} "
                    "tensors in all.")
    large = {name: value for name, value in counts.items() if value > numbers and not name.endswith("_token_id")}
    if not large:
        return
    with reading(path, where, error), torch.device("meta"):
        described = sum(tensor.numel() for tensor in build(config).parameters())
    if described > MOST_MADE_UP + 2 * numbers:
        raise error(f"{where}: {path}/config.json describes a model of {described:,} numbers ({next(iter(large))}: "
                    f"{next(iter(large.values())):,}), but its files hold {numbers:,}.")


def _held(file: Path, error: type[KltuneError], where: str) -> tuple[int, int]:
    """How many tensors and numbers a file has, by its header."""
    with reading(file, where, error), safe_open(file, framework="pt") as held:
        shapes = [held.get_slice(name).get_shape() for name in held.keys()]      # noqa: SIM118 (safe_open is no dict)
    return len(shapes), sum(math.prod(shape) for shape in shapes)


def refuse_other_heads(config: Any, path: str, where: str) -> None:
    """Raise ModelError for a model that was trained to label texts or to fill gaps, by what its configuration says."""
    names = getattr(config, "architectures", None) or []
    others = [name for name in names if OTHER_HEADS.search(name)]
    if not others or len(others) < len(names):
        return
    if others[0].endswith("MaskedLM"):
        raise ModelError(
            f"{where}: {path} is a {others[0]}, which reads the tokens it is to predict; wanted a causal "
            "language model."
        )
    raise ModelError(
        f"{where}: {path} is a {others[0]}, which labels texts and says none; wanted a causal language model. It can "
        f"score responses, as reward: [{{kind: classifier, path: {path}}}] (kind: model where it has one output)."
    )


def check_all_read(
    model: nn.Module, report: dict[str, Any], path: str, where: str, error: type[KltuneError] = ModelError
) -> None:
    """Raise unless files and model hold the same tensors; what stands beside the model is noted on stderr.

    report: what ``from_pretrained`` gives with ``output_loading_info``, of mismatched sizes too.
    """
    made_up = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if made_up:
        raise error(
            f"{where}: the files of {path} lack {_some(made_up)} or hold it in another shape than config.json says; "
            "transformers would put random numbers there."
        )
    unread = sorted(name for name in report["unexpected_keys"] if not NOT_READ.search(name))
    own = {DIGITS.sub("#", name) for name in model.state_dict()}
    parts = [name for name in unread if _is_part(DIGITS.sub("#", name), own)]
    if parts:
        raise error(
            f"{where}: the files of {path} hold {_some(parts)}, which {type(model).__name__} as config.json describes "
            "it does not read: another model than the one that was saved would be loaded. Correct config.json."
        )
    if unread:
        print(f"note: {where}: {type(model).__name__} does not read {_some(unread)} of {path}.", file=sys.stderr)


def _is_part(name: str, own: set[str]) -> bool:
    """Whether a tensor belongs into a model that has tensors of its ``own``, rather than beside it as another head."""
    return any(name.split(".")[0] == known.split(".")[0] or known.endswith(f".{name}") for known in own)


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}"


@cache
def say_once(line: str) -> None:
    """Print a line on stderr, however often it comes up."""
    print(line, file=sys.stderr)


def size_of(path: str) -> str:
    """How much there is to read of a model in a folder, in words; nothing of a name on the hub."""
    total = sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) if Path(path).is_dir() else 0
    return f" ({total / 1e9:.2f} GB)" if total else ""
