"""What a full or odd disk does: one error, 74, that says why, what was needed and what there is."""

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from killing import adapter_of
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from kltune.errors import RecipeError, StorageError
from kltune.run.checkpoint import latest_checkpoint, save_checkpoint
from kltune.run.files import claim, locked, storing, write_whole


def save(folder: Path, step: int) -> Path:
    return save_checkpoint(folder, step, adapter_of(step, 20_000), info={}, tensors={}, state={}, keep=3)


@contextlib.contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """Within: a file system of its own on a folder; the test is skipped where mounting is not allowed."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder: Path, options: str) -> None:
    """Change the options of a file system that is mounted."""
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    Exception("No space left on device (os error 28)"),
])  # fmt: skip
def test_a_full_disk_is_one_error_whichever_library_meets_it(tmp_path, error):
    with pytest.raises(StorageError, match=r"cannot write .*here: No space left on device \(at least 1,000 bytes were "
                                           r"needed; [\d,]+ bytes are free there\).*make room"), \
            storing(tmp_path / "here", 1000):
        raise error


def test_what_is_no_refusal_to_write_goes_through(tmp_path):
    for error in (ValueError("os error 28"), RuntimeError("os error 28"), Exception("odd")):
        with pytest.raises(type(error), match=str(error)), storing(tmp_path):
            raise error
    with pytest.raises(RecipeError, match="cannot be a folder: a file has that name"), storing(tmp_path):
        raise FileExistsError(17, "x")


def test_tokenizers_raises_what_is_recognised(tmp_path):
    with pytest.raises(StorageError), storing(tmp_path):
        Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "not" / "there" / "tokenizer.json"))


@pytest.mark.parametrize(("place", "reason", "way"), [
    ("x" * 256, "File name too long", "choose a shorter name"),
    ("/proc/kltune", "No such file or directory", "choose another place"),
])
def test_a_folder_that_cannot_be_made_says_why_and_what_to_do(tmp_path, place, reason, way):
    with pytest.raises(StorageError, match=rf"{place}: {reason} \(.*bytes are free there\).*{way}"):
        claim(tmp_path / place, "run", ours=False)
    with pytest.raises(StorageError, match=reason):
        write_whole(tmp_path / place / "file", "text")


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    for device, error in (("/dev/null", None), ("/dev/full", "No space left on device")):
        before = os.stat(device).st_rdev
        with pytest.raises(StorageError, match=error) if error else contextlib.nullcontext():
            write_whole(Path(device), "text")
        assert os.stat(device).st_rdev == before
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)


def test_no_room_says_how_much_was_needed_and_keeps_the_checkpoint_before(tmp_path):
    with tmpfs(tmp_path / "small", "size=160k") as folder:
        save(folder, 10)
        with pytest.raises(StorageError, match=r"step-000020: No space left on device \(at least 8\d,\d{3} bytes were "
                                               r"needed; [\d,]+ bytes are free there\)"):
            save(folder, 20)
        assert latest_checkpoint(folder).name == "step-000010"
        remount(folder, "size=10m")
        assert latest_checkpoint(save(folder, 20).parents[1]).name == "step-000020"


def test_no_inode_says_so_and_keeps_the_checkpoint_before(tmp_path):
    with tmpfs(tmp_path / "few", "nr_inodes=14") as folder:
        save(folder, 10)
        with pytest.raises(StorageError, match=r"No inode is left for another file.*of 14 inodes are free.*remove"):
            save(folder, 20)
        assert latest_checkpoint(folder).name == "step-000010"


def test_a_read_only_file_system_says_so(tmp_path):
    with tmpfs(tmp_path / "fixed", "size=1m") as folder:
        save(folder, 10)
        remount(folder, "ro")
        for write in (lambda: save(folder, 20), lambda: claim(folder / "run", "run", ours=False),
                      lambda: locked(folder).__enter__()):
            with pytest.raises(StorageError, match=r"Read-only file system.*choose a place that is not read-only"):
                write()
        assert latest_checkpoint(folder).name == "step-000010"
        assert os.listdir(folder) == ["checkpoints"]
