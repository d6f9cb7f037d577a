"""What rows are called and kept in elsewhere, brought to the forms of forms.py: every change of it is said.

Columns under names of their own, conversations of {"from", "value"} (ShareGPT), instruction and output (Alpaca),
messages kept as JSON text, and transcripts ("Human: ... Assistant: ...", hh-rlhf), which are messages written out.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from kltune.lm.data.forms import SIDES, Message
from kltune.lm.data.rows import Row, RowFault

SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")     # how hh-rlhf writes who speaks
LISTS = ("messages", "prompt", "response", *SIDES)      # fields that may hold messages
READ_AS = {
    "conversations": '"conversations" are the messages (ShareGPT: human is the user, gpt the assistant)',
    "instruction": '"instruction" and "input" are the prompt, "output" is the response (Alpaca)',
    "json": "messages are kept as JSON text, and are read from it",
}


class Layout:
    """How the rows of one source become rows in a form of forms.py.

    columns: our name of a field, and the source's. transcripts: text that says itself who speaks becomes messages.
    """

    def __init__(self, columns: Mapping[str, str] | None = None, *, transcripts: bool = False):
        self.columns, self.transcripts = dict(columns or {}), transcripts
        self.notes: dict[str, None] = {}        # in the order in which there was something to say
        self.transcript: list[Message] | None = None        # the first one that became messages

    def of(self, row: Row) -> Row:
        """The row with fields of our names; RowFault if it lacks a column, or is a transcript out of turn."""
        if row.fault:
            raise RowFault(row.fault)
        fields = self._renamed(row.fields)
        fields = self._conversations(fields)
        fields = self._instruction(fields)
        for name in LISTS:
            if fields.get(name) is not None:
                fields[name] = self._messages(fields[name], name)
        if self.transcripts:
            fields = self._spoken(fields)
        return replace(row, fields=fields)

    def first(self, rows: Iterable[Row]) -> dict[str, Any]:
        """The fields of the first row that can be read; {} of none."""
        for row in rows:
            with contextlib.suppress(RowFault):
                return self.of(row).fields
        return {}

    def _renamed(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        present = {ours: theirs for ours, theirs in self.columns.items() if theirs in fields}
        if self.columns and not present and not self.columns.keys() & fields.keys():
            names = ", ".join(f'"{name}"' for name in fields) or "no field"
            wanted = ", ".join(f'"{theirs}"' for theirs in self.columns.values())
            raise RowFault(f"data.columns: wanted {wanted}, found {names}")
        rest = {name: value for name, value in fields.items() if name not in present.values()}
        return rest | {ours: fields[theirs] for ours, theirs in present.items()}

    def _conversations(self, fields: dict[str, Any]) -> dict[str, Any]:
        name = next((name for name in ("conversations", "conversation") if name in fields), None)
        if name is None or fields.get("messages") is not None or fields.get("prompt") is not None:
            return fields
        self.notes[READ_AS["conversations"].replace("conversations", name)] = None
        return {("messages" if key == name else key): value for key, value in fields.items()}

    def _instruction(self, fields: dict[str, Any]) -> dict[str, Any]:
        if "instruction" not in fields or fields.get("prompt") is not None or fields.get("messages") is not None:
            return fields
        self.notes[READ_AS["instruction"]] = None
        asked, more = fields["instruction"], fields.get("input")
        joined = f"{asked}\n\n{more}" if isinstance(asked, str) and isinstance(more, str) and more.strip() else asked
        named = {"prompt": joined} | ({"response": fields["output"]} if "output" in fields else {})
        return {name: value for name, value in fields.items() if name not in ("instruction", "input", "output")} | named

    def _messages(self, value: Any, name: str) -> Any:
        """A field that holds messages in one of their ways, as a list of {"role", "content"}; else as it is."""
        if isinstance(value, str) and value.lstrip()[:2] in ("[{", "{\"", "{'"):
            value = self._from_text(value, name)
        if isinstance(value, dict) and _is_message(value):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
            return value
        return [_with_role(part) for part in value]

    def _from_text(self, text: str, name: str) -> Any:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            if name == "messages" or re.match(r"\[\s*\{\s*'(role|from|content|value)'", text.lstrip()):
                raise RowFault(f'field "{name}": found text that begins {text.lstrip()[:30]!r}, which is no JSON; '
                               "wanted a list of messages, or one that json.dumps wrote") from None
            return text
        parts = value if isinstance(value, list) else [value]
        if not parts or not all(isinstance(part, dict) and _is_message(part) for part in parts):
            return text
        self.notes[READ_AS["json"]] = None
        return value

    def _spoken(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Fields in which transcripts are messages: both sides of a pair, a prompt to be answered, or a whole text."""
        names = [name for name in (*SIDES, "prompt", "text") if is_transcript(fields.get(name))]
        if not names:
            return fields
        found = dict(fields)
        for name in names:
            said = turns(fields[name], name)
            self.transcript = self.transcript or said
            if name == "text":
                del found["text"]
                found["messages"] = said
            else:
                found[name] = said
        return found


def is_transcript(value: Any) -> bool:
    """Whether a text says itself who speaks: it begins with Human: and goes on with Assistant:."""
    if not isinstance(value, str):
        return False
    speakers = TURN.findall(value.lstrip())
    return speakers[:1] == ["Human"] and "Assistant" in speakers


def turns(text: str, name: str) -> list[Message]:
    """The messages of a transcript; the space behind a colon is its own. The last may still have to be said.

    Raises:
        RowFault: a speaker comes twice in a row, or says nothing.
    """
    parts = TURN.split(text.strip())[1:]
    roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[::2]]
    said = [part.strip() for part in parts[1::2]]
    if roles[-1] == "assistant" and not said[-1] and name == "prompt":
        roles, said = roles[:-1], said[:-1]
    for place, (role, content) in enumerate(zip(roles, said, strict=True)):
        if place and role == roles[place - 1]:
            twice = "Assistant" if role == "assistant" else "Human"
            raise RowFault(f'field "{name}": {twice} speaks twice in a row, which no chat template can write; '
                           "data.transcripts: text keeps it as it is")
        if not content:
            raise RowFault(f'field "{name}": a turn of the {role} is empty, wanted something said in it')
    return [{"role": role, "content": content} for role, content in zip(roles, said, strict=True)]


def _is_message(part: Mapping[str, Any]) -> bool:
    return {"role", "content"} <= part.keys() or {"from", "value"} <= part.keys()


def _with_role(part: dict[str, Any]) -> dict[str, Any]:
    """A message by our names; who is known by no name of theirs keeps it, and is refused by it."""
    if "role" not in part and {"from", "value"} <= part.keys():
        more = {name: value for name, value in part.items() if name not in ("from", "value")}
        role = part["from"]
        part = {"role": SPEAKERS.get(role, role) if isinstance(role, str) else role, "content": part["value"], **more}
    return part
