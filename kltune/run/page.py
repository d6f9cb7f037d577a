"""report.html: what a run did and whether it kept its budget, on one page that needs no network and no script."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kltune.run.outcome import (
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
from kltune.run.pictures import TOLERANCE, Plot, draw, plots_for
from kltune.run.plots import svg_of
from kltune.run.shading import LEVELS, loudest, spans
from kltune.run.storage import visible, write_whole
from kltune.run.words import date, duration, number, shortened, with_error

SIDE_BY_SIDE = 4          # pairs that stand open; the rest is folded
PER_STEP = 3              # responses shown of a step while it trained


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
        loader=PackageLoader("kltune", "run"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: visible(value) if type(value) is str else value,
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
