"""``kltune eval-kl``: numbers that can be listed, the gate and its exit codes, and what it refuses to measure."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kltune.lm.data.examples import Prompt, RowRules, load_prompts
from kltune.lm.fast import memory
from kltune.lm.measure import measurement
from kltune.lm.measure.measurement import Round, measure_kl
from kltune.lm.model import sampler
from kltune.lm.model import sampler as rollout
from kltune.lm.model.network import Network
from kltune.lm.model.opening import load_saved_policy
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import Draw, sample_rollout
from kltune.recipe import ModelSection
from kltune.train.evaluation.held_out import EVALUATION_SEED
from tests.oracles import TinyLM, tiny_adapter, tiny_policy_logits
from tests.stages.conftest import HELD_OUT, small_llama, write_rows

DOCUMENT_KEYS = {
    "schema", "checkpoint", "reference", "direction", "temperature", "max_new_tokens", "prompts", "responses", "tokens",
    "truncated_fraction", "kl", "forward", "js", "entropy", "agreement_z", "top_tokens", "top_prompts", "by_position",
    "alignment_tax", "gate", "distribution", "tv", "end_token", "examples", "deployed",
}  # fmt: skip

@pytest.fixture
def copied(tmp_path: Path, run_folder: Path) -> Path:
    """``final`` as a plain PEFT adapter to be spoilt: without manifest and kltune.json."""
    folder = shutil.copytree(run_folder / "final", tmp_path / "adapter")
    for name in ("manifest.json", "kltune.json"):
        (folder / name).unlink()
    return folder


def held_out(run_folder: Path) -> Path:
    return run_folder.parent / "held_out.jsonl"


# --- the document ----------------------------------------------------------------------------------------------------


def test_the_document_has_what_the_contract_promises(eval_kl, run_folder):
    code, document, _ = eval_kl(
        run_folder, "--responses", 40, "--direction", "both", "--texts", run_folder.parent / "held_out_texts.jsonl",
        "--max-kl", 50, "--top", 3,
    )
    assert code == 0
    assert document["schema"] == "kltune.eval_kl/1"
    assert document.keys() >= DOCUMENT_KEYS
    assert document["checkpoint"] == str(run_folder)
    assert document["direction"] == "KL(policy||reference)"
    assert (document["prompts"], document["responses"]) == (len(HELD_OUT), 40)
    assert document["kl"].keys() >= {"exact", "k1", "k3", "cv"}
    for kl in (*document["kl"].values(), document["forward"]["exact"]):
        assert kl.keys() >= {"nats_per_response", "stderr", "ci", "nats_per_token"}
        assert kl["ci"][0] < kl["nats_per_response"] < kl["ci"][1]
    exact = document["kl"]["exact"]
    assert exact["nats_per_token"] == pytest.approx(exact["nats_per_response"] * 40 / document["tokens"])
    assert 0.0 < document["js"] < math.log(2.0)
    assert abs(document["agreement_z"]) < 4
    assert document["alignment_tax"].keys() >= {"nats_per_token", "stderr", "ci"}
    gate = document["gate"]
    assert (gate["max_kl"], gate["unit"], gate["confidence"]) == (50.0, "nats_per_response", 0.95)
    assert (gate["verdict"], gate["more_responses"], gate["direction"]) == ("pass", None, "KL(policy||reference)")
    assert len(document["top_tokens"]) == len(document["top_prompts"]) == 3
    by_position = sum(row["nats"] * row["responses"] for row in document["by_position"]) / 40
    assert by_position == pytest.approx(exact["nats_per_response"], rel=1e-5)


def test_the_run_is_measured_again_with_its_own_settings(eval_kl, run_folder):
    result = json.loads((run_folder / "result.json").read_text())
    again = ("--responses", 10, "--seed", EVALUATION_SEED)
    code, document, _ = eval_kl(run_folder, *again)
    assert code == 0
    assert document["gate"] is None
    assert document["forward"] is None
    assert document["max_new_tokens"] == 6
    assert document["kl"]["exact"]["nats_per_response"] == pytest.approx(result["kl"]["nats_per_response"], abs=1e-6)
    (checkpoint,) = (run_folder / "checkpoints").iterdir()
    assert eval_kl(checkpoint, *again)[1]["kl"] == document["kl"]  # the last checkpoint is final
    # a gate draws responses of its own, and not those that chose the policy
    assert eval_kl(run_folder, "--responses", 10)[1]["kl"]["exact"] != document["kl"]["exact"]


@pytest.mark.parametrize(
    ("options", "listed"),
    [
        ((), 0.11253952),
        (("--temperature", 0.7), 0.188646),
        (("--max-new-tokens", 1), 0.049134),
        (("--max-new-tokens", 2), 0.086986),
    ],
)
def test_kl_of_the_listed_model(eval_kl, tmp_path, tiny_lm_folder, options, listed):
    # docs/maths.md 22 and 1.4: π = ρ's logits + 0.7 cos(2s + v), as a PEFT adapter that kltune did not make.
    tiny_adapter(TinyLM.from_pretrained(tiny_lm_folder), tiny_policy_logits()).save_pretrained(tmp_path / "foreign")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "<s>"}] * 200)
    options = ("--max-new-tokens", 3, *options)
    code, document, _ = eval_kl(
        tmp_path / "foreign", "--prompts", tmp_path / "prompts.jsonl", "--responses", 1000, *options
    )
    assert code == 0
    assert document["responses"] == 1000
    for name, kl in document["kl"].items():
        assert abs(kl["nats_per_response"] - listed) < 4 * kl["stderr"] + 1e-6, name


def test_both_directions_of_the_listed_model(eval_kl, tmp_path, tiny_lm_folder):
    tiny_adapter(TinyLM.from_pretrained(tiny_lm_folder), tiny_policy_logits()).save_pretrained(tmp_path / "foreign")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "<s>"}] * 200)
    _, document, _ = eval_kl(
        tmp_path / "foreign", "--prompts", tmp_path / "prompts.jsonl", "--responses", 2000, "--max-new-tokens", 3,
        "--direction", "both",
    )
    reverse, forward = document["kl"]["exact"], document["forward"]["exact"]
    assert abs(reverse["nats_per_response"] - 0.11253952) < 4 * reverse["stderr"]
    assert abs(forward["nats_per_response"] - 0.12869274) < 4 * forward["stderr"]
    assert reverse["nats_per_token"] == pytest.approx(0.04658283, abs=0.002)
    assert document["js"] == pytest.approx(0.02929738, abs=0.012)  # one number per response, sd .2
    assert document["truncated_fraction"] == pytest.approx(0.362289, abs=0.05)
    assert document["entropy"]["policy"] == pytest.approx(2.40009531 / 2.415901, abs=0.02)  # per token


def test_a_base_that_is_its_own_reference_says_so(eval_kl, run_folder, llama):
    arguments = (llama, "--reference", llama, "--prompts", held_out(run_folder), "--responses", 20)
    arguments = (*arguments, "--max-new-tokens", 6)
    code, document, _ = eval_kl(*arguments, "--max-kl", 0.001)
    assert code == 0
    assert all(kl["nats_per_response"] == 0.0 for kl in document["kl"].values())
    _, document, _ = eval_kl(*arguments, as_json=False)
    assert "equals its reference" in document
    assert "equals its reference" not in eval_kl(run_folder, "--responses", 10, as_json=False)[1]


# --- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["nats_per_response", "nats_per_token"])
def test_the_gate_passes_fails_or_leaves_it_open(eval_kl, run_folder, unit):
    _, document, _ = eval_kl(run_folder, "--responses", 200)
    exact = document["kl"]["exact"]
    low, high = exact["ci"] if unit == "nats_per_response" else exact["token_ci"]
    estimate = exact[unit]
    cases = {1.001 * high: (0, "pass"), 0.999 * low: (3, "fail"), 0.5 * (estimate + high): (4, "inconclusive")}
    for budget, (wanted, verdict) in cases.items():
        code, document, _ = eval_kl(run_folder, "--responses", 200, "--max-kl", budget, "--unit", unit)
        assert code == wanted
        assert (document["gate"]["verdict"], document["gate"]["unit"]) == (verdict, unit)
        advice = document["gate"]["more_responses"] is not None or document["gate"]["wants_prompts"]
        assert advice == (verdict == "inconclusive")
    _, document, _ = eval_kl(
        run_folder, "--responses", 200, "--max-kl", 0.5 * (estimate + high), "--unit", unit, as_json=False
    )
    assert "would decide it" in document


def test_few_responses_pass_a_far_budget_only_and_the_gate_says_why(eval_kl, run_folder):
    _, document, _ = eval_kl(run_folder, "--responses", 40)
    high, most = document["kl"]["exact"]["ci"][1], document["distribution"]["maximum"]
    unseen = (1 - 0.025 ** (1 / 40)) * 10 * most
    for budget, wanted in ((1.001 * high, 4), (high + 0.999 * unseen, 4), (high + 1.001 * unseen, 0)):
        code, document, _ = eval_kl(run_folder, "--responses", 40, "--max-kl", budget)
        assert code == wanted
        assert ("40 responses cannot show" in document["gate"]["reason"]) == (code == 4)
        assert "10 prompts say little of others" in document["gate"]["reason"]
    assert document["gate"]["more_responses"] is None
    text = eval_kl(run_folder, "--responses", 40, "--max-kl", 1.001 * high, as_json=False)[1]
    assert "INCONCLUSIVE against" in text
    assert "about 143 more responses would decide it" in text


def test_a_count_that_is_rounded_up_is_said(eval_kl, run_folder):
    _, document, err = eval_kl(run_folder, "--responses", 32)
    assert (document["prompts"], document["responses"]) == (10, 40)
    assert "answers each of 10 prompts 4 times: 40 responses, where 32 were asked for" in err


def test_a_long_file_is_measured_on_a_draw_that_is_said(eval_kl, run_folder, tmp_path):
    # a sorted file: its first rows are not like the others
    rows = [{"prompt": word} for word in ("the cat", "a dog ran") for _ in range(100)]
    write_rows(tmp_path / "sorted.jsonl", rows)
    arguments = (run_folder, "--prompts", tmp_path / "sorted.jsonl", "--responses", 40)
    _, document, err = eval_kl(*arguments)
    assert "answers 40 of 200 prompts, drawn at random with seed 0" in err
    assert (document["prompts"], document["prompts_in_file"], document["responses"]) == (2, 200, 40)
    answered = [row["responses"] for row in document["top_prompts"]]
    assert min(answered) > 8
    _, again, _ = eval_kl(*arguments)
    _, other, _ = eval_kl(*arguments, "--seed", 1)
    assert again["top_prompts"] == document["top_prompts"]
    assert other["top_prompts"] != document["top_prompts"]


def test_several_checkpoints_are_a_list_and_the_worst_decides(eval_kl, run_folder, llama):
    _, document, _ = eval_kl(run_folder, "--responses", 200)
    low, high = document["kl"]["exact"]["ci"]
    arguments = (run_folder, run_folder / "final", "--responses", 200)
    code, document, _ = eval_kl(*arguments, "--max-kl", 0.5 * low)
    assert code == 3
    assert document["schema"] == "kltune.eval_kl_list/1"
    first, second = document["checkpoints"]
    assert first["kl"] == second["kl"]  # same prompts, same random numbers
    assert [part["gate"]["verdict"] for part in (first, second)] == ["fail", "fail"]
    for budget, wanted in ((0.5 * (low + high), 4), (2 * high, 0)):
        assert eval_kl(*arguments, "--max-kl", budget)[0] == wanted


def test_one_bad_checkpoint_among_good_ones_decides(eval_kl, run_folder, llama, tmp_path):
    own = shutil.copytree(llama, tmp_path / "own")
    arguments = ("--prompts", held_out(run_folder), "--responses", 20, "--max-new-tokens", 6, "--max-kl", 0.01)
    arguments = (*arguments, "--reference", llama)
    assert eval_kl(own, *arguments)[0] == 0
    code, document, _ = eval_kl(own, run_folder, own, *arguments)
    assert code == 3
    assert [part["gate"]["verdict"] for part in document["checkpoints"]] == ["pass", "fail", "pass"]


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "inf"])
def test_a_budget_that_is_none_is_refused(eval_kl, run_folder, budget):
    assert eval_kl(run_folder, "--max-kl", budget)[0] == 2


# --- what cannot be measured -----------------------------------------------------------------------------------------


def test_a_base_with_other_weights_is_refused_and_both_are_named(eval_kl, run_folder, llama, tmp_path):
    other = shutil.copytree(llama, tmp_path / "other")
    small_llama(vocabulary=small_llama_vocabulary(llama), seed=1).save_pretrained(other)
    moved = shutil.copytree(run_folder / "final", tmp_path / "final")
    (moved / "manifest.json").unlink()
    record = (moved / "kltune.json").read_text()        # the base that it names is gone: only --reference can be it
    (moved / "kltune.json").write_text(record.replace(str(llama), f"{llama}-gone"))
    code, document, err = eval_kl(moved, "--reference", other)
    assert code == 5
    assert document == ""
    assert str(other) in err
    assert str(llama) in err
    assert "weights" in err


def small_llama_vocabulary(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def test_a_reference_with_another_tokenizer_is_refused(eval_kl, run_folder, llama, tmp_path):
    other = shutil.copytree(llama, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, _, err = eval_kl(run_folder, "--reference", other)
    assert code == 5
    assert "tokenizer" in err


def test_without_prompts_there_is_nothing_to_measure_on(eval_kl, copied):
    code, _, err = eval_kl(copied)
    assert code == 2
    assert "--prompts" in err


def test_a_foreign_adapter_is_measured_against_the_base_it_names(eval_kl, copied, run_folder):
    arguments = ("--prompts", held_out(run_folder), "--responses", 10, "--max-new-tokens", 6)
    code, document, _ = eval_kl(copied, *arguments)
    assert code == 0
    assert document["kl"] == eval_kl(run_folder, "--responses", 10)[1]["kl"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_adapter_that_is_no_number_is_refused(eval_kl, copied, run_folder, value):
    weights = load_file(copied / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = value
    save_file(weights, copied / "adapter_model.safetensors")
    code, _, err = eval_kl(copied, "--prompts", held_out(run_folder), "--max-kl", 100)
    assert code == 5
    assert "NaN" in err


def test_a_checkpoint_that_was_changed_after_saving_is_refused(eval_kl, run_folder, tmp_path):
    folder = shutil.copytree(run_folder / "final", tmp_path / "final")
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert eval_kl(folder)[0] == 5


def test_an_adapter_of_another_shape_is_refused(eval_kl, copied, run_folder):
    weights = load_file(copied / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, copied / "adapter_model.safetensors")
    assert eval_kl(copied, "--prompts", held_out(run_folder))[0] == 5


def test_a_folder_without_a_checkpoint_is_refused(eval_kl, tmp_path):
    code, _, err = eval_kl(tmp_path)
    assert code == 5
    assert str(tmp_path) in err


# --- invariance ------------------------------------------------------------------------------------------------------


@pytest.fixture
def policy(run_folder: Path, llama: Path) -> Policy:
    """What was trained, over its reference."""
    section = ModelSection(path=str(llama))
    return load_saved_policy(run_folder / "final", section, device=torch.device("cpu"), is_adapter=True)


def held_out_prompts(policy: Policy, run_folder: Path) -> list[Prompt]:
    return load_prompts(str(held_out(run_folder)), policy.tokenizer, RowRules(20, 1, None))[0]


def test_how_the_work_is_divided_changes_nothing(policy, run_folder, monkeypatch):
    prompts = held_out_prompts(policy, run_folder)
    plan = Round.of(prompts, 40), Draw(6, seed=3)
    whole = measure_kl(policy, *plan)
    monkeypatch.setattr(measurement, "RESPONSES_PER_PASS", 12)
    monkeypatch.setattr(memory, "ROWS_PER_PASS", 8)
    monkeypatch.setattr(memory.Batching, "tokens_per_pass", 30)
    monkeypatch.setattr(Network, "chunk_rows", 7)
    parts = measure_kl(policy, *plan)
    assert len(parts.rollouts) > len(whole.rollouts)
    assert torch.equal(whole.tokens, parts.tokens)
    for name in ("exact", "k1", "k3"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name), rtol=0, atol=1e-5), name


def test_the_order_of_prompts_changes_nothing(policy, run_folder):
    prompts = held_out_prompts(policy, run_folder)
    order = np.random.default_rng(0).permutation(len(prompts))
    uniforms = sampler.uniform_numbers(np.random.default_rng(1), len(prompts), 6)
    straight = sample_rollout(policy, prompts, uniforms, temperature=1.0)
    mixed = sample_rollout(policy, [prompts[i] for i in order], uniforms[order], temperature=1.0)
    assert [straight.responses[i] for i in order] == list(mixed.responses)
    assert torch.allclose(straight.ref_kl.sum(1)[order], mixed.ref_kl.sum(1), rtol=0, atol=1e-5)


def test_another_temperature_of_the_sampler_is_found_out(policy, run_folder, monkeypatch):
    # Tokens drawn at 0.5 and measured at 1: k1 and exact disagree in expectation, and z_M says so (docs/maths.md 6).
    prompts = held_out_prompts(policy, run_folder)
    honest = rollout.sample

    def hotter(policy, prompts, uniforms, *, temperature):
        samples = honest(policy, prompts, uniforms, temperature=0.5)
        scored_at_one = policy.measure(samples.ids, samples.scored, exact=False).logprobs
        return replace(samples, logprobs=rollout.response_scatter(scored_at_one, samples.response_mask))

    plan = Round.of(prompts, 600), Draw(6, seed=0)
    assert abs(measure_kl(policy, *plan).z) < 4
    monkeypatch.setattr(rollout, "sample", hotter)
    assert abs(measure_kl(policy, *plan).z) > 4
