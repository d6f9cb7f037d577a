"""Where the score lands, and what lies ahead of a token."""

import math

import pytest
import torch

from kltune.core.objectives.advantages import penalize, strictly_future, to_go

MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_the_score_lands_on_the_last_token_of_each_response():
    ref_kl = torch.tensor([[0.5, 0.25, -1.0], [2.0, 9.0, 9.0]])
    rewards = penalize(torch.tensor([3.0, -1.0]), ref_kl, 2.0, MASK)
    assert rewards.tolist() == [[-1.0, -0.5, 5.0], [-5.0, 0.0, 0.0]]


def test_rewards_sum_to_the_score_less_the_price():
    ref_kl = torch.tensor([[0.5, 0.25, -1.0], [2.0, 9.0, 9.0]])
    rewards = penalize(torch.tensor([3.0, -1.0]), ref_kl, 2.0, MASK)
    assert rewards.sum(-1).tolist() == [3.0 - 2.0 * -0.25, -1.0 - 2.0 * 2.0]


def test_junk_in_the_padding_is_not_charged():
    ref_kl = torch.tensor([[0.0, 0.0, 0.0], [0.0, math.nan, math.inf]])
    assert penalize(torch.zeros(2), ref_kl, 0.5, MASK)[1].tolist() == [0.0, 0.0, 0.0]


def test_rewards_carry_no_gradient():
    ref_kl = torch.ones(2, 3, requires_grad=True)
    assert not penalize(torch.ones(2, requires_grad=True), ref_kl, 0.5, MASK).requires_grad


def test_integer_scores_are_scores():
    assert penalize(torch.tensor([1, 2]), torch.zeros(2, 3), 0.1, MASK).tolist() == [[0, 0, 1], [2, 0, 0]]


def test_a_score_without_a_response_is_refused():
    with pytest.raises(ValueError, match="rows"):
        penalize(torch.zeros(2), torch.zeros(2, 2), 0.1, torch.tensor([[True, True], [False, False]]))


def test_one_score_per_response():
    with pytest.raises(ValueError, match="scores"):
        penalize(torch.zeros(3), torch.zeros(2, 3), 0.1, MASK)


def test_what_is_still_to_come_by_hand():
    x = torch.tensor([[1.0, 2.0, 4.0], [8.0, 9.0, math.nan]])
    assert to_go(x, MASK).tolist() == [[7.0, 6.0, 4.0], [8.0, 0.0, 0.0]]
    assert strictly_future(x, MASK).tolist() == [[6.0, 4.0, 0.0], [0.0, 0.0, 0.0]]
