"""What a row of prompts or texts must hold, and which of the accepted forms it has."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from kltune.errors import DataError
from kltune.lm.data.rows import RowFault, describe, has_surrogate

Form = tuple[str, ...]
Message = dict[str, Any]            # {"role": ..., "content": ...}: texts; what else a chat template may read is kept
Asked = str | list[Message]         # a prompt as text, or as messages that the assistant has still to answer
SIDES = ("chosen", "rejected")
TEXT_FORMS: tuple[Form, ...] = (("text",), ("prompt", "response"), ("messages",))
PAIR_FORMS: tuple[Form, ...] = (("prompt", *SIDES), ("messages", *SIDES), SIDES)
LABELLED_FORM: Form = ("prompt", "response", "label")
PROMPT_FORMS: tuple[Form, ...] = (*PAIR_FORMS, ("prompt",), ("messages",))      # a file of pairs has prompts in it too
TRANSCRIPT = "\n\nAssistant:"       # what an answer follows in the transcripts of Anthropic's hh-rlhf
# what our fields are called in sets of others, lower case
OTHER_NAMES = {
    "prompt": ("question", "query", "instruction", "input", "user", "problem", "ask", "request", "user_input"),
    "response": ("answer", "output", "completion", "reply", "assistant", "solution", "target", "model_output"),
    "text": ("content", "story", "document", "body", "sentence"),
    "messages": ("conversation", "conversations", "dialogue", "dialog", "chat", "turns"),
    "chosen": ("preferred", "accepted", "winner", "good", "response_chosen", "chosen_response", "positive"),
    "rejected": ("dispreferred", "refused", "loser", "bad", "response_rejected", "rejected_response", "negative"),
    "label": ("is_good", "thumbs_up", "liked"),
}
# Fields beside a prompt that the policy has to be asked as well: they become messages before it (layouts.py) ...
BEFORE = {
    "system": "is the system message", "system_prompt": "is the system message",
    "history": "are turns before the prompt",
}
# ... and those that cannot: a row with something in one is faulty
NO_TOOLS = ("descriptions of tools, which kltune does not give to the chat template, so that the policy would be asked "
            "without them; write them into a system message, and take it out")
NO_PICTURES = "kltune trains on text alone, so that the policy would be asked without them; leave such rows out"
NOT_GIVEN = {
    "tools": NO_TOOLS, "functions": NO_TOOLS, "images": NO_PICTURES, "videos": NO_PICTURES, "audios": NO_PICTURES,
    "chat_template_kwargs": "what the chat template is told in this row, which kltune does not tell it; give a "
                            "template that needs none as data.chat_template, and take it out",
}
LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}     # CSV has only text
# Who may speak after whom; None is the start of the conversation.
NEXT_ROLES: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
ROLES = ("system", "user", "assistant", "tool")
MAY_BE_EMPTY = ("system", "tool")
WEIGHT = "weight"           # of an answer that is given: 0 is not learnt from
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
CALLS = "tool_calls"
LARGEST_MARGIN = 1e30       # of score: a batch of them still has a finite sum in float32


class MixedForms(RowFault):
    """A row has another form than the rows before it: the file as a whole is refused."""


class FormOfFile:
    """The one form that all rows of a source have: that of the first row which is complete in one.

    Fields beyond those of the form are extra fields and ignored. A first row that is complete in two forms has the
    one that stands first in ``forms``. A field that is null counts as absent here, because Parquet and ``datasets``
    give every row the fields of all. ``notes`` says so where the first row has a second form of other fields.
    """

    def __init__(self, forms: tuple[Form, ...]):
        self.forms = forms
        self.form: Form | None = None
        self.notes: tuple[str, ...] = ()

    def of(self, fields: dict[str, Any]) -> Form:
        """The form of a row; the fields' values are not looked at yet.

        Raises:
            MixedForms: the row is complete in another form than the rows before.
            RowFault: the row is complete in none, and has no field that says which one is meant.
        """
        complete = [form for form in self.forms if all(fields.get(name) is not None for name in form)]
        if self.form is None and complete:
            self.form = complete[0]
            others = [form for form in complete if not set(form) & set(self.form)]
            self.notes = tuple(f"rows are read as {_names(self.form)}, not as {_names(form)}, which they have too"
                               for form in others[:1])
        partly = complete and self.form and set(complete[0]) < set(self.form)      # a field of the form is null
        if complete and self.form not in complete and not partly:
            raise MixedForms(f"found a row with {_names(complete[0])}, the rows before it have {_names(self.form)}; "
                             "wanted one form in a file")
        if self.form is not None:
            return self.form
        begun = closest(fields, self.forms)
        if begun is None:
            least = [form for form in self.forms if not any(set(other) < set(form) for other in self.forms)]
            wanted = " or ".join(_names(form) for form in sorted(least, key=len))
            found = _names(fields) if fields else "an object without fields"
            raise RowFault(f"wanted {wanted}, found {found}{columns_advice(fields, least)}")
        absent = [name for name in begun if fields.get(name) is None]
        if named := likely_columns(fields.keys() - {*begun}, absent):
            found = "found null" if absent[0] in fields else "missing"
            raise RowFault(f'field "{absent[0]}": {found}{_columns(named)}')
        return begun


def closest(fields: Mapping[str, Any], forms: Sequence[Form]) -> Form | None:
    """The first form that a row is complete in, else the one of which it has the most fields; None if it has none."""
    filled = {name for name, value in fields.items() if value is not None}
    complete = next((form for form in forms if filled >= {*form}), None)
    best = complete or max(forms, key=lambda form: (len(filled & {*form}), len(fields.keys() & {*form})))
    return best if fields.keys() & {*best} else None


def likely_columns(names: Iterable[str], form: Form) -> dict[str, str]:
    """Which of some columns may be meant by the fields of a form that are not among them, by our names."""
    known = {name.lower().strip(): name for name in names}
    guesses = {
        ours: next((known[other] for other in (ours, *OTHER_NAMES.get(ours, ())) if other in known), None)
        for ours in form
    }
    return {ours: theirs for ours, theirs in guesses.items() if theirs is not None and theirs != ours}


def columns_advice(fields: Mapping[str, Any], forms: Sequence[Form]) -> str:
    """How to name the columns of a row, of the form of which the most can be guessed; or where its rows are instead."""
    if not fields:
        return ""
    objects, texts = (
        next((name for name, value in fields.items()
              if isinstance(value, list) and value and isinstance(value[0], kind)), None)
        for kind in (dict, str)
    )
    if objects is not None:
        return f'; if the rows are the list under "{objects}", write it alone: jq .{objects} FILE > rows.json'
    best = max((likely_columns(fields, form) for form in forms), key=len, default={})
    usual = next((form for form in forms if form[0] == "prompt"), next(iter(forms)))
    if texts is not None and not best:
        return (f'; if each text of the list under "{texts}" is a row, write them so: '
                f"jq -c '.{texts}[] | {{{usual[0]}: .}}' FILE > rows.jsonl")
    return _columns(best or dict(zip(usual, fields, strict=False)))


def _columns(named: Mapping[str, str]) -> str:
    """The line to write in a recipe; what YAML would read otherwise is quoted."""
    pairs = []
    for ours, theirs in named.items():
        plain = re.fullmatch(r"[\w-]+", theirs) and yaml.safe_load(theirs) == theirs
        pairs.append(f"{ours}: {theirs if plain else json.dumps(theirs, ensure_ascii=False)}")
    return f"; name the columns, as data.columns: {{{', '.join(pairs)}}}"


def _names(names: Any) -> str:
    return ", ".join(f'"{name}"' for name in names)


def text_field(fields: dict[str, Any], name: str, label: str = "", *, empty: bool = False) -> str:
    """The text of a field of a row or message, which may be ``empty``; a fault names it by its label.

    Raises:
        RowFault: missing, null, no text, empty, only white space, or text with a NUL or half a surrogate pair.
    """
    label = label or f'field "{name}"'
    if name not in fields:
        raise RowFault(f"{label}: missing, wanted non-empty text")
    value = fields[name]
    if not isinstance(value, str) or not (empty or value.strip()):
        raise RowFault(f"{label}: found {describe(value)}, wanted non-empty text")
    if "\0" in value:
        raise RowFault(f"{label}: found a NUL character at character {value.index(chr(0)) + 1}, wanted text")
    if has_surrogate(value):
        raise RowFault(f"{label}: found half of a surrogate pair, wanted text that can be written as UTF-8")
    return value


def message_list(fields: dict[str, Any], name: str = "messages", before: str | None = None) -> list[Message]:
    """The messages in a field of a row: role and content of each, in an order that a conversation can have.

    before: the role that spoke before the first of them; None at the start of a conversation.

    Raises:
        RowFault: no list, empty, a message without role or content, an unknown role, or a role out of turn.
    """
    value = fields.get(name)
    if not isinstance(value, list) or not value:
        found = "found an empty list" if isinstance(value, list) else f"found {describe(value)}"
        here = found if name in fields else "missing"
        raise RowFault(f'field "{name}": {here}, wanted a list of {{"role", "content"}}')
    messages: list[Message] = []
    for index, message in enumerate(value):
        messages.append(_checked_message(message, f"{name}[{index}]", messages[-1]["role"] if messages else before))
    return messages


def _checked_message(message: Any, label: str, before: str | None) -> Message:
    if not isinstance(message, dict):
        raise RowFault(f'field "{label}": found {describe(message)}, wanted {{"role", "content"}}')
    role = text_field(message, "role", f'field "{label}.role"')
    if role not in ROLES:
        raise RowFault(f'field "{label}.role": found {json.dumps(role)}, wanted {", ".join(ROLES)}')
    if role not in NEXT_ROLES[before]:
        after = f"after {before}" if before else "as the first role"
        raise RowFault(f'field "{label}.role": found {role} {after}, wanted {" or ".join(NEXT_ROLES[before])}')
    more = {name: _without_nulls(value) for name, value in message.items() if value is not None}
    calls = role == "assistant" and bool(more.get(CALLS))
    content = _content(message.get("content", "" if calls else None), label)
    if calls and content is None:
        content = ""
    if more.get(WEIGHT, 1) not in (0, 1):
        raise RowFault(f'field "{label}.{WEIGHT}": found {describe(more[WEIGHT])}, wanted 0 or 1')
    text = text_field({"content": content}, "content", f'field "{label}.content"', empty=calls or role in MAY_BE_EMPTY)
    return more | {"role": role, "content": text}


def _without_nulls(value: Any) -> Any:
    """A value without what is null in it: Parquet and ``datasets`` give every object the fields of all."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _content(value: Any, label: str) -> Any:
    """The text of a message whose content is a list of text parts; anything else as it is."""
    if not isinstance(value, list):
        return value
    for number, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            found = f"a part of type {json.dumps(kind)}" if isinstance(kind, str) else describe(part)
            raise RowFault(f'field "{label}.content[{number}]": found {found}, wanted {{"type": "text", "text": ...}}: '
                           "kltune trains on text alone")
    return "".join(part["text"] for part in value)


def spoken_text(message: Message, label: str) -> str:
    """The content of an answer that has to be text alone; RowFault if it also calls tools, or thinks apart."""
    more = next((name for name in (CALLS, *THOUGHTS) if message.get(name)), None)
    if more is not None:
        raise RowFault(f'field "{label}.{more}": an answer that is compared is its content alone; write what the '
                       "assistant says there, or take the field out")
    return message["content"]


def answered_messages(fields: dict[str, Any], form: Form) -> list[Message]:
    """A text as messages with at least one of the assistant to learn from, whose weight is not 0.

    A prompt and a response become user and assistant, if they are texts; of messages only the response's are learnt.

    Raises:
        RowFault: the row is faulty, or the assistant says nothing in it that is to be learnt.
        DataError: the rows are whole texts, in which nobody says who speaks.
    """
    if form == ("text",):
        raise DataError('data.template: chat cannot be used with rows of "text": nothing in them says who speaks; '
                        "wanted data.template: none, or rows with \"prompt\" and \"response\", or with \"messages\".")
    if form == ("prompt", "response"):
        asked = [message | ({WEIGHT: 0} if message["role"] == "assistant" else {})
                 for message in as_messages(_asked(fields, "prompt"))]
        if isinstance(fields["response"], list):
            messages = asked + message_list(fields, "response", before=asked[-1]["role"])
        else:
            messages = [*asked, {"role": "assistant", "content": text_field(fields, "response")}]
    else:
        messages = message_list(fields)
    if not any(is_learnt(message) for message in messages):
        raise RowFault(f'field "{form[-1]}": found no message of the assistant, wanted at least one'
                       + (f", with a {WEIGHT} that is not 0" if any(WEIGHT in message for message in messages) else ""))
    return messages


def is_learnt(message: Message) -> bool:
    """Whether a message is an answer to learn from."""
    return message["role"] == "assistant" and message.get(WEIGHT, 1) != 0


def are_messages(fields: Mapping[str, Any], form: Form) -> bool:
    """Whether a text is messages, or prompt and response of which one is."""
    return form == ("messages",) or any(isinstance(fields.get(name), list) for name in form)


def label_of(fields: dict[str, Any]) -> bool:
    """Whether the response of a row is a wanted one; RowFault if the label is none of true, false, 1 and 0."""
    value = fields.get("label")
    key = value.strip().lower() if isinstance(value, str) else value
    if isinstance(key, bool | int | float | str) and key in LABELS:
        return LABELS[key]
    here = describe(value) if "label" in fields else "nothing"
    raise RowFault(f'field "label": found {here}, wanted true or false (1 or 0)')


def margin_of(fields: dict[str, Any]) -> float:
    """How much better the chosen response of a row is said to be, of score, at least 0; 0 if it does not say."""
    value = fields.get("margin")
    if value is None:
        return 0.0
    try:
        margin = math.nan if isinstance(value, bool) else float(value)      # CSV has only text
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not 0.0 <= margin <= LARGEST_MARGIN:
        wanted = f"a number of at least 0, {LARGEST_MARGIN:g} at most"
        raise RowFault(f'field "margin": found {describe(value)}, wanted {wanted}')
    return margin


def sides_of(fields: dict[str, Any], form: Form) -> tuple[Asked, str, str]:
    """The prompt of a pair, and what was chosen and rejected: responses that are not empty, and differ."""
    asked, chosen, rejected = _read_together(fields, form) or prompt_and(fields, form[0], SIDES)
    for side, text in zip(SIDES, (chosen, rejected), strict=True):
        if not text.strip():
            raise RowFault(f'field "{side}": found nothing behind the prompt that both share, wanted a response')
    if chosen == rejected:
        raise RowFault('"chosen" and "rejected" are equal, wanted two different responses')
    return asked, chosen, rejected


def prompt_of(fields: dict[str, Any], form: Form) -> Asked:
    """The prompt of a row of prompts or of pairs; what a pair says in answer to it is not looked at."""
    together = _read_together(fields, form) if form in PAIR_FORMS else None
    return together[0] if together else _asked(fields, form[0])


def _read_together(fields: dict[str, Any], form: Form) -> tuple[Asked, str, str] | None:
    """A pair whose sides repeat the prompt, taken apart; None where the sides are the responses alone."""
    listed = [isinstance(fields.get(side), list) for side in SIDES]
    if form == SIDES:
        return _conversations(fields) if any(listed) else _transcripts(fields)
    if not all(listed):
        return None
    first = next(iter(fields["chosen"]), None)
    if isinstance(first, dict) and first.get("role") == "assistant":
        return None
    asked, *said = _conversations(fields)
    value = fields.get(form[0])
    if value != asked and value not in [message["content"] for message in asked if message["role"] == "user"]:
        raise RowFault(
            f'field "{form[0]}": not the prompt that "chosen" and "rejected" begin with; remove one of the two'
        )
    return asked, *said


def _transcripts(fields: dict[str, Any]) -> tuple[str, str, str]:
    chosen, rejected = (text_field(fields, side) for side in SIDES)
    letters = zip(chosen, rejected, strict=False)
    shared = next((at for at, (a, b) in enumerate(letters) if a != b), min(len(chosen), len(rejected)))
    start = chosen.rfind(TRANSCRIPT, 0, shared)
    if start < 0:
        named = likely_columns(fields, ("prompt",))
        raise RowFault(
            f'"chosen" and "rejected" share no beginning that ends with {TRANSCRIPT!r}; wanted two transcripts of one '
            f'conversation, or a field "prompt"{_columns(named) if named else ""}'
        )
    start += len(TRANSCRIPT)
    return chosen[:start], chosen[start:], rejected[start:]


def _conversations(fields: dict[str, Any]) -> tuple[list[Message], str, str]:
    both = [message_list(fields, side) for side in SIDES]
    for side, messages in zip(SIDES, both, strict=True):
        if messages[-1]["role"] != "assistant":
            raise RowFault(f'field "{side}": found {messages[-1]["role"]} in the last message, wanted assistant')
    chosen, rejected = both
    if chosen[:-1] != rejected[:-1]:
        raise RowFault('"chosen" and "rejected" differ before their last message, wanted one prompt for both')
    place = len(chosen) - 1
    said = [spoken_text(messages[-1], f"{side}[{place}]") for side, messages in zip(SIDES, both, strict=True)]
    return chosen[:-1], *said


def prompt_and(fields: dict[str, Any], name: str, sides: tuple[str, ...]) -> tuple[Any, ...]:
    """The prompt in the field ``name``, and the responses in the fields ``sides``; each a text, or messages."""
    return _asked(fields, name), *(_answer(fields, side) for side in sides)


def _asked(fields: dict[str, Any], name: str) -> Asked:
    if name == "messages" or isinstance(fields.get(name), list):
        messages = message_list(fields, name)
        if messages[-1]["role"] == "assistant":
            raise RowFault(f'field "{name}[{len(messages) - 1}].role": found assistant in the last message of a '
                           "prompt, wanted system, user or tool")
        return messages
    text = text_field(fields, name)
    answers = (fields.get(side) for side in (*SIDES, "response"))
    return as_messages(text) if any(isinstance(answer, list) for answer in answers) else text


def _answer(fields: dict[str, Any], side: str) -> str:
    if not isinstance(fields.get(side), list):
        return text_field(fields, side)
    messages = message_list(fields, side, before="user")
    if len(messages) > 1:
        raise RowFault(f'field "{side}": found {len(messages)} messages, wanted one of the assistant')
    return spoken_text(messages[0], f"{side}[0]")


def as_messages(asked: Asked) -> list[Message]:
    """A prompt as messages: a text is one of the user; DataError for a transcript, which says already who speaks."""
    if not isinstance(asked, str):
        return asked
    if asked.endswith(TRANSCRIPT):
        raise DataError(
            f"data.template: chat cannot be used with prompts that end with {TRANSCRIPT!r}: they say already who "
            "speaks; wanted data.template: none, or data.transcripts: messages, or rows of messages."
        )
    return [{"role": "user", "content": asked}]
