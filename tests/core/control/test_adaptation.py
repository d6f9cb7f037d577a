"""The length of a noisy trust-region step, against the quadratic it is derived from; damping by how a search went."""

import math
from dataclasses import asdict

import numpy as np
import pytest

from kltune.core.control.adaptation import FIRST_SEEN, LEAST_SHARE, RATE_MEMORY, AdaptiveRadius, Damping
from kltune.core.control.trust_region import SearchResult, Trial

BETA, MOST = 0.2, 0.2


def slope_after(rate: float, step_kl: float, beta: float) -> float:
    # d/ds of rate·s − ½β s² at s = √(2δ), along the whole step: times s.
    length = math.sqrt(2.0 * step_kl)
    return (rate - beta * length) * length


def watched(rate: float, step_kl: float, beta: float = BETA, times: int = FIRST_SEEN) -> AdaptiveRadius:
    pace = AdaptiveRadius()
    for _ in range(times):
        pace = pace.stepped(step_kl).observed(slope_after(rate, step_kl, beta), beta)
    return pace


@pytest.mark.parametrize("step_kl", [0.01, 0.05, 0.2])
def test_the_rate_is_found_whatever_the_size_of_the_step(step_kl):
    assert watched(0.06, step_kl).rate == pytest.approx(0.06)


def test_the_radius_is_where_the_gain_is_largest():
    rate = 0.08
    sizes = np.linspace(1e-4, MOST, 20_001)
    gains = rate * np.sqrt(2.0 * sizes) - BETA * sizes
    assert watched(rate, 0.1).allowed(MOST, BETA) == pytest.approx(sizes[gains.argmax()], abs=1e-4)


def test_a_gain_is_what_the_quadratic_says():
    pace = AdaptiveRadius().stepped(0.1)
    assert pace.fresh_gain(slope_after(0.08, 0.1, BETA), BETA) == pytest.approx(0.08 * math.sqrt(0.2) - BETA * 0.1)


def test_where_a_nat_is_cheap_or_nothing_is_known_a_step_is_as_long_as_allowed_and_never_given_up():
    assert AdaptiveRadius().allowed(MOST, BETA) == MOST
    assert watched(0.01, 0.1, times=FIRST_SEEN - 1).allowed(MOST, BETA) == MOST
    assert watched(0.01, 0.1).allowed(MOST, BETA) < MOST
    assert watched(0.01, 0.1).allowed(MOST, 0.0) == MOST
    assert watched(0.06, 0.1).allowed(MOST, 0.01) == MOST
    assert watched(-0.05, 0.1).allowed(MOST, BETA) == pytest.approx(LEAST_SHARE * MOST)


def test_the_mean_forgets_and_has_no_bias():
    pace = watched(0.1, 0.1, times=50)
    later = pace.stepped(0.1).observed(slope_after(0.0, 0.1, BETA), BETA)
    assert pace.rate == pytest.approx(0.1)
    assert later.rate == pytest.approx(0.1 * RATE_MEMORY, rel=1e-4)


def test_a_step_that_was_not_made_says_nothing():
    assert AdaptiveRadius().stepped(0.0).observed(1.0, BETA) == AdaptiveRadius()
    assert AdaptiveRadius().rate is None


def climb(noise: float, *, paced: bool, steps: int = 60, size: int = 400) -> tuple[float, float]:
    """Maximise bᵀx − ½β|x|², where KL(old ‖ new) of a step d is ½|d|² and the optimum is 2 nats away.

    Gradients carry noise of ``noise`` times the length of b. Returns the share of the best gain that is reached, and
    the mean radius of the later steps.
    """
    rng = np.random.default_rng(0)
    wanted = rng.normal(size=size)
    wanted *= 2.0 * BETA / np.linalg.norm(wanted)
    x, pace, last, radii = np.zeros(size), AdaptiveRadius(), None, []
    for _ in range(steps):
        seen = wanted - BETA * x + noise * np.linalg.norm(wanted) * rng.normal(size=size) / math.sqrt(size)
        if last is not None and paced:
            pace = pace.observed(float(seen @ last), BETA)
        radii.append(pace.allowed(MOST, BETA))
        last = min(math.sqrt(2.0 * radii[-1]) / np.linalg.norm(seen), 1.0 / BETA) * seen
        x, pace = x + last, pace.stepped(0.5 * float(last @ last))
    gain = float(wanted @ x) - 0.5 * BETA * float(x @ x)
    return gain / (0.5 * float(wanted @ wanted) / BETA), float(np.mean(radii[20:]))


def test_without_noise_the_optimum_is_reached_and_noise_makes_steps_short_and_that_gains():
    assert climb(0.0, paced=True)[0] == pytest.approx(1.0, abs=1e-3)
    paced, full = climb(4.0, paced=True), climb(4.0, paced=False)
    assert paced[1] < 0.25 * MOST
    assert paced[0] > full[0] + 0.2


def test_damping_follows_how_the_search_went():
    damping, good, far = Damping(100.0, adapts=True), Trial(0.009, 1.0), Trial(0.05, 1.0)
    assert damping.updated(SearchResult(1.0, (good,)), 1.0).relative == pytest.approx(100.0 / 1.3)
    assert damping.updated(SearchResult(0.9, (far, good)), 1.0) == damping
    assert damping.updated(SearchResult(0.4, (far, good)), 1.0).relative == 200.0
    assert damping.updated(SearchResult(0.0, (far, far)), 1.0).relative == 200.0
    cut_by_cap = SearchResult(0.25, (Trial(0.009, 1.0, within_cap=False), good))
    assert damping.updated(cut_by_cap, 1.0) == damping
    fixed = Damping(0.5, adapts=False)
    assert fixed.updated(SearchResult(0.0, (far,)), 1.0) == fixed
    assert Damping(**asdict(damping)) == damping  # what a checkpoint keeps
