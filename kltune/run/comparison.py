"""Several runs on one page: their verdicts, their curves in one picture, and where their recipes differ."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kltune.errors import RecipeError
from kltune.recipe import flat
from kltune.run.outcome import Files, alarm_of, beside, limits_of, newest_kl, read_files, verdict_of
from kltune.run.page import as_svg, environment
from kltune.run.pictures import Plot, draw_together
from kltune.run.plots import COLOURS
from kltune.run.storage import write_whole
from kltune.run.words import duration, number, with_error

WHERE_IT_IS_KEPT = ("run.output", "run.keep", "run.loggers")      # keys in which any two runs may differ
IN_THE_TABLE = {
    "distinct-2, adjusted": ("eval/distinct_2_adjusted", ""),
    "self-BLEU": ("eval/self_bleu", ""),
    "tokens per response": ("eval/response_tokens", ""),
    "alignment tax, nats per token": ("eval/tax_nats_per_token", "eval/tax_stderr"),
}
ABSENT = "–"
PLOTS = {
    "KL and score": (
        Plot("KL to the reference", "nats per response", ("kl/ref_nats_per_response", "eval/kl_ref_nats_per_response"),
             limited="ref"),
        Plot("Score", "score", ("score/mean", "eval/score_mean")),
        Plot("Gold score", "score, never trained on", ("eval/gold_mean",)),
        Plot("Proxy", "sd of the reference", ("eval/score_z",)),
        Plot("Gold", "sd of the reference", ("eval/gold_z",)),
        Plot("Price of one nat (beta)", "score per nat", ("kl/beta",), log=True),
        Plot("Loss", "loss", ("loss/mean", "eval/loss"), log=True),
        Plot("Accuracy", "share of pairs", ("accuracy/mean", "eval/accuracy")),
    ),
    "Diversity, length and held-out texts": (
        Plot("Different pairs of tokens, adjusted", "share of all", ("eval/distinct_2_adjusted",)),
        Plot("Likeness to each other (self-BLEU)", "0 to 1", ("eval/self_bleu",)),
        Plot("Entropy", "nats per token", ("policy/entropy_nats_per_token", "eval/entropy_nats_per_token")),
        Plot("Length", "tokens per response", ("response/tokens", "eval/response_tokens")),
        Plot("Alignment tax", "nats per token", ("eval/tax_nats_per_token",)),
    ),
}


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Write one page on several runs, each as far as it has come.

    Args:
        folders: of the runs, in the order of the page.
        path: of the page.

    Raises:
        CheckpointError: a folder is no run's. RecipeError: a folder is named twice. StorageError: the page cannot be
            written.
    """
    repeated = [str(folder) for folder, count in Counter(Path(f).resolve() for f in folders).items() if count > 1]
    if repeated:
        raise RecipeError(f"named more than once: {', '.join(repeated)}; wanted different runs.")
    runs = dict(zip(labels_of(folders), (read_files(Path(folder)) for folder in folders), strict=True))
    cells = [cells_of(files) for files in runs.values()]
    columns = [name for name in cells[0] if any(row[name][0] != ABSENT for row in cells)]
    write_whole(path, environment().get_template("comparison.html.j2").render(
        references=references_of(runs),
        columns=columns,
        runs=[
            {
                "label": label, "stage": files.record["stage"] or "run", "folder": str(files.folder),
                "verdict": verdict_of(files), "alarm": alarm_of(files), "cells": row,
            }
            for (label, files), row in zip(runs.items(), cells, strict=True)
        ],
        pictures=pictures_of(runs),
        too_many=len(COLOURS) if len(runs) > len(COLOURS) else None,
        differences=differences_of(list(runs.values())),
    ))
    return path


def labels_of(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    length = 1
    while len({path[-length:] for path in parts}) < len(parts):
        length += 1
    return ["/".join(path[-length:]) for path in parts]


def references_of(runs: dict[str, Files]) -> list[dict[str, Any]]:
    """Each reference once, with the runs that were held against it."""
    found: dict[str, dict[str, Any]] = {}
    for label, files in runs.items():
        reference = files.record["reference"] or {}
        sha256 = str(reference.get("sha256") or "not recorded")
        entry = found.setdefault(sha256, {"path": reference.get("path") or "–", "sha256": sha256, "runs": []})
        entry["runs"].append(label)
    return list(found.values())


def cells_of(files: Files) -> dict[str, tuple[str, str]]:
    """The figures of one run by column, each with what stands beneath it."""
    result, measured = files.result, files.evaluated
    kl = result.get("kl") or {}
    value, error = (kl.get("nats_per_response"), kl.get("stderr")) if result else newest_kl(files)
    low, high = kl.get("ci95") or (None, None)
    seconds = result.get("seconds", sum(row.get("time/step_seconds") or 0 for row in files.metrics))
    steps = result.get("steps", files.metrics[-1].get("step") if files.metrics else None)
    return {
        "KL, nats per response": (
            with_error(value, error), "" if low is None else f"95 %: {number(low)} to {number(high)}"
        ),
        "target": (number(limits_of(files).target), ""),
        "score": (with_error(result.get("score"), result.get("score_stderr")), beside(result, "reference_score")),
        "gold score": (with_error(result.get("gold"), result.get("gold_stderr")), beside(result, "reference_gold")),
        "held-out accuracy": (number(result.get("accuracy")), ""),
        **{
            title: (with_error(measured.get(name), measured.get(error)), "")
            for title, (name, error) in IN_THE_TABLE.items()
        },
        "steps": (number(steps), ""),
        "time": (duration(seconds) if seconds else ABSENT, ""),
    }


def pictures_of(runs: dict[str, Files]) -> dict[str, list[tuple[str, Markup]]]:
    """Under each heading, title and SVG of what any of the runs has measured."""
    recorded = {label: files.recorded for label, files in runs.items()}
    limits = {label: limits_of(files) for label, files in runs.items()}
    targets = {
        label: limit.target for label, limit in limits.items()
        if limit.target is not None and limit.unit == "nats_per_response"
    }
    return as_svg(PLOTS, lambda plot: draw_together(plot, recorded, targets if plot.limited == "ref" else {}))


def differences_of(runs: Sequence[Files]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) of the recipe's keys that are not the same in all."""
    recipes = [flat(files.recipe) for files in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in WHERE_IT_IS_KEPT)
    rows = [(key, [_shown(recipe[key]) if key in recipe else "–" for recipe in recipes]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _shown(value: Any) -> str:
    """A value as a recipe writes it, if in JSON's way; dates as text."""
    return json.dumps(value, ensure_ascii=False, default=str)
