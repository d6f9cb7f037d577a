"""What a run's folder keeps of the reference: the same numbers to the last bit, or none."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from kltune.errors import StorageError
from kltune.run.caches import REF_LOGPROBS_FILE as NAME
from kltune.run.caches import StoredLogprobs

NUMBERS = torch.tensor([-1.0 / 3.0, torch.nan, -0.0], dtype=torch.float64)


@pytest.fixture
def stored(tmp_path):
    """A folder that holds numbers of two kinds."""
    known = StoredLogprobs(tmp_path)
    known.record("pairs", NUMBERS)
    known.record("held out", NUMBERS[:1])
    return tmp_path


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.view(torch.int64).tolist()


def test_numbers_come_back_bit_for_bit(stored, capsys):
    known = StoredLogprobs(stored)
    assert (bits(known.get("pairs")), bits(known.get("held out"))) == (bits(NUMBERS), bits(NUMBERS[:1]))
    assert [path.name for path in stored.iterdir()] == [NAME]
    assert capsys.readouterr().err == ""


def test_a_folder_without_any_is_empty_and_stays_so(tmp_path):
    assert StoredLogprobs(tmp_path).get("pairs") is None
    assert list(tmp_path.iterdir()) == []


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def unsigned(path):
    save_file({"pairs": NUMBERS}, path)


@pytest.mark.parametrize("damage", [cut, flip, unsigned])
def test_a_damaged_file_counts_as_none_and_is_written_anew(stored, capsys, damage):
    damage(stored / NAME)
    known = StoredLogprobs(stored)
    assert known.get("pairs") is None
    known.record("pairs", NUMBERS)
    assert capsys.readouterr().err.count("is damaged") == 1
    assert bits(StoredLogprobs(stored).get("pairs")) == bits(NUMBERS)


def test_numbers_of_other_pairs_are_said_to_be_no_use(stored, capsys):
    known = StoredLogprobs(stored)
    assert known.get("other pairs") is None
    known.record("other pairs", NUMBERS)
    assert "the reference was measured again" in capsys.readouterr().err
    assert all(StoredLogprobs(stored).get(name) is not None for name in ("pairs", "held out", "other pairs"))


def test_a_full_disk_leaves_what_was_there(stored, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    known = StoredLogprobs(stored)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        known.record("more", NUMBERS)
    assert StoredLogprobs(stored).get("pairs") is not None
    assert StoredLogprobs(stored).get("more") is None
