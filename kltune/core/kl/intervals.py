"""How sure a measured KL is: standard errors by prompt and confidence intervals.

Responses to one prompt are alike, so the prompt is the unit that counts (a cluster). Both figures are ratios of sums,
nats / responses and nats / tokens, and both get the standard error of a ratio; with equally many responses per prompt
the first is the plain sd(prompt means) / √m. Never the mean of each response's own nats per token: length and
divergence are correlated, and that mean can even have the wrong sign (docs/maths.md 2).
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

Interval = tuple[float, float]
NORMAL_FROM = 200           # prompts: from here on Student's t covers as well as the bootstrap (docs/maths.md 8)
BOOTSTRAP_FROM = 5          # prompts: below, too many resamples are one prompt over and over, and the tails are those
RESAMPLES = 2000            # at least; more where fewer than TAIL_RESAMPLES of them would lie in a tail
TAIL_RESAMPLES = 25
LEAST_RESAMPLED = 0.1          # of the sample's standard error, for a resample's: equal prompts have none to divide by
ROUNDING = 1e-4             # nats per response: what float32 log-probabilities of a response may be off by


@dataclass(frozen=True)
class KLSummary:
    """A measured KL with its uncertainty, per response and per token.

    ``stderr``, ``ci`` and their per-token twins are None where they cannot be known: one prompt, or a value that is
    not finite. The intervals are two-sided at ``confidence``. ``floor`` and ``token_floor`` are the standard errors
    that would be left if these same prompts were answered without end, None where no prompt was answered twice.
    """

    estimator: str                  # exact | k1 | k2 | k3
    nats_per_response: float        # Σ nats / Σ responses
    stderr: float | None
    floor: float | None
    ci: Interval | None
    nats_per_token: float           # Σ nats / Σ tokens
    token_stderr: float | None
    token_floor: float | None
    token_ci: Interval | None
    responses: int
    tokens: int
    prompts: int
    confidence: float


def summarize(
    estimator: str,
    kl_per_response: Tensor,
    tokens_per_response: Tensor,
    prompt_index: Tensor,
    confidence: float = 0.95,
) -> KLSummary:
    """The mean KL per response and per token, with standard errors and intervals clustered by prompt.

        R = Σ_j N_j / Σ_j D_j,    se = √(m/(m−1) Σ_j (N_j − R D_j)²) / Σ_j D_j

    over the m prompts j, with N the nats of a prompt's responses and D their number (or their tokens). Interval:
    R ± t_{m−1} se from 200 prompts on; bootstrap-t below (KL is skewed, and ± t covers 90 % of the time where it says
    95 %: docs/maths.md 8); ± t again below 5 prompts, where resampling has nothing to resample. The bootstrap is
    seeded: the same numbers give the same interval.

    Args:
        estimator: the name of the estimator, carried along.
        kl_per_response: summed over each response's tokens. [B], nats.
        tokens_per_response: [B], at least 1 each.
        prompt_index: which prompt a response answers; any integers. [B].
        confidence: of the two-sided intervals, between 0 and 1.

    Returns:
        The summary. A KL that is not finite gives that value, and None for standard errors and intervals.

    Raises:
        ValueError: no responses, the three differ in shape, a response without tokens, or ``confidence`` is not
            between 0 and 1.
    """
    nats, tokens = _as_numbers(kl_per_response), _as_numbers(tokens_per_response)
    if not nats.size or nats.ndim != 1 or not nats.shape == tokens.shape == tuple(torch.as_tensor(prompt_index).shape):
        raise ValueError("nats, tokens and prompt of each response: three [B] of one length, at least 1")
    if not (tokens >= 1).all():
        raise ValueError("a response has at least one token: its end")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}, must be between 0 and 1")

    sums = _sums_by_prompt(prompt_index, nats, np.ones_like(nats), tokens)
    per_response, stderr, ci = _ratio_interval(sums[0], sums[1], confidence)
    per_token, token_stderr, token_ci = _ratio_interval(sums[0], sums[2], confidence)
    return KLSummary(
        estimator=estimator,
        nats_per_response=per_response,
        stderr=stderr,
        floor=_floor(nats, np.ones_like(nats), prompt_index, stderr),
        ci=ci,
        nats_per_token=per_token,
        token_stderr=token_stderr,
        token_floor=_floor(nats, tokens, prompt_index, token_stderr),
        token_ci=token_ci,
        responses=nats.size,
        tokens=int(tokens.sum()),
        prompts=sums.shape[1],
        confidence=confidence,
    )


def clustered_mean(values: Tensor, prompt_index: Tensor) -> tuple[float, float | None]:
    """A mean over responses and its standard error by prompt; by response where all answer one prompt.

    Args:
        values: one number per response, finite. [B].
        prompt_index: which prompt a response answers; any integers. [B].

    Returns:
        (mean, standard error); None for the error of a single response.
    """
    numbers, prompts = _as_numbers(values), torch.as_tensor(prompt_index)
    if prompts.unique().numel() == 1:
        prompts = torch.arange(numbers.size)        # given the prompt, responses are independent
    sums = _sums_by_prompt(prompts, numbers, np.ones_like(numbers))
    stderr = float(_ratio_stderr(sums[0], sums[1])) if numbers.size > 1 else None
    return float(numbers.mean()), stderr


def agreement_z(
    k1_per_response: Tensor,
    exact_per_response: Tensor,
    prompt_index: Tensor,
    variance_per_response: Tensor | None = None,
) -> float:
    """How many standard errors the sampled and the exact KL(policy ‖ reference) lie apart.

        z_M = mean(M) / se(M),    M = U − C,    U = Σ k1,  C = Σ exact

    If the tokens were drawn from the distribution that was scored, M has mean 0 whatever the models are; another
    temperature, top-p, or another engine's rounding shows here. |z_M| > 4 says: sampler ≠ scored distribution. The
    standard error is by prompt (by response where there is one prompt), and never below 1e-4 nats, under which M is
    rounding: identical models give 0.

    A policy that nearly always says the same has rare tokens that carry half of M's mean, and a sample without one
    has next to no spread: at .999 per token, 64 responses of 32 tokens accuse an honest sampler 14 % of the time.
    Given the variance that the models themselves imply, the standard error is at least √(Σ_i V_i) / n, and does not.

    Source: docs/maths.md 7.

    Args:
        k1_per_response: U. [B], nats.
        exact_per_response: C, of the same responses. [B], nats.
        prompt_index: which prompt a response answers; any integers. [B].
        variance_per_response: V, ``divergence.log_ratio_variance`` summed over each response's tokens. [B], nats².

    Returns:
        z_M, no unit; NaN for a single response, and where M is not finite.

    Raises:
        ValueError: no responses, or the tensors differ in shape.
    """
    gap = _as_numbers(k1_per_response) - _as_numbers(exact_per_response)
    prompts = torch.as_tensor(prompt_index)
    if gap.ndim != 1 or not gap.size or gap.shape != tuple(prompts.shape):
        raise ValueError("k1, exact KL and prompt of each response: three [B] of one length, at least 1")
    if gap.size == 1 or not np.isfinite(gap).all():
        return math.nan
    if prompts.unique().numel() == 1:
        prompts = torch.arange(gap.size)        # given the prompt, responses are independent
    sums = _sums_by_prompt(prompts, gap, np.ones_like(gap))
    stderr = max(float(_ratio_stderr(sums[0], sums[1])), ROUNDING)
    if variance_per_response is not None:
        implied = _as_numbers(variance_per_response)
        if implied.shape != gap.shape:
            raise ValueError(f"one variance per response: found {implied.shape} for {gap.shape} responses")
        stderr = max(stderr, math.sqrt(implied.sum()) / gap.size)
    return float(gap.mean() / stderr)


def student_t_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| ≤ t) = ``confidence`` for Student's T.

    Found by bisection on θ = atan(t/√ν) in the finite series of P(|T| ≤ t), exact for whole ν.

    Source: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.

    Args:
        confidence: two-sided, between 0 and 1.
        degrees: ν, degrees of freedom, at least 1.

    Returns:
        t, above 0.

    Raises:
        ValueError: ``confidence`` is not between 0 and 1, or ``degrees`` is below 1.
    """
    if not 0.0 < confidence < 1.0 or degrees < 1:
        raise ValueError(f"needs confidence between 0 and 1 and degrees at least 1; found {confidence} and {degrees}")
    k = np.arange(1, degrees // 2)
    steps = 2 * k / (2 * k + 1) if degrees % 2 else (2 * k - 1) / (2 * k)
    steps = np.concatenate([[1.0], steps])[: degrees // 2]      # term over term before it, but for cos²
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        theta = 0.5 * (low + high)
        low, high = (theta, high) if _share_within(theta, degrees, steps) < confidence else (low, theta)
    return math.sqrt(degrees) * math.tan(0.5 * (low + high))


def _share_within(theta: float, degrees: int, steps: np.ndarray) -> float:
    """P(|T| ≤ √ν tan θ)."""
    powers = np.full(steps.size, math.cos(theta) ** 2)
    powers[:1] = 1.0
    series = float(np.cumprod(steps * powers).sum())
    if degrees % 2:
        return 2.0 / math.pi * (theta + math.sin(theta) * math.cos(theta) * series)
    return math.sin(theta) * series


def _ratio_interval(
    numerators: np.ndarray, denominators: np.ndarray, confidence: float
) -> tuple[float, float | None, Interval | None]:
    """The ratio of sums over m prompts, its standard error and its two-sided interval. Both arrays [m]."""
    ratio = float(numerators.sum() / denominators.sum())
    prompts = numerators.size
    if prompts == 1 or not math.isfinite(ratio):
        return ratio, None, None
    stderr = float(_ratio_stderr(numerators, denominators))
    if BOOTSTRAP_FROM <= prompts < NORMAL_FROM and stderr > 0.0:
        below, above = _bootstrap_t(numerators, denominators, confidence)
    else:
        below = above = student_t_quantile(confidence, prompts - 1)
    return ratio, stderr, (ratio - below * stderr, ratio + above * stderr)


def _bootstrap_t(numerators: np.ndarray, denominators: np.ndarray, confidence: float) -> Interval:
    """How many standard errors the interval reaches below and above the ratio, from resampled prompts.

    A resample's t = (R* − R) / se*. Its upper tail says how far the estimate can lie *above* the truth, and so sets
    the lower end.
    """
    prompts = numerators.size
    tail = 0.5 * (1.0 - confidence)
    resamples = max(RESAMPLES, math.ceil(TAIL_RESAMPLES / tail))
    drawn = np.random.default_rng(0).integers(prompts, size=(resamples, prompts))
    tops, bottoms = numerators[drawn], denominators[drawn]                      # [resamples, m]
    ratio = numerators.sum() / denominators.sum()
    shift = tops.sum(-1) / bottoms.sum(-1) - ratio
    stderr = np.maximum(_ratio_stderr(tops, bottoms), LEAST_RESAMPLED * _ratio_stderr(numerators, denominators))
    low, high = np.quantile(shift / stderr, [tail, 1.0 - tail])
    return float(high), float(-low)


def _floor(nats: np.ndarray, weights: np.ndarray, prompt_index: Tensor, stderr: float | None) -> float | None:
    """What is left of a ratio's standard error when only the prompts differ and no longer the answers to one prompt.

    Pooled over prompts, the residuals N − R·D within a prompt have variance σ²; n answers put σ²/n into stderr².
    """
    cluster = _clusters(prompt_index)
    spare = nats.size - cluster.max() - 1       # degrees of freedom within prompts
    if stderr is None or spare < 1:
        return None
    residuals = (nats - nats.sum() / weights.sum() * weights) / weights.mean()
    means = np.bincount(cluster, weights=residuals) / np.bincount(cluster)
    within = float(((residuals - means[cluster]) ** 2).sum()) / spare
    return math.sqrt(max(0.0, stderr**2 - within / nats.size))


def _ratio_stderr(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Delta-method standard error of Σ N / Σ D over the prompts, the last axis."""
    prompts = numerators.shape[-1]
    total = denominators.sum(-1)
    ratio = numerators.sum(-1) / total
    residuals = numerators - ratio[..., None] * denominators
    return np.sqrt((residuals**2).sum(-1) * prompts / (prompts - 1)) / total


def _sums_by_prompt(prompt_index: Tensor, *columns: np.ndarray) -> np.ndarray:
    """Each column summed over the responses of each prompt. [columns, m]"""
    cluster = _clusters(prompt_index)
    return np.stack([np.bincount(cluster, weights=column) for column in columns])


def _clusters(prompt_index: Tensor) -> np.ndarray:
    """The prompts numbered from 0. [B]"""
    return np.unique(torch.as_tensor(prompt_index).cpu().numpy(), return_inverse=True)[1]


def _as_numbers(x: Tensor) -> np.ndarray:
    return torch.as_tensor(x).detach().cpu().double().numpy()


def wilson(share: float, count: int, confidence: float = 0.95) -> Interval:
    """Interval of a share of independent trials, which never leaves 0 to 1.

        (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n)

    Source: Wilson 1927.

    Args:
        share: p, successes over trials.
        count: n, trials, at least 1.
        confidence: of the interval, two-sided.
    """
    z = NormalDist().inv_cdf(0.5 + 0.5 * confidence)
    middle, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
