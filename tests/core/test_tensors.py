"""Log-probabilities by hand; padding never reaches a number, and equal values never become NaN."""

import math

import pytest
import torch

from kltune.core.tensors import (
    at_least_float32,
    close,
    expect_leading_mask,
    expect_same_shape,
    log_distribution,
    masked_mean,
    masked_whiten,
    per_response,
    token_logprobs,
)

LOGITS = torch.tensor([[0.0, math.log(2.0), math.log(5.0)], [1.0, 1.0, 1.0]])     # (1, 2, 5)/8 and thirds
MASK = torch.tensor([[True, True, False], [True, False, False]])


# log-probabilities


def test_logprobs_of_known_odds():
    got = token_logprobs(LOGITS[None], torch.tensor([[2, 0]]), 1.0)
    torch.testing.assert_close(got, torch.tensor([[math.log(5 / 8), math.log(1 / 3)]]))


def test_temperature_divides_the_logits():
    # at τ = ½ odds are squared: 1, 4, 25 of 30
    assert token_logprobs(LOGITS[:1], torch.tensor([1]), 0.5).item() == pytest.approx(math.log(4 / 30))


def test_bfloat16_logits_get_float32_statistics_and_float64_ones_keep_theirs():
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.arange(50)
    got, exact = token_logprobs(logits, tokens, 1.0), token_logprobs(logits.double(), tokens, 1.0)
    assert (got.dtype, exact.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(exact, logits.double().log_softmax(-1)[torch.arange(50), tokens])
    torch.testing.assert_close(got.double(), exact, atol=2e-6, rtol=0.0)


def test_a_constant_added_to_the_logits_changes_nothing():
    tokens = torch.tensor([2, 0])
    torch.testing.assert_close(token_logprobs(LOGITS + 64.0, tokens, 1.0), token_logprobs(LOGITS, tokens, 1.0))


def test_the_gradient_is_one_hot_minus_probabilities():
    logits = LOGITS[:1].clone().requires_grad_()
    token_logprobs(logits, torch.tensor([2]), 1.0).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-1 / 8, -2 / 8, 3 / 8]]))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_no_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        log_distribution(LOGITS, temperature)


def test_a_token_without_its_row_of_logits_is_refused():
    with pytest.raises(ValueError, match="one row of logits per token"):
        token_logprobs(LOGITS, torch.tensor([1]), 1.0)


# shapes and masks


def test_shapes_that_would_broadcast_are_refused_by_name():
    expect_same_shape(a=torch.zeros(2, 3), b=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"logprobs \[2, 3\].*mask \[2, 1\]"):
        expect_same_shape(logprobs=torch.zeros(2, 3), mask=torch.zeros(2, 1))


@pytest.mark.parametrize(
    "rows", [[[False, True]], [[True, False, True]], [[False, False]], [[True, True], [False, False]], [[]]]
)
def test_a_mask_with_an_empty_row_or_a_hole_is_refused(rows):
    expect_leading_mask(MASK)
    with pytest.raises(ValueError, match="rows"):
        expect_leading_mask(torch.tensor(rows, dtype=torch.bool))


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(ValueError, match="bool"):
        expect_leading_mask(torch.ones(2, 3))


def test_float64_stays_and_bfloat16_widens():
    assert at_least_float32(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32


# means, sums and whitening


def test_the_mean_counts_tokens_not_responses():
    x = torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]])
    assert masked_mean(x, MASK).item() == pytest.approx(3.0)      # (1 + 2 + 6) / 3


@pytest.mark.parametrize("junk", [math.nan, math.inf, -1e30])
def test_junk_in_the_padding_changes_nothing(junk):
    x = torch.tensor([[1.0, 2.0, 0.0], [6.0, 0.0, 0.0]])
    junked = torch.where(MASK, x, junk).requires_grad_()
    assert torch.equal(masked_mean(junked, MASK), masked_mean(x, MASK))
    assert torch.equal(masked_whiten(junked, MASK), masked_whiten(x, MASK))
    sums = per_response(junked, MASK)
    assert sums.tolist() == [3.0, 6.0]
    sums.sum().backward()
    assert torch.equal(junked.grad, MASK.float())


def test_no_mean_over_no_tokens():
    with pytest.raises(ValueError, match="empty"):
        masked_mean(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool))


def test_whitening_by_hand():
    # 1, 2, 6: mean 3, variance (4 + 1 + 9) / 3
    white = masked_whiten(torch.tensor([[1.0, 2.0, 7.0], [6.0, 7.0, 7.0]]), MASK)
    sd = math.sqrt(14 / 3)
    torch.testing.assert_close(white, torch.tensor([[-2 / sd, -1 / sd, 0.0], [3 / sd, 0.0, 0.0]]))
    assert (white[~MASK] == 0).all()


@pytest.mark.parametrize(("value", "shape"), [(0.0, (5, 7)), (0.1, (5, 7)), (-1 / 3, (5, 7)), (1e6 / 7, (5, 7)),
                                              (5.0, (1, 1))])
def test_whitening_equal_values_gives_exactly_zero(value, shape):
    mask = torch.ones(shape, dtype=torch.bool)
    assert (masked_whiten(torch.full(shape, value), mask, floor=1e-30) == 0).all()


def test_the_floor_keeps_a_tiny_spread_tiny():
    # sd 1e-4, floor 1e-2: divided by the floor, ±1e-4 becomes ±1e-2 and not ±1
    mask = torch.ones(1, 2, dtype=torch.bool)
    white = masked_whiten(torch.tensor([[1e-4, -1e-4]]), mask, floor=1e-2)
    torch.testing.assert_close(white, torch.tensor([[1e-2, -1e-2]]))
    with pytest.raises(ValueError, match="floor"):
        masked_whiten(torch.ones(1, 2), mask, floor=0.0)


@pytest.mark.parametrize(("dtype", "gap", "same"), [
    (torch.float32, 0.9e-4, True), (torch.float32, 1.1e-4, False), (torch.bfloat16, 0.04, True),
    (torch.bfloat16, 0.07, False), (torch.float32, torch.nan, False),
])
def test_close_is_measured_by_the_largest_in_the_dtype_of_what_is_wanted(dtype, gap, same):
    wanted = torch.tensor([1.0, -4.0], dtype=dtype)
    assert close(wanted + torch.tensor([4.0 * gap, 0.0], dtype=dtype), wanted) is same
