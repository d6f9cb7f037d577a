"""What a recipe names and is not there, or not what a run could read: all of it at once, before torch is imported."""

import inspect
import json
import os
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from kltune.errors import InputError
from kltune.lm.data.chat import read_template
from kltune.lm.data.forms import (
    LABELLED_FORM,
    PAIR_FORMS,
    PROMPT_FORMS,
    TEXT_FORMS,
    Form,
    FormOfFile,
    answered_messages,
    are_messages,
    label_of,
    prompt_and,
    prompt_of,
    sides_of,
    text_field,
)
from kltune.lm.data.layouts import Layout
from kltune.lm.data.rows import RowFault, is_place, looks_like_a_path, read_rows
from kltune.lm.rewards.functions import load_function, wants_rows
from kltune.recipe import (
    REFERENCE,
    ClassifierReward,
    DistillRecipe,
    Fault,
    FunctionReward,
    InputFaults,
    JudgeReward,
    ModelReward,
    Recipe,
    scorers_of,
)

LOOKED_AT = 100                 # rows of a file
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
Trouble = tuple[str, str]       # the key, and what is wrong


def check_inputs(recipe: Recipe) -> list[str]:
    """Look at every file, folder and function that a recipe names.

    Returns:
        Notes: names that are none here, and that the run will look up on the hub.

    Raises:
        InputFaults: all that is missing or cannot be read, each with the recipe's line.
    """
    notes: list[str] = []
    found = [*_model(recipe, notes), *_rows(recipe, notes), *_scorers(recipe, notes)]
    if found:
        faults = [Fault(recipe.place(key), key, text) for key, text in found]
        raise InputFaults(recipe.name, faults)
    return notes


def check_named(model: str, data: str, reward: str | None) -> None:
    """Raise InputError for all of a model, a file of rows and a reward that are not here, by the options of init."""
    home = Path.cwd()
    found = [*_folder("--model", model, home, [], _model_fault)]
    if not os.path.exists(data) and looks_like_a_path(data):
        found.append(("--prompts", f"{data} does not exist{_nearest(Path(data))}"))
    file = (reward or "").partition(":")[0]
    if file.endswith(".py") and not os.path.exists(file):
        found.append(("--reward", f"{file} does not exist{_nearest(Path(file))}"))
    if found:
        raise InputError("\n  ".join(f"{option}: {text}" for option, text in found))


def _model(recipe: Recipe, notes: list[str]) -> Iterator[Trouble]:
    path = recipe.model.path
    yield from _folder("model.path", path, recipe.folder, notes, _model_fault)
    if recipe.model.sft_adapter is not None:
        yield from _folder("model.sft_adapter", recipe.model.sft_adapter, recipe.folder, notes, _adapter_fault)
    if not isinstance(recipe, DistillRecipe) or recipe.distill.teacher == REFERENCE:
        return
    if not recipe.distill.served:
        yield from _folder("distill.teacher", recipe.distill.teacher, recipe.folder, notes, _teacher_fault)
    elif recipe.distill.teacher_key_env is not None:
        yield from _key("distill.teacher_key_env", recipe.distill.teacher_key_env)


def _folder(
    key: str, path: str, home: Path, notes: list[str], fault: Callable[[Path], str | None]
) -> Iterator[Trouble]:
    """What is wrong with a folder that a key names, or with the name on the hub that it may be instead.

    home: where relative paths start.
    """
    folder = Path(path)
    if folder.is_dir():
        if (text := fault(folder)) is not None:
            yield key, text
    elif folder.exists():
        yield key, f"found {path}, which is a file; wanted the folder of a model"
    elif is_place(path, home):
        yield key, f"found {path}, which is no folder here{_nearest(home / path)}"
    elif not _is_cached(path):
        if _is_offline():
            near = _nearest(home / path)
            yield key, (f"found {path}, which is no folder in {home}{near}; as a name "
                        "on the hub it is not in the cache, and HF_HUB_OFFLINE is set; wanted the folder of a model")
        else:
            notes.append(f"{key}: {path} is no folder in {home}; the run looks it up on the hub.")


def _nearest(path: Path) -> str:
    """What there is in place of a missing path: a folder above that is missing too, or files of nearly that name."""
    path = Path(os.path.abspath(path))
    if not path.parent.is_dir():
        return f" (neither is its folder {path.parent})"
    near = get_close_matches(path.name, sorted(entry.name for entry in path.parent.iterdir()), 1)
    return f"; did you mean {near[0]}?" if near else ""


def _is_cached(name: str) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE  # not before a name may be one on the hub

    return (Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir()


def _is_offline() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return HF_HUB_OFFLINE


def _model_fault(folder: Path) -> str | None:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            return (f"found {folder}, which is an adapter, and does not say which model is the reference; write its "
                    "base as model.path, and the adapter as model.sft_adapter")
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        way = f"; its folder {inside[0]} has one" if inside else ""
        return f"found {folder}, which holds no model (config.json is missing){way}"
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin"))
        return f"found {folder}, which holds no weights in safetensors" + (
            " but pickled ones, which can run code; save it again with save_pretrained" if pickled else "")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return f"found {folder}, which holds no tokenizer (tokenizer.json is missing)"
    return None


def _adapter_fault(folder: Path) -> str | None:
    if (folder / "adapter_config.json").is_file():
        return None
    inside = next((name for name in ("final", "checkpoints") if (folder / name).is_dir()), None)
    way = f"; of a run write {folder / 'final'}" if inside == "final" else ""
    return f"found {folder}, which holds no adapter (adapter_config.json is missing){way}"


def _teacher_fault(folder: Path) -> str | None:
    known = any((folder / name).is_file() for name in ("run.json", "adapter_config.json", "config.json"))
    return None if known else f"found {folder}, which holds no run, no adapter and no model"


def _scorer_fault(folder: Path) -> str | None:
    known = any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))
    return None if known else (f"found {folder}, which holds no model and no reward adapter"
                               + (f"; of a run write {folder / 'final'}" if (folder / "final").is_dir() else ""))


def _rows(recipe: Recipe, notes: list[str]) -> Iterator[Trouble]:
    """What is wrong with the files of rows, and with a chat template that they need."""
    wants_template = None
    for section in ("data", "eval"):
        for name in ("prompts", "texts", "pairs"):
            source = getattr(getattr(recipe, section), name)
            if source is None:
                continue
            key = f"{section}.{name}"
            if not os.path.exists(source) and not looks_like_a_path(source):
                notes.append(f"{key}: {source} is no file here; the run looks it up as a data set.")
                continue
            try:
                if has_messages(recipe, name, source):
                    wants_template = wants_template or key
            except (InputError, RowFault) as error:
                missing = "" if os.path.exists(source) else _nearest(Path(source))
                yield key, f"{str(error).rstrip('.')}{missing}"
    try:
        given = read_template(recipe.data.chat_template)
    except InputError as error:
        yield "data.chat_template", str(error).removeprefix("data.chat_template: ").rstrip(".")
        return
    model = Path(recipe.model.path)
    if wants_template and given is None and (model / "config.json").is_file() and not has_template(model):
        yield wants_template, (f"its rows are messages, and the tokenizer in {model} has no chat template to write "
                               "them; write data.chat_template: FILE, or give a chat model")


def has_template(folder: Path) -> bool:
    """Whether a model's folder brings a chat template."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):       # said when the tokenizer is loaded
        return True
    return isinstance(config, dict) and bool(config.get("chat_template"))


def has_messages(recipe: Recipe, name: str, source: str) -> bool:
    """Whether the first rows of a source of ``prompts``, ``texts`` or ``pairs`` are messages.

    Raises:
        DataError: it cannot be read. RowFault: the first rows cannot, where that is an error; or there is none.
    """
    chat = recipe.data.chat_template is not None or has_template(Path(recipe.model.path))
    layout, messages, faults, read = Layout(recipe.data.columns, recipe.data.template if chat else "none"), False, [], 0
    forms, parse = _reader(recipe, name)
    form = FormOfFile(forms)
    for row in islice(read_rows(source), LOOKED_AT):
        read += 1
        try:
            fields = layout.of(row).fields
            messages |= parse(fields, form.of(fields))
        except RowFault as fault:
            faults.append(f"{row.where}: {fault}")
    if not read:
        raise RowFault(f"{source} has no rows")
    if faults and (recipe.data.on_bad_row == "error" or len(faults) == read):
        more = f" (and {len(faults) - 1} more of the first {read} rows)" if len(faults) > 1 else ""
        raise RowFault(f"{faults[0]}{more}")
    return messages


def _reader(recipe: Recipe, name: str) -> tuple[tuple[Form, ...], Callable[[dict[str, Any], Form], bool]]:
    """The forms that a stage reads a file in, and what reads a row of one: whether it is messages."""
    if name == "prompts":
        return PROMPT_FORMS, lambda fields, form: isinstance(prompt_of(fields, form), list)
    if name == "texts":
        return TEXT_FORMS, _text
    labelled = recipe.stage == "reward" or (recipe.stage == "dpo" and recipe.dpo.loss in ("kto", "bco"))
    return (*PAIR_FORMS, *([LABELLED_FORM] if labelled else [])), _pair


def _text(fields: dict[str, Any], form: Form) -> bool:
    if are_messages(fields, form):
        return bool(answered_messages(fields, form))
    return not all(text_field(fields, name) for name in form)


def _pair(fields: dict[str, Any], form: Form) -> bool:
    if form == LABELLED_FORM:
        label_of(fields)
        return isinstance(prompt_and(fields, "prompt", ("response",))[0], list)
    return isinstance(sides_of(fields, form)[0], list)


def _scorers(recipe: Recipe, notes: list[str]) -> Iterator[Trouble]:
    for key, entry in scorers_of(recipe).items():
        if isinstance(entry, FunctionReward):
            yield from _function(f"{key}.path", entry, recipe)
        elif isinstance(entry, ModelReward | ClassifierReward):
            yield from _folder(f"{key}.path", entry.path, recipe.folder, notes, _scorer_fault)
        elif isinstance(entry, JudgeReward) and entry.key_env is not None:
            yield from _key(f"{key}.key_env", entry.key_env)


def _key(key: str, variable: str) -> Iterator[Trouble]:
    if not os.environ.get(variable):
        yield key, f"the environment variable {variable} is not set here; export it first"


def _function(key: str, entry: FunctionReward, recipe: Recipe) -> Iterator[Trouble]:
    """What keeps a reward function from being called; its file is run as the run would."""
    file = Path(entry.path.rpartition(":")[0])
    if not (recipe.folder / file).is_file():
        yield key, f"{file} does not exist{_nearest(recipe.folder / file)}"
        return
    try:
        function, _ = load_function(entry, recipe.folder)
    except InputError as error:
        yield key, str(error).removeprefix(f"reward {entry.path}: ").rstrip(".")
        return
    try:
        inspect.signature(function).bind([], [], **({"rows": []} if wants_rows(function) else {}))
    except TypeError:
        yield key, (f"{entry.path}{inspect.signature(function)} cannot be called with prompts and responses; wanted "
                    "score(prompts: list[str], responses: list[str]) -> list[float], and a third parameter rows for "
                    "the data rows of the prompts")
    except ValueError:      # built in, without a signature
        return
