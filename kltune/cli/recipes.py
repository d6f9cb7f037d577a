"""``kltune recipe``: list, show, copy and check recipes."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from kltune.cli.options import Command, SetOption
from kltune.cli.output import emit, emit_json
from kltune.recipe import (
    Recipe,
    copy_recipe,
    dump_recipe,
    find_recipe,
    load_recipe,
    packaged_recipes,
    recipe_schema,
    recipe_text,
)
from kltune.run.files import is_finished
from kltune.run.screen import doing
from kltune.run.subprocesses import STARTED, is_extra_process

recipes = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show, copy and check recipes.")


@recipes.command("list", cls=Command)
def list_recipes() -> None:
    """Names of the packaged recipes, each with its first line.

    kltune recipe list
    """
    names = packaged_recipes()
    width = max(map(len, names), default=0)
    for name, file in names.items():
        first = recipe_text(str(file)).partition("\n")[0]
        emit(f"{name:<{width}}  {first.lstrip('# ') if first.startswith('#') else ''}".rstrip())


@recipes.command("show", cls=Command)
def show_recipe(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a packaged recipe as it was written.

    kltune recipe show start/ppo
    """
    emit(recipe_text(name).rstrip("\n"))


@recipes.command("copy", cls=Command, short_help="Copy a packaged recipe and its rewards, to change it.")
def copy_command(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    destination: Annotated[Path, typer.Argument(metavar="[DEST]", help="A folder, or a .yaml file.")] = Path("."),
) -> None:
    """Copy a packaged recipe and its reward functions to start your own; nothing is overwritten.

    kltune recipe copy start/ppo my-run
    """
    copied, notes = copy_recipe(name, destination)
    emit("\n".join(map(str, copied)))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


@recipes.command("check", cls=Command, short_help="Every fault at once; prints the recipe as it would run.")
def check_recipe(
    recipe: Annotated[str, typer.Argument(metavar="R.yaml")],
    overrides: SetOption = None,
    alone: Annotated[bool, typer.Option("--recipe-only", help="Look at no file that the recipe names.")] = False,
) -> None:
    """Print the recipe as it would run, every default written out; all faults at once if it would not.

    Also looked at are the model's folder, the first rows of each file, and each reward function, which is imported. A
    packaged recipe is checked alone: its files are yours to bring.

    kltune recipe check my.yaml --set kl.target=4
    """
    loaded = load_recipe(recipe, overrides or ())
    if not alone and find_recipe(recipe) not in packaged_recipes().values():
        look_at_inputs(loaded)
    emit(dump_recipe(loaded).rstrip("\n"))


def look_at_inputs(recipe: Recipe) -> None:
    """Refuse a recipe that names what is missing or cannot be read."""
    from kltune.lm.rewards.missing import check_inputs
    from kltune.run.loggers import wanted_loggers

    doing("looking at what the recipe names")
    wanted_loggers(recipe.run.loggers)
    for note in check_inputs(recipe):
        print(f"note: {note}", file=sys.stderr)


def look_before_running(recipe: Recipe) -> None:
    """The same, unless its run has finished, which reads nothing again, or another process of this run has looked."""
    if not (is_finished(Path(recipe.run.output)) or is_extra_process() or STARTED in os.environ):
        look_at_inputs(recipe)


@recipes.command("schema", cls=Command)
def schema(stage: Annotated[str | None, typer.Argument(metavar="[STAGE]")] = None) -> None:
    """Print the JSON schema of recipes, for editors.

    kltune recipe schema ppo
    """
    emit_json(recipe_schema(stage))
