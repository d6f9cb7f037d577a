"""What is tried on a model when it is opened: merging keeps its logits, a logit depends on what is before it alone."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kltune.errors import ModelError
from kltune.lm.data.examples import Prompt
from kltune.lm.model.adapters.weights import merge_adapter
from kltune.lm.model.opening import check_causal, check_fresh_policy, expect_rounding, load_policy, load_reference
from kltune.lm.model.sampler import sample, uniform_numbers
from kltune.recipe import LoraSection, ModelSection
from tests.foreign_models import ADAPTERS, LORA, REFUSED, save_adapter, save_model
from tests.tiny_policies import VOCABULARY, plain_logits, plain_logprobs, random_batch

CPU = torch.device("cpu")
IDS, SCORED = random_batch()
PROMPTS = [Prompt((3, 4), "", ""), Prompt((9,), "", "")]
UNIFORMS = uniform_numbers(np.random.default_rng(0), 6, 8)


def lora(*targets: str) -> LoraConfig:
    return LoraConfig(**LORA | {"target_modules": list(targets)})


def adapted_logits(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return plain_logits(PeftModel.from_pretrained(model, adapter).eval(), IDS)


@pytest.fixture
def tied(tiny_model) -> Path:
    """A model whose head is its embedding."""
    return tiny_model("qwen3")


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("full", [False, True], ids=["frozen", "trained whole"])
def test_an_sft_adapter_on_one_of_two_tied_layers_acts_once(tied, tmp_path, part, full):
    adapter = save_adapter(tied, lora("q_proj", part), tmp_path / "sft")
    wanted = adapted_logits(tied, adapter)
    assert (wanted - plain_logits(AutoModelForCausalLM.from_pretrained(tied), IDS)).abs().max() > 0.1
    policy = load_reference(ModelSection(path=str(tied), sft_adapter=str(adapter)), device=CPU, full=full)
    torch.testing.assert_close(plain_logits(policy.model, IDS), wanted, atol=1e-5, rtol=0)
    with policy.reference():
        torch.testing.assert_close(plain_logits(policy.network.causal, IDS), wanted, atol=1e-5, rtol=0)
    if full:    # what was trained is saved and loaded as two matrices
        policy.save(tmp_path / "trained")
        policy.load_trained(tmp_path / "trained")
        torch.testing.assert_close(plain_logits(policy.model, IDS), wanted, atol=1e-5, rtol=0)
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").eval()
        torch.testing.assert_close(plain_logits(alone, IDS), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("part", ["lm_head", "embed_tokens"])
def test_the_readme_of_a_policy_makes_the_untied_reference(tied, tmp_path, part):
    adapter = save_adapter(tied, lora("q_proj", part), tmp_path / "sft")
    section = ModelSection(path=str(tied), sft_adapter=str(adapter))
    policy = load_policy(section, LoraSection(rank=2, alpha=4.0), device=CPU)
    policy.save(tmp_path / "policy")
    code = (tmp_path / "policy" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code.replace("this/folder", str(tmp_path / "policy")), names)
    torch.testing.assert_close(plain_logits(names["model"], IDS), adapted_logits(tied, adapter), atol=1e-5, rtol=0)


def test_tied_layers_that_an_adapter_leaves_alone_stay_one(tied, tmp_path):
    adapter = save_adapter(tied, lora("q_proj"), tmp_path)
    model = load_reference(ModelSection(path=str(tied), sft_adapter=str(adapter)), device=CPU).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    torch.testing.assert_close(plain_logits(model, IDS), adapted_logits(tied, adapter), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["lora: dora", "lora from eva", "ia3", "loha", "ln_tuning", "vblora", "unilora"])
def test_an_sft_adapter_of_any_kind_is_merged_to_what_it_was(tiny_model, tmp_path, kind):
    base = tiny_model("llama")
    adapter = save_adapter(base, ADAPTERS[kind](), tmp_path)
    model = load_reference(ModelSection(path=str(base), sft_adapter=str(adapter)), device=CPU).model
    torch.testing.assert_close(plain_logits(model, IDS), adapted_logits(base, adapter), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["alora", "poly", "shadow"])
def test_an_sft_adapter_that_cannot_be_merged_is_refused(tiny_model, tmp_path, kind):
    adapter = save_adapter(tiny_model("llama"), REFUSED[kind][0](), tmp_path)
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_reference(ModelSection(path=str(tiny_model("llama")), sft_adapter=str(adapter)), device=CPU)


def test_an_update_of_a_layer_that_is_read_past_its_adapter_is_not_merged(tmp_path):
    # Jamba multiplies with dt_proj.weight itself: an adapter there does nothing, and merged it would.
    base = save_model("jamba", tmp_path / "base")
    adapter = save_adapter(base, lora("q_proj", "dt_proj"), tmp_path / "sft")
    for dtype in ("float32", "bfloat16"):
        section = ModelSection(path=str(base), sft_adapter=str(adapter), dtype=dtype)
        with pytest.raises(ModelError, match="into its base, this adapter gives another model than on it: a logit"):
            load_reference(section, device=CPU)


def test_merging_needs_little_memory_beside_the_weights(tmp_path, monkeypatch):
    """Layer by layer: what it takes does not grow with the number of layers. In bfloat16, where it is widest."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=24, **sizes)).bfloat16()
    monkeypatch.setattr("kltune.lm.model.adapters.weights._spoken", lambda adapted: IDS[:, :4])
    model.save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", lora("q_proj", "down_proj"), tmp_path / "sft")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        merge_adapter(copy.deepcopy(model), adapter)      # a copy: what is freed is counted where it was made within
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    assert weights <= max(held) < 1.2 * weights


def test_in_bfloat16_the_kl_of_the_merge_to_what_sft_ended_with_is_told(tiny_model, tmp_path, monkeypatch):
    base = tiny_model("llama")
    adapter = save_adapter(base, lora("q_proj", "down_proj"), tmp_path)
    monkeypatch.setattr("kltune.lm.model.adapters.weights._spoken", lambda adapted: IDS)
    section = ModelSection(path=str(base), sft_adapter=str(adapter), dtype="bfloat16")
    policy = load_reference(section, device=CPU)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter).eval()
    with torch.no_grad():
        before, after = (model(input_ids=IDS).logits.double().log_softmax(-1) for model in (plain, policy.model))
    kl = (before.exp() * (before - after)).sum(-1).mean().item()
    assert policy.fingerprint.merge_kl == pytest.approx(kl, rel=1e-3)
    assert f"{kl:.2g} nats a token from it unmerged" in policy.fingerprint.describe()
    exact = load_reference(section.model_copy(update={"dtype": "float32"}), device=CPU).fingerprint
    assert exact.merge_kl is None
    assert "unmerged" not in exact.describe()


# --- what a logit depends on -----------------------------------------------------------------------------------------


def test_a_model_that_mixes_the_rows_of_a_batch_is_refused(policy):
    policy.network.causal.model.norm.register_forward_hook(lambda module, args, out: out + out.mean(0, keepdim=True))
    with pytest.raises(ModelError, match="beside another than of it alone"):
        check_causal(policy.network, "it")


def test_a_model_that_averages_over_a_batch_reads_ahead(policy):
    policy.network.causal.model.norm.register_forward_hook(lambda module, args, out: out + out.mean((0, 1)))
    with pytest.raises(ModelError, match="it reads the tokens it is to predict"):
        check_causal(policy.network, "it")


def test_a_model_of_nan_is_refused_and_one_that_says_nothing_yet_is_not(policy):
    with torch.no_grad():
        policy.network.head.weight.zero_()
        check_causal(policy.network, "it")
        policy.network.head.weight[3, 0] = torch.nan
    with pytest.raises(ModelError, match="it: its logits are not finite"):
        check_causal(policy.network, "it")


def test_a_fresh_adapter_on_a_layer_that_reads_its_input_crosswise_leaves_every_bit(tmp_path):
    # recurrent_gemma's linear layers are given transposed views, which a product made flat would round another way
    for kind in ("recurrent_gemma", "jamba"):
        base = save_model(kind, tmp_path / kind)
        policy = load_policy(ModelSection(path=str(base)), LoraSection(rank=2), device=CPU)
        for length in (2, 3, 5, 8):
            check_fresh_policy(policy, [Prompt(tuple(row[:length].tolist()), "", "") for row in IDS[:4]])


# --- sampling without a cache ----------------------------------------------------------------------------------------


def test_responses_are_the_same_where_every_token_reads_all_before_it_again(trained_policy):
    wanted = sample(trained_policy, PROMPTS, UNIFORMS, temperature=1.0)
    trained_policy.network.caches = False
    found = sample(trained_policy, PROMPTS, UNIFORMS, temperature=1.0)
    assert torch.equal(found.ids, wanted.ids)
    torch.testing.assert_close(found.logprobs, wanted.logprobs, atol=1e-5, rtol=0)
    assert len(set(found.lengths.tolist())) > 1     # rows were dropped on the way


def test_a_cache_that_forgets_is_not_used(tiny_model, monkeypatch):
    from transformers import DynamicCache

    monkeypatch.setattr(DynamicCache, "reorder_cache", lambda self, rows: self.batch_select_indices(rows.flip(0)))
    assert not load_reference(ModelSection(path=str(tiny_model("gemma2"))), device=CPU).network.caches


# --- tokens without a row --------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(tiny_model, tmp_path) -> Path:
    """A model whose tokenizer has two tokens more than its embedding has rows: "<pad>", and "w40"."""
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "narrow")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {"<pad>": VOCABULARY, "w40": VOCABULARY + 1}
    path.write_text(json.dumps(content))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<pad>"}))
    return folder


def test_a_padding_token_without_a_row_changes_nothing(open_policy, narrow):
    policy = open_policy(path=narrow)
    assert policy.tokenizer.pad_token_id == VOCABULARY
    rows = [row[: int(marks.nonzero().max()) + 1].tolist() for row, marks in zip(IDS, SCORED, strict=True)]
    ids = policy.padded(rows)
    measured = policy.measure(ids, SCORED)
    torch.testing.assert_close(
        measured.logprobs.double(), plain_logprobs(policy.network.causal, IDS, SCORED), atol=1e-5, rtol=0
    )
    drawn = sample(policy, PROMPTS, UNIFORMS, temperature=1.0)
    assert int(drawn.ids.max()) < VOCABULARY


def test_another_token_without_a_row_is_named(open_policy, narrow):
    policy = open_policy(path=narrow)
    with pytest.raises(ModelError, match=r"40 rows and none for token 41, 'w40' of the tokenizer .*narrow"):
        sample(policy, [Prompt((3, 41), "", "")], UNIFORMS, temperature=1.0)


# --- before any update ------------------------------------------------------------------------------------------------


def test_in_a_narrow_dtype_rounding_passes_and_a_few_wrong_rows_do_not():
    noise = torch.randn(1500, generator=torch.Generator().manual_seed(0)).abs()
    rounding = 0.0125 * noise        # of a chat model in bfloat16; one token of many may be far off
    rounding[7] = 0.4
    expect_rounding(rounding, torch.bfloat16, "another's")
    expect_rounding(torch.tensor([0.06, 0.0, 0.3, 0.001]), torch.bfloat16, "another's")       # 4 tokens say little
    wrong = rounding.clone()
    wrong[:60] = 0.6        # 2 rows of 50: the mean does not show them
    assert wrong.mean() < 0.05
    for gaps, found in (
        (wrong, r"60 of 1500 log-probabilities differ by more than 0\.25 nats per token from another's"),
        (0.1 * noise, r"the average log-probability differs by 0\.0[78]\d* ± 0\.001\d* nats"),
        (rounding.index_fill(0, torch.tensor([3]), torch.nan), "differs by nan"),
    ):
        with pytest.raises(ModelError, match=found):
            expect_rounding(gaps, torch.bfloat16, "another's")
