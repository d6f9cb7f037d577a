"""Runs of several processes as forks of this one, where all that takes seconds is imported already."""

import os
import socket
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.driven import install
from tests.stages.test_signals import ended, forked


def together(count: int, arguments: list[str], log: Path, fault: Mapping[str, Any] | None = None) -> list[int]:
    """``kltune ...`` as so many processes; their process ids, by rank. What rank r prints is added to ``log``.r."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(count):
        names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "KLTUNE_STARTED": "1"}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        pids.append(forked(arguments, log.with_suffix(f".{rank}"), partial(_become, names, fault)))
    return pids


def _become(names: Mapping[str, str], fault: Mapping[str, Any] | None) -> None:
    os.environ.update(names)
    install(fault)


def codes(pids: list[int], within: float = 120.0) -> list[int]:
    """Their exit codes, as a shell has them."""
    return [ended(pid, within) for pid in pids]
