"""The house keeps its rules: imports run downhill, public names are explained, nothing unpickles, files stay small."""

import ast
import tokenize
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kltune"
FLOORS = (
    "errors", "recipe core", "lm.data", "lm.machine", "lm.fast", "lm.model", "lm.rewards", "lm.measure", "run",
    "report", "train", "stages", "demo testing", "cli",
)
STAND_ALONE = {"stages"}        # rooms whose modules never import each other: a stage reads from top to bottom
LONGEST_FILE = 300              # lines of code: documentation is no reason to split a file
MOST_ENTRIES = 11               # of a folder, its __init__.py and docs, which hold no code, not counted
MAY_RUN_CODE = {"kltune.lm.rewards.functions"}            # a reward function is the user's own code, read and hashed
# A user's function may raise anything, and the row is found; a logger's trouble, whatever it is, ends no run.
MAY_OUTLIVE_ANYTHING = {"kltune.lm.rewards.functions", "kltune.lm.rewards.scorers", "kltune.run.loggers"}
FORBIDDEN_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "eval"}
FORBIDDEN_IMPORTS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def module_name(path: Path) -> str:
    """kltune/lm/model/policy.py is kltune.lm.model.policy, and kltune/lm/__init__.py is kltune.lm."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__main__.py"}
MODULES = {name: path for name, path in FILES.items() if "." in name}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
HEIGHTS = {room: height for height, rooms in enumerate(FLOORS) for room in rooms.split()}


def room(module: str) -> str:
    """'kltune.lm.model.policy' is in room 'lm.model', 'kltune.core.kl.gate' in room 'core'."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[0] == "lm" else parts[0]


def imported_modules(module: str) -> set[str]:
    """The kltune modules a module imports, at the top or inside a function."""
    names = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports in full, not relative"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inner}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("kltune.")}


def test_imports_run_downhill():
    uphill = []
    for module in MODULES:
        if module == "kltune.lm":       # the room of rooms has no floor of its own, and imports nothing
            continue
        for target in sorted(imported_modules(module)):
            here, there = room(module), room(target)
            neighbours = here == there and (here not in STAND_ALONE or target == module)
            if not (neighbours or HEIGHTS[there] < HEIGHTS[here]):
                uphill.append(f"{module} must not import {target}")
    assert uphill == []


def test_no_circles():
    order = TopologicalSorter({module: imported_modules(module) for module in MODULES}).static_order()
    assert set(order) >= set(MODULES)  # a circle has no order: CycleError names it


def public_without_docstring(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    """Names of public functions, classes and methods that explain nothing."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield f"{prefix}.{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from public_without_docstring(node.body, f"{prefix}.{node.name}")


def test_every_public_name_is_explained():
    assert [name for module in MODULES for name in public_without_docstring(TREES[module].body, module)] == []


def test_nothing_unpickles_or_evaluates():
    bad = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                bad += [f"{module} imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_IMPORTS]
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in FORBIDDEN_CALLS or (called == "exec" and module not in MAY_RUN_CODE):
                    bad.append(f"{module}:{node.lineno} calls {called}")
    assert bad == []


def test_a_broad_except_always_raises_again():
    swallowing = []
    for module in FILES.keys() - MAY_OUTLIVE_ANYTHING:
        for node in ast.walk(TREES[module]):
            if isinstance(node, ast.ExceptHandler):
                caught = ["everything"] if node.type is None else ast.unparse(node.type).strip("()").split(", ")
                broad = {"everything", "Exception", "BaseException"} & set(caught)
                if broad and not isinstance(node.body[-1], ast.Raise):
                    swallowing.append(f"{module}:{node.lineno}")
    assert swallowing == []


def lines_of_code(path: Path, tree: ast.Module) -> int:
    """Lines that are neither blank, nor a comment, nor part of a docstring."""
    quiet = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    with tokenize.open(path) as file:
        tokens = [token for token in tokenize.generate_tokens(file.readline) if token.type not in quiet]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(tree):
        first = node.body[0] if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            lines -= set(range(first.lineno, first.end_lineno + 1))
    return len(lines)


def test_a_file_is_one_idea():
    lengths = {module: lines_of_code(path, TREES[module]) for module, path in FILES.items()}
    assert {module: length for module, length in lengths.items() if length > LONGEST_FILE} == {}


def test_a_folder_fits_on_a_screen():
    counts = {}
    for folder in (PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__")):
        entries = {path.name for path in folder.iterdir()} - {"__init__.py", "__main__.py", "__pycache__", "docs"}
        counts[str(folder.relative_to(ROOT))] = len(entries)
    assert {folder: count for folder, count in counts.items() if count > MOST_ENTRIES and folder != "kltune/docs"} == {}


def test_tests_mirror_the_package():
    rooms = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*") if path.is_dir()} | {"."}
    folders = {str(path.parent.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders <= rooms


def test_no_two_test_files_have_one_name():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))      # pytest imports the first one for both, and leaves the other out


def test_nothing_names_the_machine_it_was_written_on():
    suffixes = {".py", ".yaml", ".yml", ".toml", ".md", ".jsonl"}
    folders = [PACKAGE, ROOT / "recipes", ROOT / "scripts", ROOT / "tests"]
    machine = ["/" + "work/", "/" + "root/", "bash" + "_jobs"]
    found = [
        f"{path.relative_to(ROOT)} names {name}"
        for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in suffixes
        for name in machine if name in path.read_text(encoding="utf-8")
    ]
    assert found == []
