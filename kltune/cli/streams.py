"""The process's own streams: a result has stdout to itself, and nothing that happens to stderr ends a run."""

import io
import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import typer

_result_stream: TextIO | None = None


class LossyText(io.TextIOBase):
    """Text to a file descriptor at once; what the system does not take is lost, and never an error.

    written_at: when something was last written, or the stream made, by ``time.monotonic``.

    A run must not end because the terminal, the pager or the disk behind its messages went away.
    """

    encoding, errors = "utf-8", "backslashreplace"

    def __init__(self, descriptor: int, encoding: str | None = None):
        super().__init__()
        self._descriptor, self.encoding = descriptor, encoding or self.encoding
        self.written_at = time.monotonic()

    def write(self, text: str) -> int:
        """Write all of it, or as much as goes."""
        self.written_at = time.monotonic()
        left = memoryview(text.encode(self.encoding, self.errors))
        try:
            while left:
                left = left[os.write(self._descriptor, left):]
        except OSError:
            return len(text)
        return len(text)

    def fileno(self) -> int:
        """See ``io.IOBase``."""
        return self._descriptor

    def isatty(self) -> bool:
        """See ``io.IOBase``; a terminal that is gone is none."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """See ``io.IOBase``."""
        return True


def guard_streams() -> None:
    """Let the process have all three streams, and a stderr that cannot fail.

    A stream that was closed before the start would leave its number to the first file that is opened, and messages
    would be written into that.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)      # takes the lowest number that is free: this one
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")      # noqa: SIM115
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")     # what is no text is said where it is read
    if sys.stdout is None:
        sys.stdout = LossyText(1)
    if sys.stderr is None or (sys.stderr is sys.__stderr__ and sys.stderr.fileno() == 2):
        sys.stderr = LossyText(2, getattr(sys.stderr, "encoding", None))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")     # a terminal without ‖ still gets its answer


def result_stream() -> TextIO:
    """Where results go: stdout, also while ``results_alone`` keeps all else from it."""
    return _result_stream or sys.stdout


@contextmanager
def results_alone() -> Iterator[None]:
    """Within: what anything but ``emit`` prints to stdout goes to stderr.

    A reward function may print, and so may a library or a process that it starts.
    """
    global _result_stream
    stdout, whole = sys.stdout, _is_process_stdout()
    if whole:
        stdout.flush()
        kept = os.dup(1)
        _result_stream = open(kept, "w", encoding=stdout.encoding, errors=stdout.errors)      # noqa: SIM115
        os.dup2(2, 1)
    else:
        _result_stream = stdout     # of a test, or of a program that calls ``main``
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = stdout
        if whole:
            _flush_or_drop(stdout)      # what was written past sys.stdout, as to sys.__stdout__
            os.dup2(kept, 1)
            _result_stream.close()
        _result_stream = None


def leave_stdout() -> None:
    """Give what is printed while the interpreter ends, as by ``atexit`` of a reward function, to stderr."""
    with suppress(OSError, ValueError):     # one that takes nothing is left for the interpreter to complain of
        sys.stdout.flush()
        if _is_process_stdout():
            os.dup2(2, 1)


def has_no_reader(descriptor: int) -> bool:
    """Whether it is a pipe whose reader has gone away."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def drop_buffered(stream: TextIO) -> None:
    """Let go what a stream could not write: closing it, or the interpreter's end, would stumble over it once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    stream.flush()


def _flush_or_drop(stream: TextIO) -> None:
    try:
        stream.flush()
    except OSError:
        drop_buffered(stream)


def _is_process_stdout() -> bool:
    try:
        return sys.stdout.fileno() == 1
    except (OSError, ValueError, AttributeError):       # one in memory has no number
        return False


class ResultCommand(typer.core.TyperCommand):
    """A command whose result has stdout to itself; its help has it anyway."""

    def invoke(self, ctx: typer.Context) -> object:
        """Run the command."""
        with results_alone():
            return super().invoke(ctx)
