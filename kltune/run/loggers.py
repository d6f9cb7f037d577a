"""Where the numbers of a run are drawn while it goes on: TensorBoard, trackio, Weights & Biases.

metrics.jsonl is the record; these are for looking. Whatever one of them raises, at whatever call, ends that logger with
a warning and never the run. Nothing leaves the machine unless its owner has said so: trackio keeps its files here, and
Weights & Biases is offline unless WANDB_MODE is set (``wandb sync`` sends such a run later).

Not by ``accelerate.tracking``: its trackers raise unless accelerate's process-wide state is there, and making that
state joins a process group, so under torchrun the one process that writes would wait for the others for ever.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kltune.errors import RecipeError

AUTOMATIC = ("tensorboard",)      # what `run.loggers: auto` uses, where it is installed
PROJECT = "kltune"
Number = float | int


@dataclass(frozen=True)
class Logger:
    """Something that draws curves. write: takes a step and its numbers. close: writes what is still buffered."""

    write: Callable[[int, Mapping[str, Number]], object]
    close: Callable[[], object]


def open_tensorboard(folder: Path, step: int) -> Logger:
    """Event files in ``tensorboard/`` of the run's folder; those of a step that is done again are dropped."""
    from torch.utils.tensorboard import SummaryWriter  # here, because it takes a second to import

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(step: int, numbers: Mapping[str, Number]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Logger(write, writer.close)


def open_trackio(folder: Path, step: int) -> Logger:
    """A local trackio project named kltune; ``trackio show`` opens it."""
    import trackio

    run = trackio.init(project=PROJECT, name=folder.resolve().name, resume="allow")
    # not the run's own finish: that is called once more as the process ends
    return Logger(lambda step, numbers: run.log(dict(numbers), step=step), trackio.finish)


def open_wandb(folder: Path, step: int) -> Logger:
    """A Weights & Biases run below ``wandb/`` of the run's folder, offline unless WANDB_MODE says otherwise."""
    import wandb

    run = wandb.init(
        project=PROJECT, name=folder.resolve().name, dir=str(folder), mode=os.environ.get("WANDB_MODE", "offline"),
        # Nothing but the numbers: a command line or a patch of the working folder may hold secrets.
        settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, x_disable_meta=True),
    )
    return Logger(lambda step, numbers: run.log(dict(numbers), step=step), run.finish)


LOGGERS = {"tensorboard": open_tensorboard, "trackio": open_trackio, "wandb": open_wandb}


def wanted_loggers(loggers: str | Sequence[str]) -> tuple[str, ...]:
    """The names of a recipe's ``run.loggers`` that can be used here; RecipeError for one that is not installed."""
    if loggers == "auto":
        return tuple(name for name in AUTOMATIC if _is_installed(name))
    absent = [name for name in loggers if not _is_installed(name)]
    if absent:
        raise RecipeError(
            f"run.loggers: {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed; "
            f"pip install {' '.join(absent)}, or leave it out (metrics.jsonl is always written)."
        )
    return tuple(dict.fromkeys(loggers))


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


class Curves:
    """The loggers of a run, each on its own: ``warn`` is told of one that fails, and it is left out from then on."""

    def __init__(self, folder: Path, names: Sequence[str], warn: Callable[[str], None]):
        self._folder, self._warn = Path(folder), warn
        self._waiting: list[str] = list(names)
        self._open: dict[str, Logger] = {}

    def write(self, step: int, metrics: Mapping[str, Number | None]) -> None:
        """Draw what was measured in one step; the loggers are opened with the first."""
        for name in self._waiting:
            with self._guarded(name, "does not start"):
                self._open[name] = LOGGERS[name](self._folder, step)
        self._waiting = []
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for name, logger in list(self._open.items()):
            with self._guarded(name, "stopped writing"):
                logger.write(step, numbers)

    def close(self) -> None:
        """Close all that are open."""
        for name in list(self._open):
            with self._guarded(name, "does not close"):
                self._open.pop(name).close()

    @contextlib.contextmanager
    def _guarded(self, name: str, what: str) -> Iterator[None]:
        """Within: whatever the logger raises becomes a warning, and ends that logger."""
        try:
            with contextlib.redirect_stdout(sys.stderr):      # stdout is for the result of the command
                yield
        except Exception as error:      # noqa: BLE001 (the code of others; a run is worth more than its pictures)
            self._warn(f"{name} {what} ({type(error).__name__}: {error}); metrics.jsonl goes on.")
            logger = self._open.pop(name, None)
            if logger is not None:
                with contextlib.suppress(Exception), contextlib.redirect_stdout(sys.stderr):
                    logger.close()
