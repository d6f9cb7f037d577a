"""Log-probabilities and entropies against tables worked out by hand."""

import math

import pytest
import torch

from kltune.core.tensors import log_distribution, token_logprobs

LOGITS = torch.tensor([[0.0, math.log(2.0), math.log(5.0)], [1.0, 1.0, 1.0]])     # (1, 2, 5)/8 and thirds


def test_logprobs_of_known_odds():
    got = token_logprobs(LOGITS, torch.tensor([2, 0]), 1.0)
    torch.testing.assert_close(got, torch.tensor([math.log(5 / 8), math.log(1 / 3)]))


def test_temperature_divides_the_logits():
    # at τ = ½ odds are squared: 1, 4, 25 of 30
    assert token_logprobs(LOGITS[:1], torch.tensor([1]), 0.5).item() == pytest.approx(math.log(4 / 30))


def test_bfloat16_logits_get_float32_statistics():
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.arange(50)
    got = token_logprobs(logits, tokens, 1.0)
    assert got.dtype == torch.float32
    exact = logits.double().log_softmax(-1)[torch.arange(50), tokens]
    torch.testing.assert_close(got.double(), exact, atol=2e-6, rtol=0.0)


def test_float64_logits_keep_their_precision():
    assert token_logprobs(LOGITS.double(), torch.tensor([0, 1]), 1.0).dtype == torch.float64


def test_a_constant_added_to_the_logits_changes_nothing():
    tokens = torch.tensor([2, 0])
    torch.testing.assert_close(token_logprobs(LOGITS + 64.0, tokens, 1.0), token_logprobs(LOGITS, tokens, 1.0))


def test_the_gradient_is_one_hot_minus_probabilities_over_temperature():
    logits = LOGITS[:1].clone().requires_grad_()
    token_logprobs(logits, torch.tensor([2]), 1.0).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-1 / 8, -2 / 8, 3 / 8]]))


def test_a_batch_of_sequences_works_like_a_list_of_tokens():
    assert token_logprobs(LOGITS[None], torch.tensor([[2, 0]]), 1.0).shape == (1, 2)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_no_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        log_distribution(LOGITS, temperature)


def test_a_token_without_its_row_of_logits_is_refused():
    with pytest.raises(ValueError, match="one row of logits per token"):
        token_logprobs(LOGITS, torch.tensor([1]), 1.0)
