"""What rows are called and kept in elsewhere, brought to the forms of forms.py: every change of it is said.

Columns under names of their own, conversations of {"from", "value"} (ShareGPT), instruction and output (Alpaca, Dolly),
messages kept as JSON text, transcripts ("Human: ... Assistant: ...", hh-rlhf), which are messages written out, and what
stands beside a prompt and belongs before it: a system prompt, earlier turns.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from kltune.lm.data.forms import (
    BEFORE,
    LABELLED_FORM,
    NOT_GIVEN,
    PROMPT_FORMS,
    SIDES,
    TEXT_FORMS,
    TRANSCRIPT,
    WEIGHT,
    Message,
    text_field,
)
from kltune.lm.data.rows import Row, RowFault, describe

SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")     # how hh-rlhf writes who speaks
LISTS = ("messages", "prompt", "response", *SIDES)      # fields that may hold messages
INPUTS = ("input", "context")       # of an instruction: what it is about (Alpaca, Dolly)
NOTHING = ("", "[]", "{}", "null")      # what is no more than its column, as text
READ_AS = {
    "conversations": '"conversations" are the messages (ShareGPT: human is the user, gpt the assistant)',
    "json": "messages are kept as JSON text, and are read from it",
}


class Layout:
    """How the rows of one source become rows in a form of forms.py.

    columns: our name of a field, and the source's. template: as of an encoder; none also where there is no chat
    template. transcripts: text that says itself who speaks becomes messages.
    """

    def __init__(self, columns: Mapping[str, str] | None = None, template: str = "auto", *, transcripts: bool = False):
        self.columns, self.template, self.transcripts = dict(columns or {}), template, transcripts
        self._all_messages: bool | None = None      # prompts that are text become messages, as the first row's did
        self.notes: dict[str, None] = {}        # in the order in which there was something to say
        self.transcript: list[Message] | None = None        # the first one that became messages

    def of(self, row: Row) -> Row:
        """The row with fields of our names.

        Raises:
            RowFault: it lacks a column, is a transcript out of turn, or has a field that cannot be asked as well.
        """
        if row.fault:
            raise RowFault(row.fault)
        fields = self._renamed(row.fields)
        fields = self._conversations(fields)
        fields = self._instruction(fields)
        fields = _without_copy(row.fields, fields)
        self._refuse_strange(row.fields, fields)
        for name in LISTS:
            if fields.get(name) is not None:
                fields[name] = self._messages(fields[name], name)
        if self.transcripts:
            fields = self._spoken(fields)
        if any(fields.get(name) is not None for name in ("prompt", "messages", *SIDES)):    # a text alone is all of it
            fields = self._with_before(fields)
        return replace(row, fields=fields)

    def first(self, rows: Iterable[Row]) -> dict[str, Any]:
        """The fields of the first row that can be read; {} of none."""
        for row in rows:
            with contextlib.suppress(RowFault):
                return self.of(row).fields
        return {}

    def _renamed(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        present = {ours: theirs for ours, theirs in self.columns.items() if theirs in fields}
        rest = {name: value for name, value in fields.items() if name not in present.values()}
        return rest | {ours: fields[theirs] for ours, theirs in present.items()}

    def _refuse_strange(self, found: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
        """Raise RowFault if a row has none of the columns that were named, none of our names for them, and no form."""
        known = {*self.columns.values()} & found.keys() or self.columns.keys() & found.keys()
        forms = (*TEXT_FORMS, *PROMPT_FORMS, LABELLED_FORM)
        if self.columns and not known and not any(all(fields.get(n) is not None for n in form) for form in forms):
            names = ", ".join(f'"{name}"' for name in found) or "no field"
            wanted = ", ".join(f'"{theirs}"' for theirs in self.columns.values())
            raise RowFault(f"data.columns: wanted {wanted}, found {names}")

    def _conversations(self, fields: dict[str, Any]) -> dict[str, Any]:
        name = next((name for name in ("conversations", "conversation") if name in fields), None)
        if name is None or fields.get("messages") is not None or fields.get("prompt") is not None:
            return fields
        self.notes[READ_AS["conversations"].replace("conversations", name)] = None
        return {("messages" if key == name else key): value for key, value in fields.items()}

    def _instruction(self, fields: dict[str, Any]) -> dict[str, Any]:
        if "instruction" not in fields or fields.get("prompt") is not None or fields.get("messages") is not None:
            return fields
        inputs = [name for name in INPUTS if name in fields]
        answer = next((name for name in ("output", "response") if fields.get(name) is not None), None)
        asked = " and ".join(f'"{name}"' for name in ("instruction", *inputs))
        said = f', "{answer}" is the response' if answer else ""
        owner = "Dolly" if "context" in inputs else "Alpaca"
        self.notes[f"{asked} {'are' if inputs else 'is'} the prompt{said} ({owner})"] = None
        parts = [text_field(fields, name, empty=True) for name in inputs if fields[name] is not None]
        prompt = fields["instruction"]
        if isinstance(prompt, str):
            prompt = "\n\n".join([prompt, *filter(str.strip, parts)])
        rest = {name: value for name, value in fields.items() if name not in ("instruction", "output", *INPUTS)}
        return rest | {"prompt": prompt} | ({"response": fields[answer]} if answer else {})

    def _with_before(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Fields in which a system prompt, and earlier turns, are messages before what is asked."""
        for name, why in NOT_GIVEN.items():
            if not _is_nothing(fields.get(name)):
                raise RowFault(f'field "{name}": {why}')
        names = [name for name in BEFORE if fields.get(name) is not None]
        filled = [name for name in names if not _is_nothing(fields[name])]
        if self._all_messages is None:
            self._all_messages = bool(names) and self.template == "auto"
        before = [message for name in filled for message in _before(fields[name], name)]
        if [message["role"] for message in before[:2]] == ["system", "system"]:
            raise RowFault(f'fields "{filled[0]}" and "{filled[1]}": two system prompts, wanted one')
        if not filled and not self._all_messages:
            return fields
        # Sides that are whole conversations repeat the prompt, of which a text is then one message.
        whole = [side for side in SIDES if isinstance(fields.get(side), list) and not _is_answer(fields[side])]
        found = dict(fields)
        for name in ("prompt", "messages", *whole):
            if isinstance(value := fields.get(name), list):
                found[name] = _behind(before, value, name)
            elif isinstance(value, str) and name == "prompt" and not whole and not value.endswith(TRANSCRIPT):
                if filled and (self.template == "none" or not (self._all_messages or self.template == "chat")):
                    raise RowFault(f'field "{filled[0]}": {self._no_place()}')
                found[name] = [*before, {"role": "user", "content": value}]
        if filled and any(TRANSCRIPT in found[n] for n in ("prompt", *SIDES) if isinstance(found.get(n), str)):
            raise RowFault(f'field "{filled[0]}": plain text has no place for it; write it into the text')
        for name in names:
            self.notes[f'"{name}" {BEFORE[name]}'] = None
        return found

    def _no_place(self) -> str:
        if self.template == "auto":
            return ("found some, but none in the first row, whose prompt is plain text; give it in all rows (it may be "
                    "empty), or write data.template: chat")
        return ("plain text has no place for it; wanted a chat template (data.template: auto, and a model with one, or "
                "data.chat_template: FILE), or a file without it")

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


def _without_copy(found: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Without "text" where other columns became the row: it is all of them once more, as a template wrote it."""
    made = {name for name, value in fields.items() if value is not None and found.get(name) is not value}
    answered = fields.get("prompt") is not None and fields.get("response") is not None
    if "text" in made or not ("messages" in made or (answered and made & {"prompt", "response"})):
        return fields
    return {name: value for name, value in fields.items() if name != "text"}


def _is_nothing(value: Any) -> bool:
    return value.strip() in NOTHING if isinstance(value, str) else not value


def _before(value: Any, name: str) -> list[Message]:
    """A system prompt, or earlier turns that are a list of [question, answer], as messages; no answer is learnt."""
    if name != "history":
        return [{"role": "system", "content": text_field({name: value}, name)}]
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(said, str) for said in turn) for turn in value
    ):
        raise RowFault(f'field "history": found {describe(value)}, wanted a list of [question, answer]')
    return [message for asked, said in value for message in (
        {"role": "user", "content": asked}, {"role": "assistant", "content": said, WEIGHT: 0})]


def _is_answer(messages: list[Any]) -> bool:
    return bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "assistant"


def _behind(before: list[Message], messages: list[Any], name: str) -> list[Any]:
    """Messages with others before them; their own system message stays first."""
    own, told = ([m for m in some[:1] if isinstance(m, dict) and m.get("role") == "system"]
                 for some in (messages, before))
    if own and told and own[0].get("content") != told[0]["content"]:
        raise RowFault(f'field "{name}[0]": another system message than the one beside it; remove one of the two')
    return [*(own or told), *before[len(told):], *messages[len(own):]]


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
