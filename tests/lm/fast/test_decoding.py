"""One token at a time by the short way is what the model's own forward pass gives, through every change of a cache."""

import pytest
import torch
from transformers import GemmaConfig, MistralConfig, Olmo2Config, PreTrainedConfig, Qwen2Config

from kltune.lm.fast.decoding import give_room
from kltune.lm.model import sampler
from kltune.lm.model.network import Network
from kltune.lm.model.policy import Policy
from kltune.recipe import LoraSection
from tests.lm.model.test_sampler import PROMPTS, UNIFORMS, draw, tokens_of
from tests.tiny_policies import ARCHITECTURES, SIZES, SPECIAL, VOCABULARY, random_model, randomize, tiny_config

SCALED = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}  # its angles change beyond the context
DECODED = {
    "llama": tiny_config("llama"),
    "qwen3": tiny_config("qwen3"),
    "qwen2": Qwen2Config(**SIZES, **SPECIAL),  # biases
    "mistral": MistralConfig(**SIZES, **SPECIAL, sliding_window=None, head_dim=16),
}
NOT_DECODED = {name: tiny_config(name) for name in ("gpt2", "gemma2", "granite", "cohere")} | {
    "dynamic": Qwen2Config(**SIZES | {"max_position_embeddings": 8}, **SPECIAL, rope_parameters=SCALED),
    "window": MistralConfig(**SIZES, **SPECIAL, sliding_window=8),
    "gemma": GemmaConfig(**SIZES, **SPECIAL, head_dim=8),  # the same modules, and embeddings that are scaled
    "olmo2": Olmo2Config(**SIZES, **SPECIAL),  # norms in other places
}


@torch.no_grad()
def logits_of(network: Network) -> list[torch.Tensor]:
    """After each of 40 tokens: two prompts of unequal length, three rows each, half of them dropped on the way."""
    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (2, 5), generator=numbers)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    logits, cache = network.step(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), None)
    cache.batch_repeat_interleave(3)
    give_room(cache)
    mask, found = mask.repeat_interleave(3, dim=0), [logits]
    next_step = network.fast.next_step(45)
    for step in range(40):
        if step == 11:
            cache.batch_select_indices(torch.tensor([0, 2, 5]))
            mask = mask[[0, 2, 5]]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        ids = torch.randint(3, VOCABULARY, (len(mask), 1), generator=numbers)
        logits, cache = next_step(ids, mask, mask.sum(1, keepdim=True) - 1, cache)
        found.append(logits)
    return found


def network_of(config: PreTrainedConfig) -> Network:
    return Network(random_model(config))


@pytest.mark.parametrize("name", DECODED)
def test_every_logit_is_the_models_own(name):
    network = network_of(DECODED[name])
    assert network.fast.decodes
    found = logits_of(network)
    network.fast.decodes = False
    for step, (mine, theirs) in enumerate(zip(found, logits_of(network), strict=True)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5, msg=lambda text, at=step: f"step {at}: {text}")


def test_in_bfloat16_no_further_than_rounding():
    network = Network(random_model(DECODED["qwen3"]).bfloat16())
    assert network.fast.decodes
    found = torch.cat(logits_of(network))
    network.fast.decodes = False
    wanted = torch.cat(logits_of(network))
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


@pytest.mark.parametrize("name", NOT_DECODED)
def test_other_models_take_their_own_way(name):
    assert not network_of(NOT_DECODED[name]).fast.decodes


def test_a_model_whose_layers_do_more_than_they_show_is_found_out():
    model = random_model(DECODED["llama"])
    layer = model.model.layers[0]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: 1.01 * forward(*args, **kwargs)
    assert not Network(model).fast.decodes


def test_eager_attention_is_the_models_own():
    model = random_model(DECODED["llama"])
    model.set_attn_implementation("eager")
    assert not Network(model).fast.decodes


@pytest.mark.parametrize("targets", ["all-linear", ("embed_tokens", "q_proj")])
def test_a_trained_policy_draws_the_same_responses_either_way(open_policy, monkeypatch, targets):
    """Merged or not, with the adapter on or off."""
    policy: Policy = open_policy("llama", lora=LoraSection(rank=4, alpha=8.0, targets=targets))
    randomize(policy.trainable_parameters())

    def drawn() -> list[list[list[int]]]:
        with policy.reference():
            reference = tokens_of(draw(policy, PROMPTS, UNIFORMS))
        with policy.network.merged():
            merged = sampler._decode(policy, PROMPTS, UNIFORMS, 1.0, None)[1]
        apart = sampler._decode(policy, PROMPTS, UNIFORMS, 1.0, None)[1]
        return [tokens_of(draw(policy, PROMPTS, UNIFORMS)), reference, apart.tolist(), merged.tolist()]

    assert policy.network.fast.decodes
    found = drawn()
    monkeypatch.setattr(policy.network.fast, "decodes", False)
    assert found == drawn()
    assert [token for row in found[0] for token in row] == found[2] == found[3]
    assert found[0] != found[1]


def test_architectures_of_the_other_tests_are_all_accounted_for():
    assert set(ARCHITECTURES) <= set(DECODED) | set(NOT_DECODED)
