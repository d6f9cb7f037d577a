"""Options that several commands have, and the words in which a value is refused."""

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from kltune.cli.streams import ResultCommand, result_stream
from kltune.errors import RecipeError
from kltune.recipe import FunctionReward, JudgeReward, ModelReward, Recipe, RewardEntry, asks_for_pairs
from kltune.recipe.checks import FUNCTION
from kltune.recipe.reading import field_faults
from kltune.recipe.rewards import NO_SCORES, address
from kltune.recipe.stages import STAGES
from kltune.recipe.wording import KEYBOARD, key_called, listed
from kltune.recipe.yaml_tree import Node, read_nodes
from kltune.run.screen import doing
from kltune.run.subprocesses import start_processes

FORMS = "wanted file.py:function, a reward model's folder, or an entry as in a recipe, such as {kind: model, path: x}"
MOST = 10**9            # of what is counted
MOST_SEED = 2**62       # torch takes 64 bits, and a seed is added to
TYPES = re.compile(r" <(?:list\[\w+\]|\w+)>")        # how typer shows the type of an argument


class Command(ResultCommand):
    """A command whose result has stdout to itself, and whose help names arguments without the types of Python."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; one that is a key of recipes, or has a dash of print, is told the way on.

        Raises:
            RecipeError: there is such a one.
        """
        known = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for argument in args:
            name = argument.partition("=")[0]
            typed = "--" + name.translate(KEYBOARD).lstrip("-")
            if typed in known and name.translate(KEYBOARD) != name:
                raise RecipeError(f"{name}: its dashes are not those of a keyboard; write {typed}.")
            key = key_called(name[2:]) if name.startswith("--") and name not in known and "--set" in known else None
            if key is not None:
                raise RecipeError(f"{name}: no option of kltune {self.name}, but a key of recipes: write "
                                  f"--set {key}=VALUE.")
        self._refuse_no_names(ctx, args)
        return super().parse_args(ctx, args)

    def _refuse_no_names(self, ctx: Any, args: list[str]) -> None:
        """Refuse what is empty, as a variable of the shell that is not set, and what no file of a run can name."""
        given = self.make_parser(ctx).parse_args(args=list(args))[0]
        for parameter in self.params:
            wanted = (parameter.metavar or "a value").strip("[].")
            name = max(parameter.opts, key=len) if parameter.param_type_name == "option" else wanted
            found = given.get(parameter.name)
            for value in found if isinstance(found, list | tuple) else [found]:
                if not isinstance(value, str):
                    continue
                if not value.strip() and wanted != "TEXT":
                    raise RecipeError(f"{name}: found nothing (is a variable of the shell not set?), wanted {wanted}.")
                if re.search("[\ud800-\udfff]", value):
                    raise RecipeError(f"{name}: {value} is not UTF-8, in which kltune writes down what it read and "
                                      "where; give it a name that is.")

    def get_usage(self, ctx: Any) -> str:
        """The line of usage, each argument as it is called."""
        usage = re.sub(r"[{}]", "", super().get_usage(ctx))
        return usage.replace("[[", "[").replace("]]", "]").replace("......", "...")

    def get_help(self, ctx: Any) -> str:
        """The help, in plain words."""
        usage, rest = super().get_help(ctx).split("\n", 1)
        usage = re.sub(r"[{}]", "", usage).replace("[[", "[").replace("]]", "]").replace("......", "...")
        return f"{usage}\n{TYPES.sub(lambda found: ' ' * len(found[0]), rest)}"


def whole(least: int = 0, most: int = MOST) -> dict[str, Any]:
    """Arguments of an option that takes a whole number."""
    return {"metavar": "N", "parser": whole_parser(least, most)}


def whole_parser(least: int, most: int = MOST, other: str = "") -> Callable[[Any], Any]:
    """Text to a whole number within bounds; the upper one is spoken of where it is passed."""

    def parse(text: Any) -> int:
        beyond = str(text).isdecimal() and len(str(text)) >= len(str(most))
        bounds = f"at least {least}" + (f" and at most {most:,}" if beyond else "")
        return number_parser(int, f"a whole number of {bounds}{other}", lambda n: least <= n <= most)(text)

    parse.__name__ = "int"
    return parse


def real(wanted: str, holds: Callable[[float], bool] = lambda _: True) -> dict[str, Any]:
    """Arguments of an option that takes a finite number, ``wanted`` in words."""
    return {"metavar": "X", "parser": number_parser(float, wanted, lambda x: math.isfinite(x) and holds(x))}


def number_parser(kind: type, wanted: str, holds: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """Text to a number; anything else is refused with what was found and what was wanted."""

    def parse(text: Any) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise typer.BadParameter(f"found {text}, wanted {wanted}")
        return value

    parse.__name__ = kind.__name__      # what typer calls the type
    return parse


def count_or_file(least: int) -> dict[str, Any]:
    """Arguments of an option that takes a whole number, or a file."""
    count = whole_parser(least, other=", or a file")

    def parse(text: str) -> int | str:
        named = Path(text).is_file() or re.search(r"\.[a-z]\w*$", text)     # one that is not there is said by its name
        return text if named else count(text)

    return {"metavar": "N|FILE", "parser": parse}


def one_of(*names: str, **meanings: Any) -> dict[str, Any]:
    """Arguments of an option that takes one of some words; meanings: what a word stands for, where not for itself."""

    def parse(text: str) -> Any:
        if text not in names:
            raise typer.BadParameter(f"found {text}, wanted {listed(list(names))}")
        return meanings.get(text, text)

    return {"metavar": "|".join(names), "parser": parse}


def device_name(text: str) -> str:
    """The name of a device as a recipe's run.device has it."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", text):
        raise typer.BadParameter(f"found {text}, wanted auto, cpu, cuda or cuda:1")
    return text


def recipe_named(positional: str | None, option: str | None, command: str) -> str:
    """The recipe of a command, given by its place or as --recipe; RecipeError if neither or both are."""
    if positional is not None and option is not None and positional != option:
        raise RecipeError(f"found two recipes, {positional} and --recipe {option}; wanted one.")
    named = positional or option
    if named is None:
        raise RecipeError(f"wanted a recipe: kltune {command} R.yaml. kltune init writes one for your model and data, "
                          "and kltune recipe list shows those that come with kltune.")
    return named


def in_processes(context: typer.Context, processes: int | str | None, *, stage: bool = False) -> None:
    """Run this command as so many processes and exit with their code, unless this is one of them."""
    command = context.find_root().obj or (sys.executable, *sys.orig_argv[1:])
    doing("")       # the processes themselves say what they do
    code = start_processes(
        command, 1 if processes is None else processes, result_stream(), shares_threads=not stage
    )
    if code is not None:
        raise typer.Exit(code)


def _processes(text: Any) -> int | str:
    return text if text == "auto" else whole_parser(1, other=", or auto")(text)


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
RecipeArgument = Annotated[str | None, typer.Argument(metavar="[R.yaml]", help="The same as --recipe.")]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", "-r", metavar="R.yaml", help="A file, or the name of a packaged recipe.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one key: --set kl.target=4.")
]
OutputOption = Annotated[
    str | None, typer.Option("--output", "-o", metavar="DIR", help="Folder of the run, instead of run.output.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue an unfinished run from its newest checkpoint.")]
DeviceOption = Annotated[str, typer.Option(
    metavar="auto|cpu|cuda|cuda:N", help="auto is the first GPU, or the CPU.", parser=device_name,
)]
DTypeOption = Annotated[str | None, typer.Option(
    **one_of("auto", "float32", "bfloat16", "float16", auto=None),
    help="Computed in, and in the result; auto: as it was trained.",
)]
ProcessesOption = Annotated[Any, typer.Option(
    "--processes", metavar="N|auto", parser=_processes, help="Share the work; the result is the same.",
)]
DryRunOption = Annotated[bool, typer.Option(
    "--dry-run", help="Say what would run and what memory it would take; load no weights, write nothing.",
)]
JSONOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]


def read_judge(text: str, rubric: str | None = None, key_env: str | None = None) -> RewardEntry:
    """``URL#MODEL`` is an AI judge that prefers one of two responses; anything else a scorer, as of ``read_scorer``."""
    url, mark, model = text.partition("#")
    if text.startswith("{") or "://" not in url:
        for option, value in (("--rubric", rubric), ("--key-env", key_env)):
            if value is not None:
                raise RecipeError(f"{option}: read only beside --judge URL#MODEL; found {text}. An entry of "
                                  "{kind: judge, ...} has rubric and key_env in it, and no other scorer reads them.")
        return read_scorer(text, "--judge")
    if not mark or not model:
        raise RecipeError(f"--judge: found {text}, wanted URL#MODEL, such as http://127.0.0.1:8000/v1#judge.")
    more = {"rubric": rubric, "key_env": key_env}
    keys = {name: value for name, value in more.items() if value is not None}
    try:
        entry = JudgeReward(kind="judge", url=url, model=model, mode="pair", **keys)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RecipeError(f"--judge: {first['loc'][-1]}: {first['msg']}.") from error
    _refuse_address("--judge", entry)
    return entry


def _refuse_address(option: str, entry: RewardEntry) -> None:
    """Raise RecipeError if an AI judge cannot be asked at its address."""
    for keys_at, fault in address(option, entry) if isinstance(entry, JudgeReward) else ():
        raise RecipeError(f"{keys_at[0]}: {fault}.")


def read_scorer(text: str, option: str = "--gold") -> RewardEntry:
    """``rewards.py:gold`` is a function, ``{kind: ...}`` an entry of a recipe's ``reward``, anything else a model."""
    if FUNCTION.fullmatch(text):
        return FunctionReward(kind="function", path=text)
    if not text.startswith("{"):
        return ModelReward(kind="model", path=text)
    node, faults = read_nodes(text, option)
    if faults or node is None:
        raise RecipeError(f"{option}: {faults[0].text if faults else 'empty'}; {FORMS}.")
    root = Node({"reward": Node([node], node.place)}, node.place)
    try:
        entry = STAGES["ppo"].model_validate(root.plain() | {"stage": "ppo", "model": {"path": "?"}}).reward[0]
    except ValidationError as error:
        found = field_faults(error.errors(include_url=False), root, "ppo").values()
        told = "; ".join(f"{fault.key.removeprefix('reward.0').lstrip('.')}: {fault.text}" for fault in found)
        raise RecipeError(f"{option}: {told}; {FORMS}.") from error
    _refuse_address(option, entry)
    if option == "--gold" and asks_for_pairs(entry):
        raise RecipeError(f"{option}: mode: found pair, wanted score: {NO_SCORES}, or --judge in the place of --gold.")
    return entry
