"""One process to a folder."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from kltune.errors import BusyError
from kltune.run.storage import storing

NO_LOCKS_HERE = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


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
