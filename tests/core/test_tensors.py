"""Padding never reaches a number, and equal values never become NaN."""

import math

import pytest
import torch

from kltune.core.tensors import (
    at_least_float32,
    expect_leading_mask,
    expect_same_shape,
    masked_mean,
    masked_whiten,
    per_response,
)

MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_shapes_that_would_broadcast_are_refused_by_name():
    with pytest.raises(ValueError, match=r"logprobs \[2, 3\].*mask \[2, 1\]"):
        expect_same_shape(logprobs=torch.zeros(2, 3), mask=torch.zeros(2, 1))


def test_equal_shapes_are_accepted():
    expect_same_shape(a=torch.zeros(2, 3), b=torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    "rows", [[[False, True]], [[True, False, True]], [[False, False]], [[True, True], [False, False]], [[]]]
)
def test_a_mask_with_an_empty_row_or_a_hole_is_refused(rows):
    with pytest.raises(ValueError, match="rows"):
        expect_leading_mask(torch.tensor(rows, dtype=torch.bool))


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(ValueError, match="bool"):
        expect_leading_mask(torch.ones(2, 3))


def test_a_leading_mask_is_accepted():
    expect_leading_mask(MASK)


def test_float64_stays_and_bfloat16_widens():
    assert at_least_float32(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_mean_counts_tokens_not_responses():
    x = torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]])
    assert masked_mean(x, MASK).item() == pytest.approx(3.0)      # (1 + 2 + 6) / 3


@pytest.mark.parametrize("junk", [math.nan, math.inf, -1e30])
def test_junk_in_the_padding_changes_nothing(junk):
    x = torch.tensor([[1.0, 2.0, 0.0], [6.0, 0.0, 0.0]])
    junked = torch.where(MASK, x, junk)
    assert torch.equal(masked_mean(junked, MASK), masked_mean(x, MASK))
    assert torch.equal(masked_whiten(junked, MASK), masked_whiten(x, MASK))
    assert torch.equal(per_response(junked, MASK), torch.tensor([3.0, 6.0]))


def test_junk_in_the_padding_sends_no_gradient():
    x = torch.tensor([[1.0, 2.0, math.inf], [6.0, math.nan, 0.0]], requires_grad=True)
    per_response(x, MASK).sum().backward()
    assert torch.equal(x.grad, MASK.float())


def test_no_mean_over_no_tokens():
    with pytest.raises(ValueError, match="empty"):
        masked_mean(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool))


def test_whitening_by_hand():
    # 1, 2, 6: mean 3, variance (4 + 1 + 9) / 3
    white = masked_whiten(torch.tensor([[1.0, 2.0, 7.0], [6.0, 7.0, 7.0]]), MASK)
    sd = math.sqrt(14 / 3)
    expected = torch.tensor([[-2 / sd, -1 / sd, 0.0], [3 / sd, 0.0, 0.0]])
    torch.testing.assert_close(white, expected)
    assert (white[~MASK] == 0).all()


def test_whitening_one_token_gives_zero():
    assert masked_whiten(torch.tensor([[5.0, 9.0]]), torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e6 / 7])
def test_whitening_equal_values_gives_exactly_zero(value):
    x = torch.full((5, 7), value)
    assert (masked_whiten(x, torch.ones(5, 7, dtype=torch.bool), floor=1e-30) == 0).all()


def test_the_floor_keeps_a_tiny_spread_tiny():
    # sd 1e-4, floor 1e-2: divided by the floor, ±1e-4 becomes ±1e-2 and not ±1
    x = torch.tensor([[1e-4, -1e-4]])
    white = masked_whiten(x, torch.ones(1, 2, dtype=torch.bool), floor=1e-2)
    torch.testing.assert_close(white, torch.tensor([[1e-2, -1e-2]]))


def test_whitening_refuses_a_floor_of_zero():
    with pytest.raises(ValueError, match="floor"):
        masked_whiten(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), floor=0.0)
