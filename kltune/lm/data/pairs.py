"""Preference pairs, and responses labelled one by one, as token ids; every row of them accounted for as in examples.py.

A prompt and its responses become tokens apart, as in sampling, where the prompt's tokens are fixed before the first
token of the response: a tokenizer that merges across the boundary would score text that the policy can never be asked
to continue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kltune.errors import DataError
from kltune.lm.data.encoding import Encoder, Ids, spelled
from kltune.lm.data.examples import Counts, DroppedRow, Prompt, RowRules, collect_rows, fitted_prompt
from kltune.lm.data.forms import (
    LABELLED_FORM,
    PAIR_FORMS,
    Asked,
    FormOfFile,
    as_messages,
    closest,
    label_of,
    margin_of,
    prompt_and,
    sides_of,
)
from kltune.lm.data.rows import Row, RowFault, read_rows

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
    """A response that was labelled on its own: wanted, or not."""

    prompt: Prompt
    response: Answer
    wanted: bool


Comparison = Pair | Labelled
READ_AGAIN = 256        # rows on which it is tried whether their text gives their tokens again


def load_comparisons(
    source: str, tokenizer: "PreTrainedTokenizerBase", rules: RowRules
) -> tuple[list[Pair] | list[Labelled], Counts]:
    """Read pairs with their margins, or labelled responses, whichever the first row of the source is."""
    first = rules.layout(rules.encoder(tokenizer)).first(read_rows(source))
    labelled = closest(first, (*PAIR_FORMS, LABELLED_FORM)) == LABELLED_FORM
    return load_labelled(source, tokenizer, rules) if labelled else load_pairs(source, tokenizer, rules, margins=True)


def answers(row: Comparison) -> tuple[Answer, ...]:
    """The responses of a row: of a pair the chosen one first."""
    return (row.chosen, row.rejected) if isinstance(row, Pair) else (row.response,)


def sequences(rows: Sequence[Comparison]) -> list[Ids]:
    """Prompt and response of every row; of pairs all that were chosen, then all that were rejected."""
    return [row.prompt.ids + answer.ids for side in zip(*map(answers, rows), strict=True)
            for row, answer in zip(rows, side, strict=True)]


def sides(rows: Sequence[Comparison]) -> list[tuple[Ids, ...]]:
    """Prompt and responses of every row, in tokens."""
    return [(row.prompt.ids, *(answer.ids for answer in answers(row))) for row in rows]


def hold_out(
    rows: Sequence[Comparison], share: float, seed: int, source: str
) -> tuple[list[Comparison], list[Comparison]]:
    """Split rows by their prompts, so that no prompt is on both sides: to train on, and held out; both in order.

    share: of the prompts, rounded, but at least one; 0 holds out nothing. DataError if there is one prompt only.
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


def reads_text(rows: Sequence[Comparison], encoder: Encoder) -> bool:
    """Whether prompt and response as text give their tokens again; those that a chat template wrote do not.

    One row that does will tell: rows that were truncated do not either.
    """
    return any(
        spelled(encoder, row.prompt.text, answer.text, answer.ids[-1] in encoder.ends, None)
        == row.prompt.ids + answer.ids
        for row in rows[:READ_AGAIN] for answer in answers(row)
    )


def load_pairs(
    source: str, tokenizer: "PreTrainedTokenizerBase", rules: RowRules, *, margins: bool = False
) -> tuple[list[Pair], Counts]:
    """Read preference pairs, one form in a file:

        {"prompt", "chosen", "rejected"}      texts; or messages, the prompt's and one of the assistant on either side
        {"messages", "chosen", "rejected"}    the same, the prompt under its other name
        {"chosen", "rejected"}                whole conversations that differ in their last message, or transcripts
                                              (hh-rlhf), whose prompt ends with the last "\\n\\nAssistant:" in common

    Faulty is also a row whose sides are empty, equal, or transcripts that share no prompt; a pair that truncation makes
    equal is dropped. With ``margins`` the field "margin" is read, else it is an extra field. The rest as
    ``examples.load_prompts``.
    """
    forms = FormOfFile(PAIR_FORMS)

    def build(row: Row, encoder: Encoder) -> tuple[Pair, bool]:
        asked, *sides = sides_of(row.fields, forms.of(row.fields))
        prompt, (chosen, rejected), truncated = _fitted(encoder, rules, row.where, asked, sides)
        if chosen.ids != rejected.ids:
            return Pair(prompt, chosen, rejected, margin_of(row.fields) if margins else 0.0), truncated
        if truncated:
            raise DroppedRow
        raise RowFault('"chosen" and "rejected" are the same tokens, wanted two different responses')

    return collect_rows(source, forms, build, tokenizer, rules)


def load_labelled(
    source: str, tokenizer: "PreTrainedTokenizerBase", rules: RowRules
) -> tuple[list[Labelled], Counts]:
    """Read responses labelled one by one, ``{"prompt", "response", "label"}`` with true for a wanted one.

    ``label`` is true or false, 1 or 0; ``prompt`` and ``response`` are texts, or messages as in a pair. A file of
    pairs, in any form of `load_pairs`, will do as well: what was chosen is wanted, what was rejected is not. The rest
    as there; the counts are of rows.
    """
    forms = FormOfFile((LABELLED_FORM, *PAIR_FORMS))

    def build(row: Row, encoder: Encoder) -> tuple[list[Labelled], bool]:
        form = forms.of(row.fields)
        if form == LABELLED_FORM:
            asked, *responses = prompt_and(row.fields, "prompt", ("response",))
            wanted = [label_of(row.fields)]
        else:
            asked, *responses = sides_of(row.fields, form)
            wanted = [True, False]
        prompt, answers, truncated = _fitted(encoder, rules, row.where, asked, responses)
        return [Labelled(prompt, *labelled) for labelled in zip(answers, wanted, strict=True)], truncated

    rows, counts = collect_rows(source, forms, build, tokenizer, rules)
    return [labelled for row in rows for labelled in row], counts


def _fitted(
    encoder: Encoder, rules: RowRules, where: str, asked: Asked, responses: Sequence[str]
) -> tuple[Prompt, list[Answer], bool]:
    """Prompt and responses in tokens, within the limits, and whether that took truncation."""
    if encoder.uses_chat(messages=not isinstance(asked, str)):
        messages = as_messages(asked)
        spoken = [encoder.answer([*messages, {"role": "assistant", "content": text}])[1] for text in responses]
    else:
        spoken = [encoder.response_ids(text, asked) for text in responses]
    prompt, truncated = fitted_prompt(encoder, rules, where, asked, spoken)
    answers = [Answer(s[: rules.max_response_tokens], r) for s, r in zip(spoken, responses, strict=True)]
    return prompt, answers, truncated
