"""``kltune sweep`` and ``kltune frontier``: one recipe over a grid, and what came of it as reward against KL."""

import os
from pathlib import Path
from typing import Annotated

import typer

from kltune.cli.measure import ReferenceOption
from kltune.cli.options import (
    MOST_SEED,
    DeviceOption,
    DTypeOption,
    JSONOption,
    RecipeArgument,
    RecipeOption,
    SetOption,
    TrustOption,
    read_judge,
    read_scorer,
    real,
    recipe_named,
    refuse_untrusted,
    whole,
)
from kltune.cli.output import emit_document
from kltune.cli.recipes import look_before_running
from kltune.recipe import Recipe, load_grid, load_recipe
from kltune.recipe.checks import path_values
from kltune.run.screen import doing

BUDGET = real("a number of nats, at least 0", lambda x: x >= 0)


def sweep_command(
    over: Annotated[
        list[str],
        typer.Option(
            "--over", metavar="KEY=V1,V2,...", help="A key and its values; several --over give every combination."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the sweep.")],
    positional: RecipeArgument = None,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", **whole(1), help="Points at a time.")] = 1,
    trust_remote_code: TrustOption = False,
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
    recipe, output = recipe_named(positional, recipe, "sweep"), Path(os.path.expanduser(output)).absolute()
    axes, points = load_grid(recipe, over, overrides or (), output=output)
    for point in points:
        refuse_untrusted(point.recipe, trust_remote_code)
    unlike = {named_files(point.recipe): point.recipe for point in points}
    for one in unlike.values():
        look_before_running(one)
    from kltune.stages.sweeps.sweep import SweepOptions, sweep, sweep_text

    doing("")       # from here on the points say what they do
    document, code = sweep(axes, points, SweepOptions(recipe, output, tuple(overrides or ()), jobs, trust_remote_code))
    emit_document(document, as_json, sweep_text)
    raise typer.Exit(code)


def named_files(recipe: Recipe) -> tuple[object, ...]:
    """What a recipe reads: points that read the same are looked at once."""
    return tuple(value for value in path_values(recipe) if value[0] != "run.output")


def frontier_command(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Runs, sweeps, or the output of project --curve.")
    ],
    gold: Annotated[
        str | None,
        typer.Option(
            "--gold", metavar="SCORER",
            help="A scorer nobody was trained on: rewards.py:gold, a model's folder, or {kind: ...} as in a recipe.",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge", metavar="URL#MODEL", help="Also the win rate over the reference: an AI judge, or a scorer.",
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="DIR", help="For frontier.json, .svg and .html.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(**BUDGET, help="Nats per response: say which setting to pick.")
    ] = None,
    at: Annotated[
        list[float] | None, typer.Option(**BUDGET, help="Also read every curve off at this KL; may be repeated.")
    ] = None,
    best_of: Annotated[
        int, typer.Option(**whole(), help="Responses of the reference to a prompt for best of n; 0 loads no model.")
    ] = 16,
    responses: Annotated[
        int | None, typer.Option(**whole(2), help="Measure every run afresh on so many common responses.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", metavar="R.yaml", help="Measure afresh, with its prompts and rewards."),
    ] = None,
    reference: ReferenceOption = None,
    scores: Annotated[
        list[str] | None,
        typer.Option("--scores", metavar="FILE", help="Results of lm-evaluation-harness or inspect; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(**whole(0, MOST_SEED), help="Same seed, same machine: same numbers.")] = 0,
    device: DeviceOption = "auto",
    dtype: DTypeOption = None,
    as_json: JSONOption = False,
) -> None:
    """Show reward against KL: runs, sweeps and alpha curves, beside best of n and the law of over-optimisation.

    All runs must share one reference, or be measured against --reference. Seeds of one setting are one point. Each
    run's own final measurement is used, unless --gold, --judge, --recipe, --responses or --reference ask for a fresh
    one.

    \b
    kltune frontier sweeps/target --budget 4 -o frontier
    kltune frontier sweeps/* runs/trpo --gold rewards.py:gold --responses 500 -o frontier
    kltune project runs/far --curve -r my.yaml -o curve; kltune frontier curve sweeps/target --at 2 --at 4
    """
    if recipe is not None:
        load_recipe(recipe)
    scorer = None if gold is None else read_scorer(gold)
    comparer = None if judge is None else read_judge(judge)
    from kltune.report.frontier.page import frontier_text
    from kltune.stages.sweeps.frontier import FrontierOptions, frontier

    document = frontier(runs, FrontierOptions(
        gold=scorer, judge=comparer, output=output, budget=budget, at=tuple(at or ()), best_of=best_of,
        responses=responses, recipe=recipe, reference=reference, scores=tuple(scores or ()), seed=seed, device=device,
        dtype=dtype,
    ))
    emit_document(document, as_json, frontier_text)
