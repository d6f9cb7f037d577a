"""Preference pairs, and responses judged one by one, as token ids; every row of them accounted for as in examples.py.

A prompt and its responses become tokens apart, as in sampling, where the prompt's tokens are fixed before the first
token of the response: a tokenizer that merges across the boundary would score text that the policy can never be asked
to continue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kltune.errors import DataError
from kltune.lm.data.encoding import Encoder, Ids, last_tokens, spelled
from kltune.lm.data.examples import Counts, Prompt, collect_rows, to_truncate
from kltune.lm.data.forms import (
    LABELLED_FORM,
    PAIR_FORMS,
    Asked,
    FormOfFile,
    as_messages,
    label_of,
    margin_of,
    prompt_and,
    sides_of,
)
from kltune.lm.data.rows import Row, RowFault, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


Comparison = Pair | Labelled
READ_AGAIN = 256        # rows on which it is tried whether their text gives their tokens again


def load_comparisons(
    source: str, tokenizer: "PreTrainedTokenizerBase", **rules: Any
) -> tuple[list[Pair] | list[Labelled], Counts]:
    """Read pairs with their margins, or labelled responses, whichever the first row of the source is.

    Arguments, returns and errors as `load_pairs` and `load_labelled`.
    """
    first = next((row.fields for row in read_rows(source) if not row.fault), {})
    present = {name for name, value in first.items() if value is not None}
    labelled = present.issuperset(LABELLED_FORM) and not any(present.issuperset(form) for form in PAIR_FORMS)
    if labelled:
        return load_labelled(source, tokenizer, **rules)
    return load_pairs(source, tokenizer, margins=True, **rules)


def answers(row: Comparison) -> tuple[Answer, ...]:
    """The responses of a row: of a pair the chosen one first."""
    return (row.chosen, row.rejected) if isinstance(row, Pair) else (row.response,)


def sequences(rows: Sequence[Comparison]) -> list[Ids]:
    """Prompt and response of every row; of pairs all that were chosen, then all that were rejected."""
    return [row.prompt.ids + answer.ids for side in zip(*map(answers, rows), strict=True)
            for row, answer in zip(rows, side, strict=True)]


def hold_out(
    rows: Sequence[Comparison], share: float, seed: int, source: str
) -> tuple[list[Comparison], list[Comparison]]:
    """Split rows by their prompts, so that no prompt is on both sides.

    Args:
        rows: all there are.
        share: of the prompts, rounded, but at least one; 0 holds out nothing.
        seed: which ones.
        source: names the rows in the error.

    Returns:
        (to train on, held out), each in the order of ``rows``.

    Raises:
        DataError: there is one prompt only.
    """
    if share == 0.0:
        return list(rows), []
    prompts = list(dict.fromkeys(row.prompt.ids for row in rows))
    if len(prompts) < 2:
        raise DataError(
            f"{source}: all {len(rows)} rows answer one prompt, and rows are held out by prompt; give held-out rows as "
            "eval.pairs, or write eval.pairs_share: 0 to measure nothing."
        )
    count = min(max(1, round(share * len(prompts))), len(prompts) - 1)
    order = np.random.default_rng([seed, len(prompts)]).permutation(len(prompts))
    chosen = {prompts[at] for at in order[:count]}
    return [r for r in rows if r.prompt.ids not in chosen], [r for r in rows if r.prompt.ids in chosen]


def reads_text(rows: Sequence[Comparison], tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether prompt and response as text give their tokens again; those that a chat template wrote do not.

    One row that does will tell: rows that were truncated do not either.
    """
    encoder, end = Encoder(tokenizer, "none"), tokenizer.eos_token_id
    return any(
        spelled(encoder, row.prompt.text, answer.text, answer.ids[-1] == end, None) == row.prompt.ids + answer.ids
        for row in rows[:READ_AGAIN] for answer in answers(row)
    )


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
            return Pair(prompt, chosen, rejected, margin_of(row.fields) if margins else 0.0), too_long
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
            asked, *responses = prompt_and(row.fields, "prompt", ("response",))
            wanted = [label_of(row.fields)]
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
        messages = as_messages(asked)
        turns = [encoder.answer([*messages, {"role": "assistant", "content": text}], end_token) for text in responses]
        ids = turns[0][0]
        return ids, encoder.readable(ids), [spoken for _, spoken in turns]
    spoken = [encoder.continuing(text) for text in responses]
    if end_token is not None:
        spoken = [ids if ids[-1] == end_token else (*ids, end_token) for ids in spoken]
    return encoder.opening(asked), asked, spoken
