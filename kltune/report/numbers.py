"""Numbers, times, tokens and results of runs as pages show them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kltune.run.files import visible

Rows = list[list[str]]
LEVELS = (0.02, 0.1, 0.3, 1.0, 3.0)      # least nats of each shade
LOUD, NAMED = 0.1, 3                     # tokens of so many nats and more are named, so many of them
LONGEST_TEXT = 1500      # characters of a prompt or response on the page


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """KL, score and gold of a result.json, each with its standard error; None where not measured.

    reference_score and reference_gold are those of the reference's own responses to the same prompts.
    """
    kl, measured = result.get("kl") or {}, result.get("eval") or {}
    return {
        "kl": kl.get("nats_per_response"),
        "kl_stderr": kl.get("stderr"),
        "kl_ci95": kl.get("ci95"),
        "score": measured.get("eval/score_mean", result.get("score")),
        "score_stderr": measured.get("eval/score_stderr"),
        "reference_score": measured.get("eval/reference_score_mean"),
        "reference_score_stderr": measured.get("eval/reference_score_stderr"),
        "gold": measured.get("eval/gold_mean"),
        "gold_stderr": measured.get("eval/gold_stderr"),
        "reference_gold": measured.get("eval/reference_gold_mean"),
        "reference_gold_stderr": measured.get("eval/reference_gold_stderr"),
    }


def aligned(rows: Rows) -> Iterator[str]:
    """Columns under their headings."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (f"{visible(cell):<{width}}" for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def with_stderr(value: float | None, stderr: float | None) -> str:
    """A number ± its standard error; a dash where nothing was measured."""
    if value is None:
        return "–"
    return f"{value:.3g}" + ("" if stderr is None else f" ± {stderr:.2g}")


@dataclass(frozen=True)
class Span:
    """A piece of a response: its text, its shade (0 is none) and what is said when the pointer rests on it."""

    text: str
    level: int
    title: str


def spans(row: dict[str, Any]) -> list[Span]:
    """The response of a row of samples.jsonl; in one piece where its tokens were not measured."""
    pieces = _measured(row)
    if not pieces:
        return [Span(shortened(row.get("response", "")), 0, "")]
    found, length = [], 0
    for place, (text, nats) in enumerate(pieces):
        text = text if found else text.lstrip(" ")
        found.append(Span(text, sum(nats >= least for least in LEVELS), f"{number(nats)} nats"))
        length += len(text)
        if length > LONGEST_TEXT:
            rest = len(pieces) - place - 1
            return [*found, Span(f" … ({rest:,} more tokens in samples.jsonl)" if rest else "", 0, "")]
    return found


def loudest(row: dict[str, Any]) -> list[tuple[str, float]]:
    """The tokens of most KL with their nats, for those whose pointer cannot rest; [] where none has any to speak of."""
    ranked = sorted(_measured(row), key=lambda piece: -piece[1])
    return [(text.strip() or repr(text), nats) for text, nats in ranked[:NAMED] if nats >= LOUD]


def _measured(row: dict[str, Any]) -> list[tuple[str, float]]:
    tokens, nats = row.get("tokens") or [], row.get("token_kl") or []
    if len(tokens) != len(nats):
        return []
    return [(str(text), value or 0.0) for text, value in zip(tokens, nats, strict=True)]


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
