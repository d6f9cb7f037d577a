"""What a row of prompts or texts must hold, and which of the accepted forms it has."""

import json
from typing import Any

from kltune.errors import DataError
from kltune.lm.rows import RowFault, describe, has_surrogate

Form = tuple[str, ...]
Message = dict[str, str]            # {"role": ..., "content": ...}

PROMPT_FORMS: tuple[Form, ...] = (("prompt",), ("messages",))
TEXT_FORMS: tuple[Form, ...] = (("text",), ("prompt", "response"), ("messages",))
PAIR_FORMS: tuple[Form, ...] = (
    ("prompt", "chosen", "rejected"), ("messages", "chosen", "rejected"), ("chosen", "rejected"),
)
LABELLED_FORM: Form = ("prompt", "response", "label")

# Who may speak after whom; None is the start of the conversation.
NEXT_ROLES: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
ROLES = ("system", "user", "assistant", "tool")


class MixedForms(RowFault):
    """A row has another form than the rows before it: the file as a whole is refused."""


class FormOfFile:
    """The one form that all rows of a source have: that of the first row which is complete in one.

    Fields beyond those of the form are extra fields and ignored. A first row that is complete in two forms has the
    one that stands first in ``forms``. A field that is null counts as absent here, because Parquet and ``datasets``
    give every row the fields of all.
    """

    def __init__(self, forms: tuple[Form, ...]):
        self.forms = forms
        self.form: Form | None = None

    def of(self, fields: dict[str, Any]) -> Form:
        """The form of a row; the fields' values are not looked at yet.

        Raises:
            MixedForms: the row is complete in another form than the rows before.
            RowFault: the row is complete in none, and has no field that says which one is meant.
        """
        complete = [form for form in self.forms if all(fields.get(name) is not None for name in form)]
        if self.form is None and complete:
            self.form = complete[0]
        partly = complete and self.form and set(complete[0]) < set(self.form)      # a field of the form is null
        if complete and self.form not in complete and not partly:
            raise MixedForms(f"found a row with {_names(complete[0])}, the rows before it have {_names(self.form)}; "
                             "wanted one form in a file")
        if self.form is not None:
            return self.form
        begun = [form for form in self.forms if any(name in fields for name in form)]
        if not begun:
            wanted = " or ".join(_names(form) for form in self.forms)
            raise RowFault(f"wanted {wanted}, found {_names(fields) if fields else 'an object without fields'}")
        return begun[0]


def _names(names: Any) -> str:
    return ", ".join(f'"{name}"' for name in names)


def text_field(fields: dict[str, Any], name: str, label: str = "") -> str:
    """The text of a field, as it is in the file.

    Args:
        fields: the row, or one message of it.
        name: the field.
        label: how a fault names the field; ``field "name"`` where not given.

    Raises:
        RowFault: missing, null, no text, empty, only white space, or text with a NUL or half a surrogate pair.
    """
    label = label or f'field "{name}"'
    if name not in fields:
        raise RowFault(f"{label}: missing, wanted non-empty text")
    value = fields[name]
    if not isinstance(value, str) or not value.strip():
        raise RowFault(f"{label}: found {describe(value)}, wanted non-empty text")
    if "\0" in value:
        raise RowFault(f"{label}: found a NUL character at character {value.index(chr(0)) + 1}, wanted text")
    if has_surrogate(value):
        raise RowFault(f"{label}: found half of a surrogate pair, wanted text that can be written as UTF-8")
    return value


def message_list(fields: dict[str, Any], name: str = "messages", before: str | None = None) -> list[Message]:
    """The messages in a field of a row: role and content of each, in an order that a conversation can have.

    Args:
        fields: the row.
        name: the field.
        before: the role that spoke before the first of them; None at the start of a conversation.

    Raises:
        RowFault: no list, empty, a message without role or content, an unknown role, or a role out of turn.
    """
    value = fields.get(name)
    if name not in fields:
        raise RowFault(f'field "{name}": missing, wanted a list of {{"role", "content"}}')
    if not isinstance(value, list) or not value:
        found = "an empty list" if isinstance(value, list) else describe(value)
        raise RowFault(f'field "{name}": found {found}, wanted a list of {{"role", "content"}}')
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
    return {"role": role, "content": text_field(message, "content", f'field "{label}.content"')}


def prompt_messages(fields: dict[str, Any], form: Form) -> list[Message]:
    """A prompt as messages that the assistant has still to answer; a plain prompt becomes one user message.

    Raises:
        RowFault: the row is faulty, or the assistant has the last word already.
    """
    if form == ("prompt",):
        return [{"role": "user", "content": text_field(fields, "prompt")}]
    return open_messages(fields, "messages")


def open_messages(fields: dict[str, Any], name: str) -> list[Message]:
    """The messages in a field, which the assistant has still to answer.

    Raises:
        RowFault: the field is faulty, or the assistant has the last word already.
    """
    messages = message_list(fields, name)
    if messages[-1]["role"] == "assistant":
        raise RowFault(f'field "{name}[{len(messages) - 1}].role": found assistant in the last message of a prompt, '
                       "wanted system, user or tool")
    return messages


def answered_messages(fields: dict[str, Any], form: Form) -> list[Message]:
    """A text as messages with at least one of the assistant; prompt and response become user and assistant.

    Raises:
        RowFault: the row is faulty, or the assistant says nothing in it.
        DataError: the rows are whole texts, in which nobody says who speaks.
    """
    if form == ("text",):
        raise DataError('data.template: chat cannot be used with rows of "text": nothing in them says who speaks; '
                        "wanted data.template: none, or rows with \"prompt\" and \"response\", or with \"messages\".")
    if form == ("prompt", "response"):
        prompt, response = text_field(fields, "prompt"), text_field(fields, "response")
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    messages = message_list(fields)
    if all(message["role"] != "assistant" for message in messages):
        raise RowFault('field "messages": found no message of the assistant, wanted at least one')
    return messages
