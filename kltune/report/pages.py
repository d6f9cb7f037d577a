"""report.html of one run, and a page that compares several: no network and no script needed to look at them."""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kltune.errors import RecipeError
from kltune.recipe import as_written, by_dotted_key
from kltune.recipe.faults import visible
from kltune.report.facts import ROUNDING, TARGETS, columns_of, facts_of, preference_of
from kltune.report.figures import COMPARED_CURVES, TOLERANCE, Plot, draw, draw_together, plots_for
from kltune.report.outcome import (
    Files,
    alarm_of,
    figures_of,
    gauge_of,
    in_words,
    limits_of,
    read_files,
    verdict_of,
)
from kltune.report.plots import COLOURS, svg_of
from kltune.report.samples import (
    SHADES,
    brief,
    has_shades,
    newest_pairs,
    samples_while_training,
    shaded_spans,
    shortened,
    tokens_of_most_kl,
)
from kltune.report.updates import updates_of
from kltune.run.files import write_whole
from kltune.run.screen import ABSENT, duration, number, percent

NAMES_NO_RUN = ("run.output", "run.keep", "run.loggers")      # keys in which any two runs may differ
ON_THE_REPORT = (
    "KL, nats per token", "KL, nats per response", "score", "gold score", "win rate", "distinct-2, adjusted",
    "alignment tax, nats per token", "held-out accuracy", "calibration error", ROUNDING, "steps", "time",
)
IN_THE_COMPARISON = (
    "KL, nats per response", TARGETS["nats_per_response"], "KL, nats per token", TARGETS["nats_per_token"], "score",
    "gold score", "win rate", "held-out accuracy", "distinct-2, adjusted", "self-BLEU", "tokens per response",
    "alignment tax, nats per token", ROUNDING, "steps", "time",
)
SIDE_BY_SIDE = 4          # pairs that stand open; the rest is folded
Pictures = dict[str, list[tuple[str, Markup]]]      # title and SVG, by heading


def write_page(folder: Path, path: Path | None = None) -> Path:
    """Write ``report.html`` into a run folder, or to ``path``, from whatever the run has written so far.

    Raises:
        CheckpointError: the folder is no run's. StorageError: the page cannot be written.
    """
    files = read_files(Path(folder))
    path = files.folder / "report.html" if path is None else path
    limits, pairs, facts = limits_of(files), newest_pairs(files.samples), facts_of(files)
    if (steered := f"KL, {in_words(limits.unit)}") in facts:      # a recipe that somebody changed may name any unit
        facts[steered] = replace(facts[steered], target=limits.target)
    during = samples_while_training(files.samples)
    write_whole(path, environment().get_template("page.html.j2").render(
        name=files.folder.resolve().name,
        stage=files.record["stage"] or "run",
        record=files.record,
        reference={"path": None, "sft_adapter": None, "sha256": None, **(files.record["reference"] or {})},
        verdict=verdict_of(files),
        alarm=alarm_of(files),
        gauge=gauge_of(files),
        facts=[(name, *facts[name].shown()) for name in ON_THE_REPORT if facts[name].measured],
        figures=figures_of(files),
        pictures=drawn_pictures(plots_for(limits), lambda plot: draw(plot, files.recorded, limits)),
        pairs=pairs[:SIDE_BY_SIDE],
        more_pairs=pairs[SIDE_BY_SIDE:],
        during=during,
        shaded=any(has_shades(row) for row in [*pairs, *chain(*during)]),
        updates=updates_of(files),
        timings=timings_of(files.metrics),
        measured=first_and_last(files.metrics),
        recipe_text=files.recipe_text,
        again=next_commands(files),
    ))
    return path


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Write one page on several runs, each as far as it has come.

    Raises:
        CheckpointError: a folder is no run's. RecipeError: a folder is named twice. StorageError: the page cannot be
            written.
    """
    repeated = [str(folder) for folder, count in Counter(Path(f).resolve() for f in folders).items() if count > 1]
    if repeated:
        raise RecipeError(f"named more than once: {', '.join(repeated)}; wanted different runs.")
    runs = dict(zip(labels_of(folders), (read_files(Path(folder)) for folder in folders), strict=True))
    columns = columns_of([facts_of(files) for files in runs.values()], IN_THE_COMPARISON)
    references = references_of(runs)
    recorded = {label: files.recorded for label, files in runs.items()}
    limits = {label: limits_of(files) for label, files in runs.items()}
    targets = {label: each.target for label, each in limits.items() if each.target and each.unit == "nats_per_response"}
    write_whole(path, environment().get_template("comparison.html.j2").render(
        references=references,
        preference=preference_of(runs) if len(references) == 1 else "",
        columns=list(columns),
        runs=[
            {
                "label": label, "stage": files.record["stage"] or "run", "folder": str(files.folder),
                "verdict": verdict_of(files), "alarm": alarm_of(files),
                "cells": {name: cells[index] for name, cells in columns.items()},
            }
            for index, (label, files) in enumerate(runs.items())
        ],
        pictures=drawn_pictures(
            COMPARED_CURVES, lambda plot: draw_together(plot, recorded, targets if plot.limited == "ref" else {})
        ),
        too_many=len(COLOURS) if len(runs) > len(COLOURS) else None,
        differences=differences_of(list(runs.values())),
    ))
    return path


def environment() -> Environment:
    """Templates that escape all they are given, and show control characters instead of sending them."""
    made = Environment(
        loader=PackageLoader("kltune.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=lambda value: visible(value) if type(value) is str else value,
    )
    made.filters |= {
        "number": number, "percent": percent, "duration": duration, "text": shortened, "date": date,
        "spans": shaded_spans, "tokens_of_most_kl": tokens_of_most_kl, "brief": brief, "breakable": breakable,
    }
    made.globals["levels"] = SHADES
    return made


def date(stamp: str | None) -> str:
    """``2026-11-22T15:00:00+00:00`` as 2026-11-22 15:00 UTC, which is how run.json keeps time."""
    return f"{stamp[:16].replace('T', ' ')} UTC" if stamp else ABSENT


def breakable(text: str) -> Markup:
    """A path or a dotted key that may go on in the next line after what divides it, and nowhere else."""
    return Markup("").join(Markup("{}<wbr>").format(part) for part in re.split(r"(?<=[/._,=-])", visible(text)))


def drawn_pictures(groups: Mapping[str, Sequence[Plot]], draw: Callable[[Plot], Any]) -> Pictures:
    """The plots of which ``draw`` makes a figure, under the headings that then have any."""
    pictures: Pictures = {}
    for heading, plots in groups.items():
        figures = [(plot.title, draw(plot)) for plot in plots]
        svgs = [
            (title, Markup(svg_of(figure, f"plot-{len(pictures)}-{index}", title)))      # safe: matplotlib escapes
            for index, (title, figure) in enumerate(figures) if figure is not None
        ]
        if svgs:
            pictures[heading] = svgs
    return _one_joined(pictures)


def _one_joined(pictures: Pictures) -> Pictures:
    """The pictures, with one that would stand alone under its heading joined to those before it, or after the first."""
    joined: Pictures = {}
    for heading, svgs in pictures.items():
        before = next(reversed(joined), None)
        if before is None or (len(svgs) > 1 and len(joined[before]) > 1):
            joined[heading] = svgs
        else:
            kept = before if len(joined[before]) > 1 else heading
            joined[kept] = joined.pop(before) + svgs
    return joined


def timings_of(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(phase, seconds of the run, share of its steps), longest first."""
    names = dict.fromkeys(
        name for row in metrics for name, value in row.items() if name.startswith("time/") and value is not None
    )
    totals = {name: sum(row.get(name) or 0.0 for row in metrics) for name in names}
    whole = totals.pop("time/step_seconds", None) or sum(totals.values())
    if not whole:
        return []
    phases = sorted(totals.items(), key=lambda pair: -pair[1])
    rows = [(name.removeprefix("time/").removesuffix("_seconds"), seconds, seconds / whole) for name, seconds in phases]
    return [*rows, ("all steps", whole, 1.0)]


def first_and_last(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, Any, Any]]:
    """(name, first value, last value) of everything in metrics.jsonl that is a number."""
    first, last = met_first(metrics), met_first(reversed(metrics))
    return [(name, first[name], last[name]) for name in sorted(first)]


def met_first(metrics: Iterable[dict[str, Any]]) -> dict[str, float]:
    """What the first row that has it as a number says of everything but the step."""
    found: dict[str, float] = {}
    for row in metrics:
        found |= {name: row[name] for name in row.keys() - found.keys() if isinstance(row[name], int | float)}
    found.pop("step", None)
    return found


def next_commands(files: Files) -> list[tuple[str, str]]:
    """What to do with the run next, each with the command that does it."""
    folder, stage = shlex.quote(str(files.folder)), files.record["stage"]
    recipe = shlex.quote(str(files.folder / "recipe.yaml"))
    commands = [("Run it again", f"kltune {stage} --recipe {recipe} --output runs/again")]
    if files.kl.get("nats_per_response") is not None:
        limits = limits_of(files)
        limit = limits.hard_cap or (limits.target and (1 + TOLERANCE) * limits.target)
        gate = f" --max-kl {limit:g} --unit {limits.unit}" if limit else ""
        commands += [
            ("Measure its KL afresh", f"kltune eval-kl {folder}{gate}"),
            ("Ask policy and reference something else", f'kltune sample {folder} --prompt "..."'),
        ]
    return commands


def labels_of(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    paths = [Path(folder).resolve().parts for folder in folders]
    length = 1
    while len({path[-length:] for path in paths}) < len(paths):
        length += 1
    return ["/".join(path[-length:]) for path in paths]


def references_of(runs: dict[str, Files]) -> list[dict[str, Any]]:
    """Each reference once, with the runs that were held against it."""
    references: dict[str, dict[str, Any]] = {}
    for label, files in runs.items():
        reference = files.record["reference"] or {}
        sha256 = str(reference.get("sha256") or "not recorded")
        entry = references.setdefault(sha256, {"path": reference.get("path") or ABSENT, "sha256": sha256, "runs": []})
        entry["runs"].append(label)
    return list(references.values())


def differences_of(runs: Sequence[Files]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) of the recipe's keys that are not the same in all."""
    recipes = [by_dotted_key(files.recipe) for files in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in NAMES_NO_RUN)
    rows = [(key, [as_written(recipe[key]) if key in recipe else ABSENT for recipe in recipes]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
