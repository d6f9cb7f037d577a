"""What points of reward against KL say together: seeds of one setting, the law of a curve, the setting to pick."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kltune.core.hacking.overoptimization import GainFit, best_of_n_kl, fit_gain, score_at, tilt_gain
from kltune.report.frontier.points import Point

TIED = 1.96             # standard errors of a difference that may be chance


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


def pooled(points: Sequence[Point]) -> list[Setting]:
    """Every setting once, by curve and KL."""
    groups: dict[tuple[str, str], list[Point]] = {}
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


def _mean(points: Sequence[Point], name: str) -> tuple[float | None, float | None]:
    values = [getattr(point, name) for point in points]
    errors = [getattr(point, f"{name}_stderr") for point in points]
    if None in values:
        return None, None
    mean, count = float(np.mean(values)), len(values)
    own = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / count
    between = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else None
    known = [error for error in (own, between) if error is not None]
    return mean, max(known, default=None)


def pick(settings: Sequence[Setting], budget: float, judge: str, reference: dict[str, Any]) -> dict[str, Any]:
    """The best setting whose KL is within a budget, and those that may be as good.

    Args:
        settings: of the frontier.
        budget: nats per response; all of a setting's 95 % intervals must end below it.
        judge: score or gold.
        reference: the reference's own, with its error.

    Returns:
        {"budget", "curve", "setting", "kl", the judge's value and error, "tied": [...], "better_than_reference"}; curve
        is None where nothing is within the budget.
    """
    within = [
        setting for setting in settings
        if setting.kl_ci95 is not None and setting.kl_ci95[1] <= budget and getattr(setting, judge) is not None
    ]
    if not within:
        return {"budget": budget, "judge": judge, "curve": None, "setting": None, "runs": [], "tied": []}
    best = max(within, key=lambda setting: getattr(setting, judge))

    def error(setting: Setting) -> float:
        return getattr(setting, f"{judge}_stderr") or 0.0

    tied = [
        setting for setting in within
        if setting is not best
        and getattr(best, judge) - getattr(setting, judge) <= TIED * math.hypot(error(best), error(setting))
    ]
    base = reference[judge]
    enough = TIED * math.hypot(error(best), reference[f"{judge}_stderr"] or 0.0)
    return {
        "budget": budget,
        "judge": judge,
        "reference": base,
        "better_than_reference": base is None or getattr(best, judge) - base > enough,
        "curve": best.curve,
        "setting": best.setting,
        "kl": best.kl,
        "kl_ci95": best.kl_ci95,
        judge: getattr(best, judge),
        f"{judge}_stderr": getattr(best, f"{judge}_stderr"),
        "runs": list(best.runs),
        "tied": [{"curve": setting.curve, "setting": setting.setting, "kl": setting.kl} for setting in tied],
    }


def efficiency(
    setting: Setting, judge: str, reference: dict[str, Any], anchor: dict[str, Any] | None
) -> dict[str, float | None]:
    """The gain as a share of σ√(2 KL)."""
    value, base = getattr(setting, judge), reference[judge]
    if anchor is None or value is None or base is None or judge not in anchor["sigma"] or setting.kl <= 0.0:
        return {"efficiency": None}
    most = float(tilt_gain(anchor["sigma"][judge], setting.kl))
    return {"efficiency": (value - base) / most if most > 0.0 else None}


def fits(
    points: Sequence[Point], judge: str, reference: dict[str, Any], anchor: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Gao's law for every curve that is scored, and for best of n; or why it is not claimed."""
    documents = []
    base = reference[judge]
    scored = [point for point in points if getattr(point, judge) is not None and getattr(point, f"{judge}_stderr")]
    for curve in dict.fromkeys(point.curve for point in scored):
        known = [point for point in scored if point.curve == curve]
        if base is None:
            found: GainFit | str = f"the reference's own {judge} is not known"
        else:
            gains = [getattr(point, judge) - base for point in known]
            errors = [getattr(point, f"{judge}_stderr") for point in known]
            found = fit_gain([point.kl for point in known], gains, errors, [point.cluster for point in known])
        documents.append(described(curve, "rl", judge, found))
    if anchor is not None and judge in anchor["by_prompt"]:
        rows = anchor["by_prompt"][judge]
        sizes = [point["n"] for point in anchor["points"]]
        flat = [
            (best_of_n_kl(n), gain, point[f"{judge}_stderr"], prompt)
            for n, row, point in zip(sizes, rows, anchor["points"], strict=True)
            if n > 1 and point[f"{judge}_stderr"]
            for prompt, gain in enumerate(row - rows[0])
        ]
        found = fit_gain(*zip(*flat, strict=True), form="best_of_n") if flat else "its responses all score the same"
        documents.append(described("best of n", "best_of_n", judge, found))
    return documents


def described(curve: str, form: str, judge: str, found: GainFit | str) -> dict[str, Any]:
    """One fit of the document."""
    if isinstance(found, str):
        return {"curve": curve, "form": form, "of": judge, "fit": None, "claim": f"not claimed: {found}"}
    return {"curve": curve, "form": form, "of": judge, "fit": asdict(found), "claim": found.claim}


def curves_at(points: Sequence[Point], kl: float, judge: str) -> dict[str, Any]:
    """What each curve scores at a KL, read off between its points."""
    curves: dict[str, dict[str, float] | None] = {}
    for curve in dict.fromkeys(point.curve for point in points):
        known = [point for point in points if point.curve == curve and getattr(point, judge) is not None]
        found = score_at(
            [point.kl for point in known], [getattr(point, judge) for point in known],
            [getattr(point, f"{judge}_stderr") or 0.0 for point in known], kl,
        ) if known else None
        curves[curve] = None if found is None else {judge: found[0], f"{judge}_stderr": found[1]}
    return {"kl": kl, "curves": curves}
