"""Files that others made: read only if they are ordinary and of bearable size, and held against their shape.

What is no file waits for ever (a pipe) or never ends (a device); what has another shape than was thought ends in the
middle of some calculation. Here both end in one line with the file and the field.
"""

import errno
import json
import math
import os
import resource
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter, ValidationError

from kltune.errors import KltuneError

LARGEST = 256 << 20         # bytes of a file that is read whole; the largest tokenizer.json of today has 40 million
MOST_DIGITS = 300           # of a whole number: more do not fit a float
AGAIN_SECONDS = 1.0         # between two attempts to end what has taken too long
SHOWN = 60                  # characters of what was found


def open_ordinary(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to be read; OSError if there is none, or it is a folder, a pipe or a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)      # else a pipe waits for its writer
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise OSError(errno.EINVAL, f"it is {kind}, wanted an ordinary file", os.fspath(path))
    return open(descriptor, "rb")


@contextmanager
def time_limit(seconds: float, error: KltuneError) -> Iterator[None]:
    """Within: ``error`` is raised after some seconds of Python, regular expressions included.

    Only in the main thread, where everything of strangers is read; elsewhere there is no limit. It is raised again
    every second until the end: what is raised while a destructor runs, or caught by a library, is lost.
    """
    over = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        if not over:
            raise error

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
    try:
        try:
            yield
        finally:
            over = True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Within: what asks for so many more bytes than the process has now gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else None
    before = resource.getrlimit(resource.RLIMIT_AS)
    wanted = None if pages is None else pages * resource.getpagesize() + more
    if wanted is None or (before[0] != resource.RLIM_INFINITY and before[0] <= wanted):
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (wanted, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def read_ordinary(path: str | os.PathLike[str]) -> bytes:
    """All of a file; OSError as ``open_ordinary``, or if it is larger than any such file has to be."""
    with open_ordinary(path) as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise OSError(errno.EINVAL, f"it is larger than {LARGEST >> 20} MiB", os.fspath(path))
    return content


def read_json(
    path: Path, error: type[KltuneError], shape: Any = None, where: str = "", *, finite: bool = True
) -> Any:
    """The JSON document in a file, as it is there.

    shape: a type that pydantic can hold it against; other keys than its own are nobody's business. where: the key or
    option that named the file, for messages. finite: refuse NaN and infinity, which are not JSON; transformers writes
    them all the same.

    Raises:
        error: it cannot be read, is not JSON, or a field is of another kind than wanted.
    """
    named = f"{where}: {path}" if where else str(path)
    try:
        guards = {"parse_constant": _no_constant, "parse_float": _finite} if finite else {}
        document = json.loads(read_ordinary(path), parse_int=_bearable, **guards)
    except OSError as cause:
        raise error(f"{named} cannot be read: {cause.strerror or cause}.") from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{named} is not JSON ({str(cause)[:SHOWN]}).") from cause
    if shape is not None:
        check_shape(document, shape, error, named)
    return document


def check_shape(document: Any, shape: Any, error: type[KltuneError], named: str) -> None:
    """Raise ``error`` with the first field of a document that is not of its shape; ``named``: the file."""
    try:
        TypeAdapter(shape).validate_python(document, strict=True)
    except ValidationError as cause:
        faults = [(*_reached(document, one["loc"]), one) for one in cause.errors(include_url=False)]
        place, found, first = faults[0]
        lacking = first["type"] == "missing"
        field = ".".join(map(str, (*place, *first["loc"][-1:]) if lacking else place))
        if lacking:
            raise error(f"{named}: {field} is missing.") from cause
        wanted = dict.fromkeys(one["msg"].removeprefix("Input should be ") for at, _, one in faults if at == place)
        text = json.dumps(found, ensure_ascii=True, default=str)
        raise error(
            f"{named}: {f'{field}: ' if field else ''}found {text[:SHOWN]}{'...' if len(text) > SHOWN else ''}, "
            f"wanted {' or '.join(wanted)}."
        ) from cause


def _reached(document: Any, steps: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], Any]:
    """How far steps lead into a document, and what is there; steps of pydantic's own (which type it tried) end it."""
    place: tuple[int | str, ...] = ()
    for step in steps:
        into = isinstance(document, dict) and step in document
        if not into and not (isinstance(document, list) and isinstance(step, int) and step < len(document)):
            break
        document, place = document[step], (*place, step)
    return place, document


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:SHOWN]} is no finite number")
    return number


def _bearable(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)
