"""How sure a measured KL is: standard errors by prompt and confidence intervals.

Responses to one prompt are alike, so the prompt is the unit that counts (a cluster), however many lines of a file
it is on. Both figures are ratios of sums,
nats / responses and nats / tokens, and both get the standard error of a ratio; with equally many responses per prompt
the first is the plain sd(prompt means) / √m. Never the mean of each response's own nats per token: length and
divergence are correlated, and that mean can even have the wrong sign (docs/maths.md 2).
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from kltune.core.kl.bounds import FEW, REACH_BELOW, effective_number, upper_reach, weighted_end

Interval = tuple[float, float]
NO_SPREAD = 1e-12           # of the mean, for its standard error: prompts that differ by rounding alone
NEARLY_ONE = 1.0 - 1e-9     # a correlation whose artanh is finite
ROUNDING = 1e-4             # nats per response: what float32 log-probabilities of a response may be off by


@dataclass(frozen=True)
class KLSummary:
    """A measured KL with its uncertainty, per response and per token.

    ``stderr``, ``ci`` and their per-token twins are None where they cannot be known: one prompt, or a value that is
    not finite. The intervals are two-sided at ``confidence``. ``floor`` and ``token_floor`` are the standard errors
    that would be left if these same prompts were answered without end, None where no prompt was answered twice.
    largest: the most nats of a single response. effective_responses: how many make up the spread, None where that
    cannot be known; token_effective: that of the nats per token.
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
    largest: float = 0.0
    effective_responses: float | None = None
    token_effective: float | None = None


def summarize(
    estimator: str,
    kl_per_response: Tensor,
    tokens_per_response: Tensor,
    prompt_index: Tensor,
    confidence: float = 0.95,
) -> KLSummary:
    """The mean KL per response and per token, with standard errors and intervals clustered by prompt.

        R = Σ_j N_j / Σ_j D_j,    se = √(m/(m−1) Σ_j (N_j − R D_j)²) / Σ_j D_j

    over the m prompts j, with N the nats of a prompt's responses and D their number (or their tokens). The ends of the
    interval are those of a mean with random weights and one prompt more that was not drawn (bounds.py); or R ± t_{m−1}
    se where that is further, for the lower end below 16 prompts only: with more, a KL's lower end is nearer. KL is
    skewed, and R ± t se holds a lognormal one .75 to .86 of the time (docs/maths.md 8).

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
    known = math.isfinite(per_response)
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
        largest=float(nats.max()) if known else math.inf,
        effective_responses=effective_number(nats - per_response) if known else None,
        token_effective=effective_number(nats - per_token * tokens) if known else None,
    )


def cluster_numbers(items: Sequence[Hashable]) -> Tensor:
    """Which items are the same: the place of the first that equals each. [B] int64.

    Where all are the same they say nothing of any other, and given that one they are independent: each its own.
    """
    first: dict[Hashable, int] = {}
    places = [first.setdefault(item, place) for place, item in enumerate(items)]
    return torch.tensor(places) if len(first) > 1 else torch.arange(len(places))


def clustered_mean(values: Tensor, prompt_index: Tensor) -> tuple[float, float | None]:
    """A mean over responses and its standard error by prompt; by response where all answer one prompt.

    Args:
        values: one number per response, finite. [B].
        prompt_index: which prompt a response answers; any integers. [B].

    Returns:
        (mean, standard error); None for the error of a single response.
    """
    return mean_of_sides((values, prompt_index))


def mean_of_sides(*sides: tuple[Tensor, Tensor]) -> tuple[float, float | None]:
    """The mean of several means over responses to the same prompts, and its standard error by prompt.

        ½ (Ā + B̄):    se = √(m/(m−1) Σ_j d_j²),    d_j = ½ (Σ_{i∈j} (A_i − Ā) / n_A + Σ_{i∈j} (B_i − B̄) / n_B)

    over the m prompts j: what the sides share is counted once. By response where all answer one prompt.

    Args:
        sides: of each, one finite number per response, and which prompt it answers, by any integers. [B] both.

    Returns:
        (mean, standard error); None for the error of a single response.
    """
    mean = float(np.mean([_as_numbers(values).mean() for values, _ in sides]))
    return mean, error_of_shares(prompt_shares(*sides))


def prompt_shares(*sides: tuple[Tensor, Tensor]) -> np.ndarray:
    """d_j of ``mean_of_sides``: what each prompt adds to the mean's deviation; of each response where all answer one.

    Shares of several means over the same prompts can be averaged before ``error_of_shares``. [m]
    """
    numbers = [_as_numbers(values) for values, _ in sides]
    prompts = np.concatenate([torch.as_tensor(index).cpu().numpy() for _, index in sides])
    if np.unique(prompts).size == 1:
        prompts = np.arange(prompts.size)       # given the prompt, responses are independent
    parts = np.concatenate([(values - values.mean()) / (values.size * len(sides)) for values in numbers])
    return _sums_by_prompt(prompts, parts)[0]


def error_of_shares(shares: np.ndarray) -> float | None:
    """The standard error of a mean from the shares d_j of its prompts, [m]; None where there is one."""
    count = shares.size
    return math.sqrt(float((shares**2).sum()) * count / (count - 1)) if count > 1 else None


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
    if stderr <= NO_SPREAD * abs(ratio):
        return ratio, stderr, (ratio, ratio)
    residuals, tail = numerators - ratio * denominators, 0.5 * (1.0 - confidence)
    student = student_t_quantile(confidence, prompts - 1) * stderr
    high = max(weighted_end(numerators, denominators, upper_reach(residuals), tail), ratio + student)
    low = -weighted_end(-numerators, denominators, REACH_BELOW / effective_number(residuals), tail)
    return ratio, stderr, (min(low, ratio - student) if prompts < FEW else low, high)


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


def wilson(share: float, count: float, confidence: float = 0.95) -> Interval:
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


def rank_correlation(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95
) -> tuple[float | None, Interval | None]:
    """Spearman's rank correlation of pairs, and its interval by Fisher's z.

        tanh(artanh ρ ± z √((1 + ρ²/2) / (n − 3)))

    Source: Bonett and Wright 2000.

    Args:
        first, second: n numbers each; equal ones share their mean rank.
        confidence: of the interval, two-sided.

    Returns:
        (ρ, its interval); ρ is None where one of the two does not vary, the interval also below 4 pairs.
    """
    ranks = [_ranks(np.asarray(values, dtype=float)) for values in (first, second)]
    spread = [values - values.mean() for values in ranks]
    size = math.sqrt(float((spread[0] ** 2).sum() * (spread[1] ** 2).sum()))
    if size == 0.0:
        return None, None
    rho = max(-1.0, min(1.0, float((spread[0] * spread[1]).sum()) / size))
    if len(first) < 4:
        return rho, None
    half = NormalDist().inv_cdf(0.5 + 0.5 * confidence) * math.sqrt((1.0 + rho * rho / 2.0) / (len(first) - 3))
    middle = math.atanh(max(-NEARLY_ONE, min(NEARLY_ONE, rho)))
    return rho, (math.tanh(middle - half), math.tanh(middle + half))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Of each value from 1, the mean rank for equal ones."""
    return (values[:, None] > values).sum(1) + 0.5 * ((values[:, None] == values).sum(1) + 1)


def clustered_share(outcomes: Tensor, prompt_index: Tensor, confidence: float = 0.95) -> tuple[float, float, float]:
    """A share of outcomes with Wilson's interval for as many independent ones as they are worth.

        n = p(1 − p) / se²,  between 1 and B,    se by prompt;    the number of prompts where p is 0 or 1

    Args:
        outcomes: from 0 to 1, ½ for a tie. [B].
        prompt_index: which prompt each is of; where all differ n is B. [B].
        confidence: of the interval, two-sided.

    Returns:
        (share, low, high).
    """
    share, stderr = clustered_mean(outcomes, prompt_index)
    prompts, count = torch.as_tensor(prompt_index).unique().numel(), float(len(outcomes))
    if prompts < count:
        count = min(count, max(1.0, share * (1.0 - share) / stderr**2)) if stderr else float(prompts)
    return share, *wilson(share, count, confidence)
