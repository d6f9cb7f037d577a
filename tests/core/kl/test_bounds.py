"""Ends of intervals: by published numbers, by drawing the weights, and by how often they hold."""

import numpy as np
import pytest

from kltune.core.kl.bounds import effective_number, upper_reach, weighted_end
from tests.coverage import cases, try_out

CASES = {(case.name, case.prompts): case for case in cases()}


@pytest.mark.parametrize(("seen", "of", "high"), [(1, 200, 0.02754), (3, 100, 0.08518), (5, 50, 0.21814)])
def test_a_share_that_was_seen_a_few_times_has_the_end_of_clopper_and_pearson(seen, of, high):
    values = np.zeros(of)
    values[:seen] = 1.0
    assert weighted_end(values, np.ones(of), 1.0, 0.025) == pytest.approx(high, rel=0.005)


@pytest.mark.parametrize("count", [3, 16, 200])
@pytest.mark.parametrize("tail", [0.025, 0.3])
def test_the_saddle_point_is_what_drawn_weights_give(count, tail):
    rng = np.random.default_rng(count)
    numerators, denominators = rng.lognormal(0.0, 1.0, count), rng.integers(1, 30, count).astype(float)
    ratio = numerators.sum() / denominators.sum()
    beyond = 2.0 * (numerators - ratio * denominators).max() + ratio * denominators.mean()
    weights = rng.exponential(size=(20_000, count + 1))
    drawn = (weights @ np.append(numerators, beyond)) / (weights @ np.append(denominators, denominators.mean()))
    end = weighted_end(numerators, denominators, 2.0, tail)
    assert (drawn > end).mean() == pytest.approx(tail, rel=0.08)


def test_the_fewer_share_the_spread_the_further_the_one_not_drawn():
    even, one = np.resize([-1.0, 1.0], 100), np.full(100, -1.0)
    one[0] = 99.0
    assert effective_number(even) == pytest.approx(100.0)
    assert effective_number(one) == pytest.approx(1.0, abs=0.05)
    assert effective_number(np.zeros(7)) == 7.0
    assert upper_reach(even) == pytest.approx(0.25 + 7.125 / 100)       # kurtosis 1
    assert upper_reach(one) == 4.0
    assert upper_reach(np.resize([-1.0, 1.0], 8)) == pytest.approx(0.25 + (7 + 2 + 0.125) / 8)


@pytest.mark.parametrize("key", [
    ("lognormal(1.5)", 16), ("lognormal(1.5)", 64), ("lognormal(1.5)", 200), ("2 % spikes", 16), ("2 % spikes", 64),
    ("2 % spikes", 200), ("gamma(1.5)", 4), ("gamma(1.5)", 16), ("unequal lengths", 16), ("prompts differ", 8),
    ("prompts differ", 16), ("prompts differ", 64),
])  # fmt: skip
def test_a_policy_just_over_its_budget_is_passed_as_seldom_as_the_gate_says(key):
    # 2.5 % of 300 is 7.5; 15 and more has a chance of 1 % then. t and the bootstrap passed .10 to .66 of the first six.
    assert try_out(CASES[key], 300).passed <= 14 / 300


@pytest.mark.parametrize(("key", "least"), [(("lognormal(1.5)", 200), 0.94), (("2 % spikes", 200), 0.94)])
def test_an_interval_holds_a_tail_that_was_seen(key, least):
    # t: .87 and .90
    assert try_out(CASES[key], 300).held >= least


@pytest.mark.parametrize("key", [key for key, case in CASES.items() if case.ordinary])
def test_where_there_is_no_tail_the_interval_is_little_wider_than_students(key):
    # t: 2 · 1.998 standard errors at 64 prompts, 2 · 1.969 at 256
    assert try_out(CASES[key], 100).width < 1.1 * 4.0
