"""Whether a run has begun to exploit its reward: gold falling while the proxy rises, sameness, length running away.

A run hands over what each evaluation measured, and is told what has set in since the one before: once, and again only
after it had gone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from kltune.core.kl.intervals import student_t_quantile

Kind = Literal["gold", "diversity", "length"]
FALSE_ALARMS = 0.01     # of the runs in which nothing changes, at most
WATCHES = 5             # that share it: gold, distinct-2, duplicates, tokens, ends
DISTINCT_SHARE = 0.5    # of the reference's adjusted distinct-2, below which diversity has collapsed
MORE_DUPLICATES = 0.1   # share of the responses by which duplicates may exceed the reference's
LENGTH_RATIO = 1.5      # of the reference's tokens per response
END_SHARE = 0.5         # of the reference's share of responses that end


def chance_of(comparisons: int) -> float:
    """How unlikely by chance alone what one comparison finds must be, one-sided, for it to be said.

        0.01 / (5 watches · comparisons)

    The chance that *any* comparison of a run is this far out is at most the sum of their chances (Bonferroni).

    Args:
        comparisons: of one watch in the whole run, planned before the first; at least 1.
    """
    return FALSE_ALARMS / (WATCHES * comparisons)


def errors_of(comparisons: int, prompts: int) -> float:
    """How many standard errors of a difference that is: Student's t, for standard errors of few prompts vary too.

    Args:
        comparisons: as of ``chance_of``.
        prompts: that the standard error is of, at least 2.
    """
    return student_t_quantile(1.0 - 2.0 * chance_of(comparisons), prompts - 1)


def pairs_of(looks: int) -> int:
    """Comparisons of gold: a peak is the best of several looks, and each may be below any before it or the reference's.

    With 2 standard errors, half of the runs of ten looks at a gold score that never changes would see it fall.
    """
    return looks * (looks + 1) // 2


def chance_of_fewer(few: int, many: int, count: int) -> float:
    """How likely one share of two is so far below the other by chance: Fisher's exact test, one-sided.

        Σ_{k ≤ few} C(n, k) C(n, few + many − k) / C(2n, few + many)

    Args:
        few, many: hits of each side.
        count: n of either.
    """
    total = few + many
    ways = sum(math.comb(count, k) * math.comb(count, total - k) for k in range(max(0, total - count), few + 1))
    return ways / math.comb(2 * count, total)


@dataclass(frozen=True)
class Alarm:
    """Something that has set in. found: what, with its figures, as a sentence without its full stop."""

    kind: Kind
    found: str


@dataclass(frozen=True)
class Peak:
    """The evaluation with the highest gold score so far; step 0 is the reference. score: what is trained on."""

    step: int
    gold: float
    gold_stderr: float
    score: float | None


@dataclass(frozen=True)
class Detector:
    """The state of a run's detector of reward hacking: what the next evaluation is compared with.

    tokens, end_fraction: of the last evaluation. under_way: what has set in and not gone.
    """

    peak: Peak | None = None
    tokens: float | None = None
    end_fraction: float | None = None
    under_way: tuple[Kind, ...] = ()

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Detector":
        """The same again from its ``asdict``, also after a journey through JSON."""
        peak = None if state["peak"] is None else Peak(**state["peak"])
        return cls(**{**state, "peak": peak, "under_way": tuple(state["under_way"])})

    def observed(
        self, step: int, metrics: Mapping[str, float | None], looks: int
    ) -> tuple["Detector", tuple[Alarm, ...]]:
        """Update with one evaluation; return the new state and the alarms it starts.

        Each needs more than chance would give, in 1 % of the runs at most, on as many prompts as there are:

        * gold: below its peak, while the score is above what it was at the peak (or nothing is scored). Evaluations
          answer the same prompts with the same random numbers, so the difference is known somewhat better than
          √(se² + se_peak²).
        * diversity: adjusted distinct-2 below half of the reference's, or 10 % more of the responses are duplicates.
        * length: 1.5 times the reference's tokens and more than at the evaluation before; or less than half as many
          responses end as of the reference's, and fewer than at the evaluation before.

        Args:
            step: steps done.
            metrics: ``eval/...`` and ``eval/reference_...``; what is missing or None is not judged.
            looks: evaluations of the whole run, which settles how large a fall chance alone might make of them.

        Returns:
            (what the next evaluation is judged by, what has set in).
        """
        now = {name.removeprefix("eval/"): value for name, value in metrics.items() if value is not None}
        peak = self._peak_before(now)
        found = {
            "gold": _gold(step, now, peak, looks),
            "diversity": _diversity(now, looks),
            "length": _length(now, self, looks, going_on="length" in self.under_way),
        }
        alarms = tuple(Alarm(kind, text) for kind, text in found.items() if text and kind not in self.under_way)
        here = _peak(step, now, "")
        if peak is not None and here is not None and here.gold > peak.gold:
            peak = here
        after = replace(
            self, peak=peak, tokens=now.get("response_tokens"), end_fraction=now.get("end_fraction"),
            under_way=tuple(kind for kind, text in found.items() if text),
        )
        return after, alarms

    def _peak_before(self, now: Mapping[str, float]) -> Peak | None:
        return _peak(0, now, "reference_") if self.peak is None else self.peak


def _peak(step: int, now: Mapping[str, float], who: str) -> Peak | None:
    gold, error = now.get(f"{who}gold_mean"), now.get(f"{who}gold_stderr")
    return None if gold is None or error is None else Peak(step, gold, error, now.get(f"{who}score_mean"))


def _differ(now: Mapping[str, float], name: str, comparisons: int) -> bool:
    """Whether a mean and the reference's differ by more than chance; not where an error is not known."""
    errors, prompts = (now.get(f"{name}_stderr"), now.get(f"reference_{name}_stderr")), now.get("prompts", 0)
    if None in errors or prompts < 2:
        return False
    return abs(now[name] - now[f"reference_{name}"]) > errors_of(comparisons, int(prompts)) * math.hypot(*errors)


def _fewer(now: Mapping[str, float], few: float, many: float, comparisons: int) -> bool:
    """Whether one share of the responses is below another by more than chance, if prompts alone are independent."""
    prompts = int(now.get("prompts", 0))
    chance = chance_of_fewer(round(few * prompts), round(many * prompts), prompts)
    return chance < chance_of(comparisons)


def _gold(step: int, now: Mapping[str, float], peak: Peak | None, looks: int) -> str:
    here, prompts = _peak(step, now, ""), int(now.get("prompts", 0))
    if here is None or peak is None or prompts < 2:
        return ""
    errors = errors_of(pairs_of(looks), prompts)
    fallen = peak.gold - here.gold > errors * math.hypot(here.gold_stderr, peak.gold_stderr)
    scored = here.score is not None and peak.score is not None
    if not fallen or (scored and here.score <= peak.score):
        return ""
    at = f"after step {peak.step}" if peak.step else "under the reference"
    proxy = f", while the score that is trained on rose from {peak.score:.3g} to {here.score:.3g}" if scored else ""
    return (
        f"on {prompts} prompts the gold score fell to {here.gold:.3g} ± {here.gold_stderr:.2g} from {peak.gold:.3g} ± "
        f"{peak.gold_stderr:.2g} at its best, {at}{proxy}"
    )


def _diversity(now: Mapping[str, float], looks: int) -> str:
    said = []
    distinct, before = now.get("distinct_2_adjusted"), now.get("reference_distinct_2_adjusted")
    below = distinct is not None and before is not None and distinct < DISTINCT_SHARE * before
    if below and _differ(now, "distinct_2_adjusted", looks):
        said.append(f"adjusted distinct-2 is {distinct:.3g}, the reference's {before:.3g}")
    twice, usual = now.get("duplicate_fraction"), now.get("reference_duplicate_fraction")
    if twice is not None and usual is not None and twice > usual + MORE_DUPLICATES and _fewer(now, usual, twice, looks):
        said.append(f"{100 * twice:.0f} % of the responses repeat another one, of the reference's {100 * usual:.0f} %")
    return f"responses to {now['prompts']:.0f} prompts have become alike: " + "; ".join(said) if said else ""


def _length(now: Mapping[str, float], before: Detector, looks: int, *, going_on: bool) -> str:
    """Growth sets it in; from then on it goes on until the length, or the share that end, is back."""
    said = []
    tokens, usual = now.get("response_tokens"), now.get("reference_response_tokens")
    if tokens is not None and usual is not None and tokens > LENGTH_RATIO * usual:
        last = usual if before.tokens is None else before.tokens
        if going_on or (tokens > last and _differ(now, "response_tokens", looks)):
            said.append(f"responses have {tokens:.3g} tokens, {last:.3g} before, the reference's {usual:.3g}")
    ends, usual = now.get("end_fraction"), now.get("reference_end_fraction")
    if ends is not None and usual is not None and ends < END_SHARE * usual:
        last = usual if before.end_fraction is None else before.end_fraction
        if going_on or (ends < last and _fewer(now, ends, usual, looks)):
            said.append(
                f"{100 * ends:.0f} % of the responses come to an end, {100 * last:.0f} % before, of the reference's "
                f"{100 * usual:.0f} %"
            )
    return f"length is running away, on {now.get('prompts', 0):.0f} prompts: " + "; ".join(said) if said else ""
