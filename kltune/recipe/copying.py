"""Copy a packaged recipe with the reward functions it names, so that it can be changed."""

from pathlib import Path

from kltune.errors import RecipeError, StorageError
from kltune.recipe.checks import function_values
from kltune.recipe.packaged import find_recipe
from kltune.recipe.reading import load_recipe
from kltune.recipe.writing import differing_keys


def copy_recipe(name: str, destination: Path) -> tuple[list[Path], list[str]]:
    """Copy a recipe and its reward functions.

    Args:
        name: a packaged recipe, or a path.
        destination: a folder, made if need be, or a file that ends in .yaml.

    Returns:
        The files written, and notes on paths that mean something else at the new place.

    Raises:
        RecipeError: no such recipe, or a file is already there; then nothing was written.
        StorageError: it cannot be written.
    """
    source = find_recipe(name)
    recipe = load_recipe(name)
    is_file = destination.suffix in (".yaml", ".yml") and not destination.is_dir()
    target = destination if is_file else destination / source.name
    functions = dict(function_values(recipe))
    plan = {target: source}
    for value in functions.values():
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
        raise StorageError(f"cannot write {error.filename}: {error.strerror}") from error
    return written, notes_on_paths(name, target, set(functions))


def notes_on_paths(name: str, target: Path, functions: set[str]) -> list[str]:
    """Which relative paths name other files now that the recipe lies elsewhere."""
    try:
        changed = differing_keys(load_recipe(name), load_recipe(target))
    except RecipeError as error:
        return [f"paths in the copy start at {target.parent}; correct them: {error}"]
    moved = [line for line in changed if line.partition(":")[0] not in functions]
    return [f"relative paths start at the copy now; correct it if need be: {line}" for line in moved]
