"""``kltune project``: a budget met on fresh numbers, a plain adapter, the curve, and what it refuses."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from kltune.lm.model.opening import load_saved_policy
from kltune.recipe import ModelSection


@pytest.fixture
def project(command):
    return partial(command, "project")


@pytest.fixture(scope="module")
def far(run_folder: Path) -> float:
    """KL of the run's final adapter, nats per response."""
    return json.loads((run_folder / "result.json").read_text())["kl"]["nats_per_response"]


def test_the_adapter_that_comes_out_keeps_its_budget_everywhere(project, eval_kl, run_folder, llama, far, tmp_path):
    budget = 0.5 * far
    code, document, err = project(
        run_folder, "--max-kl", budget, "--output", tmp_path / "out", "--responses", 100, "--max-responses", 400
    )
    assert code == 0
    assert 0.3 < document["alpha"] < 1.0
    assert document["kl"]["exact"]["ci"][1] <= budget
    assert json.loads((tmp_path / "out" / "project.json").read_text()) == document
    assert "check" in err
    # The gate knows the reference from the folder itself. On numbers of its own it does not fail what was scaled to the
    # budget's very edge, and may leave it open.
    code, measured, _ = eval_kl(tmp_path / "out", "--responses", 400, "--seed", 9, "--max-kl", budget)
    assert code in (0, 4)
    assert measured["kl"]["exact"]["nats_per_response"] > 0.4 * budget     # ten prompts are not sure of more
    # and in plain PEFT it is the same model
    policy = load_saved_policy(
        tmp_path / "out", ModelSection(path=str(llama)), device=torch.device("cpu"), is_adapter=True
    )
    ids = torch.tensor([[0, 4, 9, 3, 11]])
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(policy.network.logits(policy.network.hidden(ids)), plain(input_ids=ids).logits)


def test_an_adapter_within_its_budget_is_saved_as_it_is(project, run_folder, far, tmp_path):
    code, document, _ = project(run_folder, "--max-kl", 3 * far, "--output", tmp_path / "out", "--responses", 40)
    assert code == 0
    assert document["alpha"] == 1.0
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (run_folder / "final" / name).read_bytes()


def test_the_curve_runs_from_the_reference_to_the_whole_and_is_scored_by_the_recipe(project, run_folder, tmp_path):
    recipe = run_folder.parent / "recipe.yaml"
    code, document, _ = project(
        run_folder, "--curve", "--recipe", recipe, "--responses", 40, "--output", tmp_path / "curve"
    )
    assert code == 0
    looks = document["looks"]
    assert [look["alpha"] for look in looks] == [0.0, *(round(0.1 * i, 1) for i in range(1, 11))]
    assert looks[0]["nats_per_response"] == 0.0
    nats = [look["nats_per_response"] for look in looks]
    assert nats == sorted(nats)
    assert looks[-1]["score"] > looks[0]["score"]
    assert (tmp_path / "curve" / "curve.svg").read_text().startswith("<svg")
    assert not (tmp_path / "curve" / "adapter_config.json").exists()
    text = project(run_folder, "--curve", "--responses", 40, as_json=False)[1]
    assert "score" not in text        # rewards run only where a recipe says so


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ((), "--max-kl"),
        (("--max-kl", "1"), "--output"),
        (("--max-kl", "nan", "--output", "out"), "--max-kl"),
        (("--max-kl", "0", "--output", "out"), "--max-kl"),
    ],
)
def test_what_could_not_end_well_is_2(project, run_folder, arguments, wanted):
    code, _, err = project(run_folder, *arguments)
    assert code == 2
    assert wanted in err


@pytest.mark.parametrize(("output", "words"), [(".", "the folder that you are in"), ("file/sub", "cannot be a folder")])
def test_an_output_that_can_be_none_is_2(project, run_folder, tmp_path, monkeypatch, output, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, _, err = project(run_folder, "--max-kl", 1, "--output", output)
    assert code == 2
    assert words in err


def test_a_folder_with_something_in_it_is_left_alone(project, run_folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = project(run_folder, "--max-kl", 1, "--output", tmp_path)
    assert code == 2
    assert "not empty" in err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_model_has_no_adapter_to_dial(project, run_folder, llama, tmp_path):
    arguments = ("--reference", llama, "--prompts", run_folder.parent / "held_out.jsonl", "--max-new-tokens", 6)
    code, _, err = project(llama, *arguments, "--max-kl", 1, "--output", tmp_path / "out")
    assert code == 5
    assert "adapter" in err
    assert not (tmp_path / "out").exists()
