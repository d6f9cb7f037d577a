"""The gate where people build: as a test, and as the steps of an action. False alarms are counted."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from kltune.core.kl.gate import confidence_per_look, looks, verdict
from kltune.core.kl.intervals import summarize
from kltune.testing import assert_kl
from tests.oracles import TinyLM, save_tiny_lm, tiny_adapter, tiny_policy_logits
from tests.stages.test_references import adapter_on
from tests.tiny_policies import save_tiny_model

ACTION = Path(__file__).parents[1] / "scripts" / "action"
EXACT = 0.11253952      # docs/maths.md 22, of three tokens


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    base = save_tiny_lm(folder / "base")
    tiny_adapter(TinyLM.from_pretrained(base), tiny_policy_logits()).save_pretrained(folder / "adapter")
    return folder / "adapter"


OPTIONS = {"prompts": ["<s>"] * 300, "max_new_tokens": 3, "show": 0}


def test_a_budget_that_holds_is_a_test_that_passes(tiny):
    document = assert_kl(tiny, max_kl=2 * EXACT, **OPTIONS)
    assert document["kl"]["exact"]["nats_per_response"] == pytest.approx(EXACT, abs=0.02)


def test_one_that_does_not_hold_fails_and_says_by_what(tiny):
    with pytest.raises(AssertionError, match=r"adapter: FAIL: over 0.05 nats per response .*KL 0\.1"):
        assert_kl(tiny, max_kl=0.05, **OPTIONS)


def test_one_that_is_not_decided_fails_and_says_what_would_decide_it(tiny):
    with pytest.raises(AssertionError, match=r"INCONCLUSIVE .* about \d+ more responses would decide it"):
        assert_kl(tiny, max_kl=1.001 * EXACT, auto=False, responses=200, **OPTIONS)
    with pytest.raises(AssertionError, match="INCONCLUSIVE"):
        assert_kl(tiny, max_kl=EXACT, **OPTIONS | {"prompts": ["<s>"], "responses": 8, "max_responses": 8})


def test_a_checkpoint_at_its_budget_fails_one_build_in_forty_at_most():
    # 1,000 builds of 64 prompts with 4 answers each, looked at after 128 and 256; a lognormal KL, part of its spread
    # between prompts, whose mean is the budget itself
    numbers, spread = np.random.default_rng(0), 0.8
    budget = float(np.exp(spread**2 / 2 + 0.4**2 / 2))
    planned = looks(128, 256)
    confidence = confidence_per_look(0.95, len(planned))
    alarms = wrong_passes = 0
    for _ in range(1000):
        prompts = np.exp(0.4 * numbers.standard_normal(64))
        nats = prompts.repeat(4) * np.exp(spread * numbers.standard_normal(256))
        for count in planned:
            rows = torch.from_numpy(nats[:count])
            kl = summarize("exact", rows, torch.ones(count), torch.arange(count) // 4, confidence)
            found = verdict(kl, budget, "nats_per_response", confidence).verdict
            if found != "inconclusive":
                break
        alarms += found == "fail"
        wrong_passes += found == "pass"
    assert alarms <= 25
    assert wrong_passes <= 25


def test_the_steps_of_the_action_are_a_gate(tmp_path):
    action = yaml.safe_load((ACTION / "action.yml").read_text())
    install, gate = action["runs"]["steps"]
    assert install["if"] == "inputs.kltune != ''"
    assert all("${{" not in step["run"] for step in (install, gate))       # nothing from outside becomes a command
    adapter = adapter_on(save_tiny_model(tmp_path / "base"), tmp_path / "adapter", 1, spread=0.2)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "w{n} w{n + 1}"}}\n' for n in range(3, 20)))
    inputs = {name: value.get("default", "") for name, value in action["inputs"].items()}
    given = inputs | {"checkpoint": str(adapter), "max-kl": "0.001", "prompts": "prompts.jsonl",
                      "max-new-tokens": "4"}
    env = {
        name: given[text.removeprefix("${{ inputs.").removesuffix(" }}")] if "inputs." in text else str(ACTION)
        for name, text in gate["env"].items()
    }
    root = str(ACTION.parents[1])
    env |= {"KLTUNE": f"{sys.executable} -m kltune", "GITHUB_OUTPUT": str(tmp_path / "output"), "PYTHONPATH": root}
    ran = subprocess.run(["bash", "-c", gate["run"]], cwd=tmp_path, env=os.environ | env, capture_output=True,
                         text=True, check=False)
    assert ran.returncode == 3, ran.stderr
    assert "verdict=fail\n" in (tmp_path / "output").read_text()
    assert (tmp_path / "kl.xml").exists()
