"""Whether a KL budget is held at a stated confidence, how many responses would decide it, and how far to scale back.

Scaling an adapter by α goes from the reference (0) to the trained policy (1), and KL(π_α ‖ ρ) grows about as α² near 0.
Nothing guarantees that it grows everywhere, so the search for the largest α within a budget looks at several first and
says so where it does not.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from kltune.core.kl.intervals import Interval, KLSummary

Unit = Literal["nats_per_response", "nats_per_token"]
Standing = Literal["within", "open", "beyond"]
GRID = (1.0, 0.75, 0.5, 0.25)
NARROWEST = 1e-3        # of its upper end: a bracket that is not worth another measurement
RARE = 0.02             # share of the responses that must have shown itself before a near budget is passed
UNSEEN_SIZE = 10.0      # times the largest response: what responses that were not seen are charged with until then
LEAST_EFFECTIVE = 12.0  # responses that make up the spread: with fewer, the interval rests on whether these were drawn
FEW_PROMPTS = 16        # below, a verdict says little of other prompts
FALL = 3.0              # standard errors by which a KL must fall with growing α before that is called a fall


@dataclass(frozen=True)
class Verdict:
    """Whether a KL budget is held. more_responses: about how many more would tell, None when decided or unknown.

    wants_prompts: no number of further answers to these prompts would tell; other prompts might. reason: why it is
    inconclusive, and whether it rests on few prompts; None where there is nothing to say.
    """

    verdict: Literal["pass", "fail", "inconclusive"]
    more_responses: int | None = None
    wants_prompts: bool = False
    reason: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Figures:
    """A measured KL in one unit: the estimate, its standard error and floor, its interval; see ``KLSummary``.

    largest: the most nats of one response, in the unit. effective: how many responses make up the spread.
    """

    estimate: float
    stderr: float | None
    floor: float | None
    ci: Interval | None
    largest: float
    effective: float | None


def figures_in(summary: KLSummary, unit: Unit) -> Figures:
    """The figures of a summary that a budget in this unit is about; ValueError for another unit."""
    if unit == "nats_per_response":
        return Figures(
            summary.nats_per_response, summary.stderr, summary.floor, summary.ci, summary.largest,
            summary.effective_responses,
        )
    if unit == "nats_per_token":
        largest = summary.largest * summary.responses / summary.tokens
        return Figures(
            summary.nats_per_token, summary.token_stderr, summary.token_floor, summary.token_ci, largest,
            summary.token_effective,
        )
    raise ValueError(f"unit is {unit!r}, must be nats_per_response or nats_per_token")


def verdict(
    summary: KLSummary,
    max_kl: float,
    unit: Unit = "nats_per_response",
    confidence: float = 0.95,
    *,
    fresh_prompts: bool = True,
    rounding: float = 0.0,
) -> Verdict:
    """Whether the measured KL(policy ‖ reference) is within a budget, at the confidence of its interval.

        pass: upper end + unseen + rounding ≤ max_kl      fail: lower end − rounding > max_kl      else inconclusive,
        and the interval decides once its half h that faces the budget has shrunk to |max_kl − estimate|

    No interval knows of what was never drawn. Until ``RARE`` of the responses would have shown themselves at this
    confidence (183 responses at 95 %), or where the spread sits in fewer than ``LEAST_EFFECTIVE`` of them, the share
    that may have stayed away is charged with ten times the largest KL seen (unseen): a far budget is passed all the
    same, and a near one is not.

    The standard error falls with the root of the number of responses if further ones answer further prompts. If they
    answer the same prompts again, only the part falls that is due to the answers: the prompts' own differences stay
    (``KLSummary.floor``). Both ends are those of the *two-sided* interval: simple, and conservative (95 % two-sided is
    97.5 % on the side that decides). One prompt is always inconclusive.

    Args:
        summary: from ``summarize``.
        max_kl: the budget, in ``unit``, finite.
        unit: which of the two figures the budget is about.
        confidence: the confidence wanted; it must be the one the summary was made at.
        fresh_prompts: there are prompts that have not been answered yet.
        rounding: KL in the unit that the weights' dtype makes where there is none; no number of responses lowers it.

    Returns:
        The verdict.

    Raises:
        ValueError: the estimate, its interval or ``max_kl`` is not finite (what was not measured passes no gate), the
            unit is unknown, or ``summary`` was made at another confidence.
    """
    figures = figures_in(summary, unit)
    estimate, ci = figures.estimate, figures.ci
    if confidence != summary.confidence:
        raise ValueError(f"the interval was made at confidence {summary.confidence}, not {confidence}")
    if not all(map(math.isfinite, (estimate, max_kl, *(ci or ())))):
        raise ValueError(f"no verdict on a KL of {estimate} with interval {ci} against a budget of {max_kl} {unit}")
    if ci is None or figures.stderr is None:
        return Verdict("inconclusive", wants_prompts=True, reason="one prompt says nothing of others")
    few = f"{summary.prompts} prompts say little of others" if summary.prompts < FEW_PROMPTS else None
    wanted, doubt = _wanted_for_tails(summary.responses, figures.effective, confidence)
    charge = _unseen(summary.responses, figures.largest, confidence) if doubt else 0.0
    if ci[1] + charge + rounding <= max_kl:
        return Verdict("pass", reason=few)
    if ci[0] - rounding > max_kl:
        return Verdict("fail", reason=few)
    if ci[1] + charge <= max_kl or ci[0] > max_kl:
        doubt = f"rounding in the weights' dtype alone makes {rounding:.2g} of it; measure in float32"
        return Verdict("inconclusive", reason=_joined(doubt, few))
    if ci[1] <= max_kl:
        return Verdict("inconclusive", max(1, wanted - summary.responses), reason=_joined(doubt, few))
    open_one = _straddling(summary, figures, max_kl, fresh_prompts)
    more = open_one.more_responses
    if more is not None and doubt and estimate < max_kl:
        more = max(more, wanted - summary.responses)
    return Verdict("inconclusive", more, open_one.wants_prompts, _joined("the interval straddles the budget", few))


def _straddling(summary: KLSummary, figures: Figures, max_kl: float, fresh_prompts: bool) -> Verdict:
    """What would settle an interval that holds the budget."""
    needed = _needed_stderr(figures.estimate, figures.stderr, figures.ci, max_kl)
    floor = 0.0 if fresh_prompts or figures.floor is None else figures.floor
    if needed == 0.0:
        return Verdict("inconclusive")
    if needed <= floor:
        return Verdict("inconclusive", wants_prompts=True)
    responses = summary.responses * (figures.stderr**2 - floor**2) / (needed**2 - floor**2)
    return Verdict("inconclusive", max(1, math.ceil(responses - summary.responses)))


def _wanted_for_tails(responses: int, effective: float | None, confidence: float) -> tuple[int, str | None]:
    """Responses with which the tail is known well enough for a near budget, and why there are too few; None: enough."""
    tail = 0.5 * (1.0 - confidence)
    seen = math.ceil(math.log(tail) / math.log1p(-RARE))
    if responses < seen:
        return seen, (
            f"{responses} responses cannot show what {RARE:.0%} of them may do, {seen} can: so few pass only a "
            "budget further away"
        )
    if effective is not None and effective < LEAST_EFFECTIVE:
        wanted = math.ceil(responses * LEAST_EFFECTIVE / effective)
        return wanted, (
            f"the spread sits in about {effective:.0f} of the {responses} responses, and the interval rests on "
            "whether these were drawn"
        )
    return responses, None


def _unseen(responses: int, largest: float, confidence: float) -> float:
    """What responses that were not seen may add: the share that may have stayed away, at ten times the largest seen."""
    share = 1.0 - (0.5 * (1.0 - confidence)) ** (1.0 / responses)
    return share * UNSEEN_SIZE * largest


def _joined(*reasons: str | None) -> str:
    return "; ".join(reason for reason in reasons if reason)


def standing(summary: KLSummary, cap: float, unit: Unit = "nats_per_response") -> Standing:
    """Where a measured KL(policy ‖ reference) stands to a cap that must not be passed.

        within: upper end of the interval ≤ cap     beyond: estimate > cap, or not finite     else open

    Within is what the interval says, without what ``verdict`` charges for responses that were not seen: a run that is
    held to its cap is measured again and again. Beyond does not wait until chance is ruled out, for then it would be
    far beyond.

    Args:
        summary: from ``summarize``.
        cap: in ``unit``, finite.
        unit: which of the two figures the cap is about.
    """
    figures = figures_in(summary, unit)
    if not figures.estimate <= cap:
        return "beyond"
    return "within" if figures.ci is not None and figures.ci[1] <= cap else "open"


def _needed_stderr(estimate: float, stderr: float, ci: Interval, max_kl: float) -> float:
    """The standard error at which the side of the interval that faces the budget just reaches it."""
    half = ci[1] - estimate if estimate < max_kl else estimate - ci[0]
    return stderr * abs(max_kl - estimate) / half


def looks(first: int, most: int) -> tuple[int, ...]:
    """How many responses there are each time a measurement that keeps sampling is looked at: doubling up to the most.

    Args:
        first: responses before the first look, at least 1.
        most: responses before the last.
    """
    counts = [min(first, most)]
    while counts[-1] < most:
        counts.append(min(2 * counts[-1], most))
    return tuple(counts)


def confidence_per_look(confidence: float, count: int) -> float:
    """The confidence of each of several intervals that are looked at in turn, so that all hold together.

        1 − (1 − confidence) / count

    Whoever looks until the answer pleases is wrong more often than one interval says. The chance that *any* of
    ``count`` intervals misses is at most the sum of their chances (Bonferroni), whatever the rule for stopping.

    Args:
        confidence: of the whole procedure.
        count: how many looks were planned before the first.
    """
    return 1.0 - (1.0 - confidence) / count


@dataclass(frozen=True)
class AlphaPoint:
    """A measurement at one α. nats, stderr: KL and its standard error. bound: what must not exceed the budget."""

    alpha: float
    nats: float
    stderr: float
    bound: float


@dataclass(frozen=True)
class Search:
    """alpha: the largest that was found to meet the budget, 0 if none did. points: all that was measured, by α.

    falls: pairs of α between which the KL fell though α grew; the answer is then the largest α found, and there may
    be others below it that do not meet the budget.
    """

    alpha: float
    points: tuple[AlphaPoint, ...]
    falls: tuple[tuple[float, float], ...]


def largest_alpha(
    measure: Callable[[float], AlphaPoint],
    budget: float,
    *,
    grid: Sequence[float] = GRID,
    tolerance: float = 0.01,
    tries: int = 12,
) -> Search:
    """Find the largest α in (0, 1] whose bound is within a budget.

    The grid is measured from above until α's that do and do not meet the budget enclose the answer; the bracket is
    then narrowed, each try placed where a power law through its ends meets the budget, and at least a tenth of the
    bracket away from either end.

    Args:
        measure: the measurement at an α, with the same random numbers for every α.
        budget: in the unit of ``AlphaPoint.bound``, above 0.
        grid: α's to begin with; all of them are measured unless the first meets the budget.
        tolerance: share of the budget that may be left unused.
        tries: measurements after those of the grid.
    """
    points: dict[float, AlphaPoint] = {}

    def look(alpha: float) -> AlphaPoint:
        points[alpha] = measure(alpha)
        return points[alpha]

    for alpha in sorted(grid, reverse=True):
        if look(alpha).bound <= budget and len(points) == 1:
            return Search(alpha, tuple(points.values()), ())
    within = [alpha for alpha, point in points.items() if point.bound <= budget]
    low = max(within, default=0.0)
    high = min(alpha for alpha in points if alpha > low)
    for _ in range(tries):
        unused = budget - points[low].bound if low else budget
        if unused <= tolerance * budget or high - low < NARROWEST * high:
            break
        alpha = _between(low, points[low].bound if low else 0.0, high, points[high].bound, budget)
        if look(alpha).bound <= budget:
            low = alpha
        else:
            high = alpha
    ordered = sorted(points.values(), key=lambda point: point.alpha)
    falls = tuple(
        (a.alpha, b.alpha)
        for a, b in pairwise(ordered)
        if a.nats - b.nats > FALL * math.hypot(a.stderr, b.stderr)
    )
    return Search(low, tuple(ordered), falls)


def _between(low: float, low_bound: float, high: float, high_bound: float, budget: float) -> float:
    """Where bound ∝ α^k through both ends meets the budget; k = 2 where the lower end is the reference itself."""
    if low > 0.0 and 0.0 < low_bound < high_bound and math.isfinite(high_bound):
        power = math.log(high_bound / low_bound) / math.log(high / low)
        guess = low * (budget / low_bound) ** (1.0 / power)
    else:
        guess = high * math.sqrt(budget / high_bound) if math.isfinite(high_bound) else 0.5 * (low + high)
    margin = 0.1 * (high - low)
    return min(max(guess, low + margin), high - margin)
