"""What points of reward against KL say together: seeds of one setting, the law of a curve, the setting to pick.

``name`` is which of a point's figures is meant: "score" or "gold".
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kltune.core.hacking.overoptimization import GainFit, best_of_n_kl, fit_gain, score_at, tilt_gain
from kltune.report.frontier.points import FrontierPoint
from kltune.report.plots import Z95


@dataclass(frozen=True)
class Setting:
    """The seeds of one setting together: means over seeds.

    The standard errors are those between seeds, or what the measurements' own leave of a mean where that is larger; of
    one seed, its own. kl_ci95 holds the intervals of all seeds.
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


def pooled(points: Sequence[FrontierPoint]) -> list[Setting]:
    """The settings of all points, each once, by curve and KL."""
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
        settings.append(Setting(
            curve, setting, len(members),
            *_mean(members, "kl"), envelope, *_mean(members, "score"), *_mean(members, "gold"),
            tuple(point.steps_to_target for point in members), tuple(point.run for point in members),
        ))
    order = list(dict.fromkeys(setting.curve for setting in settings))
    return sorted(settings, key=lambda setting: (order.index(setting.curve), setting.kl))


def _mean(points: Sequence[FrontierPoint], name: str) -> tuple[float | None, float | None]:
    values = [getattr(point, name) for point in points]
    errors = [getattr(point, f"{name}_stderr") for point in points]
    if None in values:
        return None, None
    mean, count = float(np.mean(values)), len(values)
    own = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / count
    between = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else None
    known = [error for error in (own, between) if error is not None]
    return mean, max(known, default=None)


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

    def enough(other_error: float | None) -> float:
        """By how much the best must differ from another to be better than it, at 95 %."""
        return Z95 * math.hypot(getattr(best, f"{name}_stderr") or 0.0, other_error or 0.0)

    tied = [
        {"curve": setting.curve, "setting": setting.setting, "kl": setting.kl} for setting in within
        if setting is not best and most - getattr(setting, name) <= enough(getattr(setting, f"{name}_stderr"))
    ]
    base = reference[name]
    return {
        "budget": budget,
        "judge": name,
        "reference": base,
        "better_than_reference": base is None or most - base > enough(reference[f"{name}_stderr"]),
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
    base = reference[name]
    scored = [point for point in points if getattr(point, name) is not None and getattr(point, f"{name}_stderr")]
    for curve in dict.fromkeys(point.curve for point in scored):
        known = [point for point in scored if point.curve == curve]
        if base is None:
            fit: GainFit | str = f"the reference's own {name} is not known"
        else:
            gains = [getattr(point, name) - base for point in known]
            errors = [getattr(point, f"{name}_stderr") for point in known]
            fit = fit_gain([point.kl for point in known], gains, errors, [point.cluster for point in known])
        documents.append(_fit_document(curve, "rl", name, fit))
    if best_of_n is not None and name in best_of_n["by_prompt"]:
        rows = best_of_n["by_prompt"][name]
        gains = [
            (best_of_n_kl(point["n"]), gain, point[f"{name}_stderr"], prompt)
            for row, point in zip(rows, best_of_n["points"], strict=True)
            if point["n"] > 1 and point[f"{name}_stderr"]
            for prompt, gain in enumerate(row - rows[0])
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
