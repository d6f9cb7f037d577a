"""Every architecture through every stage: a step of each, the KL of what it saved, or a refusal that says why.

A few always; all of them by ``make stress``, which then says of each stage how many it trained.
"""

import math
from pathlib import Path

import pytest

from kltune.errors import ModelError
from kltune.recipe import load_recipe
from kltune.stages.eval_kl import EvalKLOptions, eval_kl
from kltune.train.evaluation.held_out import EVALUATION_SEED
from tests.foreign_models import MODELS, TARGETS, save_model
from tests.stages.conftest import DISTILL, DPO, ONLINE, PPO, REWARD, SFT, TRPO, letter_tokenizer, ran, write_recipe

UPPER = PPO | {"ppo": PPO["ppo"] | {"value_function": "upper", "value_layers": 0.5}}
NARROW = {**DPO, "model": {"dtype": "bfloat16"}}
STAGES = {
    "sft": SFT, "reward": REWARD, "ppo": PPO, "trpo": TRPO, "dpo": DPO, "online dpo": ONLINE, "distill": DISTILL,
    "ppo by upper layers": UPPER, "dpo in bfloat16": NARROW,
}
# What cannot be trained, and why; all else can.
UNTRAINED = {
    (kind, "ppo by upper layers"): "value_layers: .* no one list of layers to choose from"
    for kind in ("ctrl", "gpt_neox_japanese", "hrm_text", "openai-gpt")
} | {("xlstm", "dpo in bfloat16"): "cannot be trained in bfloat16: .* same dtype"}     # from 64 tokens on
OFTEN = {("cohere", "ppo"), ("gemma2", "trpo"), ("granite", "online dpo"), ("mamba", "dpo")}


def cases() -> list:
    """Each architecture with each stage, those that are not tried always marked."""
    pairs = [(kind, stage) for kind in MODELS for stage in STAGES]
    return [pair if pair in OFTEN else pytest.param(*pair, marks=pytest.mark.stress) for pair in pairs]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function from an architecture to its folder, with a tokenizer of letters."""
    folders: dict[str, Path | None] = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = save_model(kind, tmp_path_factory.mktemp("models") / kind)
            if folders[kind] is not None:
                letter_tokenizer().save_pretrained(folders[kind])
        return folders[kind] or pytest.skip(f"this transformers has no {kind}")

    return folder


@pytest.mark.parametrize(("kind", "stage"), cases())
def test_a_step_of_every_stage_and_the_kl_of_what_it_saved(kind, stage, models, tmp_path, record_property):
    base = STAGES[stage] | {"lora": {"rank": 2, "alpha": 4.0, "targets": TARGETS.get(kind, "all-linear")}}
    recipe = load_recipe(write_recipe(tmp_path, base, models(kind)), ["run.steps=1"])
    if (kind, stage) in UNTRAINED:
        with pytest.raises(ModelError, match=UNTRAINED[kind, stage]):
            ran(recipe)
        record_property(f"{stage} refused", 1)
        return
    result, (row, *_) = ran(recipe)
    assert all(value is None or isinstance(value, list) or math.isfinite(value) for value in row.values())
    record_property(f"{stage} of an architecture", 1)
    if stage == "reward":
        return
    options = EvalKLOptions(prompts=str(tmp_path / "held_out.jsonl"), responses=10, seed=EVALUATION_SEED)
    document, _ = eval_kl([result["final"]], options)
    # Of other responses where the run answered others; of the same to rounding.
    rounding = 0.02 if recipe.model.dtype == "bfloat16" else 1e-4
    found = document["kl"]["exact"]["nats_per_response"]
    assert math.isfinite(found)
    assert abs(document["agreement_z"]) < 4.0
    assert found == pytest.approx(result["kl"]["nats_per_response"], abs=rounding)
