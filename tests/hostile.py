"""Files as strangers may give them: odd, damaged, or made to run code; each kind as a change to a sound folder."""

import json
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTENTS = {      # whole files
    "empty": b"", "null": b"null", "list": b"[]", "text": b'"x"', "number": b"3", "nan": b"NaN", "infinite": b'{"a": 1e999}',
    "brace": b"{", "deep": b"[" * 100_000, "latin": '{"é": 1}'.encode("latin-1"), "nul": b"\0" * 64, "object": b"{}",
    "utf-16": '{"a": 1}'.encode("utf-16"), "list of objects": b"[{}]", "long number": b'{"step": ' + b"9" * 5000 + b"}",
}
VALUES: dict[str, Any] = {    # of one field
    "null": None, "text": "x", "list": [], "object": {}, "negative": -1, "zero": 0, "fraction": 0.5, "huge": 10**30,
    "true": True, "list of null": [None], "nested": {"a": {"b": [1, {"c": None}]}}, "surrogate": "\ud800", "empty": "",
    "escape": "\x1b[31m\r\n::error::x",
}


class Hung(BaseException):
    """Something took longer than it may."""


@contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Within: ``Hung`` is raised in the main thread after some seconds, wherever it is, if Python still gets a word in."""
    def bark(*_: object) -> None:
        raise Hung(f"longer than {seconds} s")

    before = signal.signal(signal.SIGUSR2, bark)
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR2, before)


@dataclass(frozen=True)
class Change:
    """One change to a sound folder; name: what it is called in a report."""

    name: str
    make: Callable[[Path], None]


def whole_files(file: str) -> Iterator[Change]:
    """Every content instead of a file's own."""
    for kind, content in CONTENTS.items():
        yield Change(f"{file}: {kind}", lambda folder, content=content: write(folder / file, content))
    yield Change(f"{file}: cut", lambda folder: write(folder / file, (folder / file).read_bytes()[: -20]))
    yield Change(f"{file}: a folder", lambda folder: ((folder / file).unlink(), (folder / file).mkdir()))
    yield Change(f"{file}: a pipe", lambda folder: ((folder / file).unlink(), os.mkfifo(folder / file)))
    yield Change(f"{file}: a device", lambda folder: ((folder / file).unlink(), (folder / file).symlink_to("/dev/zero")))
    yield Change(f"{file}: a link to nothing", lambda folder: ((folder / file).unlink(), (folder / file).symlink_to("no")))
    yield Change(f"{file}: gone", lambda folder: (folder / file).unlink())


def single_fields(folder: Path, file: str) -> Iterator[Change]:
    """Every field of a JSON file, one level down as well, with every other value, and without it."""
    document = json.loads((folder / file).read_bytes())
    for steps in places(document):
        for kind, value in VALUES.items():
            yield Change(
                f"{file}: {'.'.join(map(str, steps))} is {kind}",
                lambda folder, steps=steps, value=value: edit(folder / file, steps, value),
            )
        yield Change(f"{file}: no {'.'.join(map(str, steps))}", lambda folder, steps=steps: edit(folder / file, steps))


def places(document: Any, depth: int = 2) -> Iterator[tuple[int | str, ...]]:
    """Where a document has values, to a depth."""
    inside = document.items() if isinstance(document, dict) else enumerate(document)
    for step, value in list(inside)[:40]:
        yield (step,)
        if depth > 1 and isinstance(value, dict | list) and value:
            yield from ((step, *rest) for rest in places(value, depth - 1))


def edit(path: Path, steps: tuple[int | str, ...], *value: Any) -> None:
    """Put a value into a JSON file, or take out what is there."""
    document = json.loads(path.read_bytes())
    holder = document
    for step in steps[:-1]:
        holder = holder[step]
    if value:
        holder[steps[-1]] = value[0]
    else:
        del holder[steps[-1]]
    write(path, json.dumps(document).encode())


def write(path: Path, content: bytes) -> None:
    """Replace a file, not what else may have its name."""
    path.unlink()
    path.write_bytes(content)


class Trap:
    """A pickle that leaves a file when it is opened."""

    def __init__(self, sprung: Path):
        self.sprung = sprung

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.sprung),)


def trapped_python(sprung: Path) -> str:
    """Python that leaves a file when it is run, and could pass for anything."""
    return f"import os\nos.makedirs({str(sprung)!r}, exist_ok=True)\ndef score(p, r):\n    return [0.0] * len(p)\nModel = score\n"


def trapped_pickle(sprung: Path) -> bytes:
    """The bytes of a Trap."""
    return pickle.dumps(Trap(sprung))
