"""A stand-in for an adapter, and processes that can be killed."""

import os
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from kltune.errors import KltuneError


def adapter_of(step: int, size: int = 256) -> Callable[[Path], None]:
    """Writes an adapter whose every weight is ``step``, so that a reader knows which one it has."""
    def write(folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")
        save_file({"lora_A.weight": torch.full((size,), float(step))}, folder / "adapter_model.safetensors")

    return write


def start(work: Callable[[], None]) -> int:
    """Run ``work`` in a process of its own; its exit code is that of the error, 99 for one that is a bug."""
    pid = os.fork()
    if pid:
        return pid
    tqdm.set_lock(threading.RLock())        # its own is shared with forks: one that is killed with it stops all others
    code = 99
    try:
        work()
        code = 0
    except KltuneError as error:
        code = error.exit_code
    finally:
        if code == 99:
            traceback.print_exc()
        os._exit(code)      # not sys.exit: this copy of pytest must not go on


def exit_code(pid: int) -> int:
    """Wait for a process; its code, negative for the signal that killed it, as subprocess has it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
