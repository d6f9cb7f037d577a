"""Prompts and texts as token ids, every row of them accounted for.

    read = kept + dropped + skipped        truncated rows are among the kept

A row of the file is kept, dropped (too long), skipped (faulty, and the recipe allows it) or named as a fault; none
disappears. The forms of the rows are in forms.py, the reading of files in rows.py.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from kltune.errors import DataError
from kltune.lm.data.chat import EndTokens
from kltune.lm.data.encoding import Encoder, Ids, OtherTokenizer, Scored, last_tokens
from kltune.lm.data.forms import (
    PROMPT_FORMS,
    TEXT_FORMS,
    Asked,
    Form,
    FormOfFile,
    Message,
    MixedForms,
    answered_messages,
    are_messages,
    prompt_of,
    text_field,
)
from kltune.lm.data.layouts import Layout
from kltune.lm.data.rows import Row, RowFault, read_rows
from kltune.recipe import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
LISTED_FAULTS = 20
SHOWN_LETTERS = 300         # of a rendered example
SKIPPED_PERCENT = 1         # of the rows that were read
Item = TypeVar("Item")
Build = Callable[[Row, Encoder], tuple[Item, bool]]      # the item, and whether it was truncated


class DroppedRow(Exception):
    """A row that is too long, where the recipe drops such rows."""


@dataclass(frozen=True)
class RowRules:
    """What the rows of a file may be, and what becomes of the others.

    max_prompt_tokens, max_response_tokens: bos and end token included. end_token: id of the token that ends a text or
    a response, appended to both (in messages the chat template has to write one); None appends none. template: auto
    (the chat template if the rows are messages), none, or chat (a prompt is one message of the user, a response one of
    the assistant). end_ids: further tokens that end a response. turns: all answers of a conversation are learnt from,
    or the last. control: a control token that is spelled out is text in messages and a control token in plain rows
    (auto), or one of the two everywhere. day: what a chat template is told that asks for the date. others: tokenizers
    that have to make the same of every row. max_tokens: of a prompt and its response together, as the context has them.
    columns: our names of fields, and the source's. transcripts: become messages, stay text, or the one that the chat
    template asks for (auto).

    on_overlong: truncate (prompts from the left, keeping bos; responses from the right, then without the end token,
    because the text does not end there), drop, or error (the row is faulty). on_bad_row: error, or skip (at most 1 % of
    the rows).
    """

    max_prompt_tokens: int
    max_response_tokens: int
    end_token: int | None
    template: str = "auto"
    on_overlong: str = "truncate"
    on_bad_row: str = "error"
    end_ids: tuple[int, ...] = ()
    turns: str = "all"
    control: Literal["auto", "text", "tokens"] = "auto"
    day: date | None = None
    others: tuple[OtherTokenizer, ...] = ()
    max_tokens: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    transcripts: str = "auto"

    @classmethod
    def of(
        cls, data: DataSection, ends: EndTokens, max_prompt_tokens: int, max_response_tokens: int | None = None
    ) -> "RowRules":
        """The rules of a recipe's section, with limits that fit the model (for responses its own by default)."""
        response = data.max_response_tokens if max_response_tokens is None else max_response_tokens
        return cls(
            max_prompt_tokens, response, ends.appended, data.template, data.on_overlong, data.on_bad_row, ends.ids,
            data.turns, data.control_tokens, columns=data.columns, transcripts=data.transcripts,
        )

    def encoder(self, tokenizer: "PreTrainedTokenizerBase") -> Encoder:
        """What makes tokens of rows by these rules."""
        return Encoder(
            tokenizer, self.template, end_token=self.end_token, end_ids=self.end_ids, day=self.day,
            control=self.control, others=self.others, limit=self.max_prompt_tokens + self.max_response_tokens,
        )

    def layout(self, encoder: Encoder) -> Layout:
        """How rows are read for an encoder: transcripts as messages, where its chat template is what they become."""
        templated = encoder.template != "none" and bool(encoder.chat.source)
        return Layout(self.columns, encoder.template if templated else "none", transcripts=(
            self.transcripts == "messages" or (self.transcripts == "auto" and templated)))

    def must_cut(self, prompt: int, *responses: int) -> bool:
        """Whether a row has to be truncated, by the tokens of its prompt and responses.

        Raises:
            RowFault: it is too long, and that is an error. DroppedRow: it is too long, and such rows are dropped.
        """
        response = max(responses, default=0)
        if prompt <= self.max_prompt_tokens and response <= self.response_room(prompt):
            return False
        if self.on_overlong == "drop":
            raise DroppedRow
        if self.on_overlong == "error":
            said = f"the prompt has {prompt} tokens, wanted at most {self.max_prompt_tokens} (data.max_prompt_tokens)"
            if responses:
                said += f"; the {'longest ' if len(responses) > 1 else ''}response has {response}, wanted at most "
                said += f"{self.response_room(prompt)} (data.max_response_tokens, and the model's context)"
            raise RowFault(said)
        return True

    def response_room(self, prompt: int) -> int:
        """How many tokens a response may have behind a prompt of so many, of which the first ones are cut off."""
        kept = min(prompt, self.max_prompt_tokens)
        return self.max_response_tokens if self.max_tokens is None else min(
            self.max_response_tokens, max(1, self.max_tokens - kept))


@dataclass(frozen=True)
class Prompt:
    """A prompt: its tokens, what was said in it and its place in the file. messages: () where it is plain text.

    row: the fields of the row that it comes from. for_teacher: what a teacher reads in its place; () where the same.
    """

    ids: Ids
    text: str       # as written, without what a chat template adds; whole where ids are cut
    where: str      # "prompts.jsonl:12"
    messages: tuple[Message, ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    for_teacher: Ids = field(default=(), repr=False)


@dataclass(frozen=True)
class Example:
    """A text to learn from, or to measure perplexity on."""

    ids: Ids
    scored: tuple[bool, ...]        # True: the token is scored, predicted from those before it; never the first
    where: str


@dataclass(frozen=True)
class Counts:
    """What became of the rows: read = kept + dropped + skipped, and truncated rows are among the kept.

    notes: what else there is to say of them.
    """

    read: int
    kept: int
    truncated: int
    dropped: int
    skipped: int
    notes: tuple[str, ...] = ()


def counts_line(source: str, counts: Counts) -> str:
    """One line on a file that was read: every row accounted for."""
    other = {"truncated": counts.truncated, "dropped as over-long": counts.dropped, "skipped as faulty": counts.skipped}
    rest = [f"{number} {what}" for what, number in other.items() if number]
    line = f"{source}: {counts.kept} of {counts.read} rows" + (f" ({', '.join(rest)})" if rest else "")
    return "; ".join((line, *counts.notes))


def seen_note(source: str, what: str, rows: Sequence[Hashable], trained: Collection[Hashable]) -> str | None:
    """A line on held-out rows that are trained on as well; None where there are none. Each row is its tokens."""
    seen = sum(row in trained for row in rows)
    if not seen:
        return None
    all_of_them = "; nothing is held out, and what is measured on them says nothing of others" * (seen == len(rows))
    return f"note: {source}: {seen} of {len(rows)} held-out {what} are among the training rows{all_of_them}"


def prompt_ids(example: "Example") -> Ids:
    """The tokens before the first scored one."""
    return example.ids[: example.scored.index(True)]


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
    forms = FormOfFile(PROMPT_FORMS)

    def build(row: Row, encoder: Encoder) -> tuple[Prompt, bool]:
        prompt, cut = fitted_prompt(encoder, rules, row.where, prompt_of(row.fields, forms.of(row.fields)))
        return replace(prompt, row=row.fields), cut

    return collect_rows(source, forms, build, tokenizer, rules, rows)


def fitted_prompt(
    encoder: Encoder, rules: RowRules, where: str, asked: Asked, responses: Iterable[Ids] = ()
) -> tuple[Prompt, bool]:
    """A prompt in tokens, within the limits, and whether it or a response to it has to be cut for that."""
    ids, text, messages = encoder.prompt(asked)
    truncated = rules.must_cut(len(ids), *map(len, responses))
    ids = last_tokens(ids, rules.max_prompt_tokens, encoder.tokenizer.bos_token_id)
    return Prompt(ids, text, where, messages), truncated


def load_examples(
    source: str, tokenizer: "PreTrainedTokenizerBase", rules: RowRules
) -> tuple[list[Example], Counts]:
    """Read texts to learn from: rows of ``{"text"}``, ``{"prompt", "response"}`` or ``{"messages"}``.

    Prompt and response are texts, or messages of which the response's are learnt.
    Scored are all tokens of a text but the first; the response and its end token; every turn of the assistant. A
    conversation is one example, or one for each answer where the chat template rewrites earlier turns.
    For the limits the prompt is what comes before the first scored token, the response all the rest. Errors as
    ``load_prompts``; each example has at least one scored token.
    """
    forms = FormOfFile(TEXT_FORMS)

    def build(row: Row, encoder: Encoder) -> tuple[list[Example], bool]:
        form = forms.of(row.fields)
        if encoder.uses_chat(messages=are_messages(row.fields, form)):
            found = encoder.conversation(answered_messages(row.fields, form), rules.turns)
        else:
            found = [_plain_example(row, form, encoder)]
        fitted = [_fitted_example(rules, tokenizer.bos_token_id, row.where, *one) for one in found]
        return [example for example, _ in fitted], any(truncated for _, truncated in fitted)

    rows, counts = collect_rows(source, forms, build, tokenizer, rules)
    examples = [example for row in rows for example in row]
    if len(examples) > len(rows):
        split = f"{len(examples)} examples of them, because the chat template writes earlier answers in another way"
        counts = replace(counts, notes=(split, *counts.notes))
    return examples, counts


def _fitted_example(
    rules: RowRules, bos: int | None, where: str, ids: Ids, scored: tuple[bool, ...]
) -> tuple[Example, bool]:
    start = scored.index(True)
    truncated = rules.must_cut(start, len(ids) - start)
    prompt = last_tokens(ids[:start], rules.max_prompt_tokens, bos)
    end = start + rules.response_room(start)
    return Example(prompt + ids[start:end], (False,) * len(prompt) + scored[start:end], where), truncated


def _plain_example(row: Row, form: Form, encoder: Encoder) -> Scored:
    if form == ("text",):
        ids = encoder.ended(encoder.first_ids(text_field(row.fields, "text")))
        unscored = 1        # nothing comes before the first token that it could be predicted from
    else:
        asked, said = (text_field(row.fields, name) for name in form)
        prompt = encoder.first_ids(asked, from_end=True)
        ids, unscored = prompt + encoder.response_ids(said, asked), len(prompt)
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
    source: str, forms: FormOfFile, build: Build[Item], tokenizer: "PreTrainedTokenizerBase", rules: RowRules,
    rows: Iterable[Row] | None = None,
) -> tuple[list[Item], Counts]:
    """Build every row of a source, or of ``rows`` in its place, by the rules, and count what becomes of it.

    forms: what ``build`` tells the form of a row by.

    Raises:
        DataError: too many rows are faulty, each is named with its place; or none is left.
    """
    kept: list[Item] = []
    faults: list[str] = []
    read = truncated = dropped = 0
    encoder = rules.encoder(tokenizer)
    layout = rules.layout(encoder)
    for row in read_rows(source) if rows is None else rows:
        read += 1
        encoder.where = row.where
        if row.note:
            layout.notes[row.note] = None
        try:
            item, cut = build(layout.of(row), encoder)
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
    too_many = beyond_skipping(len(faults), read)
    if faults and (too_many or rules.on_bad_row == "error"):
        advice = f"data.on_bad_row: skip leaves out {SKIPPED_PERCENT} % of the rows at most"
        raise _refusal(source, faults, read, f"{advice}; these are more." if too_many else f"{advice}.")
    if not kept:
        raise DataError(f"{source}: no row is left of {read} ({dropped} too long and dropped, {len(faults)} faulty).")
    notes = (*layout.notes, *forms.notes, *transcript_note(layout, encoder), *encoder.notes())
    return kept, Counts(read, len(kept), truncated, dropped, len(faults), notes)


def beyond_skipping(faults: int, read: int) -> bool:
    """Whether more of the rows are faulty than ``on_bad_row: skip`` leaves out; of fewer than 100, any is."""
    return 100 * faults > SKIPPED_PERCENT * read


def transcript_note(layout: Layout, encoder: Encoder) -> tuple[str, ...]:
    """That transcripts became messages, with the first of them as the chat template writes it; () if none did."""
    if layout.transcript is None:
        return ()
    text = encoder.chat.render(layout.transcript, to_answer=False)
    shown = text if len(text) <= SHOWN_LETTERS else text[:SHOWN_LETTERS] + "..."
    return (f"transcripts are read as messages, the first of them as {shown!r} (data.transcripts: text reads them as "
            "they are)",)


def _refusal(source: str, faults: list[str], read: int, advice: str) -> DataError:
    listed = faults[:LISTED_FAULTS]
    more = [f"and {len(faults) - len(listed)} more"] if len(faults) > len(listed) else []
    summary = f"{len(faults)} faulty {'row' if len(faults) == 1 else 'rows'} in {read} read"
    lines = [f"{source}: {summary}", *(f"  {line}" for line in listed + more), *([advice] if advice else [])]
    return DataError("\n".join(lines))
