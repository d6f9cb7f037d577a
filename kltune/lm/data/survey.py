"""What a file of rows holds, before there is a recipe for it: form, columns, lengths, and what is wrong with it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kltune.errors import DataError
from kltune.lm.data.chat import ChatTemplate, template_of
from kltune.lm.data.encoding import Encoder
from kltune.lm.data.examples import beyond_skipping
from kltune.lm.data.forms import (
    LABELLED_FORM,
    PAIR_FORMS,
    PROMPT_FORMS,
    TEXT_FORMS,
    Asked,
    Form,
    answered_messages,
    are_messages,
    columns_advice,
    label_of,
    likely_columns,
    message_list,
    prompt_and,
    prompt_of,
    sides_of,
    text_field,
)
from kltune.lm.data.layouts import Layout
from kltune.lm.data.rows import Row, RowFault, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
ENCODED = 500               # rows whose tokens are counted
KINDS: dict[str, tuple[Form, ...]] = {      # by the key of a recipe, in the order in which a file is tried
    "pairs": (*PAIR_FORMS, LABELLED_FORM), "texts": TEXT_FORMS, "prompts": PROMPT_FORMS,
}
PLAIN_TEMPLATE = (          # for a model that was never taught one
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass
class Survey:
    """What was found in a file.

    kind: the key of ``data`` that it belongs to. columns: for ``data.columns``. messages: rows are messages, or become
    them. template: for ``data.template``. answered: prompts that end with an answer, which is none to be answered.
    prompt_tokens, response_tokens: of the first rows. faults: rows that cannot be read, each with its place.
    """

    kind: str
    form: Form
    columns: dict[str, str]
    rows: int = 0
    messages: bool = False
    template: str = "auto"
    answered: bool = False
    prompt_tokens: list[int] = field(default_factory=list)
    response_tokens: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def survey_of(source: str, tokenizer: "PreTrainedTokenizerBase", kinds: tuple[str, ...]) -> Survey:
    """Read a file of one of some kinds, whichever of them its first row is.

    Raises:
        DataError: it cannot be read, is of none of the kinds, or more of its rows are faulty than may be left out.
    """
    chat = bool(template_of(tokenizer))
    found = _kind_of(source, kinds, chat)
    layout = Layout(found.columns, transcripts=chat)
    if not chat:
        tokenizer.chat_template = PLAIN_TEMPLATE        # to count by, in the one that the recipe will name
    for row in read_rows(source):
        found.rows += 1
        try:
            asked, responses = _parsed(layout.of(row), found)
            if found.rows == 1:
                found.messages = isinstance(asked, list)
                plain = not found.messages and asked is not None and not str(asked).rstrip().endswith("Assistant:")
                found.template = "chat" if chat and plain else "auto"
                encoder = Encoder(tokenizer, found.template, end_token=tokenizer.eos_token_id)
            if found.rows <= ENCODED:
                found.prompt_tokens.append(len(encoder.prompt(asked)[0]) if asked is not None else 0)
                said = [encoder.following_ids(text) for text in responses]
                if len(said) == 2 and said[0] == said[1]:
                    raise RowFault('"chosen" and "rejected" are the same tokens')
                found.response_tokens += [len(ids) + 1 for ids in said]
        except RowFault as fault:
            found.faults.append(f"{row.where}: {fault}")
            if found.rows == 1:
                raise DataError(f"{source}: {found.faults[0]}") from fault
    if beyond_skipping(len(found.faults), found.rows):
        raise DataError(f"{source}: {len(found.faults)} of {found.rows} rows are faulty, as {found.faults[0]}")
    found.notes = tuple(layout.notes)
    if layout.transcript is not None:
        text = ChatTemplate(tokenizer).render(layout.transcript, to_answer=False)
        found.notes += (f"transcripts are read as messages, the first of them as {text[:200]!r}",)
    return found


def unanswered(source: str, columns: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Rows of prompts, of conversations that end with an answer: without it."""
    layout = Layout(columns)
    for row in read_rows(source):
        messages = layout.of(row).fields["messages"]
        yield {"messages": messages[:-1] if messages[-1]["role"] == "assistant" else messages}


def _kind_of(source: str, kinds: tuple[str, ...], chat: bool) -> Survey:
    first = next((row for row in read_rows(source)), None)
    if first is None:
        raise DataError(f"{source} has no rows.")
    if first.fault:
        raise DataError(f"{source}: {first.where}: {first.fault}.")
    try:
        fields = Layout(transcripts=chat).of(first).fields
    except RowFault as fault:
        raise DataError(f"{source}: {first.where}: {fault}.") from fault
    for kind in kinds:
        for form in KINDS[kind]:
            if all(fields.get(name) is not None for name in form):
                return Survey(kind, form, {})
    for kind in kinds:
        for form in KINDS[kind]:
            columns = likely_columns(first.fields, form)
            if all(name in columns or first.fields.get(name) is not None for name in form):
                return Survey(kind, form, columns)
    ours = {name for kind in kinds for form in KINDS[kind] for name in form}
    if null := next((name for name in first.fields if name in ours and first.fields[name] is None), None):
        raise DataError(f'{source}: {first.where}: field "{null}": found null, wanted a value; take such rows out.')
    wanted = " or ".join(", ".join(form) for kind in kinds for form in KINDS[kind])
    names = ", ".join(first.fields) or "no field"
    forms = sorted((form for kind in kinds for form in KINDS[kind]), key=len)
    raise DataError(f"{source}: {first.where}: found {names}; wanted {wanted}{columns_advice(fields, forms)}. That is "
                    "for a recipe (kltune recipe copy start/sft); or change the file.")


def _parsed(row: Row, found: Survey) -> tuple[Asked | None, list[str]]:
    """What is asked in a row, None where nothing is, and what is said; RowFault if it is faulty."""
    fields, form = row.fields, found.form
    if found.kind == "prompts":
        if form == ("messages",):
            messages = message_list(fields)
            found.answered |= messages[-1]["role"] == "assistant"
            return (messages[:-1] if messages[-1]["role"] == "assistant" else messages), []
        return prompt_of(fields, form), []
    if found.kind == "pairs":
        if form == LABELLED_FORM:
            label_of(fields)
            asked, response = prompt_and(fields, "prompt", ("response",))
            return asked, [response]
        asked, *sides = sides_of(fields, form)
        return asked, sides
    if form == ("text",):
        return None, [text_field(fields, "text")]
    if are_messages(fields, form):
        messages = answered_messages(fields, form)
        last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
        return messages[:last], [messages[last]["content"]]
    return text_field(fields, "prompt"), [text_field(fields, "response")]
