"""A power cut keeps what was flushed and nothing else: a layer that records it proves the order of writing."""

import os
import random
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from killing import adapter_of
from safetensors.torch import load_file

from kltune.run.checkpoint import latest_checkpoint, read_info, resolve_checkpoint, save_checkpoint, save_final
from kltune.run.files import read_json, write_json

CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
Names = dict[int, dict[str, int]]       # of each folder, by inode: the inodes of its entries


class Disk:
    """A folder, and what a power cut would leave of it: the contents and names that were flushed, and perhaps more.

    A name that was not flushed may be lost or not; the bytes of a file that were not are lost.
    """

    def __init__(self, root: Path):
        self.root = root
        self.names: Names = {}
        self.contents: dict[int, bytes] = {}
        self.folders: set[int] = set()
        self._held: dict[int, int] = {}      # inodes are kept open, lest their numbers are given to other files
        for path in (root, *root.rglob("*")):
            descriptor = os.open(path, os.O_RDONLY)
            self.flushed(descriptor)
            os.close(descriptor)

    def flushed(self, descriptor: int) -> None:
        """Take note that a file or folder was."""
        self.seen()
        found = os.fstat(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}")
        if stat.S_ISDIR(found.st_mode):
            self.names[found.st_ino] = {entry.name: entry.inode() for entry in os.scandir(descriptor)}
        else:
            self.contents[found.st_ino] = path.read_bytes()

    def seen(self) -> Names:
        """The names there are now, flushed or not."""
        names: Names = {}
        for folder, _, _ in os.walk(self.root):
            names[os.stat(folder).st_ino] = {entry.name: entry.inode() for entry in os.scandir(folder)}
            for path in (folder, *(entry.path for entry in os.scandir(folder))):
                inode = os.stat(path).st_ino
                if inode not in self._held:
                    self._held[inode] = os.open(path, os.O_RDONLY)
                if os.path.isdir(path):
                    self.folders.add(inode)
        return names

    def after_power_cut(self, into: Path, survives: Callable[[], bool]) -> Path:
        """Build what is left; ``survives`` decides of each folder whether its latest names were written by chance."""
        now = self.seen()

        def build(inode: int, place: Path) -> None:
            if inode not in self.folders:
                place.write_bytes(self.contents.get(inode, b""))
                return
            place.mkdir(parents=True)
            entries = now[inode] if inode in now and survives() else self.names.get(inode, {})
            for name, entry in entries.items():
                build(entry, place / name)

        build(self.root.stat().st_ino, into)
        return into

    def close(self) -> None:
        """Let go of all inodes."""
        for descriptor in self._held.values():
            os.close(descriptor)


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path, Callable[[], None]], Disk]]:
    """A function that records a folder from now on, and calls another before each change to it and after each flush."""
    disks: list[Disk] = []
    at_work = False

    def record(root: Path, check: Callable[[], None]) -> Disk:
        disk, fsync = Disk(root), os.fsync
        disks.append(disk)

        def cut() -> None:
            nonlocal at_work
            if disks and not at_work:
                at_work = True
                check()
                at_work = False

        def flush(descriptor: int) -> None:
            nonlocal at_work
            fsync(descriptor)
            at_work = True
            disk.flushed(descriptor)
            at_work = False
            cut()

        monkeypatch.setattr(os, "fsync", flush)
        sys.addaudithook(lambda event, _: cut() if event in CHANGES else None)      # stays, and is idle without disks
        return disk

    yield record
    for disk in disks:
        disk.close()
    disks.clear()


def save(folder: Path, step: int) -> Path:
    return save_checkpoint(folder, step, adapter_of(step), info={}, tensors={}, state={"step": step}, keep=2)


def weight_of(folder: Path) -> float:
    return load_file(folder / "adapter_model.safetensors")["lora_A.weight"][0].item()


def test_a_power_cut_at_any_moment_leaves_all_that_was_saved(tmp_path, recorded, capsys):
    """Names lost, names kept, and some of each; before the first save has returned, nothing is promised."""
    root, chance, saved, cuts = tmp_path / "run", random.Random(0), {"step": 0, "final": 0}, 0
    root.mkdir()
    write_json(root / "run.json", {"saved": 0})
    whims = (lambda: False, lambda: True, lambda: chance.random() < 0.5)

    def check() -> None:
        nonlocal cuts
        for whim in whims:
            cuts += 1
            left = disk.after_power_cut(tmp_path / f"cut-{cuts}", whim)
            assert read_json(left / "run.json")["saved"] in (saved["step"], saved["step"] - 1)
            newest = latest_checkpoint(left)
            if saved["step"]:
                assert read_info(newest)["step"] in (saved["step"], saved["step"] + 1)
                assert weight_of(newest) == read_info(newest)["step"]
            if saved["final"]:
                assert weight_of(resolve_checkpoint(left)) in (saved["final"], saved["step"])

    disk = recorded(root, check)
    for step in (1, 2, 3, 4):
        save(root, step)
        saved["step"] = step
        write_json(root / "run.json", {"saved": step})
        if step % 2 == 0:
            save_final(root, adapter_of(step), info={})
            saved["final"] = step
    assert cuts > 300
    assert "warning" not in capsys.readouterr().err


def test_the_layer_sees_a_rename_that_comes_before_the_flush(tmp_path, recorded):
    root, left = tmp_path / "run", []
    root.mkdir()
    (root / "file").write_text("old")
    disk = recorded(root, lambda: None)
    (root / "new").write_text("new")
    os.replace(root / "new", root / "file")
    for number, survives in enumerate((True, False)):
        place = disk.after_power_cut(tmp_path / str(number), lambda survives=survives: survives)
        left.append((place / "file").read_text())
    assert left == ["", "old"]
