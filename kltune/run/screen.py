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
GB = 1e9        # bytes
LEAST_DIGITS, MOST_DIGITS = 3, 12     # that count: of a number alone, and those by which two numbers differ
OWN_DIGITS = 10         # of a number that a user wrote, without the noise of binary fractions
MOST_PLACES = 6         # of a number with an error; beyond these each has its own digits
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


def number(value: Any, places: int | None = None, digits: int = LEAST_DIGITS) -> str:
    """So many places, or so many digits that count, and all before the point; a dash where nothing was measured."""
    if not is_number(value):
        return ABSENT
    if places is not None:
        return _minus(f"{value:z,.{places}f}")
    if isinstance(value, int):
        return _minus(f"{value:,}")
    text = f"{value:z.{digits}g}"
    large = abs(float(text)) >= 1000.0
    return _minus(f"{value:,.{max(0, digits - 1 - _magnitude(value))}f}" if large else text)


def apart(*values: Any, places: int | None = None, digits: int = LEAST_DIGITS) -> list[str]:
    """Numbers as `number` writes them, in as many places or digits more as those need to differ that do."""
    wanted = len({f"{value:z.{MOST_DIGITS}g}" for value in values if is_number(value)})
    for more in range(MOST_DIGITS):
        texts = [number(value, None if places is None else places + more, digits + more) for value in values]
        if len(set(texts) - {ABSENT}) == wanted:
            return texts
    return [number(value, places, digits) for value in values]


def percent(share: float, places: int | None = None, digits: int = OWN_DIGITS) -> str:
    """A share in %, without the sign: all its digits, or so many; never 100 for less than all nor 0 for some."""
    return apart(100.0 * share, 0.0, 100.0, places=places, digits=digits)[0]


def with_error(value: Any, error: Any, places: int | None = None) -> str:
    """A number and its standard error, both to the error's first digit, or its second if that first one is 1 or 2.

    The number alone where it has no error; each to its own digits where the error is too small for places. places: of
    both, where a column asks for as many in each of its rows.
    """
    if not is_number(value) or not is_number(error):
        return number(value, places)
    own = MOST_PLACES + 1 if error <= 0.0 else _places(error)
    if error > 0.0 and (places is None or number(error, places) == number(0.0, places)):
        places = own if own <= MOST_PLACES else None
    return f"{number(value, places)} ± {number(error, places) if error > 0.0 or places is not None else 0}"


def _places(error: float) -> int:
    """Places after the point up to the first digit of an error, or its second if that first one is 1 or 2."""
    magnitude = _magnitude(error)
    return max((error < 2.95 * 10.0**magnitude) - magnitude, 0)


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def common_places(pairs: Iterable[tuple[Any, Any]]) -> int:
    """Places after the point for a column of (number, error): what its most exact number needs, but no long numbers.

    Numbers without an error ask for none where others have one.
    """
    known = [(value, error) for value, error in pairs if is_number(value)]
    largest = max((abs(value) for value, _ in known), default=0.0)
    most = max(3, DIGITS - 1 - _magnitude(largest)) if largest > 0.0 else 3
    errors = [error for _, error in known if is_number(error) and error > 0.0]
    wanted = map(_places, errors) if errors else (
        len(number(float(value)).partition("e")[0].partition(".")[2]) for value, _ in known
    )
    return min(most, MOST_PLACES, max(wanted, default=0))


def interval(bounds: Sequence[float | None] | None, places: int | None = None, against: Iterable[Any] = ()) -> str:
    """``5.71 to 6.15``, both ends to as many places, more where it is narrow; a dash where there is no interval.

    An end that it does not have is "any". against: numbers that the ends are held against, and told apart from.
    """
    if bounds is None or bounds[0] is None:
        return ABSENT
    if places is None:
        width = 0.0 if None in bounds else bounds[1] - bounds[0]
        places = max(common_places((bound, None) for bound in bounds), _places(width) if width > 0.0 else 0)
        places = places if places <= MOST_PLACES else None
    ends = apart(*bounds, *against, places=places)
    return " to ".join("any" if bound is None else end for bound, end in zip(bounds, ends, strict=False))


def out_of(step: int, total: int | None, between: str = " of ", form: str = "") -> str:
    """``" of 40"`` behind the number of a step; nothing where no such number is known, or a run went on beyond it."""
    return f"{between}{total:{form}}" if total and step <= total else ""


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if isinstance(seconds, float) and seconds >= 10.0 else f"{seconds:.3g} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _minus(text: str) -> str:
    """A sign as wide as a plus; an exponent keeps its hyphen."""
    return f"−{text[1:]}" if text.startswith("-") else text
