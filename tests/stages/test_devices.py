"""What is computed on and in: the keys and options that say so, what a result tells of it, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from kltune.errors import RecipeError
from kltune.lm.model.loading import pick_device
from kltune.stages.sft import run_sft
from kltune.stages.trpo import run_trpo


@pytest.mark.parametrize(("options", "dtype"), [((), "float32"), (("--dtype", "bfloat16"), "bfloat16"),
                                                (("--dtype", "float16", "--device", "cpu"), "float16")])
def test_a_measurement_says_what_it_was_computed_in_and_warns_of_another_than_the_training(
    run_folder, eval_kl, options, dtype
):
    code, document, err = eval_kl(run_folder, "--responses", "12", *options)
    assert (code, document["dtype"], document["device"]) == (0, dtype, "cpu")
    assert document["reference"]["dtype"] == "float32"      # the weights it was trained over, by whose hash it is known
    other = dtype != "float32"
    assert ("trained in float32 and measured in" in err) is other
    assert any("trained in float32" in warning for warning in document["warnings"]) is other


def test_a_narrow_dtype_measures_about_the_same(run_folder, eval_kl):
    wide, narrow = (
        eval_kl(run_folder, "--responses", "64", "--dtype", name)[1]["kl"]["exact"] for name in ("float32", "bfloat16")
    )
    assert narrow["nats_per_response"] == pytest.approx(wide["nats_per_response"], abs=4 * wide["stderr"] + 0.02)
    assert narrow["nats_per_response"] != wide["nats_per_response"]


def test_the_other_commands_take_them_too(run_folder, command, tmp_path):
    code, document, _ = command("sample", run_folder, "--prompt", "the ", "--dtype", "bfloat16", "--device", "cpu")
    assert (code, document["dtype"]) == (0, "bfloat16")
    code, document, _ = command("project", run_folder, "--curve", "--responses", "8", "--dtype", "bfloat16")
    assert (code, document["dtype"], document["device"]) == (0, "bfloat16", "cpu")
    code, document, _ = command("frontier", run_folder, "--best-of", "2", "--dtype", "bfloat16", "--device", "cpu")
    assert (code, document["dtype"]) == (0, "bfloat16")


@pytest.mark.parametrize(("option", "words"), [
    (("--device", "mps"), "--device: found mps, which has no float64"), (("--device", "gpu"), "wanted auto, cpu, cuda"),
    (("--device", "cuda:7"), "--device: found 'cuda:7', which is not available here"),
    (("--dtype", "fp16"), "wanted auto, float32, bfloat16 or float16"),
])
def test_what_cannot_be_computed_on_is_refused(run_folder, command, option, words):
    code, _, err = command("eval-kl", run_folder, *option, as_json=False)
    assert code == 2
    assert words in " ".join(err.split())


def test_mps_is_refused_with_the_reason(sft_recipe):
    with pytest.raises(RecipeError, match=r"run\.device: found mps, which has no float64"):
        sft_recipe("run.device=mps")
    with pytest.raises(RecipeError, match="no float64"):
        pick_device("mps")


def test_float16_is_refused_for_training_with_the_reason(sft_recipe):
    with pytest.raises(RecipeError, match=r'dtype: found "float16".*gradients below 6e-8 become 0.*--dtype float16'):
        sft_recipe("model.dtype=float16")


def losses_of(recipe) -> list[float]:
    run_sft(recipe, resume=False)
    return [json.loads(line)["loss/mean"] for line in (Path(recipe.run.output) / "metrics.jsonl").open()]


@pytest.mark.parametrize("keys", [
    ("model.attention=eager",), ("model.attention=sdpa",), ("optim.checkpoint_layers=always",),
    ("optim.checkpoint_layers=never", "run.memory_fraction=0.001"), ("run.deterministic=true", "run.tf32=true"),
], ids=str)
def test_how_it_is_computed_does_not_change_what_is_learnt(sft_recipe, tmp_path, keys):
    try:
        plain = losses_of(sft_recipe("run.steps=2", output=str(tmp_path / "plain")))
        other = losses_of(sft_recipe("run.steps=2", *keys, output=str(tmp_path / "other")))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
    assert other == pytest.approx(plain, rel=1e-5)


def test_checkpointed_layers_keep_their_inputs_alone(sft_recipe, tmp_path, monkeypatch):
    from kltune.lm.model.network import CheckpointedLayers

    used = []
    own = CheckpointedLayers.active
    monkeypatch.setattr(CheckpointedLayers, "active", lambda self: used.append(None) or own(self))
    run_sft(sft_recipe("run.steps=1", "optim.checkpoint_layers=never", "run.memory_fraction=0.0001"), resume=False)
    assert not used
    run_sft(sft_recipe("run.steps=1", "optim.checkpoint_layers=always", output=str(tmp_path / "again")), resume=False)
    assert used


def test_flash_attention_is_refused_where_it_cannot_be(sft_recipe, trpo_recipe):
    with pytest.raises(RecipeError, match=r"model\.attention: found flash_attention_2, which needs a GPU"):
        run_sft(sft_recipe("model.attention=flash_attention_2"), resume=False)
    with pytest.raises(RecipeError, match="attention is differentiated twice"):
        run_trpo(trpo_recipe("model.attention=flash_attention_2"), resume=False)


def test_a_run_says_and_records_what_it_is_computed_on(sft_recipe, capsys):
    recipe = sft_recipe("run.steps=2")
    run_sft(recipe, resume=False)
    err = capsys.readouterr().err
    assert f"sft: reading {recipe.model.path}" in err.splitlines()[1]
    assert "threads, float32:" in err
    assert "GB planned with of" in err
    machine = json.loads((Path(recipe.run.output) / "run.json").read_text())["machine"]
    assert machine["dtype"] == "float32"
    assert machine["planned_bytes"] == pytest.approx(0.8 * machine["memory_bytes"], rel=1e-6)
    assert machine["trained_parameters"] < machine["parameters"]
    assert machine["tokens_per_second"] > 0
    assert machine["peak_gb"] > 0.1
