"""Memory that runs out: what was being done, what it asked for, what there is, and which key to lower there."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kltune.errors import OutOfMemory, is_out_of_memory
from kltune.lm.machine.device_memory import device_bytes

ASKED = re.compile(r"(?:allocate|to allocate|allocating)\D{0,20}?([\d.]+) ?(bytes|[KMGT]i?B)", re.IGNORECASE)
UNITS = {"b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
LOADING = ("loading the model", "take a smaller one, or model.dtype: bfloat16")
SAMPLING = ("sampling responses and measuring them", "lower run.memory_fraction, which changes no result, "
            "sampling.max_new_tokens or data.max_prompt_tokens")
SCORING = ("scoring responses", "lower sampling.prompts_per_step, or score with a smaller model")
UPDATING = ("updating", "lower optim.micro_batch_size or write optim.checkpoint_layers: always, which change no "
            "result; or lower data.max_prompt_tokens")
ANYTHING = ("running a stage", "lower optim.micro_batch_size or the tokens of a row; the same command with --dry-run "
            "says what each phase takes")
CURVATURE = ("measuring the curvature", "lower optim.micro_batch_size or trpo.fisher_fraction")


@contextmanager
def phase(what: tuple[str, str], device: torch.device) -> Iterator[None]:
    """Within: memory that runs out is said with all that helps; ``what`` is being done, and what to do about it.

    Raises:
        OutOfMemory: it ran out, whichever library noticed.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        doing, to_do = what
        raise OutOfMemory(f"memory ran out while {doing}: {asked_for(error)}{there_is(device)}; {to_do}.") from error


def asked_for(error: BaseException) -> str:
    """What an allocation wanted, where its error says it."""
    found = ASKED.search(str(error))
    if found is None:
        return ""
    size = float(found[1]) * (UNITS[found[2][0].lower()] if found[2] != "bytes" else 1)
    return f"{size / 1e9:.2f} GB more were wanted, "


def there_is(device: torch.device) -> str:
    """What a device has, and how much of it is in use."""
    whole = device_bytes(device) / 1e9
    if device.type != "cuda":
        return f"of {whole:.2f} GB that {device} has"
    return f"of {whole:.2f} GB that {device} has, {torch.cuda.memory_allocated(device) / 1e9:.2f} GB in tensors"
