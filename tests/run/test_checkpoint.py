"""A checkpoint is whole or not there, comes back bit for bit, and nothing poisoned is ever saved."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from killing import adapter_of, exit_code, start
from safetensors.torch import load_file

from kltune.errors import CheckpointError, DivergedError, StorageError
from kltune.run import checkpoint as checkpoint_module
from kltune.run.checkpoint import (
    clear_leftovers,
    drop_oldest,
    latest_checkpoint,
    read_info,
    read_state,
    resolve_checkpoint,
    save_checkpoint,
    save_final,
)

AWKWARD = {"beta": 0.1 + 0.2, "tiny": 5e-324, "seed": 2**64 - 1, "done": None, "list": [1, 0.25, "é\n"], "flag": True}


def save(folder: Path, step: int, *, keep: int = 3, size: int = 256, **state: object) -> Path:
    tensors = {"optimizer": {"w/exp_avg": torch.full((size,), float(step))}}
    info = {"reference": {"sha256": "ab"}}
    return save_checkpoint(folder, step, adapter_of(step, size), info=info, tensors=tensors, state=state, keep=keep)


def assert_all_of_step(checkpoint: Path, step: int) -> None:
    """Adapter, tensors and state belong to one and the same step."""
    tensors, _ = read_state(checkpoint)
    assert read_info(checkpoint)["step"] == step
    assert set(tensors["optimizer"]["w/exp_avg"].tolist()) == {float(step)}
    assert set(load_file(checkpoint / "adapter_model.safetensors")["lora_A.weight"].tolist()) == {float(step)}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if path.name != ".lock"]


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    tensors = {
        "optimizer": {"w/step": torch.tensor(3.0), "w/exp_avg": torch.tensor([[1e-40, -0.0]]), "empty": torch.zeros(0)},
        "value_head": {"weight": torch.tensor([1.5, 2.5], dtype=torch.bfloat16), "count": torch.tensor([2**62])},
    }
    checkpoint = save_checkpoint(
        tmp_path, 20, adapter_of(20), info={"kl": {"nats_per_response": 5.9}}, tensors=tensors, state=AWKWARD, keep=1
    )
    assert checkpoint == tmp_path / "checkpoints" / "step-000020"
    back, state = read_state(checkpoint)
    assert state == AWKWARD
    assert read_info(checkpoint)["kl"] == {"nats_per_response": 5.9}
    assert {group: sorted(back[group]) for group in back} == {group: sorted(tensors[group]) for group in tensors}
    for group, named in tensors.items():
        for name, tensor in named.items():
            same = back[group][name]
            assert (same.dtype, same.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(same.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))      # −0 is not 0


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_rights_that_the_umask_leaves(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        checkpoint = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in checkpoint.rglob("*") if path.is_file()} == {oct(mode)}


def test_only_the_newest_are_kept(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000006", "step-000008"]


def test_a_save_reads_no_more_after_many_than_after_a_few(tmp_path, monkeypatch):
    read, plain = [], checkpoint_module._sha256
    monkeypatch.setattr(checkpoint_module, "_sha256", lambda path: read.append(path) or plain(path))
    counts = []
    for step in range(1, 13):
        save(tmp_path, step)
        counts.append(len(read))
        read.clear()
    assert len(set(counts[3:])) == 1        # three are kept
    assert counts[-1] <= counts[0] * 4


def test_a_damaged_later_checkpoint_never_pushes_out_the_good_ones(tmp_path):
    for step in (10, 40):
        save(tmp_path, step)
    (tmp_path / "checkpoints/step-000040/adapter_model.safetensors").write_bytes(b"")
    save(tmp_path, 20, keep=1)      # resumed from 10, because 40 is damaged
    assert_all_of_step(latest_checkpoint(tmp_path), 20)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000020"]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip_a_bit(folder / "adapter_model.safetensors"),
        lambda folder: flip_a_bit(folder / "state/optimizer.safetensors"),
        lambda folder: (folder / "state/state.json").write_text(""),
        lambda folder: (folder / "adapter_config.json").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"schema": "kltune.manifest/1", "files": [1]}'),
        lambda folder: (folder / "kltune.json").write_text("[]"),
        lambda folder: (folder / "kltune.json").write_text('{"schema": "kltune.checkpoint/1", "step": NaN}'),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, capsys, damage):
    for step in (10, 20):
        save(tmp_path, step)
    damage(tmp_path / "checkpoints/step-000020")
    assert_all_of_step(latest_checkpoint(tmp_path), 10)
    assert capsys.readouterr().err.startswith("warning: ")


def test_the_step_is_what_the_file_says_and_not_the_name(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
    (tmp_path / "checkpoints/step-000010").rename(tmp_path / "checkpoints/step-000099")
    assert_all_of_step(latest_checkpoint(tmp_path), 20)


def test_no_checkpoint_is_none(tmp_path, capsys):
    assert latest_checkpoint(tmp_path) is None
    save(tmp_path, 10)
    (tmp_path / "checkpoints/step-000010/manifest.json").unlink()
    assert latest_checkpoint(tmp_path) is None
    assert "step-000010" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("optimizer/w/exp_avg", {"tensors": {"optimizer": {"w/exp_avg": torch.tensor([1.0, float("nan")])}}}),
        ("lora_A.weight", {"write_adapter": adapter_of(float("inf"))}),
        ("controller.beta", {"state": {"controller": {"beta": float("nan")}}}),
        ("kl.ci[1]", {"info": {"kl": {"ci": [0.0, float("inf")]}}}),
    ],
)
def test_nothing_that_is_not_finite_is_saved(tmp_path, what, changes):
    save(tmp_path, 10)
    arguments = {"write_adapter": adapter_of(20), "info": {}, "tensors": {}, "state": {}, "keep": 1, **changes}
    with pytest.raises(DivergedError) as caught:
        save_checkpoint(tmp_path, 20, **arguments)
    assert what in str(caught.value)
    assert_all_of_step(latest_checkpoint(tmp_path), 10)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000010"]


def test_a_poisoned_final_leaves_the_one_before(tmp_path):
    save_final(tmp_path, adapter_of(1), info={})
    with pytest.raises(DivergedError):
        save_final(tmp_path, adapter_of(float("nan")), info={})
    assert load_file(tmp_path / "final/adapter_model.safetensors")["lora_A.weight"][0] == 1.0
    assert hidden(tmp_path) == []


def test_resolve_prefers_final_then_the_newest_checkpoint(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="saved nothing"):
        resolve_checkpoint(tmp_path)
    newest = save(tmp_path, 10)
    assert resolve_checkpoint(tmp_path) == newest == resolve_checkpoint(newest)
    final = save_final(tmp_path, adapter_of(10), info={})
    assert resolve_checkpoint(tmp_path) == final
    flip_a_bit(final / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="sha256"):      # and not, in silence, other weights
        resolve_checkpoint(tmp_path)


def test_resolve_takes_foreign_adapters_but_no_pickles(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere: there is no such folder"):
        resolve_checkpoint(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert resolve_checkpoint(str(tmp_path)) == tmp_path
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="pickle"):
        resolve_checkpoint(tmp_path)


def test_files_that_were_planted_are_never_opened(tmp_path):
    checkpoint = save(tmp_path, 10)
    canary = tmp_path / "canary"
    for name in ("state/optimizer.pt", "state/rng_state.pth", "training_args.bin"):
        (checkpoint / name).write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    tensors, _ = read_state(checkpoint)
    assert set(tensors) == {"optimizer"}
    assert not canary.exists()


def test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path, capsys):
    moments, reached = random.Random(0), 0
    began = time.monotonic()
    save(tmp_path, 0, size=20_000)
    one_save = time.monotonic() - began
    for _ in range(15):
        reader, writer = os.pipe()

        def save_for_ever(first: int = reached + 1, writer: int = writer) -> None:
            for step in range(first, first + 10_000):
                save(tmp_path, step, keep=2, size=20_000)
                os.write(writer, b"%d\n" % step)

        pid = start(save_for_ever)
        os.close(writer)
        time.sleep(0.03 + moments.uniform(0, 3) * one_save)
        os.kill(pid, signal.SIGKILL)
        assert exit_code(pid) == -signal.SIGKILL
        with os.fdopen(reader) as told:
            done = [int(line) for line in told]
        checkpoint = latest_checkpoint(tmp_path)
        reached = read_info(checkpoint)["step"]
        assert reached >= max(done, default=reached)
        assert_all_of_step(checkpoint, reached)
    assert capsys.readouterr().err == ""
    assert reached > 0


def exit_before_file_operation(number: int) -> None:
    """From now on, end this process at once before the ``number``-th time it opens, renames or removes something."""
    left = number

    def hook(event: str, _arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            left -= 1
            if left == 0:
                os._exit(9)

    sys.addaudithook(hook)      # cannot be taken away again, which is why this runs in a process of its own


def test_an_exit_before_each_file_operation_of_a_save_leaves_everything_loadable(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)      # an exit loses no pages; a power cut cannot be tested here
    before = tmp_path / "before"
    save(before, 2)
    save_final(before, adapter_of(2), info={})
    code, points = 9, 0
    while code == 9:
        points += 1
        folder = tmp_path / f"exit-{points}"
        shutil.copytree(before, folder)

        def save_both(folder: Path = folder, point: int = points) -> None:
            exit_before_file_operation(point)
            save(folder, 3, keep=1)
            save_final(folder, adapter_of(3), info={})

        code = exit_code(start(save_both))
        checkpoint = latest_checkpoint(folder)
        step = read_info(checkpoint)["step"]
        assert step in (2, 3)
        assert_all_of_step(checkpoint, step)
        clear_leftovers(folder)      # as the next session does
        final = resolve_checkpoint(folder / "final")
        assert load_file(final / "adapter_model.safetensors")["lora_A.weight"][0] in (2, 3)
        assert hidden(folder) == []
        shutil.rmtree(folder)
    assert code == 0
    assert points > 30
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(tmp_path):
    save(tmp_path, 10)
    for limit in (0, 1, 100, 1_000, 50_000, 79_000):      # bytes; the adapter takes 80,000

        def save_much(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            with pytest.raises(StorageError, match=r"step-000020: File too large") as caught:
                save(tmp_path, 20, size=20_000)
            assert re.search(r"at least 80,000 bytes were needed; [\d,]+ bytes are free there; a file may have "
                             f"{limit:,} bytes", str(caught.value))
            raise caught.value

        assert exit_code(start(save_much)) == StorageError.exit_code, limit
        assert_all_of_step(latest_checkpoint(tmp_path), 10)
        assert hidden(tmp_path) == []


def test_a_checkpoint_that_cannot_be_read_for_a_moment_is_not_passed_over(tmp_path, monkeypatch):
    for step in (10, 20):
        save(tmp_path, step)
    sha256 = checkpoint_module._sha256

    def unreadable(path: Path) -> str:
        if "step-000020" in str(path):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return sha256(path)

    monkeypatch.setattr(checkpoint_module, "_sha256", unreadable)
    with pytest.raises(CheckpointError, match=r"step-000020 cannot be read.*Input/output error"):
        latest_checkpoint(tmp_path)


def test_a_reader_beside_a_writer_finds_the_newest(tmp_path, capsys, monkeypatch):
    save(tmp_path, 10)
    verify, moved = checkpoint_module.verify, []

    def moved_on(folder: Path, inside: str = "") -> list[str]:
        if not moved:
            moved.append(save(tmp_path, 20, keep=1))
        return verify(folder, inside)

    monkeypatch.setattr(checkpoint_module, "verify", moved_on)
    (tmp_path / "run.json").write_text("{}")
    assert resolve_checkpoint(tmp_path) == moved[0] == latest_checkpoint(tmp_path)
    assert capsys.readouterr().err == ""


def test_a_reader_finds_final_while_it_is_exchanged(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text("{}")
    save(tmp_path, 10)
    final = save_final(tmp_path, adapter_of(10), info={})
    aside = final.rename(tmp_path / ".old-final")
    assert resolve_checkpoint(tmp_path) == aside        # a kill cut the exchange in two, and no writer has been since
    monkeypatch.setattr(time, "sleep", lambda _: aside.rename(final))
    assert resolve_checkpoint(tmp_path) == final


def test_what_a_kill_left_beyond_keep_goes_and_the_newest_stays(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    drop_oldest(tmp_path / "checkpoints/step-000030", 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000020", "step-000030"]
    drop_oldest(tmp_path / "checkpoints/step-000020", 1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000020", "step-000030"]


def test_the_manifest_lists_every_file(tmp_path):
    checkpoint = save(tmp_path, 10)
    listed = set(json.loads((checkpoint / "manifest.json").read_text())["files"])
    there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert there - listed == {"manifest.json"}
