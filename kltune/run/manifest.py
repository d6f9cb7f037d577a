"""The list of what was saved, by which a reader tells a whole folder from a damaged one."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from kltune.errors import CheckpointError
from kltune.run.storage import sync_file, sync_folder, to_json

SCHEMA = "kltune.manifest/1"


def seal(folder: Path) -> None:
    """Write manifest.json with the sha256 and size of every file, and flush all of it to the disk."""
    with contextlib.suppress(OSError):
        (folder / "state").rmdir()      # final/ has no state; a folder with files in it stays
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {
        path.relative_to(folder).as_posix(): {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in files
    }
    write_json(folder / "manifest.json", {"schema": SCHEMA, "files": listed})
    for path in (*files, folder / "manifest.json"):
        sync_file(path)
    for place in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync_folder(place)


def verify(folder: Path, inside: str = "") -> list[str]:
    """Compare the files of a folder with its manifest: all sizes first, then each sha256.

    Args:
        folder: what `seal` sealed.
        inside: only names that begin so, as "state/".

    Returns:
        The names that were compared.

    Raises:
        CheckpointError: the manifest or a file is missing, or a file is not what was saved.
    """
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"{folder / 'manifest.json'} is not of schema {SCHEMA}.")
    try:
        wanted = {name: (file["bytes"], file["sha256"]) for name, file in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'manifest.json'} is damaged: it lists no files.") from error
    names = [name for name in wanted if name.startswith(inside)]
    for name in names:
        path, size = folder / name, wanted[name][0]
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{folder} is damaged: {name} is missing or is not {size} bytes long.")
    for name in names:
        if _sha256(folder / name) != wanted[name][1]:
            raise CheckpointError(f"{folder} is damaged: {name} is not what was saved (its sha256 differs).")
    return names


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document for people and programs; NaN is refused."""
    path.write_text(to_json(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote.

    Raises:
        CheckpointError: it is missing, cut short, or holds a number JSON does not know.
    """
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(path.read_bytes(), parse_constant=refuse)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_document(path: Path, schema: str) -> dict[str, Any] | None:
    """A JSON object of a schema; None where there is none that can be read."""
    try:
        document = read_json(path)
    except CheckpointError:
        return None
    return document if isinstance(document, dict) and document.get("schema") == schema else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
