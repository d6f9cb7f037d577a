"""The house keeps its rules: imports run downhill, public names are explained, nothing unpickles, files stay small."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kltune"
FLOORS = {"errors": 0, "recipe": 1, "core": 1, "lm": 2, "run": 3, "stages": 4, "demo": 5, "cli": 6}
NEIGHBOURS_MAY_MEET = {"core", "recipe", "lm", "run", "cli"}     # not in stages: each stage stands alone
LONGEST_FILE = 350
MAY_RUN_CODE = {"kltune.lm.scorers"}                      # a reward function is the user's own code, read and hashed
MAY_OUTLIVE_ANYTHING = MAY_RUN_CODE | {"kltune.run.loggers"}      # a logger's trouble, whatever it is, ends no run
FORBIDDEN_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "eval"}
FORBIDDEN_IMPORTS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def module_name(path: Path) -> str:
    """kltune/lm/policy.py is kltune.lm.policy, and kltune/lm/__init__.py is kltune.lm."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__main__.py"}
MODULES = {name: path for name, path in FILES.items() if "." in name}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def room(module: str) -> str:
    """'kltune.lm.policy' is in room 'lm'."""
    return module.split(".")[1]


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


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downhill(module):
    for target in sorted(imported_modules(module)):
        downhill = FLOORS[room(target)] < FLOORS[room(module)]
        neighbour = room(target) == room(module) in NEIGHBOURS_MAY_MEET
        assert downhill or neighbour, f"{module} must not import {target}"


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


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_explained(module):
    assert list(public_without_docstring(TREES[module].body, module)) == []


@pytest.mark.parametrize("module", FILES)
def test_nothing_unpickles_or_evaluates(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            bad = FORBIDDEN_IMPORTS & {name.split(".")[0] for name in names}
            assert not bad, f"{module}:{node.lineno} imports {bad}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FORBIDDEN_CALLS, f"{module}:{node.lineno} calls {called}"
            assert called != "exec" or module in MAY_RUN_CODE, f"{module}:{node.lineno} calls exec"


@pytest.mark.parametrize("module", FILES)
def test_a_broad_except_always_raises_again(module):
    for node in ast.walk(TREES[module]):
        if not isinstance(node, ast.ExceptHandler) or module in MAY_OUTLIVE_ANYTHING:
            continue
        caught = ["everything"] if node.type is None else ast.unparse(node.type).strip("()").split(", ")
        broad = {"everything", "Exception", "BaseException"} & set(caught)
        assert not broad or isinstance(node.body[-1], ast.Raise), f"{module}:{node.lineno} swallows {broad}"


@pytest.mark.parametrize("module", FILES)
def test_a_file_is_one_idea(module):
    lines = len(FILES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{module} has {lines} lines; two ideas want two files"


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
