"""One recipe over a grid: every point is a run of its own in a process of its own, and no point can lose another.

    DIR/kl.target=3,run.seed=0/        the run of that point, as ``kltune ppo`` would have left it
    DIR/kl.target=3,run.seed=0.log     what it printed
    DIR/sweep.json                     all points with their overrides, status, KL and score

What is finished is never done again, what was interrupted goes on from its checkpoint, what failed is tried again: the
same command continues a sweep, and one with more values extends it.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kltune.errors import BusyError, Interrupted, RecipeError
from kltune.lm.data.documents import Result, Sweep
from kltune.lm.rewards.inputs import inputs_of, recipe_changes, refuse_changed, refuse_changed_base
from kltune.recipe import (
    Axis,
    GridPoint,
    differing_settings,
    flat_settings,
    overlap,
)
from kltune.recipe.faults import redact, visible
from kltune.report.outcome import final_figures
from kltune.report.text import aligned
from kltune.run.files import (
    claim,
    locked,
    read_document,
    read_json,
    read_record,
    to_json,
    without_nonfinite,
    write_whole,
)
from kltune.run.recorder import Board, figures_of_step, kl_of_step
from kltune.run.screen import ABSENT, apart, duration, interval, out_of, with_error
from kltune.run.subprocesses import STOPPED, Command, last_lines, run_commands, thread_share

SCHEMA = "kltune.sweep/1"
# Exit codes of points; one that is not listed, as of a killed process, is worse.
WORST_FIRST = (1, 74, 6, 5, 2, 75, 143, 138, 130, 129)
SHOWN_LINES = 5
WAIT_SECONDS = 0.5
TAIL_BYTES = 1 << 16      # of a metrics.jsonl, where its last row is
NATS = "nats_per_response"


@dataclass(frozen=True)
class SweepOptions:
    """The command's options. recipe: as it was named. overrides: ``--set`` of all points. jobs: points at a time."""

    recipe: str
    output: Path
    overrides: tuple[str, ...] = ()
    jobs: int = 1
    trust_remote_code: bool = False


def sweep(axes: Sequence[Axis], points: Sequence[GridPoint], options: SweepOptions) -> tuple[dict[str, Any], int]:
    """``kltune sweep``: run every point that is not finished yet; the points are already checked, at least one.

    Returns:
        (the JSON document, the same as ``sweep.json``; 0 if all points finished, else the exit code of the worst).

    Raises:
        RecipeError: the folder holds something else, or the sweep of another recipe. BusyError: another process sweeps
            there. StorageError: it cannot be written. Interrupted: after the points that ran have saved.
    """
    folder = options.output
    claim(folder, "sweep", ours=read_document(folder / "sweep.json", Sweep) is not None)
    with locked(folder):
        earlier = read_document(folder / "sweep.json", Sweep)
        settings, varied = common_settings(axes, points)
        if earlier is not None:
            refuse_another_recipe(folder, earlier, settings, varied)
        for point in points:
            refuse_another_run(folder / point.name, point)
        state = _Sweep(axes, points, options, earlier, settings, varied)
        state.save()
        stopped = state.run()
        document = state.save()
    if stopped is not None:
        done, all_points = document["finished"], len(document["points"])
        raise Interrupted(
            f"{done} of {all_points} points are finished, the others saved; the same command goes on.", stopped
        )
    return document, worst_code([state.rows[point.name] for point in points])


@dataclass
class _Sweep:
    """The state of a sweep while it runs. earlier: sweep.json as it was."""

    axes: Sequence[Axis]
    points: Sequence[GridPoint]
    options: SweepOptions
    earlier: dict[str, Any] | None
    settings: dict[str, Any]
    varied: list[str]

    def __post_init__(self):
        self.began = time.monotonic()
        self.log_began: dict[str, int] = {}      # bytes of each log before this attempt
        self.rows = {point.name: self._row(point) for point in self.points}
        for row in (self.earlier or {}).get("points", []):
            self.rows.setdefault(row["name"], row)      # of a grid before
        for row in self.rows.values():
            self._refresh(row)

    def run(self) -> int | None:
        """Run what is not finished; the signal that ended it early, or None."""
        with Board(("point", "step", "KL", "")) as self.board:
            for point in self.points:
                self._wait(point)
            todo = []
            for point in self.points:
                row = self.rows[point.name]
                if row["status"] == "finished":
                    self._say(point.name, f"finished already: {figures_text(row)}")
                else:
                    todo.append(self._command(point))
            return run_commands(
                todo, self.options.jobs, environment=thread_share(os.environ, self.options.jobs),
                started=self._started, ended=self._ended, watched=self._watched,
            )

    def _wait(self, point: GridPoint) -> None:
        """Wait for a point that still runs because its sweep was killed with no chance to stop it."""
        folder, said = self.options.output / point.name, False
        while folder.is_dir():
            try:
                with locked(folder):
                    break
            except BusyError as error:
                if not said:
                    self._say(point.name, f"still runs for a sweep that was killed; waiting for it ({error})")
                said = True
                time.sleep(WAIT_SECONDS)
        if said:
            self._refresh(self.rows[point.name])

    def save(self) -> dict[str, Any]:
        """Write sweep.json and give it back."""
        rows = list(self.rows.values())
        document = without_nonfinite({
            "schema": SCHEMA,
            "recipe": self.options.recipe,
            "stage": self.points[0].recipe.stage,
            "output": str(self.options.output),
            "over": {axis.key: axis.values for axis in self.axes},
            "set": [redact(override, arguments=True) for override in self.options.overrides],
            "points": rows,
            "finished": sum(row["status"] == "finished" for row in rows),
            "failed": sum(row["status"] == "failed" for row in rows),
            "seconds": time.monotonic() - self.began,
            "varied": self.varied,
            "settings": self.settings,
        })
        write_whole(self.options.output / "sweep.json", redact(to_json(document, indent=2)) + "\n")
        return document

    def _row(self, point: GridPoint) -> dict[str, Any]:
        overrides = dict(override.split("=", 1) for override in point.overrides)
        return {"name": point.name, "overrides": overrides, "folder": str(self.options.output / point.name)}

    def _refresh(self, row: dict[str, Any]) -> None:
        """Update a row with what the point's folder says now."""
        folder = self.options.output / row["name"]
        record = read_record(folder) or {}
        status = record.get("status", "pending")
        result = read_json(folder / "result.json", Result) if status == "finished" else {}
        if status == "running":      # written by a process that is gone: it was killed, or the sweep was
            status = "failed" if row.get("status") == "failed" else "interrupted"
        row["status"] = status
        row["exit_code"] = 0 if status == "finished" else row.get("exit_code")
        row |= final_figures(result) | accuracy_of(result)
        row |= {"seconds": result.get("seconds"), "log": f"{row['folder']}.log"}
        row.setdefault("error", [])

    def _command(self, point: GridPoint) -> Command:
        sets = [word for override in (*self.options.overrides, *point.overrides) for word in ("--set", override)]
        folder = self.options.output / point.name
        return Command(
            point.name,
            (sys.executable, "-m", "kltune", point.recipe.stage, "--recipe", self.options.recipe, *sets, "--output",
             str(folder), "--resume", *(["--trust-remote-code"] if self.options.trust_remote_code else [])),
            folder.with_name(f"{point.name}.log"),
        )

    def _started(self, command: Command) -> None:
        self.log_began[command.name] = command.log.stat().st_size if command.log.exists() else 0
        row = self.rows[command.name]
        begins = {"interrupted": "goes on", "failed": "tried again"}.get(row["status"], "started")
        self._say(command.name, f"{begins}; its log is {command.log}")
        row |= {"status": "running", "exit_code": None, "error": []}
        self.save()

    def _ended(self, command: Command, code: int, seconds: float) -> None:
        row = self.rows[command.name]
        self._refresh(row)
        row["exit_code"] = code
        if code == 0 and row["status"] == "finished":
            self._say(command.name, f"finished in {duration(seconds)}: {figures_text(row)}")
        elif code in STOPPED:
            row["status"] = "interrupted"
            self._say(command.name, "stopped, to go on later")
        else:
            row["status"] = "failed"
            row["error"] = [redact(line) for line in last_lines(command.log, SHOWN_LINES, self.log_began[command.name])]
            lines = "".join(f"\n    {visible(line)}" for line in row["error"])
            self._say(command.name, f"failed with exit code {code}; the end of {command.log}:{lines}")
        self.save()

    def _watched(self, running: Sequence[Command]) -> None:
        self.board.show(lambda: [(self._title(command.name), *self._progress(command)) for command in running])

    def _progress(self, command: Command) -> tuple[str, str, str]:
        """Steps done of all, KL and other figures of the last step; before the first one, what the log says last."""
        metrics = newest_row(self.options.output / command.name / "metrics.jsonl")
        if metrics is None:
            said = last_lines(command.log, 1, self.log_began[command.name])
            return "", "", said[0] if said else "starting"
        recipe = next(point.recipe for point in self.points if point.name == command.name)
        budget = getattr(recipe, "kl", None)
        unit, target = (budget.unit, budget.target if budget.control == "target" else None) if budget else (NATS, None)
        steps = f"{metrics['step']}{out_of(metrics['step'], recipe.run.steps, '/')}"
        return steps, kl_of_step(metrics, unit, target), figures_of_step(metrics)

    def _title(self, name: str) -> str:
        number = [point.name for point in self.points].index(name) + 1
        return f"point {number}/{len(self.points)} {name}"

    def _say(self, name: str, text: str) -> None:
        self.board.say(f"{self._title(name)}: {text}")


def newest_row(metrics: Path) -> dict[str, Any] | None:
    """The last whole row of a run's metrics.jsonl; None before there is one."""
    if not metrics.exists():
        return None
    with open(metrics, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]      # what follows the last line's end is still being written
    return json.loads(lines[-1]) if lines else None


def common_settings(axes: Sequence[Axis], points: Sequence[GridPoint]) -> tuple[dict[str, Any], list[str]]:
    """(key: value of what is the same in all points, the keys that are not, or are swept over)."""
    swept = [axis.key for axis in axes]
    every = [flat_settings(point.recipe) for point in points]
    keys = sorted({key for one in every for key in one})
    same = {
        key: every[0][key] for key in keys
        if all(key in one and one[key] == every[0][key] for one in every)
        and not any(overlap(key, other) for other in swept)
    }
    return same, [key for key in keys if key not in same]


def refuse_another_recipe(
    folder: Path, earlier: dict[str, Any], settings: dict[str, Any], varied: Sequence[str]
) -> None:
    """Refuse a recipe with other settings than the earlier sweep, of those that are the same in all points of both."""
    before, now = (
        {key: value for key, value in common.items() if key not in {*varied, *earlier["varied"]}}
        for common in (earlier["settings"], settings)
    )
    if changes := differing_settings(before, now):
        raise another_recipe(folder, changes)


def refuse_another_run(folder: Path, point: GridPoint) -> None:
    """Refuse a point that was made by another recipe than the one of now, or on another model, rows or scorers."""
    record = read_record(folder) or {}
    refuse_changed(record.get("inputs") or {}, inputs_of(point.recipe, present=True), folder)
    if record.get("status") != "finished":
        return
    refuse_changed_base(record, point.recipe, folder)
    if changes := recipe_changes(folder, record, point.recipe):
        raise another_recipe(folder, changes)


def another_recipe(folder: Path, changes: Sequence[str]) -> RecipeError:
    """The error that names every key that differs."""
    lines = "".join(f"\n  {redact(change)}" for change in changes)
    return RecipeError(
        f"{folder} was made by another recipe:{lines}\nSet the old values again, or choose another --output. More "
        "--over values, or another --over key, are fine."
    )


def worst_code(rows: Sequence[dict[str, Any]]) -> int:
    """0 if all points finished; else the exit code of the worst that did not, by ``WORST_FIRST``."""
    codes = {row["exit_code"] or 1 for row in rows if row["status"] != "finished"}
    unlisted = codes - set(WORST_FIRST)
    return max(unlisted) if unlisted else next((code for code in WORST_FIRST if code in codes), 0)


def accuracy_of(result: dict[str, Any]) -> dict[str, Any]:
    """The share of held-out pairs or labels that a result.json has right, with its 95 % interval; None without one."""
    evaluation = result.get("eval") or {}
    share, *ci95 = (evaluation.get(f"eval/accuracy{end}") for end in ("", "_low", "_high"))
    return {"accuracy": share, "accuracy_ci95": None if None in ci95 else ci95}


def figures_text(row: dict[str, Any]) -> str:
    """KL and scores of a point, as far as they were measured."""
    figures = {title: cell for title, cell in cells_of(row).items() if cell != ABSENT and title != "95 %"}
    return ", ".join(f"{title.partition(',')[0]} {cell}" for title, cell in figures.items())


def cells_of(row: dict[str, Any]) -> dict[str, str]:
    """The figures of a point by the headings of a table; of a reward model, which has no KL, the accuracy alone."""
    share = row["accuracy"]
    accuracy = ABSENT if share is None else (
        f"{apart(share, 0.0, 1.0)[0]} (95 %: {interval(row['accuracy_ci95'], against=(0.0, 0.5, 1.0))})"
    )
    scores = {name: with_error(row[name], row[f"{name}_stderr"]) for name in ("score", "gold")}
    kl = {"KL, nats per response": with_error(row["kl"], row["kl_stderr"]), "95 %": interval(row["kl_ci95"])}
    return {"accuracy": accuracy} if share is not None and row["kl"] is None else {**kl, **scores, "accuracy": accuracy}


def sweep_text(document: dict[str, Any]) -> str:
    """The sweep as a table."""
    rows, judged = document["points"], document["stage"] == "reward"
    cells = [cells_of(row) for row in rows]
    always = ("accuracy",) if judged else ("KL, nats per response", "95 %", "score")
    names = [*always, *(
        name for name in ("gold", "accuracy")
        if name not in always and any(one.get(name, ABSENT) != ABSENT for one in cells)
    )]
    table = [["point", "status", *names, "time"]]
    for row, one in zip(rows, cells, strict=True):
        status = row["status"] if row["status"] != "failed" else f"failed ({row['exit_code']})"
        time_taken = ABSENT if row["seconds"] is None else duration(row["seconds"])
        table.append([row["name"], status, *(one.get(name, ABSENT) for name in names), time_taken])
    lines = list(aligned(table))
    lines.append(f"{document['finished']} of {len(rows)} points are finished: {document['output']}/sweep.json")
    if document["finished"] and not judged:
        lines.append(f"kltune frontier {shlex.quote(document['output'])} shows reward against KL")
    return "\n".join(lines)
