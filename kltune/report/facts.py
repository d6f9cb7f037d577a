"""The few numbers of a run that everybody asks for, and which of several runs they speak for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kltune.report.frontier.points import identities_of
from kltune.report.outcome import Files, alarm_of, error_of, in_words, kl_in, limits_of, newest_kl, verdict_of
from kltune.report.plots import Z95
from kltune.run.screen import ABSENT, common_places, duration, interval, number, with_error

JUDGES = {      # the first that all runs have
    "gold": "gold score", "win_rate": "win rate", "score": "score", "accuracy": "held-out accuracy",
}

TARGETS = {"nats_per_response": "target", "nats_per_token": "target, nats per token"}
ROUNDING = "KL by rounding alone, nats per response"
SEEN_ROUNDING = 1e-3    # nats per response from which that is worth a line: a narrow dtype's


@dataclass(frozen=True)
class Fact:
    """A number with what to hold it against: its standard error, its 95 % interval, what the reference has.

    target: the number was to be this. seconds: it is a time.
    """

    value: Any
    error: Any = None
    ci95: Sequence[float | None] | None = None
    reference: Any = None
    target: float | None = None
    seconds: bool = False

    @property
    def measured(self) -> bool:
        """Whether there is a number at all."""
        return self.shown()[0] != ABSENT

    def shown(self, places: int | None = None) -> tuple[str, str]:
        """The number, and what stands beside it ("" for nothing); to so many places after the point."""
        if self.seconds:
            return duration(self.value) if self.value else ABSENT, ""
        places = common_places([(self.value, self.error), (self.reference, None)]) if places is None else places
        beside = "" if self.reference is None else f"reference {number(self.reference, places)}"
        if self.ci95 is not None and self.ci95[0] is not None:
            beside = f"95 %: {interval(self.ci95, places)}"
        return with_error(self.value, self.error, places), f"target {number(self.target)}" if self.target else beside


def facts_of(files: Files) -> dict[str, Fact]:
    """The numbers of a run by name, final or, before that, the newest."""
    result, evaluated, last = files.result, files.evaluated, files.metrics[-1] if files.metrics else {}
    kl, limits = files.kl, limits_of(files)
    goals: dict[str, Fact] = {}
    for unit in ("nats_per_response", "nats_per_token"):
        value, error, ci95 = kl_in(unit, kl) if result or kl else (*newest_kl(files, unit), None)
        held = unit == limits.unit      # of a KL per token there is more to say only where that is what was steered
        goals[f"KL, {in_words(unit)}"] = Fact(value if held or unit == "nats_per_response" else None, error, ci95)
        goals[TARGETS[unit]] = Fact(limits.target if held else None)
    distinct, floor = "distinct_2_adjusted", (kl.get("noise_floor") or {}).get("nats_per_response")
    machine = files.record.get("machine") or {}
    return {
        **goals,
        "score": Fact(
            result.get("score", last.get("score/mean")), result.get("score_stderr"),
            reference=result.get("reference_score"),
        ),
        "gold score": Fact(result.get("gold"), result.get("gold_stderr"), reference=result.get("reference_gold")),
        "win rate": Fact(result.get("win_rate"), ci95=result.get("win_rate_ci95")),
        "held-out accuracy": Fact(result.get("accuracy")),
        "calibration error": Fact((result.get("calibration") or {}).get("error")),
        "distinct-2, adjusted": Fact(
            evaluated.get(f"eval/{distinct}"), reference=evaluated.get(f"eval/reference_{distinct}")
        ),
        "self-BLEU": Fact(evaluated.get("eval/self_bleu")),
        "tokens per response": Fact(evaluated.get("eval/response_tokens")),
        "alignment tax, nats per token": Fact(
            evaluated.get("eval/tax_nats_per_token"), evaluated.get("eval/tax_stderr")
        ),
        ROUNDING: Fact(floor if floor and floor >= SEEN_ROUNDING else None),
        "steps": Fact(result.get("steps", last.get("step"))),
        "tokens per second": Fact(machine.get("tokens_per_second")),
        "peak memory, GB": Fact(machine.get("peak_gb")),
        "time": Fact(
            result.get("seconds", sum(row.get("time/step_seconds") or 0 for row in files.metrics)), seconds=True
        ),
    }


def columns_of(rows: Sequence[dict[str, Fact]], names: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """The named facts that some row has, by name: one text for each row, all of a name to as many places."""
    columns = {}
    for name in names:
        facts = [row[name] for row in rows]
        if any(fact.measured for fact in facts):
            places = common_places(
                pair for fact in facts for pair in ((fact.value, fact.error), (fact.reference, None))
            )
            columns[name] = [fact.shown(places) for fact in facts]
    return columns


def preference_of(runs: dict[str, Files]) -> str:
    """One sentence on which of several runs of one reference to prefer and by what, or why none can be."""
    finished = {label: files for label, files in runs.items() if files.record["status"] == "finished"}
    name = next((name for name in JUDGES if _judged_alike(list(finished.values()), name)), None)
    if len(finished) < 2 or name is None:
        return "None can be preferred: no score by one scorer is known of two finished runs."
    fit = {label: files for label, files in finished.items() if verdict_of(files).tone != "bad" and not alarm_of(files)}
    if not fit:
        return f"None is to be preferred: {_left_out(runs, fit)}."
    best = max(fit, key=lambda label: fit[label].result[name])
    tied = [
        label for label, files in fit.items()
        if fit[best].result[name] - files.result[name] <= Z95 * math.hypot(_error(fit[best], name), _error(files, name))
    ]
    chosen = min(tied, key=lambda label: _nats(fit[label]))
    figure = f"{JUDGES[name]} {with_error(fit[chosen].result[name], _error(fit[chosen], name) or None)}"
    nats = "" if math.isinf(_nats(fit[chosen])) else f" at {number(_nats(fit[chosen]))} nats"
    others = ", ".join(label for label in tied if label != chosen)
    reason = f", within error of {others} and at less KL" if others else ", clearly the best" if len(fit) > 1 else ""
    out = f"; left out: {_left_out(runs, fit)}" if len(fit) < len(runs) else ""
    caution = "; a gold score, never trained on, would say more" if name == "score" else ""
    return f"Prefer {chosen}: {figure}{nats}{reason}{out}{caution}."


def _left_out(runs: dict[str, Files], fit: dict[str, Files]) -> str:
    return ", ".join(
        f"{label} ({alarm_of(files) or verdict_of(files).word})" for label, files in runs.items() if label not in fit
    )


def _judged_alike(runs: Sequence[Files], name: str) -> bool:
    """Whether all runs have a figure, of one scorer."""
    scorers = {
        "gold": [(files.recipe.get("eval") or {}).get("gold") for files in runs],
        "win_rate": [(files.recipe.get("eval") or {}).get("judge") for files in runs],
        "score": [identities_of(files.record.get("rewards") or []) for files in runs],
    }.get(name, [])
    return len(set(map(repr, scorers))) <= 1 and all(files.result.get(name) is not None for files in runs)


def _error(files: Files, name: str) -> float:
    return files.result.get(f"{name}_stderr") or error_of(files.result.get(f"{name}_ci95")) or 0.0


def _nats(files: Files) -> float:
    nats = files.kl.get("nats_per_response")
    return math.inf if nats is None else nats
