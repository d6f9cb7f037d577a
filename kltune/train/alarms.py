"""Say what an evaluation shows of a reward being exploited, and end a run there if its recipe says so."""

from collections.abc import Callable, Mapping
from typing import Any

from kltune.core.hacking.detector import Watch
from kltune.recipe import RunSection
from kltune.train.budget import dearer
from kltune.train.learner import Job, Learner

ADVICE = {
    "gold": "The reward is being exploited: what it asks for is no longer what is meant. {nearer}; mend the reward; or "
    "write eval.stop_at_gold_peak: true, which ends the run and keeps the peak.",
    "diversity": "The policy is collapsing onto a few answers. {nearer}, and look at samples.jsonl.",
    "length": "A reward that grows with length invites this. {nearer}; score per token, or use "
    "sampling.missing_end_penalty.",
}


def observe(
    watch: Watch, step: int, metrics: Mapping[str, float | None], looks: int, warn: Callable[[str], None], nearer: str
) -> tuple[Watch, bool]:
    """Let a watch hear of an evaluation, and say what has set in.

    Args:
        watch: of the run.
        step: steps done.
        metrics: of the evaluation.
        looks: evaluations of the whole run.
        warn: takes a sentence or two.
        nearer: what to change so that the policy stays nearer to its reference.

    Returns:
        (the watch after it, whether gold has begun to fall).
    """
    watch, alarms = watch.observed(step, metrics, looks)
    for alarm in alarms:
        warn(f"step {step}: {alarm.found}. {ADVICE[alarm.kind].format(nearer=nearer)}")
    return watch, any(alarm.kind == "gold" for alarm in alarms)


def looks(run: RunSection, steps: int) -> int:
    """Evaluations of a run: every so many steps, and at its end."""
    return -(-steps // run.eval_every)


def watch_over(job: Job, learner: Learner, step: int, metrics: Mapping[str, float | None]) -> None:
    """Judge the policy of after a step by its evaluation.

    With ``eval.stop_at_gold_peak``, remember the policy of the highest gold score, and mark the run as stopped where
    that has fallen.
    """
    before = learner.watch.peak
    count = looks(job.recipe.run, job.steps)
    learner.watch, fell = observe(learner.watch, step, metrics, count, job.report.warn, dearer(job))
    peak = learner.watch.peak
    if learner.peak is None or peak is None:
        return
    if peak != before and peak.step == step:
        learner.peak = learner.policy_copied()
    if fell:
        learner.stopped_early = {
            "step": step,
            "reason": "the gold score fell while the score that is trained on rose",
            "gold_peak_step": peak.step,
            "gold_at_peak": peak.gold,
            "gold_at_stop": metrics["eval/gold_mean"],
            "score_at_peak": peak.score,
            "score_at_stop": metrics.get("eval/score_mean"),
        }


def return_to_peak(job: Job, learner: Learner) -> int:
    """Let the policy of a run that was stopped early be that of its gold peak; the steps it had done."""
    stopped: dict[str, Any] = learner.stopped_early
    learner.put_policy_back(learner.peak)
    where = f"step {stopped['gold_peak_step']}" if stopped["gold_peak_step"] else "the start, which is the reference"
    job.report.say(
        f"stopped after step {stopped['step']} of {job.steps}: gold is {stopped['gold_at_stop']:.3g}, and was "
        f"{stopped['gold_at_peak']:.3g} at its peak. final is the policy of {where}."
    )
    return stopped["gold_peak_step"]
