"""What is written of a recipe: YAML, digest, JSON schema, differences, a copy to be changed, and its keys explained."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from inspect import getdoc
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import Field, TypeAdapter

from kltune.errors import RecipeError, StorageError
from kltune.recipe.checks import SOURCES, UNREAD, by_dotted_key, path_values
from kltune.recipe.reading import find_recipe, load_recipe
from kltune.recipe.sections.fields import Section
from kltune.recipe.stages import (
    STAGES,
    DistillRecipe,
    DPORecipe,
    PPORecipe,
    Recipe,
    RewardRecipe,
    SFTRecipe,
    TRPORecipe,
    comparable,
)
from kltune.recipe.wording import value_wanted
from kltune.recipe.yaml_tree import resolve


class _Dumper(yaml.SafeDumper):
    """Writes text so that our own reader takes it for text, and repeats values instead of pointing at them."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(resolve(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; it loads again to an equal recipe."""
    return _yaml(recipe.model_dump())


def _yaml(value: Any, flow: bool | None = False) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6, default_flow_style=flow)


def differing_keys(old: Recipe, new: Recipe) -> list[str]:
    """Every key in which two recipes differ, as ``kl.target: was 6.0, now 4.0``."""
    return differing_settings(flat_settings(old), flat_settings(new))


def differing_settings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The same of settings by dotted key."""
    was, now = ({key: as_written(value) for key, value in settings.items()} for settings in (before, after))
    return [
        f"{key}: was {was.get(key, 'absent')}, now {now.get(key, 'absent')}"
        for key in sorted(was.keys() | now.keys())
        if key not in was or key not in now or before[key] != after[key]
    ]


def flat_settings(recipe: Recipe) -> dict[str, Any]:
    """What decides the numbers of a run, by dotted key."""
    return by_dotted_key(comparable(recipe))


def as_written(value: Any) -> str:
    """A value as a recipe writes it, if in JSON's way."""
    return json.dumps(value, ensure_ascii=False)


def recipe_schema(stage: str | None = None) -> dict[str, Any]:
    """JSON schema of one stage, or of all of them told apart by ``stage``; for editors."""
    if stage is not None and stage not in STAGES:
        raise RecipeError(f"no stage {stage}; the stages are {', '.join(STAGES)}")
    anyone = Annotated[
        SFTRecipe | RewardRecipe | PPORecipe | TRPORecipe | DPORecipe | DistillRecipe, Field(discriminator="stage")
    ]
    schema = TypeAdapter(STAGES[stage] if stage else anyone).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "kltune recipe", **schema}


def copy_recipe(name: str, destination: Path) -> tuple[list[Path], list[str]]:
    """Copy a recipe and its reward functions into a folder, made if need be, or a file that ends in .yaml.

    Returns:
        The files written, and a note on the lines that name what is not there.

    Raises:
        RecipeError: no such recipe, or a file is already there; then nothing was written.
        StorageError: it cannot be written.
    """
    source = find_recipe(name)
    recipe = load_recipe(name)
    is_file = destination.suffix in (".yaml", ".yml") and not destination.is_dir()
    target = destination if is_file else destination / source.name
    plan, functions = {target: source}, set()
    for key, value, is_function in path_values(recipe):
        if is_function:
            functions.add(key)
            file = Path(value.rpartition(":")[0])
            plan[target.parent / file.relative_to(recipe.folder)] = file
    # a reward file with the same bytes is the one wanted: two recipes may share it
    contents = {to: origin.read_bytes() for to, origin in plan.items()}
    present = [to for to in plan if to.exists() and (to == target or to.read_bytes() != contents[to])]
    if present:
        raise RecipeError(f"{present[0]} is already there; name another place: kltune recipe copy {name} DEST")
    written = [to for to in plan if not to.exists()]
    try:
        for to in written:
            to.parent.mkdir(parents=True, exist_ok=True)
            with open(to, "xb") as file:
                file.write(contents[to])
    except OSError as error:
        with suppress(OSError):      # of the error that is on its way
            to.unlink(missing_ok=True)
        raise StorageError(f"cannot write {to}: {error.strerror}; choose another place, or make room.") from error
    return written, lines_to_edit(target, functions)


def lines_to_edit(target: Path, made: set[str]) -> list[str]:
    """The lines of a copy that name what is not there, in one note; [] if all is. made: keys whose files came along."""
    try:
        recipe = load_recipe(target)
    except RecipeError as error:
        return [f"paths in the copy start at {target.parent}; correct them: {error}"]
    missing = [
        f"\n  {target}:{recipe.place(key).line}  {key}: {as_written(value)}"
        for key, value, _ in path_values(load_recipe(target))
        if key != "run.output" and key not in made and not Path(value).exists()
    ]
    return [f"put your own in these lines; paths start at {target.parent}:{''.join(missing)}"] if missing else []


@dataclass(frozen=True)
class RecipeKey:
    """What there is to say of a key, a section or a key of a reward entry.

    meaning, wanted, default: by stage, in a reward entry by kind; default: absent where the key must be written.
    read_by: stages. example: YAML; none of a section.
    """

    key: str
    meaning: dict[str, str]
    wanted: dict[str, str]
    default: dict[str, Any]
    read_by: tuple[str, ...]
    example: str


@dataclass(frozen=True)
class _Field:
    """A key in the recipe of one stage: ``section`` is where it is, ``name`` what it is called there."""

    stage: str
    section: type[Section]
    name: str

    @property
    def info(self) -> Any:
        return self.section.model_fields[self.name]

    @property
    def by(self) -> str:
        """What its meaning may differ by: the kind of a reward entry, else the stage."""
        kind = self.section.model_fields.get("kind")
        return get_args(kind.annotation)[0] if kind else self.stage

    @property
    def inner(self) -> list[type[Section]]:
        """The section that it is, or the kinds of entry that it takes."""
        return _sections_in(self.info.annotation)


def keys_named(word: str) -> list[RecipeKey]:
    """The keys that a word names: dotted (reward entries as reward.url, reward[].url or reward.0.url), or bare."""
    known, key = recipe_keys(), re.sub(r"\[\d*\]|\.\d+(?=\.|$)", "", word)
    if key in known:
        return [known[key]]
    again = ("eval.gold.", "eval.judge.")       # entries like those of reward
    return [known[name] for name in known if name.endswith(f".{key}") and not name.startswith(again)]


@cache
def recipe_keys() -> dict[str, RecipeKey]:
    """Every section and key of every stage that reads it, by its dotted name."""
    fields: dict[str, list[_Field]] = {}
    for stage, recipe in STAGES.items():
        for key, field in _fields_under(stage, recipe):
            if _is_read(stage, key):
                fields.setdefault(key, []).append(field)
    return {key: _recipe_key(key, same_key) for key, same_key in fields.items()}


def _recipe_key(key: str, fields: list[_Field]) -> RecipeKey:
    meaning, range_, default = {}, {}, {}
    for field in fields:
        is_section = len(field.inner) == 1
        doc = getdoc(field.inner[0]) if is_section else field.info.description
        meaning[field.by] = doc.partition("\n\n")[0].replace("\n", " ").replace("``", "`")
        range_[field.by] = value_wanted(_properties(field.section)[field.name])
        rows = SOURCES.get(field.stage)      # checks.py asks for keys that have a default for the sake of other stages
        asked_for = key == f"data.{rows}" or (key == "reward" and rows == "prompts")
        if not (is_section or field.info.is_required() or asked_for):
            default[field.by] = getattr(field.section.model_construct(), field.name)
    stages = tuple(dict.fromkeys(field.stage for field in fields))
    return RecipeKey(key, meaning, range_, default, stages, "" if is_section else _example(key, fields[0]))


def _example(key: str, field: _Field) -> str:
    outer = key.split(".")[:-1]
    beside = _smallest(field.section) if outer else {}
    entry: Any = {**beside, field.name: _likely(field)}
    for name in reversed(outer):
        entry = {name: [entry] if name == "reward" else entry}
    return _yaml(entry, None if outer else False).rstrip("\n")


def _likely(field: _Field) -> Any:
    """A value worth showing: one that is given as an example, else the default."""
    if field.info.examples:
        return field.info.examples[0]
    if field.inner:
        return [_smallest(field.inner[0])]
    if field.info.is_required():
        return get_args(field.info.annotation)[0]
    return getattr(field.section.model_construct(), field.name)


def _smallest(section: type[Section]) -> dict[str, Any]:
    """A reward entry with nothing but what must be written."""
    fields = [_Field("", section, name) for name, info in section.model_fields.items() if info.is_required()]
    return {field.name: _likely(field) for field in fields}


def _is_read(stage: str, key: str) -> bool:
    """Whether a stage reads a key that its recipe has: some it shares with others, and refuses."""
    rows = (SOURCES[stage],) if stage in SOURCES else ("prompts", "pairs")
    section, name, *_ = [*key.split("."), ""]
    foreign_rows = section == "data" and name in ("prompts", "texts", "pairs") and name not in rows
    return not foreign_rows and f"{section}.{name}" not in UNREAD.get(stage, {})


def _fields_under(stage: str, section: type[Section], prefix: str = "") -> Iterator[tuple[str, _Field]]:
    for name in section.model_fields:
        field = _Field(stage, section, name)
        yield prefix + name, field
        for inner in field.inner:
            yield from _fields_under(stage, inner, f"{prefix}{name}.")


def _sections_in(annotation: Any) -> list[type[Section]]:
    if options := get_args(annotation):
        return [section for option in options for section in _sections_in(option)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, Section) else []


@cache
def _properties(section: type[Section]) -> dict[str, Any]:
    return section.model_json_schema()["properties"]
