"""Options that several commands have."""

import math
from typing import Annotated

import typer

from kltune.errors import RecipeError
from kltune.recipe import Recipe


def finite(value: float | None) -> float | None:
    """Refuse nan and inf, which no range check catches."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def confidence_level(value: float) -> float:
    """Refuse a number that is no confidence level."""
    if not 0.5 <= value < 1:
        raise typer.BadParameter(f"{value} is not between 0.5 and 1; 0.95 is usual")
    return value


def refuse_untrusted(recipe: Recipe, trusted: bool) -> None:
    """Refuse a recipe by which a model's own Python would run, unless the command line asks for it too."""
    if recipe.model.trust_remote_code and not trusted:
        raise RecipeError(
            f"model.trust_remote_code: true would run Python that ships with {recipe.model.path}, and a recipe alone "
            "never does; if you have read it, add --trust-remote-code to the command."
        )


TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python that ships with the models; off unless you read it.")
]
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="A YAML file, or the name of a packaged recipe.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one key: --set kl.target=4.")
]
OutputOption = Annotated[
    str | None, typer.Option("--output", "-o", metavar="DIR", help="Folder of the run, instead of run.output.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue an unfinished run from its newest checkpoint.")]
JSONOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
