"""``kltune sweep``: one recipe over a grid."""

from pathlib import Path
from typing import Annotated

import typer

from kltune.cli.options import JSONOption, RecipeOption, SetOption
from kltune.cli.output import emit, to_json
from kltune.recipe import load_grid


def sweep_command(
    recipe: RecipeOption,
    over: Annotated[
        list[str],
        typer.Option(
            "--over", metavar="KEY=V1,V2,...", help="A key and its values; several --over give every combination."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the sweep.")],
    overrides: SetOption = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Points at a time.")] = 1,
    as_json: JSONOption = False,
) -> None:
    """Run one recipe over a grid of settings, each point a run of its own.

    The same command goes on where it was stopped, tries again what failed, and does nothing twice; with more values it
    extends the sweep. Every point is checked before the first one runs.

    Exit code 0 if all points finished; else that of the worst: a killed process (137) before 1, 74, 6, 5, 2 and 75.

    \b
    kltune sweep -r tiny/ppo_target --over kl.target=1,3,6,9 --over run.seed=0,1,2 -o sweeps/target
    kltune sweep -r my.yaml --over kl.beta=0.1,0.2,0.4 --set kl.control=fixed -o sweeps/beta --jobs 2
    kltune frontier sweeps/target sweeps/beta --budget 4
    """
    output = output.expanduser().absolute()
    axes, points = load_grid(recipe, over, overrides or (), output=output)
    from kltune.stages.sweep import SweepOptions, render, sweep

    document, code = sweep(axes, points, SweepOptions(recipe, output, tuple(overrides or ()), jobs))
    emit(to_json(document) if as_json else render(document))
    raise typer.Exit(code)
