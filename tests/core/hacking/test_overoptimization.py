"""Gao's law recovered from known curves; best of n by enumeration."""

import itertools
import math

import numpy as np
import pytest

from kltune.core.hacking.overoptimization import (
    GainFit,
    best_of,
    best_of_n_kl,
    best_of_n_kl_of_levels,
    fit_gain,
    score_at,
    tilt_gain,
    within_prompt_spread,
)

# d (α − β log d) is largest at d* = e^{α/β − 1} = 2.0427: KL d*² = 4.1727, gain βd* = 0.71495
ALPHA, BETA = 0.6, 0.35
D = np.linspace(0.3, 6.0, 25)


def law(d: np.ndarray) -> np.ndarray:
    return d * (ALPHA - BETA * np.log(d))


def fitted(d=D, gain=None, noise=0.03, runs=None, form="rl") -> GainFit | str:
    gain = law(d) if gain is None else gain
    return fit_gain(d**2, gain, np.full(len(d), noise), range(len(d)) if runs is None else runs, form=form)


def test_the_law_without_noise_is_recovered_to_the_digit():
    found = fitted()
    assert (found.alpha, found.beta) == pytest.approx((ALPHA, BETA), abs=1e-12)
    assert (found.peak.distance, found.peak.kl, found.peak.gain) == pytest.approx((2.0427, 4.1727, 0.71495), abs=5e-5)
    assert found.gain(4.0) == pytest.approx(2 * (0.6 - 0.35 * math.log(2)))
    assert found.observed
    assert (found.points, found.runs) == (25, 25)


def test_the_peak_of_25_noisy_points_scatters_by_what_mathematics_says():
    rng = np.random.default_rng(1)
    fits = [fitted(gain=law(D) + 0.03 * rng.standard_normal(25)) for _ in range(60)]
    peaks = [fit.peak.distance for fit in fits]
    # delta method on these 25 points: 0.01198; 60 draws know a spread to 9 %
    assert np.std(peaks) == pytest.approx(0.012, rel=0.3)
    assert np.mean(peaks) == pytest.approx(2.0427, abs=0.006)
    held = np.mean([fit.peak.distance_ci[0] <= 2.0427 <= fit.peak.distance_ci[1] for fit in fits])
    assert held > 0.85
    assert all(fit.observed for fit in fits)


def test_the_best_of_n_law_has_its_own_peak():
    d = np.linspace(0.2, 2.2, 12)
    found = fitted(d, d * (0.8 - 0.4 * d), form="best_of_n")
    assert (found.alpha, found.beta) == pytest.approx((0.8, 0.4))
    assert (found.peak.distance, found.peak.gain) == pytest.approx((1.0, 0.4))      # α/2β, α²/4β


def test_weights_are_by_the_inverse_square_of_the_error():
    # two of three points at each d; the third is far off and worth nothing
    d = np.repeat(np.linspace(0.5, 4.0, 6), 2)
    gain, error = law(d), np.full(12, 0.01)
    gain[::2] += 100.0
    error[::2] = 1e6
    found = fit_gain(d**2, gain, error, range(12))
    assert (found.alpha, found.beta) == pytest.approx((ALPHA, BETA), abs=1e-4)


def test_points_too_near_the_reference_are_left_out_of_the_rl_form_alone():
    d = np.concatenate([[0.0, 0.1, 0.29], np.linspace(0.5, 4.0, 8)])
    gain = np.concatenate([[5.0, 5.0, 5.0], law(d[3:])])
    assert fitted(d, gain).points == 8
    assert fitted(d, gain).alpha == pytest.approx(ALPHA)
    assert fitted(d, gain, form="best_of_n").points == 10      # d = 0 says nothing of either form


def test_a_curve_that_only_rises_has_no_peak_yet():
    rng = np.random.default_rng(0)
    d = np.linspace(0.5, 3.0, 12)
    found = fitted(d, 0.7 * d + 0.03 * rng.standard_normal(12))
    assert not found.observed
    assert found.beta_ci[0] < 0.0
    assert found.claim == "no peak yet: beta is not shown to be above 0"


def test_a_peak_beyond_the_data_is_not_claimed():
    d = np.linspace(0.4, 1.6, 12)
    found = fitted(d)
    assert found.beta_ci[0] > 0.0
    assert found.peak.distance == pytest.approx(2.0427, abs=5e-5)
    assert not found.observed
    assert "outside the data (0.16 to 2.56 nats)" in found.claim


def test_points_of_one_run_do_not_count_as_runs():
    few = fitted(runs=[0] * 12 + [1] * 13)
    assert few == "25 points of 2 runs beyond 0.09 nats; wanted 5 of 5"
    # four looks at each of twelve runs, all four off by the same: as many figures as a quarter of the points
    rng = np.random.default_rng(3)
    d = np.repeat(np.linspace(0.5, 5.0, 12), 4)
    gain = law(d) + np.repeat(0.1 * rng.standard_normal(12), 4)
    by_run, by_point = (fit_gain(d**2, gain, np.full(48, 0.03), runs) for runs in (np.arange(48) // 4, range(48)))
    width = [fit.alpha_ci[1] - fit.alpha_ci[0] for fit in (by_run, by_point)]
    assert 1.5 < width[0] / width[1] < 2.5


def test_too_few_points_or_kls_are_said_in_words():
    assert fitted(np.arange(1.0, 6.0)).points == 5
    assert fitted(np.array([1.0, 2.0, 3.0])) == "3 points of 3 runs beyond 0.09 nats; wanted 5 of 5"
    assert "√nat of each other" in fitted(2.0 + 0.001 * np.arange(9))
    d = np.array([1.0, 3.0] + [1.0] * 6)      # one run alone at another KL: a third of the resamples lack it
    assert "too few different KLs" in fitted(d)


@pytest.mark.parametrize(
    "change", [{"kl": [-1.0] * 6}, {"stderr": [0.0] * 6}, {"gain": [float("nan")] * 6}, {"runs": [0]}]
)
def test_numbers_that_are_none_are_refused(change):
    good = {"kl": [1.0] * 6, "gain": [1.0] * 6, "stderr": [0.1] * 6, "runs": range(6)}
    with pytest.raises(ValueError, match=r"one length|finite"):
        fit_gain(**(good | change))


# best of n


@pytest.mark.parametrize("n", range(1, 7))
def test_best_of_n_is_the_mean_over_all_subsets(n):
    scores = np.array([[3.0, -1.0, 0.5, 2.0, 7.0, 0.0], [1.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    by_hand = [np.mean([max(subset) for subset in itertools.combinations(row, n)]) for row in scores]
    assert best_of(scores, n).tolist() == pytest.approx(by_hand)


def test_best_by_one_scorer_is_judged_by_another_and_ties_are_drawn():
    scores = np.array([[1.0, 2.0, 2.0, 0.0]])
    gold = np.array([[10.0, 20.0, 40.0, 0.0]])

    def winner(subset: tuple[int, ...]) -> float:
        top = max(scores[0, list(subset)])
        return float(np.mean([gold[0, i] for i in subset if scores[0, i] == top]))

    by_hand = np.mean([winner(subset) for subset in itertools.combinations(range(4), 2)])
    assert best_of(scores, 2, gold) == pytest.approx([by_hand])


def test_best_of_half_of_thousands_is_no_overflow():
    assert best_of(np.arange(2048.0)[None], 1024)[0] == pytest.approx(1024 * 2049 / 1025 - 1)    # n (N + 1)/(n + 1)


def test_best_of_a_thousand_needs_no_large_numbers():
    scores = np.arange(1000.0)[None]
    assert best_of(scores, 1)[0] == pytest.approx(499.5)
    assert best_of(scores, 1000)[0] == pytest.approx(999.0)
    assert best_of(scores, 500)[0] == pytest.approx(500 * 1001 / 501 - 1)      # E max of n of 1..N: n(N+1)/(n+1)


@pytest.mark.parametrize(("n", "nats"), [
    (1, 0.0), (2, 0.1931), (4, 0.6363), (8, 1.2044), (16, 1.8351), (32, 2.4970), (64, 3.1745), (128, 3.8598),
    (256, 4.5491),
])
def test_the_kl_bound_of_best_of_n(n, nats):
    assert best_of_n_kl(n) == pytest.approx(nats, abs=6e-5)


@pytest.mark.parametrize("n", [1, 3, 4])
def test_the_kl_of_best_of_n_on_the_bandit_by_enumeration(n):
    shares, won = np.array([0.4, 0.3, 0.2, 0.1]), np.zeros(4)
    for arms in itertools.product(range(4), repeat=n):
        won[max(arms)] += shares[list(arms)].prod()
    found = best_of_n_kl_of_levels(shares, n)
    assert found == pytest.approx((won * np.log(won / shares)).sum())
    assert found <= best_of_n_kl(n) + 1e-12
    assert best_of_n_kl_of_levels(shares, 64) == pytest.approx(2.29264, abs=5e-6)


def test_a_level_that_never_wins_costs_nothing():
    assert best_of_n_kl_of_levels([1e-6, 1.0 - 1e-6], 100) == pytest.approx(1e-6, rel=1e-3)      # log 1/q of the rest


@pytest.mark.parametrize("call", [
    lambda: best_of([[1.0, 2.0]], 3), lambda: best_of([1.0, 2.0], 1), lambda: best_of([[1.0]], 1, [[1.0, 2.0]]),
    lambda: best_of_n_kl(0), lambda: best_of_n_kl_of_levels([0.5, 0.4], 2), lambda: best_of_n_kl_of_levels([1.0], 0),
])
def test_what_is_no_best_of_n(call):
    with pytest.raises(ValueError, match=r"wanted|must be"):
        call()


# anchors and reading off


def test_the_spread_is_within_prompts():
    assert within_prompt_spread([[0.0, 2.0], [100.0, 104.0]]) == pytest.approx(math.sqrt((2.0 + 8.0) / 2))


def test_the_tilt_of_a_gaussian_is_on_the_curve_and_best_of_n_below_it():
    # KL = σ²/2β², gain = σ²/β
    sigma, beta = 1.5, 0.8
    assert tilt_gain(sigma, sigma**2 / (2 * beta**2)) == pytest.approx(sigma**2 / beta)
    # E max of 4 is 1.02938 at 0.6363 nats: 0.911 of it
    assert 1.02938 / tilt_gain(1.0, best_of_n_kl(4)) == pytest.approx(0.911, abs=0.002)


def test_a_score_is_read_off_between_the_points_near_a_kl():
    kl = np.array([1.0, 1.44, 2.25, 3.24, 100.0])
    scores = 0.2 + 0.5 * np.sqrt(kl)
    scores[-1] = -50.0      # too far away to be read
    score, stderr = score_at(kl, scores, np.full(5, 0.04), 2.0)
    assert score == pytest.approx(0.2 + 0.5 * math.sqrt(2.0))
    assert 0.02 - 0.005 < stderr < 0.04      # of four points with an error of 0.04 each


def test_nothing_is_read_off_where_no_curve_is():
    errors = [0.1] * 3
    assert score_at([1.0, 1.5], [1.0, 1.2], [0.1, 0.1], 1.2) is None
    assert score_at([2.0, 2.01, 2.02], [1.0, 1.0, 1.0], errors, 2.0) is None
    assert score_at([2.0, 2.5, 3.0], [1.0, 1.1, 1.2], errors, 5.0) is None


@pytest.mark.parametrize("runs", [5, 12])
def test_a_fits_intervals_hold_its_law_though_all_gains_share_the_references_error(runs):
    # Without it they held .43 and .28 of the time.
    rng, held = np.random.default_rng(runs), [0, 0]
    d = np.linspace(0.5, 3.0, runs)
    for _ in range(150):
        gain = d * (0.6 - 0.35 * np.log(d)) + rng.normal(0.0, 0.03, runs) - rng.normal(0.0, 0.06)
        fit = fit_gain(d**2, gain, np.full(runs, 0.03), range(runs), reference_stderr=0.06)
        for place, (ends, truth) in enumerate(((fit.alpha_ci, 0.6), (fit.beta_ci, 0.35))):
            held[place] += ends[0] <= truth <= ends[1]
    assert min(held) >= 0.87 * 150


def test_scores_that_never_repeat_have_the_bound_and_those_that_do_less():
    even = np.full(16, 1 / 16)
    assert best_of_n_kl_of_levels(even, 8, np.zeros(16, bool)) == pytest.approx(best_of_n_kl(8))
    # a share ½ of zeros, and above them scores that never repeat: p₀ = 2^−n, and ∫ from ½ to 1 by a fine sum
    n, cut = 4, 1_000_000
    middle = (np.arange(cut // 2, cut) + 0.5) / cut
    density = n * middle ** (n - 1)
    listed = 0.5**n * math.log(0.5**n / 0.5) + (density * np.log(density)).mean() / 2
    assert best_of_n_kl_of_levels([0.5, 0.25, 0.25], n, [True, False, False]) == pytest.approx(listed, abs=1e-6)
