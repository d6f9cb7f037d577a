"""Prompts and responses on a page: which are shown, and each response in pieces that are shaded by their KL."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kltune.run.screen import number

SampleRow = dict[str, Any]                     # of samples.jsonl
SHADES = (0.02, 0.1, 0.3, 1.0, 3.0)      # least nats of each shade
WORTH_NAMING, MOST_NAMED = 0.1, 3        # tokens of so many nats and more are named, so many of them
LONGEST_TEXT = 1500                      # characters of a prompt or response on the page
LONG_PROMPT, LONG_PROMPT_LINES, BEGINNING = 280, 5, 100      # characters, lines; characters kept of the beginning
PER_STEP = 3                             # responses shown of a step while it trained


@dataclass(frozen=True)
class Span:
    """A piece of a response: its text, its shade (0 is none) and what is said when the pointer rests on it."""

    text: str
    level: int
    title: str


def newest_pairs(samples: Sequence[SampleRow]) -> list[SampleRow]:
    """The newest responses that stand beside the reference's, one to a prompt, those of most KL first."""
    both = [row for row in samples if row.get("reference_response") is not None]
    newest = max((row.get("step", 0) for row in both), default=0)
    pairs = {str(row.get("prompt")): row for row in both if row.get("step", 0) == newest}.values()
    return sorted(pairs, key=lambda row: -(row.get("ref_kl") or 0.0))


def samples_while_training(samples: Sequence[SampleRow]) -> list[list[SampleRow]]:
    """A few responses of the newest, the middle and the first step that recorded any without the reference's.

    Each is a list of what is shown side by side: one response, or the several sides of one prompt.
    """
    alone = [row for row in samples if row.get("reference_response") is None]
    steps = sorted({row.get("step", 0) for row in alone}, reverse=True)
    chosen = dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1])) if steps else ()
    by_step = ([row for row in alone if row.get("step", 0) == step] for step in chosen)
    return [group for rows in by_step for group in _side_by_side(rows)[:PER_STEP]]


def _side_by_side(rows: Sequence[SampleRow]) -> list[list[SampleRow]]:
    """Rows that follow each other as different sides of one prompt, together; every other row alone."""
    groups: list[list[SampleRow]] = []
    for row in rows:
        last = groups[-1] if groups else []
        sides = {each.get("side") for each in last}
        if row.get("side") and None not in sides and row["side"] not in sides and last and (
            last[0].get("prompt") == row.get("prompt")
        ):
            last.append(row)
        else:
            groups.append([row])
    return groups


def shaded_spans(row: SampleRow) -> list[Span]:
    """The response of a row; in one piece where its tokens were not measured."""
    tokens = _tokens_with_nats(row)
    if not tokens:
        return [Span(shortened(row.get("response", "")), 0, "")]
    spans, length = [], 0
    for index, (text, nats) in enumerate(tokens):
        text = text if spans else text.lstrip(" ")
        spans.append(Span(text, sum(nats >= least for least in SHADES), f"{number(nats)} nats"))
        length += len(text)
        if length > LONGEST_TEXT:
            rest = len(tokens) - index - 1
            return [*spans, Span(f" … ({rest:,} more tokens in samples.jsonl)" if rest else "", 0, "")]
    return spans


def tokens_of_most_kl(row: SampleRow) -> list[tuple[str, float]]:
    """Token and nats, for readers whose pointer cannot rest on a span; [] where no token has KL worth naming."""
    ranked = sorted(_tokens_with_nats(row), key=lambda token: -token[1])
    return [(text.strip() or repr(text), nats) for text, nats in ranked[:MOST_NAMED] if nats >= WORTH_NAMING]


def has_shades(row: SampleRow) -> bool:
    """Whether some token of the response is shaded by its KL."""
    return any(nats >= SHADES[0] for _, nats in _tokens_with_nats(row))


def brief(prompt: str) -> str:
    """The beginning and the end of a prompt too long to stand open, in one line; "" for a prompt that is short."""
    if len(prompt) <= LONG_PROMPT and prompt.count("\n") < LONG_PROMPT_LINES:
        return ""
    line = " ".join(prompt.split())
    return line if len(line) <= LONG_PROMPT else f"{line[:BEGINNING]} … {line[BEGINNING - LONG_PROMPT:]}"


def _tokens_with_nats(row: SampleRow) -> list[tuple[str, float]]:
    tokens, nats = row.get("tokens") or [], row.get("token_kl") or []
    if len(tokens) != len(nats):
        return []
    return [(str(text), value or 0.0) for text, value in zip(tokens, nats, strict=True)]


def shortened(value: Any) -> str:
    """A prompt or response, its end cut off if it is very long."""
    text = str(value).lstrip(" ")      # a response goes on where its prompt ended
    rest = len(text) - LONGEST_TEXT
    return text if rest <= 0 else f"{text[:LONGEST_TEXT]} … ({rest:,} more characters in samples.jsonl)"
