"""Where a recipe is wrong and how that is said: every fault has a place, and all faults travel in one error."""

from dataclasses import dataclass, replace

from kltune.errors import InputError, RecipeError

Clash = tuple[tuple[str, ...], str]          # the dotted keys concerned, the first of which is where it is shown
MOST_SHOWN = 50


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
    """The text with control characters escaped, so that a recipe cannot move the reader's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
