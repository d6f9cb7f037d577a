"""What people read: signs of life, whether a stream takes colour, and numbers, intervals and times as text."""

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from kltune.recipe.faults import redact, visible

SILENCE_SECONDS = 4.0       # that a user waits at most before a line says what is being done
FIRST_SECONDS = 1.5         # the same, from the start of a command
ABSENT = "–"
DIGITS = 4      # of the largest number in a column of equal places, at most; three places are always allowed


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


class _Now:
    """What this process does, how far it is, and since when it does that."""

    what, progress, since = "", "", -math.inf


def doing(what: str, progress: str = "") -> None:
    """Note what the process does from now on, and how far it is; said only where `signs_of_life` finds it long.

    Nothing is said of "".
    """
    if what != _Now.what:
        _Now.since = time.monotonic()
    _Now.what, _Now.progress = what, progress


def counted(what: str, total: int) -> Callable[[int], None]:
    """A function to call with the number of responses that are done, of so many: `doing` hears of each."""

    def progress(done: int) -> None:
        doing(what, f"{done} of {total} responses")

    progress(0)
    return progress


@contextmanager
def signs_of_life(
    say: Callable[[str], object], heard: Callable[[], float], silence: float = SILENCE_SECONDS
) -> Iterator[None]:
    """Within: where nothing was heard for so many seconds, what is being done is said, and for how long it has been.

    say: prints a line. heard: when something was last printed, by ``time.monotonic``.
    """
    _Now.what = ""
    doing("loading the libraries")
    over = threading.Event()

    def watch() -> None:
        limit = wait = min(silence, FIRST_SECONDS)
        while not over.wait(wait):
            now = time.monotonic()
            wait = heard() + limit - now
            if wait <= 0.0:
                progress = f": {_Now.progress}" if _Now.progress else ""
                if _Now.what:
                    say(f"{_Now.what}{progress}, {duration(round(now - _Now.since))} so far\n")
                limit = wait = silence

    thread = threading.Thread(target=watch, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def wants_colour(stream: TextIO) -> bool:
    """Whether colour and moving lines may go there: a terminal, and nothing in the environment asks for plain text."""
    plain = any(os.environ.get(name) for name in ("NO_COLOR", "CI")) or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def is_number(value: object) -> bool:
    """A finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, places: int | None = None) -> str:
    """Three or four digits that count, or so many places; a dash where nothing was measured."""
    if not is_number(value):
        return ABSENT
    if places is not None:
        return _minus(f"{value:,.{places}f}")
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return _minus(text)


def with_error(value: Any, error: Any, places: int | None = None) -> str:
    """A number and its standard error, both to the error's first digit, or its second if that first one is 1 or 2.

    The number alone where it has no error. places: of both, where a column asks for as many in each of its rows.
    """
    if not is_number(value) or not is_number(error):
        return number(value, places)
    if places is None:
        if error <= 0.0:
            return f"{number(value)} ± 0"
        places = _places(value, error)
    return _minus(f"{value:,.{places}f} ± {error:.{places}f}")


def _places(value: float, error: Any) -> int:
    """Places after the point that a number is worth by its error, or by `number` where it has none."""
    if not is_number(error) or error <= 0.0:
        return len(number(float(value)).partition("e")[0].partition(".")[2])
    magnitude = math.floor(math.log10(error))
    return min(max((error < 2.95 * 10.0**magnitude) - magnitude, 0), 6)


def common_places(pairs: Iterable[tuple[Any, Any]]) -> int:
    """Places after the point for a column of (number, error): what its most exact number needs, but no long numbers.

    Numbers without an error ask for none where others have one.
    """
    known = [(value, error) for value, error in pairs if is_number(value)]
    largest = max((abs(value) for value, _ in known), default=0.0)
    most = max(3, DIGITS - 1 - math.floor(math.log10(largest))) if largest > 0.0 else 3
    exact = [pair for pair in known if is_number(pair[1]) and pair[1] > 0.0] or known
    return min(most, max((_places(*pair) for pair in exact), default=0))


def interval(bounds: Sequence[float | None] | None, places: int | None = None) -> str:
    """``5.71 to 6.15``, both ends to as many places; a dash where there is no interval, "any" where it has no end."""
    if bounds is None or bounds[0] is None:
        return ABSENT
    places = common_places((bound, None) for bound in bounds) if places is None else places
    return " to ".join("any" if bound is None else number(bound, places) for bound in bounds)


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if isinstance(seconds, float) and seconds >= 10.0 else f"{seconds:.3g} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _minus(text: str) -> str:
    """A sign as wide as a plus; an exponent keeps its hyphen."""
    return f"−{text[1:]}" if text.startswith("-") else text
