"""Reward against KL as a picture: the shares of one adapter, and runs that were trained for a KL each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kltune.run.plots import COLOURS, INK, svg_of

MORE_COLOURS = (*COLOURS, "#c9418c", "#1a8a99", "#85801f", "#a86a4c")      # as those, 3:1 on white and on #14161a
MARKERS = "os^DvPX*"      # so that a curve is known without its colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class CurvePoint:
    """x, y and what half an error bar is in either direction (1.96 standard errors). label: written beside it."""

    x: float
    y: float
    x_error: float = 0.0
    y_error: float = 0.0
    label: str = ""


@dataclass(frozen=True)
class Curve:
    """Points under one name; joined by a line, or standing alone.

    place: of its colour and mark, which repeat after eight. marked: without it a bare dashed line in grey.
    """

    name: str
    points: Sequence[CurvePoint]
    place: int = 0
    joined: bool = True
    marked: bool = True


@dataclass(frozen=True)
class Frame:
    """What stands around curves.

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
    """Curves with error bars in one picture.

    Returns:
        An ``<svg>`` element that can stand alone.
    """
    from matplotlib.figure import Figure

    size = (4.7, 3.0 + 0.19 * len(curves)) if frame.narrow else (6.4, 4.0)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        points = curve.points
        if not curve.marked:
            axes.plot([p.x for p in points], [p.y for p in points], color=INK, linestyle="--", label=curve.name)
            continue
        colour = MORE_COLOURS[curve.place % len(MORE_COLOURS)]
        axes.errorbar(
            [p.x for p in points], [p.y for p in points], xerr=[p.x_error for p in points],
            yerr=[p.y_error for p in points], color=colour, marker=MARKERS[curve.place % len(MARKERS)], markersize=4.5,
            linewidth=1.6, elinewidth=1, capsize=2, linestyle="-" if curve.joined else "none", label=curve.name,
        )
        for point in points:
            offset = (5, -11) if curve.joined else (5, 5)
            axes.annotate(point.label, (point.x, point.y), offset, textcoords="offset points", color=colour, fontsize=8)
    if frame.root:
        space_by_roots(axes)
    axes.set_xlabel(frame.x, color=INK)
    axes.set_ylabel(frame.y, color=INK)
    axes.tick_params(colors=INK)
    axes.grid(True, color=INK, alpha=0.2, linewidth=0.6)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        columns = 1 if frame.narrow else 2
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK, fontsize=8.5)
    # It may stand alone, in a page that knows nothing of it: the ink stays mid-grey, to be read on white and on black.
    return svg_of(figure, frame.name, frame.title).replace("currentColor", INK)


def space_by_roots(axes: "Axes") -> None:
    """An x axis from 0 on which √x is evenly spaced, its ticks at round numbers."""
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
