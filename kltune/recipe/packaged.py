"""The recipes that come with kltune: where they are, and how a name finds one."""

import os
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from kltune.recipe.faults import Fault, Place, RecipeFaults

PACKAGE = Path(__file__).absolute().parents[1]


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
    """The file that a path or the name of a packaged recipe stands for.

    Raises:
        RecipeError: neither; with the nearest names.
    """
    file = Path(name)
    if name and "\0" not in name and os.path.lexists(file):
        return file
    recipes = packaged_recipes()
    if name.removesuffix(".yaml") in recipes:
        return recipes[name.removesuffix(".yaml")]
    near = get_close_matches(name, recipes, 3, 0.5)
    advice = f"did you mean {' or '.join(near)}?" if near else "kltune recipe list shows the packaged ones"
    raise RecipeFaults(name, [Fault(Place(name), "", f"no such file, and no packaged recipe of that name; {advice}")])
