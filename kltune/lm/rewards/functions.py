"""A user's reward function: a Python file beside the recipe and the files beside it that it imports, hashed as run."""

import ast
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from kltune.errors import ScorerError
from kltune.recipe import FunctionReward


def load_function(entry: FunctionReward, folder: Path) -> tuple[Callable, dict[str, str]]:
    """The function that an entry names, and its identity.

    Raises:
        ScorerError: the file cannot be read or raised, or has no such function.
    """
    file, _, attribute = entry.path.rpartition(":")
    path = folder / file
    sources = read_sources(entry, folder)
    digest = sources_sha256(sources)
    neighbours = {name: code for name, code in sources.items() if name != path}
    NEIGHBOURS.know(neighbours)
    NEIGHBOURS.files |= set(map(str, sources))
    module = ModuleType(f"{path.stem}_{digest[:12]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look a class's module up by name
    try:
        exec(compile(sources[path], str(path), "exec"), module.__dict__)  # what was hashed is what runs
    except KeyboardInterrupt:
        raise
    except BaseException as error:      # also SystemExit, which would end the process as if all were well
        raise ScorerError(
            f"reward {entry.path}: importing {path} raised {told(error)}{_hint(error, folder)}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
        near = get_close_matches(attribute, names, 1) or names[:1]
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ScorerError(f"reward {entry.path}: {path} has no function {attribute!r}{meant or '.'}")
    if inspect.iscoroutinefunction(function):
        raise ScorerError(f"reward {entry.path}: {path}: {attribute} is async, and nothing would wait for it; wanted a "
                          "plain def, which may call asyncio.run itself.")
    identity = {"path": entry.path, "sha256": digest}
    return function, identity | ({"imports": ", ".join(sorted(p.name for p in neighbours))} if neighbours else {})


def wants_rows(function: Callable) -> bool:
    """Whether a reward function also takes the data row of each prompt: ``score(prompts, responses, rows)``."""
    try:
        return "rows" in inspect.signature(function).parameters
    except (TypeError, ValueError):     # of something built in
        return False


def read_sources(entry: FunctionReward, folder: Path) -> dict[Path, bytes]:
    """The file of a function, and those of its folder that it imports, directly or through one another.

    Raises:
        ScorerError: a file cannot be read.
    """
    found: dict[Path, bytes] = {}
    left = [folder / entry.path.rpartition(":")[0]]
    while left:
        path = left.pop()
        try:
            found[path] = path.read_bytes()
        except OSError as error:
            raise ScorerError(f"reward {entry.path}: {path} cannot be read ({error.strerror}).") from None
        beside = (folder / f"{name}.py" for name in _imported(found[path]) if name not in sys.stdlib_module_names)
        left += [neighbour for neighbour in beside if neighbour.is_file() and neighbour not in found]
    return found


def sources_sha256(sources: Mapping[Path, bytes]) -> str:
    """Hex digest of the files of a function: of a single one that of its bytes."""
    parts = [code for _, code in sorted(sources.items())]
    if len(parts) > 1:
        parts = [hashlib.sha256(code).digest() for code in parts]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _imported(code: bytes) -> set[str]:
    """The modules that a file imports anywhere in it, by their first name; none of a file that is no Python."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):       # said when it is run
        return set()
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}


def told(error: BaseException) -> str:
    """What a user's code raised, and where: the innermost line that is in a file of theirs."""
    text = f"{type(error).__name__}: {text_of(error, str)}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename in NEIGHBOURS.files]
    return f"{text} ({theirs[-1].filename}:{theirs[-1].lineno}, in {theirs[-1].name})" if theirs else text


def text_of(value: object, kind: Callable[[object], str] = repr) -> str:
    """Something of a user's as text: its ``__repr__`` is theirs too, and an int of 5,000 digits has none."""
    try:
        return kind(value)
    except Exception:  # noqa: BLE001  as above
        return f"a {type(value).__name__} that cannot be shown"


def _hint(error: BaseException, folder: Path) -> str:
    """The way on where a module was not found."""
    if not isinstance(error, ImportError):
        return ""
    return (
        f". A reward function may import what is installed, and files that lie beside it in {folder}, by their own "
        "names (import helpers, from helpers import x); packages and relative imports it may not."
    )


class _Neighbours(MetaPathFinder, Loader):
    """Imports the files beside reward functions, as they were hashed, and no others; also while a function runs."""

    def __init__(self):
        self._sources: dict[str, tuple[Path, bytes]] = {}
        self.files: set[str] = set()        # of reward functions, those that they are in included

    def know(self, sources: Mapping[Path, bytes]) -> None:
        """From now on import these files by their names."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        named = {path.stem: (path, code) for path, code in sources.items()}
        if any(self._sources.get(name) != source for name, source in named.items()):
            for name in named:      # of another folder, or an earlier state of this one; each may hold the others
                sys.modules.pop(name, None)
        self._sources |= named

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """See ``MetaPathFinder``."""
        if name not in self._sources:
            return None
        return importlib.util.spec_from_loader(name, self, origin=str(self._sources[name][0]))

    def exec_module(self, module: ModuleType) -> None:
        """See ``Loader``."""
        path, code = self._sources[module.__name__]
        module.__file__ = str(path)
        exec(compile(code, str(path), "exec"), module.__dict__)


NEIGHBOURS = _Neighbours()
