"""``kltune sample`` and ``compare``: ask two models the same prompts, and have a judge say which is better."""

import sys
from functools import partial
from typing import Annotated

import typer

from kltune.cli.measure import (
    ConfidenceOption,
    DateOption,
    LengthOption,
    OnOption,
    PromptsOption,
    ReferenceOption,
    SeedOption,
    SourceOption,
    TemperatureOption,
)
from kltune.cli.options import DeviceOption, DTypeOption, JSONOption, TrustOption, one_of, read_judge, whole
from kltune.cli.output import emit, emit_document, wants_colour
from kltune.cli.streams import result_stream
from kltune.recipe import load_recipe
from kltune.report.text import answers_text, compare_text, sample_heading, sample_text


def sample_command(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A run, checkpoint, adapter or model.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="May be repeated.")] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help="Rows of prompts, as in data.prompts.")] = None,
    responses: Annotated[int, typer.Option(**whole(1), help="To each prompt.")] = 1,
    template: Annotated[str, typer.Option(
        **one_of("auto", "none", "chat"), help="Of prompts typed; auto does as the run's own prompts did.",
    )] = "auto",
    recipe: SourceOption = None,
    reference: ReferenceOption = None,
    base: OnOption = None,
    max_new_tokens: LengthOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = 0,
    date: DateOption = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JSONOption = False,
) -> None:
    """Let a checkpoint and its reference answer the same prompts, and show the KL at every token.

    Without --prompt and --prompts, prompts are read from stdin, one a line: typed at a terminal, or from a pipe.

    kltune sample runs/ppo --prompt "Once upon a time" --responses 3
    """
    if recipe is not None:
        load_recipe(recipe)
    from kltune.stages.sample import SampleOptions, open_speaker, sample

    options = SampleOptions(
        recipe=recipe, reference=reference, base=base, prompts=prompts, max_new_tokens=max_new_tokens,
        temperature=temperature, seed=seed, per_prompt=responses, template=None if template == "auto" else template,
        trust_remote_code=trust_remote_code, date=date, device=device, dtype=dtype,
    )
    colour = wants_colour(result_stream())
    if not prompt and prompts is None and sys.stdin.isatty():
        if not as_json:
            converse(open_speaker(checkpoint, options), colour)
            return
        print("Type prompts, one a line; Ctrl-D ends.", file=sys.stderr)
    texts = list(prompt or ()) if prompt or prompts is not None else lines_of(sys.stdin)
    emit_document(sample(checkpoint, texts, options), as_json, partial(sample_text, colour=colour), styled=colour)


def compare_command(
    first: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A run, checkpoint, adapter or model.")],
    second: Annotated[str, typer.Argument(metavar="CHECKPOINT|reference", help="Another, or the first's reference.")],
    judge: Annotated[str, typer.Option(metavar="URL#MODEL", help="Or a scorer, as of frontier --gold.")],
    prompts: PromptsOption = None,
    responses: Annotated[int | None, typer.Option(**whole(2), help="Pairs to judge.  [default: 256]")] = None,
    rubric: Annotated[str | None, typer.Option(metavar="TEXT", help="What the judge goes by.")] = None,
    key_env: Annotated[str | None, typer.Option(metavar="NAME", help="Variable with the judge's key.")] = None,
    recipe: SourceOption = None,
    reference: ReferenceOption = None,
    max_new_tokens: LengthOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = 0,
    confidence: ConfidenceOption = 0.95,
    date: DateOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JSONOption = False,
) -> None:
    """How often a judge prefers one checkpoint's answers to another's, with an interval by prompt.

    The judge sees each pair in both orders. Runs side by side without a judge: kltune report RUN RUN.

    kltune compare runs/ppo reference --prompts held_out.jsonl --judge http://127.0.0.1:8000/v1#judge
    """
    if recipe is not None:
        load_recipe(recipe)
    entry = read_judge(judge, rubric, key_env)
    from kltune.stages.sample import CompareOptions, compare

    emit_document(compare(first, second, CompareOptions(
        recipe=recipe, reference=reference, prompts=prompts, responses=responses, max_new_tokens=max_new_tokens,
        temperature=temperature, seed=seed, confidence=confidence, trust_remote_code=trust_remote_code, date=date,
        judge=entry,
    )), as_json, compare_text)


def lines_of(stream) -> list[str]:
    """The lines of a stream that are not empty, without their ends."""
    return [text for line in stream if (text := line.rstrip("\r\n"))]


def converse(speaker, colour: bool) -> None:
    """Answer prompts as they are typed, until there are no more."""
    emit(sample_heading(speaker.document([]), colour=colour), styled=colour)
    turn = 0
    while True:
        print("\n> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        if line.strip():
            for entry in speaker.answer([line.rstrip("\r\n")], turn):
                emit(answers_text(entry, colour=colour), styled=colour)
            turn += 1
