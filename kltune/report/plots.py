"""Curves as SVG that reads on white and on black, the same bytes for the same numbers."""

import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:      # matplotlib is imported where a picture is drawn: a run that draws none should not wait for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

# each at least 3.4:1 against white and against #1d2026
COLOURS = ("#3b7dd8", "#2f8f5b", "#8f5bc2", "#c2571a", "#1c8b9c", "#c9477f", "#8a7a1e", "#77808c")
MORE_COLOURS = (*COLOURS, "#c9418c", "#1a8a99", "#85801f", "#a86a4c")      # as those, 3:1 on white and on #14161a
MARKERS = "os^DvPX*"      # so that a curve is known without its colour
INK = "#808080"        # mid-grey: stands in for the page's own text colour, see svg_of
ALONE = "#767676"      # text of a picture in no page of ours: 4.5:1 on white and on black
AROUND = ((7, -8), (7, 8), (-7, 8), (-7, -8), (10, 0), (-10, 0), (0, 12), (0, -12))      # places for a label, in points
NAME_WIDTH = 50        # characters of a curve's name in a line of the legend
TARGET, CAP = "#c27a00", "#c0392b"
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
FEW_POINTS = 25        # below this each point is marked, so that one alone is seen
COLUMNS = 400          # stretches of a long series, each drawn by its extremes; a picture is some 700 pixels wide
MOST_POINTS = 4 * COLUMNS + 2      # of a curve
DECADES = 30.0         # largest ÷ smallest from which a log axis shows more than a linear one
LEAST_SPAN = 0.04      # of the values themselves, that an axis shows: what moves less has not moved
LEGEND_WIDTH = 60      # characters
Z95 = 1.96
Series = Sequence[tuple[float, float, float | None]]      # step, value, its standard error or None


@dataclass(frozen=True)
class CurvePoint:
    """A point of a curve. x_error, y_error: 1.96 standard errors, half an error bar. label: written beside it.

    picked: what a ring around it is called; "" for none.
    """

    x: float
    y: float
    x_error: float = 0.0
    y_error: float = 0.0
    label: str = ""
    picked: str = ""


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
    inside: in a page, whose colour its text takes, and narrow, so that its letters come out large on a phone. budget:
    an x to draw a line at.
    """

    x: str
    y: str
    title: str
    name: str = "curve"
    root: bool = False
    inside: bool = False
    budget: float | None = None


@contextmanager
def names_as_they_are() -> Iterator[None]:
    """Within: what is written in a picture is no mathematics, whatever dollars a name has. Also a decorator."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        yield


def shown_in_legend(name: str) -> str:
    """A name that matplotlib puts in the legend: one that begins with _ it leaves out."""
    return f" {name}" if name.startswith("_") else name


@names_as_they_are()
def curve_svg(curves: Sequence[Curve], frame: Frame) -> str:
    """Curves with error bars in one picture: an ``<svg>`` element that can stand alone."""
    names = [shown_in_legend(textwrap.fill(curve.name, NAME_WIDTH)) for curve in curves]
    lines = len(names) + sum(name.count("\n") for name in names)
    figure, axes = make_axes(4.7, 3.2 + 0.19 * lines) if frame.inside else make_axes(6.4, 4.0 + 0.1 * lines)
    if frame.budget is not None:
        axes.axvline(frame.budget, color=TARGET, linewidth=1.6, label=f"budget {frame.budget:g} nats")
    for curve, name in zip(curves, names, strict=True):
        points = curve.points
        if not curve.marked:
            axes.plot([p.x for p in points], [p.y for p in points], color=INK, linestyle="--", label=name)
            continue
        colour = MORE_COLOURS[curve.style % len(MORE_COLOURS)]
        axes.errorbar(
            [p.x for p in points], [p.y for p in points], xerr=[p.x_error for p in points],
            yerr=[p.y_error for p in points], color=colour, marker=MARKERS[curve.style % len(MARKERS)], markersize=4.5,
            linewidth=1.6, elinewidth=1, capsize=2, linestyle="-" if curve.joined else "none", label=name,
        )
        for point in points:
            if point.picked:
                axes.plot([point.x], [point.y], color=INK, marker="o", markersize=13, markerfacecolor="none",
                          markeredgewidth=1.8, linestyle="none", label=point.picked, zorder=5)
    if frame.root:
        space_by_roots(axes)
    style_axes(axes, f"{frame.x}\n(the axis is spaced by square roots)" if frame.root else frame.x, frame.y, size=10)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        columns = 1 if frame.inside else 2
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK, fontsize=8.5)
    place_labels(axes, curves)
    svg = svg_of(figure, frame.name, frame.title)
    return svg if frame.inside else svg.replace("currentColor", ALONE)


def place_labels(axes: "Axes", curves: Sequence[Curve]) -> "list[Annotation]":
    """Write the points' labels where no point, line, error bar or other label stands; leave out what finds no place.

    Those of picked points come first, then those of the first and last points of curves.
    """
    import numpy as np

    figure, to_pixels = axes.figure, axes.transData.transform
    figure.draw_without_rendering()      # lays the picture out, so that places in it are known
    marks = [to_pixels([(point.x, point.y) for point in curve.points]) for curve in curves]
    drawn = [np.linspace(a, b, 25) for curve, at in zip(curves, marks, strict=True) if curve.joined
             for a, b in pairwise(at)]
    for curve in curves:
        for p in curve.points:
            drawn += [np.linspace(*to_pixels([(p.x - p.x_error, p.y), (p.x + p.x_error, p.y)]), 15),
                      np.linspace(*to_pixels([(p.x, p.y - p.y_error), (p.x, p.y + p.y_error)]), 15)]
    taken = np.concatenate([*marks, *drawn])
    order = sorted(
        (not point.picked, 0 < index < len(curve.points) - 1, index, number, point)
        for number, curve in enumerate(curves) for index, point in enumerate(curve.points) if point.label
    )
    written: list[Annotation] = []
    for *_, point in order:
        for x, y in AROUND:
            text = axes.annotate(point.label, (point.x, point.y), (x, y), textcoords="offset points", color=INK,
                                 fontsize=8, ha=("center", "left", "right")[int(np.sign(x))], va="center")
            text.set_in_layout(False)
            box = text.get_window_extent().padded(1.0)
            crossed = ((box.min <= taken) & (taken <= box.max)).all(axis=1).any()
            inside = all(axes.bbox.padded(4.0).contains(*corner) for corner in (box.min, box.max))
            if inside and not crossed and not any(box.overlaps(other.get_window_extent()) for other in written):
                written.append(text)
                break
            text.remove()
    return written


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
    series = thinned(series)
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


def thinned(series: Series) -> Series:
    """A series of no more points than a picture can show apart, in its order: the first, the last, and all extremes.

    Of each of ``COLUMNS`` equal stretches the largest and the smallest value stay, with the ends of their intervals.
    """
    if len(series) <= MOST_POINTS:
        return series
    kept = {0, len(series) - 1}
    for column in range(COLUMNS):
        stretch = range(column * len(series) // COLUMNS, (column + 1) * len(series) // COLUMNS)
        for sign in (-1.0, 1.0):
            kept.add(max(stretch, key=lambda at, sign=sign: sign * series[at][1]))
            kept.add(max(stretch, key=lambda at, sign=sign: sign * series[at][1] + Z95 * (series[at][2] or 0.0)))
    return [series[at] for at in sorted(kept)]


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
        for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
            patch.set_facecolor("none")
        buffer = io.StringIO()
        # Not savefig, which draws everything twice to lay it out: drawing once does that as well.
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg"):].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The page sets the width; the viewBox keeps the proportions.
    svg = re.sub(r'^<svg[^>]*(viewBox="[^"]*")[^>]*>', rf'<svg {NAMESPACES} \1 role="img" aria-label="{title}">', svg)
    return re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\1{name}-", svg).strip()
