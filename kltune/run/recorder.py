"""The only writer of numbers: metrics.jsonl, samples.jsonl, curves, and the screen (stderr, never stdout)."""

import io
import math
import os
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from kltune.core import ranks
from kltune.recipe.faults import redact, visible
from kltune.run.files import append_line, storing, to_json, without_nonfinite
from kltune.run.loggers import Curves, wanted_loggers
from kltune.run.metrics import ALWAYS
from kltune.run.screen import SILENCE_SECONDS, counted, duration, out_of, undressed, wants_colour, with_error

TABLE_SECONDS = 0.5      # between two drawings of a table
Number = float | int | None
# label, names (the first that was measured is shown), number format, unit
COLUMNS = (
    ("score", ("score/mean",), ".3f", ""),
    ("loss", ("loss/mean",), ".4f", ""),
    ("perplexity", ("eval/perplexity",), ".3f", ""),
    ("accuracy", ("eval/accuracy", "accuracy/mean"), ".3f", ""),
    ("beta", ("kl/beta",), ".4g", ""),
    ("", ("responses_per_second", "examples_per_second"), ".1f", "/s"),
    ("", ("tokens_per_second",), ",.0f", " tokens/s"),
    ("", ("memory/peak_gb",), ".1f", " GB"),
)


class Clock:
    """Seconds of each phase of one step, by wall clock."""

    def __init__(self):
        self._began = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Count the time since the last lap as ``name``."""
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def metrics(self, rows: int, what: str = "responses", tokens: int = 0) -> dict[str, float]:
        """Seconds by lap and in all, and rows and tokens per second of everything but evaluation."""
        whole = time.perf_counter() - self._began
        working = max(whole - self._laps.get("eval", 0.0), 1e-9)
        return {f"time/{name}_seconds": seconds for name, seconds in self._laps.items()} | {
            "time/step_seconds": whole,
            f"{what}_per_second": rows / working,
            "tokens_per_second": tokens / working,
        }


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Within: a function to call with the number of responses that are done, of ``total``."""
    if wants_colour(sys.stderr):
        columns = (
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(file=undressed(sys.stderr)), transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda done: progress.update(task, completed=done)
        return
    yield counted(what, total)


def kl_of_step(metrics: Mapping[str, Number], unit: str, target: float | None) -> str:
    """The KL of a step as it was measured, of its target; nothing where it was not. unit: as of ``Report``."""
    of_batch = metrics.get(f"kl/ref_{unit}") is not None      # sft and dpo measure it in evaluations only
    name = "kl/ref" if of_batch else "eval/kl_ref"
    value, error = metrics.get(f"{name}_{unit}"), metrics.get(f"{name}_stderr")
    if value is None:
        return ""
    if unit != "nats_per_response":      # the standard error is per response, whatever the target's unit
        error = None
    goal = f" of {target:g}" if target is not None else ""
    return f"{with_error(value, error)}{goal} {unit.replace('_per_', '/')}"


def figures_of_step(metrics: Mapping[str, Number]) -> str:
    """The measured ones of a step's other numbers that people ask for."""
    cells = []
    for label, names, form, unit in COLUMNS:
        value = next((metrics[name] for name in names if metrics.get(name) is not None), None)
        cells += [] if value is None else [f"{label} {value:{form}}{unit}".strip()]
    return "  ".join(cells)


class Board:
    """What runs side by side: on a terminal a table that is drawn again and again, elsewhere lines every few seconds.

    Used as a context manager. columns: titles of the cells of a row.
    """

    def __init__(self, columns: Sequence[str]):
        self._columns, self._shown_at = columns, time.monotonic()
        self._live = None
        if wants_colour(sys.stderr):
            console = Console(file=undressed(sys.stderr), highlight=False)
            self._live = Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, rows: Callable[[], Iterable[Sequence[str]]]) -> None:
        """Show the rows if it is time to; may be called as often as one likes."""
        now = time.monotonic()
        if now - self._shown_at < (TABLE_SECONDS if self._live is not None else SILENCE_SECONDS):
            return
        self._shown_at = now
        cells = [[visible(redact(cell)) for cell in row] for row in rows()]
        if self._live is None:
            for name, *others in cells:
                titles = zip(self._columns[1:], others, strict=True)
                titled = [f"{title} {cell}".strip() for title, cell in titles if cell]
                self.say(f"{name}: {'  '.join(titled)}")
            return
        table = Table(*self._columns, box=None, pad_edge=False)
        for row in cells:
            table.add_row(*map(Text, row))
        self._live.update(table, refresh=True)

    def say(self, text: str) -> None:
        """Print one message on stderr, above the table."""
        if self._live is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._live.console.print(Text(text), soft_wrap=True)


class Report:
    """Write one row per step, for people and for programs, from the same numbers.

    Used as a context manager. On a terminal a live line stays at the bottom; elsewhere (a pipe, NO_COLOR, CI,
    TERM=dumb) there are plain lines only: the first step, the last, those with an evaluation, else as many as
    ``SILENCE_SECONDS`` ask for.

    Args:
        target: the KL target, in ``unit`` (nats_per_response or nats_per_token).
        start_step: steps already done when resuming.
        loggers: the recipe's ``run.loggers``; raises as ``wanted_loggers``.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        total_steps: int,
        *,
        target: float | None = None,
        start_step: int = 0,
        unit: str = "nats_per_response",
        loggers: str | Sequence[str] = "auto",
    ):
        self.folder, self.stage, self.total_steps, self.start_step = Path(folder), stage, total_steps, start_step
        self.target, self.unit = target, unit
        self._files: dict[str, io.FileIO] = {}
        self._console = Console(file=undressed(sys.stderr), highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._curves = Curves(self.folder, wanted_loggers(loggers if ranks.is_first() else ()), self.warn)
        self._began = self._printed_at = self._stepped_at = -math.inf
        self._noted: set[str] = set()

    def __enter__(self) -> Self:
        for name in ("metrics.jsonl", "samples.jsonl") if ranks.is_first() else ():
            with storing(self.folder / name):
                # Unbuffered, so that a line that does not fit is not tried again when the file is closed.
                self._files[name] = open(self.folder / name, "ab", buffering=0)
        self._began = self._stepped_at = time.monotonic()
        if ranks.is_first() and wants_colour(sys.stderr):
            self._progress = Progress(
                SpinnerColumn(), TextColumn("[bold]{task.description}"), BarColumn(bar_width=18), MofNCompleteColumn(),
                TextColumn("{task.fields[row]}", markup=False), console=self._console, transient=True,
            )
            self._task = self._progress.add_task(self.stage, total=self.total_steps, completed=self.start_step, row="")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._curves.close()
        for file in self._files.values():
            file.close()

    def step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Record one step, counted from 1.

        A number that was not measured (None, or one of ``ALWAYS`` that is not there) or is not finite is written as
        null, the latter's name under "nonfinite".

        Raises:
            StorageError: metrics.jsonl cannot be written.
        """
        # A tensor or numpy scalar of one element becomes a Python number.
        numbers = {
            name: value if value is None or isinstance(value, int | float) else float(value)
            for name, value in metrics.items()
        }
        if not ranks.is_first():
            return
        self._append("metrics.jsonl", {"step": step} | dict.fromkeys(ALWAYS) | numbers)
        self._curves.write(step, numbers)
        row = self._row(step, numbers)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, total=max(step, self.total_steps), row=row)
        if self._is_due(step, numbers):
            self._printed_at = time.monotonic()
            self.say(f"{self.stage} {step}{out_of(step, self.total_steps, '/')}  {row}")

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a few responses, as ``{"prompt", "response", "score", "ref_kl"}`` each."""
        for row in rows if ranks.is_first() else ():
            told = {name: redact(value) if isinstance(value, str) else value for name, value in row.items()}
            self._append("samples.jsonl", {"step": step, **told})

    def keep(self) -> None:
        """Make the rows so far survive a power cut, before a checkpoint of their step does; raises as ``step``."""
        for name, file in self._files.items():
            with storing(self.folder / name):
                os.fsync(file.fileno())

    def say(self, text: str) -> None:
        """Print one message on stderr; above the live line, if there is one."""
        text = visible(redact(text))
        if self._progress is not None:
            self._console.print(Text(text))
        else:
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print a message on stderr, the first time that it comes up."""
        if text not in self._noted:
            self._noted.add(text)
            self.say(f"note: {text}")

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        self.say(f"warning: {text}")

    def _append(self, name: str, row: dict[str, Any]) -> None:
        append_line(self._files[name], self.folder / name, to_json(without_nonfinite(row)))

    def _is_due(self, step: int, metrics: Mapping[str, Number]) -> bool:
        edge = step in (self.start_step + 1, self.total_steps)
        evaluated = any(name.startswith("eval/") and value is not None for name, value in metrics.items())
        now, before = time.monotonic(), self._stepped_at
        self._stepped_at = now
        too_late = now + (now - before) - self._printed_at      # when the next step will have passed
        return edge or evaluated or too_late > SILENCE_SECONDS

    def _row(self, step: int, metrics: Mapping[str, Number]) -> str:
        """The measured ones of: score  KL ± its error of its target  loss  beta  speed  time left."""
        kl = kl_of_step(metrics, self.unit, self.target)
        cells = (f"KL {kl}" if kl else "", figures_of_step(metrics), self._time_left(step))
        return "  ".join(cell for cell in cells if cell)

    def _time_left(self, step: int) -> str:
        done, left = step - self.start_step, self.total_steps - step
        if done < 1 or left < 1:
            return ""
        return f"{duration(round((time.monotonic() - self._began) / done * left))} left"
