"""Curves as SVG that reads on white and on black, the same bytes for the same numbers."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:      # matplotlib is imported where a picture is drawn: a run that draws none should not wait for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# each at least 3.4:1 against white and against #1d2026
COLOURS = ("#3b7dd8", "#2f8f5b", "#8f5bc2", "#c2571a", "#1c8b9c", "#c9477f", "#8a7a1e", "#77808c")
MORE_COLOURS = (*COLOURS, "#c9418c", "#1a8a99", "#85801f", "#a86a4c")      # as those, 3:1 on white and on #14161a
MARKERS = "os^DvPX*"      # so that a curve is known without its colour
INK = "#808080"        # mid-grey: stands in for the page's own text colour, see svg_of
TARGET, CAP = "#c27a00", "#c0392b"
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
FEW_POINTS = 25        # below this each point is marked, so that one alone is seen
DECADES = 30.0         # largest ÷ smallest from which a log axis shows more than a linear one
LEAST_SPAN = 0.04      # of the values themselves, that an axis shows: what moves less has not moved
LEGEND_WIDTH = 60      # characters
Z95 = 1.96
Series = Sequence[tuple[float, float, float | None]]      # step, value, its standard error or None


@dataclass(frozen=True)
class CurvePoint:
    """A point of a curve. x_error, y_error: 1.96 standard errors, half an error bar. label: written beside it."""

    x: float
    y: float
    x_error: float = 0.0
    y_error: float = 0.0
    label: str = ""


@dataclass(frozen=True)
class Curve:
    """Points under one name; joined by a line, or standing alone.

    style: number of its colour and mark. marked: without it a bare dashed line in grey.
    """

    name: str
    points: Sequence[CurvePoint]
    style: int = 0
    joined: bool = True
    marked: bool = True


@dataclass(frozen=True)
class Frame:
    """Axes, title and layout of a picture of curves.

    x, y: what the axes show, with its unit. title: read aloud in the picture's place. name: of the picture, where a
    page has several. root: space the x axis by square roots, on which a gain in proportion to √KL is a straight line.
    narrow: for the column of a page or a phone: smaller, so that its letters come out larger.
    """

    x: str
    y: str
    title: str
    name: str = "curve"
    root: bool = False
    narrow: bool = False


def curve_svg(curves: Sequence[Curve], frame: Frame) -> str:
    """Curves with error bars in one picture: an ``<svg>`` element that can stand alone."""
    figure, axes = make_axes(4.7, 3.0 + 0.19 * len(curves)) if frame.narrow else make_axes(6.4, 4.0)
    for curve in curves:
        points = curve.points
        if not curve.marked:
            axes.plot([p.x for p in points], [p.y for p in points], color=INK, linestyle="--", label=curve.name)
            continue
        colour = MORE_COLOURS[curve.style % len(MORE_COLOURS)]
        axes.errorbar(
            [p.x for p in points], [p.y for p in points], xerr=[p.x_error for p in points],
            yerr=[p.y_error for p in points], color=colour, marker=MARKERS[curve.style % len(MARKERS)], markersize=4.5,
            linewidth=1.6, elinewidth=1, capsize=2, linestyle="-" if curve.joined else "none", label=curve.name,
        )
        for point in points:
            offset = (5, -11) if curve.joined else (5, 5)
            axes.annotate(point.label, (point.x, point.y), offset, textcoords="offset points", color=colour, fontsize=8)
    if frame.root:
        space_by_roots(axes)
    style_axes(axes, frame.x, frame.y, size=10)
    if len(curves) > 1:
        columns = 1 if frame.narrow else 2
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK, fontsize=8.5)
    # It may stand alone, in a page that knows nothing of it: the ink stays mid-grey, to be read on white and on black.
    return svg_of(figure, frame.name, frame.title).replace("currentColor", INK)


def space_by_roots(axes: "Axes") -> None:
    """Make the x axis start at 0 and space √x evenly, its ticks at round numbers."""
    import numpy as np

    high = axes.get_xlim()[1]
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0.0)), np.square))
    axes.set_xlim(0.0, high)
    step = 10.0 ** np.floor(np.log10(high))
    ticks = [0.0]
    for tick in step * np.array([0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0]):
        if tick <= high and np.sqrt(tick) - np.sqrt(ticks[-1]) >= 0.1 * np.sqrt(high):
            ticks.append(tick)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def make_axes(width: float = 5.0, height: float = 3.1) -> "tuple[Figure, Axes]":
    """An empty picture, in inches; without a size, that in which pages show the curves of a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def style_axes(axes: "Axes", x: str, y: str, *, size: float) -> None:
    """Draw labels, ticks, grid and the two lines that bound the picture in mid-grey."""
    axes.set_xlabel(x, color=INK, fontsize=size)
    axes.set_ylabel(y, color=INK, fontsize=size)
    axes.tick_params(colors=INK, which="both", labelsize=size)
    axes.grid(True, color=INK, alpha=0.22, linewidth=0.6)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.spines[["top", "right"]].set_visible(False)


def draw_series(axes: "Axes", series: Series, colour: str, label: str, *, faint: bool = False) -> None:
    """Draw a line, marked where there are few points, with 95 % intervals: bars on few points, a band along many."""
    mark = "o" if len(series) <= FEW_POINTS else None
    steps, values, _ = zip(*series, strict=True)
    axes.plot(
        steps, values, color=colour, marker=mark, markersize=2.5 if faint else 3.5,
        linewidth=1.1 if faint else 1.8, alpha=0.75 if faint else 1.0, label=label,
    )
    known = [(step, value, Z95 * error) for step, value, error in series if error is not None]
    if not known:
        return
    steps, values, widths = zip(*known, strict=True)
    if len(known) <= FEW_POINTS and not faint:
        axes.errorbar(steps, values, yerr=widths, fmt="none", ecolor=colour, elinewidth=1.1, capsize=2)
    else:
        low, high = ([y + sign * w for y, w in zip(values, widths, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)


def draw_level(axes: "Axes", value: float, colour: str, label: str, style: str = "--") -> None:
    """Draw a number that does not change as a line across the picture."""
    axes.axhline(value, color=colour, linestyle=style, linewidth=1.2, label=label)


def set_log(axes: "Axes", values: Sequence[float]) -> None:
    """Make the y axis logarithmic where all values are above 0 and far apart; ticks read 0.02, not 2 × 10⁻²."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if not values or min(values) <= 0.0 or max(values) < DECADES * min(values):
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def finish_axes(axes: "Axes", *, unit: str, last_step: float) -> None:
    """Set the limits of both axes, draw them in grey, and put the legend above the picture, off its curves."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, 1.03 * max(1, last_step))
    low, high = axes.get_ylim()
    middle, span = (low + high) / 2.0, LEAST_SPAN * max(abs(low), abs(high))
    if high - low < span:
        axes.set_ylim(middle - span / 2.0, middle + span / 2.0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    style_axes(axes, "step", unit, size=11)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))      # two bands, one entry
    if len(unique) > 1:
        columns, order = legend_layout(list(unique))
        axes.figure.legend(
            [unique[label] for label in order], order, loc="outside upper left", ncols=columns, frameon=False,
            labelcolor=INK, fontsize=10, columnspacing=1.0, handlelength=1.4, handletextpad=0.5, borderaxespad=0.2,
        )


def legend_layout(labels: list[str]) -> tuple[int, list[str]]:
    """As many columns as fit, and the labels in the order that reads from left to right, though filled by columns."""
    for columns in range(len(labels), 1, -1):
        filled = [labels[first::columns] for first in range(columns)]
        if sum(max(map(len, column)) + 6 for column in filled) <= LEGEND_WIDTH:
            return columns, [label for column in filled for label in column]
    return 1, labels


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
