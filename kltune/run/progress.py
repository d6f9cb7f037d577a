"""How far a measurement is, on stderr: a moving bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kltune.run.report import PLAIN_LINE_SECONDS, is_live


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Within: a function to call with the number of responses that are done.

    Args:
        what: shown in front, as "measuring".
        total: how many there will be.
    """
    if is_live(sys.stderr):
        columns = TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda done: progress.update(task, completed=done)
        return
    said = time.monotonic()

    def say(done: int) -> None:
        nonlocal said
        if time.monotonic() - said >= PLAIN_LINE_SECONDS:
            said = time.monotonic()
            print(f"{what}: {done} of {total} responses", file=sys.stderr, flush=True)

    yield say
