"""report.html of one run, and a page that compares several: no network and no script needed to look at them."""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kltune.errors import RecipeError
from kltune.recipe import flat
from kltune.report.figures import TOLERANCE, Plot, draw, draw_together, plots_for
from kltune.report.numbers import LEVELS, date, duration, loudest, number, shortened, spans, with_error
from kltune.report.outcome import (
    Files,
    alarm_of,
    beside,
    figures_of,
    gauge_of,
    limits_of,
    newest_kl,
    read_files,
    verdict_of,
)
from kltune.report.plots import COLOURS, svg_of
from kltune.run.files import visible, write_whole

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
SIDE_BY_SIDE = 4          # pairs that stand open; the rest is folded
PER_STEP = 3              # responses shown of a step while it trained


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
        pictures=comparison_pictures(runs),
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


def comparison_pictures(runs: dict[str, Files]) -> dict[str, list[tuple[str, Markup]]]:
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


def write_page(folder: Path, path: Path | None = None) -> Path:
    """Write ``report.html`` into a run folder, from whatever the run has written so far.

    Args:
        folder: the run's.
        path: where to write instead.

    Raises:
        CheckpointError: the folder is no run's. StorageError: the page cannot be written.
    """
    files = read_files(Path(folder))
    path = files.folder / "report.html" if path is None else path
    pairs = pairs_of(files.samples)
    write_whole(path, environment().get_template("page.html.j2").render(
        name=files.name,
        stage=files.record["stage"] or "run",
        record=files.record,
        reference={"path": None, "sft_adapter": None, "sha256": None, **(files.record["reference"] or {})},
        verdict=verdict_of(files),
        alarm=alarm_of(files),
        gauge=gauge_of(files),
        facts=facts_of(files),
        figures=figures_of(files),
        pictures=pictures_of(files),
        pairs=pairs[:SIDE_BY_SIDE],
        more_pairs=pairs[SIDE_BY_SIDE:],
        during=during_of(files.samples),
        timings=timings_of(files.metrics),
        measured=measured_of(files.metrics),
        recipe_text=files.recipe_text,
        again=again(files),
    ))
    return path


def environment() -> Environment:
    """Templates that escape all they are given, and show control characters instead of sending them."""
    made = Environment(
        loader=PackageLoader("kltune.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=lambda value: visible(value) if type(value) is str else value,
    )
    made.filters |= {
        "number": number, "duration": duration, "text": shortened, "date": date, "spans": spans, "loudest": loudest,
    }
    made.globals["levels"] = LEVELS
    return made


def facts_of(files: Files) -> list[tuple[str, str, str]]:
    """The few numbers of the run that everybody asks for: name, value, and what to hold it against ("" if nothing)."""
    kl, last = files.result.get("kl") or {}, files.metrics[-1] if files.metrics else {}
    result, measured, target = files.result, files.evaluated, limits_of(files).target
    value, error = (kl.get("nats_per_response"), kl.get("stderr")) if result else newest_kl(files)
    seconds = result.get("seconds", sum(row.get("time/step_seconds") or 0 for row in files.metrics))
    score = result.get("score", last.get("score/mean"))
    facts = [
        ("KL, nats per response", with_error(value, error), target and f"target {number(target)}"),
        ("score", with_error(score, result.get("score_stderr")), beside(result, "reference_score")),
        ("gold score", with_error(result.get("gold"), result.get("gold_stderr")), beside(result, "reference_gold")),
        ("distinct-2, adjusted", number(measured.get("eval/distinct_2_adjusted")),
         beside(measured, "eval/reference_distinct_2_adjusted")),
        ("alignment tax, nats per token",
         with_error(measured.get("eval/tax_nats_per_token"), measured.get("eval/tax_stderr")), ""),
        ("held-out accuracy", number(result.get("accuracy")), ""),
        ("calibration error", number((result.get("calibration") or {}).get("error")), ""),
        ("steps", number(result.get("steps", last.get("step"))), ""),
        ("time", duration(seconds) if seconds else "–", ""),
    ]
    return [(name, text, beneath or "") for name, text, beneath in facts if text != "–"]


def pictures_of(files: Files) -> dict[str, list[tuple[str, Markup]]]:
    """Under each heading, title and SVG of every curve that was measured."""
    limits, recorded = limits_of(files), files.recorded
    return as_svg(plots_for(limits), lambda plot: draw(plot, recorded, limits))


def as_svg(
    groups: Mapping[str, Sequence[Plot]], drawn: Callable[[Plot], Any]
) -> dict[str, list[tuple[str, Markup]]]:
    """Title and SVG of each plot for which ``drawn`` has a figure, under the headings that then have any."""
    found: dict[str, list[tuple[str, Markup]]] = {}
    for heading, plots in groups.items():
        figures = [(plot.title, drawn(plot)) for plot in plots]
        pictures = [
            (title, Markup(svg_of(figure, f"plot-{len(found)}-{place}", title)))      # safe: matplotlib escapes names
            for place, (title, figure) in enumerate(figures) if figure is not None
        ]
        if pictures:
            found[heading] = pictures
    return found


def pairs_of(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest responses that stand beside the reference's, one to a prompt."""
    both = [row for row in samples if row.get("reference_response") is not None]
    newest = max((row.get("step", 0) for row in both), default=0)
    return list({str(row.get("prompt")): row for row in both if row.get("step", 0) == newest}.values())


def during_of(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few responses of the newest, the middle and the first step that recorded any without the reference's."""
    alone = [row for row in samples if row.get("reference_response") is None]
    steps = sorted({row.get("step", 0) for row in alone}, reverse=True)
    chosen = dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1])) if steps else ()
    return [row for step in chosen for row in [row for row in alone if row.get("step", 0) == step][:PER_STEP]]


def timings_of(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(phase, seconds of the run, share of its steps), longest first."""
    names = dict.fromkeys(name for row in metrics for name in row if name.startswith("time/"))
    totals = {name: sum(row.get(name) or 0.0 for row in metrics) for name in names}
    whole = totals.pop("time/step_seconds", None) or sum(totals.values())
    if not whole:
        return []
    phases = sorted(totals.items(), key=lambda pair: -pair[1])
    rows = [(name.removeprefix("time/").removesuffix("_seconds"), seconds, seconds / whole) for name, seconds in phases]
    return [*rows, ("all steps", whole, 1.0)]


def measured_of(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, Any, Any]]:
    """(name, first value, last value) of everything in metrics.jsonl that is a number."""
    values: dict[str, list[float]] = {}
    for row in metrics:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                values.setdefault(name, []).append(value)
    return [(name, series[0], series[-1]) for name, series in sorted(values.items())]


def again(files: Files) -> list[tuple[str, str]]:
    """What to do with the run next, each with the command that does it."""
    folder, stage = shlex.quote(str(files.folder)), files.record["stage"]
    recipe = shlex.quote(str(files.folder / "recipe.yaml"))
    commands = [("Run it again", f"kltune {stage} --recipe {recipe} --output runs/again")]
    if (files.result.get("kl") or {}).get("nats_per_response") is not None:
        limits = limits_of(files)
        limit = limits.hard_cap or (limits.target and (1 + TOLERANCE) * limits.target)
        gate = f" --max-kl {limit:g} --unit {limits.unit}" if limit else ""
        commands += [
            ("Measure its KL afresh", f"kltune eval-kl {folder}{gate}"),
            ("Ask policy and reference something else", f'kltune sample {folder} --prompt "..."'),
        ]
    return commands
