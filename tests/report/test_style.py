"""What a page looks like, as far as numbers can say: contrast in light and dark, and labels that hide nothing."""

import re
from importlib.resources import files

import pytest

from kltune.report.plots import ALONE, Curve, CurvePoint, Frame, curve_svg, make_axes, place_labels

STYLE = files("kltune.report").joinpath("templates", "style.css.j2").read_text(encoding="utf-8")
READABLE = 4.5      # WCAG 2 AA, of text


def schemes() -> dict[str, dict[str, str]]:
    """The variables of the style by colour scheme; dark changes some of those of light."""
    light, dark = ((dict(re.findall(r"--([\w-]+): ([^;]+);", block)))
                   for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL))
    return {"light": light, "dark": light | dark}


def channels(colour: str) -> tuple[float, ...]:
    """#rrggbb as three numbers up to 255."""
    return tuple(int(colour[start : start + 2], 16) for start in (1, 3, 5))


def luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance as WCAG 2 defines it."""
    linear = [c / 12.92 if (c := channel / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for channel in colour]
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """From 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_as_wcag_gives_it():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21.0)
    assert contrast(channels("#777777"), (255, 255, 255)) == pytest.approx(4.478, abs=1e-3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(scheme):
    colours = schemes()[scheme]
    grounds = {name: channels(colours[name]) for name in ("ground", "panel")}
    for level in range(1, 6):      # the shades of tokens
        share = float(colours[f"k{level}"])
        heat = [float(channel) for channel in colours["heat"].split()]
        grounds[f"k{level}"] = tuple(share * h + (1 - share) * g for h, g in zip(heat, grounds["ground"], strict=True))
    found = {
        (text, ground): round(contrast(channels(colours[text]), grounds[ground]), 2)
        for ground in grounds for text in (("text",) if ground[0] == "k" else ("text", "quiet", "good", "bad", "plain"))
    }
    assert {pair: ratio for pair, ratio in found.items() if ratio < READABLE} == {}


def test_text_of_a_picture_is_that_of_its_page_or_can_be_read_on_white_and_black():
    curves = [Curve("a", [CurvePoint(1.0, 1.0, label="1"), CurvePoint(2.0, 2.0, label="2")])]
    inside, alone = (curve_svg(curves, Frame("x", "y", "title", inside=inside)) for inside in (True, False))
    for svg, colour in ((inside, "currentColor"), (alone, ALONE)):
        texts = re.findall(r"<text[^>]*>", svg)
        assert len(texts) > 5
        assert all(f"fill: {colour}" in text for text in texts)
    assert min(contrast(channels(ALONE), ground) for ground in ((0, 0, 0), (255, 255, 255))) >= READABLE


def test_labels_hide_neither_each_other_nor_a_point_and_the_picked_ones_comes_first():
    curves = [
        Curve("close", [CurvePoint(x / 40, x / 40, 0.02, 0.1, str(x)) for x in range(30)]),
        Curve("apart", [CurvePoint(0.2, 0.8, label="far"), CurvePoint(0.375, 0.46, label="near", picked="pick")],
              joined=False),
    ]
    _, axes = make_axes()
    for curve in curves:
        axes.plot([p.x for p in curve.points], [p.y for p in curve.points])
    written = place_labels(axes, curves)
    boxes = [text.get_window_extent() for text in written]
    assert {"near", "far", "0"} <= {text.get_text() for text in written}
    assert len(written) < 32
    assert not any(one.overlaps(other) for index, one in enumerate(boxes) for other in boxes[:index])
    places = axes.transData.transform([(p.x, p.y) for curve in curves for p in curve.points])
    assert not any(box.contains(*place) for box in boxes for place in places)


def test_headings_break_between_words_alone_and_a_table_too_wide_shows_that_it_goes_on():
    assert re.search(r"\nth \{[^}]*overflow-wrap: normal", STYLE)
    scroll = re.search(r"\.scroll \{([^}]*)\}", STYLE)[1]
    assert "overflow-x: auto" in scroll
    assert scroll.count("var(--shadow)") == 2


def test_names_of_curves_are_no_mathematics_and_none_is_left_out():
    curves = [Curve(name, [CurvePoint(x, x, label="$1") for x in (0.5, 1.0)]) for name in ("a$\\frac$", "_b$x_1$")]
    svg = curve_svg(curves, Frame("x$_$", "y", "title", root=True))
    texts = [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]
    assert {"a$\\frac$", "_b$x_1$", "$1"} <= set(texts)
