"""Numbers, times and texts as the pages show them."""

import math
from typing import Any

LONGEST_TEXT = 1500      # characters of a prompt or response on the page


def number(value: Any) -> str:
    """Three or four digits that count; a dash where nothing was measured."""
    if not _is_number(value):
        return "–"
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return _minus(text)


def with_error(value: Any, error: Any) -> str:
    """A number and its standard error, both to the error's first digit, or its second if that first one is 1 or 2.

    The number alone where it has no error.
    """
    if not _is_number(value) or not _is_number(error):
        return number(value)
    if error <= 0.0:
        return f"{number(value)} ± 0"
    magnitude = math.floor(math.log10(error))
    places = min(max((error < 2.95 * 10.0**magnitude) - magnitude, 0), 6)
    return _minus(f"{value:,.{places}f} ± {error:.{places}f}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _minus(text: str) -> str:
    """A sign as wide as a plus; an exponent keeps its hyphen."""
    return f"−{text[1:]}" if text.startswith("-") else text


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
    text = str(value).lstrip(" ")      # a response goes on where its prompt ended
    rest = len(text) - LONGEST_TEXT
    return text if rest <= 0 else f"{text[:LONGEST_TEXT]} … ({rest:,} more characters in samples.jsonl)"
