"""``kltune explain``: a guide, a recipe key, a metric or an exit code, from the one place that defines it.

All of it is Markdown, which a terminal shows laid out and everything else as it is.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

from kltune.cli.options import JSONOption
from kltune.cli.output import emit, emit_json, wants_colour
from kltune.cli.streams import result_stream
from kltune.errors import EXIT_CODES, ExitCode, RecipeError
from kltune.recipe.wording import FOREIGN, listed
from kltune.recipe.writing import RecipeKey, keys_named, recipe_keys
from kltune.run.metrics import METRICS, Metric, metric_named

DOCS = Path(__file__).parents[1] / "docs"
CODES = ", ".join(map(str, EXIT_CODES))


@dataclass(frozen=True)
class Guide:
    """One of ``kltune/docs``: its name, first sentence and Markdown."""

    name: str
    summary: str
    text: str


@dataclass(frozen=True)
class Explanation:
    """All that a word names."""

    guides: Sequence[Guide] = ()
    keys: Sequence[RecipeKey] = ()
    metrics: Sequence[Metric] = ()
    codes: Sequence[ExitCode] = ()


def explain_command(
    word: Annotated[str | None, typer.Argument(metavar="[TOPIC|KEY|METRIC|CODE]")] = None, as_json: JSONOption = False
) -> None:
    """Explain a topic, a key of recipes, a metric or an exit code; without one, list what there is.

    \b
    kltune explain kl-control
    kltune explain kl.target
    kltune explain kl/ref_nats_per_response
    kltune explain 4
    """
    answer = answer_to(word) if word is not None else Explanation(
        list(guides().values()), list(recipe_keys().values()), METRICS, list(EXIT_CODES.values())
    )
    if as_json:
        emit_json({"schema": "kltune.explain/1", "asked": word, **asdict(answer)})
        return
    text = overview(answer.guides) if word is None else "\n\n".join(texts(answer))
    colour = wants_colour(result_stream())
    emit(laid_out(text) if colour else text, styled=colour)


def answer_to(word: str) -> Explanation:
    """What a word names: it may be a guide and a section of recipes. A RecipeError with the nearest names if none."""
    metric = metric_named(word)
    answer = Explanation(
        guides=[guide for name, guide in guides().items() if name == word],
        keys=keys_named(word),
        metrics=METRICS if word == "metrics" else [metric] if metric else [],
        codes=[entry for code, entry in EXIT_CODES.items() if str(code) == word],
    )
    if answer == Explanation([], [], [], []):
        raise RecipeError(f"{word}: {nearest(word)}")
    return answer


def nearest(word: str) -> str:
    """What may have been meant by a word that names nothing."""
    if word in FOREIGN:
        return FOREIGN[word]
    if word.isdecimal():
        return f"no exit code of kltune; they are {CODES}"
    dotted = list(recipe_keys())
    names = [*guides(), *dotted, *(key.rpartition(".")[2] for key in dotted), *(metric.name for metric in METRICS)]
    near = get_close_matches(word.lower(), dict.fromkeys(names), 3)
    way_out = f"did you mean {listed(near)}?" if near else "kltune explain lists what has one"
    return f"nothing here has that name; {way_out}"


def guides() -> dict[str, Guide]:
    """The guides that come with kltune, by name."""
    found = {path.stem: path.read_text(encoding="utf-8").strip() for path in sorted(DOCS.glob("*.md"))}
    return {name: Guide(name, first_sentence(text), text) for name, text in found.items() if name != "README"}


def first_sentence(text: str) -> str:
    """The first sentence of Markdown that is not a heading, a table, a list or code."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    prose = next((part for part in paragraphs if part and not part.startswith(("#", "|", "-", "```"))), "")
    return re.split(r"(?<=[.!?])\s", prose)[0]


def overview(known: Iterable[Guide]) -> str:
    """What can be asked for, and how."""
    sections = ", ".join(key for key in recipe_keys() if "." not in key)
    return "\n".join([
        "# What kltune explains", "",
        *(f"- `kltune explain {guide.name}`: {guide.summary}" for guide in known),
        f"- `kltune explain KEY`: a key of recipes, as kl.target or hard_cap, or a section with its keys: {sections}",
        "- `kltune explain METRIC`: a key of metrics.jsonl, as kl/ref_nats_per_response; `kltune explain metrics`: all",
        f"- `kltune explain CODE`: an exit code: {CODES}",
    ])


def texts(answer: Explanation) -> list[str]:
    """An answer in Markdown: guides, then keys, metrics (several: as a table) and codes."""
    found = [guide.text for guide in answer.guides]
    found += [key_text(key) for key in answer.keys]
    found += [metric_table(answer.metrics)] if len(answer.metrics) > 1 else [metric_text(one) for one in answer.metrics]
    return found + [code_text(code) for code in answer.codes]


def key_text(key: RecipeKey) -> str:
    """A key of recipes, or a section with its keys."""
    is_of_scorer = key.key.startswith(("reward.", "eval.gold.", "eval.judge."))
    kinds = f" (kind: {listed(list(key.meaning))})" if is_of_scorer else ""
    sentences = meanings(key) if len(meanings(key)) == 1 else [f"- {sentence}" for sentence in meanings(key)]
    lines = [f"# {key.key}", "", *sentences, "", f"- wanted: {by_reader(key.wanted)}"]
    if key.example:
        lines += [f"- default: {default_text(key)}"]
    lines += [f"- read by: {', '.join(key.read_by)}{kinds}", *example(key.example)]
    inner = [entry for name, entry in recipe_keys().items() if name.rpartition(".")[0] == key.key]
    rows = [(entry.key, default_text(entry), " / ".join(meanings(entry))) for entry in inner]
    return "\n".join(lines + (["", *table(("key", "default", "meaning"), rows)] if rows else []))


def meanings(key: RecipeKey) -> list[str]:
    """What a key means: a sentence, or one for each of its readers."""
    variants = by_value(key.meaning)
    return list(variants) if len(variants) == 1 else [f"{', '.join(who)}: {text}" for text, who in variants.items()]


def default_text(key: RecipeKey) -> str:
    """The default, and whose where they differ."""
    written = {who: value if isinstance(value, str) else json.dumps(value) for who, value in key.default.items()}
    return by_reader({who: written.get(who, "must be written") for who in key.meaning})


def by_reader(values: dict[str, str]) -> str:
    """A value that all share, or each with those who have it; a choice of readers is those readers."""
    if all(who == value for who, value in values.items()):
        return listed(list(values))
    variants = by_value(values)
    return ", ".join(text if len(variants) == 1 else f"{text} ({', '.join(who)})" for text, who in variants.items())


def by_value(values: dict[str, str]) -> dict[str, list[str]]:
    """Who has each value."""
    found: dict[str, list[str]] = {}
    for who, value in values.items():
        found.setdefault(value, []).append(who)
    return found


def metric_text(metric: Metric) -> str:
    """A key of metrics.jsonl."""
    return "\n".join([
        f"# {metric.name}", "", metric.meaning, "",
        f"- unit: {metric.unit}",
        f"- range: {metric.range}; null where it was not measured",
        f"- written by: {', '.join(metric.stages)}",
        *example(f"{json.dumps(metric.name)}: {json.dumps(metric.example)}"),
    ])


def metric_table(metrics: Sequence[Metric]) -> str:
    """All keys of metrics.jsonl."""
    rows = [(one.name, one.unit, one.range, ", ".join(one.stages), one.meaning) for one in metrics]
    also = [one.name.removeprefix("eval/") for one in metrics if one.of_reference]
    return "\n".join([
        "## Every key of metrics.jsonl", "", *table(("key", "unit", "range", "written by", "meaning"), rows), "",
        f"Also eval/reference_X, the same of the reference's own answers, for X in {', '.join(also)}.",
    ])


def code_text(code: ExitCode) -> str:
    """An exit code."""
    return "\n".join([
        f"# exit code {code.code}", "", code.meaning, "", f"- what to do: {code.to_do}", *example(code.example),
    ])


def example(text: str) -> list[str]:
    """The last entry of a list: lines to copy."""
    return ["- example:", "", *(f"      {line}" for line in text.splitlines())] if text else []


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def laid_out(text: str) -> str:
    """Markdown as a terminal shows it."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    with console.capture() as captured:
        console.print(Markdown(text))
    return captured.get().rstrip("\n")
