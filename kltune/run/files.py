"""How kltune writes files, whole or not at all, and the lock that makes a folder one process's own."""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import resource
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from kltune.errors import BusyError, CheckpointError, RecipeError, StorageError

RUN_SCHEMA = "kltune.run/1"
NO_LOCKS_HERE = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
# What to do about a refusal to write; where it is about none of these, make_room.
MAKE_ROOM = "make room"
NO_RIGHT = "give this user the right to write there, or choose another place"
WAYS_ON = {
    errno.EROFS: "choose a place that is not read-only",
    errno.EACCES: NO_RIGHT,
    errno.EPERM: NO_RIGHT,
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "choose another place",
    errno.EIO: "look after the disk",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}
DEVICES = Path("/dev")
FEW_INODES = 64     # more than the files of a checkpoint
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, *WAYS_ON} - {errno.ENOENT}
SECRET_SHAPES = re.compile(r"\bhf_\w{16,}|\bsk-[A-Za-z0-9]{16,}|\bsk-[a-z]+-[\w-]{16,}|\bgh[pousr]_\w{16,}")
USER_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
SECRET_VARIABLE = re.compile(r"(?i)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")
SECRET_ARGUMENT = re.compile(r"(?i)((?:api_?key|token|secret|password|passwd)(?:\s*[=:]\s*|\s+))(?=\S)([^\s'\"]+)")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def claim(folder: Path, what: str, *, ours: bool) -> None:
    """Make an output folder for a ``what``, as "run"; refuse one that holds something else, unless it is ``ours``.

    Raises:
        RecipeError: it holds something else, or is a file. StorageError: it cannot be made.
    """
    try:
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(PermissionError):      # a folder that may be entered, and not read
                sync(folder.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise RecipeError(f"{folder} cannot be a folder: a file has that name. Choose another --output.") from error
    with storing(folder):
        strangers = sorted(path.name for path in folder.iterdir() if path.name != ".lock" and path.name[:5] != ".tmp-")
    if strangers and not ours:
        raise RecipeError(
            f"{folder} is not empty and is no kltune {what} (it holds {', '.join(strangers[:3])}"
            f"{', ...' if len(strangers) > 3 else ''}). Choose another --output."
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within: no other process writes the folder; the system frees it however this process ends."""
    path = folder / ".lock"
    with storing(path):
        file = open(path, "a+", encoding="utf-8")      # noqa: SIM115 (closed just below)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise BusyError(f"{folder} is in use by {holder}: wait, or choose another --output.") from error
        except OSError as error:
            if error.errno not in NO_LOCKS_HERE:
                raise
            print(f"warning: {folder} is on a file system without locks; start no second run there.", file=sys.stderr)
        with storing(path):
            file.truncate(0)
            # Past the buffer, which would be written again when the file is closed.
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, whole or not at all; NaN is refused."""
    write_whole(path, to_json(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote; CheckpointError if it is missing, cut short, or no JSON."""
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(path.read_bytes(), parse_constant=refuse)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_document(path: Path, schema: str) -> dict[str, Any] | None:
    """A JSON object of a schema; None where there is none that can be read."""
    try:
        document = read_json(path)
    except CheckpointError:
        return None
    return document if isinstance(document, dict) and document.get("schema") == schema else None


def read_record(folder: Path) -> dict[str, Any] | None:
    """run.json of a run's folder; None where there is none that can be read."""
    return read_document(folder / "run.json", RUN_SCHEMA)


def is_finished(folder: Path) -> bool:
    """Whether a run in the folder came to its end and left its result."""
    record = read_record(folder)
    return record is not None and record.get("status") == "finished" and (folder / "result.json").is_file()


@contextlib.contextmanager
def storing(path: Path, needed: int = 0) -> Iterator[None]:
    """Within: the system's refusal to write ``path`` becomes an error the user can put right.

    needed: bytes that are to be written at least, where that is known.

    Raises:
        StorageError: the disk, its inodes, a quota or a file-size limit are used up, or nothing can be written there.
            Names the path, the reason, what was needed and what there is.
    """
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise
    except Exception as error:      # what is written in Rust raises nothing narrower
        number = _number_in(error)
        said = isinstance(error, StorageError) and not needed      # of a part, by one who knew what that needed
        if number is None or said:
            raise
        refusal = StorageError(refused(str(path), number, needed))
        refusal.errno = number
        raise refusal from error


def _number_in(error: Exception) -> int | None:
    """The errno of an OSError, or inside the message of a library in Rust: '... File too large (os error 27)'."""
    if isinstance(error, OSError):
        return error.errno
    rust = isinstance(error, SafetensorError) or type(error) is Exception      # the latter is all tokenizers has
    match = re.search(r"os error (\d+)", str(error)) if rust else None
    return int(match.group(1)) if match else None


def refused(path: str, number: int, needed: int = 0) -> str:
    """In words: the system refused to write a path, why, what was needed, what there is, and what to do."""
    reason, way = os.strerror(number), WAYS_ON.get(number, MAKE_ROOM)
    facts = [f"at least {needed:,} bytes were needed"] if needed else []
    if (there := _room_at(path)) is not None:
        free = there.f_bavail * there.f_frsize
        facts.append(f"{free:,} bytes are free there")
        # Seen after what was written of it has been taken away again.
        few = there.f_files and there.f_favail < FEW_INODES and (not there.f_favail or 0 < needed <= free)
        if number == errno.ENOSPC and few:
            reason, way = "No inode is left for another file", "remove files there, however small"
            facts.append(f"{there.f_favail:,} of {there.f_files:,} inodes are free")
    if number == errno.EFBIG:
        facts.append(f"a file may have {resource.getrlimit(resource.RLIMIT_FSIZE)[0]:,} bytes")
    known = f" ({'; '.join(facts)})" if facts else ""
    return (
        f"cannot write {path}: {reason}{known}. What was saved before is intact; {way}, then start again: a run goes "
        "on with --resume."
    )


def _room_at(path: str) -> os.statvfs_result | None:
    """The state of the file system that a path is to lie on; None where it has none."""
    place = next((place for place in (path, *map(str, Path(path).absolute().parents)) if os.path.isdir(place)), None)
    with contextlib.suppress(OSError):
        return None if place is None else os.statvfs(place)
    return None


def sync(path: Path) -> None:
    """Make the bytes of a file, or the names inside a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, a kill at any moment, or a StorageError finds the old file or the new one.

    What is no file, as /dev/stdout, is written to.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    data = content.encode("utf-8") if isinstance(content, str) else content
    with storing(path, len(data)):
        if path.exists() and (not path.is_file() or path.parent == DEVICES):
            path.write_bytes(data)      # a device or a pipe: a file in its place would be the end of it
            return
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):      # of the error that is on its way
                temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def append_line(file: BinaryIO, path: Path, line: str) -> None:
    """Add one line to an unbuffered file; if it does not fit (StorageError), take its first half away again."""
    before, data = file.seek(0, os.SEEK_END), memoryview(f"{line}\n".encode())
    with storing(path, len(data)):
        try:
            while data:
                data = data[file.write(data):]      # an unbuffered write may take only a part
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def to_json(value: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """JSON as RFC 8259 has it: NaN and infinity are refused, other letters than ASCII stay readable.

    ascii_only: escape all other letters, for an output that may have no form for them.

    Raises:
        ValueError: a number is not finite. TypeError: something JSON has no form for.
    """
    text = json.dumps(value, ensure_ascii=ascii_only, allow_nan=False, indent=indent)
    # A lone surrogate has no UTF-8 form; escaped it has.
    return to_json(value, indent=indent, ascii_only=True) if re.search("[\ud800-\udfff]", text) else text


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that this package wrote line by line; [] if there is none.

    A last line that a kill cut short is left out.
    """
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def nonfinite_keys(value: Any, where: str = "") -> list[str]:
    """Dotted names of the numbers in nested dicts and lists that are NaN or infinite."""
    if isinstance(value, dict):
        return [key for name, item in value.items() for key in nonfinite_keys(item, f"{where}.{name}".lstrip("."))]
    if isinstance(value, list | tuple):
        return [key for index, item in enumerate(value) for key in nonfinite_keys(item, f"{where}[{index}]")]
    return [where] if isinstance(value, float) and not math.isfinite(value) else []


def without_nonfinite(value: dict[str, Any]) -> dict[str, Any]:
    """A copy with null for every NaN and infinity, and their names under "nonfinite" if there are any."""
    names, nulled = nonfinite_keys(value), _nulled(value)
    return {**nulled, "nonfinite": names} if names else nulled


def _nulled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _nulled(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nulled(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def visible(text: str) -> str:
    """Text in which control characters show as escapes, so that a model's response cannot steer a terminal."""
    return CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def redact(text: str, *, arguments: bool = False) -> str:
    """Text without the secrets of this process: keys and tokens from the environment, and what looks like one.

    arguments: True for a command line, where the value of ``--set x.api_key=...`` goes as well.
    """
    for name, secret in os.environ.items():
        if SECRET_VARIABLE.search(name) and len(secret) >= 8 and not secret.startswith("/"):      # a path is no secret
            text = text.replace(secret, "[redacted]")
    text = USER_IN_URL.sub("[redacted]", SECRET_SHAPES.sub("[redacted]", text))
    return SECRET_ARGUMENT.sub(r"\1[redacted]", text) if arguments else text
