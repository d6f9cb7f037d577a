"""The front door: thin typed commands. A stage is imported inside its command, so help and wrong recipes are quick.

stdout carries the result and nothing else. Everything a user can put right ends in one message on stderr and the exit
code of its kind (``errors.py``); a traceback means a bug in kltune, exit code 1.
"""

import errno
import json
import math
import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from kltune import __version__
from kltune.errors import Interrupted, KltuneError, StorageError
from kltune.recipe import (
    RecipeFaults,
    copy_recipe,
    dump_recipe,
    load_recipe,
    packaged_recipes,
    recipe_schema,
    recipe_text,
)

QUIET_LIBRARIES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
CANNOT_WRITE = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
OUT_OF_MEMORY = "out of memory; lower optim.micro_batch_size (results stay the same), or sampling.max_new_tokens"

app = typer.Typer(
    name="kltune", pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True,
    help="Fine-tune language models while holding their KL divergence from a reference to a budget.",
)
recipes = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show, copy and check recipes.")
app.add_typer(recipes, name="recipe")


class Unit(StrEnum):
    """Units of a KL budget."""

    NATS_PER_RESPONSE = "nats_per_response"
    NATS_PER_TOKEN = "nats_per_token"


class Direction(StrEnum):
    """reverse is KL(policy‖reference), forward KL(reference‖policy)."""

    REVERSE = "reverse"
    FORWARD = "forward"
    BOTH = "both"


def finite(value: float | None) -> float | None:
    """Refuse nan and inf, which no range check catches."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def share(value: float) -> float:
    """Refuse what is no confidence."""
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


@app.callback(invoke_without_command=True)
def kltune(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Fine-tune language models while holding their KL divergence from a reference to a budget."""
    if version:
        emit(f"kltune {__version__}")
        raise typer.Exit


@app.command()
def sft(
    recipe: RecipeOption, overrides: SetOption = None, output: OutputOption = None, resume: ResumeOption = False,
    as_json: JSONOption = False,
) -> None:
    """Imitate texts, and report how far that moved the model from its reference."""
    loaded = load_recipe(recipe, overrides or (), "sft", output)
    from kltune.stages.sft import run_sft

    show_result(run_sft(loaded, resume), as_json)


@app.command()
def ppo(
    recipe: RecipeOption, overrides: SetOption = None, output: OutputOption = None, resume: ResumeOption = False,
    as_json: JSONOption = False,
) -> None:
    """Raise a score with clipped policy steps while KL to the reference is held to its target."""
    loaded = load_recipe(recipe, overrides or (), "ppo", output)
    from kltune.stages.ppo import run_ppo

    show_result(run_ppo(loaded, resume), as_json)


@app.command()
def trpo(
    recipe: RecipeOption, overrides: SetOption = None, output: OutputOption = None, resume: ResumeOption = False,
    as_json: JSONOption = False,
) -> None:
    """Raise a score with natural-gradient steps, none of which moves the policy further than max_step_kl."""
    loaded = load_recipe(recipe, overrides or (), "trpo", output)
    from kltune.stages.trpo import run_trpo

    show_result(run_trpo(loaded, resume), as_json)


@app.command("eval-kl")
def eval_kl_command(
    checkpoints: Annotated[list[str], typer.Argument(metavar="CHECKPOINT...", help="Runs, checkpoints or adapters.")],
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="Where prompts and sampling come from.")] = None,
    reference: Annotated[str | None, typer.Option(metavar="MODEL", help="Instead of the recorded reference.")] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help="Prompts to respond to.")] = None,
    responses: Annotated[int | None, typer.Option(min=2, help="Responses to sample.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens; a longer response is cut.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.1, max=10, callback=finite, help="Of both models.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same machine: same numbers.")] = 0,
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", min=0, callback=finite, help="A budget: exit 3 beyond it, 4 undecided.")
    ] = None,
    unit: Annotated[Unit, typer.Option(help="Unit of --max-kl.")] = Unit.NATS_PER_RESPONSE,
    confidence: Annotated[float, typer.Option(callback=share, help="Of intervals and of the verdict.")] = 0.95,
    direction: Annotated[Direction, typer.Option(help="Which way round.")] = Direction.REVERSE,
    top: Annotated[int, typer.Option(min=0, help="How many tokens and prompts of largest KL to list.")] = 10,
    texts: Annotated[str | None, typer.Option(metavar="FILE", help="Human texts, for the alignment tax.")] = None,
    as_json: JSONOption = False,
) -> None:
    """Measure how far checkpoints are from their reference, with error bars, against a budget.

    Exit code 0: within --max-kl (or none given); 3: over it; 4: undecided, more responses are needed.
    """
    if recipe is not None:
        load_recipe(recipe)      # its faults are told before anything slow is imported
    from kltune.stages.eval_kl import EvalKLOptions, render
    from kltune.stages.eval_kl import eval_kl as measure

    options = EvalKLOptions(
        recipe=recipe, reference=reference, prompts=prompts, responses=responses, max_new_tokens=max_new_tokens,
        temperature=temperature, seed=seed, max_kl=max_kl, unit=unit.value, confidence=confidence,
        direction=direction.value, texts=texts, top=top,
    )
    document, code = measure(checkpoints, options)
    emit(to_json(document) if as_json else render(document))
    raise typer.Exit(code)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where to.")] = Path("kltune-demo"),
    as_json: JSONOption = False,
) -> None:
    """The whole walk on a tiny model: no download, no GPU, a few minutes."""
    from kltune.demo import run_demo
    from kltune.demo import summary as table

    result = run_demo(output)
    emit(to_json(result) if as_json else table(result))


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]) -> None:
    """Write report.html of a run again, and print where it is."""
    from kltune.run.page import write_page

    emit(str(write_page(run)))


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
def check_recipe(
    recipe: Annotated[str, typer.Argument(metavar="R.yaml")], overrides: SetOption = None
) -> None:
    """Print the recipe as it would run, every default written out; all faults at once if it would not."""
    emit(dump_recipe(load_recipe(recipe, overrides or ())).rstrip("\n"))


@recipes.command("schema")
def schema(stage: Annotated[str | None, typer.Argument(metavar="[STAGE]")] = None) -> None:
    """Print the JSON schema of recipes, for editors."""
    emit(json.dumps(recipe_schema(stage), indent=2, allow_nan=False))


def emit(text: str) -> None:
    """Print a result; a reader that has gone away is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        drop_stdout()
    except OSError:
        drop_stdout()
        raise


def drop_stdout() -> None:
    """Send what is still buffered nowhere, so that the interpreter does not stumble over it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def to_json(document: dict[str, Any]) -> str:
    """One JSON document; a nan in it is a bug, not a number."""
    return json.dumps(document, indent=2, allow_nan=False)


def show_result(result: dict[str, Any], as_json: bool) -> None:
    """Print what a stage returns: the object of result.json, or a few lines for people."""
    emit(to_json(result) if as_json else summary(result))


def summary(result: dict[str, Any]) -> str:
    """The result of a run in a few lines."""
    kl, lines = result.get("kl") or {}, [f"{result.get('status')}: {result.get('output')}"]
    if result.get("final"):
        lines.append(f"  final   {result['final']}")
    if kl.get("nats_per_response") is not None:
        text = f"  KL      {kl['nats_per_response']:.3g}"
        text += f" ± {kl['stderr']:.2g}" if kl.get("stderr") is not None else ""
        text += " nats per response, KL(policy‖reference)"
        lines.append(text + (f", target {result['target']:g}" if result.get("target") is not None else ""))
    else:
        lines.append("  KL      not measured")
    if result.get("score") is not None:
        lines.append(f"  score   {result['score']:.4g}")
    if result.get("steps") is not None and result.get("seconds") is not None:
        lines.append(f"  steps   {result['steps']} in {result['seconds']:.0f} s")
    return "\n".join(lines)


def complain(error: KltuneError) -> int:
    """Say on stderr what is wrong, and give the exit code of its kind."""
    label = "kltune: stopped:" if isinstance(error, Interrupted) else "kltune: error:"
    plain = any(os.environ.get(name) for name in ("NO_COLOR", "CI")) or os.environ.get("TERM") == "dumb"
    if sys.stderr.isatty() and not plain:
        label = f"\033[31m{label}\033[0m"
    print(f"{label} {error}", file=sys.stderr)
    if isinstance(error, RecipeFaults) and os.environ.get("GITHUB_ACTIONS") == "true":
        for fault in error.faults:
            where = f"file={escaped(fault.place.file, ':,')},line={fault.place.line},col={fault.place.column}"
            print(f"::error {where}::{escaped(f'{fault.key}: {fault.text}')}", file=sys.stderr)
    return error.exit_code


def escaped(text: str, more: str = "") -> str:
    """Text for a GitHub workflow command; properties need ``:`` and ``,`` escaped ``more``."""
    return "".join(f"%{ord(c):02X}" if c in "%\r\n" + more else c for c in text)


def as_user_error(error: Exception) -> KltuneError | None:
    """What a user can put right although a library raised it: no room on disk or in memory; else None."""
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        name = f" {error.filename}" if error.filename else ""
        return StorageError(f"cannot read or write{name}: {error.strerror}")
    # by name: torch has its own class, and importing torch to compare classes would slow every other error
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    ):
        return StorageError(OUT_OF_MEMORY)
    return None


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one command and exit with the code of its outcome.

    Args:
        arguments: the command line without the program's name; default ``sys.argv[1:]``.
    """
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    # Libraries warn each other of renamed attributes; no user of kltune can do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\b.*")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")     # a terminal without ‖ still gets its answer
    try:
        app(args=arguments, prog_name="kltune")
    except KltuneError as error:
        sys.exit(complain(error))
    except (OSError, MemoryError, RuntimeError) as error:
        known = as_user_error(error)
        if known is None:
            raise
        sys.exit(complain(known))
    sys.exit(0)
