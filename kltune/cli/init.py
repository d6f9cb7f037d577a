"""``kltune init``: a recipe that runs as it is, for a model and a file of rows."""

import ast
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kltune.cli.first_recipe import Machine, Start
from kltune.cli.output import emit
from kltune.cli.recipes import look_at_inputs
from kltune.errors import ModelError, RecipeError, ScorerError, StorageError
from kltune.lm.data.documents import Labelled
from kltune.lm.data.foreign import read_json
from kltune.recipe import STAGES, FunctionReward, load_recipe

KINDS = {"sft": ("texts",), "reward": ("pairs",), "dpo": ("pairs",), "ppo": ("prompts",), "trpo": ("prompts",)}
STARTER = '''"""The reward: one number for each response, higher is better. Put your own rule here."""


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """An example: how many different words a response has, counted up to 40."""
    return [float(min(len(set(response.lower().split())), 40)) for response in responses]
'''
FIRST = {       # which three lines of a recipe to look at
    "sft": ("data.template", "optim.lr", "run.steps"), "reward": ("data.template", "optim.lr", "run.steps"),
    "ppo": ("kl.target", "sampling.max_new_tokens", "reward"), "dpo": ("kl.target", "dpo.beta", "run.steps"),
    "trpo": ("kl.target", "trpo.max_step_kl", "reward"),
}


def init_command(
    stage: Annotated[str | None, typer.Argument(metavar="[STAGE]", help="By default what the data are for.")] = None,
    model: Annotated[str, typer.Option("--model", "-m", metavar="M", help="A folder, or a name on the hub.")] = "",
    data: Annotated[
        str | None, typer.Option("--prompts", "--data", "-p", metavar="P", help="Prompts, or texts, or pairs.")
    ] = None,
    reward: Annotated[
        str | None, typer.Option("--reward", metavar="FILE", help="rewards.py, or the folder of a reward model.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the recipe goes.")] = Path("."),
) -> None:
    """Write a recipe that runs as it is for your model and data, and say which lines to look at first.

    kltune init --model path/to/model --prompts prompts.jsonl --reward rewards.py
    """
    if stage is not None and stage not in STAGES:
        raise RecipeError(f"no stage {stage}; the stages are {', '.join(STAGES)}.")
    if stage is not None and stage not in KINDS:
        raise RecipeError(f"no first recipe of stage {stage} is written; copy one: kltune recipe copy tiny/{stage}.")
    if not model or data is None:
        raise RecipeError(f"wanted {'--model M' if not model else '--prompts P'}: kltune init --model path/to/model "
                          "--prompts prompts.jsonl --reward rewards.py (texts for sft, pairs for dpo and reward).")
    stage = stage or ("ppo" if reward is not None else None)
    file, notes = write_recipe(stage, model, data, reward, output)
    recipe = load_recipe(file)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    look_at_inputs(recipe)
    looked_at = [f"  {file}:{recipe.place(key).line}  {key}" for key in FIRST[recipe.stage]]
    emit("\n".join([str(file), "It runs as it is. Look at these lines first:", *looked_at,
                    f"Then: kltune {recipe.stage} {shlex.quote(str(file))}"]))


def write_recipe(
    stage: str | None, model: str, data: str, reward: str | None, folder: Path
) -> tuple[Path, list[str]]:
    """Write the recipe and what it needs beside it: its path, and what there is to say.

    Raises:
        RecipeError: a recipe is already there, or nobody says what to raise. DataError, ModelError, ScorerError: the
            data, the model or the reward cannot be read. StorageError: nothing can be written.
    """
    from kltune.lm.rewards.missing import check_named

    check_named(os.path.expanduser(model), os.path.expanduser(data), reward and os.path.expanduser(reward))
    from kltune.lm.data.survey import PLAIN_TEMPLATE, survey_of, unanswered
    from kltune.lm.model.loading import load_tokenizer

    model = str(Path(os.path.expanduser(model)).absolute()) if Path(os.path.expanduser(model)).is_dir() else model
    source = str(Path(os.path.expanduser(data)).absolute()) if Path(os.path.expanduser(data)).exists() else data
    tokenizer = load_tokenizer(model, where="--model")
    chat = bool(tokenizer.chat_template)
    found = survey_of(source, tokenizer, KINDS[stage] if stage else ("pairs", "texts", "prompts"))
    stage = stage or {"pairs": "dpo", "texts": "sft"}.get(found.kind)
    if stage is None:
        raise RecipeError(f"{data} holds prompts, and nothing says which answers are good: give --reward rewards.py, a "
                          "file with score(prompts, responses) -> list[float].")
    folder = Path(os.path.expanduser(folder))
    file = folder / f"{stage}.yaml"
    beside: dict[Path, bytes] = {}
    entry = reward_entry(reward, folder, beside) if found.kind == "prompts" else None
    if reward is not None and entry is None:
        raise RecipeError(f"--reward is for ppo and trpo; {stage} learns from {found.kind}.")
    if found.messages and not chat:
        beside[folder / "chat.jinja"] = PLAIN_TEMPLATE.encode()
    prompts = source if found.form == ("prompt", "response") else None
    if found.answered or (found.form == ("messages",) and found.kind == "texts"):
        rows = (json.dumps(row, ensure_ascii=False) + "\n" for row in unanswered(source, found.columns))
        beside[folder / "prompts.jsonl"] = "".join(rows).encode()
        prompts = str((folder / "prompts.jsonl").absolute())
    if found.answered:
        source, found.columns = prompts, {}
    start = Start(stage, model, source, found, machine_of(model, tokenizer), not chat, entry, prompts)
    put({file: start.text(folder).encode(), **beside})
    more = [f"{path} was written too" for path in beside if reward is None or path.name != Path(reward).name]
    return file, [f"{data}: {found.rows} rows", *found.notes, *more]


def put(contents: dict[Path, bytes]) -> None:
    """Write files that are not there yet; one with these very bytes is the one wanted."""
    for path, content in contents.items():
        if path.exists() and path.read_bytes() != content:
            raise RecipeError(f"{path} is already there; give another --output, or remove it.")
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as error:
        raise StorageError(f"cannot write {error.filename}: {error.strerror}") from error


def reward_entry(reward: str | None, folder: Path, beside: dict[Path, bytes]) -> dict[str, Any]:
    """The entry of ``reward`` in a recipe; a function's files are put ``beside`` the recipe, where they belong."""
    from kltune.lm.rewards.functions import read_sources

    if reward is None:
        beside[folder / "rewards.py"] = STARTER.encode()
        return {"kind": "function", "path": "rewards.py:score"}
    name, _, function = reward.partition(":")
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return model_entry(path.absolute())
    if path.suffix != ".py":
        raise RecipeError(f"--reward: found {reward}, wanted rewards.py, rewards.py:function, or the folder of a "
                          "reward model or classifier.")
    sources = read_sources(FunctionReward(kind="function", path=f"{path.name}:score"), path.parent)
    function = function or chosen_function(path, sources[path.parent / path.name])
    beside |= {folder / source.name: code for source, code in sources.items()}
    return {"kind": "function", "path": f"{path.name}:{function}"}


def chosen_function(path: Path, code: bytes) -> str:
    """The function of a file that is called score, or the only one that could be meant."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        raise ScorerError(f"--reward: {path}:{error.lineno}: {error.msg}.") from None
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
    if "score" in names:
        return "score"
    if len(names) != 1:
        known = ", ".join(names) or "none"
        raise RecipeError(f"--reward: {path} has no function score; say which is meant, as {path}:NAME ({known}).")
    return names[0]


def model_entry(folder: Path) -> dict[str, Any]:
    """The entry of a reward model, or of a classifier, whose last label is taken to be the good one."""
    config = folder / "config.json"
    labels = read_json(config, ModelError, Labelled, "--reward").get("id2label") or {} if config.is_file() else {}
    if len(labels) < 2:
        return {"kind": "model", "path": str(folder)}
    return {"kind": "classifier", "path": str(folder), "label": labels[max(labels, key=int)]}


NARROW_PRODUCTS = "avx512_bf16", "amx_bf16"      # flags of a CPU that multiplies bfloat16 natively


def machine_of(model: str, tokenizer: Any) -> Machine:
    """What the recipe will run on, and how large its model is."""
    import torch
    from transformers import AutoConfig

    from kltune.lm.machine.device_memory import available_bytes

    config = AutoConfig.from_pretrained(model).get_text_config()
    size = sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) if Path(model).is_dir() else 0
    width = 2 if "16" in str(getattr(config, "dtype", "")) else 4
    cuda = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if cuda else available_bytes()
    flags = Path("/proc/cpuinfo").read_text() if not cuda and Path("/proc/cpuinfo").is_file() else ""
    return Machine("cuda" if cuda else "cpu", free / 1e9, size // width or None,
                   getattr(config, "max_position_embeddings", None), len(tokenizer),
                   narrow=width == 2 and any(flag in flags for flag in NARROW_PRODUCTS))
