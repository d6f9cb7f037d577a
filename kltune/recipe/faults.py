"""Where a recipe is wrong and how that is said: every fault has a place, and all faults travel in one error.

What is said can hold what strangers wrote: ``visible`` and ``printable`` take from it what a terminal, a log that is
read for commands, or XML would obey or choke on, and ``redact`` what is secret.
"""

import base64
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote

from kltune.errors import InputError, RecipeError

Clash = tuple[tuple[str, ...], str]          # the dotted keys concerned, the first of which is where it is shown
MOST_SHOWN = 50
SHORTEST = 8        # characters of a secret: what is shorter may be any word
# Controls, what turns the writing direction, halves of surrogate pairs (of names that are not UTF-8 too), and the two
# that no text may hold.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
COMMAND = re.compile(r"^(\s*):(?=:)|#(?=#\[)", re.MULTILINE)    # what GitHub takes for the beginning of a command
# Behind an escape too, as in a repr or JSON: of \\nsk-... the n is no part of a word.
SECRET_SHAPES = re.compile(
    r"(?:\b|(?<=\\[abfnrtv]))(?:hf_\w{16,}|sk-[A-Za-z0-9]{16,}|sk-[a-z]+-[\w-]{16,}|gh[pousr]_\w{16,})"
)
USER_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
SECRET_VARIABLE = re.compile(r"(?i)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|_PAT|_AUTH)$")
# What stands behind such a word in a URL's query or in a header, whatever it looks like.
SECRET_VALUE = re.compile(
    r"(?i)([?&][\w.-]*(?:key|token|secret|password|signature|sig|credential)=|"
    r"authorization['\"\\]*\s*[:=]\s*['\"\\]*(?:(?:basic|bearer|digest)\s+)?|\bbearer\s+(?=\S{16}))[^\s&'\",;\\]+"
)
# After a blank only as an option: in ``--unit nats_per_token runs/a`` what follows is none of its own.
SECRET_ARGUMENT = re.compile(
    r"(?i)((?:api[-_]?key|token|secret|password|passwd)\s*[=:]\s*|"
    r"(?<!\S)--?[\w-]*(?:api[-_]?key|token|secret|password|passwd)\s+(?!-))(?=\S)([^\s'\"]+)"
)


@dataclass(frozen=True)
class Place:
    """A spot in a recipe file, or the option that put a value there. Lines and columns count from 1."""

    file: str
    line: int = 1
    column: int = 1
    override: str | None = None
    option: str = "--set"

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}" if self.override is None else f"{self.option} {self.override}"
        return printable(where)


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: where, under which key, and what to do about it."""

    place: Place
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.key}: {self.text}" if self.key else f"{self.place}: {self.text}"


class RecipeFaults(RecipeError):
    """A recipe, as the user named it, with its faults (at least one) in the order of the file."""

    def __init__(self, file: str, faults: list[Fault]):
        ordered = sorted(
            dict.fromkeys(replace(fault, key=printable(fault.key), text=printable(fault.text)) for fault in faults),
            key=lambda fault: (fault.place.override is not None, fault.place.line, fault.place.column),
        )
        self.file, self.faults = file, ordered
        lines = [f"  {fault}" for fault in ordered[:MOST_SHOWN]]
        if len(ordered) > MOST_SHOWN:
            lines.append(f"  and {len(ordered) - MOST_SHOWN} more")
        super().__init__("\n".join([f"{printable(file)} {self.summary(len(ordered))}", *lines]))

    @staticmethod
    def summary(count: int) -> str:
        """The first line, behind the file's name."""
        return "has 1 fault" if count == 1 else f"has {count} faults"

    def __reduce__(self) -> tuple[type, tuple[str, list[Fault]]]:
        """How it goes from one process to another: an exception is otherwise made again from its message alone."""
        return type(self), (self.file, self.faults)


class InputFaults(RecipeFaults):
    """What a sound recipe names and a run could not read, with the line of each."""

    exit_code = InputError.exit_code

    @staticmethod
    def summary(count: int) -> str:
        """The first line, behind the file's name."""
        return f"names {'something' if count == 1 else f'{count} things'} that a run could not read"


def printable(text: str) -> str:
    """The text in one line, with all that is not printed escaped, so that a recipe cannot move the reader's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def visible(text: str) -> str:
    """Text in which control characters show as escapes, so that a model's response cannot steer a terminal.

    Its lines stay lines, and none of them is a command to GitHub. XML may hold all that is left.
    """
    text = CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    return COMMAND.sub(lambda match: f"{match[1] or ''}\\x{ord(match[0][-1]):02x}", text)


def redact(text: str, *, arguments: bool = False) -> str:
    """Text without the secrets of this process: keys and tokens from the environment, and what looks like one.

    arguments: True for a command line, where the value of ``--set x.api_key=...`` goes as well.
    """
    for secret in _secrets():
        quoted = {quote(secret, safe=""), base64.b64encode(secret.encode("utf-8", "surrogateescape")).decode()}
        for form in {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], *quoted}:
            text = text.replace(form, "[redacted]")
    text = USER_IN_URL.sub("[redacted]", SECRET_SHAPES.sub("[redacted]", text))
    text = SECRET_VALUE.sub(r"\1[redacted]", text)
    return SECRET_ARGUMENT.sub(r"\1[redacted]", text) if arguments else text


def _secrets() -> Iterator[str]:
    """The secrets in the environment: values of variables that are called so, user and password of a proxy's URL."""
    for name, value in os.environ.items():
        users = USER_IN_URL.findall(value)
        passwords = [user.partition(":")[2] for user in users]
        found = [*users, *passwords, *map(unquote, users + passwords)]
        found += [value] if SECRET_VARIABLE.search(name) else []
        yield from {secret for secret in found if len(secret) >= SHORTEST and not os.path.exists(secret)}   # no path
