"""Saving and loading: a checkpoint is whole or it is not there, and nothing in it is ever unpickled.

    checkpoints/step-000020/
        adapter_config.json, adapter_model.safetensors, tokenizer files     plain PEFT, written by the policy
        kltune.json          {"schema", "kltune_version", "step", reference, measured KL, ...}
        state/*.safetensors  tensors that resume needs, one file per group (optimizer, value head, ...)
        state/state.json     everything else that resume needs
        manifest.json        sha256 and size of every file above; written last

A save fills a hidden folder, flushes every file to the disk, and renames the folder: a kill or a power cut at any
moment leaves the folder under its hidden name (removed at the next save) or complete under its own.
"""

import contextlib
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import kltune
from kltune.errors import CheckpointError, DivergedError, RecipeError
from kltune.lm.data.documents import CheckpointRecord, Manifest
from kltune.recipe import DataSection
from kltune.run.files import UNFINISHED, nonfinite_keys, read_json, readable, storing, sync, write_json

SCHEMA = "kltune.checkpoint/1"
MARKS = ("kltune.json", "manifest.json", "state")      # one of them is in a checkpoint from its first moment
STEP_FOLDER = re.compile(r"step-\d{6,}")
LOOKS, EXCHANGE_SECONDS = 5, 0.02       # of a reader beside a run that saves
NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)      # faults of a folder, not of the moment
# Keys of data that a prompt's tokens, or its being read at all, depend on, beside the chat template and its day.
READ_BY = "template", "columns", "transcripts", "control_tokens", "max_prompt_tokens", "on_overlong", "on_bad_row"
MANIFEST_SCHEMA = "kltune.manifest/1"


def measure_settings(
    prompts: str | None, data: DataSection, max_new_tokens: int, temperature: float, day: date | None = None
) -> dict[str, Any]:
    """How the KL of a checkpoint is measured unless asked otherwise; kltune.json keeps it for ``kltune eval-kl``.

    day: that the chat template is told; None if it does not ask. chat_template: whether it is another than the model's.
    """
    return {
        "prompts": prompts,
        **{name: getattr(data, name) for name in READ_BY},
        "chat_template": data.chat_template is not None,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "template_date": None if day is None else day.isoformat(),
    }


def save_checkpoint(
    run_folder: Path,
    step: int,
    write_adapter: Callable[[Path], None],
    *,
    info: dict[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Save everything that a run needs to continue exactly from after ``step``, and drop the oldest checkpoints.

    Args:
        write_adapter: writes adapter and tokenizer files into the folder it is given.
        info: what ``read_info`` gives back (reference, measured KL); ``schema`` and ``step`` are added.
        tensors: groups of named tensors, as ``{"optimizer": {...}, "value_head": {...}}``.
        state: JSON values with text keys, as controllers and counters; floats come back bit for bit.
        keep: how many of the newest checkpoints stay, this one included; at least 1.

    Raises:
        DivergedError: a tensor or a number is not finite. StorageError: it cannot be written. In both cases nothing
            was saved and the checkpoints before it are intact.
    """
    refuse_nonfinite({f"{group}/{name}": tensor for group, named in tensors.items() for name, tensor in named.items()})
    refuse_nonfinite_state(state)
    target = run_folder / "checkpoints" / f"step-{step:06d}"
    clear_leftovers(run_folder)

    def write(folder: Path) -> None:
        write_adapter(folder)
        write_json(folder / "kltune.json", _stamped(info, step=step))
        write_json(folder / "state" / "state.json", state)
        for group, named in tensors.items():
            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
            save_file(whole, folder / "state" / f"{group}.safetensors")

    held = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
    _fill_and_rename(target, write, max([held, *map(_bytes_of, _step_folders(run_folder))]))
    with storing(run_folder):
        sync(run_folder)      # with the first checkpoint, the folder of all of them is new
    drop_oldest(target, keep)
    for _, folder in _others(target)[1]:      # numbered beyond: it is damaged, or this run had been resumed before it
        _take_away(folder)
    return target


def save_final(run_folder: Path, write_adapter: Callable[[Path], None], *, info: dict[str, Any]) -> Path:
    """Save the adapter to use as ``final/``, in place of one that is there; raises as `save_checkpoint`."""
    clear_leftovers(run_folder)
    kept = [_bytes_of(folder) - _bytes_of(folder / "state") for folder in _step_folders(run_folder)]
    return save_adapter(run_folder / "final", write_adapter, info=info, needed=max(kept, default=0))


def save_adapter(
    folder: Path, write_adapter: Callable[[Path], None], *, info: dict[str, Any], needed: int = 0
) -> Path:
    """Save an adapter with its kltune.json, whole or not at all, in place of one that is there; raises likewise.

    needed: bytes that it takes at least, where that is known.
    """

    def write(hidden: Path) -> None:
        write_adapter(hidden)
        write_json(hidden / "kltune.json", _stamped(info))

    return _fill_and_rename(folder, write, needed)


def latest_checkpoint(run_folder: Path) -> Path | None:
    """The newest complete and undamaged checkpoint of a run, or None; each damaged one gives a warning on stderr.

    Beside a run that goes on, one that is looked at may be replaced by a newer one meanwhile: then all are looked at
    again.

    Raises:
        CheckpointError: one is there that cannot be read at the moment.
    """
    for _ in range(LOOKS):
        there = _step_folders(run_folder)
        newest = next(whole_checkpoints(run_folder), None)
        if _step_folders(run_folder) == there:
            break
    return newest


def whole_checkpoints(run_folder: Path) -> Iterator[Path]:
    """The complete and undamaged checkpoints of a run, newest first; each damaged one gives a warning on stderr.

    The step comes from kltune.json: a folder that was renamed does not become newer.

    Raises:
        CheckpointError: one is there that cannot be read at the moment, which is no reason to go on without it.
    """
    for _, folder in sorted(((_step_of(folder), folder) for folder in _step_folders(run_folder)), reverse=True):
        try:
            saved_step(folder)
            verify(folder)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, NOT_THERE):
                raise
            if folder.exists():
                print(f"warning: {error} Falling back to the checkpoint before it.", file=sys.stderr)
        else:
            yield folder


def resolve_checkpoint(path: str | Path) -> Path:
    """The folder to load from: a run's ``final`` (else its newest checkpoint), or the checkpoint or model itself.

    A folder with a manifest is checked against it, so that damaged weights are never measured.

    Raises:
        CheckpointError: there is nothing to load, it is damaged, or its weights are pickled.
    """
    with readable(path):
        folder = _folder_of(path)
        try:
            return _proven(folder, path)
        except CheckpointError:
            if folder.exists():
                raise
        return _proven(_folder_of(path), path)      # a run that goes on has taken the first away for a newer one


def _folder_of(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.exists():
        raise CheckpointError(f"{path}: there is no such folder here; a checkpoint is never a hub name.")
    if not (folder / "run.json").exists():
        return folder
    checkpoint = _final_of(folder) or latest_checkpoint(folder)
    if checkpoint is not None and not checkpoint.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{checkpoint} is a link out of the run; give {checkpoint.resolve()} itself.")
    if checkpoint is None:
        raise CheckpointError(f"{folder} is a run that has saved nothing yet: no final/ and no checkpoint.")
    return checkpoint


def _proven(folder: Path, path: str | Path) -> Path:
    """The folder, or the file of a quantised model, which ``path`` means, if it can be loaded."""
    if folder.suffix == ".gguf" and folder.is_file():
        return folder
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise CheckpointError(
            f"{path} holds no checkpoint: wanted a run folder, a checkpoint, a PEFT adapter or a model "
            "(adapter_config.json or config.json)."
        )
    if (folder / "adapter_model.bin").exists() and not (folder / "adapter_model.safetensors").exists():
        raise CheckpointError(
            f"{folder / 'adapter_model.bin'} is a pickle, which kltune never opens; save it again as safetensors."
        )
    if (folder / "manifest.json").exists():
        verify(folder)
    return folder


def _final_of(run_folder: Path) -> Path | None:
    """The folder of a run's final, also while a writer exchanges it, or where a kill has cut that in two."""
    final, aside = run_folder / "final", run_folder / ".old-final"
    for _ in range(LOOKS):
        if final.exists():
            return final
        if not aside.exists():
            return None
        time.sleep(EXCHANGE_SECONDS)
    return aside


def read_info(checkpoint: Path, shape: Any = CheckpointRecord) -> dict[str, Any]:
    """The contents of kltune.json: step, reference, measured KL; CheckpointError unless whole and of its shape."""
    return read_json(checkpoint / "kltune.json", shape)


def saved_step(checkpoint: Path) -> int:
    """How many steps were done when a checkpoint was saved, by its kltune.json and never by the folder's name."""
    step = read_info(checkpoint).get("step")
    if step is None:
        raise CheckpointError(f"{checkpoint / 'kltune.json'} does not say at which step it was saved.")
    return step


def read_state(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The ``tensors`` (on the CPU) and the ``state`` that `save_checkpoint` was given; CheckpointError if damaged."""
    names = [name for name in verify(checkpoint, inside="state/") if name.endswith(".safetensors")]
    try:
        tensors = {Path(name).stem: load_file(checkpoint / name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{checkpoint} is damaged: {error}") from error
    return tensors, read_json(checkpoint / "state" / "state.json")


def refuse_nonfinite(tensors: Mapping[str, Tensor]) -> None:
    """Raise DivergedError at the first tensor that holds NaN or infinity, before it reaches the disk."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise DivergedError(
                f"{name} has {bad:,} of {tensor.numel():,} numbers that are not finite; nothing was saved. "
                "Lower optim.lr and resume from the last checkpoint."
            )


def refuse_nonfinite_state(state: dict[str, Any]) -> None:
    """The same guard for plain numbers."""
    if names := nonfinite_keys(state):
        raise DivergedError(f"{names[0]} is not finite; nothing was saved. Resume from the last checkpoint.")


def clear_leftovers(run_folder: Path) -> None:
    """Remove what a killed save left behind; finish an exchange that was cut in two by putting the old folder back.

    Only the holder of the run's lock may call it: another run's hidden folder would be its save in progress.
    """
    for parent in (run_folder, run_folder / "checkpoints"):
        if parent.is_symlink() and parent != run_folder:
            raise RecipeError(f"{parent} is a link, and nothing is removed through one; put the folder in its place.")
        for leftover in sorted(parent.glob(".[ot][lm][dp]-*")):
            if not (UNFINISHED.fullmatch(leftover.name) and _is_ours(leftover)):
                continue
            name = parent / leftover.name.removeprefix(".old-")
            if leftover.name.startswith(".old-") and not name.exists():
                leftover.rename(name)
            else:
                _remove(leftover)


def _is_ours(path: Path) -> bool:
    """Whether kltune made what has such a name: a file on its way to another name, or a folder with its marks."""
    if path.is_symlink() or not path.is_dir():
        return path.is_file() and not path.is_symlink()
    return any((path / mark).exists() for mark in MARKS) or not any(path.iterdir())


def _fill_and_rename(target: Path, write: Callable[[Path], None], needed: int = 0) -> Path:
    """Fill a hidden folder, prove it whole, flush it, and only then give it its name; it takes ``needed`` bytes."""
    hidden = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    aside = target.with_name(f".old-{target.name}")
    with storing(target, needed):
        try:
            (hidden / "state").mkdir(parents=True)
            write(hidden)
            for weights in sorted(hidden.glob("*.safetensors")):
                with safe_open(weights, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                        refuse_nonfinite({name: file.get_tensor(name)})
            seal(hidden)
            if target.exists():      # a folder cannot be renamed onto one that is not empty
                _remove(aside)
                target.rename(aside)
            hidden.rename(target)
            sync(target.parent)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
    _remove(aside)
    return target


def drop_oldest(newest: Path, keep: int) -> None:
    """Keep ``newest``, which must be whole, and the ``keep - 1`` before it."""
    before, _ = _others(newest)
    for _, folder in before[: max(len(before) - (keep - 1), 0)]:
        _take_away(folder)


def _others(newest: Path) -> tuple[list[tuple[int, Path]], list[tuple[int, Path]]]:
    """Step and folder of the other checkpoints, oldest first: those before, and those beyond it."""
    others = sorted((_step_of(folder), folder) for folder in _step_folders(newest.parent.parent) if folder != newest)
    step = _step_of(newest)
    return [pair for pair in others if pair[0] <= step], [pair for pair in others if pair[0] > step]


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _take_away(folder: Path) -> None:
    """Delete a checkpoint; its name goes first: a kill meanwhile must not leave half a one that looks whole."""
    hidden = folder.with_name(f".tmp-removed-{folder.name}")
    _remove(hidden)
    _remove(folder.rename(hidden))


def _step_folders(run_folder: Path) -> list[Path]:
    parent = run_folder / "checkpoints"
    try:
        names = sorted(os.listdir(parent))
    except NOT_THERE:
        return []
    except OSError as error:
        raise CheckpointError(f"{parent} cannot be read: {error.strerror}. Nothing was touched.") from error
    found = [parent / name for name in names if STEP_FOLDER.fullmatch(name) and (parent / name).is_dir()]
    return [path for path in found if _is_ours(path)]


def _step_of(folder: Path) -> int:
    """What kltune.json says; the folder's name only where that cannot be read."""
    try:
        return saved_step(folder)
    except CheckpointError:
        return int(folder.name.removeprefix("step-"))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for part in path.iterdir():
            if part.name not in MARKS:      # they go last: half a folder must still be known for what it is
                _remove(part)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _stamped(info: dict[str, Any], **more: Any) -> dict[str, Any]:
    refuse_nonfinite_state(info)
    return {"schema": SCHEMA, "kltune_version": kltune.__version__, **more, **info}


def seal(folder: Path) -> None:
    """Write manifest.json with the sha256 and size of every file, and flush all of it to the disk."""
    with contextlib.suppress(OSError):
        (folder / "state").rmdir()      # final/ has no state; a folder with files in it stays
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {
        path.relative_to(folder).as_posix(): {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in files
    }
    write_json(folder / "manifest.json", {"schema": MANIFEST_SCHEMA, "files": listed})
    for path in files:      # safetensors makes its files for this user alone, whatever the umask
        with contextlib.suppress(PermissionError):      # a file system without rights of its own
            shutil.copymode(folder / "manifest.json", path)
    for path in (*files, folder / "manifest.json", *(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)


def verify(folder: Path, inside: str = "") -> list[str]:
    """Compare the files of a folder with its manifest, all sizes first, then each sha256; the names that were compared.

    inside: only names that begin so, as "state/".

    Raises:
        CheckpointError: the manifest or a file is missing, or a file is not what was saved.
    """
    manifest = read_json(folder / "manifest.json", Manifest)
    wanted = {name: (file["bytes"], file["sha256"]) for name, file in manifest["files"].items()}
    names = [name for name in wanted if name.startswith(inside)]
    try:
        for name in names:
            path, size = folder / name, wanted[name][0]
            if not path.is_file() or path.stat().st_size != size:
                raise CheckpointError(f"{folder} is damaged: {name} is missing or is not {size} bytes long.")
        for name in names:
            if _sha256(folder / name) != wanted[name][1]:
                raise CheckpointError(f"{folder} is damaged: {name} is not what was saved (its sha256 differs).")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    return names


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
