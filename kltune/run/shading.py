"""Responses token by token, each token shaded by the KL at its position, for pages."""

from dataclasses import dataclass
from typing import Any

from kltune.run.words import LONGEST_TEXT, number, shortened

LEVELS = (0.02, 0.1, 0.3, 1.0, 3.0)      # least nats of each shade
LOUD, NAMED = 0.1, 3                     # tokens of so many nats and more are named, so many of them


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
