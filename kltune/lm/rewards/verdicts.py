"""What a judge's answer says: a number, or which of two is better; None wherever that is not beyond doubt.

A verdict is the last JSON object with the wanted key, so that neither thinking aloud nor quoting a response that
pretends to be a verdict counts for one. Text without JSON must leave no choice.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?![\d.,]*\d)"
# As few other characters as possible before the number, or its sign would be one of them.
NAMED_SCORE = re.compile(rf"\b(?:score|rating|grade)\b\W{{0,6}}?(?:is|of|as)?\W{{0,4}}?({NUMBER})", re.IGNORECASE)
ALONE = re.compile(rf"[^\w.+-]*({NUMBER})\W*")
CHOICE = re.compile(r"\W*(?:response\s+)?(A|B|tie)\W*", re.IGNORECASE)
NAMED = re.compile(r"\b(?:better|winner|verdict)\b\W{0,6}(?:is\s+)?\W{0,4}(?:response\s+)?\b(A|B|tie)\b", re.IGNORECASE)
PREFERENCE = {"a": 1.0, "b": 0.0, "tie": 0.5}


def read_score(text: str, lowest: float, highest: float) -> float | None:
    """The number in an answer, within [lowest, highest].

    That is ``{"score": 7}`` somewhere, or "Score: 7", "7/10" or "7 out of 10" and nothing that differs, or the number
    alone; a number in a sentence may count anything. None: no number, several, or one outside of the range.
    """
    text = THOUGHT.sub(" ", text)
    verdicts = [verdict["score"] for verdict in _objects(text) if "score" in verdict]
    if verdicts:
        number = _number(verdicts[-1])
    else:
        out_of = rf"(?<![\w.,])({NUMBER})\s*(?:/|\bout\s+of\b)\s*{re.escape(f'{highest:g}')}(?![\w.]*\d)"
        said = NAMED_SCORE.findall(text) + re.findall(out_of, text)
        if not said and (alone := ALONE.fullmatch(text)):
            said = [alone[1]]
        number = float(said[0]) if len({float(number) for number in said}) == 1 else None
    return number if number is not None and lowest <= number <= highest else None


def read_preference(text: str) -> float | None:
    """Which response an answer prefers: 1 for A, 0 for B, ½ for a tie; None: it does not say.

    It says so by ``{"better": "A"}`` somewhere, or "Better: A", or nothing but A, B or tie.
    """
    text = THOUGHT.sub(" ", text)
    verdicts = [verdict["better"] for verdict in _objects(text) if "better" in verdict]
    if verdicts:
        return PREFERENCE.get(str(verdicts[-1]).strip().lower())
    whole = CHOICE.fullmatch(text)
    named = {whole[1].lower()} if whole else {letter.lower() for letter in NAMED.findall(text)}
    return PREFERENCE[named.pop()] if len(named) == 1 else None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, in order; of nested ones the outermost."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            if isinstance(value, dict):
                yield value
        start = text.find("{", end)


def _number(value: Any) -> float | None:
    """A finite number, or a text that is one."""
    if isinstance(value, str):
        value = float(value) if re.fullmatch(rf"\s*{NUMBER}\s*", value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 and math.isfinite(value) else None
