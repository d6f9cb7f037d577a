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
        DataError: it is none of the three kinds, or names no checkpoint.
    """
    content = read_json(Path(path), DataError, dict[str, Any], "--scores", finite=False)
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
            raise DataError(f"{path}: no score of a task in it.")
    return found


def _of_harness(path: str, content: dict[str, Any]) -> Benchmarked:
    arguments = _object(content.get("config")).get("model_args")
    if isinstance(arguments, str):
        arguments = dict(part.partition("=")[::2] for part in arguments.split(","))
    arguments = _object(arguments)
    checkpoint = arguments.get("peft") or arguments.get("pretrained") or content.get("model_name")
    tasks = {}
    for task, figures in content["results"].items():
        numbers = {name.split(",")[0]: value for name, value in _object(figures).items() if _is_number(value)}
        tasks |= _score(task, numbers, numbers)
    return _named(path, checkpoint, tasks)


def _of_inspect(path: str, content: dict[str, Any]) -> Benchmarked:
    told = content["eval"]
    checkpoint = _object(told.get("model_args")).get("model_path") or str(told.get("model", "")).removeprefix("hf/")
    tasks = {}
    scores = content["results"].get("scores")
    for score in map(_object, scores if isinstance(scores, list) else []):
        metrics = {name: _object(metric).get("value") for name, metric in _object(score.get("metrics")).items()}
        numbers = {name: value for name, value in metrics.items() if _is_number(value)}
        tasks |= _score(f"{told.get('task')}/{score.get('name')}", numbers, {"accuracy_stderr": numbers.get("stderr")})
    return _named(path, checkpoint, tasks)


def _score(task: str, numbers: dict[str, float], errors: dict[str, float | None]) -> dict[str, Any]:
    name = next((name for name in FIRST if name in numbers), None)
    return {} if name is None else {task: (float(numbers[name]), errors.get(f"{name}_stderr"))}


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
