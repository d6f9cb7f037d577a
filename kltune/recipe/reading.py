"""Read a recipe from a YAML file and ``--set`` overrides; every fault is told at once, with its place."""

import contextlib
import copy
import errno
import json
import os
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kltune.errors import RecipeError
from kltune.recipe.checks import MADE, absolute, clashes, path_values
from kltune.recipe.faults import Fault, Place, RecipeFaults
from kltune.recipe.method_checks import baseline_of, responses_per_step
from kltune.recipe.stages import STAGES, Recipe, recipe_digest
from kltune.recipe.wording import (
    dotted,
    listed,
    schema_at,
    unknown_key,
    unknown_name,
    value_found,
    value_wanted,
    wrong_value,
)
from kltune.recipe.yaml_tree import KeyPath, Node, Plain, decode, read_bytes, read_nodes, read_once

PACKAGE = Path(__file__).absolute().parents[1]
NEEDED = {                                       # kinds of a reward entry, and what each cannot do without
    "function": {"path"}, "model": {"path"}, "classifier": {"path"}, "judge": {"url", "model"},
}
SURROGATE = "[\ud800-\udfff]"                  # what a byte that is not UTF-8 is held as
KINDS = tuple(NEEDED)
HELD_OUT_SCORERS = ("eval", "gold"), ("eval", "judge")
def recipes_folder() -> Path:
    """Folder of the packaged recipes: inside the installed package, or beside it in a checkout."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


@cache
def packaged_recipes() -> dict[str, Path]:
    """Names such as ``tiny/ppo_target`` and the files they stand for, in alphabetical order."""
    folder = recipes_folder()
    files = sorted(file for suffix in ("yaml", "yml") for file in folder.rglob(f"*.{suffix}"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def find_recipe(name: str) -> Path:
    """The file that a path or the name of a packaged recipe stands for; else a RecipeError with the nearest names."""
    file = Path(name)
    if name and "\0" not in name and os.path.lexists(file):
        return file
    recipes = packaged_recipes()
    if name.removesuffix(".yaml") in recipes:
        return recipes[name.removesuffix(".yaml")]
    near = get_close_matches(name, recipes, 3, 0.5)
    advice = f"did you mean {' or '.join(near)}?" if near else "kltune recipe list shows the packaged ones"
    raise RecipeFaults(name, [Fault(Place(name), "", f"no such file, and no packaged recipe of that name; {advice}")])


def load_recipe(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), stage: str | None = None, output: str | None = None
) -> Recipe:
    """Read, override and check one recipe.

    Relative paths start at the recipe's folder; a value that names nothing there and does not look like a path is
    kept, because it may be a hub name. The output of a packaged recipe starts at the current folder instead.

    Args:
        path: a YAML file, or the name of a packaged recipe such as ``tiny/ppo_target`` where no such file exists.
        overrides: ``section.key=value`` each, the value in YAML; a later one wins.
        stage: the stage that the command runs; the file must say the same.
        output: replaces ``run.output``, and starts at the current folder.

    Raises:
        RecipeError: all faults, with file, line and column, or with the ``--set`` they come from.
    """
    name = os.fspath(path)
    file = find_recipe(name)
    root, faults = read_nodes(recipe_text(name), name)
    if root is None or not isinstance(root.value, dict):
        what = "an empty file" if root is None or root.value is None else value_found(root)
        text = f"found {what}, wanted sections such as stage: and model:"
        raise RecipeFaults(name, [*faults, Fault(Place(name), "", text)])
    as_written = copy.deepcopy(root)
    for override in overrides:
        faults += apply_override(root, override, name)

    chosen, stage_faults = choose_stage(root, stage)
    faults += stage_faults
    if chosen is None:
        raise RecipeFaults(name, faults)
    folder = file.parent.absolute()
    packaged = file in packaged_recipes().values()
    trusted = is_recorded(as_written, chosen, file)
    recipe, more = validated(root, chosen, folder, trusted=trusted, packaged=packaged)
    faults += more
    if faults or recipe is None:
        raise RecipeFaults(name, faults)
    complete = completed(recipe, file, output)
    complete._name, complete._tree = name, root
    return complete


def is_recorded(root: Node, stage: str, file: Path) -> bool:
    """Whether a recipe is the one that kltune wrote into a run's folder: the run.json there is the record of it."""
    record, content = file.parent / "run.json", None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(read_bytes(record)) if record.is_file() else None
    if not isinstance(content, dict) or content.get("schema") != "kltune.run/1":
        return False
    recipe, faults = validated(root, stage, file.parent.absolute(), trusted=True, packaged=False)
    whole = recipe is not None and not faults
    return whole and content.get("recipe_sha256") == recipe_digest(completed(recipe, file, None))


def recipe_text(name: str) -> str:
    """The text of a recipe, named as for `find_recipe`; a RecipeError if it cannot be read or is no text."""
    try:
        return decode(read_once(find_recipe(name)), name)
    except OSError as error:
        reason = "a folder; name the YAML file in it" if error.errno == errno.EISDIR else error.strerror
        raise RecipeFaults(name, [Fault(Place(name), "", f"cannot be read: {reason}")]) from error


def choose_stage(root: Node, command: str | None) -> tuple[str | None, list[Fault]]:
    """The stage to check against, and what is wrong with the file's own.

    Where that names none, the stage is the command's, or what the rest of the file looks like, so that its other faults
    are told too; None where it looks like none.
    """
    node = root.at(("stage",))
    if node is None:
        text = f"missing; wanted stage: {listed(list(STAGES))}"
        text += f"; this command runs {command}" if command else ""
        return command or likely_stage(root), [Fault(root.place, "stage", text)]
    if not isinstance(node.value, str) or node.value not in STAGES:
        schema = {"enum": list(STAGES), "description": "what this recipe runs"}
        near = get_close_matches(str(node.value), STAGES, 1)
        stage = command or (near[0] if near else likely_stage(root))
        return stage, [Fault(node.place, "stage", wrong_value(("stage",), node, schema))]
    if command is not None and node.value != command:
        text = f"found {node.value}, but the command is kltune {command}; run kltune {node.value}, or another recipe"
        return node.value, [Fault(node.place, "stage", text)]
    return node.value, []


def likely_stage(root: Node) -> str | None:
    """The stage whose own section a recipe has, or else whose rows it names; None where there is neither."""
    own = [stage for stage in STAGES if stage != "reward" and root.at((stage,)) is not None]    # that is what scores
    rows = {"prompts": "ppo", "texts": "sft", "pairs": "dpo"}
    named = [stage for name, stage in rows.items() if root.at(("data", name)) is not None]
    return next(iter([*own, *named]), None)


def apply_override(root: Node, override: str, name: str) -> list[Fault]:
    """Put the value of one ``--set`` into the tree; its place from then on is the ``--set``."""
    place = Place(name, override=override)
    key, equals, text = override.partition("=")
    path = tuple(int(step) if step.isdecimal() and step.isascii() else step for step in key.strip().split("."))
    if re.search(SURROGATE, override):
        return [Fault(place, "", "not UTF-8; give what it names a name that is")]
    if not equals or "" in path:
        return [Fault(place, "", "wanted section.key=value, such as --set kl.target=4")]
    node, faults = read_nodes(decode(os.fsencode(text), name), name, override)
    node = node or Node(None, place)
    parent = root
    for depth, step in enumerate(path[:-1]):
        child = parent.at((step,))
        if child is None or child.value is None:                  # a section the file does not mention
            if not isinstance(parent.value, dict) or not isinstance(step, str):
                return [*faults, Fault(place, dotted(path[: depth + 1]), f"not found; {kind_met(parent)}")]
            child = Node({}, place)
            parent.value[step], parent.key_places[step] = child, place
        parent = child
    match parent.value, path[-1]:
        case dict() as section, str() as last:
            section[last], parent.key_places[last] = node, place
        case list() as entries, int() as index if index < len(entries):
            entries[index] = node
        case _:
            return [*faults, Fault(place, key, f"cannot be set; {kind_met(parent)}")]
    return faults


def kind_met(node: Node) -> str:
    """What a --set met where it wanted a section or a list."""
    if isinstance(node.value, list):
        return f"the recipe has a list of {len(node.value)} here, counted from 0"
    if isinstance(node.value, dict):
        return "the recipe has a section here, whose keys are names"
    return f"the recipe has {value_found(node)} here"


def validated(
    root: Node, stage: str, folder: Path, *, trusted: bool, packaged: bool
) -> tuple[Recipe | None, list[Fault]]:
    """Validate the tree, then the rules between keys on as much of it as is sound."""
    plain = {**root.plain(), "stage": stage}
    faults: dict[KeyPath, Fault] = {}
    try:
        recipe = STAGES[stage].model_validate(plain)
    except ValidationError as error:
        faults = field_faults(error.errors(include_url=False), root, stage)
        recipe = sound_part(plain, stage, list(faults))
    if recipe is None:
        return None, list(faults.values())
    names = [dotted(path) for path in faults]
    between = [
        Fault(place_of_clash(root, keys), keys[0], text)
        for keys, text in clashes(recipe, folder, trusted, packaged)
        if not any(overlap(key, name) for key in keys for name in names)
    ]
    return recipe, [*faults.values(), *between]


def overlap(key: str, other: str) -> bool:
    """Whether two dotted keys are the same, or one lies inside the other."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def place_of_clash(root: Node, keys: Iterable[str]) -> Place:
    """Where the first key of a rule stands; if the recipe does not write it, the first one it does write."""
    paths = [tuple(int(step) if step.isdecimal() else step for step in key.split(".")) for key in keys]
    written = [path for path in paths if root.at(path) is not None]
    return root.place_of((written or paths)[0])


def field_faults(errors: list[ErrorDetails], root: Node, stage: str) -> dict[KeyPath, Fault]:
    """pydantic's errors as faults, one for each key, in our words."""
    faults: dict[KeyPath, Fault] = {}
    for error in errors:
        if error["type"] == "default_factory_not_called":         # follows from a fault in another key
            continue
        path = path_of(error, root)
        node = root.at(path)
        if error["loc"][-1] == "[key]":                            # of a mapping whose keys are some names
            names = schema_at(stage, path[:-1], root)["propertyNames"]["enum"]
            fault = Fault(root.place_of_key(path), dotted(path), unknown_name(str(path[-1]), names))
        elif error["type"] == "extra_forbidden":
            fault = Fault(root.place_of_key(path), dotted(path), unknown_key(stage, path, root))
        elif error["type"] == "missing":
            schema = schema_at(stage, path, root)
            text = f"missing, wanted {value_wanted(schema)} ({schema['description']})"
            fault = Fault(root.place_of(path), dotted(path), text)
        elif error["type"].startswith("union_tag"):
            path = (*path, "kind")
            kind = root.at(path)
            what = f"found {value_found(kind)}" if kind else "missing"
            near = get_close_matches(str(kind.value), KINDS, 1) if kind else []
            text = f"{what}, wanted {listed(list(KINDS))}" + (f"; did you mean {near[0]}?" if near else "")
            if joined := [key for key in root.at(path[:-1]).value if key.startswith("kind:")]:
                text += f"; write a space behind the colon: {joined[0].replace(':', ': ', 1)}"
            fault = Fault(root.place_of(path), dotted(path), text)
        else:
            assert node is not None, error
            fault = Fault(node.place, dotted(path), wrong_value(path, node, schema_at(stage, path, root)))
        faults.setdefault(path, fault)
    # of a key and something inside it, the inner fault says more
    return {path: fault for path, fault in faults.items()
            if not any(other != path and other[: len(path)] == path for other in faults)}


def path_of(error: ErrorDetails, root: Node) -> KeyPath:
    """Where an error is in the tree; pydantic's own steps (which option of a union it tried) are left out."""
    path: KeyPath = ()
    steps, kind_passed = error["loc"], False
    for depth, step in enumerate(steps):
        in_entry = (path[:1] == ("reward",) and len(path) == 2) or path in HELD_OUT_SCORERS
        is_kind = step in KINDS and in_entry and not kind_passed      # the step after it may be a key of such a name
        kind_passed = kind_passed or is_kind
        last_missing = error["type"] == "missing" and depth == len(steps) - 1
        if not is_kind and (root.at((*path, step)) is not None or last_missing):
            path = (*path, step)
    return path


def sound_part(plain: dict[str, Plain], stage: str, bad: list[KeyPath]) -> Recipe | None:
    """The recipe without its faulty values, what is required filled in, so that the rest can be checked."""
    sound = copy.deepcopy(plain)
    for path in bad:
        holder: Plain = sound
        for step in path[:-1]:
            if isinstance(holder, dict) and isinstance(holder.get(step), list) and step != "reward":
                holder.pop(step)                           # a list with a faulty entry goes as a whole
            holder = holder[step] if isinstance(holder, list) else holder.get(step, {})
        if isinstance(holder, list):
            holder[path[-1]] = None                        # the other entries keep their numbers
        else:
            holder.pop(path[-1], None)
    model, reward, evaluation = sound.get("model"), sound.get("reward"), sound.get("eval")
    sound["model"] = {"path": "?", **(model if isinstance(model, dict) else {})}
    if stage == "distill":
        distill = sound.get("distill")
        sound["distill"] = {"teacher": "?", **(distill if isinstance(distill, dict) else {})}
    if isinstance(reward, list):
        sound["reward"] = [entry if is_scorer(entry) else {"kind": "model", "path": "?"} for entry in reward]
    for _, name in HELD_OUT_SCORERS:
        if isinstance(evaluation, dict) and not is_scorer(evaluation.get(name)):
            evaluation.pop(name, None)
    try:
        return STAGES[stage].model_validate(sound)
    except ValidationError:
        return None          # faults that hide each other; the second look comes when these are put right


def is_scorer(entry: Plain) -> bool:
    """Whether a reward entry still has what every scorer needs."""
    return isinstance(entry, dict) and entry.get("kind") in KINDS and NEEDED[entry["kind"]] <= entry.keys()


def completed(recipe: Recipe, file: Path, output: str | None) -> Recipe:
    """The recipe with absolute paths, and the defaults that depend on other keys.

    Raises:
        RecipeError: a folder's name is not UTF-8.
    """
    folder = file.parent.absolute()
    whole = recipe.model_dump()
    for key, value, is_function in path_values(recipe):
        *steps, last = key.split(".")
        holder: Plain = whole
        for step in steps:
            holder = holder[int(step)] if isinstance(holder, tuple) else holder[step]
        made = is_function or key in MADE
        holder[last] = os.path.abspath(folder / os.path.expanduser(value)) if made else absolute(value, folder)
    packaged = file in packaged_recipes().values()
    chosen = output or (recipe.run.output if "output" in recipe.run.model_fields_set else f"runs/{file.stem}")
    start = Path.cwd() if output or packaged else folder
    whole["run"]["output"] = os.path.abspath(start / os.path.expanduser(chosen))
    for place in (str(folder), whole["run"]["output"]):
        if re.search(SURROGATE, place):
            raise RecipeError(f"{place} is not UTF-8, and a recipe's paths are text; give the folder a name that is.")
    if recipe.stage == "ppo":
        whole["ppo"]["baseline"] = baseline_of(recipe)
    own = getattr(recipe, recipe.stage, None)
    if recipe.stage in ("ppo", "distill") and "minibatch_size" not in own.model_fields_set:
        responses = responses_per_step(recipe)
        whole[recipe.stage]["minibatch_size"] = next(size for size in range(64, 0, -1) if responses % size == 0)
    complete = type(recipe).model_validate(whole)
    complete._folder = folder
    return complete
