"""TinyLM as a transformers model gives the numbers of MATH 8.2, with padding, a cache, and LoRA."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kltune.core.kl.divergence import kl_exact, kl_k1
from kltune.core.tensors import per_response, token_logprobs
from tests.oracles import (
    BOS,
    EOS,
    STATES,
    Responses,
    save_tiny_lm,
    tiny_adapter,
    tiny_lm,
    tiny_policy_logits,
    tiny_reference_logits,
    tiny_tokenizer,
)

RESPONSES = Responses()
PREFIXES = [[BOS, *("ab".index(letter) for letter in state)] for state in STATES]


def with_prompt(tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.full((tokens.shape[0], 1), BOS), tokens], dim=-1)


@torch.no_grad()
def test_every_prefix_gives_its_row_of_the_table():
    model = tiny_lm(tiny_policy_logits())
    for state, prefix in enumerate(PREFIXES):
        logits = model(torch.tensor([prefix])).logits[0, -1]
        torch.testing.assert_close(logits[:3].double(), tiny_policy_logits()[state], atol=1e-6, rtol=0.0)
        assert logits.softmax(-1)[BOS] == 0.0


@pytest.mark.parametrize(
    ("dtype", "temperature", "expected", "tolerance"),
    [
        (torch.float64, 1.0, 0.11253952, 1e-8),
        (torch.float32, 1.0, 0.11253952, 1e-6),
        (torch.float32, 0.7, 0.188646, 2e-6),
    ],
)
@torch.no_grad()
def test_the_models_own_divergence_is_that_of_the_fixture(dtype, temperature, expected, tolerance):
    ids, mask = with_prompt(RESPONSES.tokens), RESPONSES.mask
    logits = tiny_lm(tiny_policy_logits(), dtype)(ids).logits[:, :-1]
    ref_logits = tiny_lm(dtype=dtype)(ids).logits[:, :-1]
    logprobs = token_logprobs(logits, RESPONSES.tokens, temperature)
    ref_logprobs = token_logprobs(ref_logits, RESPONSES.tokens, temperature)
    p = per_response(logprobs, mask).exp()
    assert p.sum().item() == pytest.approx(1.0, abs=1e-5)
    exact = per_response(kl_exact(logits, ref_logits, temperature), mask)
    k1 = per_response(kl_k1(logprobs, ref_logprobs, mask), mask)
    assert (p * exact).sum().item() == pytest.approx(expected, abs=tolerance)
    assert (p * k1).sum().item() == pytest.approx(expected, abs=tolerance)


@torch.no_grad()
def test_padding_on_the_left_is_not_part_of_the_prefix():
    model = tiny_lm()
    width = max(map(len, PREFIXES))
    for pad in (EOS, 0, 1):
        ids = torch.tensor([[pad] * (width - len(prefix)) + prefix for prefix in PREFIXES])
        mask = torch.tensor([[0] * (width - len(prefix)) + [1] * len(prefix) for prefix in PREFIXES])
        logits = model(ids, attention_mask=mask, logits_to_keep=1).logits
        assert logits.shape == (7, 1, 4)
        torch.testing.assert_close(logits[:, 0, :3].double(), tiny_reference_logits(), atol=1e-6, rtol=0.0)


@torch.no_grad()
def test_a_masked_token_says_nothing_even_without_a_start():
    logits = tiny_lm()(torch.tensor([[0, 1]]), attention_mask=torch.tensor([[0, 1]])).logits[0, -1, :3]
    torch.testing.assert_close(logits.double(), tiny_reference_logits()[STATES.index("b")], atol=1e-6, rtol=0.0)


@torch.no_grad()
def test_one_token_at_a_time_with_a_cache_is_the_same_as_all_at_once():
    model, ids = tiny_lm(), with_prompt(RESPONSES.tokens)
    mask = torch.ones_like(ids)
    whole = model(ids).logits
    cache = DynamicCache()
    for t in range(ids.shape[1]):
        out = model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits[:, 0], whole[:, t])
    assert cache.get_seq_length() == 4


@torch.no_grad()
def test_dropping_rows_from_the_cache_keeps_the_others_prefixes():
    model, ids = tiny_lm(), with_prompt(RESPONSES.tokens)
    cache = model(ids[:, :2], use_cache=True).past_key_values
    kept = torch.tensor([14, 3, 8])
    cache.batch_select_indices(kept)
    out = model(ids[kept, 2:3], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(out.logits[:, 0], model(ids[kept]).logits[:, 2])


@torch.no_grad()
def test_transformers_own_sampling_finds_the_fixtures_divergence():
    policy, reference = tiny_lm(tiny_policy_logits()), tiny_lm()
    torch.manual_seed(0)
    prompts = torch.tensor([[EOS, BOS], [BOS, BOS]]).repeat(400, 1)
    ids = policy.generate(prompts, attention_mask=(prompts == BOS).long(), max_new_tokens=3, do_sample=True, top_k=0)
    tokens = ids[:, 2:]
    mask = (tokens == EOS).long().cumsum(-1) - (tokens == EOS).long() == 0      # up to the first end
    logits, ref_logits = policy(ids).logits[:, 1:-1], reference(ids).logits[:, 1:-1]
    exact = per_response(kl_exact(logits, ref_logits, 1.0), mask)
    # sd √.00298 of 800 responses: four standard errors are .0077
    assert exact.mean().item() == pytest.approx(0.11253952, abs=0.0077)


def test_a_fresh_adapter_is_the_reference_and_a_set_one_the_fixture():
    ids = torch.tensor([PREFIXES[-1]])
    with torch.no_grad():
        fresh = get_peft_model(tiny_lm(), LoraConfig(r=4, target_modules=["lm_head"])).eval()
        assert torch.equal(fresh(ids).logits, tiny_lm()(ids).logits)
        policy = tiny_adapter(tiny_lm(), tiny_policy_logits(), rank=5)
        torch.testing.assert_close(policy(ids).logits[0, :, :3].double(), tiny_policy_logits()[[0, 2, 6]])
        with policy.disable_adapter():
            torch.testing.assert_close(policy(ids).logits, tiny_lm()(ids).logits)


def test_lora_also_finds_a_linear_layer_in_the_trunk():
    model = get_peft_model(tiny_lm(), LoraConfig(r=3, target_modules="all-linear"))
    assert model.targeted_module_names == ["model.dense"]


def test_it_is_saved_and_opened_like_any_model(tmp_path):
    folder = save_tiny_lm(tmp_path / "tiny", tiny_policy_logits())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight, tiny_lm(tiny_policy_logits()).lm_head.weight)
    assert torch.equal(model.model.dense.weight, torch.eye(7))
    assert AutoTokenizer.from_pretrained(folder)("<s> a b").input_ids == [BOS, 0, 1]

    tiny_adapter(tiny_lm(), tiny_policy_logits()).save_pretrained(tmp_path / "adapter")
    opened = PeftModel.from_pretrained(tiny_lm(), tmp_path / "adapter")
    ids = torch.tensor([PREFIXES[-1]])
    torch.testing.assert_close(opened(ids).logits[0, :, :3].double(), tiny_policy_logits()[[0, 2, 6]])


def test_the_tokenizer_reads_and_writes_its_words():
    tokenizer = tiny_tokenizer()
    assert tokenizer("<s>").input_ids == [BOS]
    assert tokenizer.decode([0, 1, EOS]) == "a b </s>"
    assert tokenizer.decode([0, 1, EOS], skip_special_tokens=True) == "a b"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
