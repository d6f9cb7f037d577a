"""How far a mean may lie from that of a sample whose spread sits in few of its members.

Where 2 % of the responses carry half of a KL, or its logarithm is normal, the samples that lie too low are those that
missed a large response, and they look calm: their own standard error is too small as well. ± t and the bootstrap see
only what was drawn. Here each member gets a random weight, and one more that was *not* drawn stands beside them.
"""

import math
from statistics import NormalDist

import numpy as np

REACH_ABOVE = 7.0       # of the member not drawn, in largest deviations, times the members that make up the spread
REACH_BELOW = 4.0       # a KL's tail is above it
LEAST_REACH = 0.25
MOST_REACH = 4.0
TAIL_REACH = 0.125      # more for each unit of kurtosis
FEW = 16                # members: below, a quarter of a unit of reach more for each that is missing
MOST_STEPS = 60         # of either search; a handful are taken


def effective_number(residuals: np.ndarray) -> float:
    """How many members make up the spread: (Σ r²)² / Σ r⁴, between 1 and their number; that number where none differs.

    Args:
        residuals: deviations from the mean. [n]
    """
    squares = residuals**2
    fourth = float((squares**2).sum())
    return float(squares.sum()) ** 2 / fourth if fourth > 0.0 else float(residuals.size)


def upper_reach(residuals: np.ndarray) -> float:
    """How far above its mean the member not drawn is placed, in units of the largest deviation.

        ¼ + (7 + max(0, 16 − n)/4 + kurtosis/8) / n_eff,  at most 4;    n_eff: ``effective_number``, kurtosis n/n_eff

    Many that share the spread leave little to fear; one that carries it may have larger ones behind it. The constants
    are those with which 97.5 % ends hold for normal, gamma and lognormal samples, and for rare spikes that were seen
    (docs/maths.md 8).
    """
    count, effective = residuals.size, effective_number(residuals)
    fear = REACH_ABOVE + 0.25 * max(0, FEW - count) + TAIL_REACH * count / effective
    return min(LEAST_REACH + fear / effective, MOST_REACH)


def weighted_end(numerators: np.ndarray, denominators: np.ndarray, reach: float, tail: float) -> float:
    """The value that Σ w N / Σ w D exceeds with a chance of ``tail``, the weights w being drawn at random.

    w are independent and exponential (the Bayesian bootstrap); one more pair stands beside the n, with a mean
    denominator and ``reach`` times the largest deviation. Its weight stands for what was not drawn: for a share that
    was seen k times in n this is the end of Clopper and Pearson's interval. P(Σ w (N − c D) > 0) is known to a few
    percent by its saddle point, so nothing is drawn.

    Source: Rubin 1981; Learned-Miller and Thomas 2019, arXiv 1905.06208; Lugannani and Rice 1980.

    Args:
        numerators, denominators: N, and D above 0. [n], n at least 2, N − R D not all 0.
        reach: at least 0.
        tail: between 0 and ½.
    """
    ratio, size = numerators.sum() / denominators.sum(), denominators.mean()
    deviations = numerators - ratio * denominators
    tops, bottoms = np.append(numerators, ratio * size + reach * deviations.max()), np.append(denominators, size)
    low, high, wanted = ratio, (tops / bottoms).max(), -NormalDist().inv_cdf(tail)
    value = min(ratio + wanted * math.sqrt((deviations**2).sum()) / denominators.sum(), 0.5 * (low + high))
    before = None
    for _ in range(MOST_STEPS):
        miss = _normal_root(tops - value * bottoms) - wanted        # nearly a straight line in the value
        low, high = (value, high) if miss < 0.0 else (low, value)
        if abs(miss) < 1e-7 or high - low <= 1e-12 * abs(high):
            break
        guess = math.inf if before is None or miss == before[1] else value - miss * (value - before[0]) / (
            miss - before[1]
        )
        before = value, miss
        value = guess if low < guess < high else 0.5 * (low + high)
    return float(value)


def _normal_root(coefficients: np.ndarray) -> float:
    """The r with P(Σ a E > 0) = 1 − Φ(r) for independent E ~ Exp(1), by the saddle point of K(s) = −Σ log(1 − s a).

        r = w + log(u/w)/w,    w = sgn(s) √(−2 K(s)),    u = s √K''(s),    K'(s) = 0
    """
    a = coefficients
    if not (a > 0.0).any():
        return math.inf
    low, high, s = 1.0 / min(a.min(), -1e-300), 1.0 / a.max(), 0.0
    for _ in range(MOST_STEPS):
        terms = a / (1.0 - s * a)
        slope, curve = float(terms.sum()), float((terms**2).sum())
        low, high = (low, s) if slope > 0.0 else (s, high)
        step = slope / curve
        s = s - step if low < s - step < high else 0.5 * (low + high)
        if abs(step) <= 1e-10 * (abs(s) + 1e-300):
            break
    left = 1.0 - s * a
    w = math.copysign(math.sqrt(max(0.0, 2.0 * float(np.log(left).sum()))), s)
    u = s * math.sqrt(float(((a / left) ** 2).sum()))
    return w if abs(w) < 1e-4 else w + math.log(u / w) / w      # at the sum's mean the second term is 0 over 0
