"""scripts/plan.py says what is measured here: parameters, adapters, caches, and what a backward pass keeps."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plan import Machine, Shape, Work, plan, shape_of
from transformers import LlamaConfig, LlamaForCausalLM

from kltune.core import ranks
from kltune.lm.fast.decoding import bytes_held
from kltune.lm.fast.lora import speed_up
from kltune.lm.fast.memory import saved_bytes
from kltune.recipe import load_recipe
from kltune.stages.ppo import run_ppo
from kltune.train.evaluation import finish
from tests.core.test_ranks import as_several
from tests.train.test_dry_run import PROMPT, RESPONSE, write_recipe

SHAPES = [       # hidden, inner, layers, heads, heads of keys and values, rank
    (64, 172, 5, 8, 4, 16), (256, 688, 6, 8, 8, 16), (128, 512, 3, 4, 2, 8), (512, 1408, 2, 8, 8, 32),
    (96, 96, 4, 4, 4, 4),
]
EIGHT = Shape("8b", 8_030_261_248, 41_943_040, 32, 4096, 2 * 32 * 1024, 32 * (6 * 4096 + 4 * 14336 + 2 * 1024 + 160))
H100 = Machine(80.0, 3350.0, 990.0, 50.0, 0.4)
STEP = Work(512, 256, 256, 4, 64)


@pytest.mark.parametrize(("hidden", "inner", "layers", "heads", "keys", "rank"), SHAPES)
def test_what_is_counted_and_estimated_is_what_there_is(tmp_path, hidden, inner, layers, heads, keys, rank):
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=keys, max_position_embeddings=256,
    )
    config.save_pretrained(tmp_path)
    shape = shape_of(tmp_path, rank)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    assert shape.parameters == sum(tensor.numel() for tensor in model.parameters())
    token = torch.zeros(1, 1, dtype=torch.long)
    assert 4 * shape.cache_per_token == bytes_held(model(token, use_cache=True).past_key_values)
    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).get_base_model()
    assert shape.adapter == sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    speed_up(model)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def kept(rows: int) -> int:
        ids = torch.zeros(rows, 32, dtype=torch.long)
        return saved_bytes(lambda: model.model(input_ids=ids, use_cache=False)[0], own)

    assert 4 * shape.kept_per_token == pytest.approx((kept(2) - kept(1)) / 32, rel=0.1)


def test_the_bytes_on_the_wire_are_those_that_a_run_of_two_sends(tmp_path, monkeypatch):
    path = write_recipe(
        tmp_path, "ppo", "deep", ppo={"baseline": "value", "epochs": 2, "minibatch_size": 8}, optim={"lr": 1e-9}
    )
    monkeypatch.setattr(finish, "write_page", lambda folder: None)
    sent, summed = [], ranks.summed

    def counted(vector: torch.Tensor) -> torch.Tensor:
        sent.append(vector.numel() * vector.element_size())
        return summed(vector)

    monkeypatch.setattr(ranks, "summed", counted)

    def run(rank: int) -> int:
        run_ppo(load_recipe(path), resume=False)
        return sum(sent)

    steps, (told, other) = 2, map(int, as_several(2, run))
    work = Work(16, PROMPT, RESPONSE, 2, 8)
    row = plan(shape_of(tmp_path / "model", 4), work, H100, 2)      # of two, a ring sends each number once
    assert told == other == pytest.approx(steps * 1e6 * row["sent_mb"], rel=0.05)


def test_an_adapter_of_eight_billion_is_84_megabytes():
    assert 2 * EIGHT.adapter / 1e6 == pytest.approx(83.9, abs=0.1)
    row = plan(EIGHT, STEP, H100, 8)
    assert row["sent_mb"] == pytest.approx(8 * EIGHT.adapter * 2 * 4 * 8 * 2 * 7 / 8 / 1e6)
    assert row["memory_gib"] < 80.0


def test_more_gpus_are_faster_until_there_is_nothing_left_to_share():
    rows = [plan(EIGHT, STEP, H100, gpus) for gpus in (1, 2, 8, 64, 256, 1000)]
    seconds = [row["seconds"] for row in rows]
    assert seconds[:4] == sorted(seconds[:4], reverse=True)
    assert rows[-1]["bound"] == "too few responses to share"
    assert rows[0]["sent_mb"] == 0.0
    assert all(sum(row[f"{name}_share"] for name in ("sample", "measure", "update", "wire")) == pytest.approx(1.0)
               for row in rows)


def test_what_does_not_fit_is_said():
    assert "does not fit" in plan(EIGHT, STEP, Machine(12.0, 3350.0, 990.0, 50.0, 0.4), 8)["bound"]
