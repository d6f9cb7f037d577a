"""What points of reward against KL say together: seeds of one setting, the law of a curve, the setting to pick.

``name`` is which of a point's figures is meant: "score", "gold" or "win_rate".
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kltune.core.hacking.overoptimization import GainFit, fit_gain, score_at, tilt_gain
from kltune.core.kl.intervals import error_of_shares, student_t_quantile
from kltune.report.frontier.points import FrontierPoint
from kltune.report.plots import Z95

PromptShares = dict[str, np.ndarray]    # of a run's kl, score, gold and win rate: ``intervals.prompt_shares``, [m] each


@dataclass(frozen=True)
class Setting:
    """The seeds of one setting together: means over seeds.

    The standard errors are those between seeds and those of the measurements together. Measurements of the same prompts
    do not become surer by their number: measured afresh, their error is that of the prompts' means over the seeds, and
    else that of one of them. kl_ci95 holds the intervals of all seeds; the others' are at 95 %, with Student's t for
    the few seeds.
    """

    curve: str
    setting: str
    seeds: int
    kl: float
    kl_stderr: float | None
    kl_ci95: tuple[float, float] | None
    score: float | None
    score_stderr: float | None
    gold: float | None
    gold_stderr: float | None
    steps_to_target: tuple[int | None, ...]
    runs: tuple[str, ...]
    score_ci95: tuple[float, float] | None = None
    gold_ci95: tuple[float, float] | None = None
    win_rate: float | None = None
    win_rate_stderr: float | None = None
    win_rate_ci95: tuple[float, float] | None = None

    def half(self, name: str) -> float:
        """Half of a figure's 95 % interval; 0 where its error is not known."""
        ci = getattr(self, f"{name}_ci95", None)
        return Z95 * (getattr(self, f"{name}_stderr") or 0.0) if ci is None else 0.5 * (ci[1] - ci[0])


def pooled(points: Sequence[FrontierPoint], shares: Mapping[str, PromptShares] | None = None) -> list[Setting]:
    """The settings of all points, each once, by curve and KL.

    shares: of each run that was measured on the same prompts as the others, what each prompt adds to a figure's error.
    """
    groups: dict[tuple[str, str], list[FrontierPoint]] = {}
    for point in points:
        groups.setdefault((point.curve, point.setting), []).append(point)
    settings = []
    for (curve, setting), members in groups.items():
        intervals = [point.kl_ci95 for point in members]
        envelope = (
            None if None in intervals
            else (min(low for low, _ in intervals), max(high for _, high in intervals))
        )
        kl, score, gold, wins = (_mean(members, name, shares or {}) for name in ("kl", "score", "gold", "win_rate"))
        settings.append(Setting(
            curve, setting, len(members),
            *kl[:2], envelope, *score[:2], *gold[:2],
            tuple(point.steps_to_target for point in members), tuple(point.run for point in members),
            score[2], gold[2], *wins,
        ))
    order = list(dict.fromkeys(setting.curve for setting in settings))
    return sorted(settings, key=lambda setting: (order.index(setting.curve), setting.kl))


def _mean(
    points: Sequence[FrontierPoint], name: str, shares: Mapping[str, PromptShares]
) -> tuple[float | None, float | None, tuple[float, float] | None]:
    """Mean over seeds, its standard error and its 95 % interval."""
    values = [getattr(point, name) for point in points]
    if None in values:
        return None, None, None
    mean, count = float(np.mean(values)), len(values)
    own = _own_error(points, name, shares)
    between = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else None
    if own is None and between is None:
        return mean, None, None
    half = math.hypot(Z95 * (own or 0.0), student_t_quantile(0.95, count - 1) * between if count > 1 else 0.0)
    return mean, math.hypot(own or 0.0, between or 0.0), (mean - half, mean + half)


def _own_error(points: Sequence[FrontierPoint], name: str, shares: Mapping[str, PromptShares]) -> float | None:
    """What is left of the measurements' own errors in the mean over seeds: what is due to the prompts they share."""
    parts = [shares.get(point.run, {}).get(name) for point in points]
    if all(part is not None for part in parts):
        return error_of_shares(np.mean(parts, axis=0))
    errors = [getattr(point, f"{name}_stderr") for point in points]
    return None if None in errors else math.sqrt(float(np.mean(np.square(errors))))


def pick(settings: Sequence[Setting], budget: float, name: str, reference: dict[str, Any]) -> dict[str, Any]:
    """The best setting whose KL is within a budget, and those that may be as good; curve is None where none is.

    Args:
        budget: nats per response; all of a setting's 95 % intervals must end below it.
        reference: the reference's own score and gold, with their errors.
    """
    within = [
        setting for setting in settings
        if setting.kl_ci95 is not None and setting.kl_ci95[1] <= budget and getattr(setting, name) is not None
    ]
    if not within:
        return {"budget": budget, "judge": name, "curve": None, "setting": None, "runs": [], "tied": []}

    best = max(within, key=lambda setting: getattr(setting, name))
    most = getattr(best, name)

    def enough(other_half: float) -> float:
        """By how much the best must differ from another to be better than it, at 95 %."""
        return math.hypot(best.half(name), other_half)

    tied = [
        {"curve": setting.curve, "setting": setting.setting, "kl": setting.kl} for setting in within
        if setting is not best and most - getattr(setting, name) <= enough(setting.half(name))
    ]
    base = reference[name]
    return {
        "budget": budget,
        "judge": name,
        "reference": base,
        "better_than_reference": base is None or most - base > enough(Z95 * (reference[f"{name}_stderr"] or 0.0)),
        "curve": best.curve,
        "setting": best.setting,
        "kl": best.kl,
        "kl_ci95": best.kl_ci95,
        name: most,
        f"{name}_stderr": getattr(best, f"{name}_stderr"),
        "runs": list(best.runs),
        "tied": tied,
    }


def efficiency(
    setting: Setting, name: str, reference: dict[str, Any], best_of_n: dict[str, Any] | None
) -> dict[str, float | None]:
    """The gain as a share of σ√(2 KL), the most that a KL buys where scores are Gaussian."""
    value, base = getattr(setting, name), reference[name]
    if best_of_n is None or value is None or base is None or name not in best_of_n["sigma"] or setting.kl <= 0.0:
        return {"efficiency": None}
    most = float(tilt_gain(best_of_n["sigma"][name], setting.kl))
    return {"efficiency": (value - base) / most if most > 0.0 else None}


def fits(
    points: Sequence[FrontierPoint], name: str, reference: dict[str, Any], best_of_n: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Gao's law for every curve that is scored, and for best of n; or why it is not claimed."""
    documents = []
    if name == "win_rate":      # a share is no gain, and has an end
        return documents
    base = reference[name]
    scored = [point for point in points if getattr(point, name) is not None and getattr(point, f"{name}_stderr")]
    for curve in dict.fromkeys(point.curve for point in scored):
        known = [point for point in scored if point.curve == curve]
        if base is None:
            fit: GainFit | str = f"the reference's own {name} is not known"
        else:
            gains = [getattr(point, name) - base for point in known]
            errors = [getattr(point, f"{name}_stderr") for point in known]
            fit = fit_gain(
                [max(point.kl, 0.0) for point in known], gains, errors, [point.cluster for point in known],
                reference_stderr=reference.get(f"{name}_stderr") or 0.0,
            )
        documents.append(_fit_document(curve, "rl", name, fit))
    if best_of_n is not None and name in best_of_n["by_prompt"]:
        rows = best_of_n["by_prompt"][name]
        gains = [
            (point["kl_with_ties"], gain, point[f"{name}_stderr"], prompt)
            for row, point in zip(rows, best_of_n["points"], strict=True)
            if point["n"] > 1 and point[f"{name}_stderr"]
            for prompt, gain in zip(best_of_n["prompt_numbers"], row - rows[0], strict=True)
        ]
        fit = fit_gain(*zip(*gains, strict=True), form="best_of_n") if gains else "its responses all score the same"
        documents.append(_fit_document("best of n", "best_of_n", name, fit))
    return documents


def _fit_document(curve: str, form: str, name: str, fit: GainFit | str) -> dict[str, Any]:
    """One fit of the document; a text is the reason why nothing is claimed."""
    claim = {"fit": None, "claim": f"not claimed: {fit}"} if isinstance(fit, str) else {
        "fit": asdict(fit), "claim": fit.claim
    }
    return {"curve": curve, "form": form, "of": name, **claim}


def curves_at(points: Sequence[FrontierPoint], kl: float, name: str) -> dict[str, Any]:
    """What each curve scores at a KL, read off between its points."""
    curves: dict[str, dict[str, float] | None] = {}
    for curve in dict.fromkeys(point.curve for point in points):
        known = [point for point in points if point.curve == curve and getattr(point, name) is not None]
        score = score_at(
            [point.kl for point in known], [getattr(point, name) for point in known],
            [getattr(point, f"{name}_stderr") or 0.0 for point in known], kl,
        ) if known else None
        curves[curve] = None if score is None else {name: score[0], f"{name}_stderr": score[1]}
    return {"kl": kl, "curves": curves}
