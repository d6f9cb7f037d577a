"""What people read: whether a stream takes colour, and numbers with their errors, as intervals and as times."""

import math
import os
from collections.abc import Sequence
from typing import Any, TextIO

from kltune.recipe.faults import redact, visible

ABSENT = "–"


class ShownText:
    """A stream on which all that is printed is first made ``visible`` and free of secrets: messages, tracebacks, all.

    behind: the stream itself, for what draws with control characters of its own.
    """

    def __init__(self, behind: TextIO):
        self.behind = behind

    def write(self, text: str) -> int:
        """Write what may be shown of a text."""
        self.behind.write(visible(redact(text)))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.behind, name)


def undressed(stream: TextIO) -> TextIO:
    """The stream behind a ``ShownText``; any other is its own."""
    return stream.behind if isinstance(stream, ShownText) else stream


def wants_colour(stream: TextIO) -> bool:
    """Whether colour and moving lines may go there: a terminal, and nothing in the environment asks for plain text."""
    plain = any(os.environ.get(name) for name in ("NO_COLOR", "CI")) or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def is_number(value: object) -> bool:
    """A finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> str:
    """Three or four digits that count; a dash where nothing was measured."""
    if not is_number(value):
        return ABSENT
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return _minus(text)


def with_error(value: Any, error: Any) -> str:
    """A number and its standard error, both to the error's first digit, or its second if that first one is 1 or 2.

    The number alone where it has no error.
    """
    if not is_number(value) or not is_number(error):
        return number(value)
    if error <= 0.0:
        return f"{number(value)} ± 0"
    magnitude = math.floor(math.log10(error))
    places = min(max((error < 2.95 * 10.0**magnitude) - magnitude, 0), 6)
    return _minus(f"{value:,.{places}f} ± {error:.{places}f}")


def interval(bounds: Sequence[float | None] | None) -> str:
    """``5.71 to 6.15``; a dash where there is no interval, "any" where it has no end."""
    if bounds is None or bounds[0] is None:
        return ABSENT
    return " to ".join("any" if bound is None else number(bound) for bound in bounds)


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _minus(text: str) -> str:
    """A sign as wide as a plus; an exponent keeps its hyphen."""
    return f"−{text[1:]}" if text.startswith("-") else text
