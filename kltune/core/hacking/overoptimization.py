"""Reward against KL: what sampling alone would buy, where a curve would turn down, and which point to pick.

d = √KL(policy ‖ reference) in √nat; a gain is a mean score less the reference's own. Everything here is float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from kltune.core.kl.intervals import Interval, student_t_quantile

GainForm = Literal["rl", "best_of_n"]
NEAREST = 0.3           # √nat: below it the RL form, whose slope is infinite at 0, is not fitted (docs/maths.md 20)
FEWEST_POINTS = 5
FEWEST_RUNS = 5         # clusters: of fewer, resampling says nothing
FIT_RESAMPLES = 2000
REACH = 2.5             # `score_at` reads a KL off the points that lie within this factor of it
LEAST_RANGE = 0.1      # √nat: points closer together than this have no slope


@dataclass(frozen=True)
class FittedPeak:
    """Where a fitted curve turns down.

    The intervals are at 95 %; an end that is None is beyond all bounds: in some resamples the curve never turned.
    """

    distance: float                         # d*, √nat
    distance_ci: tuple[float, float | None]
    kl: float                               # d*², nats
    kl_ci: tuple[float, float | None]
    gain: float                             # R*
    gain_ci: tuple[float, float | None]


@dataclass(frozen=True)
class GainFit:
    """A fitted curve of gain against d; ``claim`` says in words what it shows.

    peak: None where beta is not above 0, so that the curve has none. observed: beta's whole interval is above 0 and
    the peak lies between the smallest and the largest d of the data; otherwise there is no peak yet.
    """

    form: GainForm
    alpha: float
    alpha_ci: Interval
    beta: float
    beta_ci: Interval
    peak: FittedPeak | None
    observed: bool
    claim: str
    points: int
    runs: int

    def gain(self, kl: ArrayLike) -> np.ndarray:
        """The fitted gain at a KL in nats, above 0."""
        d = np.sqrt(np.asarray(kl, dtype=float))
        return _design(d, self.form) @ np.array([self.alpha, self.beta])


def fit_gain(
    kl: Sequence[float], gain: Sequence[float], stderr: Sequence[float], runs: Sequence[object], *,
    form: GainForm = "rl", reference_stderr: float = 0.0,
) -> GainFit | str:
    """Fit Gao's law of over-optimisation by least squares, weighted by 1/stderr², and ask the data for its peak.

        rl:          R = d (α − β log d),    peak d* = exp(α/β − 1),    R* = β d*
        best_of_n:   R = d (α − β d),        peak d* = α/(2β),          R* = α²/(4β)

    Intervals are percentiles of a cluster bootstrap: whole runs are drawn with replacement, so that several points of
    one run do not count as several runs. All gains share the error of the reference's own score, so each resample also
    draws that. Of few runs a resample is too narrow: deviations are widened by √(n/(n−1)) · t_{n−2}/1.96. Seeded: the
    same numbers give the same interval.

    Source: Gao, Schulman and Hilton 2022, arXiv 2210.10760; docs/maths.md 20.

    Args:
        kl: KL(policy ‖ reference) of each point, nats per response.
        gain: its score less the reference's.
        stderr: standard error of the score, above 0.
        runs: which run a point is of; any values.
        form: which law.
        reference_stderr: standard error of the reference's own score, where it is not drawn with the runs.

    Returns:
        The fit; or in words why nothing can be fitted, as too few points.

    Raises:
        ValueError: the four differ in length, a number is not finite, a KL is negative or a stderr not above 0.
    """
    nats, y, error = (np.asarray(values, dtype=float) for values in (kl, gain, stderr))
    if not len(nats) == len(y) == len(error) == len(runs):
        raise ValueError("KL, gain, stderr and run of each point: four of one length")
    if not (np.isfinite([nats, y, error]).all() and (nats >= 0).all() and (error > 0).all()):
        raise ValueError("KL, gain and stderr must be finite, KL at least 0 and stderr above 0")
    kept = np.sqrt(nats) >= NEAREST if form == "rl" else nats > 0.0
    d, y, error = np.sqrt(nats[kept]), y[kept], error[kept]
    names = [str(run) for run, keep in zip(runs, kept, strict=True) if keep]
    cluster = np.unique(names, return_inverse=True)[1]
    count = len(set(names))
    if len(d) < FEWEST_POINTS or count < FEWEST_RUNS:
        beyond = f" beyond {NEAREST**2:.2g} nats" if form == "rl" else ""
        return f"{_number(len(d), 'point')} of {_number(count, 'run')}{beyond}; wanted {FEWEST_POINTS} of {FEWEST_RUNS}"
    if np.ptp(d) < LEAST_RANGE:
        return f"all points lie within {np.ptp(d):.2g} √nat of each other"

    x, weight = _design(d, form), error**-2
    columns = np.concatenate([x, y[:, None], np.ones_like(y)[:, None]], 1)
    moments = np.zeros((count, 2, 4))          # of each run: XᵀWX beside XᵀWy and XᵀW1
    np.add.at(moments, cluster, weight[:, None, None] * x[:, :, None] * columns[:, None, :])
    whole = moments.sum(0, keepdims=True)[..., :3]
    alpha, beta = _solved(whole)[0]
    rng = np.random.default_rng(0)
    drawn = np.tensordot(rng.multinomial(count, np.full(count, 1 / count), size=FIT_RESAMPLES), moments, 1)
    wider = math.sqrt(count / (count - 1)) * student_t_quantile(0.95, count - 2) / NormalDist().inv_cdf(0.975)
    shift = reference_stderr / wider * rng.standard_normal(FIT_RESAMPLES)
    drawn[..., 2] -= shift[:, None] * drawn[..., 3]
    resampled = np.array([alpha, beta]) + wider * (_solved(drawn[..., :3]) - np.array([alpha, beta]))
    if np.isnan(resampled[:, 0]).mean() > 0.05:
        return "the runs lie at too few different KLs to tell the two parameters apart"
    resampled = resampled[~np.isnan(resampled[:, 0])]
    alpha_ci, beta_ci = (_percentiles(column) for column in resampled.T)
    peak = _peak(alpha, beta, resampled, form) if beta > 0.0 else None
    claim = _claim(peak, beta_ci, d)
    return GainFit(
        form, float(alpha), alpha_ci, float(beta), beta_ci, peak, claim == "", claim or "the peak is in the data",
        len(d), count,
    )


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _design(d: np.ndarray, form: GainForm) -> np.ndarray:
    """What α and β are multiplied by. [..., 2]"""
    return np.stack([d, -d * np.log(d) if form == "rl" else -(d**2)], axis=-1)


def _solved(moments: np.ndarray) -> np.ndarray:
    """α and β of each XᵀWX beside XᵀWy, [n, 2, 3]; NaN where two parameters cannot be told apart. [n, 2]"""
    (a, b, u), (_, c, v) = (moments[:, row].T for row in (0, 1))
    determinant = a * c - b * b
    alone = determinant <= 1e-9 * a * c
    determinant = np.where(alone, np.nan, determinant)
    return np.stack([(c * u - b * v) / determinant, (a * v - b * u) / determinant], axis=1)


def _peak(alpha: float, beta: float, resampled: np.ndarray, form: GainForm) -> FittedPeak:
    def at(alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """d* and R*; infinite where the curve never turns down."""
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            if form == "rl":
                distance = np.exp(alpha / beta - 1.0)
                top = beta * distance
            else:
                distance, top = alpha / (2 * beta), alpha**2 / (4 * beta)
        turns = beta > 0.0
        return np.where(turns, distance, math.inf), np.where(turns, top, math.inf)

    distance, top = (float(value) for value in at(np.array(alpha), np.array(beta)))
    distances, tops = at(*resampled.T)
    low, high = _open_percentiles(distances)
    return FittedPeak(
        distance, (low, high), distance**2, (low**2, None if high is None else high**2), top, _open_percentiles(tops)
    )


def _claim(peak: FittedPeak | None, beta_ci: Interval, d: np.ndarray) -> str:
    """Why no peak is claimed; empty where one is."""
    if peak is None or beta_ci[0] <= 0.0:
        return "no peak yet: beta is not shown to be above 0"
    if not d.min() <= peak.distance <= d.max():
        low, high = d.min() ** 2, d.max() ** 2
        return f"no peak yet: the fit's, at {peak.kl:.3g} nats, is outside the data ({low:.2g} to {high:.3g} nats)"
    return ""


def _percentiles(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _open_percentiles(values: np.ndarray) -> tuple[float, float | None]:
    """The same where some are infinite: no interpolation between a number and infinity."""
    low, high = np.quantile(values, [0.025, 0.975], method="inverted_cdf")
    return float(min(low, np.finfo(float).max)), float(high) if math.isfinite(high) else None


def best_of(scores: ArrayLike, n: int, values: ArrayLike | None = None) -> np.ndarray:
    """Unbiased estimate, for each prompt, of what the best of n responses by score would have on average.

        Σ_i C(i−1, n−1) / C(N, n) · v_(i),    i = 1 … N in the order of the scores

    which is the mean over all subsets of n of the N responses. Among equal scores the winner is drawn at random.

    Source: docs/maths.md 21.

    Args:
        scores: of N independent responses of the reference to each of P prompts. [P, N]
        n: at least 1, at most N.
        values: what is averaged over the winners, as another scorer's opinion; None: the scores themselves. [P, N]

    Returns:
        [P], one estimate a prompt; their mean has the standard error sd/√P.

    Raises:
        ValueError: n is not between 1 and N, or the shapes differ.
    """
    scores = np.asarray(scores, dtype=float)
    values = scores if values is None else np.asarray(values, dtype=float)
    if scores.ndim != 2 or scores.shape != values.shape or not 1 <= n <= scores.shape[1]:
        raise ValueError(f"wanted scores and values [P, N] and 1 ≤ n ≤ N; found {scores.shape}, {values.shape}, n {n}")
    count = scores.shape[1]
    weights = np.zeros(count)
    weights[-1] = n / count         # C(N − 1, n − 1) / C(N, n); then C(i − 1, n − 1) = C(i, n − 1) · (i − n + 1) / i
    for place in range(count - 1, n - 1, -1):
        weights[place - 1] = weights[place] * (place - n + 1) / place
    estimates = np.empty(len(scores))
    for prompt, (row, value) in enumerate(zip(scores, values, strict=True)):
        _, level, size = np.unique(row, return_inverse=True, return_counts=True)
        share = np.bincount(np.repeat(np.arange(len(size)), size), weights=weights) / size
        estimates[prompt] = (share[level] * value).sum()
    return estimates


def best_of_n_kl(n: int) -> float:
    """KL(best of n ‖ reference), nats, where no two responses score the same; an upper bound where some do.

        log n − (n − 1)/n

    Source: Beirami et al. 2024, arXiv 2401.01879.
    """
    if n < 1:
        raise ValueError(f"n is {n}, must be at least 1")
    return math.log(n) - (n - 1) / n


def best_of_n_kl_of_levels(shares: ArrayLike, n: int, tied: ArrayLike | None = None) -> float:
    """KL(best of n ‖ reference), nats, where scores come in levels: equal scores make it less than the bound.

        Σ_l p_l log(p_l / q_l),    p_l = F_l^n − F_{l−1}^n

    with q_l the reference's share of level l and F the sum up to it: within a level the winner is drawn at random. A
    level that is not tied stands for scores that never repeat, and adds what they do:

        ∫ n F^{n−1} log(n F^{n−1}) dF = [G log n + (n−1)/n · G (log G − 1)],    G = F^n, from F_{l−1} to F_l

    Args:
        shares: q of the levels from the lowest score to the highest, above 0; they add up to 1. [L]
        n: at least 1.
        tied: True for the levels whose scores repeat; None for all. [L]
    """
    q = np.asarray(shares, dtype=float)
    if n < 1 or q.ndim != 1 or not (q > 0).all() or abs(q.sum() - 1.0) > 1e-9:
        raise ValueError("wanted n at least 1, and shares above 0 that add up to 1")
    tied = np.ones(q.size, dtype=bool) if tied is None else np.asarray(tied, dtype=bool)
    below = np.concatenate([[0.0], np.minimum(np.cumsum(q), 1.0)]) ** n
    p = np.diff(below)
    with np.errstate(divide="ignore", invalid="ignore"):    # a rare lowest level never wins, as far as float64 can tell
        levels = np.where(p > 0.0, p * np.log(p / q), 0.0)
        inside = below * math.log(n) + (n - 1) / n * np.where(below > 0.0, below * (np.log(below) - 1.0), 0.0)
    return float(np.where(tied, levels, np.diff(inside)).sum())


def within_prompt_spread(scores: ArrayLike) -> float:
    """σ: standard deviation of the scores among responses to one prompt, its square averaged over prompts.

    Args:
        scores: [P, N], N at least 2.
    """
    return float(np.sqrt(np.asarray(scores, dtype=float).var(axis=1, ddof=1).mean()))


def tilt_gain(sigma: float, kl: ArrayLike) -> np.ndarray:
    """The most that a KL buys where the reference's scores are Gaussian: σ √(2 KL), by tilting with e^{r/β}.

    Scores with heavier tails than a Gaussian's can gain more. Source: docs/maths.md 21.
    """
    return sigma * np.sqrt(2.0 * np.asarray(kl, dtype=float))


def score_at(
    kl: Sequence[float], scores: Sequence[float], stderrs: Sequence[float], at: float
) -> tuple[float, float] | None:
    """The score that a curve has at a KL, with its standard error, off a line in √KL through its points near there.

    The error is from the points' spread around the line, or from their own errors where these are larger.

    Args:
        kl: nats per response; only points within a factor of ``REACH`` of ``at`` are read.
        scores: of the same points.
        stderrs: of the scores.
        at: nats per response, above 0.

    Returns:
        None where fewer than three points are near, or all at one KL, or ``at`` is beyond all of them.
    """
    nats, values, errors = (np.asarray(column, dtype=float) for column in (kl, scores, stderrs))
    near = (nats > at / REACH) & (nats < at * REACH)
    x = np.sqrt(nats[near]) - math.sqrt(at)
    if near.sum() < 3 or np.ptp(x) < LEAST_RANGE or not x.min() <= LEAST_RANGE or not x.max() >= -LEAST_RANGE:
        return None
    design = np.stack([np.ones_like(x), x], axis=1)
    solution, *_ = np.linalg.lstsq(design, values[near], rcond=None)
    residuals = values[near] - design @ solution
    variance = max((errors[near] ** 2).mean(), (residuals**2).sum() / max(len(x) - 2, 1))
    return float(solution[0]), float(math.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0]))
