"""``kltune recipe``: list, show, copy and check recipes."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from kltune.cli.options import SetOption
from kltune.cli.output import emit, emit_json
from kltune.recipe import copy_recipe, dump_recipe, load_recipe, packaged_recipes, recipe_schema, recipe_text

recipes = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show, copy and check recipes.")


@recipes.command("list")
def list_recipes() -> None:
    """Names of the packaged recipes, each with its first line."""
    names = packaged_recipes()
    width = max(map(len, names), default=0)
    for name, file in names.items():
        first = recipe_text(str(file)).partition("\n")[0]
        emit(f"{name:<{width}}  {first.lstrip('# ') if first.startswith('#') else ''}".rstrip())


@recipes.command("show")
def show_recipe(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a packaged recipe as it was written."""
    emit(recipe_text(name).rstrip("\n"))


@recipes.command("copy")
def copy_command(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    destination: Annotated[Path, typer.Argument(metavar="[DEST]", help="A folder, or a .yaml file.")] = Path("."),
) -> None:
    """Copy a packaged recipe and its reward functions to start your own; nothing is overwritten."""
    copied, notes = copy_recipe(name, destination)
    emit("\n".join(map(str, copied)))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


@recipes.command("check")
def check_recipe(recipe: Annotated[str, typer.Argument(metavar="R.yaml")], overrides: SetOption = None) -> None:
    """Print the recipe as it would run, every default written out; all faults at once if it would not."""
    emit(dump_recipe(load_recipe(recipe, overrides or ())).rstrip("\n"))


@recipes.command("schema")
def schema(stage: Annotated[str | None, typer.Argument(metavar="[STAGE]")] = None) -> None:
    """Print the JSON schema of recipes, for editors."""
    emit_json(recipe_schema(stage))
