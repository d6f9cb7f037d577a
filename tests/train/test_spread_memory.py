"""What is told of a base that is spread: bytes of each process, and when ``auto`` spreads it."""

import json
import weakref
from pathlib import Path

import pytest
import torch

from kltune.lm.machine.live_bytes import LiveBytes
from kltune.recipe import load_recipe
from kltune.train import plan as planning
from kltune.train.evaluation import finish
from kltune.train.plan import plan, plan_text, shard_of
from tests.core.test_ranks import as_several
from tests.train.test_dry_run import RUN, write_recipe

HEAVY = "mm", "addmm", "bmm", "split_with_sizes_copy"        # operations at which most is alive


class ResizedBytes(LiveBytes):
    """Also of memory that grows and is given back under tensors that stay, as that of gathered layers."""

    def __init__(self):
        super().__init__()
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func._overloadpacket.__name__ in HEAVY:
            for key, known in self._storages.items():
                storage = known()
                if storage is not None and key in self._sizes and storage.nbytes() != self._sizes[key]:
                    self.now += storage.nbytes() - self._sizes[key]
                    self._sizes[key] = storage.nbytes()
            self.peak = max(self.peak, self.now)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._sizes:
            self._storages[storage._cdata] = weakref.ref(storage)
        super()._add(storage)


@pytest.fixture(autouse=True)
def _no_page(monkeypatch):
    monkeypatch.setattr(finish, "write_page", lambda folder: None)


def recipe_of(folder: Path, stage: str, shape: str, **run) -> Path:
    """A recipe whose rows are all trained on at once, so that one process of two has as many as the other idles."""
    many = {"micro_batch_size": 8} | ({"batch_size": 8} if stage in ("sft", "reward", "dpo") else {})
    return write_recipe(folder, stage, shape, run=run | {"processes": 2}, optim=many)


@pytest.mark.parametrize(("shape", "stage"), [
    ("deep", "sft"), *(pytest.param(shape, stage, marks=pytest.mark.stress) for shape, stage in (
        ("wide", "ppo"), ("wide", "trpo"), ("deep", "dpo"), ("tied, bfloat16", "reward"))),
])
def test_the_memory_told_of_a_spread_base_is_what_each_process_takes(tmp_path, shape, stage):
    path = recipe_of(tmp_path, stage, shape, shard="full")
    told = plan(load_recipe(path))["memory"]
    assert (told["processes"], told["shard"], told["phases"]["gather"]) == (2, "full", told["phases"]["gather"])

    def peak(rank: int) -> int:
        with ResizedBytes() as live:
            RUN[stage](load_recipe(path), resume=False)
        return live.peak

    assert [json.loads(taken) for taken in as_several(2, peak)] == pytest.approx([told["peak"]] * 2, rel=0.1)
