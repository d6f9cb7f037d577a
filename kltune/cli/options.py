"""Options that several commands have."""

import math
from typing import Annotated

import typer


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


RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="A YAML file, or the name of a packaged recipe.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one key: --set kl.target=4.")
]
OutputOption = Annotated[
    str | None, typer.Option("--output", "-o", metavar="DIR", help="Folder of the run, instead of run.output.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue an unfinished run from its newest checkpoint.")]
JSONOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
