"""Every architecture and every kind of adapter: the numbers of plain transformers and PEFT to 1e-5, or refused by name.

A few of each are tried here always; all of them by ``make stress``.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig

from kltune.errors import ModelError
from kltune.lm.data.examples import Prompt
from kltune.lm.model.opening import check_fresh_policy, load_policy, load_saved_policy
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import sample, uniform_numbers
from kltune.recipe import LoraSection, ModelSection
from tests.foreign_models import ADAPTERS, ENCODERS, MODELS, REFUSED, TARGETS, plain_pair, save_adapter, save_model
from tests.tiny_policies import plain_distributions, plain_logprobs, random_batch

OFTEN = {
    "bamba", "bart", "bert", "gemma3_text", "gpt2", "jamba", "llama4_text", "mamba", "openai-gpt", "qwen3_next", "rwkv",
    "xlnet", "alora", "arrow", "lily", "ln_tuning", "lora", "lora from eva", "lora and a layer", "poly", "shadow",
    "unilora", "vblora",
}
IDS, SCORED = random_batch()
PROMPTS = [Prompt(ids, "", "") for ids in ((5, 6, 7), (9,), (8, 9, 4, 5, 11))]
UNIFORMS = uniform_numbers(np.random.default_rng(0), 2 * len(PROMPTS), 12)


def kinds(names) -> list:
    """All of them, those that are not tried always marked."""
    return [name if name in OFTEN else pytest.param(name, marks=pytest.mark.stress) for name in names]


def opened(base: Path, adapter: Path) -> Policy:
    return load_saved_policy(adapter, ModelSection(path=str(base)), device=torch.device("cpu"), is_adapter=True)


def saved_model(kind: str, folder: Path) -> Path:
    return save_model(kind, folder) or pytest.skip(f"this transformers has no {kind}")


def assert_as_plain(base: Path, adapter: Path) -> None:
    """Exact KL, log-probabilities, and what the sampler says of its tokens; and that the adapter does something."""
    policy, (adapted, alone) = opened(base, adapter), plain_pair(base, adapter)
    wanted, reference = (plain_distributions(model, IDS, SCORED) for model in (adapted, alone))
    kl = (wanted.exp() * (wanted - reference)).sum(-1)
    measured = policy.measure(IDS, SCORED)
    near = {"atol": 1e-5, "rtol": 3e-5}     # the second for float32 states that add up over a whole sequence
    torch.testing.assert_close(measured.ref_kl.double(), kl, **near)
    torch.testing.assert_close(measured.logprobs.double(), plain_logprobs(adapted, IDS, SCORED), **near)
    assert kl.max() > 1e-3
    drawn = sample(policy, PROMPTS, UNIFORMS, temperature=1.0)
    logprobs = drawn.logprobs[drawn.response_mask].double()
    torch.testing.assert_close(logprobs, plain_logprobs(adapted, drawn.ids, drawn.scored), **near)


@pytest.mark.parametrize("kind", kinds(MODELS))
def test_a_model_of_any_architecture_gives_the_numbers_of_plain_transformers(kind, tmp_path):
    base = saved_model(kind, tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS.get(kind, "all-linear"), task_type="CAUSAL_LM")
    assert_as_plain(base, save_adapter(base, config, tmp_path / "adapter"))
    targets = TARGETS.get(kind, "all-linear")
    lora = LoraSection(rank=2, targets=targets if isinstance(targets, str) else tuple(targets))
    fresh = load_policy(ModelSection(path=str(base)), lora, device=torch.device("cpu"))
    check_fresh_policy(fresh, PROMPTS)
    fresh.logprobs(IDS, SCORED).sum().backward()
    gradients = [tensor.grad for tensor in fresh.trainable_parameters().values() if tensor.grad is not None]
    assert any(gradient.any() for gradient in gradients)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("kind", kinds(ENCODERS))
def test_a_model_that_sees_what_is_to_come_is_refused(kind, tmp_path):
    base = saved_model(kind, tmp_path)
    with pytest.raises(ModelError, match=r"reads the tokens it is to predict: other tokens at the end move the logits"):
        load_saved_policy(base, ModelSection(path=str(base)), device=torch.device("cpu"), is_adapter=False)


@pytest.mark.parametrize("kind", kinds(ADAPTERS))
def test_an_adapter_of_any_kind_gives_the_numbers_of_plain_peft(kind, tmp_path, tiny_model):
    assert_as_plain(tiny_model("llama"), save_adapter(tiny_model("llama"), ADAPTERS[kind](), tmp_path))


@pytest.mark.parametrize("kind", kinds(REFUSED))
def test_an_adapter_that_acts_beside_the_layers_is_refused_by_name(kind, tmp_path, tiny_model):
    config, words = REFUSED[kind]
    save_adapter(tiny_model("llama"), config(), tmp_path)
    with pytest.raises(ModelError, match=words) as error:
        opened(tiny_model("llama"), tmp_path)
    assert str(tmp_path) in str(error.value)


def test_an_adapter_that_names_other_folders_is_refused_before_they_are_opened(tmp_path, tiny_model):
    mixed = {"peft_type": "XLORA", "adapters": {"a": "somebody/adapter"}, "hidden_size": 32, "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(mixed))
    with pytest.raises(ModelError, match="type XLORA works with models or adapters of other folders"):
        opened(tiny_model("llama"), tmp_path)
