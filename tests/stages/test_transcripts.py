"""Responses that were sampled elsewhere: measured if the policy said them, and refused if it did not."""

import os

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from kltune.lm.measure.transcripts import counts_z, read_transcripts
from kltune.recipe import DataSection
from kltune.run.saved_policy import MeasureOptions, find_checkpoint, open_subject
from tests.stages.conftest import HELD_OUT, PPO, write_recipe, write_rows
from tests.stages.test_references import adapter_on

ROWS, LIMIT = 30, 6     # to each prompt


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, llama):
    return adapter_on(llama, tmp_path_factory.mktemp("adapters") / "a", 1)


def sampled(llama, adapter, temperature: float, **filters) -> list[dict]:
    """Prompts and the tokens of responses by transformers' own generate."""
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()
    torch.manual_seed(0)
    rows = []
    for text in HELD_OUT:
        ids = tokenizer(text, return_tensors="pt").input_ids.repeat(ROWS, 1)
        whole = model.generate(ids, max_new_tokens=LIMIT, do_sample=True, temperature=temperature,
                               **{"top_k": 0, "top_p": 1.0} | filters)[:, ids.shape[1]:].tolist()
        for said in whole:
            said = said[: said.index(1) + 1] if 1 in said else said
            rows.append({"prompt": text, "ids": said})
    return rows


@pytest.fixture(scope="module")
def honest(llama, adapter):
    return sampled(llama, adapter, 1.0)


def arguments(tmp_path, rows, *more):
    write_rows(tmp_path / "said.jsonl", rows)
    return "--responses", tmp_path / "said.jsonl", "--max-new-tokens", LIMIT, *more


def test_what_the_policy_said_elsewhere_has_its_kl(eval_kl, adapter, honest, tmp_path):
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in HELD_OUT])
    fresh = eval_kl(adapter, "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", LIMIT,
                    "--responses", 300)[1]
    code, document, _ = eval_kl(adapter, *arguments(tmp_path, honest, "--max-kl", 50))
    assert code == 0
    assert (document["responses"], document["prompts"]) == (len(honest), len(HELD_OUT))
    assert document["recorded"] == str(tmp_path / "said.jsonl")
    mine, theirs = (one["kl"]["exact"] for one in (document, fresh))
    spread = (mine["stderr"] ** 2 + theirs["stderr"] ** 2) ** 0.5
    assert mine["nats_per_response"] == pytest.approx(theirs["nats_per_response"], abs=3 * spread)


def test_recorded_prompts_are_read_whole_or_refused(eval_kl, llama, adapter, honest, tmp_path):
    recipe = write_recipe(tmp_path / "ppo", PPO | {"data": {"prompts": "prompts.jsonl", "max_prompt_tokens": 3}}, llama)
    whole = eval_kl(adapter, *arguments(tmp_path, honest))[1]
    code, found, _ = eval_kl(adapter, *arguments(tmp_path, honest, "--recipe", recipe))
    assert (code, found["kl"], found["prompts"]) == (0, whole["kl"], len(HELD_OUT))
    for row in ({"prompt": "so " * 20, "ids": [3, 1]}, {"prompt": "so " * 20, "response": "a"}):
        rows = honest if "ids" in row else [{"prompt": "so", "response": "a"}] * 3
        code, _, err = eval_kl(adapter, *arguments(tmp_path, [*rows, row]))
        assert code == 5
        assert f"the prompts of 1 of {len(rows) + 1} rows have more than 58 tokens" in err


def test_text_is_read_as_the_tokens_that_it_was(llama, adapter, honest, tmp_path):
    # one letter is one token; special tokens are no text
    options = MeasureOptions()
    subject = find_checkpoint(str(adapter), options)
    policy = open_subject(subject, options)
    rows = [row for row in honest if not {0, 2} & set(row["ids"]) and len(row["ids"]) > 1]
    told = [{"prompt": row["prompt"], "response": policy.tokenizer.decode(row["ids"], skip_special_tokens=True)}
            for row in rows]
    read = []
    for name, written in (("ids", rows), ("text", told)):
        write_rows(tmp_path / f"{name}.jsonl", written)
        rules = policy.row_rules(DataSection(), 30)
        read.append(read_transcripts(str(tmp_path / f"{name}.jsonl"), policy, rules, LIMIT))
    assert [(prompt.ids, ids) for prompt, ids in read[0]] == [(prompt.ids, ids) for prompt, ids in read[1]]
    assert len(read[0]) > 100


def test_counts_of_an_honest_sample_are_seldom_off_and_of_another_always():
    torch.manual_seed(0)
    p = torch.rand(40, dtype=torch.float64).softmax(0)
    drawn = torch.multinomial(p, 500 * 1000, replacement=True).view(1000, 500)
    zs = torch.tensor([counts_z(row, 500 * p) for row in drawn])
    assert abs(zs.mean()) < 0.2
    assert (zs > 2).double().mean() < 0.05
    assert counts_z(drawn[0], 500 * p.flip(0)) > 4


@pytest.mark.parametrize("how", [{"temperature": 0.7}, {"temperature": 1.0, "top_k": 6}, {"temperature": 1.3}])
def test_what_was_sampled_otherwise_is_refused(eval_kl, llama, adapter, tmp_path, how):
    code, document, err = eval_kl(adapter, *arguments(tmp_path, sampled(llama, adapter, **how)))
    assert (code, document) == (5, "")
    assert "are not a sample of the policy at temperature 1" in err
    if "top_k" not in how:
        assert eval_kl(adapter, *arguments(
            tmp_path, sampled(llama, adapter, **how), "--temperature", how["temperature"]))[0] == 0


def test_what_another_model_said_is_refused(eval_kl, llama, adapter, tmp_path):
    # also where policy and reference are one and the same: no KL, and still not its words
    rows = sampled(llama, adapter, 1.0)
    assert eval_kl(llama, "--reference", llama, *arguments(tmp_path, rows))[0] == 5


@pytest.mark.parametrize(("row", "words"), [
    ({"prompt": "so", "ids": [3, 4]}, "nor at the length limit of 6"),
    ({"prompt": "so", "ids": []}, "wanted the tokens of a response"),
    ({"prompt": "so", "ids": [3, 99, 1]}, "token 99 is none of the model's 32"),
    ({"prompt": "so", "ids": "abc"}, "wanted the tokens of a response"),
    ({"prompt": "so", "ids": [3, 4], "system": "be kind"}, 'field "system": plain text has no place for it'),
])
def test_rows_that_are_no_responses_are_named(eval_kl, adapter, honest, tmp_path, row, words):
    code, _, err = eval_kl(adapter, *arguments(tmp_path, [*honest[:3], row]))
    assert code == 5
    assert "said.jsonl:4" in err
    assert words in err


def test_a_pipe_is_refused_at_once(eval_kl, adapter, tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    for option in ("--prompts", "--responses"):
        code, document, err = eval_kl(adapter, option, tmp_path / "rows.jsonl", "--max-new-tokens", LIMIT)
        assert (code, document) == (5, "")
        assert "rows.jsonl is a pipe or a device, wanted an ordinary file" in err


def test_what_takes_fresh_responses_is_refused_beside_recorded_ones(eval_kl, adapter, honest, tmp_path):
    for more in (("--auto", "--max-kl", 1), ("--top-p", 0.9), ("--direction", "both"), ("--prompts", "x.jsonl")):
        assert eval_kl(adapter, *arguments(tmp_path, honest[:3], *more))[0] == 2
    assert eval_kl(adapter, "--responses", 1, "--prompts", tmp_path / "said.jsonl")[0] == 2
    code, _, err = eval_kl(adapter, "--responses", tmp_path / "none.jsonl", "--max-new-tokens", LIMIT)
    assert code in (2, 5)
    assert "none.jsonl" in err
