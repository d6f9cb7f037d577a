"""While a policy samples, its adapter is in the weights of stand-ins; the frozen weights do not change by a bit."""

import numpy as np
import pytest
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor

from kltune.lm.data.examples import Prompt
from kltune.lm.fast.lora import MergedTrunk
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import sample, uniform_numbers
from kltune.recipe import LoraSection
from tests.tiny_policies import ARCHITECTURES, random_batch, randomize

IDS, _ = random_batch()
PROMPTS = [Prompt((3, 4), "", ""), Prompt((9,), "", "")]
UNIFORMS = uniform_numbers(np.random.default_rng(0), 2 * len(PROMPTS), 6)


def hidden(policy: Policy) -> Tensor:
    with torch.no_grad():
        return policy.network.hidden(IDS)


def lora_layers(policy: Policy) -> list[str]:
    return [name for name, module in policy.network._trunk.named_modules() if isinstance(module, LoraLinear)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_layers_give_what_the_adapter_gives(open_policy, architecture):
    policy = open_policy(architecture)
    randomize(policy.trainable_parameters())
    adapted, layers = hidden(policy), lora_layers(policy)
    assert layers
    with policy.network.merged():
        assert lora_layers(policy) == []
        assert (hidden(policy) - adapted).abs().max() < 1e-4 * adapted.abs().max()
    assert lora_layers(policy) == layers
    assert torch.equal(hidden(policy), adapted)
    with policy.reference():
        assert (hidden(policy) - adapted).abs().max() > 1e-2 * adapted.abs().max()  # so that the above says something


def test_merging_follows_the_adapter_and_its_scaling_and_takes_its_memory_once(trained_policy):
    merged = trained_policy.network.fast.merged_trunk
    with merged.active():
        before = {layer: twin.weight.data_ptr() for layer, twin in merged._merged.items()}
    randomize(trained_policy.trainable_parameters(), seed=5)
    for layer in before:
        layer.scaling["default"] *= 0.3
    adapted = hidden(trained_policy)
    with merged.active():
        assert (hidden(trained_policy) - adapted).abs().max() < 1e-4 * adapted.abs().max()
        assert {layer: twin.weight.data_ptr() for layer, twin in merged._merged.items()} == before


def test_an_untrained_adapter_leaves_the_weights_what_they_are_to_the_last_bit(policy):
    with policy.reference():
        base = hidden(policy)
    with policy.network.merged():
        assert torch.equal(hidden(policy), base)


def test_the_reference_has_nothing_to_merge(trained_policy):
    with trained_policy.reference():
        reference, layers = hidden(trained_policy), lora_layers(trained_policy)
        with trained_policy.network.merged():
            assert lora_layers(trained_policy) == layers
            assert torch.equal(hidden(trained_policy), reference)


def test_sampling_merges_the_policys_adapter_and_not_the_value_functions(trained_policy):
    trained_policy.add_value_function(LoraSection(rank=2))
    randomize(trained_policy.value_parameters(), seed=7)
    adapted = hidden(trained_policy)
    with trained_policy.network.merged():
        assert lora_layers(trained_policy) == []
        assert (hidden(trained_policy) - adapted).abs().max() < 1e-4 * adapted.abs().max()


def test_no_lora_layer_computes_while_sampling_in_float32_on_the_cpu(trained_policy, monkeypatch):
    def refuse(*_):
        raise AssertionError("a LoRA layer ran")

    sample(trained_policy, PROMPTS, UNIFORMS, temperature=1.0)      # the first looks at what a token's cache takes
    for kind in {type(layer) for layer in trained_policy.network.causal.modules() if isinstance(layer, LoraLinear)}:
        monkeypatch.setattr(kind, "forward", refuse)
    sample(trained_policy, PROMPTS, UNIFORMS, temperature=1.0)
    with pytest.raises(AssertionError, match="a LoRA layer ran"):
        hidden(trained_policy)


def left_as_they_are(policy: Policy) -> None:
    layers, adapted = lora_layers(policy), hidden(policy)
    with policy.network.merged():
        assert lora_layers(policy) == layers
        assert torch.equal(hidden(policy), adapted)


def test_bfloat16_weights_are_never_merged(open_policy):
    policy = open_policy(dtype="bfloat16")
    assert policy.dtype == torch.bfloat16
    left_as_they_are(policy)


def test_a_layer_that_is_more_than_a_sum_of_products_is_not_merged(policy):
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj"]
    for change in ({"use_dora": True}, {"lora_bias": True}):
        model = policy.model.unload()
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, **change))
        policy.model, before = model.eval(), len(lora_layers(policy))
        assert before == 2
        with MergedTrunk(policy.network._trunk).active():
            assert len(lora_layers(policy)) == before


def test_dropout_that_is_on_is_not_merged_away(open_policy):
    policy = open_policy(lora=LoraSection(rank=4, dropout=0.5))
    layers = lora_layers(policy)
    with policy.dropout(), policy.network.merged():
        assert lora_layers(policy) == layers
    with policy.network.merged():
        assert lora_layers(policy) == []


def test_an_adapter_on_the_head_stays_where_it_is(tiny_lm_policy):
    head = tiny_lm_policy.network.head
    assert isinstance(head, LoraLinear)
    with tiny_lm_policy.network.merged():
        assert tiny_lm_policy.network.causal.get_output_embeddings() is head


def test_two_hundred_rollouts_and_a_few_that_fail_do_not_move_the_frozen_weights_by_a_bit(
    trained_policy, monkeypatch
):
    policy, layers = trained_policy, lora_layers(trained_policy)
    tensors = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in policy._reference_tensors.items()}
    step = policy.network.fast.step
    for rollout in range(200):
        if rollout % 20 == 0:
            def fail(*inputs):
                step(*inputs)
                raise KeyboardInterrupt

            monkeypatch.setattr(policy.network.fast, "step", fail)
            with pytest.raises(KeyboardInterrupt):
                sample(policy, PROMPTS, UNIFORMS[:, :2], temperature=1.0)
            assert lora_layers(policy) == layers
            monkeypatch.setattr(policy.network.fast, "step", step)
        randomize(policy.trainable_parameters(), seed=rollout)  # each update is another merge
        sample(policy, PROMPTS, UNIFORMS[:, :2], temperature=1.0)
        assert lora_layers(policy) == layers
    assert policy.frozen_sha256() == policy.fingerprint.sha256
    for name, tensor in policy._reference_tensors.items():
        assert (tensor.data_ptr(), tensor.equal(tensors[name][1])) == (tensors[name][0], True), name
