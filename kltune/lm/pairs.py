"""Preference pairs, and responses judged one by one, as token ids; every row of them accounted for as in data.py.

A prompt and its responses become tokens apart, as in sampling, where the prompt's tokens are fixed before the first
token of the response: a tokenizer that merges across the boundary would score text that the policy can never be asked
to continue.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kltune.errors import DataError
from kltune.lm.data import Counts, Prompt, collect_rows, last_tokens, to_truncate
from kltune.lm.encoding import Encoder, Ids
from kltune.lm.forms import (
    LABELLED_FORM,
    PAIR_FORMS,
    Form,
    FormOfFile,
    Message,
    message_list,
    open_messages,
    text_field,
)
from kltune.lm.rows import Row, RowFault, describe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("chosen", "rejected")
MARKER = "\n\nAssistant:"       # what an answer follows in the transcripts of Anthropic's hh-rlhf
LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}     # CSV has only text

Asked = str | list[Message]


@dataclass(frozen=True)
class Answer:
    """A response as it was written, not sampled. ids: with its end token, unless it was truncated."""

    ids: Ids
    text: str


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, of which the first is preferred; their tokens differ. margin: by how much more."""

    prompt: Prompt
    chosen: Answer
    rejected: Answer
    margin: float = 0.0


@dataclass(frozen=True)
class Labelled:
    """A response that was judged on its own: wanted, or not."""

    prompt: Prompt
    response: Answer
    wanted: bool


@dataclass(frozen=True)
class Limits:
    """What fits. prompt, response: tokens, bos and end token included. on_overlong: truncate, drop or error."""

    prompt: int
    response: int
    on_overlong: str


def load_pairs(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    end_token: int | None,
    max_prompt_tokens: int,
    max_response_tokens: int,
    template: str,
    on_overlong: str,
    on_bad_row: str,
    margins: bool = False,
) -> tuple[list[Pair], Counts]:
    """Read preference pairs, one form in a file:

        {"prompt", "chosen", "rejected"}      texts; or messages, the prompt's and one of the assistant on either side
        {"messages", "chosen", "rejected"}    the same, the prompt under its other name
        {"chosen", "rejected"}                whole conversations that differ in their last message, or transcripts
                                              (hh-rlhf), whose prompt ends with the last "\\n\\nAssistant:" in common

    Args:
        source: a JSONL, CSV or Parquet file, or a dataset (rows.py).
        tokenizer: the policy's.
        end_token: id of the token that ends a response, appended to it; None appends none. In messages the chat
            template has to write it.
        max_prompt_tokens: the longest prompt, in tokens with bos.
        max_response_tokens: the longest response, in tokens with the end token.
        template: auto (chat template if the rows are messages), none, or chat (a prompt is one user message).
        on_overlong: truncate (prompts from the left, keeping bos; responses from the right, then without the end
            token), drop, or error (the row is faulty). A pair that truncation makes equal is dropped.
        on_bad_row: error, or skip (at most 1 % of the rows, or one row). Faulty is also a row whose sides are empty,
            equal, or transcripts that share no prompt.
        margins: read the field "margin" of rows that have one; else it is an extra field.

    Returns:
        The pairs in the order of the source, and the counts.

    Raises:
        DataError: faulty rows, each named with its place; no row left; or a source that cannot be read.
    """
    encoder, forms = Encoder(tokenizer, template), FormOfFile(PAIR_FORMS)
    limits = Limits(max_prompt_tokens, max_response_tokens, on_overlong)

    def build(row: Row) -> tuple[Pair, bool] | None:
        asked, *sides = sides_of(row.fields, forms.of(row.fields))
        fitted = _fitted(encoder, row.where, asked, sides, end_token, limits)
        if fitted is None:
            return None
        prompt, (chosen, rejected), too_long = fitted
        if chosen.ids != rejected.ids:
            return Pair(prompt, chosen, rejected, margin_field(row.fields) if margins else 0.0), too_long
        if too_long:
            return None
        raise RowFault('"chosen" and "rejected" are the same tokens, wanted two different responses')

    return collect_rows(source, build, on_bad_row)


def load_labelled(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    end_token: int | None,
    max_prompt_tokens: int,
    max_response_tokens: int,
    template: str,
    on_overlong: str,
    on_bad_row: str,
) -> tuple[list[Labelled], Counts]:
    """Read responses judged one by one, ``{"prompt", "response", "label"}`` with true for a wanted one.

    ``label`` is true or false, 1 or 0; ``prompt`` and ``response`` are texts, or messages as in a pair. A file of
    pairs, in any form of `load_pairs`, will do as well: what was chosen is wanted, what was rejected is not. The rest
    as there; the counts are of rows.
    """
    encoder, forms = Encoder(tokenizer, template), FormOfFile((LABELLED_FORM, *PAIR_FORMS))
    limits = Limits(max_prompt_tokens, max_response_tokens, on_overlong)

    def build(row: Row) -> tuple[list[Labelled], bool] | None:
        form = forms.of(row.fields)
        if form == LABELLED_FORM:
            asked, *responses = _prompt_and(row.fields, "prompt", ("response",))
            wanted = [label_field(row.fields)]
        else:
            asked, *responses = sides_of(row.fields, form)
            wanted = [True, False]
        fitted = _fitted(encoder, row.where, asked, responses, end_token, limits)
        if fitted is None:
            return None
        prompt, answers, too_long = fitted
        return [Labelled(prompt, *judged) for judged in zip(answers, wanted, strict=True)], too_long

    rows, counts = collect_rows(source, build, on_bad_row)
    return [labelled for row in rows for labelled in row], counts


def label_field(fields: dict[str, Any]) -> bool:
    """Whether the response of a row is a wanted one.

    Raises:
        RowFault: the label is none of true, false, 1 and 0.
    """
    value = fields.get("label")
    key = value.strip().lower() if isinstance(value, str) else value
    if isinstance(key, bool | int | float | str) and key in LABELS:
        return LABELS[key]
    found = describe(value) if "label" in fields else "nothing"
    raise RowFault(f'field "label": found {found}, wanted true or false (1 or 0)')


def margin_field(fields: dict[str, Any]) -> float:
    """How much better the chosen response of a row is said to be, in units of score; 0 where it does not say.

    Raises:
        RowFault: the margin is no finite number of at least 0.
    """
    value = fields.get("margin")
    if value is None:
        return 0.0
    try:
        margin = math.nan if isinstance(value, bool) else float(value)      # CSV has only text
    except (TypeError, ValueError):
        margin = math.nan
    if not 0.0 <= margin < math.inf:
        raise RowFault(f'field "margin": found {describe(value)}, wanted a number of at least 0')
    return margin


def sides_of(fields: dict[str, Any], form: Form) -> tuple[Asked, str, str]:
    """The prompt of a row, as text or as messages to answer, and what was chosen and rejected.

    Raises:
        RowFault: a field is faulty, the sides are equal, or share no prompt.
    """
    listed = [isinstance(fields.get(side), list) for side in SIDES]
    if form == SIDES:
        asked, chosen, rejected = _conversations(fields) if any(listed) else _transcripts(fields)
    elif all(listed) and _role_of(fields["chosen"][:1]) != "assistant":
        asked, chosen, rejected = _conversations(fields)
        _expect_prompt(fields[form[0]], form[0], asked)
    else:
        asked, chosen, rejected = _prompt_and(fields, form[0], SIDES)
    if chosen == rejected:
        raise RowFault('"chosen" and "rejected" are equal, wanted two different responses')
    return asked, chosen, rejected


def _transcripts(fields: dict[str, Any]) -> tuple[str, str, str]:
    chosen, rejected = (text_field(fields, side) for side in SIDES)
    letters = zip(chosen, rejected, strict=False)
    shared = next((at for at, (a, b) in enumerate(letters) if a != b), min(len(chosen), len(rejected)))
    start = chosen.rfind(MARKER, 0, shared)
    if start < 0:
        raise RowFault(
            f'"chosen" and "rejected" share no beginning that ends with {MARKER!r}; wanted two transcripts of one '
            'conversation, or a field "prompt"'
        )
    start += len(MARKER)
    for side, text in zip(SIDES, (chosen, rejected), strict=True):
        if not text[start:].strip():
            raise RowFault(f'field "{side}": found nothing behind the prompt that both share, wanted a response')
    return chosen[:start], chosen[start:], rejected[start:]


def _conversations(fields: dict[str, Any]) -> tuple[list[Message], str, str]:
    both = [message_list(fields, side) for side in SIDES]
    for side, messages in zip(SIDES, both, strict=True):
        if messages[-1]["role"] != "assistant":
            raise RowFault(f'field "{side}": found {messages[-1]["role"]} in the last message, wanted assistant')
    chosen, rejected = both
    if chosen[:-1] != rejected[:-1]:
        raise RowFault('"chosen" and "rejected" differ before their last message, wanted one prompt for both')
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _expect_prompt(value: Any, name: str, asked: list[Message]) -> None:
    """A prompt that stands beside whole conversations says what they begin with."""
    if value != asked and value not in [message["content"] for message in asked if message["role"] == "user"]:
        raise RowFault(f'field "{name}": not the prompt that "chosen" and "rejected" begin with; remove one of the two')


def _prompt_and(fields: dict[str, Any], name: str, sides: Sequence[str]) -> tuple[Any, ...]:
    """The prompt in the field ``name``, and the responses in the fields ``sides``."""
    listed = [isinstance(fields.get(side), list) for side in sides]
    if name == "messages" or isinstance(fields.get(name), list):
        asked: Asked = open_messages(fields, name)
    else:
        text = text_field(fields, name)
        asked = [{"role": "user", "content": text}] if any(listed) else text
    return asked, *map(lambda side, messages: (_answer if messages else text_field)(fields, side), sides, listed)


def _answer(fields: dict[str, Any], side: str) -> str:
    messages = message_list(fields, side, before="user")
    if len(messages) > 1:
        raise RowFault(f'field "{side}": found {len(messages)} messages, wanted one of the assistant')
    return messages[0]["content"]


def _role_of(messages: list[Any]) -> Any:
    return messages[0].get("role") if messages and isinstance(messages[0], dict) else None


def _fitted(
    encoder: Encoder, where: str, asked: Asked, responses: Sequence[str], end_token: int | None, limits: Limits
) -> tuple[Prompt, list[Answer], bool] | None:
    """Prompt and responses in tokens, within the limits, and whether that took truncation; None: dropped."""
    ids, text, spoken = _encoded(encoder, asked, responses, end_token)
    longest = max(map(len, spoken))
    too_long = len(ids) > limits.prompt or longest > limits.response
    if too_long and not to_truncate(
        limits.on_overlong,
        f"the prompt has {len(ids)} tokens, wanted at most {limits.prompt} (data.max_prompt_tokens); the longest "
        f"response has {longest}, wanted at most {limits.response} (data.max_response_tokens)",
    ):
        return None
    prompt = Prompt(last_tokens(ids, limits.prompt, encoder.tokenizer.bos_token_id), text, where)
    answers = [Answer(s[: limits.response], r) for s, r in zip(spoken, responses, strict=True)]
    return prompt, answers, too_long


def _encoded(
    encoder: Encoder, asked: Asked, responses: Sequence[str], end_token: int | None
) -> tuple[Ids, str, list[Ids]]:
    if encoder.uses_chat(messages=not isinstance(asked, str)):
        messages = _as_messages(asked)
        turns = [encoder.answer([*messages, {"role": "assistant", "content": text}], end_token) for text in responses]
        ids = turns[0][0]
        return ids, encoder.readable(ids), [spoken for _, spoken in turns]
    spoken = [encoder.continuing(text) for text in responses]
    if end_token is not None:
        spoken = [ids if ids[-1] == end_token else (*ids, end_token) for ids in spoken]
    return encoder.opening(asked), asked, spoken


def _as_messages(asked: Asked) -> list[Message]:
    if not isinstance(asked, str):
        return asked
    if asked.endswith(MARKER):
        raise DataError(
            f"data.template: chat cannot be used with prompts that end with {MARKER!r}: they say already who speaks; "
            "wanted data.template: none, or rows of messages."
        )
    return [{"role": "user", "content": asked}]
