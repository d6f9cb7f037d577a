"""What a run reads: the rows of each data file, each scorer's own files and those of its model, as sha256."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kltune.errors import DataError, ModelError, ScorerError
from kltune.lm.data.chat import read_template
from kltune.lm.data.rows import read_rows
from kltune.lm.rewards.functions import read_sources, sources_sha256
from kltune.recipe import (
    ClassifierReward,
    DistillRecipe,
    FunctionReward,
    ModelReward,
    Recipe,
    differing_keys,
    load_recipe,
    recipe_digest,
    scorers_of,
)

ROWS = {"data": ("prompts", "texts", "pairs"), "eval": ("prompts", "texts", "pairs")}
MODEL_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt"}       # of what a scorer is loaded from
WEIGHTS = " (weights)"          # after a key: what is told of the files of weights alone
Inputs = Mapping[str, Mapping[str, str]]


def inputs_of(recipe: Recipe, *, present: bool = False) -> dict[str, dict[str, str]]:
    """By recipe key, the path of what is read and the sha256 of its rows or files; of a model on the hub nothing.

    present: only of files and folders that are here.

    Raises:
        DataError: rows cannot be read. ScorerError: a function's file cannot be.
    """
    found = {
        f"{section}.{name}": source for section, names in ROWS.items() for name in names
        if (source := getattr(getattr(recipe, section), name)) is not None
    }
    inputs = {
        key: {"path": source, "sha256": rows_sha256(source)} for key, source in found.items()
        if not present or Path(source).exists()
    }
    if recipe.data.chat_template is not None and (not present or Path(recipe.data.chat_template).exists()):
        template = read_template(recipe.data.chat_template)
        inputs["data.chat_template"] = {
            "path": recipe.data.chat_template, "sha256": hashlib.sha256(template.encode()).hexdigest(),
        }
    if isinstance(recipe, DistillRecipe) and Path(recipe.distill.teacher).is_dir():
        final = Path(recipe.distill.teacher) / "final"      # of a run
        folder = final if final.is_dir() else final.parent
        inputs["distill.teacher"] = {"path": recipe.distill.teacher, "sha256": folder_sha256(folder)}
    for key, entry in scorers_of(recipe).items():
        if isinstance(entry, FunctionReward):
            if not present or (recipe.folder / entry.path.rpartition(":")[0]).exists():
                inputs[key] = {"path": entry.path, "sha256": sources_sha256(read_sources(entry, recipe.folder))}
        elif isinstance(entry, ModelReward | ClassifierReward) and Path(entry.path).is_dir():
            inputs[key] = {"path": entry.path, "sha256": folder_sha256(Path(entry.path))}
    return inputs


def base_of(recipe: Recipe) -> dict[str, dict[str, str]]:
    """The same of the folders that the reference is loaded from, of those that are here; of a name on the hub nothing.

    Of the weights it is names, sizes and times of their files: they are hashed once a run, as they are loaded, and that
    is the reference's own sha256. A run that goes on holds that against what it was started with; this is for one that
    has ended, whose model nobody loads again unless its files look like others.
    """
    named = {"model.path": recipe.model.path, "model.sft_adapter": recipe.model.sft_adapter}
    folders = {key: Path(path) for key, path in named.items() if path is not None and Path(path).is_dir()}
    found = {}
    for key, folder in folders.items():
        found[key] = {"path": str(folder), "sha256": folder_sha256(folder, weights=False)}
        found[f"{key}{WEIGHTS}"] = {"path": str(folder), "sha256": stamps_sha256(folder)}
    return found


def refuse_changed(before: Inputs, now: Inputs, where: Path) -> None:
    """Refuse inputs that are not those a run was started with; one that is known on one side only says nothing.

    Raises:
        DataError: the rows of a file. ScorerError: a scorer's files. ModelError: those of the model.
    """
    for key in before.keys() & now.keys():
        if before[key]["sha256"] != now[key]["sha256"]:
            rows = key.partition(".")[2] in ROWS["data"]
            model = key.startswith(("model.", "distill."))
            kind = DataError if rows or key.startswith("data.") else ModelError if model else ScorerError
            what = "its rows are" if rows else "it is"
            raise kind(
                f"{key}: {now[key]['path']} has changed: {what} not what the run in {where} was started with (sha256 "
                f"{before[key]['sha256'][:12]}, now {now[key]['sha256'][:12]}); put the file back, or start a new run "
                "with another --output."
            )


def refuse_changed_base(record: Mapping[str, Any], recipe: Recipe, folder: Path) -> None:
    """Refuse a model that is not the one a finished run was made with.

    Files of weights with another time or size are loaded, and what is in them is held against the reference.

    Raises:
        ModelError: it is another.
    """
    before, now = record.get("base") or {}, base_of(recipe)
    others = [key for key in before.keys() & now.keys() if key.endswith(WEIGHTS) and before[key] != now[key]]
    refuse_changed({key: before[key] for key in before if key not in others}, now, folder)
    reference = record.get("reference")
    if not others or not reference:
        return
    import torch

    from kltune.lm.model.opening import load_reference  # of seconds, which only files that look otherwise are worth

    section = recipe.model.model_copy(update={"dtype": reference["dtype"]})
    found = load_reference(section, device=torch.device("cpu")).fingerprint
    if found.sha256 != reference["sha256"]:
        key = sorted(others)[-1].removesuffix(WEIGHTS)
        raise ModelError(
            f"{key}: {before[key]['path']} has changed: it is not what the run in {folder} was started with (weights "
            f"sha256 {reference['sha256'][:12]}, now {found.sha256[:12]}); put the file back, or start a new run with "
            "another --output."
        )


def recipe_changes(folder: Path, record: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Every key in which a recipe differs from the one that a run's folder was made by, as ``differing_keys``.

    But where its files are, if what is in them is known to be the same: a project may be moved as a whole.

    Raises:
        RecipeError: the recipe in the folder cannot be read.
    """
    if record.get("recipe_sha256") == recipe_digest(recipe):
        return []
    before = (record.get("inputs") or {}) | (record.get("base") or {})
    now = inputs_of(recipe, present=True) | base_of(recipe)
    moved = {key.removesuffix(".path") for key in before.keys() & now.keys()
             if before[key]["sha256"] == now[key]["sha256"]}
    changes = differing_keys(load_recipe(folder / "recipe.yaml"), recipe)
    return [change for change in changes if change.partition(":")[0].removesuffix(".path") not in moved]


def rows_sha256(source: str) -> str:
    """Hex digest of the rows of a source, in order, whatever kind of file they are in; DataError if it is none."""
    stamp = Path(source).stat() if Path(source).is_file() else None
    return _rows_sha256(source, stamp and (stamp.st_mtime_ns, stamp.st_size))


@cache
def _rows_sha256(source: str, stamp: tuple[int, int] | None) -> str:
    """The same, once for a file at a time: the points of a sweep share theirs."""
    digest = hashlib.sha256()
    for row in read_rows(source):
        digest.update(json.dumps([row.fields, row.fault], sort_keys=True, default=str).encode("ascii") + b"\n")
    return digest.hexdigest()


def stamps_sha256(folder: Path) -> str:
    """Hex digest of names, sizes and times of change of the files of weights in a folder."""
    files = sorted(folder.glob("*.safetensors"))
    stamps = [(file.name, status.st_size, status.st_mtime_ns) for file in files for status in [file.stat()]]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()


def folder_sha256(folder: Path, *, weights: bool = True) -> str:
    """Hex digest of what a model in a folder is loaded from, names included; or of all of it but the weights."""
    suffixes = MODEL_SUFFIXES if weights else MODEL_SUFFIXES - {".safetensors"}
    paths = sorted(path for path in folder.iterdir() if path.suffix in suffixes and path.is_file())
    stamps = ((path, path.stat()) for path in paths)
    return _files_sha256(tuple((path, stamp.st_mtime_ns, stamp.st_size) for path, stamp in stamps))


@cache
def _files_sha256(files: tuple[tuple[Path, int, int], ...]) -> str:
    """The same, once for a folder at a time, as ``_rows_sha256``: gigabytes for every point of a sweep."""
    digest = hashlib.sha256()
    for path, *_ in files:
        with open(path, "rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
