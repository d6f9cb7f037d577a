"""``kltune merge``: one model that plain transformers loads, and how far it is from the policy it was made of."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.stages.conftest import HELD_OUT, write_rows

IDS = torch.arange(3, 13)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def loaded(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_run_loads_in_plain_transformers_and_is_the_policy(command, run_folder, llama, tmp_path, dtype):
    code, document, _ = command("merge", run_folder, "--output", tmp_path / "whole", "--dtype", dtype)
    assert code == 0
    unmerged = PeftModel.from_pretrained(loaded(llama), run_folder / "final").eval()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert {tensor.dtype for tensor in whole.parameters()} == {getattr(torch, dtype)}
    assert document["dtype"] == dtype
    near = {"float32": 1e-5, "bfloat16": 0.03}[dtype]
    assert torch.allclose(logits(whole.float().eval()), logits(unmerged), atol=near * logits(unmerged).abs().max())
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").get_vocab() == AutoTokenizer.from_pretrained(
        llama).get_vocab()
    kl, readme = document["kl"], (tmp_path / "whole" / "README.md").read_text()
    assert document["direction"] == "KL(merged||policy)"
    assert (kl["nats_per_response"] < 1e-7) == (dtype == "float32")
    assert kl["nats_per_response"] < 0.02
    assert "KL(merged ‖ policy): " in readme
    assert str(llama) in readme


def test_the_kl_of_a_merge_is_that_of_eval_kl_between_the_two(command, eval_kl, run_folder, tmp_path):
    arguments = ("--responses", 100, "--prompts", run_folder.parent / "held_out.jsonl")
    document = command("merge", run_folder, "--output", tmp_path / "whole", "--dtype", "bfloat16", *arguments)[1]
    other = eval_kl(tmp_path / "whole", "--reference", run_folder, *arguments)[1]
    assert document["kl"] == other["kl"]["exact"]
    # and its own reference is recorded: the base
    own, before = (eval_kl(path, *arguments)[1] for path in (tmp_path / "whole", run_folder))
    assert own["own_reference"]
    assert own["kl"]["exact"]["nats_per_response"] == pytest.approx(
        before["kl"]["exact"]["nats_per_response"], abs=0.1)


def test_a_merge_beyond_its_budget_is_not_saved(command, run_folder, tmp_path):
    arguments = ("merge", run_folder, "--output", tmp_path / "whole", "--dtype", "bfloat16", "--responses", 200)
    code, document, _ = command(*arguments, "--max-kl", 1e-9)
    assert (code, document["gate"]["verdict"], document["output"]) == (3, "fail", None)
    assert list(tmp_path.iterdir()) == []
    assert command(*arguments, "--max-kl", 5)[0] == 0


def test_nothing_is_overwritten_and_what_cannot_be_merged_is_refused(command, run_folder, llama, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    code, _, err = command("merge", run_folder, "--output", tmp_path / "full")
    assert code == 2
    assert "is not empty" in err
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    code, _, err = command("merge", llama, "--output", tmp_path / "other")
    assert code == 5
    assert "no adapter to merge" in err
    assert command("merge", run_folder, "--output", tmp_path / "other", "--dtype", "int8")[0] == 2


def test_a_foreign_adapter_is_merged_without_prompts_and_its_kl_is_null(command, run_folder, llama, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    get_peft_model(loaded(llama), config).save_pretrained(tmp_path / "foreign")
    code, document, _ = command("merge", tmp_path / "foreign", "--output", tmp_path / "whole")
    assert (code, document["kl"], document["dtype"]) == (0, None, "float32")
    assert "not measured" in (tmp_path / "whole" / "README.md").read_text()
    theirs = PeftModel.from_pretrained(loaded(llama), tmp_path / "foreign").eval()
    assert torch.allclose(logits(loaded(tmp_path / "whole")), logits(theirs), atol=1e-4)
    assert command("merge", tmp_path / "foreign", "--output", tmp_path / "b", "--max-kl", 1)[0] == 2


def test_what_project_scaled_down_is_merged_too(command, eval_kl, run_folder, tmp_path):
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in HELD_OUT * 3])
    prompts = ("--prompts", tmp_path / "prompts.jsonl", "--responses", 60)
    command("project", run_folder, "--max-kl", 0.8, "--output", tmp_path / "scaled", *prompts)
    document = command("merge", tmp_path / "scaled", "--output", tmp_path / "whole", *prompts)[1]
    assert document["kl"]["nats_per_response"] < 1e-7
    alpha = json.loads((tmp_path / "scaled" / "kltune.json").read_text())["projected"]["alpha"]
    assert 0 < alpha < 1
    kl = [eval_kl(tmp_path / name, *prompts)[1]["kl"]["exact"]["nats_per_response"] for name in ("scaled", "whole")]
    assert kl[0] == pytest.approx(kl[1], abs=1e-4)


def test_an_adapter_that_trained_parts_of_its_base_is_merged_whole(command, llama, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(loaded(llama), config)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    model.save_pretrained(tmp_path / "foreign")
    shutil.rmtree(tmp_path / "whole", ignore_errors=True)
    code, _, err = command("merge", tmp_path / "foreign", "--output", tmp_path / "whole")
    assert code == 0, err
    assert torch.allclose(logits(loaded(tmp_path / "whole")), logits(model.eval()), atol=1e-4)
