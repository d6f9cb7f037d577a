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
Build = Callable[[Row], tuple[Item, bool] | None]        # the item and whether it was truncated; None: dropped


@dataclass(frozen=True)
class Prompt:
    """What the policy is asked."""

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


def described(source: str, counts: Counts) -> str:
    """One line on a file that was read: every row accounted for."""
    rest = [
        f"{number} {what}"
        for what, number in (
            ("truncated", counts.truncated),
            ("dropped as over-long", counts.dropped),
            ("skipped as faulty", counts.skipped),
        )
        if number
    ]
    return f"{source}: {counts.kept} of {counts.read} rows" + (f" ({', '.join(rest)})" if rest else "")


def distinct(prompts: list[Prompt]) -> list[Prompt]:
    """Each prompt once: pairs repeat theirs, and what is answered twice counts as one where errors are by prompt."""
    return list({prompt.ids: prompt for prompt in prompts}.values())


def row_rules(data: DataSection) -> dict[str, str]:
    """What a recipe says of rows in general, as the loaders take it."""
    return {"template": data.template, "on_overlong": data.on_overlong, "on_bad_row": data.on_bad_row}


def load_prompts(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_tokens: int,
    template: str,
    on_overlong: str,
    on_bad_row: str,
    rows: Iterable[Row] | None = None,
) -> tuple[list[Prompt], Counts]:
    """Read prompts: rows of ``{"prompt"}`` or ``{"messages"}``, or of pairs (pairs.py), one form in a file.

    Args:
        source: a JSONL, CSV or Parquet file, or a dataset (rows.py).
        tokenizer: the policy's.
        max_tokens: the longest prompt, in tokens with bos.
        template: auto (chat template if the rows are messages), none, or chat (a prompt is one user message).
        on_overlong: truncate (from the left, keeping bos), drop, or error (the row is faulty).
        on_bad_row: error, or skip (at most 1 % of the rows, or one row).
        rows: what was typed instead; ``source`` is then only what faults are told of.

    Returns:
        The prompts in the order of the source, none without a token, and the counts.

    Raises:
        DataError: faulty rows, each named with its place; no row left; or a source that cannot be read.
    """
    encoder, forms = Encoder(tokenizer, template), FormOfFile(PROMPT_FORMS)

    def build(row: Row) -> tuple[Prompt, bool] | None:
        form = forms.of(row.fields)
        asked = prompt_of(row.fields, form)
        if encoder.uses_chat(messages=not isinstance(asked, str)):
            ids = encoder.plain(encoder.render(as_messages(asked), to_answer=True))
            text = encoder.readable(ids)
        else:
            ids, text = encoder.opening(asked), asked
        too_long = len(ids) > max_tokens
        if too_long and not to_truncate(
            on_overlong, f"the prompt has {len(ids)} tokens, wanted at most {max_tokens} (data.max_prompt_tokens)"
        ):
            return None
        return Prompt(last_tokens(ids, max_tokens, tokenizer.bos_token_id), text, row.where), too_long

    return collect_rows(source, build, on_bad_row, rows)


def load_examples(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    end_token: int | None,
    max_prompt_tokens: int,
    max_response_tokens: int,
    template: str,
    on_overlong: str,
    on_bad_row: str,
) -> tuple[list[Example], Counts]:
    """Read texts to learn from: rows of ``{"text"}``, ``{"prompt", "response"}`` or ``{"messages"}``.

    Scored are all tokens of a text but the first; the response and its end token; every turn of the assistant.
    For the limits the prompt is what comes before the first scored token, the response all the rest.

    Args:
        source: a JSONL, CSV or Parquet file, or a dataset (rows.py).
        tokenizer: the policy's.
        end_token: id of the token that ends a text or response, appended to both; None appends none. In messages the
            chat template has to write it.
        max_prompt_tokens: the longest prompt, in tokens with bos.
        max_response_tokens: the longest response, in tokens with the end token.
        template: auto (chat template if the rows are messages), none, or chat (prompt and response are one message of
            the user and one of the assistant).
        on_overlong: truncate (prompts from the left, keeping bos; responses from the right, then without the end
            token, because the text does not end there), drop, or error (the row is faulty).
        on_bad_row: error, or skip (at most 1 % of the rows, or one row).

    Returns:
        The examples in the order of the source, each with at least one scored token, and the counts.

    Raises:
        DataError: faulty rows, each named with its place; no row left; or a source that cannot be read.
    """
    encoder, forms = Encoder(tokenizer, template), FormOfFile(TEXT_FORMS)

    def build(row: Row) -> tuple[Example, bool] | None:
        form = forms.of(row.fields)
        if encoder.uses_chat(messages=form == ("messages",)):
            ids, scored = encoder.conversation(answered_messages(row.fields, form), end_token)
        else:
            ids, scored = _plain_example(row, form, encoder, end_token)
        start = scored.index(True)
        prompt, response = ids[:start], ids[start:]
        too_long = len(prompt) > max_prompt_tokens or len(response) > max_response_tokens
        if too_long and not to_truncate(
            on_overlong,
            f"the prompt has {len(prompt)} tokens, wanted at most {max_prompt_tokens} (data.max_prompt_tokens); "
            f"the response has {len(response)}, wanted at most {max_response_tokens} (data.max_response_tokens)",
        ):
            return None
        prompt = last_tokens(prompt, max_prompt_tokens, tokenizer.bos_token_id)
        response, spoken = response[:max_response_tokens], scored[start : start + max_response_tokens]
        return Example(prompt + response, (False,) * len(prompt) + spoken, row.where), too_long

    return collect_rows(source, build, on_bad_row)


def _plain_example(
    row: Row, form: Form, encoder: Encoder, end_token: int | None
) -> tuple[Ids, tuple[bool, ...]]:
    if form == ("text",):
        ids = encoder.opening(text_field(row.fields, "text"))
        unscored = 1        # nothing comes before the first token that it could be predicted from
    else:
        prompt = encoder.opening(text_field(row.fields, "prompt"))
        ids, unscored = prompt + encoder.continuing(text_field(row.fields, "response")), len(prompt)
    if end_token is not None and ids[-1] != end_token:
        ids += (end_token,)
    if len(ids) == unscored:
        raise RowFault(f'field "text": only {unscored} token, wanted at least one more that can be scored')
    return ids, (False,) * unscored + (True,) * (len(ids) - unscored)


def shuffled_positions(count: int, start: int, size: int, seed: int) -> list[int]:
    """Positions ``start`` to ``start + size`` of an endless stream of reshuffled epochs.

        epoch e = permutation of 0..count−1 drawn from default_rng([seed, e])

    It has no state: the same arguments give the same positions, so that a resumed run goes on exactly where it was.

    Args:
        count: rows in an epoch, at least 1.
        start: how many positions were used before.
        size: how many are wanted.
        seed: of the run; not negative.

    Returns:
        ``size`` positions in 0..count−1.

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


def to_truncate(on_overlong: str, lengths: str) -> bool:
    """Whether an over-long row is truncated (True) or dropped (False).

    Raises:
        RowFault: on ``error``, its lengths are its fault.
    """
    if on_overlong == "error":
        raise RowFault(lengths)
    return on_overlong == "truncate"


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
            built = build(row)
        except RowFault as fault:
            faults.append(f"{row.where}: {fault}")
            if isinstance(fault, MixedForms):
                raise _refusal(source, faults, read, "") from fault
            continue
        if built is None:
            dropped += 1
            continue
        kept.append(built[0])
        truncated += built[1]
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
    found = f"{len(faults)} faulty {'row' if len(faults) == 1 else 'rows'} in {read} read"
    lines = [f"{source}: {found}", *(f"  {line}" for line in listed + more), *([advice] if advice else [])]
    return DataError("\n".join(lines))
