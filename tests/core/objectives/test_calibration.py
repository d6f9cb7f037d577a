"""Accuracy with its interval, reliability tables, and correlations, against numbers found by hand."""

import math

import pytest
import torch

from kltune.core.kl.intervals import wilson
from kltune.core.objectives.bradley_terry import (
    Bin,
    calibration_error,
    correlation,
    pair_reliability,
    rank_correlation,
    reliability,
    win_share,
)


def test_a_tie_counts_half():
    assert win_share(torch.tensor([1.0, -1.0, 0.0, 2.0])) == 0.625
    with pytest.raises(ValueError, match="no gaps"):
        win_share(torch.tensor([]))


def test_wilsons_interval_of_a_textbook_case():
    # 8 of 10 at 95 %: 0.490 to 0.943 (Agresti and Coull 1998).
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = wilson(1.0, 50)
    assert (high, low) == (1.0, pytest.approx(1 / (1 + 1.959964**2 / 50), abs=1e-6))


def test_wilsons_interval_covers_what_it_says():
    # Exactly, over all outcomes of 40 trials; Wilson's coverage swings around its level.
    for p in (0.55, 0.7, 0.9):
        covered = sum(
            math.comb(40, k) * p**k * (1 - p) ** (40 - k)
            for k in range(41) if wilson(k / 40, 40)[0] <= p <= wilson(k / 40, 40)[1]
        )
        assert 0.92 < covered < 0.98


def test_a_reliability_table_by_hand():
    predicted = torch.tensor([0.1, 0.3, 0.3, 0.95, 1.0])
    table = reliability(predicted, torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]), bins=4)
    assert [(row.low, row.high, row.count) for row in table] == [(0.0, 0.25, 1), (0.25, 0.5, 2), (0.75, 1.0, 2)]
    assert [row.predicted for row in table] == pytest.approx([0.1, 0.3, 0.975])
    assert [row.observed for row in table] == pytest.approx([0.0, 0.5, 1.0])
    assert calibration_error(table) == pytest.approx((1 * 0.1 + 2 * 0.2 + 2 * 0.025) / 5)
    with pytest.raises(ValueError, match="outside"):
        reliability(predicted, predicted, bins=4, low=0.5)


def test_outcomes_drawn_as_predicted_are_calibrated_and_overconfident_ones_are_not():
    torch.manual_seed(0)
    truth = torch.randn(20_000)
    gaps = truth.abs() * torch.where(torch.rand(20_000) < torch.sigmoid(truth.abs()), 1.0, -1.0)
    assert calibration_error(pair_reliability(gaps)) < 0.015
    assert calibration_error(pair_reliability(5.0 * gaps)) > 0.1


def test_a_pair_is_judged_by_how_sure_the_model_is_of_its_favourite():
    (row,) = pair_reliability(torch.tensor([0.1, -0.1, 0.0]), bins=1)
    assert row == Bin(0.5, 1.0, 3, pytest.approx((2 / (1 + math.exp(-0.1)) + 0.5) / 3), pytest.approx(0.5))


def test_ranks_see_order_only_and_ties_share_theirs():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(x, x.exp()) == pytest.approx(1.0)
    assert rank_correlation(x, -x.exp()) == pytest.approx(-1.0)
    assert correlation(x, x.exp()) < 0.95
    # ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: 4.5 / √(4.5 · 5)
    assert rank_correlation(torch.tensor([1.0, 2.0, 2.0, 5.0]), x) == pytest.approx(4.5 / math.sqrt(22.5))
    assert rank_correlation(x, torch.ones(4)) is None
