"""What is opened is what was meant: models, adapters and tokenizers that cannot serve are refused, and told apart."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from kltune.errors import ModelError, RecipeError
from kltune.lm.data.examples import load_examples, load_prompts
from kltune.lm.measure.likelihood import document_nats
from kltune.lm.model.adapters.weights import read_adapter_config
from kltune.lm.model.fingerprint import section_of
from kltune.lm.model.loading import load_base, load_tokenizer, pick_device
from kltune.lm.model.opening import check_frozen, empty_policy, load_policy, load_reference, load_saved_policy
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import sample
from kltune.recipe import DataSection, LoraSection, ModelSection
from tests.foreign_models import ADAPTERS, save_adapter
from tests.lm.model.test_sampler import PROMPTS, UNIFORMS
from tests.tiny_policies import (
    CONTEXT,
    EOS,
    SIZES,
    VOCABULARY,
    plain_logits,
    plain_logprobs,
    random_batch,
    random_model,
    randomize,
    save_tiny_model,
    tiny_config,
    word_tokenizer,
)

CPU = torch.device("cpu")
IDS, SCORED = random_batch()


@pytest.fixture
def adapter(trained_policy, tmp_path) -> Path:
    """A folder with a trained adapter for the tiny Llama."""
    trained_policy.save(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def reference(tiny_model) -> Policy:
    """The tiny Llama without an adapter."""
    return load_reference(ModelSection(path=str(tiny_model())), device=CPU)


def change_config(folder: Path, **keys) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None], file="adapter_model.safetensors") -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def hold_nan(tensors: dict[str, Tensor]) -> None:
    tensors[next(iter(tensors))][0, 0] = math.nan


def lose_one(tensors: dict[str, Tensor]) -> None:
    tensors.pop(sorted(tensors)[0])


def gain_one(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)


def widen_one(tensors: dict[str, Tensor]) -> None:
    name = sorted(tensors)[0]
    tensors[name] = torch.zeros(4, 99)


DAMAGE = {
    "missing tensor": (lose_one, "does not fit"),
    "tensor without a layer": (gain_one, "does not fit"),
    "wrong shape": (widen_one, "does not fit"),
    "NaN": (hold_nan, "holds NaN or infinity"),
}


# --- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("fresh", [True, False], ids=["onto the base", "into an adapter that is there"])
def test_an_adapter_of_which_a_tensor_is_wrong_is_refused(reference, policy, adapter, damage, fresh):
    change, message = DAMAGE[damage]
    change_tensors(adapter, change)
    with pytest.raises(ModelError, match=message) as error:
        (reference if fresh else policy).load_adapter(adapter)
    assert str(adapter) in str(error.value)


def test_an_adapter_for_another_model_is_refused(open_policy, tmp_path, reference):
    other = open_policy("gpt2")
    other.save(tmp_path)
    with pytest.raises(ModelError, match="llama"):
        reference.load_adapter(tmp_path)


def test_an_adapter_of_another_rank_is_refused_by_the_adapter_that_is_there(open_policy, adapter):
    policy = open_policy(lora=LoraSection(rank=2, alpha=8.0))
    with pytest.raises(ModelError, match="does not fit"):
        policy.load_adapter(adapter)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which rewrites the base weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"bias": "all"}, "bias is 'all', which trains the base's own biases"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], which trains copies of base layers"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"kasa_config": {}}, "kasa_config"),
    ],
)
def test_an_adapter_that_changes_its_base_is_refused_and_told_why(reference, adapter, tiny_model, keys, message):
    change_config(adapter, **keys)
    with pytest.raises(ModelError, match="the model is not its frozen base: .*" + message):
        reference.load_adapter(adapter)
    with pytest.raises(ModelError, match=message):
        load_reference(ModelSection(path=str(tiny_model()), sft_adapter=str(adapter)), device=CPU)


def test_an_adapter_without_layers_of_its_own_is_refused(reference, tiny_model, tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model()), config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="PROMPT_TUNING"):
        reference.load_adapter(tmp_path)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_an_adapter_that_leaves_its_base_alone_is_taken(reference, adapter, init):
    change_config(adapter, init_lora_weights=init)
    reference.load_adapter(adapter)
    assert reference.frozen_sha256() == reference.fingerprint.sha256


def test_a_pickled_adapter_is_never_opened(reference, adapter):
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.bin is a pickle, which kltune never opens"):
        reference.load_adapter(adapter)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_model.safetensors", None, "no such file"),
        ("adapter_model.safetensors", b"not a safetensors file", "damaged"),
        ("adapter_config.json", None, "no adapter here"),
        ("adapter_config.json", b"{", "not JSON"),
    ],
)
def test_a_missing_or_damaged_file_is_named(reference, adapter, file, content, message):
    (adapter / file).unlink()
    if content is not None:
        (adapter / file).write_bytes(content)
    with pytest.raises(ModelError, match=message) as error:
        reference.load_adapter(adapter)
    assert str(adapter) in str(error.value)


def test_a_run_folder_given_as_an_adapter_points_at_its_final(reference, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "run" / "final")
    with pytest.raises(ModelError, match=r"Did you mean .*final"):
        reference.load_adapter(tmp_path / "run")


# --- an SFT adapter merged into the reference ----------------------------------------------------------------------


def test_a_merged_sft_adapter_is_the_reference_that_peft_merges(open_policy, tiny_model, adapter):
    policy = open_policy(sft_adapter=str(adapter))
    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()
    with torch.no_grad(), policy.reference():
        logits = policy.network.logits(policy.network.hidden(IDS))
        assert torch.equal(logits, merged(input_ids=IDS).logits)
    assert policy.measure(IDS, SCORED).ref_kl.abs().max() == 0.0  # the fresh adapter starts from there
    bare = open_policy()
    assert policy.fingerprint.sha256 != bare.fingerprint.sha256
    assert policy.fingerprint.merge_survived == 1.0
    assert str(adapter) in policy.fingerprint.describe()
    assert len(policy.trainable_parameters()) == len(bare.trainable_parameters())


def loaded_as_its_readme_says(policy: Policy, folder: Path) -> torch.nn.Module:
    """Save a policy and load it by the lines of its README, without kltune: it must say the same."""
    policy.save(folder)
    text, names = (folder / "README.md").read_text(), {}
    exec(text.split("```python\n")[1].split("```")[0].replace("this/folder", str(folder)), names)
    with torch.no_grad():
        plain = names["model"].eval()(input_ids=IDS).logits
        mine = policy.network.logits(policy.network.hidden(IDS))
    torch.testing.assert_close(mine, plain, atol=1e-5, rtol=0.0)
    return names["model"]


def test_the_readme_of_an_adapter_over_a_merged_reference_works(open_policy, adapter, tmp_path):
    policy = open_policy(sft_adapter=str(adapter))
    randomize(policy.trainable_parameters(), seed=9)
    loaded_as_its_readme_says(policy, tmp_path / "ppo")


def test_in_bfloat16_the_share_of_the_merge_that_survived_is_told(open_policy, tiny_model, adapter):
    policy = open_policy(sft_adapter=str(adapter), dtype="bfloat16")
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.bfloat16).float(), adapter
    ).merge_and_unload()
    before = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.bfloat16)
    asked = arrived = 0.0
    for (name, tensor), old in zip(merged.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(policy.network.causal.get_parameter(name), tensor.bfloat16()) or "proj" in name
        delta = (tensor - old.float()).double()
        asked += delta.square().sum().item()
        arrived += ((tensor.bfloat16().float() - old.float()).double() * delta).sum().item()
    assert policy.fingerprint.merge_survived == pytest.approx(arrived / asked, rel=1e-5)
    assert policy.fingerprint.merge_survived != 1.0
    assert policy.fingerprint.dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_sft_adapter_that_is_kept_is_what_sft_ended_with_and_no_bit_of_it_is_rounded(
    open_policy, adapter, tmp_path, dtype
):
    policy = open_policy(sft_adapter=str(adapter), merge=False, dtype=dtype)
    ended = open_policy(dtype=dtype)
    ended.load_adapter(adapter)
    wanted = ended.network.logits(ended.network.hidden(IDS))
    with policy.reference():
        found = policy.network.logits(policy.network.hidden(IDS))
        # In float32 the layers of a trained adapter may add their matrices up first.
        assert torch.equal(found, wanted) if dtype == "bfloat16" else (found - wanted).abs().max() < 1e-5
    assert policy.measure(IDS, SCORED).ref_kl.abs().max() == 0.0
    assert policy.trainable_parameters().keys() == ended.trainable_parameters().keys()
    assert policy.fingerprint.sha256 != ended.fingerprint.sha256        # the adapter is part of what is frozen
    check_frozen(policy)


def test_what_is_trained_over_a_kept_sft_adapter_loads_as_two_adapters(open_policy, tiny_model, adapter, tmp_path):
    policy = open_policy(sft_adapter=str(adapter), merge=False)
    randomize(policy.trainable_parameters(), seed=9)
    plain = loaded_as_its_readme_says(policy, tmp_path / "ppo")
    section = ModelSection(path=str(tiny_model()), sft_adapter=str(adapter), merge=False)
    again = load_saved_policy(tmp_path / "ppo", section, device=CPU, is_adapter=True)
    assert section_of(again.fingerprint.as_dict())["merge"] is False
    assert torch.equal(again.logprobs(IDS, SCORED), policy.logprobs(IDS, SCORED))
    drawn = sample(policy, PROMPTS, UNIFORMS, temperature=1.0)
    near = {"atol": 1e-5, "rtol": 1e-5}
    wanted = plain_logprobs(plain, drawn.ids, drawn.scored)
    torch.testing.assert_close(drawn.logprobs[drawn.response_mask].double(), wanted, **near)


def test_an_sft_adapter_that_is_more_than_two_matrices_is_not_kept(open_policy, tiny_model, tmp_path):
    other = save_adapter(tiny_model(), ADAPTERS["lora: dora"](), tmp_path)
    with pytest.raises(ModelError, match="is more than a LoRA on a linear layer"):
        open_policy(sft_adapter=str(other), merge=False)


def test_an_sft_adapter_that_was_never_trained_is_refused(open_policy, policy, tmp_path):
    policy.save(tmp_path)  # B is still 0
    with pytest.raises(ModelError, match="this adapter changes nothing"):
        open_policy(sft_adapter=str(tmp_path))


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_sft_adapter_of_which_a_tensor_is_wrong_is_refused(open_policy, adapter, damage):
    change, message = DAMAGE[damage]
    change_tensors(adapter, change)
    with pytest.raises(ModelError, match=message) as error:
        open_policy(sft_adapter=str(adapter))
    assert str(adapter) in str(error.value)


def test_an_sft_adapter_for_another_model_is_refused(open_policy, adapter):
    with pytest.raises(ModelError, match=r"does not fit|do not fit"):
        open_policy("gpt2", sft_adapter=str(adapter))


def test_an_sft_adapter_that_kltune_made_on_other_weights_is_refused(open_policy, adapter, trained_policy):
    made = trained_policy.fingerprint.as_dict()
    (adapter / "kltune.json").write_text(json.dumps({"reference": made}))
    open_policy(sft_adapter=str(adapter))
    (adapter / "kltune.json").write_text(json.dumps({"reference": made | {"sha256": "0" * 64, "path": "elsewhere"}}))
    with pytest.raises(ModelError, match="was trained on elsewhere"):
        open_policy(sft_adapter=str(adapter))
    # the same weights in another dtype hash differently: that is no reason to refuse
    (adapter / "kltune.json").write_text(json.dumps({"reference": made | {"sha256": "0" * 64, "dtype": "bfloat16"}}))
    open_policy(sft_adapter=str(adapter))
    other = made | {"config": made["config"] | {"rms_norm_eps": 0.1}}
    (adapter / "kltune.json").write_text(json.dumps({"reference": other}))
    with pytest.raises(ModelError, match=r"trained on another model:\n.*rms_norm_eps found 1e-06 .*, wanted 0\.1"):
        open_policy(sft_adapter=str(adapter))


def test_an_sft_adapter_that_lies_on_another_is_not_merged_into_the_bare_base(open_policy, adapter, trained_policy):
    made = trained_policy.fingerprint.as_dict() | {"sft_adapter": "runs/sft/final", "sha256": "0" * 64}
    for dtype in ("float32", "bfloat16"):
        (adapter / "kltune.json").write_text(json.dumps({"reference": made | {"dtype": dtype}}))
        with pytest.raises(ModelError, match=r"was trained on .* with runs/sft/final merged"):
            open_policy(sft_adapter=str(adapter))
    merged = made | {"sha256": trained_policy.fingerprint.sha256}      # model.path is the merged model itself
    (adapter / "kltune.json").write_text(json.dumps({"reference": merged}))
    open_policy(sft_adapter=str(adapter))


def test_a_reward_model_is_no_sft_adapter(open_policy, adapter, trained_policy):
    record = {"stage": "reward", "reference": trained_policy.fingerprint.as_dict()}
    (adapter / "kltune.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="is a reward model, which says nothing"):
        open_policy(sft_adapter=str(adapter))


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_an_adapter_for_another_task_is_told_so(reference, adapter, task):
    change_config(adapter, task_type=task)
    with pytest.raises(ModelError, match=f"made for the task {task}"):
        reference.load_adapter(adapter)


def read_row(policy, folder, text):
    """The ids that a policy makes of a prompt in a file."""
    (folder / "p.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
    (prompt,), _ = load_prompts(str(folder / "p.jsonl"), policy.tokenizer, policy.row_rules(DataSection(), 20))
    return prompt.ids


def test_an_sft_adapter_with_another_tokenizer_is_refused_at_the_first_row_that_it_reads_otherwise(
    open_policy, adapter, tmp_path
):
    word_tokenizer(words=30).save_pretrained(adapter)
    policy = open_policy(sft_adapter=str(adapter))
    assert read_row(policy, tmp_path, "w5 w6") == (5, 6)
    with pytest.raises(ModelError, match=r"^model\.sft_adapter .*\n  vocabulary: found 33 tokens, wanted 40"):
        read_row(policy, tmp_path, "w5 w39")


# --- models --------------------------------------------------------------------------------------------------------


def test_an_adapter_given_as_a_model_is_offered_its_two_meanings(open_policy, adapter):
    with pytest.raises(ModelError, match=r"model\.path: .* is a LoRA adapter") as error:
        open_policy(path=adapter)
    assert f"sft_adapter: {adapter}" in str(error.value)
    assert "llama" in str(error.value)  # the base it was made for


@pytest.mark.parametrize("folder", ["empty", "absent"])
def test_a_folder_without_a_model_is_named(open_policy, tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"^model\.path: .*" + folder):
        open_policy(path=tmp_path / folder)


def test_a_folder_that_is_not_there_is_named(open_policy, tmp_path):
    with pytest.raises(ModelError, match=r"^model\.path: .*nowhere is no folder here"):
        open_policy(path=tmp_path / "nowhere")


def test_a_folder_without_a_tokenizer_is_named(open_policy, tiny_model, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model() / name, tmp_path)
    with pytest.raises(ModelError, match="no tokenizer could be loaded"):
        open_policy(path=tmp_path)


def test_pickled_weights_are_not_opened(open_policy, tiny_model, tmp_path):
    shutil.copytree(tiny_model(), tmp_path, dirs_exist_ok=True)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle, which kltune never opens"):
        open_policy(path=tmp_path)


def lose_a_layer(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def shrink_a_layer(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(8, 8)


@pytest.mark.parametrize("change", [lose_a_layer, shrink_a_layer])
def test_a_model_of_which_a_tensor_is_missing_or_misshapen_is_refused(open_policy, tiny_model, tmp_path, change):
    # transformers would put random numbers there and only warn: the reference would be another one at every start.
    shutil.copytree(tiny_model(), tmp_path, dirs_exist_ok=True)
    change_tensors(tmp_path, change, "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.path: .*model\.layers\.1\.mlp\.up_proj\.weight"):
        open_policy(path=tmp_path)


def test_a_damaged_model_file_is_named(open_policy, tiny_model, tmp_path):
    shutil.copytree(tiny_model(), tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"model\.path: .* could not be loaded"):
        open_policy(path=tmp_path)


def test_a_classifier_given_as_a_causal_model_is_refused(open_policy, tmp_path):
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, tie_word_embeddings=False)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"GPT2ForSequenceClassification, which labels texts.*kind: classifier"):
        open_policy(path=tmp_path)


def test_a_model_without_any_end_token_is_refused(open_policy, tmp_path):
    save_tiny_model(tmp_path, eos_token_id=None, pad_token_id=None)
    GenerationConfig().save_pretrained(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = None, "<unk>"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"end token \(eos_token_id\)"):
        open_policy(path=tmp_path)


def test_a_tokenizer_with_neither_padding_nor_end_token_is_refused(open_policy, tmp_path):
    save_tiny_model(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="names no end token; set eos_token"):
        open_policy(path=tmp_path)


def test_a_tokenizer_without_padding_pads_with_its_end_token_and_keeps_a_padding_token_it_has(tiny_model, tmp_path):
    assert load_tokenizer(str(tiny_model())).pad_token_id == EOS
    own = word_tokenizer()
    own.pad_token = "<unk>"
    own.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == 2


@pytest.mark.parametrize(("dtype", "wanted"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_to_measure_on_a_cpu_auto_is_float32_whatever_was_published(tmp_path, dtype, wanted):
    AutoModelForCausalLM.from_config(tiny_config("llama")).bfloat16().save_pretrained(tmp_path)
    model = load_base(ModelSection(path=str(tmp_path), dtype=dtype), CPU)
    assert next(model.parameters()).dtype == wanted


@pytest.mark.parametrize(("width", "published", "processor", "wanted"), [
    (512, torch.bfloat16, "avx512_bf16", "bfloat16"),
    (512, torch.float16, "amx_bf16", "bfloat16"),
    (32, torch.bfloat16, "avx512_bf16", "float32"),     # too narrow to be worth it
    (512, torch.float32, "avx512_bf16", "float32"),
    (512, torch.bfloat16, "avx2", "float32"),
])
def test_to_train_auto_is_bfloat16_where_a_cpu_multiplies_it(
    tmp_path, monkeypatch, width, published, processor, wanted
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, processor: True}, raising=False)
    config = tiny_config("llama")
    config.update({"hidden_size": width, "num_hidden_layers": 1, "intermediate_size": 32})
    random_model(config, 0).to(published).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    section = ModelSection(path=str(tmp_path))
    trained = load_policy(section, LoraSection(), device=CPU)
    assert trained.fingerprint.dtype == wanted
    assert empty_policy(section, LoraSection(), device=CPU).fingerprint.dtype == wanted
    assert load_policy(section, None, device=CPU).fingerprint.dtype == "float32"
    float32 = section.model_copy(update={"dtype": "float32"})
    assert load_policy(float32, LoraSection(), device=CPU).fingerprint.dtype == "float32"


def test_full_fine_tuning_in_bfloat16_is_refused(open_policy):
    with pytest.raises(ModelError, match=r"full fine-tuning \(lora: null\) needs float32"):
        open_policy(lora=None, dtype="bfloat16")


def test_a_device_that_is_not_here_is_named():
    assert pick_device("cpu") == CPU
    with pytest.raises(RecipeError, match=r"run\.device: found mps, which has no float64"):
        pick_device("mps")
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match=r"run\.device: found 'cuda', which is not available here"):
            pick_device("cuda")


# --- policies that were saved --------------------------------------------------------------------------------------


def test_a_saved_adapter_comes_back_over_its_reference(tiny_model, trained_policy, adapter):
    section = ModelSection(path=str(tiny_model()))
    loaded = load_saved_policy(adapter, section, device=CPU, is_adapter=True)
    one, other = loaded.measure(IDS, SCORED), trained_policy.measure(IDS, SCORED)
    assert torch.equal(one.logprobs, other.logprobs)
    assert torch.equal(one.ref_kl, other.ref_kl)
    assert loaded.fingerprint == trained_policy.fingerprint


def test_a_saved_full_model_comes_back_beside_its_reference(open_policy, tiny_model, tmp_path):
    policy = open_policy(lora=None)
    with torch.no_grad():
        for tensor in policy.trainable_parameters().values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)))
    policy.save(tmp_path)
    loaded = load_saved_policy(tmp_path, ModelSection(path=str(tiny_model())), device=CPU, is_adapter=False)
    one, other = loaded.measure(IDS, SCORED), policy.measure(IDS, SCORED)
    assert torch.equal(one.logprobs, other.logprobs)
    assert torch.equal(one.ref_kl, other.ref_kl)
    assert one.ref_kl.mean() > 1e-3
    assert loaded.fingerprint == policy.fingerprint
    assert loaded.frozen_sha256() == loaded.fingerprint.sha256


def test_a_saved_policy_with_another_tokenizer_or_vocabulary_is_refused(tiny_model, adapter, tmp_path):
    section = ModelSection(path=str(tiny_model()))
    save_tiny_model(tmp_path / "wider", vocab_size=50)
    with pytest.raises(ModelError, match=r"logits for 50 tokens, the reference .* for 40"):
        load_saved_policy(tmp_path / "wider", section, device=CPU, is_adapter=False)
    word_tokenizer(words=30).save_pretrained(adapter)
    policy = load_saved_policy(adapter, section, device=CPU, is_adapter=True)
    with pytest.raises(ModelError, match=r"checkpoint .*: its tokenizer is not that of the reference"):
        read_row(policy, tmp_path, "w39")
    save_tiny_model(tmp_path / "same", seed=3)
    word_tokenizer(words=30).save_pretrained(tmp_path / "same")
    policy = load_saved_policy(tmp_path / "same", section, device=CPU, is_adapter=False)
    with pytest.raises(ModelError, match=r"checkpoint .*: its tokenizer is not that of the reference"):
        read_row(policy, tmp_path, "w39")


def test_plain_logits_of_the_models_here_differ(tiny_model):
    one, other = (AutoModelForCausalLM.from_pretrained(tiny_model(a)).eval() for a in ("llama", "qwen3"))
    assert (plain_logits(one, IDS) - plain_logits(other, IDS)).abs().max() > 0.1


LONG_ROPE = {"rope_type": "longrope", "factor": 8.0, "rope_theta": 10000.0, "short_factor": [1.0] * 4,
             "long_factor": [1.0, 2.0, 6.0, 8.0]}
MOVING = {
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
                "max_position_embeddings": 16},
    "longrope": {"rope_parameters": LONG_ROPE | {"original_max_position_embeddings": 16}},
}


@pytest.mark.parametrize("kind", MOVING)
def test_angles_that_depend_on_the_longest_row_never_get_one_so_long(tmp_path, open_policy, kind):
    policy = open_policy(path=save_tiny_model(tmp_path, **MOVING[kind]))
    randomize(policy.trainable_parameters())
    texts = ["w3 w4 w5", "w6 w7 w8 w9 " * 6, "w10 w11 w12 w13"]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    examples, counts = load_examples(str(path), policy.tokenizer, policy.row_rules(DataSection(), 12))
    assert [len(example.ids) for example in examples] == [4, 16, 5]
    assert counts.truncated == 1
    together, _ = document_nats(policy, examples)
    with policy.reference():
        of_reference, _ = document_nats(policy, examples)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    for nats, ref_nats, example in zip(together.tolist(), of_reference.tolist(), examples, strict=True):
        ids, scored = torch.tensor([example.ids]), torch.tensor([example.scored])
        assert ref_nats == pytest.approx(-plain_logprobs(plain, ids, scored).sum().item(), abs=1e-4)
        assert nats == pytest.approx(document_nats(policy, [example])[0].item(), abs=1e-4)


def test_a_held_out_text_longer_than_learned_positions_is_cut_and_counted(open_policy, tmp_path):
    policy = open_policy("gpt2")
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "w3 " * 200}) + "\n")
    (example,), counts = load_examples(str(path), policy.tokenizer, policy.row_rules(DataSection(), 40))
    assert len(example.ids) == CONTEXT
    assert counts.truncated == 1
    assert torch.isfinite(document_nats(policy, [example])[0]).all()


@pytest.mark.parametrize("named", ["Qwen2Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_cuts_text_as_its_file_has_it(tmp_path, named, capsys):
    # transformers takes classes by their names, or the model's type, that bring a pre-tokenizer of their own.
    file = Tokenizer(BPE())
    file.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=False)])
    file.decoder = decoders.ByteLevel()
    file.train_from_iterator(["one 2024 two 2024"] * 9, BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=file, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    random_model(Qwen2Config(**SIZES)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    text = "two one 2024"
    assert tokenizer.encode(text, add_special_tokens=False) == file.encode(text, add_special_tokens=False).ids
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert "the file is followed" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["stories", "words"])
def test_a_tokenizer_that_agrees_with_its_file_is_taken_as_transformers_has_it(request, tiny_model, kind, capsys):
    folder = request.getfixturevalue("stories_model") if kind == "stories" else tiny_model()
    assert type(load_tokenizer(str(folder))) is type(AutoTokenizer.from_pretrained(folder))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", [True, {"r": 2}])
def test_what_a_newer_peft_switched_on_in_an_adapter_is_not_left_out(adapter, value):
    change_config(adapter, brand_new=value)     # PEFT would leave out any key that it does not know
    with pytest.raises(ModelError, match=r"brand_new is .* of which PEFT .* knows nothing"):
        read_adapter_config(adapter)


@pytest.mark.parametrize("value", [False, None, {}, 16])
def test_what_a_newer_peft_has_switched_off_in_an_adapter_does_not_matter(adapter, value):
    change_config(adapter, brand_new=value)
    assert read_adapter_config(adapter)["brand_new"] == value


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_an_adapter_saved_under_other_names_is_refused_with_both(adapter, reference, prefix):
    path = adapter / "adapter_model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ModelError, match=rf"found {prefix}base_model\S+, wanted base_model\S+\); was it made"):
        reference.load_adapter(adapter)
