"""The only writer of numbers: metrics.jsonl, samples.jsonl, curves, and the screen (stderr, never stdout)."""

import io
import math
import os
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from kltune.recipe.faults import redact, visible
from kltune.run.files import append_line, storing, to_json, without_nonfinite
from kltune.run.loggers import Curves, wanted_loggers
from kltune.run.screen import duration, undressed, wants_colour, with_error

PLAIN_LINE_SECONDS = 10.0
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
        columns = TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(file=undressed(sys.stderr)), transient=True) as progress:
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


class Report:
    """Write one row per step, for people and for programs, from the same numbers.

    Used as a context manager. On a terminal a live line stays at the bottom; elsewhere (a pipe, NO_COLOR, CI,
    TERM=dumb) there are plain lines only: the first step, the last, those with an evaluation, else one in ten seconds.

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
        self._curves = Curves(self.folder, wanted_loggers(loggers), self.warn)
        self._began = self._printed_at = -math.inf

    def __enter__(self) -> Self:
        for name in ("metrics.jsonl", "samples.jsonl"):
            with storing(self.folder / name):
                # Unbuffered, so that a line that does not fit is not tried again when the file is closed.
                self._files[name] = open(self.folder / name, "ab", buffering=0)
        self._began = time.monotonic()
        if wants_colour(sys.stderr):
            self._progress = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
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

        A number that was not measured (None) or is not finite is written as null, the latter's name under "nonfinite".

        Raises:
            StorageError: metrics.jsonl cannot be written.
        """
        # A tensor or numpy scalar of one element becomes a Python number.
        numbers = {
            name: value if value is None or isinstance(value, int | float) else float(value)
            for name, value in metrics.items()
        }
        self._append("metrics.jsonl", {"step": step, **numbers})
        self._curves.write(step, numbers)
        row = self._row(step, numbers)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, total=max(step, self.total_steps), row=row)
        if self._is_due(step, numbers):
            self._printed_at = time.monotonic()
            of = f"/{self.total_steps}" if step <= self.total_steps else ""     # a run until its target may go on
            self.say(f"{self.stage} {step}{of}  {row}")

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a few responses, as ``{"prompt", "response", "score", "ref_kl"}`` each."""
        for row in rows:
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

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        self.say(f"warning: {text}")

    def _append(self, name: str, row: dict[str, Any]) -> None:
        append_line(self._files[name], self.folder / name, to_json(without_nonfinite(row)))

    def _is_due(self, step: int, metrics: Mapping[str, Number]) -> bool:
        edge = step in (self.start_step + 1, self.total_steps)
        evaluated = any(name.startswith("eval/") and value is not None for name, value in metrics.items())
        return edge or evaluated or time.monotonic() - self._printed_at >= PLAIN_LINE_SECONDS

    def _row(self, step: int, metrics: Mapping[str, Number]) -> str:
        """The measured ones of: score  KL ± its error of its target  loss  beta  speed  time left."""
        cells = [self._kl_cell(metrics)]
        for label, names, form, unit in COLUMNS:
            value = next((metrics[name] for name in names if metrics.get(name) is not None), None)
            cells.append("" if value is None else f"{label} {value:{form}}{unit}".strip())
        return "  ".join(cell for cell in (*cells, self._time_left(step)) if cell)

    def _kl_cell(self, metrics: Mapping[str, Number]) -> str:
        of_batch = metrics.get(f"kl/ref_{self.unit}") is not None      # sft and dpo measure it in evaluations only
        name = "kl/ref" if of_batch else "eval/kl_ref"
        value, error = metrics.get(f"{name}_{self.unit}"), metrics.get(f"{name}_stderr")
        if value is None:
            return ""
        if self.unit != "nats_per_response":      # the standard error is per response, whatever the target's unit
            error = None
        goal = f" of {self.target:g}" if self.target is not None else ""
        return f"KL {with_error(value, error)}{goal} {self.unit.replace('_per_', '/')}"

    def _time_left(self, step: int) -> str:
        done, left = step - self.start_step, self.total_steps - step
        if done < 1 or left < 1:
            return ""
        return f"{duration(round((time.monotonic() - self._began) / done * left))} left"
