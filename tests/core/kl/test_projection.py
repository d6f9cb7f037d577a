"""The search for α on KL curves that are known."""

import pytest

from kltune.core.kl.gate import GRID, Point, largest_alpha


class Curve:
    """KL as a function of α, without noise; ``margin`` is how far the bound lies above it. Counts its calls."""

    def __init__(self, kl, margin=0.0):
        self.kl, self.margin, self.calls = kl, margin, []

    def __call__(self, alpha):
        self.calls.append(alpha)
        return Point(alpha, self.kl(alpha), 0.01, self.kl(alpha) + self.margin)


@pytest.mark.parametrize("power", [1.0, 1.7, 2.0, 3.0])
@pytest.mark.parametrize("budget", [0.01, 0.5, 4.0, 7.9])
def test_a_power_law_is_met_from_below_within_the_tolerance(power, budget):
    curve = Curve(lambda alpha: 8.0 * alpha**power)
    found = largest_alpha(curve, budget)
    assert 0.99 * budget <= 8.0 * found.alpha**power <= budget
    assert len(curve.calls) <= len(GRID) + 8
    assert found.falls == ()


def test_it_is_the_bound_that_must_meet_the_budget():
    found = largest_alpha(Curve(lambda alpha: 8.0 * alpha**2, margin=0.5), 4.0)
    assert 3.46 <= 8.0 * found.alpha**2 <= 3.5


def test_an_adapter_within_its_budget_is_left_as_it_is():
    curve = Curve(lambda alpha: 3.0 * alpha)
    assert largest_alpha(curve, 4.0).alpha == 1.0
    assert curve.calls == [1.0]


def test_a_curve_that_bends_where_no_power_law_does():
    def kl(alpha):
        return 0.2 * alpha if alpha < 0.6 else 0.12 + 30 * (alpha - 0.6)

    found = largest_alpha(Curve(kl), 1.0)
    assert 0.97 <= kl(found.alpha) <= 1.0


def test_a_kl_that_falls_is_said_and_the_largest_alpha_within_is_found():
    # within below .3 and again between .7 and .8
    def kl(alpha):
        return {1.0: 9.0, 0.75: 0.5, 0.5: 5.0, 0.25: 0.4}.get(alpha, 0.5 + 20 * (alpha - 0.75))

    found = largest_alpha(Curve(kl), 1.0)
    assert 0.75 < found.alpha < 0.8
    assert found.falls == ((0.5, 0.75),)


def test_noise_alone_is_no_fall():
    curve = Curve(lambda alpha: 2.0 - 0.02 * alpha)
    assert largest_alpha(curve, 5.0, grid=(1.0, 0.5)).falls == ()
    assert largest_alpha(curve, 1.0, grid=(1.0, 0.5), tries=0).falls == ()


def test_where_no_alpha_meets_the_budget_the_answer_is_none_of_it():
    found = largest_alpha(Curve(lambda alpha: 5.0), 1.0)
    assert found.alpha == 0.0


def test_an_infinite_bound_is_bisected():
    # one prompt, or a single response that overflows: the bound is unknown until alpha is small
    curve = Curve(lambda alpha: float("inf") if alpha > 0.4 else 8 * alpha**2)
    found = largest_alpha(curve, 4.0)
    assert 0.35 <= found.alpha <= 0.4
