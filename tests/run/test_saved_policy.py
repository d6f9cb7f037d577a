"""Folders that would have code run are refused before anything opens them; others are measured as they were made."""

import json
from pathlib import Path

import pytest

from kltune.errors import CheckpointError, ModelError
from kltune.lm.model.files import refuse_code
from kltune.recipe import DataSection
from kltune.run.checkpoint import READ_BY, measure_settings
from kltune.run.saved_policy import MeasureOptions, Subject, find_checkpoint, open_subject, resolve_settings

NAMING_CODE = [
    ("config.json", {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}),
    ("config.json", {"text_config": {"trust_remote_code": True}}),
    ("config.json", {"attn_implementation": "someone/kernels"}),
    ("config.json", {"vision_config": [{"_attn_implementation_internal": "someone/kernels"}]}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization.Tokenizer", None]}}),
    ("generation_config.json", {"custom_generate": "someone/generate"}),
    ("adapter_config.json", {"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "os"}),
    ("processor_config.json", {"auto_map": {"AutoProcessor": "processing.Processor"}}),
]


@pytest.mark.parametrize(("name", "content"), NAMING_CODE)
def test_json_that_names_code_is_refused_with_file_and_key_unless_it_is_trusted(tmp_path, name, content):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ModelError, match="--trust-remote-code") as caught:
        refuse_code(tmp_path, "checkpoint")
    assert name in str(caught.value)
    refuse_code(tmp_path, "checkpoint", trusted=True)


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("file", ["pytorch_model-00001.bin", "weights.pt", "../elsewhere.safetensors"])
def test_an_index_that_leads_to_pickles_or_out_of_the_folder_is_refused(tmp_path, file, trusted):
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.embed_tokens.weight": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="safetensors"):
        refuse_code(tmp_path, "checkpoint", trusted=trusted)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"model_type": "llama", "auto_map": None, "_attn_implementation": "sdpa"}),
        ("adapter_config.json",
         {"peft_type": "LORA", "auto_mapping": {"parent_library": "peft"}, "megatron_core": "megatron.core"}),
        ("tokenizer.json", {"model": {"vocab": {"auto_map": 3, "trust_remote_code": 4}}}),
        ("model.safetensors.index.json",
         {"metadata": {"format": "pt"}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}),
    ],
)  # fmt: skip
def test_what_ordinary_models_say_is_let_through(tmp_path, name, content):
    (tmp_path / name).write_text(json.dumps(content))
    assert refuse_code(tmp_path, "checkpoint") is None


def test_a_name_on_the_hub_is_not_looked_at():
    assert refuse_code("someone/model", "reference") is None


def test_broken_json_is_a_fault_of_the_folder(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        refuse_code(tmp_path, "checkpoint")


def test_a_base_that_is_not_here_is_named_with_the_way_on(tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"its base is .*base, which is no folder here; give it as --reference"):
        open_subject(find_checkpoint(str(tmp_path), MeasureOptions()), MeasureOptions())


OTHER = {
    "columns": {"prompt": "q"}, "template": "none", "transcripts": "messages", "control_tokens": "text",
    "max_prompt_tokens": 7, "on_overlong": "drop", "on_bad_row": "skip",
}
# Files, what is learnt from and not asked, and the template and its day, which a checkpoint keeps in its own way.
NOT_OF_PROMPTS = {"prompts", "texts", "pairs", "turns", "max_response_tokens", "chat_template", "date"}


def test_prompts_are_measured_by_the_rules_that_they_were_trained_by():
    assert OTHER.keys() | NOT_OF_PROMPTS == DataSection.model_fields.keys()
    assert set(OTHER) == set(READ_BY)
    data = DataSection(**OTHER)
    info = {"measure": json.loads(json.dumps(measure_settings("prompts.jsonl", data, 8, 1.0)))}
    settings = resolve_settings([Subject("run", Path("run"), info)], MeasureOptions(prompts="prompts.jsonl"))
    assert settings.data == data
