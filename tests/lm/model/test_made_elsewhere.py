"""Adapters and models that kltune did not make, opened over their base: the logits of plain transformers and PEFT."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from kltune.errors import ModelError
from kltune.lm.model.opening import load_saved_policy
from kltune.recipe import ModelSection
from tests.tiny_policies import save_tiny_model

IDS = torch.tensor([[0, 5, 9, 12, 7], [0, 8, 8, 21, 30]])
TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
ONE_SET = {
    "lora": LoraConfig(**LORA),
    "rslora": LoraConfig(**LORA, use_rslora=True),
    "dora": LoraConfig(**LORA, use_dora=True),
    "all-linear": LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "embedding": LoraConfig(r=2, lora_alpha=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "loha": LoHaConfig(r=2, alpha=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, target_modules=TARGETS, task_type="CAUSAL_LM", total_step=10),
    "oft": OFTConfig(oft_block_size=8, r=0, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "vera": VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}
TWO_SETS = {
    "modules_to_save": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "trainable tokens": LoraConfig(**LORA, trainable_token_indices=[3, 5]),
}


def save_foreign(base: Path, config, folder: Path, *, scale: float = 0.3) -> PeftModel:
    """An adapter with random tensors, saved by PEFT alone."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def plain_logits(base: Path, adapter: Path | None) -> torch.Tensor:
    """What transformers and PEFT give, with or without the adapter."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@torch.no_grad()
def opened_logits(policy) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the policy and of its reference."""
    mine = policy.network.logits(policy.network.hidden(IDS))
    with policy.reference():
        return mine, policy.network.logits(policy.network.hidden(IDS))


def open_foreign(base: Path, folder: Path):
    return load_saved_policy(folder, ModelSection(path=str(base)), device=torch.device("cpu"), is_adapter=True)


@pytest.mark.parametrize("kind", ONE_SET)
def test_an_adapter_is_opened_on_its_bases_own_weights(tiny_model, tmp_path, kind):
    base = tiny_model("llama")
    save_foreign(base, ONE_SET[kind], tmp_path)
    policy = open_foreign(base, tmp_path)
    assert not policy.full
    mine, reference = opened_logits(policy)
    torch.testing.assert_close(mine, plain_logits(base, tmp_path), atol=1e-6, rtol=0)
    assert torch.equal(reference, plain_logits(base, None))
    assert (mine - reference).abs().max() > 0.01


@pytest.mark.parametrize("kind", TWO_SETS)
def test_an_adapter_that_trained_parts_of_the_base_is_opened_beside_it(tiny_model, tmp_path, kind):
    base = tiny_model("llama")
    save_foreign(base, TWO_SETS[kind], tmp_path)
    policy = open_foreign(base, tmp_path)
    assert policy.full
    mine, reference = opened_logits(policy)
    torch.testing.assert_close(mine, plain_logits(base, tmp_path), atol=1e-6, rtol=0)
    assert torch.equal(reference, plain_logits(base, None))


def test_a_bias_that_was_trained_is_no_part_of_the_reference(tiny_model, tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama", attention_bias=True)
    save_foreign(base, LoraConfig(**LORA, bias="lora_only"), tmp_path / "adapter")
    mine, reference = opened_logits(open_foreign(base, tmp_path / "adapter"))
    torch.testing.assert_close(mine, plain_logits(base, tmp_path / "adapter"), atol=1e-6, rtol=0)
    assert torch.equal(reference, plain_logits(base, None))


def test_embeddings_saved_with_an_adapter_do_not_become_the_references(tiny_model, tmp_path):
    base = tiny_model("llama")
    model = save_foreign(base, ONE_SET["lora"], tmp_path / "unused")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    policy = open_foreign(base, tmp_path / "adapter")
    assert policy.full
    mine, reference = opened_logits(policy)
    torch.testing.assert_close(mine, plain_logits(base, tmp_path / "adapter"), atol=1e-6, rtol=0)
    assert torch.equal(reference, plain_logits(base, None))


def test_tokens_before_the_prompt_are_no_layers_that_could_be_switched_off(tiny_model, tmp_path):
    base = tiny_model("llama")
    config = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="PREFIX_TUNING"):
        open_foreign(base, tmp_path)


def test_two_models_need_one_vocabulary(tiny_model, tmp_path):
    base = tiny_model("llama")
    other = save_tiny_model(tmp_path / "other", "llama", vocab_size=48)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, other / name)
    with pytest.raises(ModelError, match=r"48 tokens.* 40"):
        load_saved_policy(other, ModelSection(path=str(base)), device=torch.device("cpu"), is_adapter=False)


def test_models_of_other_widths_can_be_compared(tiny_model, tmp_path):
    base = tiny_model("llama")
    wide = save_tiny_model(tmp_path / "wide", "llama", hidden_size=48)
    policy = load_saved_policy(wide, ModelSection(path=str(base)), device=torch.device("cpu"), is_adapter=False)
    mine, reference = opened_logits(policy)
    assert torch.equal(mine, plain_logits(wide, None))
    assert torch.equal(reference, plain_logits(base, None))
