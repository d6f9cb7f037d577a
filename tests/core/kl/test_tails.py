"""Quantiles, extremes and shares by hand."""

import pytest
import torch

from kltune.core.kl.sequences import tails


def test_a_hundred_and_one_responses_by_hand():
    found = tails(torch.arange(101.0))
    assert found.quantiles == pytest.approx({"0.01": 1, "0.1": 10, "0.5": 50, "0.9": 90, "0.99": 99, "0.999": 99.9})
    assert (found.minimum, found.maximum) == (0.0, 100.0)
    assert found.largest_share == pytest.approx(100 / 5050)
    assert found.kurtosis == pytest.approx(1.8, abs=1e-3)       # of a uniform distribution
    assert not found.heavy


def test_one_response_that_carries_all_is_heavy():
    found = tails(torch.tensor([0.0] * 99 + [5.0]))
    assert found.largest_share == 1.0
    assert found.heavy


def test_responses_that_are_all_alike():
    assert tails(torch.full((5,), 2.0)).kurtosis is None
    assert tails(torch.zeros(5)).largest_share == 0.0


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        tails(torch.tensor([1.0, float("nan")]))
