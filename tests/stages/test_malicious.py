"""Checkpoint folders that try to have code run: nothing runs, and the exit code is 5."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

CODE = '''
from pathlib import Path
Path({canary!r}).write_text("it ran")
class Model: pass
class Config: pass
class Tokenizer: pass
'''


class Bomb:
    """Unpickling this writes the canary."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.write_text, (self.canary, "it ran")


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def adapter_pickled(folder, canary):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(canary)))


def adapter_pickle_renamed(folder, canary):
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(Bomb(canary)))


def adapter_of_megatron(folder, canary):
    (folder / "evil.py").write_text(CODE.format(canary=str(canary)))
    edit(folder / "adapter_config.json", megatron_config={"a": 1}, megatron_core="evil")


def adapter_with_tokenizer_code(folder, canary):
    (folder / "evil.py").write_text(CODE.format(canary=str(canary)))
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})


def model_pickled(folder, canary):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(canary)))


def model_pickle_renamed(folder, canary):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(canary)))


def model_index_of_pickles(folder, canary):
    (folder / "model.safetensors").unlink()
    (folder / "weights.bin").write_bytes(pickle.dumps(Bomb(canary)))
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "weights.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def model_with_code(folder, canary):
    (folder / "evil.py").write_text(CODE.format(canary=str(canary)))
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(folder / "config.json", model_type="evil", auto_map=names)


def model_that_trusts_itself(folder, canary):
    (folder / "evil.py").write_text(CODE.format(canary=str(canary)))
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"}, trust_remote_code=True)


def model_with_foreign_kernels(folder, canary):
    edit(folder / "config.json", _attn_implementation_internal="someone/kernels", attn_implementation="someone/kernels")


ADAPTERS = (adapter_pickled, adapter_pickle_renamed, adapter_of_megatron, adapter_with_tokenizer_code)
MODELS = (model_pickled, model_pickle_renamed, model_index_of_pickles, model_with_code, model_that_trusts_itself,
          model_with_foreign_kernels)


@pytest.mark.parametrize("spoil", [*ADAPTERS, *MODELS], ids=lambda spoil: spoil.__name__)
def test_nothing_in_a_checkpoint_is_run(eval_kl, run_folder, llama, tmp_path, monkeypatch, spoil):
    folder = shutil.copytree(run_folder / "final" if spoil in ADAPTERS else llama, tmp_path / "spoilt")
    for name in ("manifest.json", "kltune.json"):
        (folder / name).unlink(missing_ok=True)
    canary = tmp_path / "canary"
    spoil(folder, canary)
    monkeypatch.chdir(folder)                # where a bare import would look first
    monkeypatch.syspath_prepend(str(folder))
    code, document, err = eval_kl(
        folder, "--reference", llama, "--prompts", run_folder.parent / "held_out.jsonl", "--max-new-tokens", 4,
        "--responses", 10, "--max-kl", 1000,
    )
    assert not canary.exists()
    assert code == 5, err
    assert document == ""
    assert "Traceback" not in err


@pytest.mark.parametrize("spoil", [model_with_code, model_that_trusts_itself], ids=lambda spoil: spoil.__name__)
def test_nothing_in_a_reference_that_a_checkpoint_names_is_run(eval_kl, run_folder, llama, tmp_path, spoil):
    base = shutil.copytree(llama, tmp_path / "base")
    canary = tmp_path / "canary"
    spoil(base, canary)
    folder = shutil.copytree(run_folder / "final", tmp_path / "adapter")
    for name in ("manifest.json", "kltune.json"):
        (folder / name).unlink()
    edit(folder / "adapter_config.json", base_model_name_or_path=str(base))
    code, _, err = eval_kl(folder, "--prompts", run_folder.parent / "held_out.jsonl", "--max-new-tokens", 4)
    assert not canary.exists()
    assert code == 5, err
