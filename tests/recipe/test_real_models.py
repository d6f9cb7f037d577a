"""The recipes for real models open and plan with a random model of two layers of the architecture that they name."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from kltune.lm.model.opening import load_policy
from kltune.recipe import load_recipe, packaged_recipes
from kltune.train.plan import plan
from tests.tiny_policies import SIZES, SPECIAL, word_tokenizer

ARCHITECTURES = {"0.5b": Qwen2Config, "1.5b": Qwen2Config, "8b": LlamaConfig, "smollm2": LlamaConfig}
NAMED = {"0.5b": "Qwen/Qwen2.5-0.5B-Instruct", "1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
         "8b": "allenai/Llama-3.1-Tulu-3-8B-SFT", "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
STAGES = ("sft", "reward", "ppo", "trpo", "dpo")
TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"


def folder_of(tmp_path: Path, size: str) -> Path:
    """A recipe's folder with data of messages, and a model of two layers of its architecture."""
    torch.manual_seed(0)
    sizes = SIZES | {"max_position_embeddings": 2048}
    AutoModelForCausalLM.from_config(ARCHITECTURES[size](**sizes, **SPECIAL)).save_pretrained(tmp_path / "model")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    asked = [{"role": "user", "content": "w3 w4 w5"}]
    said = [[*asked, {"role": "assistant", "content": text}] for text in ("w6 w7", "w8")]
    pair = {"chosen": said[0], "rejected": said[1]}
    rows = {"prompts": {"messages": asked}, "texts": {"messages": said[0]}, "pairs": pair}
    for name, row in rows.items():
        for prefix in ("", "held_out_"):
            (tmp_path / f"{prefix}{name}.jsonl").write_text((json.dumps(row) + "\n") * 2)
    return tmp_path


@pytest.mark.parametrize("size", ARCHITECTURES)
def test_every_recipe_opens_with_the_architecture_it_names(tmp_path, size):
    folder = folder_of(tmp_path, size)
    recipes = {name: file for name, file in packaged_recipes().items() if name.startswith(f"{size}/")}
    assert {f"{size}/{stage}" for stage in STAGES} <= recipes.keys()
    for name, file in recipes.items():
        assert load_recipe(name).model.path == NAMED[size]
        (folder / "recipe.yaml").write_text(Path(file).read_text())
        recipe = load_recipe(folder / "recipe.yaml", ("model.path=model",))
        policy = load_policy(recipe.model, recipe.lora, device=torch.device("cpu"))
        # What is made for a GPU names its dtype; on a CPU it is the one that the processor is fast in.
        assert recipe.model.dtype == ("auto" if size == "smollm2" else "bfloat16")
        assert size == "smollm2" or policy.dtype == torch.bfloat16
        assert policy.trainable_parameters()


def test_a_recipe_for_a_real_model_plans_its_rows_and_steps(tmp_path):
    folder = folder_of(tmp_path, "0.5b")
    (folder / "recipe.yaml").write_text(Path(packaged_recipes()["0.5b/dpo"]).read_text())
    told = plan(load_recipe(folder / "recipe.yaml", ("model.path=model",)))
    assert told["rows"]["data.pairs"]["kept"] == 2
    assert (told["steps"], told["memory"]["fits"]) == (1, True)
