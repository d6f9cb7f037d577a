"""Advantages by hand."""

import math

import pytest
import torch

from kltune.core.objectives.advantages import gae, group_normalized, leave_one_out, spread_within_groups

ALL = torch.ones(1, 2, dtype=torch.bool)


def test_gae_of_two_tokens_by_hand():
    # δ₁ = 2 − 1 = 1;  δ₀ = 1 + 1 − 0.5 = 1.5;  A₀ = 1.5 + 0.5·1 = 2
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 1.0]])
    advantages, returns = gae(rewards, values, ALL, gamma=1.0, gae_lambda=0.5)
    assert advantages.tolist() == [[2.0, 1.0]]
    assert returns.tolist() == [[2.5, 2.0]]


def test_discounting_by_hand():
    # γ = ½, λ = ½:  δ₁ = 4 − 2 = 2;  δ₀ = 1 + ½·2 − 3 = −1;  A₀ = −1 + ¼·2 = −½
    rewards, values = torch.tensor([[1.0, 4.0]]), torch.tensor([[3.0, 2.0]])
    advantages, returns = gae(rewards, values, ALL, gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[-0.5, 2.0]]
    assert returns.tolist() == [[2.5, 4.0]]


def test_lambda_one_gives_the_reward_to_go_as_return():
    rewards = torch.tensor([[1.0, -2.0, 4.0]])
    values = torch.tensor([[7.0, -3.0, 0.25]])
    _, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, gae_lambda=1.0)
    assert returns.tolist() == [[3.0, 2.0, 4.0]]


def test_values_past_the_end_of_a_response_count_as_zero():
    mask = torch.tensor([[True, False, False], [True, True, True]])
    rewards = torch.tensor([[1.0, math.nan, 5.0], [0.0, 0.0, 1.0]])
    values = torch.tensor([[0.25, 100.0, math.inf], [0.0, 0.0, 0.0]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    assert advantages[0].tolist() == [0.75, 0.0, 0.0]
    assert returns[0].tolist() == [1.0, 0.0, 0.0]
    assert advantages[1].tolist() == pytest.approx([0.95**2, 0.95, 1.0])


def test_perfect_values_leave_no_advantage():
    rewards, values = torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([[2.0, 2.0, 2.0]])
    advantages, _ = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, gae_lambda=0.95)
    assert advantages.tolist() == [[0.0, 0.0, 0.0]]


def test_advantages_carry_no_gradient():
    values = torch.ones(1, 2, requires_grad=True)
    advantages, returns = gae(torch.ones(1, 2), values, ALL, gamma=1.0, gae_lambda=0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad


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


@pytest.mark.parametrize("function", [leave_one_out, group_normalized])
@pytest.mark.parametrize(("rows", "group_size"), [(4, 1), (5, 2), (4, 0)])
def test_groups_that_do_not_divide_are_refused(function, rows, group_size):
    with pytest.raises(ValueError, match="group_size"):
        function(torch.zeros(rows), group_size)


def test_the_spread_that_counts_is_within_prompts():
    # variances 7 and 1 (n − 1), far apart as the prompts are: √4
    scores = torch.tensor([1.0, 2.0, 6.0, 100.0, 101.0, 102.0])
    assert spread_within_groups(scores, 3) == pytest.approx(2.0)


def test_with_one_answer_per_prompt_the_spread_is_the_batchs():
    assert spread_within_groups(torch.tensor([1.0, 2.0, 6.0]), 1) == pytest.approx(math.sqrt(7.0))
    assert spread_within_groups(torch.tensor([1.0]), 1) == 0.0
