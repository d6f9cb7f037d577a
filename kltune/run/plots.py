"""The curves of a run as SVG that reads on white and on black, the same bytes for the same numbers."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:      # matplotlib is imported where a picture is drawn: a run that draws none should not wait for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#808080"        # mid-grey: stands in for the page's own text colour, see svg_of
COLOURS = ("#3b7dd8", "#c2571a", "#2f8f5b", "#8f5bc2")      # each at least 3:1 against white and against #14161a
TARGET = "#c27a00"
TOLERANCE = 0.15       # how far from its target a KL still counts as on it
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
FEW_POINTS = 40        # below this each point is marked, so that one alone is seen


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
    error: str | None = None      # name of the standard error of the first curve


def plots_for(limits: Limits) -> tuple[Plot, ...]:
    """The pictures of a report, most asked for first; those without a number are left out by `draw`."""
    per_response = limits.unit == "nats_per_response"
    return (
        Plot("KL to the reference", limits.unit.replace("_per_", " per "), (f"kl/ref_{limits.unit}",),
             error="kl/ref_stderr" if per_response else None),
        Plot("Score", "score", ("score/mean", "eval/score*", "eval/gold*")),
        Plot("Loss", "loss", ("loss/*", "*/loss", "eval/loss")),
        Plot("Held-out perplexity", "perplexity", ("eval/perplexity", "*/perplexity")),
        Plot("Accuracy", "share of pairs", ("accuracy/*", "*/accuracy")),
        Plot("Price of one nat (beta)", "score per nat", ("kl/beta",), log=True),
        Plot("KL of one update", "nats per response", ("kl/step_nats_per_response",)),
    )


def draw(plot: Plot, rows: Sequence[dict[str, Any]], limits: Limits) -> "Figure | None":
    """One picture from the rows of metrics.jsonl; None if nothing of it was measured."""
    from matplotlib.figure import Figure

    names = sorted({name for row in rows for name in row})
    matching = [name for pattern in plot.patterns for name in names if fnmatch(name, pattern)]
    curves = {name: series for name in dict.fromkeys(matching) if (series := _measured(rows, name))}
    if not curves:
        return None
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, (steps, values)) in zip(COLOURS, curves.items(), strict=False):
        mark = "o" if len(values) <= FEW_POINTS else None
        axes.plot(steps, values, color=colour, marker=mark, markersize=3, linewidth=1.6, label=name)
    if plot.error is not None:
        _draw_error(axes, rows, next(iter(curves)), plot.error)
    if plot.patterns[0].startswith("kl/ref_"):
        _draw_limits(axes, limits)
    elif plot.patterns[0] == "kl/step_nats_per_response" and limits.max_step_kl is not None:
        axes.axhline(limits.max_step_kl, color=TARGET, linestyle="--", linewidth=1.2, label="largest allowed")
    if plot.log and all(value > 0 for _, values in curves.values() for value in values):
        axes.set_yscale("log")
    _dress(axes, plot, single=len(axes.get_legend_handles_labels()[1]) == 1)
    return figure


def _measured(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]] | None:
    points = [(row["step"], row[name]) for row in rows if _is_number(row.get(name)) and _is_number(row.get("step"))]
    return ([step for step, _ in points], [value for _, value in points]) if points else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _draw_error(axes: "Axes", rows: Sequence[dict[str, Any]], name: str, error: str) -> None:
    both = [row for row in rows if _is_number(row.get(name)) and _is_number(row.get(error))]
    low, high = ([row[name] + sign * 1.96 * row[error] for row in both] for sign in (-1, 1))
    if both:
        axes.fill_between([row["step"] for row in both], low, high, color=COLOURS[0], alpha=0.25, linewidth=0,
                          label="95 % of this batch")


def _draw_limits(axes: "Axes", limits: Limits) -> None:
    if limits.target is not None:
        low, high = ((1 + sign * TOLERANCE) * limits.target for sign in (-1, 1))
        axes.axhspan(low, high, color=TARGET, alpha=0.14, linewidth=0, label=f"target ± {TOLERANCE:.0%}")
        axes.axhline(limits.target, color=TARGET, linestyle="--", linewidth=1.2)
    if limits.hard_cap is not None:
        axes.axhline(limits.hard_cap, color="#c0392b", linewidth=1.4, label="hard cap")


def _dress(axes: "Axes", plot: Plot, *, single: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(plot.unit, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors=INK, which="both")
    axes.grid(True, color=INK, alpha=0.2, linewidth=0.6)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.spines[["top", "right"]].set_visible(False)
    if not single:
        axes.figure.legend(loc="outside upper left", ncols=4, frameon=False, labelcolor=INK, fontsize=8.5)


def svg_of(figure: "Figure", name: str) -> str:
    """A figure as an ``<svg>`` element to stand inside a page.

    Text stays text; the mid-grey becomes ``currentColor``, so that it follows the page's light or dark; ids are made
    unique by ``name``, because several pictures share one page.
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
    svg = re.sub(r'^<svg[^>]*(viewBox="[^"]*")[^>]*>', rf'<svg {NAMESPACES} \1 role="img" aria-label="{name}">', svg)
    return re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\1{name}-", svg).strip()
