"""GGUF files as policy and as reference: the numbers in the file, whatever lies beside it."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.stages.conftest import HELD_OUT, write_rows

LAYERS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "ffn_up": "mlp.up_proj",
    "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A random Llama on bytes."""
    folder = tmp_path_factory.mktemp("models") / "base"
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [("t", "h")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.2, bos_token_id=257, eos_token_id=258,
    )).save_pretrained(folder)
    return folder


def packed(base: Path, path: Path, kind: str) -> Path:
    """The model as llama.cpp's own converter writes it, in one of its types."""
    import gguf

    model, config = LlamaForCausalLM.from_pretrained(base), LlamaConfig.from_pretrained(base)
    words = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(32)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(words, key=words.get))
    writer.add_token_types([3 if word in ("<s>", "</s>") else 1 for word in sorted(words, key=words.get)])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    names |= {f"blk.0.{short}": f"model.layers.0.{long}" for short, long in LAYERS.items()}
    tensors = model.state_dict()
    for short, long in names.items():
        weight = tensors[f"{long}.weight"]
        if short.endswith(("attn_q", "attn_k")):
            weight = weight.reshape(2, 2, 16, 64).swapaxes(1, 2).reshape(64, 64)
        numbers = weight.float().numpy()
        if numbers.ndim == 2 and kind != "F32":
            stored = getattr(gguf.GGMLQuantizationType, kind)
            writer.add_tensor(f"{short}.weight", gguf.quantize(numbers, stored), raw_dtype=stored)
        else:
            writer.add_tensor(f"{short}.weight", numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_the_model_in_it_and_a_rounded_one_has_a_kl(eval_kl, base, tmp_path):
    pytest.importorskip("gguf", reason="the package gguf (kltune[quant]) is not installed")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in HELD_OUT])
    (tmp_path / "adapter_config.json").write_text("{}")        # a folder that is not the file's
    arguments = ("--prompts", tmp_path / "prompts.jsonl", "--responses", 40, "--max-new-tokens", 6)
    kls = {}
    for kind in ("F32", "Q8_0", "Q4_0"):
        file = packed(base, tmp_path / f"{kind}.gguf", kind)
        code, document, err = eval_kl(file, "--reference", base, *arguments)
        assert code == 0, err
        kls[kind] = document["kl"]["exact"]["nats_per_response"]
        code, document, err = eval_kl(base, "--reference", file, *arguments)
        assert code == 0, err
        assert document["reference"]["path"] == str(file)
    assert kls["F32"] < 1e-6 < kls["Q8_0"] < kls["Q4_0"]


def test_without_its_package_a_gguf_file_is_refused_by_name(eval_kl, base, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else found(name, *rest))
    for pair in ((tmp_path / "model.gguf", base), (base, tmp_path / "model.gguf")):
        code, _, err = eval_kl(pair[0], "--reference", pair[1], "--prompts", tmp_path / "x.jsonl")
        assert code == 5
        assert "pip install 'kltune[quant]'" in err


def test_a_damaged_gguf_file_is_refused(eval_kl, base, tmp_path):
    pytest.importorskip("gguf", reason="the package gguf (kltune[quant]) is not installed")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    code, _, err = eval_kl(tmp_path / "model.gguf", "--reference", base, "--prompts", tmp_path / "x.jsonl")
    assert code == 5
    assert "model.gguf" in err
