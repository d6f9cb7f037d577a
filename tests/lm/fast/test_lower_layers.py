"""What no adapter is on is computed once, and all who read it give the numbers they gave before."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, Gemma3Config, Gemma3ForConditionalGeneration

from kltune.errors import ModelError
from kltune.lm.data.examples import Prompt
from kltune.lm.fast.lower_layers import LowerLayers
from kltune.lm.model.adapters.weights import VALUE
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import sample_rollout, uniform_numbers
from kltune.recipe import LoraSection
from tests.foreign_models import save_model
from tests.tiny_policies import ARCHITECTURES, SIZES, SPECIAL, random_batch, random_model, randomize, word_tokenizer

PROMPTS = [Prompt(tuple(ids), "text", "prompts.jsonl:1") for ids in ([3, 4], [9], [20, 21, 22, 23])]
UNIFORMS = uniform_numbers(np.random.default_rng(3), 4 * len(PROMPTS), 6)
UPPER = LoraSection(rank=4, alpha=8.0, layers=0.5)


def layers_called(policy: Policy) -> list[int]:
    """How often each layer computes, counted from now on."""
    counts = [0, 0]
    for number, layer in enumerate(policy.network._trunk.layers):
        layer.mlp.register_forward_pre_hook(
            lambda *_, at=number: counts.__setitem__(at, counts[at] + 1)
        )
    return counts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_passes_from_the_lower_layers_on_are_the_same_to_the_last_bit(open_policy, architecture):
    policy = open_policy(architecture, lora=UPPER)
    randomize(policy.trainable_parameters())
    ids, scored = random_batch()
    assert policy.network.fast.lower_layers().there
    with torch.no_grad():
        lower, states = policy.network.fast.lower_layers().states(ids), policy.network.before(ids, scored)
        assert torch.equal(policy.network.before(ids, scored, lower), states)
        assert torch.equal(policy.network.before(ids, scored), states)      # and nothing of it is left
    found = torch.autograd.grad(policy.logprobs(ids, scored, 1.0, lower).sum(), policy.trainable_parameters().values())
    wanted = torch.autograd.grad(policy.logprobs(ids, scored).sum(), policy.trainable_parameters().values())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


SHARED_KEYS = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16, "head_dim": 8,
}
PER_LAYER = {
    "vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "intermediate_size": [48] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
}


@pytest.mark.parametrize(("kind", "more"), [("gemma4_text", {}), ("gemma3n_text", PER_LAYER)])
def test_layers_that_read_keys_of_lower_ones_are_run_whole(open_policy, tmp_path, kind, more):
    random_model(AutoConfig.for_model(kind, **SIZES | SPECIAL | SHARED_KEYS | more)).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    upper = LoraSection(rank=2, alpha=4.0, targets="all-linear", layers=(3,))
    policy = open_policy(path=tmp_path, lora=upper)
    assert not policy.network.fast.lower_layers().there
    assert torch.isfinite(policy.logprobs(*random_batch())).all()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A model with a vision tower of five layers beside four of text."""
    folder = tmp_path_factory.mktemp("seeing")
    text = SIZES | SPECIAL | {"num_hidden_layers": 4, "head_dim": 8, "sliding_window": 16}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
              "image_size": 28, "patch_size": 14}
    tokens = {"boi_token_index": 37, "eoi_token_index": 38, "image_token_index": 39, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, **tokens, **SPECIAL)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).eval().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def test_scoring_computes_them_once_for_policy_reference_and_values(open_policy, monkeypatch):
    policy = open_policy(lora=UPPER)
    randomize(policy.trainable_parameters())
    policy.add_value_function(UPPER)
    randomize(policy.value_parameters(), seed=5)
    monkeypatch.setattr(policy.network.fast, "shares_prefixes", False)
    kept = sample_rollout(policy, PROMPTS, UNIFORMS, temperature=1.0, keep=("lower",))
    ids, scored = kept.ids, kept.scored
    some = kept.select(torch.tensor([7, 2, 4]))
    counts = layers_called(policy)
    measured = policy.measure(ids, scored, lower=kept.lower)
    values = policy.measure_values(ids, scored, None, kept.lower)
    logprobs = policy.logprobs(some.ids, some.scored, 1.0, some.lower)
    assert counts == [0, 4]
    policy.network.lower_states(ids, scored)
    assert counts == [1, 4]
    monkeypatch.setattr(policy.network.fast.lower_layers(), "there", False)
    plain = sample_rollout(policy, PROMPTS, UNIFORMS, temperature=1.0, keep=("lower",))
    assert plain.lower is None
    for name in ("logprobs", "ref_logprobs", "ref_kl", "entropy"):
        assert torch.equal(getattr(kept, name), getattr(plain, name))
        assert torch.equal(getattr(kept, name)[kept.response_mask], getattr(measured, name))
    assert torch.equal(values[0], policy.measure_values(ids, scored)[0])
    torch.testing.assert_close(logprobs, policy.logprobs(some.ids, some.scored), atol=1e-5, rtol=0.0)
    assert kept.ref_kl.max() > 1e-3


def test_a_value_function_above_goes_on_from_what_the_frozen_layers_gave(open_policy, monkeypatch):
    policy = open_policy()
    randomize(policy.trainable_parameters())
    policy.add_value_function(LoraSection(), 0.5)
    randomize(policy.value_parameters(), seed=5)
    assert all(".layers.1." in name for name in policy.model.peft_config[VALUE].target_modules)
    monkeypatch.setattr(policy.network.fast, "shares_prefixes", False)
    rollout = sample_rollout(policy, PROMPTS, UNIFORMS, temperature=1.0, keep=("lower",))
    assert rollout.lower is None        # the policy's own adapter is on all layers
    rollout = replace(rollout, value_lower=policy.lower_of_values(rollout))
    ids, scored, some = rollout.ids, rollout.scored, rollout.select(torch.tensor([7, 2, 4]))
    counts, parameters = layers_called(policy), policy.value_parameters().values()
    found, _ = policy.measure_values(ids, scored, None, rollout.value_lower)
    slopes = torch.autograd.grad(policy.values(some.ids, some.scored, some.value_lower).sum(), parameters)
    assert counts == [0, 2]
    assert torch.equal(found, policy.measure_values(ids, scored)[0])
    whole = torch.autograd.grad(policy.values(some.ids, some.scored).sum(), parameters)
    torch.testing.assert_close(slopes, whole, atol=1e-5, rtol=1e-4)


def test_they_are_those_of_the_trunk_where_a_model_names_none_as_its_base(open_policy, tmp_path):
    upper = UPPER.model_copy(update={"targets": ("q_proj", "down_proj")})
    policy = open_policy(path=save_model("llama4_text", tmp_path), lora=upper)
    assert policy.network.causal.base_model is policy.network.causal
    randomize(policy.trainable_parameters())
    lower = policy.network.fast.lower_layers()
    assert lower.there
    ids, scored = random_batch()
    given = policy.logprobs(ids, scored, 1.0, lower.states(ids))
    torch.testing.assert_close(given, policy.logprobs(ids, scored), atol=1e-5, rtol=0.0)


def test_a_value_function_above_what_is_adapted_is_refused(open_policy):
    policy = open_policy(lora=LoraSection(layers=(0,)))
    with pytest.raises(ModelError, match=r"value_layers: lora.layers leaves the upper 0.5 .* larger share"):
        policy.add_value_function(LoraSection(), 0.5)


def test_a_value_function_above_leaves_experts_alone_and_wants_a_list_of_layers(open_policy, tmp_path):
    policy = open_policy(path=save_model("flex_olmo", tmp_path / "experts"), lora=LoraSection(targets="all-linear"))
    assert policy.model.peft_config["default"].target_parameters
    policy.add_value_function(LoraSection(), 0.5)
    targets = policy.model.peft_config[VALUE].target_modules
    assert targets
    assert all(".layers.1." in name and ".experts" not in name for name in targets)
    policy = open_policy(path=save_model("ctrl", tmp_path / "ctrl"))
    with pytest.raises(ModelError, match=r"value_layers: .* no one list of layers .*; write value_function: lora"):
        policy.add_value_function(LoraSection(), 0.5)


def test_shared_prompts_are_read_once_where_that_saves_more(open_policy):
    policy = open_policy(lora=UPPER)
    ids = torch.tensor([[3] * 20 + [row, 4, 1] for row in range(5, 13)])
    scored = (torch.arange(23) >= 20).expand(8, 23)
    assert policy.network.lower_states(ids, scored) is None
    assert policy.network.lower_states(ids[:1], scored[:1]).shape == (1, 23, 32)


def test_layers_are_chosen_by_number_or_as_an_upper_share(open_policy, tmp_path):
    for layers, numbers in ((0.5, [1]), (0.1, [1]), (0.9, [0, 1]), ((0,), [0]), ((1, 0, 1), [0, 1])):
        policy = open_policy(lora=LoraSection(layers=layers))
        policy.save(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["layers_to_transform"] == numbers
        assert policy.network.fast.lower_layers().there == (numbers == [1])
    with pytest.raises(ModelError, match=r"lora.layers: found 2, 7; .* has 2 layers, numbered from 0"):
        open_policy(lora=LoraSection(layers=(2, 0, 7)))


@pytest.mark.parametrize(("layers", "numbers"), [(0.25, {3}), (0.5, {2, 3}), ((1,), {1})])
def test_only_layers_that_read_text_are_chosen_of_a_model_that_sees_too(open_policy, seeing, tmp_path, layers, numbers):
    policy = open_policy(path=seeing, lora=LoraSection(rank=2, alpha=4.0, layers=layers))
    policy.save(tmp_path)
    adapted = {tuple(name.split(".layers.")) for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert {before.rpartition(".")[2] for before, _ in adapted} == {"language_model"}
    assert {int(after.partition(".")[0]) for _, after in adapted} == numbers
    again = PeftModel.from_pretrained(Gemma3ForConditionalGeneration.from_pretrained(seeing), tmp_path)
    found = {name for name, _ in again.named_modules() if name.endswith("lora_A.default")}
    assert len(found) == 7 * len(numbers)
    assert not any("vision" in name for name in found)
    with pytest.raises(ModelError, match=r"found 4; .* has 4 layers, numbered from 0"):
        open_policy(path=seeing, lora=LoraSection(layers=(4,)))


def test_there_are_none_where_an_adapter_is_on_what_comes_before_them(open_policy):
    assert not open_policy(lora=LoraSection(targets=("q_proj", "embed_tokens"), layers="all")).network.fast \
        .lower_layers().there
    policy = open_policy(lora=UPPER)
    policy.add_value_function(UPPER)
    assert policy.network.fast.lower_layers().there
    assert not LowerLayers(policy.network._trunk.layers[0]).there
