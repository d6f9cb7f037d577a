"""The front door: thin typed commands. A stage is imported inside its command, so help and wrong recipes are quick.

stdout carries the result and nothing else. Everything a user can put right ends in one message on stderr and the exit
code of its kind (``errors.py``); a traceback means a bug in kltune, exit code 1.
"""

import os
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from kltune import __version__
from kltune.cli.doctor import doctor_command
from kltune.cli.explain import explain_command
from kltune.cli.init import init_command
from kltune.cli.measure import eval_kl_command, merge_command, project_command
from kltune.cli.options import (
    MOST_SEED,
    Command,
    DryRunOption,
    JSONOption,
    OutputOption,
    ProcessesOption,
    RecipeArgument,
    RecipeOption,
    ResumeOption,
    SetOption,
    TrustOption,
    in_processes,
    recipe_named,
    refuse_untrusted,
    whole,
)
from kltune.cli.output import as_user_error, complain, emit, emit_document, plan_text, result_text
from kltune.cli.recipes import look_before_running, recipes
from kltune.cli.sample import compare_command, sample_command
from kltune.cli.streams import LossyText, guard_streams, has_no_reader, leave_stdout
from kltune.cli.sweep import frontier_command, sweep_command
from kltune.errors import KltuneError
from kltune.recipe import load_recipe
from kltune.run.screen import ShownText, doing, signs_of_life, undressed
from kltune.run.subprocesses import STARTED, end_at_once, end_with_torchrun, is_extra_process, on_stop_signals

QUIET_LIBRARIES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
# How long a thread of libgomp, which torch's CPU build computes with, spins before it sleeps; read when torch is
# imported. With two other busy processes on two cores a PPO step of a small model took 17 to 50 s by libgomp's default
# and 4 to 10 by this; on idle cores 1.17 and 1.13 (medians of three).
SPINNING = {"GOMP_SPINCOUNT": "5000"}
SHORT = {       # of a list that is 80 columns wide
    "sft": "Imitate texts; how far that moved the model is measured.",
    "reward": "Fit a reward model to preference pairs.",
    "ppo": "Raise a score with clipped steps, the KL held to a target.",
    "trpo": "Raise a score with natural-gradient steps inside a KL ball.",
    "dpo": "Learn from preference pairs, the KL measured and held.",
    "distill": "Imitate a teacher on own responses, the KL held to a target.",
    "eval-kl": "How far checkpoints are from their reference; a gate for CI.",
    "project": "Scale an adapter back to a KL budget.",
    "merge": "Make an adapter and its base one model.",
    "sweep": "Run one recipe over a grid of settings.",
    "frontier": "Show reward against KL, and which setting to pick.",
    "sample": "Ask a checkpoint and its reference the same prompts.",
    "compare": "How often a judge prefers one checkpoint to another.",
    "explain": "Explain a topic, a key, a metric or an exit code.",
    "init": "Write a recipe that runs as it is for your model and data.",
    "doctor": "See whether this machine can run kltune, and what it lacks.",
    "demo": "The whole walk on a tiny model, in a few minutes.",
    "report": "Write report.html again, or one page that compares runs.",
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

    example = f"kltune {stage} my.yaml --set run.seed=1 --output runs/{stage}-1"

    @app.command(stage, help=f"{summary}\n\n{example}", short_help=SHORT[stage], cls=Command)
    def run(
        context: typer.Context,
        positional: RecipeArgument = None, recipe: RecipeOption = None, overrides: SetOption = None,
        output: OutputOption = None, resume: ResumeOption = False, processes: ProcessesOption = None,
        trust_remote_code: TrustOption = False, dry_run: DryRunOption = False, as_json: JSONOption = False,
    ) -> None:
        changes = [*(overrides or ()), *([] if processes is None else [f"run.processes={processes}"])]
        loaded = load_recipe(recipe_named(positional, recipe, stage), changes, stage, output)
        refuse_untrusted(loaded, trust_remote_code)
        if STARTED not in os.environ:       # else who started this process has said it, and looked
            print(f"{stage} {loaded.name}: looking at what it names, then loading the libraries", file=sys.stderr)
        look_before_running(loaded)
        if dry_run:
            from kltune.train.plan import plan

            return emit_document(plan(loaded), as_json, plan_text)
        in_processes(context, loaded.run.processes, stage=True)
        doing("loading the libraries")
        run_stage = getattr(import_module(f"kltune.stages.{stage}"), f"run_{stage}")
        emit_document(run_stage(loaded, resume), as_json, result_text)


for name, does in {
    "sft": "Imitate texts, and report how far that moved the model from its reference.",
    "reward": "Fit a reward model to preference pairs, to score responses in ppo and trpo on the policy's own weights.",
    "ppo": "Raise a score with clipped policy steps while KL to the reference is held to its target.",
    "trpo": "Raise a score with natural-gradient steps, none of which moves the policy further than max_step_kl.",
    "dpo": "Learn from preference pairs, with a KL to the reference that is measured and can be held.",
    "distill": "Imitate a teacher on the policy's own responses while KL to the reference is held to its target.",
}.items():
    add_stage(name, does)
for name, command in {
    "eval-kl": eval_kl_command, "project": project_command, "merge": merge_command, "sweep": sweep_command,
    "frontier": frontier_command, "sample": sample_command, "compare": compare_command,
    "explain": explain_command, "init": init_command, "doctor": doctor_command,
}.items():
    app.command(name, short_help=SHORT[name], cls=Command)(command)


@app.command(short_help=SHORT["demo"], cls=Command)
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where to.")] = Path("kltune-demo"),
    hacking: Annotated[bool, typer.Option(help="Run it without a price on KL as well.")] = True,
    seed: Annotated[int, typer.Option(**whole(0, MOST_SEED), help="Of its runs.")] = 0,
    as_json: JSONOption = False,
) -> None:
    """The whole walk on a tiny model: no download, no GPU, two to four minutes.

    kltune demo --output my-demo
    """
    typer.echo("kltune demo: two to four minutes on two cores; loading the libraries", err=True)
    from kltune.demo.run import demo_text, run_demo

    emit_document(run_demo(output, seed=seed, hacking=hacking), as_json, demo_text)


@app.command(short_help=SHORT["report"], cls=Command)
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


def alive() -> AbstractContextManager[None]:
    """Within: whoever waits hears of it; not on a stream of a test, or of a program that calls ``main``."""
    stream = undressed(sys.stderr)
    if not isinstance(stream, LossyText):
        return nullcontext()
    return signs_of_life(sys.stderr.write, lambda: stream.written_at)


def show_bug() -> None:
    """Let a traceback be seen, in whichever process."""
    sys.stderr = sys.__stderr__ if is_extra_process() else sys.stderr


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one command (default ``sys.argv[1:]``) and exit with the code of its outcome."""
    for name, value in (QUIET_LIBRARIES | ({} if "OMP_WAIT_POLICY" in os.environ else SPINNING)).items():
        os.environ.setdefault(name, value)
    # Libraries warn each other of renamed attributes; no user of kltune can do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\b.*")
    guard_streams()
    end_with_torchrun()
    if is_extra_process():      # it computes what the first one does, which says it
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if not isinstance(sys.stderr, ShownText):
        sys.stderr = ShownText(sys.stderr)
    try:
        with alive(), on_stop_signals(end_at_once):      # until a run has something to save
            command = None if arguments is None else (sys.executable, "-m", "kltune", *arguments)
            app(args=arguments, prog_name="kltune", obj=command)
    except SystemExit as left:
        if not isinstance(left.__context__, BrokenPipeError):
            raise
        if not has_no_reader(1):        # typer takes every broken pipe for that of stdout
            show_bug()
            raise left.__context__ from None
        sys.exit(0)
    except KltuneError as error:
        sys.exit(complain(error))
    except (OSError, MemoryError, RuntimeError) as error:
        known = as_user_error(error)
        if known is None:
            show_bug()
            raise
        sys.exit(complain(known))
    except Exception:
        show_bug()
        raise
    finally:
        if arguments is None:       # else it is a program's, which goes on
            leave_stdout()
    sys.exit(0)
