"""Prompts and texts as token ids, every row of them accounted for.

    read = kept + dropped + skipped        truncated rows are among the kept

A row of the file is kept, dropped (too long), skipped (faulty, and the recipe allows it) or named as a fault; none
disappears. The forms of the rows are in forms.py, the reading of files in rows.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from kltune.errors import DataError
from kltune.lm.data.encoding import Encoder, Ids, last_tokens
from kltune.lm.data.forms import (
    PROMPT_FORMS,
    TEXT_FORMS,
    Form,
    FormOfFile,
    MixedForms,
    answered_messages,
    as_messages,
    prompt_of,
    text_field,
)
from kltune.lm.data.rows import Row, RowFault, read_rows
from kltune.recipe import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
LISTED_FAULTS = 20
SKIPPED_SHARE = 0.01        # of the rows, or one row in a small file
Item = TypeVar("Item")
Build = Callable[[Row], tuple[Item, bool]]      # the item, and whether it was truncated


class DroppedRow(Exception):
    """A row that is too long, where the recipe drops such rows."""


@dataclass(frozen=True)
class RowRules:
    """What the rows of a file may be, and what becomes of the others.

    max_prompt_tokens, max_response_tokens: bos and end token included. end_token: id of the token that ends a text or
    a response, appended to both (in messages the chat template has to write it); None appends none. template: auto
    (the chat template if the rows are messages), none, or chat (a prompt is one message of the user, a response one of
    the assistant). on_overlong: truncate (prompts from the left, keeping bos; responses from the right, then without
    the end token, because the text does not end there), drop, or error (the row is faulty). on_bad_row: error, or skip
    (at most 1 % of the rows, or one row).
    """

    max_prompt_tokens: int
    max_response_tokens: int
    end_token: int | None
    template: str = "auto"
    on_overlong: str = "truncate"
    on_bad_row: str = "error"

    @classmethod
    def of(
        cls, data: DataSection, end_token: int | None, max_prompt_tokens: int, max_response_tokens: int | None = None
    ) -> "RowRules":
        """The rules of a recipe's section, with limits that fit the model (for responses its own by default)."""
        response = data.max_response_tokens if max_response_tokens is None else max_response_tokens
        return cls(max_prompt_tokens, response, end_token, data.template, data.on_overlong, data.on_bad_row)

    def must_cut(self, prompt: int, *responses: int) -> bool:
        """Whether a row has to be truncated, by the tokens of its prompt and responses.

        Raises:
            RowFault: it is too long, and that is an error. DroppedRow: it is too long, and such rows are dropped.
        """
        response = max(responses, default=0)
        if prompt <= self.max_prompt_tokens and response <= self.max_response_tokens:
            return False
        if self.on_overlong == "drop":
            raise DroppedRow
        if self.on_overlong == "error":
            said = f"the prompt has {prompt} tokens, wanted at most {self.max_prompt_tokens} (data.max_prompt_tokens)"
            if responses:
                said += f"; the {'longest ' if len(responses) > 1 else ''}response has {response}, wanted at most "
                said += f"{self.max_response_tokens} (data.max_response_tokens)"
            raise RowFault(said)
        return True


@dataclass(frozen=True)
class Prompt:
    """A prompt: its tokens, its text and its place in the file."""

    ids: Ids
    text: str       # as written, or as the chat template writes it but for special tokens; whole where ids are cut
    where: str      # "prompts.jsonl:12"


@dataclass(frozen=True)
class Example:
    """A text to learn from, or to measure perplexity on."""

    ids: Ids
    scored: tuple[bool, ...]        # True: the token is scored, predicted from those before it; never the first
    where: str


@dataclass(frozen=True)
class Counts:
    """What became of the rows: read = kept + dropped + skipped, and truncated rows are among the kept."""

    read: int
    kept: int
    truncated: int
    dropped: int
    skipped: int


def counts_line(source: str, counts: Counts) -> str:
    """One line on a file that was read: every row accounted for."""
    other = {"truncated": counts.truncated, "dropped as over-long": counts.dropped, "skipped as faulty": counts.skipped}
    rest = [f"{number} {what}" for what, number in other.items() if number]
    return f"{source}: {counts.kept} of {counts.read} rows" + (f" ({', '.join(rest)})" if rest else "")


def distinct_prompts(prompts: list[Prompt]) -> list[Prompt]:
    """Each prompt once: pairs repeat theirs, and what is answered twice counts as one where errors are by prompt."""
    return list({prompt.ids: prompt for prompt in prompts}.values())


def load_prompts(
    source: str, tokenizer: "PreTrainedTokenizerBase", rules: RowRules, rows: Iterable[Row] | None = None
) -> tuple[list[Prompt], Counts]:
    """Read prompts: rows of ``{"prompt"}`` or ``{"messages"}``, or of pairs (pairs.py), one form in a file (rows.py).

    ``rows`` are read instead where given, and ``source`` only names them. None of the prompts is without a token.

    Raises:
        DataError: faulty rows, each named with its place; no row left; or a source that cannot be read.
    """
    encoder, forms = Encoder(tokenizer, rules.template), FormOfFile(PROMPT_FORMS)

    def build(row: Row) -> tuple[Prompt, bool]:
        form = forms.of(row.fields)
        asked = prompt_of(row.fields, form)
        if encoder.uses_chat(messages=not isinstance(asked, str)):
            ids = encoder.plain(encoder.chat_text(as_messages(asked), to_answer=True))
            text = encoder.readable(ids)
        else:
            ids, text = encoder.first_ids(asked), asked
        truncated = rules.must_cut(len(ids))
        return Prompt(last_tokens(ids, rules.max_prompt_tokens, tokenizer.bos_token_id), text, row.where), truncated

    return collect_rows(source, build, rules.on_bad_row, rows)


def load_examples(
    source: str, tokenizer: "PreTrainedTokenizerBase", rules: RowRules
) -> tuple[list[Example], Counts]:
    """Read texts to learn from: rows of ``{"text"}``, ``{"prompt", "response"}`` or ``{"messages"}``.

    Scored are all tokens of a text but the first; the response and its end token; every turn of the assistant.
    For the limits the prompt is what comes before the first scored token, the response all the rest. Errors as
    ``load_prompts``; each example has at least one scored token.
    """
    encoder, forms = Encoder(tokenizer, rules.template), FormOfFile(TEXT_FORMS)

    def build(row: Row) -> tuple[Example, bool]:
        form = forms.of(row.fields)
        if encoder.uses_chat(messages=form == ("messages",)):
            ids, scored = encoder.conversation(answered_messages(row.fields, form), rules.end_token)
        else:
            ids, scored = _plain_example(row, form, encoder, rules.end_token)
        start = scored.index(True)
        prompt, response = ids[:start], ids[start:]
        truncated = rules.must_cut(len(prompt), len(response))
        prompt = last_tokens(prompt, rules.max_prompt_tokens, tokenizer.bos_token_id)
        end = start + rules.max_response_tokens
        return Example(prompt + ids[start:end], (False,) * len(prompt) + scored[start:end], row.where), truncated

    return collect_rows(source, build, rules.on_bad_row)


def _plain_example(
    row: Row, form: Form, encoder: Encoder, end_token: int | None
) -> tuple[Ids, tuple[bool, ...]]:
    if form == ("text",):
        ids = encoder.first_ids(text_field(row.fields, "text"))
        unscored = 1        # nothing comes before the first token that it could be predicted from
    else:
        prompt = encoder.first_ids(text_field(row.fields, "prompt"))
        ids, unscored = prompt + encoder.following_ids(text_field(row.fields, "response")), len(prompt)
    if end_token is not None and ids[-1] != end_token:
        ids += (end_token,)
    if len(ids) == unscored:
        raise RowFault(f'field "text": only {unscored} token, wanted at least one more that can be scored')
    return ids, (False,) * unscored + (True,) * (len(ids) - unscored)


def shuffled_positions(count: int, start: int, size: int, seed: int) -> list[int]:
    """Positions ``start`` to ``start + size`` of an endless stream of reshuffled epochs, each of ``count`` rows.

        epoch e = permutation of 0..count−1 drawn from default_rng([seed, e])

    It has no state: the same arguments give the same positions, so that a resumed run goes on exactly where it was.

    Raises:
        ValueError: no rows, or a negative start or size.
    """
    if count < 1 or start < 0 or size < 0:
        raise ValueError(f"count {count}, start {start} and size {size} do not describe a part of a stream.")
    positions: list[int] = []
    while len(positions) < size:
        epoch, offset = divmod(start + len(positions), count)
        order = np.random.default_rng([seed, epoch]).permutation(count)
        positions += order[offset : offset + size - len(positions)].tolist()
    return positions


def collect_rows(
    source: str, build: Build[Item], on_bad_row: str, rows: Iterable[Row] | None = None
) -> tuple[list[Item], Counts]:
    """Build every row of a source, or of ``rows`` in its place, and count what becomes of it.

    Raises:
        DataError: too many rows are faulty, each is named with its place; or none is left.
    """
    kept: list[Item] = []
    faults: list[str] = []
    read = truncated = dropped = 0
    for row in read_rows(source) if rows is None else rows:
        read += 1
        try:
            if row.fault:
                raise RowFault(row.fault)
            item, cut = build(row)
        except DroppedRow:
            dropped += 1
            continue
        except RowFault as fault:
            faults.append(f"{row.where}: {fault}")
            if isinstance(fault, MixedForms):
                raise _refusal(source, faults, read, "") from fault
            continue
        kept.append(item)
        truncated += cut
    too_many = len(faults) > max(1, SKIPPED_SHARE * read)
    if faults and (too_many or on_bad_row == "error"):
        advice = "data.on_bad_row: skip leaves out 1 % of the rows at most (or one row)"
        raise _refusal(source, faults, read, f"{advice}; these are more." if too_many else f"{advice}.")
    if not kept:
        raise DataError(f"{source}: no row is left of {read} ({dropped} too long and dropped, {len(faults)} faulty).")
    return kept, Counts(read=read, kept=len(kept), truncated=truncated, dropped=dropped, skipped=len(faults))


def _refusal(source: str, faults: list[str], read: int, advice: str) -> DataError:
    listed = faults[:LISTED_FAULTS]
    more = [f"and {len(faults) - len(listed)} more"] if len(faults) > len(listed) else []
    summary = f"{len(faults)} faulty {'row' if len(faults) == 1 else 'rows'} in {read} read"
    lines = [f"{source}: {summary}", *(f"  {line}" for line in listed + more), *([advice] if advice else [])]
    return DataError("\n".join(lines))
