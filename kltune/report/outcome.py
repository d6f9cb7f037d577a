"""What a run folder holds, and its outcome in one word and a few sentences: did it end, and within its budget?"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kltune.core.hacking.detector import errors_of, pairs_of
from kltune.errors import CheckpointError
from kltune.lm.data.documents import FinalFacts, RecipeFacts, Result, RunRecord, SampleRow
from kltune.lm.data.foreign import check_shape, read_ordinary
from kltune.recipe import RecipeFaults
from kltune.recipe.yaml_tree import read_nodes
from kltune.report.figures import STANDARD_ERRORS, TOLERANCE, KLLimits, Recorded
from kltune.report.plots import Z95
from kltune.run.files import read_json, read_jsonl, read_metrics, readable
from kltune.run.screen import ABSENT, apart, common_places, interval, is_number, number, out_of, percent, with_error

RECORDED = (
    "stage", "status", "seed", "reference", "versions", "threads", "started", "ended", "recipe_sha256", "command",
    "resumed_at", "error",
)
APART = 9.0      # % of the gauge between two numbers under it: on a phone they are as wide
CLEAR = 2.0      # standard errors from which a score counts as moved
BEFORE_AND_AFTER = {      # what is compared between reference and policy
    "score": "eval/score_mean",
    "gold score": "eval/gold_mean",
    "score, sd of the reference's": "eval/score_z",
    "gold score, sd of the reference's": "eval/gold_z",
    "KL to the teacher, nats": "eval/kl_teacher_nats_per_response",
    "different tokens (distinct-1)": "eval/distinct_1",
    "different pairs of tokens (distinct-2)": "eval/distinct_2",
    "the same, adjusted for length": "eval/distinct_2_adjusted",
    "different pairs among answers to one prompt": "eval/distinct_2_per_input",
    "different pairs across prompts": "eval/distinct_2_across_input",
    "likeness to each other (self-BLEU)": "eval/self_bleu",
    "duplicates, share of responses": "eval/duplicate_fraction",
    "entropy, nats per token": "eval/entropy_nats_per_token",
    "tokens per response": "eval/response_tokens",
    "responses that end, share": "eval/end_fraction",
    "held-out texts, nats per token": "eval/texts_nats_per_token",
    "alignment tax, nats per token": "eval/tax_nats_per_token",
}
ZERO_OF_REFERENCE = {"eval/tax_nats_per_token", "eval/score_z", "eval/gold_z"}
ROSE, FELL, STAYED = "rose from", "fell from", "did not clearly move:"


@dataclass(frozen=True)
class Files:
    """What a run folder holds; empty where a file is not there yet.

    stopped: kltune.json of the final that a run left which failed, as at its cap.
    """

    folder: Path
    record: dict[str, Any]
    recipe_text: str
    recipe: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    result: dict[str, Any]
    stopped: dict[str, Any] = field(default_factory=dict)

    @property
    def evaluated(self) -> dict[str, Any]:
        """The evaluation of what was saved; {} before that."""
        return self.result.get("eval") or {}

    @property
    def kl(self) -> dict[str, Any]:
        """KL of the policy that was saved as final; {} before that."""
        return (self.result or self.stopped).get("kl") or {}

    @cached_property
    def recorded(self) -> Recorded:
        """The numbers that pictures are drawn from."""
        return Recorded(self.metrics, self.evaluated, self.result.get("final_step"))


@dataclass(frozen=True)
class RunVerdict:
    """The outcome of a run in one word, with its tone (good, bad or plain), and in sentences."""

    word: str
    tone: str
    sentences: str


def read_files(folder: Path) -> Files:
    """Read everything the page is made from; a CheckpointError where there is no run.json."""
    with readable(folder):
        is_run = (folder / "run.json").exists()
    if not is_run:
        raise CheckpointError(f"{folder} is no kltune run: there is no run.json in it.")
    recipe_text = recipe_text_of(folder)
    recipe: Any = {}
    with contextlib.suppress(RecipeFaults, CheckpointError):      # a damaged recipe is still shown, as text
        root, _ = read_nodes(recipe_text, "recipe.yaml")
        plain = root.plain() if root is not None else {}
        check_shape(plain, RecipeFacts, CheckpointError, "recipe.yaml")
        recipe = plain
    samples = read_jsonl(folder / "samples.jsonl")
    check_shape(samples, list[SampleRow], CheckpointError, str(folder / "samples.jsonl"))
    record = {**dict.fromkeys(RECORDED), **read_json(folder / "run.json", RunRecord)}
    result = read_json(folder / "result.json", Result) if (folder / "result.json").exists() else {}
    final = folder / "final" / "kltune.json"
    ended_with_it = not result and record["status"] == "failed" and final.exists()
    return Files(
        folder=folder,
        record=record,
        recipe_text=recipe_text,
        recipe=recipe,
        metrics=read_metrics(folder),
        samples=samples,
        result=result,
        stopped=read_json(final, FinalFacts) if ended_with_it else {},
    )


def recipe_text_of(folder: Path) -> str:
    """The text of a run's recipe.yaml, "" without one; CheckpointError if it is no text file."""
    path = folder / "recipe.yaml"
    if not path.exists():
        return ""
    try:
        return read_ordinary(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def verdict_of(files: Files) -> RunVerdict:
    """Whether the run ended, and how far from its reference, in plain words."""
    status, total = files.record.get("status"), (files.recipe.get("run") or {}).get("steps")
    if status == "finished":
        return _final_verdict(files)
    done = files.metrics[-1].get("step", 0) if files.metrics else 0
    where = f"step {done:,}{out_of(done, total, form=',')}"
    reason = files.record.get("error") or "no reason recorded"
    word, tone, sentence = {
        "interrupted": ("interrupted", "plain", f"Stopped after {where}; --resume continues it."),
        "failed": ("failed", "bad", f"Failed after {where}: {reason.rstrip('.')}."),
    }.get(str(status), ("running", "plain", f"At {where} when this page was written; no final measurement yet."))
    unit = limits_of(files).unit
    value, error = newest_kl(files, unit)
    if files.kl.get(unit) is not None:
        sentence = " ".join([sentence, *_distance(files)[2:]])
    elif value is not None:
        sentence += f" KL to the reference when last measured: {with_error(value, error)} {in_words(unit)}."
    return RunVerdict(word, tone, sentence)


def in_words(unit: str) -> str:
    """nats_per_token is "nats per token"."""
    return unit.replace("_per_", " per ")


def kl_in(unit: str, kl: dict[str, Any]) -> tuple[float | None, float | None, Sequence[float | None] | None]:
    """A KL of result.json in a unit, its standard error and its 95 % interval: of a KL per token neither is kept."""
    errors = (kl.get("stderr"), kl.get("ci95")) if unit == "nats_per_response" else (None, None)
    return kl.get(unit), *errors


def newest_kl(files: Files, unit: str) -> tuple[float | None, float | None]:
    """KL of the last batch, or of the last evaluation where batches have none; its standard error, as of `kl_in`."""
    for row in reversed(files.metrics):
        for name in ("kl/ref", "eval/kl_ref"):
            value, error, _ = kl_in(unit, {unit: row.get(f"{name}_{unit}"), "stderr": row.get(f"{name}_stderr")})
            if value is not None:
                return value, error
    return None, None


def _reward_verdict(files: Files) -> RunVerdict:
    accuracy, (low, high) = files.result.get("accuracy"), files.result.get("accuracy_ci95") or (None, None)
    if accuracy is None:
        return RunVerdict("not measured", "plain", "The run finished; no rows were held out to measure it on.")
    rows = files.result["held_out_rows"]
    word, tone = ("learnt", "good") if low > 0.5 else ("no better than chance", "bad")
    learnt = "" if files.result.get("held_out", True) else " It has learnt from all of these rows."
    return RunVerdict(word, tone, (
        f"It is right on {percent(accuracy, 1)} % of {rows:,} held-out rows (95 % interval "
        f"{interval((100 * low, 100 * high), 1, (0, 50, 100))} %), where chance is right on 50 %.{learnt}"
    ))


def _final_verdict(files: Files) -> RunVerdict:
    if files.record["stage"] == "reward":
        return _reward_verdict(files)
    if files.kl.get(limits_of(files).unit) is None:
        return RunVerdict("KL not measured", "bad", "The run finished; the KL of the final policy was not measured.")
    word, tone, *sentences = _distance(files)
    return RunVerdict(word, tone, " ".join([*sentences, *_scores(files)]))


def said_of(value: float, limits: KLLimits) -> dict[str, str]:
    """A KL, target, cap and the ends of what counts as on target as text, told apart from each other."""
    band = (None, None) if limits.target is None else ((1 - TOLERANCE) * limits.target, (1 + TOLERANCE) * limits.target)
    numbers = {"value": value, "target": limits.target, "cap": limits.hard_cap, "low": band[0], "high": band[1]}
    return dict(zip(numbers, apart(*numbers.values()), strict=True))


def _distance(files: Files) -> tuple[str, ...]:
    """A word and its tone for how far the final policy is from its reference, and the sentences on it."""
    limits = limits_of(files)
    value, _, ci95 = kl_in(limits.unit, files.kl)
    said, word, tone = said_of(value, limits), "measured", "plain"
    bounds = interval(ci95, against=(limits.target, limits.hard_cap))
    in_brackets = "" if bounds == ABSENT else f" (95 % interval {bounds})"
    sentences = [f"The final policy is {said['value']} {in_words(limits.unit)} from its reference{in_brackets}."]
    if limits.target:
        share = value / limits.target - 1
        side = "above" if share > 0 else "below"
        rest = "; the rest of the budget is not used" if files.result.get("target_unused") else ""
        on_target = round(abs(share), 9) <= TOLERANCE
        off, most = apart(100 * abs(share), 100 * TOLERANCE, places=0)[0], f"{100 * TOLERANCE:.0f} %"
        rule = f": on target (within {most})" if on_target else f", more than the {most} that count as on target"
        sentences.append(f"That is {off} % {side} the target of {said['target']}{rule}{rest}.")
        word = "on target" if on_target else f"{side} target"
        tone = "good" if on_target else "bad" if share > 0 else "plain"
    elif limits.hard_cap is None:
        sentences.append("The recipe sets no target and no cap.")
    if limits.hard_cap is not None:
        within = value <= limits.hard_cap
        sentences.append(f"It is {'within' if within else 'beyond'} the hard cap of {said['cap']}.")
        word, tone = (word, tone) if within else ("over the hard cap", "bad")
    return word, tone, *sentences


def _scores(files: Files) -> list[str]:
    """What became of the score, and of the gold score that nothing was trained on."""
    sentences = []
    for name, title in (("score", "The score"), ("gold", "The gold score, never trained on,")):
        if moved := move_of(files, name):
            *ends, word = moved
            places = common_places([(ends[1], files.evaluated.get(f"eval/{name}_stderr")), (ends[0], None)])
            best = best_gold(files) if name == "gold" else None
            before, after, top = apart(*ends, None if best is None else best[0], places=places)
            peak = "" if best is None else f"{top} at step {best[1]:,}"
            if best is not None and word != FELL:
                sentences.append(
                    f"{title} fell from its peak of {peak} to {after}; the reference's is {before}."
                )
            else:
                fallen = f", after a peak of {peak}" if peak else ""
                sentences.append(f"{title} {word} {before} (the reference's) to {after}{fallen}.")
    if (rate := files.result.get("win_rate")) is not None:
        by, ends = judge_of(files), files.result.get("win_rate_ci95")
        bounds = interval([100 * end for end in ends], 1, (0, 50, 100))
        sentences.append(f"{by} prefers its answers to the reference's in {percent(rate, 1)} % of all pairs (95 % "
                         f"interval {bounds} %).")
    stopped = files.result.get("stopped_early")
    if isinstance(stopped, dict):
        reason = str(stopped.get("reason") or "the gold score had passed its peak").rstrip(".")
        sentences.append(f"It stopped early, at step {number(stopped.get('step'))}: {reason}.")
        if stopped.get("gold_peak_step") is not None:
            sentences.append(f"final is the policy after step {stopped['gold_peak_step']:,}, where gold was highest.")
    return sentences


def judge_of(files: Files) -> str:
    """What eval.judge of a recipe is called."""
    entry = (files.recipe.get("eval") or {}).get("judge")
    known = entry if isinstance(entry, dict) else {}
    return str(known.get("name") or known.get("model") or known.get("path") or "eval.judge")


def alarm_of(files: Files) -> str:
    """What the gold score warns of, in the words of the sentence on it: that it fell while the score rose; else ""."""
    score, gold = move_of(files, "score"), move_of(files, "gold")
    if score is None or gold is None:
        return ""
    rose = "score rose, " if score[2] == ROSE else ""
    if gold[2] == FELL and rose:
        return f"{rose}gold fell"
    return f"{rose}gold fell from its peak" if best_gold(files) is not None else ""


def best_gold(files: Files) -> tuple[float, int] | None:
    """(gold score, step) of the evaluation that the final one clearly fell short of, with a higher score; else None.

    The best of several is high by luck as well, hence ``errors_of``, as while the run went on.
    """
    final, error = files.evaluated.get("eval/gold_mean"), files.evaluated.get("eval/gold_stderr") or 0.0
    rows = [row for row in files.metrics if is_number(row.get("eval/gold_mean"))]
    if final is None or not rows:
        return None
    best = max(rows, key=lambda row: row["eval/gold_mean"])
    spread = ((best.get("eval/gold_stderr") or 0.0) ** 2 + error**2) ** 0.5
    prompts = int(files.evaluated.get("eval/prompts") or 0)
    fell = prompts > 1 and best["eval/gold_mean"] - final > errors_of(pairs_of(len(rows) + 1), prompts) * spread
    rose = (best.get("eval/score_mean") or 0.0) < (files.evaluated.get("eval/score_mean") or 0.0)
    return (best["eval/gold_mean"], best["step"]) if fell and rose else None


def move_of(files: Files, name: str) -> tuple[float, float, str] | None:
    """(the reference's, the policy's, how it moved) of "score" or "gold"; None where one was not measured."""
    before, after = files.result.get(f"reference_{name}"), files.result.get(name)
    if before is None or after is None:
        return None
    errors = [files.evaluated.get(f"eval/{side}{name}_stderr") or 0.0 for side in ("reference_", "")]
    error = sum(e * e for e in errors) ** 0.5
    word = STAYED if abs(after - before) <= CLEAR * error else ROSE if after > before else FELL
    return before, after, word


def gauge_of(files: Files) -> dict[str, Any] | None:
    """Where the final KL, its interval, target and cap lie on one scale, in % of its length; None without a KL."""
    limits = limits_of(files)
    value, _, ci95 = kl_in(limits.unit, files.kl)
    if value is None:
        return None
    low, high = ci95 or (value, value)
    marks = [value, high or 0.0, 1.5 * (limits.target or 0.0), 1.1 * (limits.hard_cap or 0.0)]
    end = max(*marks, 1.3 * value) or 1.0

    def along(nats: float | None) -> float | None:
        return None if nats is None else round(100.0 * nats / end, 2)

    target, said = limits.target, said_of(value, limits)
    return {
        "value": along(value), "low": along(low), "high": along(high), "target": along(target),
        "cap": along(limits.hard_cap), "end": end, "unit": in_words(limits.unit),
        "band": None if target is None else [along((1 + sign * TOLERANCE) * target) for sign in (-1, 1)],
        "ticks": _ticks([(along(nats), number(nats)) for nats in (target, limits.hard_cap) if nats is not None]),
        "says": {
            **said, "interval": interval(ci95, against=(target, limits.hard_cap)),
            "band": ABSENT if target is None else f"{said['low']} to {said['high']}",
        },
    }


def _ticks(ticks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Those of (% from the left end, number) that leave room for each other and for the scale's two ends."""
    room = [tick for tick in ticks if APART <= tick[0] <= 100.0 - APART]
    return room[:1] + [tick for tick in room[1:] if abs(tick[0] - room[0][0]) >= APART]


def limits_of(files: Files) -> KLLimits:
    """The target and the caps of the recipe, and the unit they are in."""
    kl, trpo = files.recipe.get("kl") or {}, files.recipe.get("trpo") or {}
    return KLLimits(
        unit=kl.get("unit", "nats_per_response"),
        target=kl.get("target") if kl.get("control", "target") == "target" else None,
        hard_cap=kl.get("hard_cap"),
        max_step_kl=trpo.get("max_step_kl"),
    )


def figures_of(files: Files) -> list[tuple[str, str, str]]:
    """(what, the reference's, the policy's) of what the last evaluation measured; a dash for what it did not."""
    measured, recorded = files.evaluated, files.recorded
    rows = []
    for title, name in BEFORE_AND_AFTER.items():
        if measured.get(name) is not None:
            before = 0.0 if name in ZERO_OF_REFERENCE else recorded.reference(name)
            pair = measured[name], measured.get(STANDARD_ERRORS.get(name))
            places = common_places([pair, (before, None)])
            rows.append((title, number(before, places), with_error(*pair, places)))
    return rows


def error_of(ci95: Sequence[float] | None) -> float | None:
    """The standard error that a 95 % interval is worth; None without one."""
    return None if ci95 is None else (ci95[1] - ci95[0]) / (2.0 * Z95)


def final_figures(result: dict[str, Any]) -> dict[str, Any]:
    """KL, score, gold and win rate of a result.json, each with its standard error; None where not measured.

    reference_score and reference_gold are those of the reference's own responses to the same prompts.
    """
    kl, evaluation = result.get("kl") or {}, result.get("eval") or {}
    figures = {"kl": kl.get("nats_per_response"), "kl_stderr": kl.get("stderr"), "kl_ci95": kl.get("ci95")}
    for name in ("score", "reference_score", "gold", "reference_gold"):
        figures[name] = evaluation.get(f"eval/{name}_mean")
        figures[f"{name}_stderr"] = evaluation.get(f"eval/{name}_stderr")
    figures["win_rate"] = result.get("win_rate")
    figures["win_rate_stderr"] = error_of(result.get("win_rate_ci95"))
    return figures | {"score": evaluation.get("eval/score_mean", result.get("score"))}
