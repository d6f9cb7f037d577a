"""The curves of a run as SVG that reads on white and on black, the same bytes for the same numbers."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from kltune.run.storage import visible

if TYPE_CHECKING:      # matplotlib is imported where a picture is drawn: a run that draws none should not wait for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#808080"        # mid-grey: stands in for the page's own text colour, see svg_of
COLOURS = ("#3b7dd8", "#2f8f5b", "#8f5bc2", "#c2571a")      # each at least 3:1 against white and against #14161a
TARGET = "#c27a00"
TOLERANCE = 0.15       # how far from its target a KL still counts as on it
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
FEW_POINTS = 40        # below this each point is marked, so that one alone is seen


CURVE_NAMES = {
    "kl/ref_nats_per_response": "training", "kl/ref_nats_per_token": "training", "score/mean": "training",
    "eval/kl_ref_nats_per_response": "evaluation", "eval/kl_ref_nats_per_token": "evaluation",
    "eval/score_mean": "evaluation", "eval/gold_mean": "gold", "trpo/predicted_gain": "predicted",
    "trpo/gain": "measured", "kl/step_nats_per_response": "measured",
    "trpo/radius_nats_per_response": "allowed in this step", "trpo/line_search_tries": "tries",
    "trpo/accepted": "accepted", "trpo/last_gain_on_new_responses": "of the step before, on new responses",
    "loss/mean": "training", "eval/loss": "held out",
    "kl/cap_rollbacks": "gone back", "kl/cap_refusals": "steps cut short",
    "accuracy/mean": "training", "eval/accuracy": "held out", "pairs/margin_nats": "training",
    "eval/margin_nats": "held out", "pairs/chosen_log_ratio_nats": "chosen",
    "pairs/rejected_log_ratio_nats": "rejected",
}
STANDARD_ERRORS = {
    "kl/ref_nats_per_response": "kl/ref_stderr", "eval/kl_ref_nats_per_response": "eval/kl_ref_stderr",
    "eval/score_mean": "eval/score_stderr", "eval/gold_mean": "eval/gold_stderr",
    "eval/margin_nats": "eval/margin_stderr",
}


@dataclass(frozen=True)
class Limits:
    """What the KL is held against, in ``unit``; None where the recipe sets nothing."""

    unit: str = "nats_per_response"
    target: float | None = None
    hard_cap: float | None = None
    max_step_kl: float | None = None


@dataclass(frozen=True)
class Plot:
    """One picture: its title, the unit of its y axis, and patterns for the names of its curves."""

    title: str
    unit: str
    patterns: tuple[str, ...]
    log: bool = False
    limited: str = ""      # which limits belong in it: "ref" for target and hard cap, "step" for the largest step


def plots_for(limits: Limits) -> tuple[Plot, ...]:
    """The pictures of a report, most asked for first; those without a number are left out by `draw`."""
    names = (f"kl/ref_{limits.unit}", f"eval/kl_ref_{limits.unit}")
    return (
        Plot("KL to the reference", limits.unit.replace("_per_", " per "), names, limited="ref"),
        Plot("Score", "score", ("score/mean", "eval/score_mean", "eval/gold_mean")),
        Plot("Loss", "loss", ("loss/mean", "eval/loss*")),
        Plot("Held-out perplexity", "perplexity", ("eval/perplexity",)),
        Plot("Accuracy", "share of pairs", ("accuracy/mean", "*/accuracy")),
        Plot("Margin of the pairs", "nats", ("pairs/margin_nats", "eval/margin_nats")),
        Plot("Log-ratio to the reference", "nats per response", ("pairs/*_log_ratio_nats",)),
        Plot("Beta of the preference loss", "reward per nat", ("dpo/beta",)),
        Plot("KL to the moving reference of the loss", "nats per response", ("kl/loss_ref_nats_per_response",)),
        Plot("Price of one nat (beta)", "score per nat", ("kl/beta",), log=True),
        Plot("KL of one update", "nats per response", ("kl/step_nats_per_response", "trpo/radius*"), limited="step"),
        Plot("Gain of the surrogate", "score", ("trpo/predicted_gain", "trpo/gain", "trpo/last_gain*")),
        Plot("Damping", "× mean curvature", ("trpo/damping",), log=True),
        Plot("Residual of conjugate gradients", "share of the gradient", ("trpo/cg_residual",), log=True),
        Plot("Tries of the line search", "number", ("trpo/line_search_tries", "trpo/accepted")),
        Plot("Cap", "times so far", ("kl/cap_rollbacks", "kl/cap_refusals")),
    )


def draw(plot: Plot, rows: Sequence[dict[str, Any]], limits: Limits) -> "Figure | None":
    """One picture from the rows of metrics.jsonl; None if nothing of it was measured."""
    from matplotlib.figure import Figure

    names = sorted({name for row in rows for name in row})
    matching = [name for pattern in plot.patterns for name in names if fnmatch(name, pattern)]
    curves = {name: series for name in dict.fromkeys(matching) if (series := _measured(rows, name))}
    if not curves:
        return None
    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, (steps, values)) in zip(COLOURS, curves.items(), strict=False):
        mark = "o" if len(values) <= FEW_POINTS else None
        label = CURVE_NAMES.get(name, visible(name)) if len(curves) > 1 else "measured"
        axes.plot(steps, values, color=colour, marker=mark, markersize=3, linewidth=1.6, label=label)
        _draw_error(axes, rows, name, colour)
    if plot.limited == "ref":
        _draw_limits(axes, limits)
    elif plot.limited == "step" and limits.max_step_kl is not None:
        axes.axhline(limits.max_step_kl, color=TARGET, linestyle="--", linewidth=1.2, label="largest allowed")
    if plot.log and all(value > 0 for _, values in curves.values() for value in values):
        _set_log(axes)
    _dress(axes, plot, last_step=rows[-1]["step"], single=len(axes.get_legend_handles_labels()[1]) == 1)
    return figure


def _measured(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]] | None:
    points = [(row["step"], row[name]) for row in rows if _is_number(row.get(name)) and _is_number(row.get("step"))]
    return ([step for step, _ in points], [value for _, value in points]) if points else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _draw_error(axes: "Axes", rows: Sequence[dict[str, Any]], name: str, colour: str) -> None:
    """±1.96 standard errors, where they were measured too: bars on a few points, a band along many."""
    error = STANDARD_ERRORS.get(name, "")
    both = [row for row in rows if _is_number(row.get(name)) and _is_number(row.get(error))]
    steps, values = [row["step"] for row in both], [row[name] for row in both]
    widths = [1.96 * row[error] for row in both]
    if 0 < len(both) <= FEW_POINTS:
        axes.errorbar(steps, values, yerr=widths, fmt="none", ecolor=colour, elinewidth=1, capsize=2)
    elif both:
        low, high = ([y + sign * w for y, w in zip(values, widths, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0, label="95 %")


def _draw_limits(axes: "Axes", limits: Limits) -> None:
    if limits.target is not None:
        low, high = ((1 + sign * TOLERANCE) * limits.target for sign in (-1, 1))
        axes.axhspan(low, high, color=TARGET, alpha=0.18, linewidth=0, label=f"target ± {100 * TOLERANCE:.0f} %")
        axes.axhline(limits.target, color=TARGET, linestyle="--", linewidth=1.2)
    if limits.hard_cap is not None:
        axes.axhline(limits.hard_cap, color="#c0392b", linewidth=1.4, label="hard cap")


def _set_log(axes: "Axes") -> None:
    """A log axis whose ticks read 0.02, not 2 × 10⁻²."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _dress(axes: "Axes", plot: Plot, *, last_step: int, single: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, 1.02 * max(1, last_step))
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(plot.unit, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors=INK, which="both")
    axes.grid(True, color=INK, alpha=0.2, linewidth=0.6)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.spines[["top", "right"]].set_visible(False)
    if not single:
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))      # two bands, one entry
        axes.figure.legend(
            unique.values(), unique.keys(), loc="outside upper left", ncols=5, frameon=False, labelcolor=INK,
            fontsize=8.5, columnspacing=1.2, handlelength=1.5,
        )


def svg_of(figure: "Figure", name: str, title: str) -> str:
    """A figure as an ``<svg>`` element to stand inside a page.

    Text stays text; the mid-grey becomes ``currentColor``, so that it follows the page's light or dark; ids are made
    unique by ``name``, because several pictures share one page; ``title`` is read aloud in the picture's place.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with matplotlib.rc_context({"svg.hashsalt": "kltune", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg"):].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The page sets the width; the viewBox keeps the proportions.
    svg = re.sub(r'^<svg[^>]*(viewBox="[^"]*")[^>]*>', rf'<svg {NAMESPACES} \1 role="img" aria-label="{title}">', svg)
    return re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\1{name}-", svg).strip()
