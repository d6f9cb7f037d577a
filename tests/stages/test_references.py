"""Any policy against any reference: what is shared, what is loaded beside it, and what cannot be compared."""

import json
import math
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from kltune.run.saved_policy import MeasureOptions, find_checkpoint, open_subject
from tests.stages.conftest import HELD_OUT, small_llama, write_rows

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"


def adapter_on(base: Path, folder: Path, seed: int, *, spread: float = 0.3, targets=("q_proj", "down_proj")) -> Path:
    """A LoRA of random numbers, as PEFT saves it."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                tensor.normal_(0.0, spread)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def two(tmp_path, llama) -> tuple[Path, Path]:
    """Two adapters on the random Llama, on layers that are not the same."""
    first = adapter_on(llama, tmp_path / "first", 1)
    return first, adapter_on(llama, tmp_path / "second", 2, targets=("v_proj", "down_proj"))


@pytest.fixture
def prompts(tmp_path) -> tuple[object, ...]:
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in HELD_OUT])
    return "--prompts", tmp_path / "prompts.jsonl", "--responses", 40, "--max-new-tokens", 6


def merged(base: Path, adapter: Path, folder: Path) -> Path:
    """The adapter's model as a folder of its own."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    model.merge_and_unload().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    return folder


def exact(document: dict) -> float:
    return document["kl"]["exact"]["nats_per_response"]


def test_an_adapter_against_another_is_the_same_as_against_its_merged_model(eval_kl, llama, two, prompts, tmp_path):
    first, second = two
    whole = merged(llama, second, tmp_path / "whole")
    alone = exact(eval_kl(first, *prompts)[1])
    code, shared, err = eval_kl(first, "--reference", second, *prompts)
    assert code == 0
    assert shared["reference"]["path"] == str(second)
    assert shared["reference"]["base"] == str(llama)
    assert f"reference = {second} on {llama}, frozen, float32" in err
    assert exact(shared) > 1.2 * alone
    beside = eval_kl(first, "--reference", whole, *prompts)[1]
    assert beside["reference"]["path"] == str(whole)
    assert beside["reference"]["sha256"] != shared["reference"]["sha256"]
    assert exact(beside) == pytest.approx(exact(shared), rel=1e-4)
    both = eval_kl(merged(llama, first, tmp_path / "other"), "--reference", second, *prompts)[1]
    assert exact(both) == pytest.approx(exact(shared), rel=1e-4)


def test_kl_of_anything_from_itself_is_exactly_0(eval_kl, llama, two, run_folder, prompts):
    for path in (two[0], llama, run_folder):
        _, document, _ = eval_kl(path, "--reference", path, *prompts)
        assert all(figures["nats_per_response"] == 0.0 for figures in document["kl"].values())
        assert document["warnings"] == []


def test_runs_checkpoints_and_models_are_references(eval_kl, llama, two, run_folder, prompts):
    values = {}
    for path in (run_folder, run_folder / "final", llama):
        code, document, _ = eval_kl(two[0], "--reference", path, *prompts)
        assert code == 0
        values[path] = exact(document)
    assert values[run_folder] == values[run_folder / "final"] != values[llama]
    assert eval_kl(run_folder, "--reference", two[0], *prompts)[1]["own_reference"] is False


def test_the_forward_direction_samples_the_other_reference(eval_kl, two, prompts):
    _, one, _ = eval_kl(two[0], "--reference", two[1], "--direction", "both", *prompts)
    _, other, _ = eval_kl(two[1], "--reference", two[0], *prompts)
    assert one["forward"]["exact"]["nats_per_response"] == pytest.approx(exact(other), rel=1e-5)


def test_a_copy_of_the_base_is_the_base_and_another_base_is_loaded_beside(eval_kl, llama, two, run_folder, prompts,
                                                                          tmp_path):
    for path in (two[0], run_folder):
        own = exact(eval_kl(path, *prompts)[1])
        _, document, err = eval_kl(path, "--reference", shutil.copytree(llama, tmp_path / f"copy{own}"), *prompts)
        assert exact(document) == own
        assert document["own_reference"]
        assert "(adapter off)" in err
        other = shutil.copytree(llama, tmp_path / f"other{own}")
        small_llama(json.loads((llama / "config.json").read_text())["vocab_size"], seed=1).save_pretrained(other)
        code, document, err = eval_kl(path, "--reference", other, *prompts)
        assert code == 0
        assert not document["own_reference"]
        assert exact(document) > 2 * own
        assert f"reference = {other}, frozen" in err


def test_a_base_that_was_replaced_is_found_where_reference_says(eval_kl, llama, run_folder, prompts, tmp_path):
    taken = shutil.copytree(llama, tmp_path / "taken")
    small_llama(json.loads((llama / "config.json").read_text())["vocab_size"], seed=1).save_pretrained(taken)
    moved = shutil.copytree(run_folder / "final", tmp_path / "moved")
    (moved / "manifest.json").unlink()
    record = (moved / "kltune.json").read_text()
    (moved / "kltune.json").write_text(record.replace(str(llama), str(taken)))
    code, _, err = eval_kl(moved, *prompts)
    assert (code, "not the reference it was trained against" in err) == (5, True)
    code, document, _ = eval_kl(moved, "--reference", llama, *prompts)
    assert (code, document["own_reference"]) == (0, True)
    assert exact(document) == exact(eval_kl(run_folder, *prompts)[1])
    assert eval_kl(moved, "--reference", taken, *prompts)[0] == 5


def test_one_policy_against_several_references_in_one_pass(eval_kl, llama, two, run_folder, prompts, tmp_path):
    singles = [exact(eval_kl(two[0], "--reference", path, *prompts)[1]) for path in (two[1], run_folder)]
    own = exact(eval_kl(two[0], *prompts)[1])
    several = ("--against", two[1], "--against", run_folder)
    _, document, _ = eval_kl(two[0], *several, *prompts)
    assert exact(document) == own
    assert [exact(row) for row in document["against"]] == pytest.approx(singles, rel=1e-6)
    assert [row["reference"]["path"] for row in document["against"]] == [str(two[1]), str(run_folder)]
    # the budget holds for one and not for the other: the worst decides, and the files say which
    budget = ("--max-kl", 20 * max(own, singles[0]))
    assert singles[1] > 0
    code, document, _ = eval_kl(two[0], *several, *prompts, *budget, "--junit", tmp_path / "kl.xml")
    assert code == 0
    code, document, _ = eval_kl(two[0], *several, *prompts, "--max-kl", 1e-6, "--junit", tmp_path / "kl.xml")
    assert code == 3
    assert document["gate"]["reference"] == str(llama)
    assert [row["gate"]["reference"] for row in document["against"]] == [str(two[1]), str(run_folder)]
    names = [case.get("name") for case in ET.parse(tmp_path / "kl.xml").getroot().iter("testcase")]
    assert names == [str(two[0]), f"{two[0]} against {two[1]}", f"{two[0]} against {run_folder}"]
    text = eval_kl(two[0], *several, *prompts, as_json=False)[1]
    assert f"against {two[1]}: " in text


def test_against_and_the_other_direction_do_not_go_together(eval_kl, two, prompts):
    assert eval_kl(two[0], "--against", two[1], "--direction", "both", *prompts)[0] == 2


def test_ids_that_mean_other_tokens_are_refused(eval_kl, llama, two, prompts, tmp_path):
    # q and z are in no prompt: the rows alone would not show it
    whole = merged(llama, two[1], tmp_path / "whole")
    content = json.loads((whole / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["q"], vocabulary["z"] = vocabulary["z"], vocabulary["q"]
    (whole / "tokenizer.json").write_text(json.dumps(content))
    code, _, err = eval_kl(two[0], "--reference", whole, *prompts)
    assert code == 5
    assert "means other tokens by the same ids, 2 of them" in err
    assert "'z'" in err


def test_sample_says_which_reference_answers(command, two):
    _, document, _ = command("sample", two[0], "--reference", two[1], "--prompt", "the ", "--max-new-tokens", 4)
    assert document["reference"]["path"] == str(two[1])
    text = command("sample", two[0], "--reference", two[1], "--prompt", "the ", "--max-new-tokens", 4, as_json=False)[1]
    assert f"{two[0]} against {two[1]}" in text


def test_an_adapter_is_scaled_towards_its_own_base_only(command, two, prompts, tmp_path):
    code, _, err = command(
        "project", two[0], "--reference", two[1], "--max-kl", 1, "--output", tmp_path / "out", *prompts
    )
    assert code == 2
    assert str(two[1]) in err


def test_frontier_holds_all_runs_against_one_reference(command, two, run_folder):
    arguments = ("frontier", run_folder, "--best-of", 0, "--responses", 20)
    own, other = (command(*arguments, *more)[1] for more in ((), ("--reference", two[0])))
    assert other["reference"]["path"] == str(two[0])
    assert other["points"][0]["kl"] > own["points"][0]["kl"]


def test_frontier_draws_held_out_scores_against_kl(command, run_folder, tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps({str(run_folder): 0.4}))
    arguments = ("frontier", run_folder, "--best-of", 0, "--scores", tmp_path / "scores.json", "-o", tmp_path / "out")
    _, document, _ = command(*arguments)
    assert document["held_out"]["points"][0]["score"] == 0.4
    assert "rank correlation not known over 1 runs" in (tmp_path / "out" / "frontier.html").read_text()


# --- on a real model, against transformers and PEFT alone ------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> list[Path]:
    """Three adapters on stories260K."""
    if not STORIES.exists():
        pytest.skip(f"{STORIES} is not here")
    folder = tmp_path_factory.mktemp("stories")
    return [adapter_on(STORIES, folder / f"a{seed}", seed, spread=0.04) for seed in (1, 2, 3)]


def plain_kl(first: Path, second: Path, rows: int, tokens: int) -> tuple[float, float]:
    """KL(first ‖ second) by transformers' own sampling and PEFT's own layers: mean and standard error."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    policy, reference = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32), one).eval()
        for one in (first, second)
    )
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids.repeat(rows, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        ids = policy.generate(prompt, max_new_tokens=tokens, do_sample=True, top_k=0, top_p=1.0, temperature=1.0)
        logs = [torch.log_softmax(one(input_ids=ids).logits[:, prompt.shape[1] - 1 : -1].double(), -1)
                for one in (policy, reference)]
    said = ids[:, prompt.shape[1]:]
    ended = (said == tokenizer.eos_token_id).long()
    inside = ended.cumsum(1) - ended == 0
    nats = ((logs[0].exp() * (logs[0] - logs[1])).sum(-1) * inside).sum(1)
    return nats.mean().item(), nats.std().item() / math.sqrt(rows)


@pytest.mark.parametrize("pair", [(0, 1), (1, 2), (2, 0)])
def test_adapter_against_adapter_agrees_with_plain_transformers_and_peft(eval_kl, stories, pair, tmp_path):
    first, second = (stories[place] for place in pair)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Once upon a time"}])
    _, document, _ = eval_kl(
        first, "--reference", second, "--prompts", tmp_path / "prompts.jsonl", "--responses", 300,
        "--max-new-tokens", 16, "--show", 0,
    )
    wanted, stderr = plain_kl(first, second, 300, 16)
    assert exact(document) == pytest.approx(wanted, abs=3 * math.sqrt(2) * stderr)
    assert exact(document) > 10 * stderr


def test_two_adapters_on_one_base_take_the_memory_of_one(stories):
    def held(options: MeasureOptions) -> int:
        policy = open_subject(find_checkpoint(str(stories[0]), options), options)
        networks = {id(n): n for n in (policy.network, policy.held.network)}.values()
        storages = {t.untyped_storage().data_ptr(): t.nbytes for n in networks for t in n.causal.state_dict().values()}
        return sum(storages.values())

    assert held(MeasureOptions(reference=str(stories[1]))) <= 1.1 * held(MeasureOptions())
