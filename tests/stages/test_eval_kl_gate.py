"""``kltune eval-kl`` as a gate in a pipeline: it samples until it knows, tells CI, and compares checkpoints."""

import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.oracles import TinyLM, tiny_adapter, tiny_policy_logits, tiny_reference_logits
from tests.stages.conftest import write_rows

KL, FORWARD = 0.11253952, 0.12869274        # docs/maths.md 22


@pytest.fixture
def tiny(tmp_path: Path, tiny_lm_folder: Path) -> tuple[object, ...]:
    """The arguments that measure the listed model: adapter, prompts, length."""
    tiny_adapter(TinyLM.from_pretrained(tiny_lm_folder), tiny_policy_logits()).save_pretrained(tmp_path / "foreign")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "<s>"}] * 3000)
    return (tmp_path / "foreign", "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 3)


@pytest.mark.parametrize(("budget", "code", "verdict"), [(0.118, 0, "pass"), (0.107, 3, "fail")])
def test_auto_keeps_sampling_until_a_near_budget_is_decided(eval_kl, tiny, budget, code, verdict):
    first, document, _ = eval_kl(*tiny, "--responses", 60, "--max-kl", budget)
    assert first == 4
    assert document["gate"]["more_responses"] > 60
    decided, document, _ = eval_kl(*tiny, "--responses", 60, "--max-kl", budget, "--auto", "--max-responses", 2000)
    gate = document["gate"]
    assert (decided, gate["verdict"]) == (code, verdict)
    assert [look["verdict"] for look in gate["looks"]] == ["inconclusive"] * (len(gate["looks"]) - 1) + [verdict]
    assert gate["looks"][-1]["responses"] == document["responses"] == document["prompts"] > 60
    assert gate["planned_looks"] == 7                        # 60, 120, ... 1920, 2000
    assert gate["looks"][0]["confidence"] == pytest.approx(1 - 0.05 / 7)


def test_auto_gives_up_where_it_was_told_to(eval_kl, tiny):
    code, document, _ = eval_kl(*tiny, "--responses", 60, "--max-kl", KL, "--auto", "--max-responses", 200)
    assert code == 4
    assert [look["responses"] for look in document["gate"]["looks"]] == [60, 120, 200]


def test_auto_does_not_ask_the_same_prompts_again_in_vain(eval_kl, run_folder):
    # ten prompts that differ: once their own differences straddle the budget, no number of answers will tell
    _, document, _ = eval_kl(run_folder, "--responses", 400)
    budget = document["kl"]["exact"]["nats_per_response"] * 1.01
    options = ("--max-kl", budget, "--responses", 100, "--auto", "--max-responses", 100_000)
    code, document, _ = eval_kl(run_folder, *options)
    assert code == 4
    assert document["gate"]["wants_prompts"]
    assert document["responses"] < 3000
    assert "more prompts" in eval_kl(run_folder, *options, as_json=False)[1]


def test_auto_without_a_budget_is_no_question(eval_kl, run_folder):
    code, _, err = eval_kl(run_folder, "--auto")
    assert code == 2
    assert "--max-kl" in err


def test_with_direction_forward_the_gate_is_on_the_forward_kl(eval_kl, tiny):
    middle = 0.5 * (KL + FORWARD)
    options = ("--responses", 3000, "--max-kl", middle)
    assert eval_kl(*tiny, *options)[0] == 0
    code, document, _ = eval_kl(*tiny, *options, "--direction", "forward")
    assert code == 3
    assert document["gate"]["direction"] == "KL(reference||policy)"


def test_the_deployed_policy_is_measured_under_its_own_names(eval_kl, tiny):
    _, document, _ = eval_kl(*tiny, "--responses", 3000, "--top-p", 0.8)
    for name, listed in (("vs_base", 0.579609), ("both", 0.046278)):      # docs/maths.md 6
        kl = document["deployed"][name]
        assert abs(kl["nats_per_response"] - listed) < 4 * kl["stderr"], name
    kl = document["kl"]["exact"]
    assert abs(kl["nats_per_response"] - KL) < 4 * kl["stderr"]           # the headline stays that of the policy itself
    text = eval_kl(*tiny, "--responses", 50, "--top-p", 0.8, as_json=False)[1]
    assert "deployed (top_p 0.8) vs base" in text


def test_js_and_tv_of_the_listed_model(eval_kl, tiny):
    _, document, _ = eval_kl(*tiny, "--responses", 3000, "--direction", "both")
    for name, listed in (("js", 0.02929738), ("tv", 0.20037558)):
        assert abs(document[name] - listed) < 4 * document[f"{name}_stderr"], name


def test_by_position_is_that_of_the_listing(eval_kl, tiny):
    # docs/maths.md 22: D at '' .04913360; at position 2 the mean over a and b, as often as each is said
    _, document, _ = eval_kl(*tiny, "--responses", 3000)
    first, second, _ = document["by_position"]
    assert first["nats"] == pytest.approx(0.04913360, abs=1e-6)
    p = tiny_policy_logits()[0].softmax(-1)
    listed = (p[0] * 0.01012785 + p[1] * 0.08258103) / (p[0] + p[1])
    assert second["nats"] == pytest.approx(listed.item(), abs=0.003)


# --- several checkpoints ---------------------------------------------------------------------------------------------


def test_differences_are_paired_and_so_sharper_than_the_figures(eval_kl, tiny, tmp_path, tiny_lm_folder):
    half = tiny_reference_logits() + 0.5 * (tiny_policy_logits() - tiny_reference_logits())
    tiny_adapter(TinyLM.from_pretrained(tiny_lm_folder), half).save_pretrained(tmp_path / "half")
    code, document, _ = eval_kl(tiny[0], tmp_path / "half", *tiny[1:], "--responses", 1000)
    assert code == 0
    whole, halved = (part["kl"]["exact"] for part in document["checkpoints"])
    (row,) = document["differences"]
    assert (row["checkpoint"], row["minus"]) == (str(tmp_path / "half"), str(tiny[0]))
    gap = halved["nats_per_response"] - whole["nats_per_response"]
    assert row["nats_per_response"] == pytest.approx(gap, abs=1e-9)
    assert row["ci"][1] < 0
    assert row["stderr"] < (whole["stderr"] ** 2 + halved["stderr"] ** 2) ** 0.5
    text = eval_kl(tiny[0], tmp_path / "half", *tiny[1:], "--responses", 50, as_json=False)[1]
    assert "minus" in text


def test_all_checkpoints_are_measured_alike_and_who_was_made_otherwise_is_said(eval_kl, run_folder, copied_run):
    code, document, err = eval_kl(run_folder, copied_run, "--responses", 20)
    assert code == 0
    assert {part["max_new_tokens"] for part in document["checkpoints"]} == {6}
    assert f"{copied_run} was made with other settings" in err


@pytest.fixture
def copied_run(tmp_path: Path, run_folder: Path) -> Path:
    """``final`` again, with another length limit on record."""
    folder = shutil.copytree(run_folder / "final", tmp_path / "other")
    (folder / "manifest.json").unlink()
    info = json.loads((folder / "kltune.json").read_text())
    info["measure"]["max_new_tokens"] = 4
    (folder / "kltune.json").write_text(json.dumps(info))
    return folder


# --- continuous integration ------------------------------------------------------------------------------------------


def test_junit_annotations_and_step_summary(eval_kl, run_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    code, _, err = eval_kl(run_folder, "--responses", 40, "--max-kl", 0.01, "--junit", tmp_path / "kl.xml")
    assert code == 3
    assert "::error title=kltune eval-kl::" in err
    assert "FAIL: over 0.01" in (tmp_path / "summary.md").read_text()
    assert ET.parse(tmp_path / "kl.xml").getroot().get("failures") == "1"


def test_weights_that_are_no_numbers_are_never_a_pass_not_even_in_junit(eval_kl, run_folder, tmp_path):
    folder = shutil.copytree(run_folder / "final", tmp_path / "spoilt")
    (folder / "manifest.json").unlink()
    weights = load_file(folder / "adapter_model.safetensors")
    weights[min(weights)][0] = torch.nan
    save_file(weights, folder / "adapter_model.safetensors")
    (tmp_path / "kl.xml").write_text('<testsuites tests="1" failures="0"/>')     # of an earlier run
    code, document, err = eval_kl(folder, "--responses", 40, "--max-kl", 100, "--junit", tmp_path / "kl.xml")
    assert code == 5
    assert document == ""
    assert "NaN" in err
    assert ET.parse(tmp_path / "kl.xml").getroot().get("errors") == "1"


def test_an_adapter_that_does_nothing_passes_a_gate_only_with_a_word(eval_kl, tiny, tmp_path):
    adapter = tmp_path / "foreign" / "adapter_model.safetensors"
    tensors = load_file(adapter)
    silent = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(silent, adapter, metadata={"format": "pt"})
    code, document, err = eval_kl(*tiny, "--responses", 60, "--max-kl", 1, "--junit", tmp_path / "kl.xml")
    assert (code, document["gate"]["verdict"], document["kl"]["exact"]["nats_per_response"]) == (0, "pass", 0.0)
    (warning,) = document["warnings"]
    assert "exactly 0 on all 60 responses though the adapter's tensors are not all 0" in warning
    assert warning in err
    assert warning in eval_kl(*tiny, "--responses", 60, as_json=False)[1]
    assert warning in {found.get("value") for found in ET.parse(tmp_path / "kl.xml").iter("property")}
    save_file(tensors, adapter, metadata={"format": "pt"})
    assert eval_kl(*tiny, "--responses", 60, "--max-kl", 1)[1]["warnings"] == []
