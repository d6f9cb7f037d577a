"""Advantages by hand; where the score lands, and what lies ahead of a token."""

import math

import pytest
import torch

from kltune.core.objectives.advantages import (
    gae,
    group_normalized,
    leave_one_out,
    penalize,
    spread,
    spread_within_groups,
    strictly_future,
    to_go,
)

MASK = torch.tensor([[True, True, True], [True, False, False]])


@pytest.mark.parametrize(
    ("rewards", "values", "gamma", "gae_lambda", "advantages"),
    [
        # δ₁ = 2 − 1 = 1;  δ₀ = 1 + 1 − 0.5 = 1.5;  A₀ = 1.5 + 0.5·1 = 2
        ([1.0, 2.0], [0.5, 1.0], 1.0, 0.5, [2.0, 1.0]),
        # γ = ½, λ = ½:  δ₁ = 4 − 2 = 2;  δ₀ = 1 + ½·2 − 3 = −1;  A₀ = −1 + ¼·2 = −½
        ([1.0, 4.0], [3.0, 2.0], 0.5, 0.5, [-0.5, 2.0]),
        # λ = 1: the reward to go, 3, 2, 4, less the value
        ([1.0, -2.0, 4.0], [7.0, -3.0, 0.25], 1.0, 1.0, [-4.0, 5.0, 3.75]),
        # perfect values leave no advantage
        ([0.0, 0.0, 2.0], [2.0, 2.0, 2.0], 1.0, 0.95, [0.0, 0.0, 0.0]),
    ],
)
def test_gae_by_hand(rewards, values, gamma, gae_lambda, advantages):
    rewards, values = torch.tensor([rewards]), torch.tensor([values], requires_grad=True)
    found, returns = gae(rewards, values, torch.ones_like(rewards, dtype=torch.bool), gamma, gae_lambda)
    assert found.tolist() == [advantages]
    assert torch.equal(returns, found + values)
    assert (found.requires_grad, returns.requires_grad) == (False, False)


def test_values_past_the_end_of_a_response_count_as_zero():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [1.0, math.nan, 5.0]])
    values = torch.tensor([[0.0, 0.0, 0.0], [0.25, 100.0, math.inf]])
    advantages, returns = gae(rewards, values, MASK, gamma=1.0, gae_lambda=0.95)
    assert advantages[0].tolist() == pytest.approx([0.95**2, 0.95, 1.0])
    assert advantages[1].tolist() == [0.75, 0.0, 0.0]
    assert returns[1].tolist() == [1.0, 0.0, 0.0]


def test_gae_refuses_a_mask_with_a_hole():
    with pytest.raises(ValueError, match="rows"):
        gae(torch.ones(1, 3), torch.ones(1, 3), torch.tensor([[True, False, True]]), gamma=1.0, gae_lambda=1.0)


def test_leave_one_out_by_hand():
    # (1, 2, 6): against means of the others 4, 3.5, 1.5;  (5, 5, 2): 3.5, 3.5, 5
    advantages = leave_one_out(torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 2.0]), 3)
    assert advantages.tolist() == pytest.approx([-3.0, -1.5, 4.5, 1.5, 1.5, -3.0])


@pytest.mark.parametrize("value", [0.1, -7 / 3, 1e6 / 7])
def test_equal_answers_have_exactly_no_advantage(value):
    scores = torch.full((12,), value)
    assert (leave_one_out(scores, 6) == 0).all()
    assert (group_normalized(scores, 6, floor=1e-30) == 0).all()


def test_group_normalized_by_hand():
    # (1, 2, 6): mean 3, sd √((4 + 1 + 9)/2) = √7
    advantages = group_normalized(torch.tensor([1.0, 2.0, 6.0]), 3)
    assert advantages.tolist() == pytest.approx([-2 / math.sqrt(7), -1 / math.sqrt(7), 3 / math.sqrt(7)])


def test_the_floor_keeps_near_equal_answers_near_zero():
    advantages = group_normalized(torch.tensor([0.0, 2e-3]), 2, floor=0.1)
    assert advantages.tolist() == pytest.approx([-0.01, 0.01])
    with pytest.raises(ValueError, match="floor"):
        group_normalized(torch.tensor([0.0, 1.0]), 2, floor=0.0)


@pytest.mark.parametrize("function", [leave_one_out, group_normalized])
@pytest.mark.parametrize(("rows", "group_size"), [(4, 1), (5, 2), (4, 0)])
def test_groups_that_do_not_divide_are_refused(function, rows, group_size):
    with pytest.raises(ValueError, match="group_size"):
        function(torch.zeros(rows), group_size)


def test_the_spread_that_counts_is_within_prompts():
    # variances 7 and 1 (n − 1), far apart as the prompts are: √4
    scores = torch.tensor([1.0, 2.0, 6.0, 100.0, 101.0, 102.0])
    assert spread_within_groups(scores, 3) == pytest.approx(2.0)
    # with one answer per prompt it is the batch's
    assert spread_within_groups(torch.tensor([1.0, 2.0, 6.0]), 1) == pytest.approx(math.sqrt(7.0))
    assert spread_within_groups(torch.tensor([1.0]), 1) == 0.0


@pytest.mark.parametrize("scores", [torch.full((64,), 0.1), torch.tensor([0.3, 0.29999998]), torch.full((7,), -52.9)])
def test_scores_that_rounding_alone_tells_apart_have_no_spread(scores):
    assert spread(scores) == spread_within_groups(scores, 1) == 0.0
    assert spread(1e-4 * torch.arange(7.0) + scores[0]) == pytest.approx(2.16e-4, rel=0.01)


# rewards


def test_the_score_lands_on_the_last_token_and_junk_in_the_padding_is_not_charged():
    ref_kl = torch.tensor([[0.5, 0.25, -1.0], [2.0, math.nan, math.inf]], requires_grad=True)
    rewards = penalize(torch.tensor([3.0, -1.0]), ref_kl, 2.0, MASK)
    assert rewards.tolist() == [[-1.0, -0.5, 5.0], [-5.0, 0.0, 0.0]]
    assert not rewards.requires_grad


def test_integer_scores_are_scores():
    assert penalize(torch.tensor([1, 2]), torch.zeros(2, 3), 0.1, MASK).tolist() == [[0, 0, 1], [2, 0, 0]]


def test_a_score_without_a_response_and_a_response_without_a_score_are_refused():
    with pytest.raises(ValueError, match="rows"):
        penalize(torch.zeros(2), torch.zeros(2, 2), 0.1, torch.tensor([[True, True], [False, False]]))
    with pytest.raises(ValueError, match="scores"):
        penalize(torch.zeros(3), torch.zeros(2, 3), 0.1, MASK)


def test_what_is_still_to_come_by_hand():
    x = torch.tensor([[1.0, 2.0, 4.0], [8.0, 9.0, math.nan]])
    assert to_go(x, MASK).tolist() == [[7.0, 6.0, 4.0], [8.0, 0.0, 0.0]]
    assert strictly_future(x, MASK).tolist() == [[6.0, 4.0, 0.0], [0.0, 0.0, 0.0]]
