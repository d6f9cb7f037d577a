"""How kltune writes files, whole or not at all, and the lock that makes a folder one process's own."""

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import re
import resource
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from safetensors import SafetensorError

from kltune.errors import BusyError, CheckpointError, RecipeError, StorageError
from kltune.lm.data import foreign
from kltune.lm.data.documents import Finite, RunRecord
from kltune.lm.data.foreign import open_ordinary

HOLDER = re.compile(r"process \d+(?:| | o| on| on \S*\n?)")      # of a lock; a full disk may have cut it short
# What a kill leaves of a file or a folder that was being written; see `write_whole` and `checkpoint`.
UNFINISHED = re.compile(
    r"\.tmp-(removed-step-\d{6,}|(step-\d{6,}|final|[\w.=,+-]+\.(json|jsonl|yaml|html|safetensors))-\d+)"
    r"|\.old-(step-\d{6,}|final)"
)
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
NO_FILE = {errno.ELOOP, errno.EISDIR, errno.ENXIO}     # a link, a folder, a socket or a pipe nobody reads
DEVICES = Path("/dev")
FEW_INODES = 64     # more than the files of a checkpoint
CANNOT_READ = {errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG, errno.ELOOP}
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, *WAYS_ON} - {errno.ENOENT}


def claim(folder: Path, what: str, *, ours: bool) -> None:
    """Make an output folder for a ``what``, as "run"; refuse one that holds something else, unless it is ``ours``.

    Raises:
        RecipeError: it holds something else, or is a file. StorageError: it cannot be made.
    """
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(PermissionError):      # a folder that may be entered, and not read
            sync(folder.parent)
        held = sorted(folder.iterdir())
    out = [path for path in held if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve())]
    if out:
        raise RecipeError(
            f"{out[0]} is a link to {out[0].resolve()}, and nothing is written, or removed, outside of {folder}. Take "
            "it away, or choose another --output."
        )
    strangers = [path.name for path in held if path.name != ".lock" and not UNFINISHED.fullmatch(path.name)]
    if strangers and not ours:
        raise RecipeError(
            f"{folder} is not empty and is no kltune {what} (it holds {', '.join(strangers[:3])}"
            f"{', ...' if len(strangers) > 3 else ''}). Choose another --output."
        )


def in_the_way(folder: Path) -> RecipeError:
    """The error that says why there can be no folder of that name."""
    return RecipeError(f"{folder} cannot be a folder: a file has that name, or one on the way to it. Choose another.")


def refuse_place(path: Path, *, folder: bool) -> None:
    """Raise RecipeError where no file, or no folder, of that name can be written, before any work is done for it."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not folder and path.is_dir():
        raise RecipeError(f"{path} is a folder; name a file in it.")
    if not folder and there.is_dir() and there != path.absolute().parent:
        raise RecipeError(f"{path}: there is no folder {path.parent} to write it into; make that first.")
    if not there.is_dir() and (folder or there != path.absolute()):
        raise in_the_way(path if folder else path.parent)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within: no other process writes the folder; the system frees it however this process ends."""
    path = folder / ".lock"
    file = _open_lock(path)
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
            file.seek(0)
            file.truncate()
            # Past the buffer, which would be written again when the file is closed.
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def _open_lock(path: Path) -> TextIO:
    """A lock file of kltune's, made if need be; RecipeError for anything else of that name."""
    wanted = f"kltune did not make {path} ({{}}), and would write into it. Take it away, or choose another --output."
    with storing(path):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno in NO_FILE:
                raise RecipeError(wanted.format("it is a link, or no file")) from error
            raise
    file = open(descriptor, "r+", encoding="utf-8", errors="replace")      # noqa: SIM115 (closed by the caller)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not _names_a_holder(file.read(200)):
        file.close()
        raise RecipeError(wanted.format("it is no file, or holds something else than the name of a process"))
    return file


def _names_a_holder(text: str) -> bool:
    return "process ".startswith(text) or HOLDER.fullmatch(text) is not None


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, whole or not at all; NaN is refused."""
    write_whole(path, to_json(value, indent=2) + "\n")


def read_json(path: Path, shape: Any = None) -> Any:
    """Read what `write_json` wrote; CheckpointError if it is missing, cut short, no JSON, or not of a shape."""
    return foreign.read_json(path, CheckpointError, shape)


def read_document(path: Path, shape: Any) -> dict[str, Any] | None:
    """A JSON object of a shape; None where there is none that can be read."""
    try:
        return read_json(path, shape)
    except CheckpointError:
        return None


def read_record(folder: Path) -> dict[str, Any] | None:
    """run.json of a run's folder; None where there is none that can be read."""
    return read_document(folder / "run.json", RunRecord)


def is_finished(folder: Path) -> bool:
    """Whether a run in the folder came to its end and left its result."""
    record = read_record(folder)
    return record is not None and record.get("status") == "finished" and (folder / "result.json").is_file()


@contextlib.contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Within: the system's refusal to let ``path``, or what is in it, be read becomes a CheckpointError."""
    try:
        yield
    except OSError as error:
        if error.errno not in CANNOT_READ:
            raise
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror}.") from error


@contextlib.contextmanager
def storing(path: Path, needed: int = 0) -> Iterator[None]:
    """Within: the system's refusal to write ``path`` becomes an error the user can put right.

    needed: bytes that are to be written at least, where that is known.

    Raises:
        StorageError: the disk, its inodes, a quota or a file-size limit are used up, or nothing can be written there.
            Names the path, the reason, what was needed and what there is. RecipeError: a file is in the way.
    """
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise in_the_way(path if isinstance(error, FileExistsError) else path.parent) from error
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
    path = path.absolute()      # "." has no name
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    data = content.encode("utf-8") if isinstance(content, str) else content
    with storing(path, len(data)):
        if path.exists() and (not path.is_file() or path.parent == DEVICES):
            path.write_bytes(data)      # a device or a pipe: a file in its place would be the end of it
            return
        try:
            temporary.unlink(missing_ok=True)
            with open(temporary, "xb") as file:     # never through a link that waits there
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


def read_jsonl(path: Path, shape: Any = dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of a file that this package wrote line by line; [] if there is none.

    A last line that a kill cut short is left out. CheckpointError if it cannot be read, or one is not of its shape.
    """
    rows = []
    try:
        with open_ordinary(path) if path.exists() else io.BytesIO() as lines:
            for line in lines:
                with contextlib.suppress(ValueError, RecursionError):
                    rows.append(json.loads(line))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    rows = [row for row in rows if isinstance(row, dict)]
    foreign.check_shape(rows, list[shape], CheckpointError, str(path))
    return rows


def read_metrics(folder: Path) -> list[dict[str, float | None]]:
    """The rows of a run's metrics.jsonl, finite numbers by name; CheckpointError for anything else in it."""
    path = folder / "metrics.jsonl"
    # Every row brings strings of its own for the same names: in a long run they would be most of the memory.
    rows = [{sys.intern(name): value for name, value in row.items() if name != "nonfinite"} for row in read_jsonl(path)]
    foreign.check_shape(rows, list[dict[str, Finite | None]], CheckpointError, str(path))
    if any(not isinstance(row.get("step"), int) for row in rows):
        raise CheckpointError(f"{path}: a line without a step that is a whole number; wanted what a stage writes.")
    return rows


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
