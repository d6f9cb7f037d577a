"""How far to dial an adapter back: the largest share of it whose KL still meets a budget.

Scaling an adapter by α goes from the reference (0) to the trained policy (1), and KL(π_α ‖ ρ) grows about as α² near 0
(MATH 4.7). Nothing guarantees that it grows everywhere, so the search looks at several α first and says so where not.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

GRID = (1.0, 0.75, 0.5, 0.25)
NARROWEST = 1e-3        # of its upper end: a bracket that is not worth another measurement
FALL = 3.0              # standard errors by which a KL must fall with growing α before that is called a fall


@dataclass(frozen=True)
class Point:
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
    points: tuple[Point, ...]
    falls: tuple[tuple[float, float], ...]


def largest_alpha(
    measure: Callable[[float], Point],
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
        budget: in the unit of ``Point.bound``, above 0.
        grid: α's to begin with; all of them are measured unless the first meets the budget.
        tolerance: share of the budget that may be left unused.
        tries: measurements after those of the grid.
    """
    points: dict[float, Point] = {}

    def look(alpha: float) -> Point:
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
