"""No file of a model or checkpoint is ever run, unless that was asked for by name.

transformers, PEFT and the hub can be led to import Python or to unpickle by a line of JSON. What comes from a stranger
is looked through before any of them opens it: only safetensors and JSON, and nothing that names code.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kltune.errors import ModelError

# Keys by which a JSON file has a library import Python: the model's own (auto_map, custom_*), PEFT's (megatron_core,
# read where megatron_config is set), or kernels that are fetched from the hub and run. Not auto_mapping: ordinary
# adapters have it, and only PEFT's Auto classes, which kltune does not use, import what it names.
NAMES_CODE = {"auto_map", "custom_generate", "custom_pipelines", "megatron_config"}
ATTENTION = {"attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"}
VOCABULARIES = {"tokenizer.json", "vocab.json", "added_tokens.json"}    # a token may be called anything


def refuse_code(folder: Path, what: str, *, trusted: bool = False) -> None:
    """Look through the JSON files of a folder before anything loads it.

    Args:
        folder: a model, adapter or checkpoint; where it is no folder (a name on the hub) there is nothing to look at.
        what: what to call it, as "checkpoint".
        trusted: the user asked for its code to be run; then only pickles are refused.

    Raises:
        ModelError: a file names code to be run, or weights that are pickled; names the file and the key.
    """
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        if path.name in VOCABULARIES:
            continue
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{what}: {path} is not JSON ({str(error)[:80]}).") from None
        for key, value in _entries(content):
            if path.name.endswith(".safetensors.index.json") and not _is_safetensors(key, value):
                raise ModelError(f"{what}: {path} says that {key} is in {value}; kltune opens only safetensors.")
            if not trusted and _names_code(key, value):
                raise ModelError(
                    f"{what}: {path} has {key}: {json.dumps(value)[:80]}, which would have Python code run that kltune "
                    "has not read. Remove the key if the model works without it, or, if you trust the folder, add "
                    "--trust-remote-code."
                )


def _names_code(key: str, value: Any) -> bool:
    if key in ATTENTION:
        return isinstance(value, str) and "/" in value
    return (key in NAMES_CODE or key == "trust_remote_code") and bool(value)


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
