"""Preference data under policy and reference, against the transformers model a row at a time."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from kltune.core.tensors import per_response
from kltune.errors import ModelError
from kltune.lm.data.examples import Prompt
from kltune.lm.model.sampler import sample_rollout, uniform_numbers
from kltune.lm.model.snapshot import Snapshot
from kltune.lm.rewards.judge import Judge
from kltune.recipe import DataSection
from kltune.run.caches import StoredLogprobs
from kltune.train import preferences
from kltune.train.preferences import (
    Preferences,
    best_against_worst,
    check_first_log_ratios,
    load_preferences,
    log_ratios_against,
    pair_metrics,
    response_logprobs,
    win_rates,
)
from tests.judges import part, serving
from tests.stages.conftest import write_rows
from tests.tiny_policies import plain_logprobs, randomize

PAIRS = [
    {"prompt": "w3 w4 w5 w6", "chosen": "w7", "rejected": "w8 w9 w10 w11 w12 w13"},
    {"prompt": "w14", "chosen": "w15 w16", "rejected": "w17"},
    {"prompt": "w18 w19", "chosen": "w20 w21 w22", "rejected": "w23 w24"},
]


@pytest.fixture
def pairs(trained_policy, tmp_path) -> Preferences:
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    return load_preferences(str(tmp_path / "pairs.jsonl"), trained_policy, DataSection())[0]


def plain_sums(policy, examples) -> tuple[torch.Tensor, torch.Tensor]:
    """log π and log ρ of each response, a row at a time; ρ by PEFT's own switch."""
    rows = [(torch.tensor([example.ids]), torch.tensor([example.scored])) for example in examples]
    mine = torch.stack([plain_logprobs(policy.model, *row).sum() for row in rows])
    with policy.model.disable_adapter():
        return mine, torch.stack([plain_logprobs(policy.model, *row).sum() for row in rows])


def test_log_probabilities_of_responses(trained_policy, pairs):
    mine, reference = plain_sums(trained_policy, pairs.examples)
    logprobs, tokens = response_logprobs(trained_policy, pairs)
    torch.testing.assert_close(logprobs.detach(), mine, atol=1e-4, rtol=0.0)
    assert tokens.tolist() == [2, 7, 3, 2, 4, 3]        # with the end token
    found = log_ratios_against(trained_policy, pairs.examples, trained_policy.reference())
    torch.testing.assert_close(found, mine - reference, atol=1e-4, rtol=0.0)


def test_only_the_pairs_that_are_asked_for_are_measured(trained_policy, pairs):
    assert pairs.ref_logprobs.isnan().all()
    measured = pairs.measured(trained_policy, [2, 0, 2])
    _, reference = plain_sums(trained_policy, pairs.examples)
    assert measured.ref_logprobs.isnan().tolist() == [False, False, True, True, False, False]
    there = ~measured.ref_logprobs.isnan()
    torch.testing.assert_close(measured.ref_logprobs[there], reference[there], atol=1e-4, rtol=0.0)


def test_what_is_known_of_the_reference_is_not_measured_again(trained_policy, pairs, monkeypatch, tmp_path):
    known = StoredLogprobs(tmp_path)
    first = pairs.measured(trained_policy, [2, 0], known)
    with monkeypatch.context() as patch:
        patch.setattr(preferences, "document_nats", lambda *_: pytest.fail("measured again"))
        again = pairs.measured(trained_policy, [0, 2, 0], known)
    assert torch.equal(again.ref_logprobs.view(torch.int64), first.ref_logprobs.view(torch.int64))     # NaN included
    assert len(known._known()) == 1


@pytest.mark.parametrize("other", ["data", "wanted", "groups", "temperature", "reference", "dtype", "measure"])
def test_of_anything_else_it_is_measured(trained_policy, pairs, monkeypatch, tmp_path, other):
    known = StoredLogprobs(tmp_path)
    pairs.measured(trained_policy, [0, 1], known)
    groups, policy = [0, 1], trained_policy
    if other == "data":
        pairs = pairs.select([1, 0, 2])
    elif other == "wanted":
        pairs = replace(pairs, wanted=~pairs.wanted)
    elif other == "groups":
        groups = [0, 2]
    elif other == "temperature":
        pairs = replace(pairs, temperature=0.7)
    elif other == "measure":
        monkeypatch.setattr(preferences, "MEASURE", preferences.MEASURE + 1)
    else:
        changed = {"reference": {"sha256": "0" * 64}, "dtype": {"dtype": "bfloat16"}}[other]
        monkeypatch.setattr(policy, "fingerprint", replace(policy.fingerprint, **changed))
    pairs.measured(policy, groups, known)
    assert len(known._known()) == 2


def test_another_reference_is_the_policy_as_it_is_within(trained_policy, pairs):
    other = Snapshot(trained_policy.trainable_parameters())
    mine, _ = plain_sums(trained_policy, pairs.examples)
    randomize(trained_policy.trainable_parameters(), seed=5)
    moved = pairs.against(other.in_place(), trained_policy)
    torch.testing.assert_close(moved.ref_logprobs, mine, atol=1e-4, rtol=0.0)
    assert not torch.allclose(plain_sums(trained_policy, pairs.examples)[0], mine, atol=0.1)


def test_it_is_measured_at_the_temperature_of_the_responses(trained_policy, pairs):
    cool = replace(pairs, temperature=0.7)
    found = cool.against(nullcontext(), trained_policy).ref_logprobs
    logprobs, _ = response_logprobs(trained_policy, cool)
    torch.testing.assert_close(found, logprobs.detach(), atol=1e-4, rtol=0.0)
    assert not torch.allclose(found, response_logprobs(trained_policy, pairs)[0].detach(), atol=0.1)


def test_selecting_keeps_the_sides_of_a_pair_together(pairs):
    some = pairs.select([2, 0])
    assert len(some) == 2
    assert some.examples == (*pairs.examples[4:], *pairs.examples[:2])
    assert some.wanted.tolist() == [True, False, True, False]


def test_the_length_of_a_pair_is_that_of_its_longer_side(pairs):
    assert pairs.lengths == [11, 4, 6]


def test_held_out_pairs_by_hand(trained_policy, pairs):
    mine, reference = plain_sums(trained_policy, pairs.examples)
    ratio = mine - reference
    margins = ratio[0::2] - ratio[1::2]
    found = pair_metrics(trained_policy, pairs.measured(trained_policy, range(3)))
    assert found["eval/accuracy"] == pytest.approx((margins > 0).double().mean().item())
    assert found["eval/margin_nats"] == pytest.approx(margins.mean().item(), abs=1e-4)
    assert found["eval/margin_stderr"] == pytest.approx(margins.std().item() / 3**0.5, abs=1e-4)
    assert found["eval/chosen_log_ratio_nats"] == pytest.approx(ratio[0::2].mean().item(), abs=1e-4)
    assert found["eval/rejected_log_ratio_nats"] == pytest.approx(ratio[1::2].mean().item(), abs=1e-4)


def test_a_policy_that_is_not_its_reference_before_the_first_step_is_refused(policy):
    check_first_log_ratios(torch.tensor([1e-5, -1e-4]), torch.tensor([1, 4]), policy)
    with pytest.raises(ModelError, match="Before any update"):
        check_first_log_ratios(torch.tensor([0.0, 0.01]), torch.tensor([1, 4]), policy)
    with pytest.raises(ModelError, match="differs by nan"):
        check_first_log_ratios(torch.tensor([0.0, torch.nan]), torch.tensor([1, 4]), policy)


def test_the_hash_is_of_tokens_and_what_was_wanted(pairs):
    assert pairs.sha256() == pairs.select([0, 1, 2]).sha256()
    assert pairs.sha256() != pairs.select([0, 2, 1]).sha256()


# --- pairs of its own: the best against the worst of each prompt's responses ------------------------------------------

PROMPTS = [Prompt(tuple(ids), f"p{ids[0]}", "prompts.jsonl:1") for ids in ([3, 4], [9], [20, 21, 22])]
PER_PROMPT = 3


@pytest.fixture
def rollout(trained_policy):
    uniforms = uniform_numbers(np.random.default_rng(3), PER_PROMPT * len(PROMPTS), 12)
    return sample_rollout(trained_policy, PROMPTS, uniforms, temperature=0.7)


def tokens(rollout, row: int) -> list[int]:
    return rollout.ids[row, : int(rollout.scored[row].nonzero()[-1]) + 1].tolist()


def test_of_each_prompt_the_best_is_chosen_over_the_worst(rollout):
    scores = torch.tensor([1.0, 3.0, 2.0, -1.0, -1.0, -2.0, 5.0, 0.0, 5.0])
    pairs = best_against_worst(rollout, scores, PER_PROMPT, 0.7)
    assert (len(pairs), pairs.group, pairs.wanted.tolist()) == (3, 2, [True, False] * 3)
    for example, row in zip(pairs.examples, (1, 0, 3, 5, 6, 7), strict=True):
        assert list(example.ids) == tokens(rollout, row)
        assert sum(example.scored) == int(rollout.lengths[row])
        assert example.ids[: example.scored.index(True)] == PROMPTS[row // PER_PROMPT].ids


def test_policy_and_reference_are_what_the_rollout_measured_at_its_temperature(trained_policy, rollout):
    pairs = best_against_worst(rollout, torch.arange(9.0), PER_PROMPT, 0.7)
    rows = [2, 0, 5, 3, 8, 6]
    reference = per_response(rollout.ref_logprobs, rollout.response_mask)[rows]
    torch.testing.assert_close(pairs.ref_logprobs, reference.double(), atol=1e-5, rtol=0.0)
    assert pairs.ref_logprobs.dtype == torch.float64
    logprobs, lengths = response_logprobs(trained_policy, pairs)
    mine = per_response(rollout.logprobs, rollout.response_mask)[rows]
    torch.testing.assert_close(logprobs.detach(), mine.double(), atol=1e-4, rtol=0.0)
    assert lengths.tolist() == rollout.lengths[rows].tolist()
    assert (logprobs.detach() - pairs.ref_logprobs).abs().max() > 0.1


def test_ties_give_no_pair(rollout):
    pairs = best_against_worst(rollout, torch.tensor([0.5] * 3 + [0.0, 0.0, 0.1] + [2.0] * 3), PER_PROMPT, 0.7)
    assert [list(example.ids) for example in pairs.examples] == [tokens(rollout, 5), tokens(rollout, 3)]
    assert best_against_worst(rollout, torch.ones(9), PER_PROMPT, 0.7) is None


def test_the_same_tokens_are_a_tie_whatever_they_score(trained_policy):
    uniforms = uniform_numbers(np.random.default_rng(3), 1, 12).repeat(2, 1)
    rollout = sample_rollout(trained_policy, PROMPTS[:1], uniforms, temperature=1.0)
    assert tokens(rollout, 0) == tokens(rollout, 1)
    assert best_against_worst(rollout, torch.tensor([1.0, 0.0]), 2, 1.0) is None


def test_win_rates_are_the_mean_over_the_others_of_the_prompt():
    responses = ["aaa", "a", "aa", "bb", "b", "cc"]       # by length: 1, 0, ½ and a tie of the two long ones

    def longer(number, question):
        a, b = len(part(question, "response A")), len(part(question, "response B"))
        return json.dumps({"better": "tie" if a == b else "A" if a > b else "B"})

    with serving(longer) as endpoint:
        rates = win_rates(Judge(endpoint.entry(mode="pair"), "j"), ["p"] * 3 + ["q"] * 3, responses, 3)
    assert rates.tolist() == [1.0, 0.0, 0.5, 0.75, 0.0, 0.75]
    assert len(endpoint.asked) == 2 * 3 * 2
    together = [body["messages"][0]["content"] for body in endpoint.asked]
    assert not any("\naa\n" in question and "\nbb\n" in question for question in together)
