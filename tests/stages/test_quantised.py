"""Quantised models as policy and as reference, adapters on them, and what cannot be computed here."""

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from kltune.report.text import eval_kl_text
from tests.stages.conftest import HELD_OUT, letter_tokenizer, write_recipe, write_rows

ASKED = ("--responses", 100, "--max-new-tokens", 6, "--show", 0)
METHODS = {     # and the packages that compute it
    "bitsandbytes": ("bitsandbytes", "accelerate"), "compressed-tensors": ("compressed-tensors", "accelerate"),
    "torchao": ("torchao", "accelerate"), "gptq": ("gptqmodel", "optimum", "accelerate"),
    "awq": ("gptqmodel", "accelerate"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A random Llama of widths that every backend takes."""
    folder = tmp_path_factory.mktemp("models") / "base"
    letter_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """A file of prompts."""
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    write_rows(path, [{"prompt": text} for text in HELD_OUT])
    return path


def loaded(base: Path, **how) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **how).eval()


def rounded(base: Path, folder: Path) -> Path:
    """The model with its linear layers rounded to 15 numbers a row, written as plain float32."""
    model = loaded(base)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                scale = layer.weight.abs().amax(dim=1, keepdim=True) / 7.0
                layer.weight.copy_((layer.weight / scale).round() * scale)
    model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def bitsandbytes(base: Path, folder: Path, bits: int = 4) -> Path:
    """The model as bitsandbytes packs it."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes (kltune[quant]) is not installed")
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
    loaded(base, quantization_config=config).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def torchao(base: Path, folder: Path, bits: int = 8) -> Path:
    """The model as torchao packs it, int8 weights alone."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    loaded(base, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2))).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def compressed_tensors(base: Path, folder: Path, bits: int) -> Path:
    """The model as compressed-tensors packs it, each row with a scale of its own."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors (kltune[quant]) is not installed")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model = loaded(base)
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="channel")
    apply_quantization_config(model, QuantizationConfig(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)}, format="pack-quantized",
        quantization_status="frozen", ignore=["lm_head"],
    ))
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            layer.weight_scale.data = layer.weight.detach().abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def exact(document: dict) -> tuple[float, float]:
    found = document["kl"]["exact"]
    return found["nats_per_response"], found["stderr"]


KINDS = [(bitsandbytes, 8), (bitsandbytes, 4), (torchao, 8), (compressed_tensors, 8), (compressed_tensors, 4)]


@pytest.mark.parametrize(("pack", "bits"), KINDS, ids=lambda part: getattr(part, "__name__", part))
def test_a_quantised_model_has_a_kl_to_the_full_one_and_back(eval_kl, base, prompts, tmp_path, pack, bits):
    packed = pack(base, tmp_path / "packed", bits)
    least, most = {8: (1e-6, 0.05), 4: (0.01, 2.0)}[bits]
    for pair in ((packed, base), (base, packed)):
        code, document, err = eval_kl(pair[0], "--reference", pair[1], "--prompts", prompts, *ASKED)
        assert code == 0, err
        kl, stderr = exact(document)
        assert least < kl - 2 * stderr
        assert kl < most
        assert (document["quantization"] is not None) == (pair[0] == packed)
        assert (document["reference"]["quantization"] is not None) == (pair[1] == packed)


def test_packed_weights_say_what_the_numbers_that_they_stand_for_say(eval_kl, base, prompts, tmp_path):
    packed = bitsandbytes(base, tmp_path / "packed")
    plain = loaded(base)
    plain.load_state_dict(loaded(packed).dequantize().state_dict())
    plain.save_pretrained(tmp_path / "plain")
    letter_tokenizer().save_pretrained(tmp_path / "plain")
    _, document, _ = eval_kl(packed, "--reference", tmp_path / "plain", "--prompts", prompts, *ASKED)
    assert exact(document)[0] < 1e-4
    both = [exact(eval_kl(one, "--reference", base, "--prompts", prompts, *ASKED)[1])[0]
            for one in (packed, tmp_path / "plain")]
    assert both[0] == pytest.approx(both[1], rel=0.05)


def trained_on(model: torch.nn.Module, folder: Path) -> Path:
    """A LoRA that PEFT trained on a model for a few steps, to say a's; it names no base."""
    tokenizer = letter_tokenizer()
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.Adam([one for one in adapted.parameters() if one.requires_grad], lr=0.02)
    ids = tokenizer(["the aaaa", "a cat a"], return_tensors="pt", padding=True).input_ids
    for _ in range(6):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder)
    return folder


def plain_kl(policy: torch.nn.Module, reference: torch.nn.Module, prompt: str) -> tuple[float, float]:
    """KL(policy ‖ reference) of 400 responses of at most 6 tokens, by transformers alone: mean and standard error."""
    tokenizer = letter_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt").input_ids.repeat(400, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        whole = policy.generate(ids, max_new_tokens=6, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                                eos_token_id=1, pad_token_id=2)
        logs = [torch.log_softmax(one(input_ids=whole).logits[:, ids.shape[1] - 1 : -1].double(), -1)
                for one in (policy, reference)]
    ended = (whole[:, ids.shape[1]:] == 1).long()
    nats = ((logs[0].exp() * (logs[0] - logs[1])).sum(-1) * (ended.cumsum(1) - ended == 0)).sum(1)
    return nats.mean().item(), nats.std().item() / math.sqrt(len(nats))


@pytest.mark.parametrize("quantise", [rounded, bitsandbytes], ids=lambda one: one.__name__)
def test_a_policy_on_a_quantised_base_has_two_numbers_in_one_command(eval_kl, base, tmp_path, quantise: Callable):
    small = quantise(base, tmp_path / "small")
    adapter = trained_on(loaded(small), tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    write_rows(tmp_path / "one.jsonl", [{"prompt": "the "}])
    code, document, err = eval_kl(adapter, "--base", small, "--against", base, "--prompts", tmp_path / "one.jsonl",
                                  "--responses", 400, "--max-new-tokens", 6, "--show", 0)
    assert code == 0, err
    assert document["reference"]["path"] == str(small)
    named = document["reference"]["quantization"]
    assert named == (None if quantise is rounded else "bitsandbytes, 4 bit")
    assert (f"reference {small} ({named})" in eval_kl_text(document)) == (named is not None)
    assert document["against"][0]["reference"]["path"] == str(base)
    policy = PeftModel.from_pretrained(loaded(small), adapter).eval()
    numbers = []
    for one, reference in ((document, small), (document["against"][0], base)):
        kl, stderr = exact(one)
        plain, plain_stderr = plain_kl(policy, loaded(reference), "the ")
        assert stderr is None       # of one prompt there is none by prompt; both are of 400 responses to it
        assert kl == pytest.approx(plain, abs=3 * math.sqrt(2) * plain_stderr)
        numbers.append(kl)
    assert abs(numbers[0] - numbers[1]) > 0.005      # the two are not one


def test_a_base_is_for_adapters(eval_kl, base, prompts):
    code, _, err = eval_kl(base, "--base", base, "--prompts", prompts)
    assert code == 2
    assert "--base" in err


def quantised_by_name(base: Path, folder: Path, method: str) -> Path:
    """A folder that says that it is quantised; it gets no further."""
    loaded(base).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_the_package_that_is_missing_is_named(eval_kl, base, prompts, tmp_path, monkeypatch, method):
    packed = quantised_by_name(base, tmp_path / "packed", method)
    missing = {name.replace("-", "_") for name in METHODS[method]}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name, *rest))
    for pair in ((packed, base), (base, packed)):
        code, _, err = eval_kl(pair[0], "--reference", pair[1], "--prompts", prompts)
        assert code == 5
        assert f"packed is quantised ({method}, 4 bit), which needs {' '.join(METHODS[method])}" in err
        extra = method in ("bitsandbytes", "compressed-tensors")
        assert ("pip install 'kltune[quant]'" if extra else f"pip install {METHODS[method][0]}") in err


def test_other_ways_of_quantising_are_named_and_refused(eval_kl, base, prompts, tmp_path):
    packed = quantised_by_name(base, tmp_path / "packed", "hqq")
    code, _, err = eval_kl(packed, "--reference", base, "--prompts", prompts)
    assert code == 5
    assert "quantised (hqq, 4 bit); kltune measures models of bitsandbytes, compressed-tensors, torchao" in err


def test_nothing_is_trained_on_a_quantised_model_nor_merged_into_one(command, base, prompts, tmp_path):
    packed = quantised_by_name(base, tmp_path / "packed", "bitsandbytes")
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in HELD_OUT])
    recipe = {"stage": "sft", "data": {"texts": "texts.jsonl"}, "run": {"steps": 1}}
    path = write_recipe(tmp_path, recipe, packed)
    for more in ((), ("--dry-run",), ("--set", "lora=null")):
        code, _, err = command("sft", path, *more)
        assert code == 5
        assert "packed is quantised (bitsandbytes, 4 bit); give the unquantised model" in err


def test_no_adapter_is_merged_into_packed_weights(command, base, tmp_path):
    packed = bitsandbytes(base, tmp_path / "packed")
    adapter = trained_on(loaded(packed), tmp_path / "adapter")
    code, _, err = command("merge", adapter, "--reference", packed, "--output", tmp_path / "out")
    assert code == 5
    assert "quantised (bitsandbytes, 4 bit)" in err
    assert not (tmp_path / "out").exists()
