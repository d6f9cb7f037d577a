"""Scores of a held-out benchmark against KL: what was forgotten on the way, from files that other tools wrote.

Files are results of lm-evaluation-harness, logs of inspect, or an object of {"folder of a run": score}. A file says
which checkpoint it is about by the path that the tool was given.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kltune.core.kl.intervals import rank_correlation
from kltune.errors import DataError
from kltune.lm.data.foreign import read_json
from kltune.lm.model.files import say_once
from kltune.report.frontier.points import FrontierPoint
from kltune.report.plots import Z95, Curve, CurvePoint, Frame, curve_svg
from kltune.run.screen import number

FIRST = ("acc_norm", "acc", "exact_match", "f1", "accuracy", "mean")   # which figure of a task is its score
NATS = "KL(policy ‖ reference), nats per response"


@dataclass(frozen=True)
class Benchmarked:
    """What a file says of one checkpoint: path, and each task's score with its standard error or None."""

    file: str
    checkpoint: str
    tasks: dict[str, tuple[float, float | None]]


def read_scores(path: str) -> list[Benchmarked]:
    """The checkpoints of a file, with their scores.

    Raises:
        DataError: it is none of the three kinds, names no checkpoint, or has no score that is a number.
    """
    if path.endswith(".eval"):
        raise DataError(f"--scores: {path} is a packed log of inspect; wanted one in JSON: inspect log convert {path} "
                        "--to json --output-dir DIR, or inspect eval --log-format json.")
    content = read_json(Path(path), DataError, dict[str, Any], "--scores", finite=False)
    if isinstance(content.get("eval"), dict) and content.get("status", "success") != "success":
        raise DataError(f"{path}: a log of inspect whose status is {str(content['status'])[:40]!r}, wanted 'success': "
                        "the evaluation did not end.")
    if isinstance(content.get("results"), dict) and isinstance(content.get("eval"), dict):
        found = [_of_inspect(path, content)]
    elif isinstance(content.get("results"), dict):
        found = [_of_harness(path, content)]
    elif content and all(_is_number(value) for value in content.values()):
        found = [Benchmarked(path, run, {"score": (float(value), None)}) for run, value in content.items()]
    else:
        raise DataError(
            f"{path}: found the keys {', '.join(list(content)[:5])}; wanted results of lm-evaluation-harness, a log of "
            'inspect in JSON, or {"runs/a": 0.5}.'
        )
    for one in found:
        if not one.tasks:
            raise DataError(f"{path}: no score of a task in it; wanted {', '.join(FIRST)}, or a figure that its "
                            "higher_is_better speaks of.")
    return found


def _of_harness(path: str, content: dict[str, Any]) -> Benchmarked:
    """Each task, or each of its filters where it has several; of a group that stands beside its tasks, the tasks."""
    arguments = _object(content.get("config")).get("model_args")
    if isinstance(arguments, str):
        arguments = dict(part.partition("=")[::2] for part in arguments.split(","))
    arguments = _object(arguments)
    checkpoint = arguments.get("peft") or arguments.get("pretrained") or content.get("model_name")
    results, members = content["results"], _object(content.get("group_subtasks"))
    tasks: dict[str, Any] = {}
    for task, figures in results.items():
        if any(member in results for member in members.get(task) or ()):
            continue
        filters: dict[str, dict[str, Any]] = {}
        for name, value in _object(figures).items():
            metric, comma, chosen = name.partition(",")
            if comma:       # else it describes the task
                filters.setdefault(chosen, {})[metric] = value
        rising = _object(_object(content.get("higher_is_better")).get(task))
        for chosen, metrics in filters.items():
            named = f"{task}/{chosen}" if len(filters) > 1 else task
            tasks |= _score(path, named, metrics, metrics, [name for name in metrics if rising.get(name)])
    return _named(path, checkpoint, tasks)


def _of_inspect(path: str, content: dict[str, Any]) -> Benchmarked:
    """Each scorer of the task, by each reducer of epochs where it has several."""
    told = content["eval"]
    checkpoint = _object(told.get("model_args")).get("model_path") or str(told.get("model", "")).removeprefix("hf/")
    tasks: dict[str, Any] = {}
    scores = content["results"].get("scores")
    scores = [_object(score) for score in (scores if isinstance(scores, list) else [])]
    names = [score.get("name") for score in scores]
    for score in scores:
        metrics = {name: _object(metric).get("value") for name, metric in _object(score.get("metrics")).items()}
        several = names.count(score.get("name")) > 1
        named = f"{told.get('task')}/{score.get('name')}" + (f"/{score.get('reducer')}" if several else "")
        rising = [name for name in metrics if "std" not in name and name != "var"]
        tasks |= _score(path, named, metrics, {f"{name}_stderr": metrics.get("stderr") for name in metrics}, rising)
    return _named(path, checkpoint, tasks)


def _score(
    path: str, task: str, metrics: dict[str, Any], errors: dict[str, Any], rising: Sequence[str]
) -> dict[str, tuple[float, float | None]]:
    """A task's score with its standard error: the first figure of ``FIRST``, or else of those that are to be high.

    Raises:
        DataError: it is no finite number.
    """
    name = next((name for name in (*FIRST, *rising) if name in metrics), None)
    if name is None:
        found = ", ".join(sorted(metrics)[:5]) or "no figures"
        say_once(f"note: {path}: {task} has {found}, none known to be better when higher; it is left out.")
        return {}
    if not _is_number(metrics[name]):
        raise DataError(f"{path}: {name} of {task} is {str(metrics[name])[:40]}; wanted a finite number.")
    stderr = errors.get(f"{name}_stderr")
    return {task: (float(metrics[name]), float(stderr) if _is_number(stderr) else None)}


def _named(path: str, checkpoint: Any, tasks: dict[str, Any]) -> Benchmarked:
    if not isinstance(checkpoint, str) or not checkpoint:
        raise DataError(f"{path}: it does not say which checkpoint it is about (model_args: peft or pretrained; "
                        "model_path).")
    return Benchmarked(path, checkpoint, tasks)


def _object(value: Any) -> dict[str, Any]:
    """What was written as an object; empty where something else was."""
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def held_out_document(points: Sequence[FrontierPoint], files: Sequence[str]) -> dict[str, Any]:
    """Held-out score against KL by run: the mean over the tasks that all have, and the rank correlation.

    Raises:
        DataError: a file is about none of the runs, or no task is known of all of them.
    """
    runs: dict[str, FrontierPoint] = {}
    for point in sorted(points, key=lambda point: -point.alpha):     # of a curve the whole adapter
        runs.setdefault(os.path.realpath(point.run), point)
    known: dict[str, Benchmarked] = {}
    for one in (one for file in files for one in read_scores(file)):
        place = os.path.realpath(one.checkpoint)
        run = next((run for run in runs if place == run or place.startswith(run + os.sep)), None)
        if run is None:
            raise DataError(f"{one.file}: it is about {one.checkpoint}, which is none of the runs: "
                            f"{', '.join(point.run for point in runs.values())}.")
        merged = known[run].tasks | one.tasks if run in known else one.tasks
        known[run] = Benchmarked(one.file, one.checkpoint, merged)
    tasks = sorted(set.intersection(*(set(one.tasks) for one in known.values())))
    if not tasks:
        raise DataError("--scores: no task is known of all the checkpoints that were scored.")
    rows = [_row(runs[run], one, tasks) for run, one in known.items()]
    rho, ci = rank_correlation([row["kl"] for row in rows], [row["score"] for row in rows])
    unscored = [point.run for run, point in runs.items() if run not in known]
    return {"tasks": tasks, "points": rows, "rank_correlation": rho, "ci95": ci, "unscored": unscored}


def _row(point: FrontierPoint, one: Benchmarked, tasks: Sequence[str]) -> dict[str, Any]:
    values, errors = zip(*(one.tasks[task] for task in tasks), strict=True)
    stderr = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(tasks)
    return {"run": point.run, "kl": point.kl, "kl_stderr": point.kl_stderr, "score": sum(values) / len(values),
            "stderr": stderr}


def held_out_lines(document: dict[str, Any]) -> Iterator[str]:
    """The rank correlation in words."""
    rho, ci, count = document["rank_correlation"], document["ci95"], len(document["points"])
    ends = "" if ci is None else f" (95 %: {number(ci[0], 2)} to {number(ci[1], 2)})"
    said = "not known" if rho is None else number(rho, 2)
    yield f"held-out score ({', '.join(document['tasks'])}) against KL: rank correlation {said}{ends} over {count} runs"
    if document["unscored"]:
        yield f"  without a held-out score: {', '.join(document['unscored'])}"


def held_out_svg(document: dict[str, Any], inside: bool = False) -> str:
    """Held-out score against KL with 95 % error bars."""
    points = [
        CurvePoint(row["kl"], row["score"], Z95 * (row["kl_stderr"] or 0.0), Z95 * (row["stderr"] or 0.0))
        for row in sorted(document["points"], key=lambda row: row["kl"])
    ]
    title = "held-out score against KL"
    frame = Frame(x=NATS, y="held-out score", title=title, name="frontier-held-out", inside=inside)
    return curve_svg([Curve("runs", points, joined=False)], frame)
