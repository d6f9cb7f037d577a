"""Commands as processes of their own, some at a time, and the signals that ask to stop."""

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from kltune.errors import PeerError
from kltune.lm.machine.threads import allowed_cores
from kltune.run.files import storing

POLL_SECONDS = 0.05
# What asks a process to stop: Ctrl-C, a scheduler, a terminal that closes, and a scheduler's warning of its time limit.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
LEAVE_SECONDS = 12.0    # that the others have to end by themselves after one has failed; it may wait 10 to be heard
STARTED = "KLTUNE_STARTED"       # in the environment of processes that a kltune has started, which has looked
MOST_AUTO = 4           # processes that "auto" starts on a CPU
PR_SET_PDEATHSIG = 1        # of prctl(2)
STOPPED = frozenset(128 + number for number in STOP_SIGNALS)        # exit codes of processes that did


@dataclass(frozen=True)
class Command:
    """What to run: a name to speak of it, the arguments, and the file that stdout and stderr are added to."""

    name: str
    arguments: tuple[str, ...]
    log: Path


@dataclass
class _Child:
    command: Command
    process: subprocess.Popen
    began: float
    given_up: bool = False


def run_commands(
    commands: Sequence[Command],
    jobs: int,
    *,
    environment: Mapping[str, str],
    started: Callable[[Command], None],
    ended: Callable[[Command, int, float], None],
    watched: Callable[[Sequence[Command]], None] = lambda running: None,
) -> int | None:
    """Run all commands, at most ``jobs`` at a time, each whatever became of the others.

    ``STOP_SIGNALS`` are handed on to those that run, as often as they come, and nothing more is started. Children are
    sessions of their own: what a terminal sends to everyone would reach them twice, and twice means at once. Should
    this process be killed, with no chance to hand anything on, the system asks them to stop (on Linux).

    ``ended`` is told of each with its exit code (128 + the signal for one that was killed) and its seconds; ``watched``
    many times a second of those that run. Returned is the signal that ended it early, or None.

    Raises:
        StorageError: a log cannot be written; the commands that ran were asked to stop first.
    """
    waiting, running = list(commands), []
    with _handing_on(running, "the points that run save and stop") as received:
        try:
            while running or (waiting and not received):
                while waiting and len(running) < jobs and not received:
                    started(waiting[0])
                    running.append(_start(waiting.pop(0), environment))
                    if received:      # while it was being started: it was not there yet to be told
                        running[-1].process.send_signal(received[-1])
                for child in [child for child in running if child.process.poll() is not None]:
                    running.remove(child)
                    code = child.process.returncode
                    ended(child.command, code if code >= 0 else 128 - code, time.monotonic() - child.began)
                watched([child.command for child in running])
                time.sleep(POLL_SECONDS)
        finally:
            for child in running:      # only where something went wrong here
                child.process.terminate()
            for child in running:
                child.process.wait()
    return received[0] if received else None


def start_processes(
    arguments: Sequence[str], processes: int | str, stdout: TextIO, *, shares_threads: bool
) -> int | None:
    """Run a command, which is this program's own, as several processes that work on one thing; the code of them all.

    None in a program that is one of several, as under torchrun, or where one is wanted. The first of them has
    ``stdout``, the others say nothing there. Signals are handed on, as `run_commands` does. Where one dies, the
    others end by themselves in the place where they would wait for it; who does not is killed.

    shares_threads: the cores are divided among them here; a stage does that itself.
    """
    if processes == 1 or "WORLD_SIZE" in os.environ:
        return None
    if processes == "auto" and (processes := device_count()) == 1:
        return None
    environment = thread_share(os.environ, processes) if shares_threads else os.environ
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**environment} | {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), STARTED: "1",
    }
    shared.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform.startswith("linux") else "lo0")
    running, codes = [], []
    with _handing_on(running) as received:
        for rank in range(processes):
            command = Command(f"process {rank} of {processes}", tuple(arguments), Path(os.devnull))
            process = subprocess.Popen(
                command.arguments, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, start_new_session=True,
                stdin=None if rank == 0 else subprocess.DEVNULL, preexec_fn=_dying_with_parent(),
                stdout=stdout if rank == 0 else subprocess.DEVNULL,
            )
            running.append(_Child(command, process, time.monotonic()))
            if received:
                process.send_signal(received[-1])
        give_up = math.inf
        while running:
            for child in [child for child in running if child.process.poll() is not None]:
                running.remove(child)
                code = child.process.returncode
                if code:
                    give_up = min(give_up, time.monotonic() + LEAVE_SECONDS)
                if child.given_up:
                    continue        # what became of the one that it did not follow is the outcome
                codes.append(code if code >= 0 else 128 - code)
                if code < 0 and -code not in received:
                    print(f"kltune: error: {child.command.name} was killed by {signal.Signals(-code).name}; --resume "
                          "goes on from the newest checkpoint.", file=sys.stderr)
            for child in running if time.monotonic() > give_up else ():
                if not child.given_up:
                    print(f"kltune: error: {child.command.name} did not end within {LEAVE_SECONDS:g} s of another one, "
                          "and was killed.", file=sys.stderr)
                child.given_up = True
                child.process.kill()
            time.sleep(POLL_SECONDS)
    return code_of_all(codes)


def code_of_all(codes: Sequence[int]) -> int:
    """The exit code of several processes that worked on one thing, by theirs in the order in which they ended."""
    failed = [code for code in codes if code]
    # Who only lost another one says so by this code; what became of that other one says more.
    return next((code for code in failed if code != PeerError.exit_code), failed[0] if failed else 0)


def is_extra_process() -> bool:
    """Whether this is a process of several, and not the first of them, which alone prints."""
    return "WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0"


def device_count() -> int:
    """What ``auto`` is: a process for each GPU; without one, for each core, as many as share a batch at most."""
    import torch

    return torch.cuda.device_count() or min(allowed_cores(), MOST_AUTO)


def end_with_torchrun() -> None:
    """Be asked to stop where torchrun, which started this process, is killed and can hand nothing on (on Linux)."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal_of_parents_death(signal.SIGTERM)


def signal_of_parents_death(number: int) -> None:
    """What this process is sent when its parent dies; 0: nothing (on Linux).

    Linux sends it for each thread that the parent had. Who has heard the first wants no other, which would be taken for
    a second Ctrl-C.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _dying_with_parent() -> Callable[[], None] | None:
    """What a child calls before it begins; made here, for between fork and exec little is safe to do."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:      # it died in between
            os.kill(os.getpid(), signal.SIGTERM)

    return ask


def _start(command: Command, environment: Mapping[str, str]) -> _Child:
    with storing(command.log), open(command.log, "ab") as log:
        process = subprocess.Popen(
            command.arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True, preexec_fn=_dying_with_parent(),
        )
    return _Child(command, process, time.monotonic())


@contextmanager
def _handing_on(running: Sequence[_Child], say: str = "") -> Iterator[list[int]]:
    """Within: signals go to the children that run; the list holds those that came. say: what they do then."""
    received: list[int] = []

    def hand_on(number: int, _frame: FrameType | None) -> None:
        if say and not received:
            tell_at_once(f"{signal.Signals(number).name}: {say}.\n")
        received.append(number)
        for child in running:
            child.process.send_signal(number)

    with on_stop_signals(hand_on):
        yield received


@contextmanager
def on_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within: ``STOP_SIGNALS`` call the handler; only in the main thread, as Python lets no other install any.

    SIGHUP stays ignored where it was, as by nohup.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hung_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    numbers = [number for number in STOP_SIGNALS if number != signal.SIGHUP or hung_up]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def tell_at_once(text: str) -> None:
    """Say something on stderr from where a signal is handled; if nobody can hear it, so be it.

    Not print: the signal may have come in the middle of one, and buffered writing cannot be entered twice.
    """
    with suppress(OSError):
        os.write(2, text.encode())


def end_at_once(number: int, _frame: FrameType | None = None) -> None:
    """Die of a signal, as if it had never been handled; a cursor that a progress bar hid is shown again."""
    with suppress(OSError):
        if os.isatty(2):
            tell_at_once("\033[?25h\n")
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def thread_share(environment: Mapping[str, str], jobs: int) -> dict[str, str]:
    """The environment with threads for one of ``jobs`` processes, unless it says already how many.

    Two processes with a thread for every core each wait for one another at every operation, and take 5 to 10 times as
    long.
    """
    threads = str(max(1, allowed_cores() // jobs))
    more = {"OMP_NUM_THREADS": threads} if jobs > 1 and "OMP_NUM_THREADS" not in environment else {}
    return {**environment, **more}


def last_lines(path: Path, count: int, after: int = 0) -> list[str]:
    """The last lines of a log that are not empty, from a byte on."""
    text = path.read_bytes()[after:].decode("utf-8", "replace") if path.exists() else ""
    return [line for line in text.splitlines() if line.strip()][-count:]
