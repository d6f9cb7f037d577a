"""YAML text to a tree that remembers where every key and value stood.

Read from PyYAML's parser events, so no tag ever builds an object, and a bomb is met at its first alias or at the
nesting limit; by its parser in Python, which gives each event as it comes: the one in C may first read on, and meet a
limit of its own. Plain values follow YAML 1.2: ``1e-5`` is a number, ``yes`` and ``010`` are text.
"""

import errno
import os
import re
import select
import stat
from dataclasses import dataclass, field

import yaml

from kltune.recipe.faults import Fault, Place, RecipeFaults

PIPE_SECONDS = 5
MAX_BYTES, MAX_DEPTH, MAX_NODES = 1_000_000, 16, 10_000
SAID: dict[tuple[int, int], bytes] = {}     # what each pipe has said in this process
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,400})")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
WORDS = {word: value for value, spellings in {
    None: "null Null NULL ~", True: "true True TRUE", False: "false False FALSE",
}.items() for word in spellings.split()} | {"": None}
DIRECTION_MARKS = re.compile("[\u202a-\u202e\u2066-\u2069]")    # they show a line other than it is read
SYNTAX_HINT = "check indentation (spaces, no tabs), a space after each colon, closing brackets and quotes"
Value = None | bool | int | float | str | dict[str, "Node"] | list["Node"]
KeyPath = tuple[str | int, ...]          # ("reward", 0, "path")
Plain = None | bool | int | float | str | dict[str, "Plain"] | list["Plain"]


@dataclass
class Node:
    """A value, the place where it stands, and the places of its keys if it is a section."""

    value: Value
    place: Place
    quoted: bool = False
    key_places: dict[str, Place] = field(default_factory=dict)

    def plain(self) -> Plain:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def at(self, path: KeyPath) -> "Node | None":
        """The node under a path of keys and list indices; None if there is none."""
        node: Node | None = self
        for step in path:
            match node.value if node else None:
                case dict() as section:
                    node = section.get(step)
                case list() as entries:
                    node = entries[step] if isinstance(step, int) and step < len(entries) else None
                case _:
                    return None
        return node

    def place_of(self, path: KeyPath) -> Place:
        """Where the value under a path stands, or the nearest section around it."""
        while (node := self.at(path)) is None:
            path = path[:-1]
        return node.place

    def place_of_key(self, path: KeyPath) -> Place:
        """Where the last key of a path stands."""
        parent = self.at(path[:-1])
        return parent.key_places.get(path[-1], self.place_of(path)) if parent else self.place_of(path)


def resolve(text: str) -> Plain:
    """What an unquoted YAML 1.2 value means: null, true or false, a decimal number, else text."""
    if text in WORDS:
        return WORDS[text]
    if INTEGER.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def read_bytes(file: str | os.PathLike[str]) -> bytes:
    """A recipe's bytes, one more than there may be at most; a pipe has some seconds to say something.

    Raises:
        OSError: it cannot be read, is a folder or a device, or nobody writes into it.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)      # a pipe would wait for its writer
    with open(descriptor, "rb", buffering=0) as stream:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
            raise OSError(errno.EINVAL, "it is a device, wanted a YAML file")
        content = b""
        while len(content) <= MAX_BYTES:
            if stat.S_ISFIFO(mode) and not select.select([descriptor], [], [], PIPE_SECONDS)[0]:
                raise OSError(errno.EINVAL, f"nobody wrote into this pipe for {PIPE_SECONDS} s")
            part = stream.read(MAX_BYTES + 1 - len(content))
            if not part:
                break
            content += part
        return content


def read_once(file: str | os.PathLike[str]) -> bytes:
    """As ``read_bytes``; of a pipe, which says them once, the same each time."""
    facts = os.stat(file)
    if stat.S_ISREG(facts.st_mode):
        return read_bytes(file)
    pipe = facts.st_dev, facts.st_ino
    if pipe not in SAID:
        SAID[pipe] = read_bytes(file)
    return SAID[pipe]


def decode(data: bytes, file: str) -> str:
    """The recipe's text; RecipeFaults if it is too large, not UTF-8, or has characters that have no business in one."""
    if len(data) > MAX_BYTES:
        raise RecipeFaults(file, [Fault(Place(file), "", "larger than 1 MB; a recipe is a page of YAML")])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = place_at(file, data[: error.start].decode("utf-8", "replace"))
        raise RecipeFaults(file, [Fault(place, "", "not UTF-8; save the file as UTF-8")]) from error
    for what, mark in (("a NUL byte", re.search("\0", text)), ("a text-direction mark", DIRECTION_MARKS.search(text))):
        if mark:
            raise RecipeFaults(file, [Fault(place_at(file, text[: mark.start()]), "", f"{what}; remove it")])
    return text


def place_at(file: str, before: str) -> Place:
    """The place after a piece of text from the start of the file."""
    return Place(file, before.count("\n") + 1, len(before) - before.rfind("\n"))


def read_nodes(text: str, file: str, override: str | None = None) -> tuple[Node | None, list[Fault]]:
    """Parse one YAML document; ``file`` is its name in messages, ``override`` the ``--set`` that it comes from.

    Returns:
        The tree (None for an empty document), and faults that leave the rest readable: repeated keys, tags, anchors.

    Raises:
        RecipeFaults: the text is no YAML, nests too deeply, or holds several documents.
    """
    reader = _Reader(text, file, override)
    try:
        return reader.root(), reader.faults
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f" {error.context}" if error.context else ""
        raise reader.fatal(mark, f"not YAML: {error.problem}{context}; {SYNTAX_HINT}") from error
    except yaml.reader.ReaderError as error:
        place = place_at(file, text[: error.position])
        raise RecipeFaults(file, [Fault(place, "", "a control character; remove it")]) from error


class _Reader:
    """Reads nodes from events, and collects the faults that leave the rest readable."""

    def __init__(self, text: str, file: str, override: str | None):
        self.events = yaml.parse(text, Loader=yaml.SafeLoader)
        self.file, self.override = file, override
        self.faults: list[Fault] = []
        self.count = 0

    def place(self, mark: yaml.Mark | None) -> Place:
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        return Place(self.file, line, column, self.override)

    def fatal(self, mark: yaml.Mark | None, text: str) -> RecipeFaults:
        return RecipeFaults(self.file, [*self.faults, Fault(self.place(mark), "", text)])

    def root(self) -> Node | None:
        """The node of the only document."""
        root, documents = None, 0
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self.fatal(event.start_mark, "a second document; a recipe is one document, remove the ---")
            elif isinstance(event, yaml.NodeEvent):
                root = self._node(event, 0)
        return root

    def _node(self, event: yaml.NodeEvent, depth: int) -> Node:
        """The node that begins with an event, ``depth`` sections and lists deep."""
        place = self.place(event.start_mark)
        self.count += 1
        if self.count > MAX_NODES:
            raise RecipeFaults(self.file, [Fault(place, "", f"more than {MAX_NODES:,} values; is this a recipe?")])
        if isinstance(event, yaml.AliasEvent):
            self.faults.append(Fault(place, "", f"found alias *{event.anchor}; write the value out"))
            return Node(None, place)
        if event.tag is not None:
            text = f"found tag {event.tag}; a recipe holds plain values only, remove the tag"
            self.faults.append(Fault(place, "", text))
        if event.anchor is not None:
            text = f"found anchor &{event.anchor}; write the value out where it is needed"
            self.faults.append(Fault(place, "", text))
        if isinstance(event, yaml.ScalarEvent):
            quoted = bool(event.style)
            return Node(event.value if quoted else resolve(event.value), place, quoted)
        if depth >= MAX_DEPTH:
            raise self.fatal(event.start_mark, f"nested more than {MAX_DEPTH} deep; a recipe needs 4")
        node = Node({} if isinstance(event, yaml.MappingStartEvent) else [], place)
        while not isinstance(inner := next(self.events), yaml.CollectionEndEvent):
            if isinstance(node.value, list):
                node.value.append(self._node(inner, depth + 1))
            else:
                self._put(node, inner, depth + 1)
        return node

    def _put(self, section: Node, event: yaml.NodeEvent, depth: int) -> None:
        """Add the key that begins with an event, and its value."""
        key_place = self.place(event.start_mark)
        if not isinstance(event, yaml.CollectionStartEvent):
            self._node(event, depth)
        if not isinstance(event, yaml.ScalarEvent):
            raise self.fatal(event.start_mark, "a key must be one plain word")
        value_event = next(self.events)
        first = section.key_places.setdefault(event.value, key_place)
        if first != key_place:
            self.faults.append(Fault(key_place, event.value, f"given twice, first in line {first.line}; keep one"))
        section.value.setdefault(event.value, self._node(value_event, depth))
