"""The best against the worst of each prompt's responses, as the rollout measured them."""

import json

import numpy as np
import pytest
import torch

from kltune.core.tensors import per_response
from kltune.lm.data.examples import Prompt
from kltune.lm.model.sampler import sample_rollout, uniform_numbers
from kltune.lm.rewards.judge import Judge
from kltune.train.preferences import best_against_worst, response_logprobs, win_rates
from tests.judges import part, serving

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
