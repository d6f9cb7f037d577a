"""The points of a sweep: one recipe, and every combination of the values that ``--over`` gives some of its keys."""

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kltune.recipe.faults import Fault, Place, RecipeFaults
from kltune.recipe.reading import load_recipe
from kltune.recipe.stages import Recipe, recipe_digest
from kltune.recipe.yaml_tree import resolve

OPENING, CLOSING = "[{", "]}"
NOT_SWEPT = {
    "run.output": "the sweep gives every point a folder of its own",
    "stage": "a sweep has one stage; run one sweep for each",
}
LONGEST_NAME = 180      # of a folder, in bytes; file systems end at 255, and a log's name is longer


@dataclass(frozen=True)
class Axis:
    """A key and the values it takes, as they were written."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class GridPoint:
    """One run of a sweep. overrides: ``key=value`` of each axis. name: of its folder, the same in every sweep."""

    name: str
    overrides: tuple[str, ...]
    recipe: Recipe


def load_grid(
    path: str, over: Sequence[str], overrides: Sequence[str] = (), *, output: Path
) -> tuple[list[Axis], list[GridPoint]]:
    """Read every point of a grid; the last axis runs fastest.

    Args:
        over: ``key=value,value,...`` each; a comma inside brackets or quotes separates nothing.
        overrides: ``--set`` of all points.
        output: the folder of the sweep.

    Raises:
        RecipeError: all faults of all points at once, each once.
    """
    axes, faults = read_axes(path, over, overrides)
    if faults:
        raise RecipeFaults(path, faults)
    points: dict[str, GridPoint] = {}
    for values in itertools.product(*(axis.values for axis in axes)):
        own = tuple(f"{axis.key}={value}" for axis, value in zip(axes, values, strict=True))
        name = point_name(own)
        try:
            recipe = load_recipe(path, (*overrides, *own), output=str(output / name))
        except RecipeFaults as error:
            faults += [
                replace(fault, place=replace(fault.place, option="--over")) if fault.place.override in own else fault
                for fault in error.faults
            ]
            continue
        twin = points.setdefault(recipe_digest(recipe), GridPoint(name, own, recipe))
        if twin.overrides != own:
            text = f"the same run as {', '.join(twin.overrides)}; give each point once"
            faults.append(Fault(Place(path, override=", ".join(own), option="--over"), "", text))
    if faults:
        raise RecipeFaults(path, faults)
    return axes, list(points.values())


def read_axes(path: str, over: Sequence[str], overrides: Sequence[str]) -> tuple[list[Axis], list[Fault]]:
    """The axes, and what is wrong with how they were written."""
    axes: list[Axis] = []
    faults: list[Fault] = []
    taken = {override.partition("=")[0].strip() for override in overrides}
    for text in over:
        key, equals, rest = text.partition("=")
        key, values = key.strip(), tuple(value.strip() for value in split_values(rest))
        place = Place(path, override=text, option="--over")
        if not equals or not key or "" in values:
            faults.append(Fault(place, "", "wanted section.key=value,value, such as --over kl.target=1,3,6"))
        elif key in NOT_SWEPT:
            faults.append(Fault(place, key, NOT_SWEPT[key]))
        elif key in {axis.key for axis in axes}:
            faults.append(Fault(place, key, "given to --over twice; write all its values in one"))
        elif key in taken:
            faults.append(Fault(place, key, "also given to --set, which would be overridden; keep one"))
        elif len({point_name([f"{key}={value}"]) for value in values}) < len(values):
            faults.append(Fault(place, key, "a value is given twice; keep one"))
        else:
            axes.append(Axis(key, values))
    return axes, faults


def split_values(text: str) -> list[str]:
    """The text in pieces, cut at the commas that stand in no brackets and no quotes."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in OPENING) - (letter in CLOSING)
        if letter == "," and depth == 0 and not quote:
            values.append("")
        else:
            values[-1] += letter
    return values


def point_name(overrides: Sequence[str]) -> str:
    """``kl.target=3,run.seed=0``: a folder's name, whatever way a number was written.

    What a folder cannot be called becomes a dash, and a few letters of a digest keep such names apart.
    """
    settings = []
    for override in overrides:
        key, _, text = override.partition("=")
        value = resolve(text)
        written = f"{value:.15g}" if isinstance(value, float) else text
        settings.append(f"{key}={written}")
    name = ",".join(settings)
    plain = re.sub(r"[^\w.+=,-]+", "-", name, flags=re.ASCII)
    if plain == name and len(name) <= LONGEST_NAME:
        return name
    return f"{plain[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
