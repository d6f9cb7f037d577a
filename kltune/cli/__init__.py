"""The front door: thin typed commands. A stage is imported inside its command, so help and wrong recipes are quick.

stdout carries the result and nothing else. Everything a user can put right ends in one message on stderr and the exit
code of its kind (``errors.py``); a traceback means a bug in kltune, exit code 1.
"""

import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from kltune import __version__
from kltune.cli.explain import explain_command
from kltune.cli.measure import eval_kl_command, project_command
from kltune.cli.options import (
    JSONOption,
    OutputOption,
    RecipeOption,
    ResumeOption,
    SetOption,
    TrustOption,
    refuse_untrusted,
)
from kltune.cli.output import as_user_error, complain, emit, emit_document, result_text
from kltune.cli.recipes import recipes
from kltune.cli.sample import sample_command
from kltune.cli.sweep import frontier_command, sweep_command
from kltune.errors import KltuneError
from kltune.recipe import load_recipe
from kltune.run.screen import ShownText

QUIET_LIBRARIES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
app = typer.Typer(
    name="kltune", pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True,
    help="Fine-tune language models while holding their KL divergence from a reference to a budget.",
)
app.add_typer(recipes, name="recipe")


@app.callback(invoke_without_command=True)
def kltune(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Fine-tune language models while holding their KL divergence from a reference to a budget."""
    if version:
        emit(f"kltune {__version__}")
        raise typer.Exit


def add_stage(stage: str, summary: str) -> None:
    """Add the command that runs a stage: ``run_STAGE`` of ``kltune.stages.STAGE``."""

    @app.command(stage, help=summary)
    def run(
        recipe: RecipeOption, overrides: SetOption = None, output: OutputOption = None, resume: ResumeOption = False,
        trust_remote_code: TrustOption = False, as_json: JSONOption = False,
    ) -> None:
        loaded = load_recipe(recipe, overrides or (), stage, output)
        refuse_untrusted(loaded, trust_remote_code)
        run_stage = getattr(import_module(f"kltune.stages.{stage}"), f"run_{stage}")
        emit_document(run_stage(loaded, resume), as_json, result_text)


for name, does in {
    "sft": "Imitate texts, and report how far that moved the model from its reference.",
    "reward": "Fit a reward model to preference pairs, to score responses in ppo and trpo on the policy's own weights.",
    "ppo": "Raise a score with clipped policy steps while KL to the reference is held to its target.",
    "trpo": "Raise a score with natural-gradient steps, none of which moves the policy further than max_step_kl.",
    "dpo": "Learn from preference pairs, with a KL to the reference that is measured and can be held.",
}.items():
    add_stage(name, does)
app.command("eval-kl")(eval_kl_command)
app.command("project")(project_command)
app.command("sweep")(sweep_command)
app.command("frontier")(frontier_command)
app.command("sample")(sample_command)
app.command("explain")(explain_command)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where to.")] = Path("kltune-demo"),
    as_json: JSONOption = False,
) -> None:
    """The whole walk on a tiny model: no download, no GPU, a few minutes."""
    from kltune.demo.run import demo_text, run_demo

    emit_document(run_demo(output), as_json, demo_text)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Instead of report.html in the run, or comparison.html."),
    ] = None,
) -> None:
    """Write report.html of a run again, or one page that compares several runs; print where it is.

    kltune report runs/a runs/b --output comparison.html
    """
    from kltune.report.pages import write_comparison, write_page

    one = len(runs) == 1
    emit(str(write_page(runs[0], output) if one else write_comparison(runs, output or Path("comparison.html"))))


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one command (default ``sys.argv[1:]``) and exit with the code of its outcome."""
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    # Libraries warn each other of renamed attributes; no user of kltune can do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\b.*")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")     # a terminal without ‖ still gets its answer
    if not isinstance(sys.stderr, ShownText):
        sys.stderr = ShownText(sys.stderr)
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
