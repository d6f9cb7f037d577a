"""What is told of a base that is spread: bytes of each process, and when ``auto`` spreads it."""

import ctypes
import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kltune.cli.output import plan_text
from kltune.lm.measure.footprint import Footprint
from kltune.lm.model.opening import empty_policy, load_policy
from kltune.lm.model.policy import Policy
from kltune.recipe import LoraSection, ModelSection, load_recipe
from kltune.run.recorder import Report
from kltune.train import plan as planning
from kltune.train.evaluation import finish
from kltune.train.plan import plan, shard_line, shard_of
from tests.core.test_ranks import as_several
from tests.tiny_policies import SPECIAL, word_tokenizer
from tests.train.test_dry_run import RUN, SHAPES, config, write_recipe

GLIBC = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc's allocator"
)


class Allocated(ctypes.Structure):
    """What glibc tells of its memory (``mallinfo2``), in bytes."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def allocated() -> int:
    """Bytes that this process's allocator has handed out.

    A fork inherits what earlier tests left in cycles: collect it first (``gc.collect``), or it counts as given back.
    """
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Allocated
    told = ask()
    return told.uordblks + told.hblkhd


class AllocatedBytes(TorchDispatchMode):
    """Within: the most that was allocated after an operation, beyond what was at the start.

    Tensors cannot be asked here: the storage of a layer that was given back lives on, and says that it has its bytes.
    """

    def __init__(self):
        super().__init__()
        gc.collect()
        self.start, self.peak = allocated(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, allocated() - self.start)
        return out


@pytest.fixture(autouse=True)
def _no_page(monkeypatch):
    monkeypatch.setattr(finish, "write_page", lambda folder: None)


def recipe_of(folder: Path, stage: str, shape: str, **run) -> Path:
    """A recipe for two processes that trains on eight rows at once, whose model was saved in half of its numbers."""
    many = {"micro_batch_size": 8, "checkpoint_layers": "never"}
    many |= {"batch_size": 16} if stage in ("sft", "reward", "dpo") else {}
    path = write_recipe(folder, stage, shape, run=run | {"processes": 2}, optim=many)
    half = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)     # no mapped file then
    half.save_pretrained(folder / "model")
    path.write_text(path.read_text().replace("dtype: bfloat16", "dtype: float32"))
    return path


@GLIBC
@pytest.mark.parametrize("stage", [
    "sft", *(pytest.param(stage, marks=pytest.mark.stress) for stage in ("reward", "ppo", "trpo", "dpo"))
])
def test_the_memory_told_of_a_spread_base_is_what_each_process_takes(tmp_path, monkeypatch, stage):
    monkeypatch.setitem(SHAPES, "heavy", (config(LlamaConfig, 512, 4, 2000), "float32"))    # beside what Python takes
    path = recipe_of(tmp_path, stage, "heavy", shard="full")
    told = plan(load_recipe(path))["memory"]
    assert (told["processes"], told["processes_on_a_device"], told["shard"]) == (2, 2, "full")

    def peak(rank: int) -> int:
        with AllocatedBytes() as bytes_of_run:
            RUN[stage](load_recipe(path), resume=False)
        return bytes_of_run.peak

    peaks = [json.loads(taken) for taken in as_several(2, peak)]
    assert max(peaks) == pytest.approx(told["peak"], rel=0.1)       # the one with fewer rows to do takes less


@GLIBC
def test_closed_and_opened_layers_take_the_memory_that_is_told(tmp_path):
    made = LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=4, vocab_size=500, num_attention_heads=8, **SPECIAL
    )
    LlamaForCausalLM(made).bfloat16().save_pretrained(tmp_path)
    word_tokenizer(497).save_pretrained(tmp_path)
    section, lora, cpu = ModelSection(path=str(tmp_path), dtype="float32"), LoraSection(rank=4), torch.device("cpu")
    empty = empty_policy(section, lora, device=cpu)
    told = Footprint(empty, 1e9, fraction=0.8, checkpoint_layers="auto", device="cpu").spread_over(2)

    def taken(rank: int) -> str:
        policy = load_policy(section, lora, device=cpu)
        gc.collect()
        whole = allocated()
        policy.shard()
        policy.network.open()
        opened = allocated()
        policy.network.close()
        gc.collect()
        closed = allocated()
        return json.dumps([opened - closed, whole - closed])

    for found in as_several(2, taken):
        assert json.loads(found) == pytest.approx([told.whole, told.whole - told.pieces], rel=0.1)


@pytest.mark.parametrize(("stage", "shape", "cases"), [
    ("sft", "deep", [
        (1.01, "none", "GB are planned with"), (0.99, "full", "GB are planned with; with pieces 0.02 GB"),
        (0.50, "full", "which does not fit either"),
    ]),
    pytest.param("trpo", "wide", [(0.97, "none", "pieces would take no less, for sampling and measuring gather them")],
                 marks=pytest.mark.stress),
])
def test_auto_spreads_what_a_device_does_not_hold_whole(tmp_path, stage, shape, cases):
    recipe = load_recipe(recipe_of(tmp_path, stage, shape, shard="auto"))
    whole = plan(recipe)["memory"]["whole_peak"]
    for share, shard, why in cases:     # of what two processes with a whole base each take
        document = plan(recipe, there=2 * share * whole / 0.8)
        line, told = shard_line(document["memory"]), plan_text(document)
        assert document["memory"]["shard"] == shard
        assert line.startswith(f"run.shard: auto is {shard}: with a whole base each of 2 processes takes")
        assert line.endswith(why)
        assert "2 processes share the work, and each of them holds " + (
            "a piece of each layer of the base" if shard == "full" else "the whole base") in told
        assert ("DOES NOT FIT" in told) == (share == 0.5 or stage == "trpo")
        assert "; 2 processes share it" in told


@pytest.mark.parametrize(("share", "shard"), [(0.97, "full"), pytest.param(1.01, "none", marks=pytest.mark.stress)])
def test_a_run_says_once_what_auto_came_to_and_does_it(tmp_path, monkeypatch, share, shard):
    path, spread, said = recipe_of(tmp_path, "sft", "deep", shard="auto"), [], []
    whole_peak = plan(load_recipe(path))["memory"]["whole_peak"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(planning, "device_bytes", lambda device: 2 * share * whole_peak / 0.8)
    whole, say = Policy.shard, Report.say
    monkeypatch.setattr(Policy, "shard", lambda policy: spread.append(whole(policy)))
    monkeypatch.setattr(Report, "say", lambda report, text: said.append(text) or say(report, text))

    def run(rank: int) -> str:
        RUN["sft"](load_recipe(path), resume=False)
        return json.dumps([len(spread), len([line for line in said if line.startswith(f"run.shard: auto is {shard}")])])

    assert [json.loads(found) for found in as_several(2, run)] == [[shard == "full", 1]] * 2


def test_what_cannot_be_spread_is_said(tmp_path):
    recipe = load_recipe(recipe_of(tmp_path, "sft", "deep", shard="auto"))
    assert shard_of(recipe) == ("none", "run.shard: auto is none: one process has nobody to share with")
    full = recipe.model_copy(update={"lora": None})
    said = as_several(2, lambda rank: json.dumps(shard_of(full)))
    assert ["lora: null trains all weights" in line for line in said] == [True, True]
    assert plan(full)["memory"]["shard"] == "none"
    whole = recipe.model_copy(update={"run": recipe.run.model_copy(update={"shard": "none"})})
    assert shard_of(whole) == ("none", None)
