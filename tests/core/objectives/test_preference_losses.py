"""Preference losses by hand, their slopes in closed form, and what they are minimised by where all can be listed."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kltune.core.objectives.preferences import (
    bco_loss,
    chi_po_loss,
    divergence_loss,
    dynamic_beta,
    hinge_loss,
    ipo_loss,
    kto_loss,
    mismatch_point,
    orpo_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)
from tests.oracles import BANDIT_REFERENCE, BANDIT_REWARDS, kl, tilt

LOG2 = math.log(2.0)
MARGINS = torch.tensor([-30.0, -2.0, -0.3, 0.0, 0.7, 4.0, 25.0], dtype=torch.float64)
WANTED = torch.tensor([True, False])


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigma(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + torch.exp(-x))


def slope(loss: Callable[[Tensor], Tensor], at: Tensor = MARGINS) -> Tensor:
    at = at.clone().requires_grad_()
    return torch.autograd.grad(loss(at).sum(), at)[0]


# values by hand


def test_a_dynamic_beta_by_hand():
    # .1 · (1 + .6 · 2), .1 · (1 − .6 · 0.5), and .1 · (1 − .6 · 5) = −.2, of which a hundredth of .1 is left
    found = [dynamic_beta(0.1, 0.6, margin, usual=1.0) for margin in (3.0, 0.5, 1.0, -4.0)]
    assert found == pytest.approx([0.22, 0.07, 0.1, 0.001])


CHOSEN, REJECTED = tensor(LOG2), tensor(-LOG2)       # t = 2 and ½
RIGHT, WRONG = math.log(4 / 3), math.log(4.0)       # −log σ(ln 3) = −log ¾, and −log ¼ of the other label
LOG3 = math.log(3.0)


def costs(gap: float) -> list[float]:
    """−log σ(gap)."""
    return [math.log1p(math.exp(-gap))]


@pytest.mark.parametrize(("loss", "values"), [
    (lambda: sigmoid_loss(tensor(LOG3 / 0.1, 0.0), 0.1), [RIGHT, LOG2]),
    (lambda: sigmoid_loss(tensor(LOG3), 1.0, 0.1), [0.9 * RIGHT + 0.1 * WRONG]),
    (lambda: robust_loss(tensor(LOG3), 1.0, 0.1), [(0.9 * RIGHT - 0.1 * WRONG) / 0.8]),
    (lambda: ipo_loss(tensor(1.0, 5.0), 0.1), [16.0, 0.0]),
    (lambda: hinge_loss(tensor(-1.0, 4.0, 20.0), 0.1), [1.1, 0.6, 0.0]),
    # β (ℓ − z₀) = ln 3 and −ln 3: 1 − ¾ of the weight for the wanted; 1 − σ(ln 3) for the other
    (lambda: kto_loss(tensor(1.0 + LOG3 / 0.5, 1.0 - LOG3 / 0.5), WANTED, 1.0, 0.5, 2.0, 3.0), [0.5, 0.75]),
    # βℓ − δ = ln 3 in both: −log ¾ where wanted, −log ¼ where not
    (lambda: bco_loss(tensor(*[(LOG3 + 0.2) / 0.1] * 2), WANTED, 0.2, 0.1), [RIGHT, WRONG]),
    # log t;  −1/t: −½ + 2;  log(2t/(1+t)): log 4/3 − log 2/3;  α = ½: −2(2^−½ − 2^½);  t + log t
    (lambda: divergence_loss(CHOSEN, REJECTED, 0.3, "reverse_kl", 0.5), costs(0.3 * 2 * LOG2)),
    (lambda: divergence_loss(CHOSEN, REJECTED, 0.3, "forward_kl", 0.5), costs(0.3 * 1.5)),
    (lambda: divergence_loss(CHOSEN, REJECTED, 0.3, "js", 0.5), costs(0.3 * LOG2)),
    (lambda: divergence_loss(CHOSEN, REJECTED, 0.3, "alpha", 0.5), costs(0.3 * 2 * (2**0.5 - 2**-0.5))),
    (lambda: chi_po_loss(CHOSEN, REJECTED, 0.3, math.inf), costs(0.3 * (1.5 + 2 * LOG2))),
    (lambda: chi_po_loss(CHOSEN, REJECTED, 0.3, 0.1), costs(0.2)),      # clipped at twice the limit
    # p̄ = log ½ and log ¼ have odds 1 and ⅓
    (lambda: orpo_loss(tensor(-LOG2), tensor(-2 * LOG2), 0.2), [LOG2 + 0.2 * RIGHT]),
    (lambda: simpo_loss(tensor(-LOG2), tensor(-2 * LOG2), 2.0, 0.5), costs(2 * LOG2 - 0.5)),
])
def test_a_loss_by_hand(loss, values):
    assert loss().tolist() == pytest.approx(values)


def test_robust_on_flipped_labels_is_the_plain_loss_on_clean_ones():
    flipped = 0.75 * robust_loss(MARGINS, 0.7, 0.25) + 0.25 * robust_loss(-MARGINS, 0.7, 0.25)
    torch.testing.assert_close(flipped, sigmoid_loss(MARGINS, 0.7), atol=1e-12, rtol=0.0)


def test_the_point_of_reference_is_never_negative_and_takes_no_gradient():
    assert mismatch_point(tensor(1.0, 2.0).requires_grad_()) == 1.5
    assert mismatch_point(tensor(-1.0, 0.5)) == 0.0


def test_the_divergences_meet_where_they_should():
    chosen, rejected = MARGINS / 10, MARGINS.flip(0) / 7
    plain = divergence_loss(chosen, rejected, 0.4, "reverse_kl")
    torch.testing.assert_close(plain, sigmoid_loss(chosen - rejected, 0.4))
    torch.testing.assert_close(divergence_loss(chosen, rejected, 0.4, "alpha", 1.0 + 1e-7), plain, atol=1e-6, rtol=0)
    forward = divergence_loss(chosen, rejected, 0.4, "forward_kl")
    torch.testing.assert_close(divergence_loss(chosen, rejected, 0.4, "alpha", 0.0), forward)


@pytest.mark.parametrize(("name", "alpha", "words"), [("kl", 0.5, "reverse_kl"), ("alpha", 1.0, "alpha is 1")])
def test_a_divergence_that_is_none_is_refused(name, alpha, words):
    with pytest.raises(ValueError, match=words):
        divergence_loss(tensor(0.0), tensor(0.0), 0.1, name, alpha)


def test_the_odds_keep_their_digits_at_both_ends():
    near, far = tensor(-1e-4), tensor(-40.0)
    loss = orpo_loss(near, far, 1.0).item()
    odds = math.log(math.exp(-1e-4) / -math.expm1(-1e-4)) + 40.0
    assert loss == pytest.approx(1e-4 + math.log1p(math.exp(-odds)), rel=1e-12)


# slopes

BETA, EPS = 0.3, 0.2
SLOPES = {
    "sigmoid": (lambda h: sigmoid_loss(h, BETA), lambda h: -BETA * sigma(-BETA * h)),
    "cDPO": (lambda h: sigmoid_loss(h, BETA, EPS), lambda h: BETA * (sigma(BETA * h) - (1 - EPS))),
    "rDPO": (
        lambda h: robust_loss(h, BETA, EPS),
        lambda h: -BETA * ((1 - EPS) * sigma(-BETA * h) + EPS * sigma(BETA * h)) / (1 - 2 * EPS),
    ),
    "ipo": (lambda h: ipo_loss(h, BETA), lambda h: 2 * (h - 1 / (2 * BETA))),
    "hinge": (lambda h: hinge_loss(h, BETA), lambda h: -BETA * (BETA * h < 1).double()),
    "kto wanted": (
        lambda h: kto_loss(h, torch.tensor(True), 0.5, BETA),
        lambda h: -BETA * sigma(BETA * (h - 0.5)) * sigma(-BETA * (h - 0.5)),
    ),
    "bco unwanted": (
        lambda h: bco_loss(h, torch.tensor(False), 0.5, BETA), lambda h: BETA * sigma(BETA * h - 0.5),
    ),
    "forward": (
        lambda h: divergence_loss(h, torch.zeros_like(h), BETA, "forward_kl"),
        lambda h: -BETA * torch.exp(-h) * sigma(-BETA * (1 - torch.exp(-h))),
    ),
    "js": (
        lambda h: divergence_loss(h, torch.zeros_like(h), BETA, "js"),
        lambda h: -BETA * sigma(-h) * sigma(-BETA * (LOG2 - torch.log1p(torch.exp(-h)))),
    ),
    "chi_po": (
        lambda h: chi_po_loss(h, torch.zeros_like(h), BETA, math.inf),
        lambda h: -BETA * (1 + torch.exp(h)) * sigma(-BETA * (h + torch.exp(h) - 1)),
    ),
}


@pytest.mark.parametrize(("loss", "expected"), SLOPES.values(), ids=SLOPES.keys())
def test_the_slope_is_the_one_on_paper(loss, expected):
    at = MARGINS[1:-1]          # beyond e^20 the exponentials go on as their tangents
    torch.testing.assert_close(slope(loss, at), expected(at), atol=1e-12, rtol=1e-10)


ALL = {
    **{name: loss for name, (loss, _) in SLOPES.items()},
    "alpha": lambda h: divergence_loss(h, -h, BETA, "alpha", 0.3),
    "alpha above 1": lambda h: divergence_loss(h, -h, BETA, "alpha", 2.5),
    "clipped chi_po": lambda h: chi_po_loss(h, -h, BETA, 4.0),
    "kto unwanted": lambda h: kto_loss(h, torch.tensor(False), 0.5, BETA),
    "orpo": lambda h: orpo_loss(-h.abs(), -h.abs().flip(0), 0.2),
    "simpo": lambda h: simpo_loss(-h.abs(), -h.abs().flip(0), 2.0, 1.0),
}


@pytest.mark.parametrize("loss", ALL.values(), ids=ALL.keys())
def test_far_out_everything_stays_finite(loss):
    extremes = torch.tensor([-1e4, -1e3, 0.0, 1e3, 1e4])
    assert torch.isfinite(loss(extremes)).all()
    assert torch.isfinite(slope(loss, extremes)).all()


def test_an_exponential_that_goes_on_as_its_tangent_still_pulls():
    # a chosen response that all but vanished is where forward KL pulls most
    far = slope(lambda h: divergence_loss(h, torch.zeros_like(h), BETA, "forward_kl"), tensor(-200.0))
    assert far.item() == pytest.approx(-BETA * math.exp(20.0))


# a bandit with four arms

ARMS = 4
OTHER = [(i, j) for i in range(ARMS) for j in range(ARMS) if i != j]
FIRST, SECOND = (torch.tensor(side) for side in zip(*OTHER, strict=True))
WEIGHTS = BANDIT_REFERENCE[FIRST] * BANDIT_REFERENCE[SECOND]
TRUTH = sigma(BANDIT_REWARDS[FIRST] - BANDIT_REWARDS[SECOND])       # how often the first is preferred


def minimise(objective: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
    """The policy with the least value of an objective of its log-ratios ℓ [4], and that value."""
    logits = BANDIT_REFERENCE.log().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(logits.log_softmax(-1) - BANDIT_REFERENCE.log())
        value.backward()
        return value

    value = optimizer.step(closure).item()
    for _ in range(3):
        value = optimizer.step(closure).item()
    return logits.detach().softmax(-1), value


def expected(loss: Callable[[Tensor], Tensor], preferred: Tensor, weights: Tensor = WEIGHTS):
    """The mean of a pairwise loss where the first is preferred with these probabilities."""

    def objective(log_ratio: Tensor) -> Tensor:
        h = log_ratio[FIRST] - log_ratio[SECOND]
        return (weights * (preferred * loss(h) + (1 - preferred) * loss(-h))).sum() / weights.sum()

    return objective


FLIPPED = 0.9 * TRUTH + 0.1 * (1 - TRUTH)


@pytest.mark.parametrize(("loss", "beta", "preferred", "weights", "least"), [
    (lambda h: sigmoid_loss(h, 0.5), 0.5, TRUTH, WEIGHTS, 0.46931984),
    (lambda h: sigmoid_loss(h, 1.0), 1.0, TRUTH, WEIGHTS, 0.46931984),
    (lambda h: sigmoid_loss(h, 2.0), 2.0, TRUTH, WEIGHTS, 0.46931984),
    (lambda h: sigmoid_loss(h, 1.0), 1.0, TRUTH, torch.arange(1.0, 13.0).double(), None),  # whatever is compared
    (lambda h: robust_loss(h, 1.0, 0.1), 1.0, FLIPPED, WEIGHTS, 0.46931984),  # recovers what clean labels say
])
def test_the_tilted_reference_is_the_only_minimum(loss, beta, preferred, weights, least):
    objective = expected(loss, preferred, weights)
    assert objective(torch.zeros(ARMS, dtype=torch.float64)).item() == pytest.approx(LOG2)
    policy, found = minimise(objective)
    torch.testing.assert_close(policy, tilt(BANDIT_REFERENCE, BANDIT_REWARDS, beta), atol=1e-6, rtol=0.0)
    if least is not None:
        assert found == pytest.approx(least, abs=1e-8)


def test_smoothing_is_training_on_flipped_labels():
    policy, _ = minimise(expected(lambda h: sigmoid_loss(h, 1.0, 0.1), TRUTH))
    assert policy.tolist() == pytest.approx([0.1509138, 0.2343056, 0.3170429, 0.2977378], abs=1e-6)
    assert kl(policy, BANDIT_REFERENCE) == pytest.approx(0.265898, abs=1e-6)
    flipped, _ = minimise(expected(lambda h: sigmoid_loss(h, 1.0), FLIPPED))
    torch.testing.assert_close(policy, flipped, atol=1e-6, rtol=0.0)


IPO = {
    0.5: ([0.2544358, 0.2840355, 0.2771146, 0.1844141], 0.0725920),
    1.0: ([0.3248191, 0.2972141, 0.2396995, 0.1382673], 0.0178043),
    0.1: (None, 1.1158929),
}


@pytest.mark.parametrize("tau", IPO)
def test_ipo_tilts_by_how_often_a_response_beats_the_reference(tau):
    policy, _ = minimise(expected(lambda h: ipo_loss(h, tau), TRUTH))
    probabilities, distance = IPO[tau]
    assert kl(policy, BANDIT_REFERENCE) == pytest.approx(distance, abs=1e-6)
    if probabilities is not None:
        assert policy.tolist() == pytest.approx(probabilities, abs=1e-6)
