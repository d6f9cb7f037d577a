"""``kltune eval-kl``, ``project`` and ``merge``: measure checkpoints, scale one back to a budget, make one a model."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kltune.cli.options import (
    MOST_SEED,
    DeviceOption,
    DTypeOption,
    JSONOption,
    ProcessesOption,
    TrustOption,
    count_or_file,
    in_processes,
    one_of,
    real,
    whole,
)
from kltune.cli.output import emit_document, on_github, wants_colour
from kltune.cli.streams import result_stream
from kltune.errors import KltuneError, StorageError
from kltune.recipe import load_recipe
from kltune.report.ci import annotations, write_junit, write_junit_error, write_step_summary
from kltune.report.text import eval_kl_lines, eval_kl_text
from kltune.run.files import refuse_place
from kltune.run.screen import undressed
from kltune.run.subprocesses import is_extra_process

SourceOption = Annotated[
    str | None, typer.Option("--recipe", "-r", metavar="R.yaml", help="Where prompts and sampling come from.")
]
ReferenceOption = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Instead of its own: whatever CHECKPOINT may be.")
]
OnOption = Annotated[str | None, typer.Option(
    "--base", metavar="MODEL", help="What the adapter lies on, instead of the model that it names.",
)]
BaseOption = Annotated[str | None, typer.Option(metavar="MODEL", help="The adapter's base, where it moved.")]
PromptsOption = Annotated[
    str | None, typer.Option(metavar="FILE", help="Prompts to respond to.  [default: those of the run]")
]
LengthOption = Annotated[
    int | None, typer.Option(**whole(1), help="Tokens; a longer response is cut.  [default: as in the run, or 128]")
]
TemperatureOption = Annotated[float | None, typer.Option(
    **real("a number from 0.1 to 10", lambda x: 0.1 <= x <= 10), help="Of both models.  [default: as in the run, or 1]",
)]
SeedOption = Annotated[int, typer.Option(**whole(0, MOST_SEED), help="Same seed, same machine: same numbers.")]
UnitOption = Annotated[str, typer.Option(**one_of("nats_per_response", "nats_per_token"), help="Unit of --max-kl.")]
ConfidenceOption = Annotated[float, typer.Option(
    **real("at least 0.5 and below 1; 0.95 is usual", lambda x: 0.5 <= x < 1), help="Of intervals and of the verdict.",
)]
BUDGET = real("a number of nats above 0", lambda x: x > 0)
DateOption = Annotated[
    str | None, typer.Option(metavar="YYYY-MM-DD", help="The day a chat template is told that asks for it.")
]


def eval_kl_command(
    context: typer.Context,
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT...", help="Runs, checkpoints, adapters, models; or URL#MODEL.")
    ],
    recipe: SourceOption = None,
    reference: ReferenceOption = None,
    base: OnOption = None,
    against: Annotated[
        list[str] | None, typer.Option("--against", metavar="MODEL", help="A further reference; may be repeated.")
    ] = None,
    prompts: PromptsOption = None,
    responses: Annotated[
        str | None, typer.Option(**count_or_file(2), help="Responses to sample, or recorded ones.  [default: 256]")
    ] = None,
    max_new_tokens: LengthOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = 0,
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", **BUDGET, help="A budget: exit 3 beyond it, 4 undecided.")
    ] = None,
    unit: UnitOption = "nats_per_response",
    confidence: ConfidenceOption = 0.95,
    auto: Annotated[bool, typer.Option("--auto", help="Keep sampling until --max-kl is decided.")] = False,
    max_responses: Annotated[int, typer.Option(**whole(2), help="Where --auto gives up.")] = 4096,
    direction: Annotated[str, typer.Option(
        **one_of("reverse", "forward", "both"), help="Which way round; --max-kl is of forward if only that.",
    )] = "reverse",
    top_p: Annotated[float | None, typer.Option(
        **real("a probability, as 0.9"), help="Also measure the policy deployed so; 1: temperature alone.",
    )] = None,
    top_k: Annotated[int | None, typer.Option(**whole(1), help="Also measure the policy deployed so.")] = None,
    texts: Annotated[str | None, typer.Option(metavar="FILE", help="Human texts, for the alignment tax.")] = None,
    top: Annotated[int, typer.Option(**whole(), help="How many tokens and prompts of largest KL to list.")] = 10,
    show: Annotated[int, typer.Option(**whole(), help="How many responses to show token by token.")] = 3,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write JUnit XML.")] = None,
    date: DateOption = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = None,
    top_logprobs: Annotated[int, typer.Option(**whole(1), help="Log-probs to ask a server for, at each token.")] = 20,
    key_env: Annotated[
        str | None, typer.Option("--key-env", metavar="NAME", help="Environment variable with a server's key.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Whose tokenizer two served models have.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="One line for a checkpoint: verdict and KL.")] = False,
    processes: ProcessesOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JSONOption = False,
) -> None:
    """Measure how far checkpoints are from their reference, with error bars, against a budget.

    Exit code 0: within --max-kl (or none given); 3: over it; 4: undecided, more responses are needed.

    kltune eval-kl runs/ppo --max-kl 8 --responses 512
    """
    if junit is not None:
        refuse_place(junit, folder=False)
    try:
        if recipe is not None:
            load_recipe(recipe)      # its faults are told before anything slow is imported
        in_processes(context, processes)
        from kltune.stages.eval_kl import EvalKLOptions, eval_kl

        count, transcripts = (None, responses) if isinstance(responses, str) else (responses, None)
        options = EvalKLOptions(
            recipe=recipe, reference=reference, base=base, prompts=prompts, responses=count, temperature=temperature,
            max_new_tokens=max_new_tokens, seed=seed, max_kl=max_kl, unit=unit, confidence=confidence,
            direction=direction, texts=texts, top=top, show=show, auto=auto, max_responses=max_responses, top_p=top_p,
            top_k=top_k, trust_remote_code=trust_remote_code, date=date, device=device, dtype=dtype,
            against=tuple(against or ()), top_logprobs=top_logprobs, key_env=key_env, tokenizer=tokenizer,
            transcripts=transcripts,
        )
        document, code = eval_kl(checkpoints, options)
        if is_extra_process():
            raise typer.Exit(code)
    except KltuneError as error:
        if junit is not None and not is_extra_process():
            try:
                write_junit_error(junit, checkpoints, type(error).__name__, str(error))
            except StorageError as unwritten:       # what kept it from measuring is the news
                print(f"warning: {unwritten}", file=sys.stderr)
        raise
    colour = wants_colour(result_stream()) and not quiet
    as_text = eval_kl_lines if quiet else partial(eval_kl_text, colour=colour)
    try:
        emit_document(document, as_json, as_text, styled=colour)
    finally:        # of a long measurement: neither stdout nor a file that takes nothing costs what the other tells
        if junit is not None:
            write_junit(junit, document)
        if on_github():
            print(*annotations(document), sep="\n", file=undressed(sys.stderr))
            write_step_summary(document)
    raise typer.Exit(code)


def project_command(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A run, checkpoint or adapter.")],
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", **BUDGET, help="The budget to scale the adapter back to.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for the scaled adapter.")
    ] = None,
    curve: Annotated[bool, typer.Option("--curve", help="Measure ten alphas: all there is between.")] = False,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", metavar="R.yaml", help="Prompts, sampling, and the rewards to score with."),
    ] = None,
    reference: BaseOption = None,
    prompts: PromptsOption = None,
    responses: Annotated[
        int | None, typer.Option(**whole(2), help="Responses to sample at each α, at first.  [default: 256]")
    ] = None,
    max_responses: Annotated[int, typer.Option(**whole(2), help="As many where the budget calls for more.")] = 4096,
    max_new_tokens: LengthOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = 0,
    unit: UnitOption = "nats_per_response",
    confidence: ConfidenceOption = 0.95,
    date: DateOption = None,
    processes: ProcessesOption = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JSONOption = False,
) -> None:
    """Scale an adapter back to the largest share of it that keeps within --max-kl, and save that as a plain adapter.

    kltune project runs/ppo --max-kl 4 --output runs/ppo-4
    """
    if recipe is not None:
        load_recipe(recipe)
    in_processes(context, processes)
    from kltune.stages.project import ProjectOptions, project, project_text

    options = ProjectOptions(
        recipe=recipe, reference=reference, prompts=prompts, responses=responses, max_new_tokens=max_new_tokens,
        temperature=temperature, seed=seed, max_kl=max_kl, unit=unit, confidence=confidence, output=output,
        curve=curve, max_responses=max_responses, trust_remote_code=trust_remote_code, date=date, device=device,
        dtype=dtype,
    )
    emit_document(project(checkpoint, options), as_json, project_text)


def merge_command(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A run, checkpoint or adapter.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="Folder for the model.")],
    dtype: Annotated[str, typer.Option(
        **one_of("auto", "float32", "bfloat16", "float16"), help="Of its weights; auto: as the base's files.",
    )] = "auto",
    max_kl: Annotated[float | None, typer.Option("--max-kl", **BUDGET, help="Save it only within this KL.")] = None,
    recipe: SourceOption = None,
    reference: BaseOption = None,
    prompts: PromptsOption = None,
    responses: Annotated[int | None, typer.Option(**whole(2), help="Responses to sample.  [default: 256]")] = None,
    max_new_tokens: LengthOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = 0,
    unit: UnitOption = "nats_per_response",
    confidence: ConfidenceOption = 0.95,
    date: DateOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JSONOption = False,
) -> None:
    """Add an adapter into its base's weights: a model for plain transformers, with its own KL to the unmerged policy.

    Exit code 3 or 4: not shown to be within --max-kl, and not saved.

    kltune merge runs/ppo --output release --dtype bfloat16 --max-kl 0.05
    """
    if recipe is not None:
        load_recipe(recipe)
    from kltune.stages.merge import MergeOptions, merge, merge_text

    document, code = merge(checkpoint, MergeOptions(
        recipe=recipe, reference=reference, prompts=prompts, responses=responses, max_new_tokens=max_new_tokens,
        temperature=temperature, seed=seed, max_kl=max_kl, unit=unit, confidence=confidence, output=output,
        saved_as=dtype, trust_remote_code=trust_remote_code, date=date,
    ))
    emit_document(document, as_json, merge_text)
    raise typer.Exit(code)
