"""One set of weights is policy, reference and value function, and each gives the numbers of the plain model."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kltune.core.kl.fused_head import AfterHead
from kltune.core.tensors import token_logprobs
from kltune.errors import ModelError, RecipeError
from kltune.lm.data.examples import Prompt
from kltune.lm.fast import memory
from kltune.lm.fast.lora import LoraLinear
from kltune.lm.measure.likelihood import text_rules
from kltune.lm.model import network as network_module
from kltune.lm.model.adapters.weights import VALUE
from kltune.lm.model.opening import check_fresh_policy, check_frozen, load_reference
from kltune.lm.model.policy import Policy
from kltune.recipe import DataSection, LoraSection, ModelSection
from tests.foreign_models import save_model
from tests.tiny_policies import (
    ARCHITECTURES,
    CONTEXT,
    EOS,
    plain_distributions,
    plain_logprobs,
    random_batch,
    randomize,
    save_tiny_model,
)

IDS, SCORED = random_batch()
LORA = LoraSection(rank=4, alpha=8.0)


def plain_pair(policy: Policy, folder: Path, saved: Path):
    """(policy, reference) as transformers and PEFT alone load them."""
    policy.save(saved)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), saved).eval(), reference


def all_logits(policy: Policy, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return policy.network.logits(policy.network.hidden(ids))


def train(parameters: dict[str, Tensor], loss_of, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.02)
    for _ in range(steps):
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def train_policy(policy: Policy) -> None:
    train(policy.trainable_parameters(), lambda: -policy.logprobs(IDS, SCORED).mean())


def train_values(policy: Policy) -> None:
    train(policy.value_parameters(), lambda: (policy.values(IDS, SCORED) - 1.0).square().mean(), steps=5)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


# --- adapter on, adapter off ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_adapter_gives_exactly_the_base_and_kl_exactly_0(open_policy, tiny_model, architecture):
    policy = open_policy(architecture)
    base = AutoModelForCausalLM.from_pretrained(tiny_model(architecture)).eval()
    with torch.no_grad():
        assert torch.equal(all_logits(policy), base(input_ids=IDS).logits)
    measured = policy.measure(IDS, SCORED)
    assert measured.ref_kl.abs().max().item() == 0.0
    assert torch.equal(measured.logprobs, measured.ref_logprobs)
    check_fresh_policy(policy, [Prompt(tuple(row.tolist()), "", "") for row in IDS])


def test_an_adapter_that_is_not_fresh_fails_the_self_test(trained_policy):
    with pytest.raises(ModelError, match="an adapter that is not fresh"):
        check_fresh_policy(trained_policy, [Prompt((3, 4, 5), "", "")])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_after_training_the_reference_is_a_freshly_loaded_base_to_the_last_bit(open_policy, tiny_model, architecture):
    policy = open_policy(architecture)
    train_policy(policy)
    base = AutoModelForCausalLM.from_pretrained(tiny_model(architecture)).eval()
    with torch.no_grad(), policy.reference():
        assert torch.equal(all_logits(policy), base(input_ids=IDS).logits)
    assert policy.measure(IDS, SCORED).ref_kl.mean() > 1e-3  # and the policy has moved


def test_leaving_the_reference_brings_the_policy_back_even_after_an_exception(trained_policy):
    policy, before = trained_policy, all_logits(trained_policy)
    with policy.reference():
        ref = all_logits(policy)
    assert torch.equal(all_logits(policy), before)
    assert not torch.equal(ref, before)
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert torch.equal(all_logits(policy), before)


def test_references_can_be_nested(trained_policy):
    policy, before = trained_policy, all_logits(trained_policy)
    with policy.reference():
        ref = all_logits(policy)
        with pytest.raises(KeyError), policy.reference():
            raise KeyError
        assert torch.equal(all_logits(policy), ref)
    assert torch.equal(all_logits(policy), before)


# --- frozen and trainable ------------------------------------------------------------------------------------------


def test_training_leaves_the_hash_of_the_frozen_weights_alone(policy):
    before = policy.frozen_sha256()
    assert before == policy.fingerprint.sha256
    policy.add_value_function(LORA)
    train_policy(policy)
    train_values(policy)
    assert policy.frozen_sha256() == before
    check_frozen(policy)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_one_flipped_bit_in_one_weight_is_found(open_policy, architecture):
    policy = open_policy(architecture)
    weight = policy.network.causal.get_input_embeddings().weight
    with torch.no_grad():
        weight.view(torch.int32)[7, 3] ^= 1
    with pytest.raises(ModelError, match="frozen weights changed during the run"):
        check_frozen(policy)
    with torch.no_grad():
        weight.view(torch.int32)[7, 3] ^= 1
    check_frozen(policy)


@pytest.mark.parametrize("with_values", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trainable_are_exactly_the_policys_lora_tensors_in_float32(open_policy, dtype, with_values):
    policy = open_policy(dtype=dtype)
    if with_values:
        policy.add_value_function(LORA)
    by_name = {
        id(tensor) for name, tensor in policy.model.named_parameters() if "lora_" in name and ".default." in name
    }
    trainable = policy.trainable_parameters()
    assert {id(tensor) for tensor in trainable.values()} == by_name
    assert len(trainable) == 2 * 2 * 7  # A and B, two layers, seven linear maps in each
    assert all(tensor.dtype == torch.float32 and tensor.requires_grad for tensor in trainable.values())
    values = {id(tensor) for tensor in policy.value_parameters().values()}
    assert values.isdisjoint(by_name)
    assert bool(values) == with_values
    want_gradient = {id(tensor) for tensor in policy.model.parameters() if tensor.requires_grad}
    assert want_gradient <= by_name | values
    assert next(iter(policy.network.causal.get_input_embeddings().parameters())).dtype == getattr(torch, dtype)


def test_the_optimizer_of_the_policy_gets_a_gradient_for_every_tensor(policy):
    randomize(policy.trainable_parameters())  # with B = 0 the gradient of A is 0
    policy.logprobs(IDS, SCORED).sum().backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in policy.trainable_parameters().values())
    frozen = [tensor for name, tensor in policy.model.named_parameters() if "lora_" not in name]
    assert all(tensor.grad is None for tensor in frozen)


def test_fitting_values_moves_no_bit_of_the_policy(policy):
    policy.add_value_function(LORA)
    randomize(policy.trainable_parameters())
    tensors, logprobs = copies(policy.trainable_parameters()), policy.measure_logprobs(IDS, SCORED)
    train_values(policy)
    assert same(copies(policy.trainable_parameters()), tensors)
    assert torch.equal(policy.measure_logprobs(IDS, SCORED), logprobs)
    assert policy.measure_values(IDS, SCORED)[0].abs().mean() > 1e-3  # the values did move


def test_training_the_policy_moves_no_bit_of_the_values(policy):
    policy.add_value_function(LORA)
    train_values(policy)
    tensors, values = copies(policy.value_parameters()), policy.measure_values(IDS, SCORED)[0]
    logprobs = policy.measure_logprobs(IDS, SCORED)
    train_policy(policy)
    assert same(copies(policy.value_parameters()), tensors)
    assert torch.equal(policy.measure_values(IDS, SCORED)[0], values)
    assert not torch.equal(policy.measure_logprobs(IDS, SCORED), logprobs)


def test_adding_a_value_function_changes_no_log_probability(trained_policy):
    before = trained_policy.measure_logprobs(IDS, SCORED)
    trained_policy.add_value_function(LORA)
    assert torch.equal(trained_policy.measure_logprobs(IDS, SCORED), before)
    assert trained_policy.measure_values(IDS, SCORED)[0].abs().max() == 0.0  # it starts at 0, not at noise


def test_values_put_back_are_the_values_saved(open_policy):
    one, other = open_policy(), open_policy()
    for policy in (one, other):
        policy.add_value_function(LORA)
    train_values(one)
    other.load_value_parameters(copies(one.value_parameters()))
    assert torch.equal(other.measure_values(IDS, SCORED)[0], one.measure_values(IDS, SCORED)[0])


def test_the_values_come_from_the_trunk_with_the_value_adapter(policy, tiny_model, tmp_path):
    policy.add_value_function(LORA)
    randomize(policy.trainable_parameters())
    randomize(policy.value_parameters(), seed=5)
    policy.model.save_pretrained(tmp_path, selected_adapters=[VALUE])
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model()), tmp_path / VALUE).eval()
    with torch.no_grad():
        hidden = plain.base_model.model.model(input_ids=IDS).last_hidden_state[:, :-1][SCORED[:, 1:]].double()
    head = policy.value_head.linear
    by_hand = hidden @ head.weight[0].double() + head.bias.double()
    assert (policy.measure_values(IDS, SCORED)[0] - by_hand).abs().max() < 1e-5


def test_what_is_saved_is_whole_where_a_layer_is_called_value(open_policy, tmp_path):
    policy = open_policy(path=save_model("big_bird", tmp_path / "base"))
    policy.add_value_function(LORA)
    policy.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert len(saved) == len(policy.trainable_parameters())


def test_a_value_head_alone_reads_what_the_policys_trunk_holds_and_moves_no_bit_of_it(policy):
    policy.add_value_function(None)
    assert set(policy.value_parameters()) == {"head.linear.weight", "head.linear.bias"}
    randomize(policy.trainable_parameters())
    randomize(policy.value_parameters(), seed=5)
    values, states = policy.measure_values(IDS, SCORED)
    with torch.no_grad():
        wanted = policy.network.before(IDS, SCORED)
    torch.testing.assert_close(states, wanted, atol=1e-5, rtol=0.0)
    head = policy.value_head.linear
    assert (values - (wanted.double() @ head.weight[0].double() + head.bias.double())).abs().max() < 1e-5
    tensors = copies(policy.trainable_parameters())
    train(policy.value_parameters(), lambda: (policy.value_head(states) - 1.0).square().mean())
    assert same(copies(policy.trainable_parameters()), tensors)
    assert (policy.measure_values(IDS, SCORED)[0] - values).abs().mean() > 1e-3


# --- numbers of the plain model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_measured_is_what_the_full_logits_of_the_plain_model_say(
    open_policy, tiny_model, tmp_path, architecture, temperature
):
    policy = open_policy(architecture)
    randomize(policy.trainable_parameters())
    model, reference = plain_pair(policy, tiny_model(architecture), tmp_path)
    p = plain_distributions(model, IDS, SCORED, temperature)
    q = plain_distributions(reference, IDS, SCORED, temperature)
    by_hand = {
        "logprobs": plain_logprobs(model, IDS, SCORED, temperature),
        "ref_logprobs": plain_logprobs(reference, IDS, SCORED, temperature),
        "ref_kl": (p.exp() * (p - q)).sum(-1),
        "entropy": -(p.exp() * p).sum(-1),
        "ref_entropy": -(q.exp() * q).sum(-1),
        "log_ratio_variance": (p.exp() * (p - q).square()).sum(-1) - (p.exp() * (p - q)).sum(-1).square(),
    }
    measured = policy.measure(IDS, SCORED, temperature)
    for name, numbers in by_hand.items():
        assert (getattr(measured, name) - numbers).abs().max() < 1e-5, name
        assert getattr(measured, name).dtype == torch.float32
    assert by_hand["ref_kl"].mean() > 0.01  # far from each other: swapped or equal distributions would be noticed

    logprobs, ref_kl = policy.logprobs_and_ref_kl(IDS, SCORED, temperature)
    assert (logprobs - by_hand["logprobs"]).abs().max() < 1e-5
    assert (ref_kl - by_hand["ref_kl"]).abs().max() < 1e-5
    assert torch.equal(policy.logprobs(IDS, SCORED, temperature), logprobs)

    swapped = policy.measure(IDS, SCORED, temperature, swap=True)
    assert (swapped.ref_kl - (q.exp() * (q - p)).sum(-1)).abs().max() < 1e-5
    assert (swapped.logprobs - by_hand["ref_logprobs"]).abs().max() < 1e-5
    assert (swapped.entropy - by_hand["ref_entropy"]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("architecture", "after"),
    [
        ("llama", AfterHead()), ("gpt2", AfterHead()), ("qwen3", AfterHead()), ("gemma2", AfterHead(cap=2.0)),
        ("granite", AfterHead(4.0, divides=True)), ("cohere", AfterHead(0.25)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_cut_before_its_head_and_what_is_behind_the_head_is_known(open_policy, architecture, after, dtype):
    network = open_policy(architecture, dtype=dtype).network
    assert network.split
    assert network.after == after
    assert torch.equal(network.logits(network.hidden(IDS)), network.causal(input_ids=IDS).logits)


@pytest.mark.parametrize("architecture", ["gemma2", "granite", "cohere"])
def test_behind_a_cap_or_a_scale_gradients_are_those_of_autograd_through_the_whole_model(open_policy, architecture):
    policy = open_policy(architecture)
    randomize(policy.trainable_parameters())
    parameters = list(policy.trainable_parameters().values())
    mine = torch.autograd.grad(policy.logprobs(IDS, SCORED, 0.7).sum(), parameters)
    logits = policy.network.causal(input_ids=IDS).logits[:, :-1][SCORED[:, 1:]]
    wanted = torch.autograd.grad(token_logprobs(logits, IDS[SCORED], 0.7).sum(), parameters)
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_soft_cap_that_small_logits_do_not_feel_is_still_seen(open_policy, tmp_path):
    # At logits below ½ a cap at 30 changes nothing that a tolerance would notice; after training it would.
    folder = save_tiny_model(tmp_path / "gemma2", "gemma2", final_logit_softcapping=30.0, initializer_range=0.002)
    assert open_policy(path=folder).network.after == AfterHead(cap=30.0)


def test_a_cap_that_no_configuration_speaks_of_leaves_a_model_whole(open_policy, monkeypatch):
    monkeypatch.setattr(network_module, "CAPS", ())
    assert not open_policy("gemma2").network.split


def test_unwanted_numbers_are_not_computed(trained_policy):
    measured = trained_policy.measure(IDS, SCORED, exact=False)
    unwanted = ("ref_kl", "entropy", "ref_entropy", "log_ratio_variance")
    assert [getattr(measured, name) for name in unwanted] == [None] * 4
    full = trained_policy.measure(IDS, SCORED)
    assert torch.equal(measured.logprobs, full.logprobs)
    assert torch.equal(measured.ref_logprobs, full.ref_logprobs)


def test_dropout_in_the_models_config_draws_nothing(open_policy):
    policy = open_policy("gpt2")
    assert policy.network.causal.config.resid_pdrop == 0.1
    randomize(policy.trainable_parameters())
    assert torch.equal(policy.logprobs(IDS, SCORED), policy.logprobs(IDS, SCORED))
    with policy.dropout():
        assert torch.equal(policy.logprobs(IDS, SCORED), policy.logprobs(IDS, SCORED))


def test_only_the_adapters_own_dropout_can_be_switched_on(open_policy):
    policy = open_policy("gpt2", lora=LoraSection(rank=4, alpha=8.0, dropout=0.5))
    randomize(policy.trainable_parameters())
    with policy.dropout():
        assert not torch.equal(policy.logprobs(IDS, SCORED), policy.logprobs(IDS, SCORED))
        with policy.reference():
            assert torch.equal(policy.logprobs(IDS, SCORED), policy.logprobs(IDS, SCORED))
    assert torch.equal(policy.logprobs(IDS, SCORED), policy.logprobs(IDS, SCORED))


# --- chunks, parts, padding, order ---------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", ["all-linear", ("q_proj", "lm_head")], ids=["trunk", "head"])
def test_chunks_and_recomputation_change_no_number_and_no_gradient(open_policy, monkeypatch, adapted):
    policy = open_policy(lora=LoraSection(rank=4, alpha=8.0, targets=adapted))
    randomize(policy.trainable_parameters())
    ids, scored = random_batch(rows=24, seed=3)
    weights = torch.randn(2, int(scored.sum()), generator=torch.Generator().manual_seed(0))

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, ref_kl = policy.logprobs_and_ref_kl(ids, scored, 0.7)
        (weights[0] @ logprobs + weights[1] @ ref_kl + weights[1] @ policy.logprobs(ids, scored, 0.7)).backward()
        found = {name: tensor.grad.clone() for name, tensor in policy.trainable_parameters().items()}
        policy.model.zero_grad()
        return torch.stack([logprobs, ref_kl]).detach(), found

    numbers, whole = gradients()
    monkeypatch.setattr(network_module, "CHUNK_BYTES", {"cpu": 1})
    assert int(scored.sum()) > 2 * policy.network.chunk_rows == 128  # several chunks, the last one not full
    chunked_numbers, chunked = gradients()
    assert (numbers - chunked_numbers).abs().max() < 1e-6
    for name, gradient in whole.items():
        assert (gradient - chunked[name]).abs().max() < 1e-5 * max(1.0, gradient.abs().max().item()), name
    measured = policy.measure(ids, scored, 0.7)
    # Without gradients a LoRA layer may add its update to the weight first: the same sum, rounded elsewhere.
    assert (measured.logprobs - numbers[0]).abs().max() < 1e-5
    assert (measured.ref_kl - numbers[1]).abs().max() < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_rest_of_the_batch_and_its_padding_change_no_number(open_policy, monkeypatch, architecture):
    policy = open_policy(architecture)
    randomize(policy.trainable_parameters())
    once = policy.measure(IDS, SCORED)

    def check(ids: Tensor, scored: Tensor, order: Tensor) -> None:
        """``order``: which token of the first measurement each token here is."""
        again = policy.measure(ids, scored)
        for name in ("logprobs", "ref_logprobs", "ref_kl", "entropy", "ref_entropy", "log_ratio_variance"):
            assert (getattr(again, name) - getattr(once, name)[order]).abs().max() < 1e-5, name

    number = torch.zeros_like(IDS).masked_scatter(SCORED, torch.arange(int(SCORED.sum())))
    everything = torch.arange(int(SCORED.sum()))
    wider = torch.nn.functional.pad(IDS, (0, 9), value=17)  # junk, not the padding token
    check(wider, torch.nn.functional.pad(SCORED, (0, 9), value=False), everything)
    backwards = torch.arange(len(IDS) - 1, -1, -1)
    check(IDS[backwards], SCORED[backwards], number[backwards][SCORED[backwards]])
    for row in range(len(IDS)):
        check(IDS[row : row + 1], SCORED[row : row + 1], number[row][SCORED[row]])
    monkeypatch.setattr(memory, "TOKENS_PER_PASS", 2 * IDS.shape[1])  # two rows in a part, or one
    check(IDS, SCORED, everything)
    monkeypatch.setattr(memory, "TOKENS_PER_PASS", 1)
    check(IDS, SCORED, everything)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_left_padding_in_the_plain_model_gives_the_same_numbers(open_policy, tiny_model, architecture):
    reference = AutoModelForCausalLM.from_pretrained(tiny_model(architecture)).eval()
    lengths = [int(row.nonzero().max()) + 1 for row in SCORED]
    width = max(lengths)
    ids, mask = torch.full((len(IDS), width), EOS), torch.zeros(len(IDS), width, dtype=torch.long)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = IDS[row, :length]
        scored[row, width - length :] = SCORED[row, :length]
        mask[row, width - length :] = 1
    with torch.no_grad():
        logits = reference(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    table = torch.log_softmax(logits[:, :-1].double(), -1)
    by_hand = table.gather(-1, ids[:, 1:, None])[..., 0][scored[:, 1:]]
    assert (open_policy(architecture).measure(IDS, SCORED).logprobs - by_hand).abs().max() < 1e-5


# --- saving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_values", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_peft_and_transformers_load_what_is_saved_bit_for_bit(
    open_policy, tiny_model, tmp_path, architecture, with_values, monkeypatch
):
    policy = open_policy(architecture)
    if with_values:
        policy.add_value_function(LORA)
        randomize(policy.value_parameters(), seed=5)
    randomize(policy.trainable_parameters())
    model, _ = plain_pair(policy, tiny_model(architecture), tmp_path)
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
    torch.testing.assert_close(all_logits(policy), plain, atol=1e-5, rtol=0.0)
    monkeypatch.setattr(LoraLinear, "forward", Linear.forward)  # but for the order of its sums
    assert torch.equal(plain, all_logits(policy))
    assert AutoTokenizer.from_pretrained(tmp_path)("w3 w7")["input_ids"] == [3, 7]
    assert not (tmp_path / VALUE).exists()
    assert "PeftModel.from_pretrained" in (tmp_path / "README.md").read_text()


def test_the_readme_of_an_adapter_says_how_to_load_it_and_the_lines_work(trained_policy, tmp_path):
    trained_policy.save(tmp_path)
    text = (tmp_path / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("this/folder", str(tmp_path))
    names: dict = {}
    exec(code, names)
    with torch.no_grad():
        plain = names["model"].eval()(input_ids=IDS).logits
    torch.testing.assert_close(all_logits(trained_policy), plain, atol=1e-5, rtol=0.0)


def test_equal_policies_leave_equal_configs(trained_policy, tmp_path):
    trained_policy.save(tmp_path)
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert names == sorted(names)      # PEFT keeps a set, whose order is another in every process
    assert len(names) > 1


def test_loading_what_was_saved_gives_the_same_policy(open_policy, trained_policy, tmp_path):
    trained_policy.save(tmp_path)
    other = open_policy()
    other.load_adapter(tmp_path)  # into the adapter that is there, as a resumed run does
    assert same(copies(other.trainable_parameters()), copies(trained_policy.trainable_parameters()))
    assert torch.equal(all_logits(other), all_logits(trained_policy))


def test_a_saved_adapter_can_be_trained_further(trained_policy, tiny_model, tmp_path):
    trained_policy.save(tmp_path)
    other = load_reference(ModelSection(path=str(tiny_model())), device=torch.device("cpu"))
    other.load_adapter(tmp_path)
    assert all(tensor.requires_grad for tensor in other.trainable_parameters().values())
    train_policy(other)
    assert not torch.equal(all_logits(other), all_logits(trained_policy))


# --- full fine-tuning ----------------------------------------------------------------------------------------------


def test_full_fine_tuning_keeps_a_second_copy_as_its_reference(open_policy, tiny_model, tmp_path):
    policy = open_policy(lora=None)
    base = AutoModelForCausalLM.from_pretrained(tiny_model()).eval()
    assert torch.equal(policy.measure(IDS, SCORED).ref_kl, torch.zeros(int(SCORED.sum())))
    assert len(policy.trainable_parameters()) == len(list(base.parameters()))
    train_policy(policy)
    with torch.no_grad(), policy.reference():
        assert torch.equal(all_logits(policy), base(input_ids=IDS).logits)
        with policy.reference():
            assert torch.equal(all_logits(policy), base(input_ids=IDS).logits)
    check_frozen(policy)
    after = all_logits(policy)
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert torch.equal(all_logits(policy), after)
    assert (after - base(input_ids=IDS).logits).abs().max() > 0.1
    policy.save(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(input_ids=IDS).logits, after)
    resumed = open_policy(lora=None)
    resumed.load_trained(tmp_path)
    assert torch.equal(all_logits(resumed), after)
    check_frozen(resumed)
    train_policy(resumed)
    assert not torch.equal(all_logits(resumed), after)


# --- room ----------------------------------------------------------------------------------------------------------


def test_prompts_get_the_room_that_the_response_leaves(policy):
    assert policy.max_context == CONTEXT
    assert policy.prompt_limit(None, 24) == 40
    assert policy.prompt_limit(40, 24) == 40
    assert policy.prompt_limit(7, 24) == 7
    for wanted, new in ((41, 24), (None, 64)):
        with pytest.raises(RecipeError, match="64 tokens; lower one of them"):
            policy.prompt_limit(wanted, new)


@pytest.mark.parametrize(("keys", "words"), [
    ({"max_prompt_tokens": 40}, "data.max_prompt_tokens (40) + data.max_response_tokens, half of the context (32) do"),
    ({"max_prompt_tokens": 50, "max_response_tokens": 20}, "(50) + data.max_response_tokens (20) do"),
])
def test_texts_that_do_not_fit_name_the_keys_that_say_so(policy, keys, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        text_rules(policy, DataSection(**keys))


def test_targets_that_match_no_layer_are_named(open_policy):
    with pytest.raises((ModelError, RecipeError), match="no_such_layer"):
        open_policy(lora=LoraSection(rank=2, alpha=2.0, targets=("no_such_layer",)))
    with pytest.raises(ModelError, match="q_prj names no layer"):
        open_policy(lora=LoraSection(rank=2, alpha=2.0, targets=("v_proj", "q_prj")))


def test_a_real_model_measures_as_its_full_logits_do(open_policy, stories_model):
    policy = open_policy(path=stories_model)
    randomize(policy.trainable_parameters(), spread=0.05)
    reference = AutoModelForCausalLM.from_pretrained(stories_model).eval()
    ids = policy.tokenizer("Once upon a time there was a small dog", return_tensors="pt")["input_ids"]
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, :3] = False
    measured = policy.measure(ids, scored)
    assert (measured.ref_logprobs - plain_logprobs(reference, ids, scored)).abs().max() < 1e-5
    assert measured.ref_kl.min() > 0
