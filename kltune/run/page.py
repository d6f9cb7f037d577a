"""report.html: what a run did and whether it kept its budget, on one page that needs no network and no script."""

import contextlib
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kltune.errors import CheckpointError
from kltune.run.manifest import read_json
from kltune.run.plots import TOLERANCE, Limits, draw, plots_for, svg_of
from kltune.run.storage import read_jsonl, visible, write_whole

FIRST_SAMPLES, LAST_SAMPLES = 4, 10
RECORDED = (
    "stage", "status", "seed", "reference", "versions", "started", "ended", "recipe_sha256", "command", "resumed_at",
    "error",
)
LONGEST_TEXT = 1500      # characters of a prompt or response on the page


@dataclass(frozen=True)
class Files:
    """What a run folder holds; empty where a file is not there yet."""

    folder: Path
    record: dict[str, Any]
    recipe_text: str
    recipe: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    result: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """The answer in one word, with its tone (good, bad or plain) and in sentences."""

    word: str
    tone: str
    sentences: str


def write_page(folder: Path) -> Path:
    """Write ``report.html`` into a run folder, from whatever the run has written so far.

    Raises:
        CheckpointError: the folder is no run's. StorageError: the page cannot be written.
    """
    files = read_files(Path(folder))
    environment = Environment(
        loader=PackageLoader("kltune", "run"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters |= {"number": number, "duration": duration, "text": shortened, "date": date}
    page = environment.get_template("page.html.j2").render(
        name=files.folder.resolve().name,
        stage=files.record["stage"] or "run",
        record=files.record,
        reference={"path": None, "sha256": None, **(files.record["reference"] or {})},
        verdict=verdict_of(files),
        facts=facts_of(files),
        pictures=pictures_of(files),
        samples=chosen_samples(files.samples),
        timings=timings_of(files.metrics),
        measured=measured_of(files.metrics),
        recipe_text=files.recipe_text,
        again=f"kltune {files.record['stage']} --recipe {shlex.quote(str(files.folder / 'recipe.yaml'))} "
        "--output runs/again",
    )
    path = files.folder / "report.html"
    write_whole(path, page)
    return path


def read_files(folder: Path) -> Files:
    """Everything the page is made from.

    Raises:
        CheckpointError: there is no run.json.
    """
    if not (folder / "run.json").exists():
        raise CheckpointError(f"{folder} is no kltune run: there is no run.json in it.")
    recipe_text = (folder / "recipe.yaml").read_text(encoding="utf-8") if (folder / "recipe.yaml").exists() else ""
    recipe: Any = {}
    with contextlib.suppress(yaml.YAMLError):      # a damaged recipe is still shown, as text
        recipe = yaml.safe_load(recipe_text)
    return Files(
        folder=folder,
        record={**dict.fromkeys(RECORDED), **read_json(folder / "run.json")},
        recipe_text=recipe_text,
        recipe=recipe if isinstance(recipe, dict) else {},
        metrics=read_jsonl(folder / "metrics.jsonl"),
        samples=read_jsonl(folder / "samples.jsonl"),
        result=read_json(folder / "result.json") if (folder / "result.json").exists() else {},
    )


def verdict_of(files: Files) -> Verdict:
    """Whether the run ended, and how far from its reference, in plain words."""
    status, total = files.record.get("status"), (files.recipe.get("run") or {}).get("steps")
    if status == "finished":
        return _final_verdict(files)
    done = files.metrics[-1].get("step", 0) if files.metrics else 0
    where = f"step {done:,} of {total:,}" if total else f"step {done:,}"
    reason = files.record.get("error") or "no reason recorded"
    word, tone, sentence = {
        "interrupted": ("interrupted", "plain", f"Stopped at {where}; --resume continues it."),
        "failed": ("failed", "bad", f"Failed at {where}: {reason}."),
    }.get(str(status), ("running", "plain", f"At {where} when this page was written; no final measurement yet."))
    return Verdict(word, tone, f"{sentence} {_so_far(files)}".strip())


def _so_far(files: Files) -> str:
    value, error = _newest_kl(files)
    if value is None:
        return ""
    spread = f" ± {number(error)}" if error is not None else ""
    return f"KL to the reference when last measured: {number(value)}{spread} nats per response."


def _newest_kl(files: Files) -> tuple[float | None, float | None]:
    """KL of the last batch, or of the last evaluation where batches have none; with its standard error."""
    for row in reversed(files.metrics):
        for name in ("kl/ref", "eval/kl_ref"):
            if row.get(f"{name}_nats_per_response") is not None:
                return row[f"{name}_nats_per_response"], row.get(f"{name}_stderr")
    return None, None


def _reward_verdict(files: Files) -> Verdict:
    accuracy, (low, high) = files.result.get("accuracy"), files.result.get("accuracy_ci95") or (None, None)
    if accuracy is None:
        return Verdict("not measured", "plain", "The run finished; no rows were held out to measure it on.")
    rows = files.result["held_out_rows"]
    word, tone = ("learnt", "good") if low > 0.5 else ("no better than chance", "bad")
    return Verdict(word, tone, (
        f"It is right on {100 * accuracy:.1f} % of {rows:,} held-out rows (95 % interval {100 * low:.1f} to "
        f"{100 * high:.1f} %), where chance is right on 50 %."
    ))


def _final_verdict(files: Files) -> Verdict:
    if files.record["stage"] == "reward":
        return _reward_verdict(files)
    kl, limits = files.result.get("kl") or {}, limits_of(files)
    value = kl.get(limits.unit)
    if value is None:
        return Verdict("KL not measured", "bad", "The run finished, but the KL of the final policy was not measured.")
    unit = limits.unit.replace("_per_", " per ")
    sentences = [f"The final policy is {number(value)} {unit} from its reference{_interval(kl, limits.unit)}."]
    word, tone = "measured", "plain"
    if limits.target:
        share = value / limits.target - 1
        side = "above" if share > 0 else "below"
        rest = "; the rest of the budget is not used" if files.result.get("target_unused") else ""
        sentences.append(f"That is {100 * abs(share):.0f} % {side} the target of {number(limits.target)}{rest}.")
        on_target = abs(share) <= TOLERANCE
        word = "on target" if on_target else f"{side} target"
        tone = "good" if on_target else "bad" if share > 0 else "plain"
    elif limits.hard_cap is None:
        sentences.append("The recipe sets no target and no cap.")
    if limits.hard_cap is not None:
        within = value <= limits.hard_cap
        sentences.append(f"It is {'within' if within else 'beyond'} the hard cap of {number(limits.hard_cap)}.")
        word, tone = (word, tone) if within else ("over the hard cap", "bad")
    return Verdict(word, tone, " ".join(sentences))


def _interval(kl: dict[str, Any], unit: str) -> str:
    low, high = kl.get("ci95") or (None, None)
    if low is None or high is None or unit != "nats_per_response":      # ci95 is per response
        return ""
    return f" (95 % interval {number(low)} to {number(high)})"


def limits_of(files: Files) -> Limits:
    """The target and the caps of the recipe, and the unit they are in."""
    kl, trpo = files.recipe.get("kl") or {}, files.recipe.get("trpo") or {}
    return Limits(
        unit=kl.get("unit", "nats_per_response"),
        target=kl.get("target") if kl.get("control", "target") == "target" else None,
        hard_cap=kl.get("hard_cap"),
        max_step_kl=trpo.get("max_step_kl"),
    )


def facts_of(files: Files) -> list[tuple[str, str]]:
    """The few numbers of the run that everybody asks for, each with its name."""
    kl, last = files.result.get("kl") or {}, files.metrics[-1] if files.metrics else {}
    score = files.result.get("score", last.get("score/mean"))
    seconds = files.result.get("seconds", sum(row.get("time/step_seconds") or 0 for row in files.metrics))
    value, error = kl.get("nats_per_response"), kl.get("stderr")
    if not files.result:
        value, error = _newest_kl(files)
    facts = {
        "KL, nats per response": f"{number(value)} ± {number(error)}" if error is not None else number(value),
        "KL target": number(limits_of(files).target),
        "score": number(score),
        "held-out accuracy": number(files.result.get("accuracy")),
        "calibration error": number((files.result.get("calibration") or {}).get("error")),
        "steps": number(files.result.get("steps", last.get("step"))),
        "time": duration(seconds) if seconds else "–",
    }
    return [(name, text) for name, text in facts.items() if text != "–"]


def pictures_of(files: Files) -> list[tuple[str, Markup]]:
    """Title and SVG of every curve that was measured."""
    limits = limits_of(files)
    drawn = [(plot.title, draw(plot, files.metrics, limits)) for plot in plots_for(limits)]
    return [
        (title, Markup(svg_of(figure, f"plot-{place}", title)))      # safe: matplotlib escapes the names of the curves
        for place, (title, figure) in enumerate(drawn) if figure is not None
    ]


def chosen_samples(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest samples first, and a few of the first step to compare them with."""
    steps = sorted({row.get("step", 0) for row in samples})
    newest = [row for row in samples if steps and row.get("step", 0) == steps[-1]][:LAST_SAMPLES]
    first = [row for row in samples if len(steps) > 1 and row.get("step", 0) == steps[0]][:FIRST_SAMPLES]
    return [*newest, *first]


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


def number(value: Any) -> str:
    """Three or four digits that count; a dash where nothing was measured."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def date(stamp: str | None) -> str:
    """``2026-11-22T15:00:00+00:00`` as 2026-11-22 15:00 UTC, which is how run.json keeps time."""
    return f"{stamp[:16].replace('T', ' ')} UTC" if stamp else "–"


def shortened(value: Any) -> str:
    """A prompt or response, its end cut off if it is very long."""
    text = str(value)
    rest = len(text) - LONGEST_TEXT
    return text if rest <= 0 else f"{text[:LONGEST_TEXT]} … ({rest:,} more characters in samples.jsonl)"
