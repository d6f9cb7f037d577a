"""Whatever is kept, damaged and resumed: the only checkpoint that is whole, and ``final``, are never removed."""

import os
import random
import shutil
from pathlib import Path

import pytest
from killing import adapter_of

from kltune.run.checkpoint import (
    drop_oldest,
    latest_checkpoint,
    read_info,
    save_checkpoint,
    save_final,
    verify,
    whole_checkpoints,
)

SCHEDULES = 200
OFTEN = 20


def save(folder: Path, step: int, keep: int) -> Path:
    return save_checkpoint(folder, step, adapter_of(step, 8), info={}, tensors={}, state={}, keep=keep)


@pytest.mark.parametrize("seed", [
    seed if seed < OFTEN else pytest.param(seed, marks=pytest.mark.stress) for seed in range(SCHEDULES)
])  # fmt: skip
def test_the_newest_that_is_whole_and_final_outlive_any_schedule(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    chance, step, final = random.Random(seed), 0, None
    for _ in range(12):
        keep, event = chance.randint(1, 4), chance.choice(["save", "save", "save", "damage", "lose", "resume", "final"])
        whole = [read_info(folder)["step"] for folder in whole_checkpoints(tmp_path)]
        if event == "save":
            step += chance.randint(1, 3)
            save(tmp_path, step, keep)
            whole = [*whole, step]
            kept = list((tmp_path / "checkpoints").iterdir())
            assert len(kept) <= keep
        elif event == "final" and whole:
            final = save_final(tmp_path, adapter_of(step, 8), info={})
        elif event == "resume" and whole:
            newest = latest_checkpoint(tmp_path)
            step = read_info(newest)["step"]
            drop_oldest(newest, keep)
        elif event in ("damage", "lose") and len(whole) > 1:      # never the last one: nothing can be promised then
            victim = tmp_path / "checkpoints" / f"step-{whole.pop(chance.randrange(len(whole))):06d}"
            if event == "damage":
                (victim / "kltune.json").write_text("{}")
            else:
                shutil.rmtree(victim)
        newest = latest_checkpoint(tmp_path)
        assert (newest is not None) == bool(whole)
        if whole:
            assert read_info(newest)["step"] == max(whole)
        if final is not None:
            assert verify(final)
