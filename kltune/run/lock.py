"""A folder that is ours, and one process to it."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from kltune.errors import BusyError, RecipeError
from kltune.run.storage import storing

NO_LOCKS_HERE = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


def claim(folder: Path, what: str, *, ours: bool) -> None:
    """Make the folder, or make sure that it is ours: what kltune did not make is left alone.

    Args:
        folder: where to write.
        what: it should hold, as "run".
        ours: there is such a thing in it already.

    Raises:
        RecipeError: it holds something else, or is a file. StorageError: it cannot be made.
    """
    try:
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
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
    """Hold the folder for this process; the system frees it whenever the process ends, however it ends."""
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
            print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        yield
