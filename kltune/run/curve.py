"""Reward against KL as a picture: the shares of one adapter, and runs that were trained for a KL each."""

from collections.abc import Sequence
from dataclasses import dataclass

from kltune.run.plots import COLOURS, INK, svg_of


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
    """Points under one name; joined by a line, or standing alone."""

    name: str
    points: Sequence[CurvePoint]
    joined: bool = True


def curve_svg(curves: Sequence[Curve], *, x: str, y: str, title: str) -> str:
    """Curves with error bars in one picture.

    Args:
        curves: at most as many as there are colours.
        x: what the x axis shows, with its unit.
        y: the same of the y axis.
        title: read aloud in the picture's place.

    Returns:
        An ``<svg>`` element that can stand alone.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for colour, curve in zip(COLOURS, curves, strict=False):
        points = curve.points
        axes.errorbar(
            [p.x for p in points], [p.y for p in points], xerr=[p.x_error for p in points],
            yerr=[p.y_error for p in points], color=colour, marker="o", markersize=4, linewidth=1.6, elinewidth=1,
            capsize=2, linestyle="-" if curve.joined else "none", label=curve.name,
        )
        for point in points:
            offset = (5, -11) if curve.joined else (5, 5)
            axes.annotate(point.label, (point.x, point.y), offset, textcoords="offset points", color=colour, fontsize=8)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(colors=INK)
    axes.grid(True, color=INK, alpha=0.2, linewidth=0.6)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=INK, fontsize=8.5)
    # It may stand alone, in a page that knows nothing of it: the ink stays mid-grey, to be read on white and on black.
    return svg_of(figure, "curve", title).replace("currentColor", INK)
