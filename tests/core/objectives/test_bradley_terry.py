"""A reward model's losses, their gradients and minimisers in closed form; its accuracy and calibration by hand."""

import math
from functools import partial

import pytest
import torch

from kltune.core.objectives.bradley_terry import (
    Bin,
    bradley_terry_loss,
    calibration_error,
    centring_penalty,
    correlation,
    label_loss,
    pair_reliability,
    rank_correlation,
    reliability,
    win_share,
)

CHOSEN = torch.tensor([1.0, -0.5, 2.0, 0.25], dtype=torch.float64)
REJECTED = torch.tensor([0.5, 0.5, -1.0, 0.25], dtype=torch.float64)
MARGINS = torch.tensor([0.0, 1.0, 0.5, 2.0], dtype=torch.float64)
NONE = torch.zeros(4, dtype=torch.float64)


def sigma(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("margins", [NONE, MARGINS])
def test_the_loss_of_a_pair_by_hand(smoothing, margins):
    by_hand = [
        -(1 - smoothing) * math.log(sigma(c - r - m)) - smoothing * math.log(sigma(r - c - m))
        for c, r, m in zip(CHOSEN.tolist(), REJECTED.tolist(), margins.tolist(), strict=True)
    ]
    assert bradley_terry_loss(CHOSEN, REJECTED, margins, smoothing).tolist() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_gradient_of_a_pair_is_its_closed_form(smoothing):
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    bradley_terry_loss(chosen, rejected, MARGINS, smoothing).sum().backward()
    gap = CHOSEN - REJECTED
    closed = -(1 - smoothing) * torch.sigmoid(MARGINS - gap) + smoothing * torch.sigmoid(MARGINS + gap)
    assert torch.allclose(chosen.grad, closed, atol=1e-12)
    assert torch.allclose(rejected.grad, -closed, atol=1e-12)


def test_equal_scores_cost_log_two_and_no_score_is_too_large():
    assert bradley_terry_loss(NONE, NONE, NONE).tolist() == pytest.approx([math.log(2)] * 4)
    far = bradley_terry_loss(torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4]), torch.zeros(2))
    assert far.tolist() == [0.0, 2e4]


def test_smoothing_puts_the_optimum_at_a_finite_gap():
    gap = torch.tensor([math.log(0.9 / 0.1)], dtype=torch.float64, requires_grad=True)
    bradley_terry_loss(gap, torch.zeros_like(gap), torch.zeros_like(gap), 0.1).sum().backward()
    assert gap.grad.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_label_and_its_gradient_by_hand(smoothing):
    scores, labels = torch.tensor([0.3, -2.0, 1.5], dtype=torch.float64, requires_grad=True), [1.0, 0.0, 0.0]
    targets = [y * (1 - smoothing) + (1 - y) * smoothing for y in labels]
    loss = label_loss(scores, torch.tensor(labels), smoothing)
    by_hand = [
        -y * math.log(sigma(r)) - (1 - y) * math.log(sigma(-r)) for r, y in zip(scores.tolist(), targets, strict=True)
    ]
    assert loss.tolist() == pytest.approx(by_hand, abs=1e-7)
    loss.sum().backward()
    slopes = [sigma(r) - y for r, y in zip(scores.tolist(), targets, strict=True)]
    assert scores.grad.tolist() == pytest.approx(slopes, abs=1e-7)


def test_centring_penalises_the_sum_and_not_the_difference():
    chosen = torch.tensor([1.0, 3.0], requires_grad=True)
    penalty = centring_penalty(chosen, torch.tensor([-1.0, 1.0]))
    assert penalty.tolist() == [0.0, 16.0]
    penalty.sum().backward()
    assert chosen.grad.tolist() == [0.0, 8.0]


def test_the_scores_that_minimise_the_loss_of_all_comparisons_are_the_rewards():
    # Every pair of four arms, each the right way round as often as Bradley-Terry says: the minimiser is r − mean(r).
    rewards = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    first, second = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    share = torch.sigmoid(rewards[first] - rewards[second])
    scores = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        each = bradley_terry_loss(scores[first], scores[second], torch.zeros(16, dtype=torch.float64))
        value = (share * each).sum() + scores.mean().square()  # of all that fit alike, the one of mean 0
        value.backward()
        return value

    optimizer.step(loss)
    assert scores.tolist() == pytest.approx([-1.5, -0.5, 0.5, 1.5], abs=1e-5)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0, math.nan])
def test_smoothing_out_of_range_is_refused(smoothing):
    for loss in (partial(bradley_terry_loss, CHOSEN, REJECTED), partial(label_loss, CHOSEN)):
        with pytest.raises(ValueError, match="label_smoothing"):
            loss(NONE, smoothing)


@pytest.mark.parametrize("call", [
    lambda: bradley_terry_loss(CHOSEN, REJECTED[:1], NONE), lambda: label_loss(CHOSEN, NONE[:1]),
    lambda: centring_penalty(CHOSEN, REJECTED[:1]),
])
def test_shapes_that_would_broadcast_are_refused(call):
    with pytest.raises(ValueError, match="one shape"):
        call()


# accuracy and calibration


def test_a_tie_counts_half():
    assert win_share(torch.tensor([1.0, -1.0, 0.0, 2.0])) == 0.625
    with pytest.raises(ValueError, match="no gaps"):
        win_share(torch.tensor([]))


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
