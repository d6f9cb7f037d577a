"""The losses by hand; what their gradients are worth is in test_losses_gradients.py."""

import math

import pytest
import torch

from kltune.core.objectives.losses import (
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    exact_kl_loss,
    k2_kl_loss,
)

MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_the_policy_loss_by_hand():
    # ratios 1.5, 0.5, 0.5 with advantages 1, 1, −1 and ε = .2:
    # min(1.5, 1.2) = 1.2;  min(.5, .8) = .5;  min(−.5, −.8) = −.8;  −(1.2 + .5 − .8)/3
    ratios = torch.tensor([[1.5, 0.5, 9.0], [0.5, 9.0, 9.0]])
    advantages = torch.tensor([[1.0, 1.0, 9.0], [-1.0, 9.0, 9.0]])
    loss = clipped_policy_loss(ratios.log(), torch.zeros(2, 3), advantages, MASK, clip_range=0.2, tokens=3)
    assert loss.item() == pytest.approx(-0.3)


def test_beyond_the_clip_there_is_no_gradient_outward_but_one_back():
    logprobs = torch.tensor([[1.5, 0.5, 1.0], [0.5, 1.0, 1.0]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 1.0, 1.0]])
    clipped_policy_loss(logprobs, torch.zeros(2, 3), advantages, MASK, clip_range=0.2, tokens=3).backward()
    # gained enough: 0; must come back up: −w/3; pushed down enough: 0
    assert logprobs.grad.tolist() == [pytest.approx([0.0, -0.5 / 3, 0.0]), [0.0, 0.0, 0.0]]


def test_at_the_old_policy_the_gradient_is_the_policy_gradient():
    logprobs = torch.tensor([[-1.0, -2.0, math.nan], [-3.0, -math.inf, 0.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -2.0, math.nan], [4.0, 1.0, 1.0]])
    clipped_policy_loss(logprobs, logprobs.detach().clone(), advantages, MASK, clip_range=0.2, tokens=3).backward()
    assert logprobs.grad.tolist() == [pytest.approx([-1 / 3, 2 / 3, 0.0]), pytest.approx([-4 / 3, 0.0, 0.0])]


@pytest.mark.parametrize(("clip_range", "squares"), [(0.2, 0.64 + 4.0 + 0.81), (math.inf, 0.0 + 4.0 + 0.81)])
def test_the_value_loss_by_hand(clip_range, squares):
    # R = 1, V_old = 0, ε = .2.  V = 1: max(0, (.2−1)²) = .64;  V = −1: max(4, (−.2−1)² = 1.44) = 4;  V = .1: .81
    values = torch.tensor([[1.0, -1.0, 7.0], [0.1, 7.0, 7.0]])
    loss = clipped_value_loss(values, torch.zeros(2, 3), torch.ones(2, 3), MASK, clip_range, tokens=3)
    assert loss.item() == pytest.approx(0.5 * squares / 3)


def test_micro_batches_add_up():
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = torch.randn(3, 6, 4, generator=generator)
    mask = torch.arange(4) < torch.tensor([[1], [4], [2], [3], [4], [1]])
    losses = {
        "policy": lambda rows: clipped_policy_loss(new[rows], old[rows], advantages[rows], mask[rows], 0.2, tokens=15),
        "value": lambda rows: clipped_value_loss(new[rows], old[rows], advantages[rows], mask[rows], 0.2, tokens=15),
        "exact": lambda rows: exact_kl_loss(new[rows].square(), old[rows], new[rows], mask[rows], responses=6),
        "k2": lambda rows: k2_kl_loss(new[rows], old[rows], advantages[rows], mask[rows], responses=6),
        "clipped": lambda rows: clip_fraction(new[rows], old[rows], mask[rows], 0.2, tokens=15),
    }
    for name, loss in losses.items():
        parts = loss(slice(0, 1)) + loss(slice(1, 4)) + loss(slice(4, 6))
        torch.testing.assert_close(parts, loss(slice(None)), msg=name)


def test_the_clip_fraction_counts_response_tokens_only():
    ratios = torch.tensor([[1.5, 1.1, 9.0], [0.5, 9.0, 9.0]])
    fraction = clip_fraction(ratios.log(), torch.zeros(2, 3), MASK, clip_range=0.2, tokens=3)
    assert fraction.item() == pytest.approx(2 / 3)


def test_the_exact_loss_is_the_divergence_and_credits_a_token_with_the_later_ones_only():
    exact = torch.tensor([[0.5, 0.25, 9.0], [2.0, 9.0, 9.0]], requires_grad=True)
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]], requires_grad=True)
    loss = exact_kl_loss(exact, logprobs, logprobs.detach(), MASK, responses=2)
    loss.backward()
    assert loss.item() == pytest.approx((0.75 + 2.0) / 2)
    assert logprobs.grad.tolist() == [[0.125, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert exact.grad.tolist() == [[0.5, 0.5, 0.0], [0.5, 0.0, 0.0]]


def test_the_k2_loss_squares_the_whole_response():
    # U = 1 − 3 = −2 and U = 2:  (½·4 + ½·4)/2 = 2, and dloss/du = U/2 at each token
    logprobs = torch.tensor([[1.0, -3.0, 9.0], [2.0, 9.0, 9.0]], requires_grad=True)
    loss = k2_kl_loss(logprobs, torch.zeros(2, 3), logprobs.detach(), MASK, responses=2)
    loss.backward()
    assert loss.item() == pytest.approx(2.0)
    assert logprobs.grad.tolist() == [[-1.0, -1.0, 0.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize("count", [0, -1, math.nan])
def test_a_count_below_one_is_refused(count):
    with pytest.raises(ValueError, match="tokens"):
        clipped_policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), MASK, 0.2, tokens=count)


@pytest.mark.parametrize(("loss", "third"), [(clipped_policy_loss, "advantages"), (clipped_value_loss, "returns")])
def test_losses_refuse_shapes_that_would_broadcast(loss, third):
    with pytest.raises(ValueError, match=third):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1), MASK, 0.2, tokens=3)
