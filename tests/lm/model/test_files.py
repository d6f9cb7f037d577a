"""A folder is what it seems, or is refused in one line: quantised, damaged, another head, tensors that nobody reads."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from kltune.errors import ModelError, ScorerError
from kltune.lm.model.files import reading, refuse_code
from kltune.lm.rewards.classifiers import load_classifier
from kltune.recipe import ModelReward
from tests.tiny_policies import VOCABULARY, save_tiny_model, tiny_config, word_tokenizer

CPU = torch.device("cpu")
METHODS = {
    "gptq, 4 bit": {"quant_method": "gptq", "bits": 4},
    "awq, 4 bit": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "bitsandbytes, 4 bit": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "of an unknown kind": {"quant_method": "of an unknown kind"},
    "an unnamed method, 4 bit": {"bits": 4},
}


def change_config(folder: Path, **keys) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return folder


def add_tensors(folder: Path, **tensors: torch.Tensor) -> Path:
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})
    return folder


def save_classifier(folder: Path, **changes) -> Path:
    config = tiny_config("llama")
    config.update({"num_labels": 1} | changes)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_model_is_refused_by_its_method(open_policy, tmp_path, method):
    policy = change_config(save_tiny_model(tmp_path / "policy"), quantization_config=METHODS[method])
    with pytest.raises(ModelError, match=rf"policy is quantised \({method}\); give the unquantised model"):
        open_policy(path=policy)
    reward = change_config(save_classifier(tmp_path / "reward"), quantization_config=METHODS[method])
    with pytest.raises(ScorerError, match=rf"reward is quantised \({method}\)"):
        load_classifier(ModelReward(kind="model", path=str(reward)), CPU)


def damage_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["type"] = "of tomorrow"
    path.write_text(json.dumps(content))


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def misspell_type(folder: Path) -> None:
    change_config(folder, model_type="llama-of-tomorrow")


def misshape(folder: Path) -> None:
    change_config(folder, hidden_size="wide")


def halve(folder: Path) -> None:
    change_config(folder, hidden_size=16, head_dim=4)


DAMAGES = {
    damage_tokenizer: "untagged enum|of tomorrow",
    cut_weights: "damaged or cut off",
    misspell_type: "could not be loaded",
    misshape: r"hidden_size: found \"wide\", wanted a valid integer",
    halve: "in another shape than config.json says",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_files_that_no_library_can_read_are_named_with_a_reason(open_policy, tmp_path, damage):
    for kind, save in (("policy", save_tiny_model), ("reward", save_classifier)):
        damage(save(tmp_path / kind))
    with pytest.raises(ModelError, match=DAMAGES[damage]) as error:
        open_policy(path=tmp_path / "policy")
    assert str(tmp_path / "policy") in str(error.value)
    with pytest.raises(ScorerError, match=DAMAGES[damage]) as error:
        load_classifier(ModelReward(kind="model", path=str(tmp_path / "reward")), CPU)
    assert str(tmp_path / "reward") in str(error.value)


@pytest.mark.parametrize("cause", [
    MemoryError(), OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
])
def test_room_that_ran_out_is_no_fault_of_the_files(cause):
    with pytest.raises(type(cause)) as error, reading("a/folder", "model.path"):
        raise cause
    assert error.value is cause


@pytest.mark.parametrize(("path", "words"), [
    ("work/no/such/folder", "there is no such folder here, and it is no name on the hub"),
    ("nobody/no-such-folder", "there is no such folder here, and as a name on the hub it gave"),
])
def test_a_folder_that_is_missing_is_told_from_a_name_on_the_hub(path, words):
    with pytest.raises(ModelError, match=f"^reference: {path}: {words}"), reading(path, "reference"):
        raise OSError("We couldn't connect to 'https://huggingface.co'")


def test_a_folder_among_ones_that_are_here_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse_code("ours/missing", "reference")        # may be one
    (tmp_path / "ours").mkdir()
    for path in ("ours/missing", "runs/missing", "/no/such"):
        with pytest.raises(ModelError, match=f"^reference: {path}: there is no such folder here"):
            refuse_code(path, "reference")


def stored(content: bytes, store: str) -> str:
    """Where a store keeps a file, beside the folder of links: by its hash."""
    md5, sha256 = hashlib.md5(content).hexdigest(), hashlib.sha256(content).hexdigest()
    return {
        "hub": f"blobs/{hashlib.sha1(content).hexdigest()}", "dvc": f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}",
        "annex": f"annex/SHA256E-s{len(content)}--{sha256}.x/SHA256E-s{len(content)}--{sha256}.x",
    }[store]


@pytest.mark.parametrize(("store", "folder"), [
    ("hub", "snapshots/4f1c"), ("hub", "snapshots/4f1c/policy"), ("dvc", "models/base"), ("annex", "base"),
])
def test_a_folder_of_links_into_a_store_is_the_folder(open_policy, tiny_model, tmp_path, store, folder):
    place = tmp_path / folder
    place.mkdir(parents=True)
    for file in tiny_model("llama").iterdir():
        target = tmp_path / stored(file.read_bytes(), store)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
        (place / file.name).symlink_to(os.path.relpath(target, place))
    assert open_policy(path=place).fingerprint.sha256 == open_policy().fingerprint.sha256


def test_weights_may_be_a_link_and_what_checkpoints_take_along_may_not(open_policy, tiny_model, tmp_path):
    place = save_tiny_model(tmp_path / "model", "llama")
    (place / "model.safetensors").unlink()
    (place / "model.safetensors").symlink_to(tiny_model("llama") / "model.safetensors")
    open_policy(path=place)
    private = tmp_path / "0123456789abcdef0123456789abcdef"      # a name like a hash is not enough
    private.write_text('{"password": "none of yours"}')
    (place / "chat_template.jinja").symlink_to(private)
    with pytest.raises(ModelError, match=r"chat_template\.jinja is a link to .*outside of the folder"):
        open_policy(path=place)


def test_an_encoder_is_refused_by_name(open_policy, tmp_path):
    BertForMaskedLM(BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="BertForMaskedLM, which reads the tokens it is to predict"):
        open_policy(path=tmp_path)


def test_a_tied_classifier_is_no_language_model_though_nothing_is_missing(open_policy, tmp_path):
    save_classifier(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ModelError, match="LlamaForSequenceClassification"):
        open_policy(path=tmp_path)


def test_a_model_deeper_than_its_configuration_says_is_refused(open_policy, tmp_path):
    with pytest.raises(ModelError, match=r"hold model\.layers\.1\..* does not read: another model"):
        open_policy(path=change_config(save_tiny_model(tmp_path), num_hidden_layers=1))
    reward = change_config(save_classifier(tmp_path / "reward"), num_hidden_layers=1)
    with pytest.raises(ScorerError, match=r"hold model\.layers\.1\."):
        load_classifier(ModelReward(kind="model", path=str(reward)), CPU)


def test_a_bias_that_the_configuration_leaves_out_is_a_part_of_the_model(open_policy, tmp_path):
    add_tensors(save_tiny_model(tmp_path), **{"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})
    with pytest.raises(ModelError, match=r"hold model\.layers\.0\.self_attn\.q_proj\.bias"):
        open_policy(path=tmp_path)


def test_a_head_beside_the_model_is_noted_and_the_model_serves(open_policy, tmp_path, capsys):
    add_tensors(save_tiny_model(tmp_path), **{
        "v_head.summary.weight": torch.ones(1, 32),                      # TRL's value head
        "mtp.layers.0.weight": torch.ones(32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),      # what old versions saved
    })
    open_policy(path=tmp_path)
    assert "note: model.path: LlamaForCausalLM does not read v_head.summary.weight of" in capsys.readouterr().err


def test_a_classifier_that_kept_a_pooler_it_does_not_use_still_scores(tmp_path):
    config = RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_labels=1, max_position_embeddings=40,
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    add_tensors(tmp_path, **{"roberta.pooler.dense.weight": torch.ones(32, 32)})
    score = load_classifier(ModelReward(kind="model", path=str(tmp_path)), CPU)
    assert len(score(["w3"], ["w4"])) == 1
