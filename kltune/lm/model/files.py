"""What is in a model's folder: read by libraries that may raise anything, and held against what is wanted of it.

transformers loads what fits and leaves the rest, so a classifier becomes a language model without a word, and a deeper
model a shallower one. What nobody reads is looked at here.
"""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kltune.errors import KltuneError, ModelError

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
OTHER_HEADS = re.compile(r"For(\w*Classification|\w*QuestionAnswering|MultipleChoice|MaskedLM|NextSentencePrediction)$")
# Masks and angles that old checkpoints hold and models now compute; heads that are dropped after pretraining.
NOT_READ = re.compile(r"(attn|attention)\.(masked_)?bias$|inv_freq$|position_ids$|(^|\.)(mtp|pooler)\.")
DIGITS = re.compile(r"\d+")
FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
WAYS_ON = {     # by what an exception's class, or else its text, has in it
    "SafetensorError": "a file is damaged or cut off; download or copy it again",
    "untagged enum": "tokenizer.json is of another version of tokenizers than the one here; upgrade it, or save the "
                     "tokenizer again with this one",
    "ImportError": "install what it names, or give a model that does without",
    "OSError": "look at the files in the folder, or download them again",
}


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
    except (KltuneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as cause:
        if (isinstance(cause, OSError) and cause.errno in FULL_DISK) or "can't allocate memory" in str(cause):
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


def refuse_quantised(config: Any, path: str, where: str, error: type[KltuneError] = ModelError) -> None:
    """Raise unless a model's configuration says that its weights are stored as they are.

    Quantised ones are rounded, some differently on each device; neither exact KL nor gradients are those of the model.
    """
    found = next((q for q in _own(config, "quantization_config") + _own(config, "compression_config") if q), None)
    if found is not None:
        stored = found if isinstance(found, dict) else vars(found)
        method = getattr(stored.get("quant_method"), "value", stored.get("quant_method")) or "an unnamed method"
        raise error(
            f"{where}: {path} is quantised ({method}); give the unquantised model, also for an adapter trained on this "
            "one (--reference, or model.path in a recipe)."
        )


def _own(config: Any, name: str) -> list[Any]:
    return [getattr(part, name, None) for part in (config, config.get_text_config())]


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
