"""A reference is known again by its numbers, and one that would give others is refused with the field that differs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kltune.errors import InputError
from kltune.lm.model.fingerprint import (
    Fingerprint,
    config_differences,
    probed,
    settings_of,
    tokenizer_sha256,
    weights_sha256,
)
from kltune.lm.model.loading import load_tokenizer
from tests.tiny_policies import tiny_config, word_tokenizer

CHAT = "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"


def test_the_same_folder_has_the_same_fingerprint_and_a_copy_the_same_hashes(open_policy, tiny_model, tmp_path):
    shutil.copytree(tiny_model(), tmp_path, dirs_exist_ok=True)
    one, again, copy = open_policy(), open_policy(), open_policy(path=tmp_path)
    assert one.fingerprint == again.fingerprint
    assert one.fingerprint.differences(copy.fingerprint.as_dict()) == []
    assert one.fingerprint.as_dict() == json.loads(json.dumps(one.fingerprint.as_dict()))


def test_every_difference_of_two_fingerprints_names_both_sides():
    mine = Fingerprint("models/mine", None, "float32", "a" * 64, "b" * 64, "c" * 64)
    yours = replace(mine, path="models/yours", dtype="bfloat16", sha256="d" * 64, tokenizer_sha256="e" * 64)
    assert mine.differences(yours.as_dict()) == [
        f"weights: found {'a' * 12} (models/mine), wanted {'d' * 12} (models/yours)",
        f"tokenizer: found {'b' * 12} (models/mine), wanted {'e' * 12} (models/yours)",
        "dtype: found float32 (models/mine), wanted bfloat16 (models/yours)",
    ]
    template = replace(mine, template_sha256="f" * 64)
    assert mine.differences(template.as_dict()) == [
        f"chat template: found {'c' * 12} (models/mine), wanted {'f' * 12} (models/mine)"
    ]
    assert len(mine.differences({})) == 4  # nothing known of the other side is no agreement


def test_a_hash_of_weights_sees_values_names_shapes_and_types_and_counts_tied_tensors_once():
    weight = torch.arange(6.0)
    known = weights_sha256({"a": weight, "b": weight[:0]})
    assert weights_sha256({"a": weight.clone()}) == known
    for other in (weight.view(2, 3), weight.half(), weight + 0.5, -weight):
        assert weights_sha256({"a": other}) != known
    assert weights_sha256({"b": weight}) != known
    assert weights_sha256({"a": weight, "c": weight}) == known  # tied
    assert weights_sha256({"a": weight, "c": weight.clone()}) != known
    assert weights_sha256({"c": weight * 2, "a": weight}) == weights_sha256({"a": weight, "c": weight * 2})


def test_a_hash_of_a_tokenizer_is_that_of_its_files_whatever_was_done_with_it(tmp_path):
    tokenizer = word_tokenizer()
    known = tokenizer_sha256(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_sha256(load_tokenizer(str(tmp_path))) == known
    used = load_tokenizer(str(tmp_path))
    used(["w3 w4 w5", "w3"], padding=True, truncation=True, max_length=2)
    assert tokenizer_sha256(used) == known
    assert tokenizer_sha256(word_tokenizer(words=30)) != known


def test_a_chat_template_is_part_of_the_fingerprint(open_policy, tiny_model, tmp_path):
    shutil.copytree(tiny_model(), tmp_path, dirs_exist_ok=True)
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    (difference,) = open_policy().fingerprint.differences(open_policy(path=tmp_path).fingerprint.as_dict())
    assert difference.startswith("chat template: found")


@dataclass(frozen=True)
class Edit:
    """One field of one file of a model's folder, set to another value; None takes it away."""

    architecture: str
    file: str
    field: str
    value: Any

    def apply(self, folder: Path) -> None:
        """Change the file; a field of fields is written as a.b."""
        path = folder / self.file
        content = json.loads(path.read_text())
        *outer, name = self.field.split(".")
        inner = content
        for key in outer:
            inner = inner[key]
        if self.value is None:
            inner.pop(name, None)
        else:
            inner[name] = self.value
        path.write_text(json.dumps(content))


CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
MOVES = [
    Edit("llama", CONFIG, "rms_norm_eps", 0.1),
    Edit("llama", CONFIG, "rms_norm_eps", 1.1e-6),      # less than the probe sees
    Edit("llama", CONFIG, "hidden_act", "gelu"),
    Edit("llama", CONFIG, "rope_parameters.rope_theta", 100.0),
    Edit("llama", CONFIG, "rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
    Edit("llama", CONFIG, "max_position_embeddings", 24),       # prompts are cut to what it leaves
    Edit("llama", CONFIG, "attention_bias", True),
    Edit("llama", CONFIG, "num_hidden_layers", 1),
    Edit("llama", CONFIG, "num_key_value_heads", 1),
    Edit("llama", CONFIG, "model_type", "mistral"),
    Edit("gpt2", CONFIG, "activation_function", "relu"),
    Edit("gpt2", CONFIG, "layer_norm_epsilon", 0.01),
    Edit("gpt2", CONFIG, "scale_attn_weights", False),
    Edit("gpt2", CONFIG, "scale_attn_by_inverse_layer_idx", True),
    Edit("gpt2", CONFIG, "n_head", 8),
    Edit("gemma2", CONFIG, "final_logit_softcapping", 3.0),
    Edit("gemma2", CONFIG, "attn_logit_softcapping", 50.0),
    Edit("gemma2", CONFIG, "sliding_window", 30),       # longer than the probe
    Edit("gemma2", CONFIG, "query_pre_attn_scalar", 16),
    Edit("gemma2", CONFIG, "hidden_activation", "silu"),
    Edit("gemma2", CONFIG, "layer_types", ["full_attention", "full_attention"]),
    Edit("granite", CONFIG, "logits_scaling", 2.0),
    Edit("granite", CONFIG, "embedding_multiplier", 1.0),
    Edit("granite", CONFIG, "residual_multiplier", 0.5),
    Edit("granite", CONFIG, "attention_multiplier", 0.5),
    Edit("cohere", CONFIG, "logit_scale", 0.5),
    Edit("cohere", CONFIG, "layer_norm_eps", 0.01),
    Edit("llama", GENERATION, "eos_token_id", [1, 5]),
    Edit("llama", GENERATION, "eos_token_id", 7),
    Edit("llama", TOKENIZER, "eos_token", "w9"),
    Edit("llama", TOKENIZER, "chat_template", CHAT.replace("</s>", "<unk>")),
    Edit("llama", "tokenizer.json", "model.vocab", {"<s>": 0, "</s>": 1, "<unk>": 2, "w4": 3, "w3": 4}
         | {f"w{i}": i for i in range(5, 40)}),
]
MOVES_NOTHING = [
    Edit("llama", CONFIG, "transformers_version", "5.17.0"),
    Edit("llama", CONFIG, "architectures", None),
    Edit("llama", CONFIG, "_name_or_path", "elsewhere"),
    Edit("llama", CONFIG, "use_cache", False),
    Edit("llama", CONFIG, "initializer_range", 0.5),
    Edit("llama", CONFIG, "attention_dropout", 0.5),
    Edit("llama", CONFIG, "rms_norm_eps", None),        # left to its default, which it was
    Edit("llama", CONFIG, "edited_by", {"name": "a tool", "version": 3}),
    Edit("llama", CONFIG, "pad_token_id", 5),
    Edit("gpt2", CONFIG, "resid_pdrop", 0.0),
    Edit("llama", GENERATION, "temperature", 0.5),
    Edit("llama", GENERATION, "max_new_tokens", 7),
    Edit("llama", TOKENIZER, "model_max_length", 40),
    Edit("llama", TOKENIZER, "padding_side", "left"),
    Edit("llama", TOKENIZER, "chat_template", "{# the same, said differently #}" + CHAT),
]


@pytest.fixture(scope="module")
def chat_model(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from an architecture to its tiny model, with a chat template in tokenizer_config.json."""
    folders: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in folders:
            place = folders[architecture] = tmp_path_factory.mktemp(f"chat-{architecture}") / "model"
            shutil.copytree(tiny_model(architecture), place)
            Edit(architecture, TOKENIZER, "chat_template", CHAT).apply(place)
        return folders[architecture]

    return folder


@pytest.fixture
def measured(tmp_path: Path, chat_model: Callable[[str], Path], open_policy: Callable[..., Any]) -> Callable[..., Any]:
    """A function that opens, as eval-kl, project and sample do, a checkpoint whose reference was edited meanwhile."""
    from kltune.recipe import DataSection
    from kltune.run.checkpoint import measure_settings, save_adapter
    from kltune.run.saved_policy import (
        MeasureOptions,
        find_checkpoint,
        measured_prompts,
        open_subject,
        resolve_settings,
    )

    def measure(edit: Edit) -> Any:
        base = tmp_path / "base"
        shutil.copytree(chat_model(edit.architecture), base)
        rows = [{"messages": [{"role": "user", "content": "w3 w4"}]}]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        policy = open_policy(path=base)
        info = {"stage": "ppo", "reference": policy.fingerprint.as_dict(),
                "measure": measure_settings(str(tmp_path / "prompts.jsonl"), DataSection(), 8, 1.0)}
        save_adapter(tmp_path / "final", policy.save, info=info)
        edit.apply(base)
        options = MeasureOptions()
        subject = find_checkpoint(str(tmp_path / "final"), options)
        opened = open_subject(subject, options)
        measured_prompts(opened, resolve_settings([subject], options))
        return opened.fingerprint

    return measure


@pytest.mark.parametrize("edit", MOVES, ids=lambda edit: f"{edit.architecture}-{edit.field}-{str(edit.value)[:20]}")
def test_an_edit_that_moves_a_logit_a_token_or_an_end_is_caught(measured, edit):
    with pytest.raises(InputError):
        measured(edit)


@pytest.mark.parametrize("edit", MOVES_NOTHING, ids=lambda edit: f"{edit.architecture}-{edit.field}")
def test_an_edit_that_moves_nothing_is_let_through(measured, edit):
    assert len(measured(edit).probe) == 32      # it was opened, and is known by what it says


def test_the_setting_that_differs_is_named_with_both_values(measured):
    with pytest.raises(InputError, match=r"config\.json: rms_norm_eps found 0\.1 \(.*\), wanted 1e-06 \("):
        measured(MOVES[0])


def test_a_probe_sees_other_code_on_the_same_weights_and_settings_and_no_rounding(open_policy):
    mine = open_policy().fingerprint
    assert len(mine.probe) == 32
    rounded = mine.as_dict() | {"probe": [value * 1.0001 for value in mine.probe]}
    assert mine.differences(rounded) == []
    (difference,) = mine.differences(mine.as_dict() | {"probe": [value * 1.01 for value in mine.probe]})
    assert difference.startswith("logits: found")
    assert "other code" in difference
    assert probed(torch.arange(32.0).reshape(1, 4, 8)) == list(map(float, range(32)))


def test_a_record_of_an_earlier_version_is_compared_in_what_it_has_and_that_is_said(open_policy, capsys):
    mine = open_policy().fingerprint
    old = {name: value for name, value in mine.as_dict().items() if name not in ("config", "ends", "probe")}
    assert mine.differences(old | {"path": "an/old/one"}) == []
    said = capsys.readouterr().err
    assert "an/old/one is of an earlier kltune, without config, ends, probe" in said
    assert len(mine.differences(old | {"sha256": "d" * 64})) == 1


def test_settings_read_by_another_version_of_transformers_are_the_same_settings():
    mine = settings_of(tiny_config("llama"))
    theirs = {name: value for name, value in mine.items() if name not in ("mlp_bias", "rope_parameters")}
    theirs |= {"rope_theta": 10000.0, "since_removed": 3}
    assert config_differences(mine, theirs, "here", "there") == []
    (difference,) = config_differences(mine, theirs | {"rope_theta": 500.0}, "here", "there")
    assert "rope_parameters" in difference


def test_an_infinite_setting_can_be_recorded():
    config = tiny_config("llama")
    config.rms_norm_eps = float("inf")
    assert json.loads(json.dumps(settings_of(config), allow_nan=False))["rms_norm_eps"] == "Infinity"
