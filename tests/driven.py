"""kltune as one process of several, with models of any size shared among them, and a fault where FAULT says.

    python -m tests.driven ppo --recipe R.yaml --processes 2        or, in a fork: install, then main

FAULT is JSON: {"kind", "phase", "rank", "after": how often the phase is passed before, and if wanted "flag": a
file that is made as it happens}.
"""

import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from kltune.cli import main
from kltune.errors import StorageError

KINDS = ("SIGINT", "SIGTERM", "killed", "exception", "NaN", "full disk")
CODES = {"SIGINT": 130, "SIGTERM": 143, "killed": 137, "exception": 1, "NaN": 6, "full disk": 74}
PHASES = ("sampling", "update", "save", "evaluation")


def install(fault: dict[str, Any] | None) -> None:
    """Let batches be shared however small they are, and the fault happen."""
    from kltune.lm.fast import memory
    from kltune.lm.model import sampler
    from kltune.stages import ppo
    from kltune.train import loop
    from kltune.train.evaluation.held_out import HeldOut

    memory.PASSES_PER_PIECE = memory.PASSES_PER_SAMPLE = 0
    if fault is None or fault["rank"] != int(os.environ.get("RANK", 0)):
        return
    owner, name = {
        "sampling": (sampler, "_decode"), "update": (ppo, "current_logprobs"), "save": (loop, "expect_same_model"),
        "evaluation": (HeldOut, "measured"),
    }[fault["phase"]]
    whole, left = getattr(owner, name), [fault["after"]]

    def faulty(*arguments: Any, **keywords: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            if "flag" in fault:
                Path(fault["flag"]).touch()
            happen(fault["kind"], *arguments)
        return whole(*arguments, **keywords)

    setattr(owner, name, faulty)


def happen(kind: str, *arguments: Any) -> None:
    """One fault, in the middle of what takes these arguments."""
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind.startswith("SIG"):
        signal.raise_signal(signal.Signals[kind])
    elif kind == "hangs":
        time.sleep(600)
    elif kind == "exception":
        raise LookupError("an odd one")
    elif kind == "memory":
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.")
    elif kind == "full disk":
        raise StorageError(errno.ENOSPC, "no space is left")
    else:
        holders = [getattr(argument, "policy", argument) for argument in arguments]
        policy = next(holder for holder in holders if hasattr(holder, "trainable_parameters"))
        for tensor in policy.trainable_parameters().values():
            tensor.data.fill_(float("nan"))


if __name__ == "__main__":
    install(json.loads(os.environ.get("FAULT", "null")))
    main()
