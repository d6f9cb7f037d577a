"""How a run ends: the newest state within the cap, landed on its target, saved as ``final`` and measured afresh."""

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import torch

from kltune.core import ranks
from kltune.core.kl.intervals import KLSummary
from kltune.errors import DivergedError
from kltune.lm.measure.interpolation import Interpolation
from kltune.lm.measure.measurement import Measurement, kl_result
from kltune.lm.model.opening import check_frozen
from kltune.recipe.sections.methods import KLSection
from kltune.report.pages import write_page
from kltune.run.checkpoint import save_final, saved_step, whole_checkpoints
from kltune.run.files import read_jsonl
from kltune.run.optimizer import most_steps
from kltune.run.screen import apart, doing, interval, number, with_error
from kltune.train.evaluation.held_out import Metrics, before_and_after, gold_result, teacher_result, win_result
from kltune.train.learner import ALARMS, Job, Learner

MORE_RESPONSES = 4  # times as many, where the first measurement of a final state leaves it open, and in a landing
LANDINGS = 1.0, 0.95, 0.9     # of the cap: where an evaluation does not confirm a landing, the next is aimed lower
LANDING_SEED = 1_000_003  # beyond the run's own: a landing is not measured on the numbers that it was found on
UNUSED = {
    "steps": "because the steps ran out: raise run.steps, or write run.until: target to go on until it is met",
    "teacher": "because the teacher is no further from it: a nat costs as little as it may, and the KL no longer grows",
    "reward": "because the reward pulls no further: a nat costs as little as it may, and the KL no longer grows",
}
NEARER = "Train for fewer steps, or with a lower optim.lr"      # where no budget is held


@dataclass(frozen=True)
class Final:
    """A state that may be called final, as it was evaluated.

    step: steps it had done. measured: None without held-out prompts. alpha: the share of its adapter, 1 unless it was
    dialled back.
    """

    step: int
    metrics: Metrics
    measured: Measurement | None
    alpha: float = 1.0

    @property
    def kl(self) -> KLSummary:
        """KL(policy ‖ reference) of this state."""
        return self.measured.summary()


def finish(job: Job, learner: Learner, steps: int) -> dict[str, Any]:
    """Prove the reference is untouched, save ``final``, measured afresh, and write the result.

    Args:
        job, learner: of the run.
        steps: steps done.
    """
    newest = steps if learner.alarms.stopped is None else return_to_peak(job, learner)
    job, found = land_on_target(job, learner, settle(job, learner, newest))
    if learner.alarms.peak is None:
        watch_over(job, learner, found.step, found.metrics)
    kl = None if found.measured is None else kl_result(found.measured)
    shown = before_and_after(job.held_out, found.measured, learner.scorer, learner.policy.tokenizer)
    told = {"kl": kl, "target": None, "score": None, "perplexity": found.metrics.get("eval/perplexity")}
    if learner.budget is not None:
        told = {"kl": kl} | budget_result(job, learner, found)
    told |= {"held_out": job.held_out.apart} | gold_result(found.metrics) | win_result(found.metrics)
    told |= teacher_result(found.metrics)
    return conclude(job, learner, steps, found.metrics, samples=shown, told=told)


def budget_result(job: Job, learner: Learner, found: Final) -> dict[str, Any]:
    """What result.json says of the budget and of what it bought; whether some of it is left is said."""
    budget, metrics = learner.budget, found.metrics
    unused = found.alpha == 1.0 and budget.is_unused(found.kl)
    because = None
    if unused:
        because = "reward" if budget.is_spent() else "steps"
        why = UNUSED["teacher" if job.recipe.stage == "distill" and because == "reward" else because]
        job.report.say(
            f"final is {budget.describe(found.kl)} from its reference, below the target {budget.target:g}: the rest of "
            f"the budget is not used, {why}."
        )
    return {
        "final_step": found.step,
        "alpha": found.alpha,
        "stopped_early": learner.alarms.stopped,
        "target": budget.target,
        "target_unused": unused,
        "unused_because": because,
        "hard_cap": budget.cap,
        "cap_rollbacks": None if budget.cap is None else budget.rollbacks,
        "unit": budget.section.unit,
        "beta": budget.price,
        "score": metrics.get("eval/score_mean"),
        "score_stderr": metrics.get("eval/score_stderr"),
        "reference_score": metrics.get("eval/reference_score_mean"),
    }


def conclude(
    job: Job, learner: Learner, steps: int, metrics: Metrics, *, samples: list[dict[str, Any]], told: Mapping[str, Any]
) -> dict[str, Any]:
    """Save the model as ``final``, write samples, result and page.

    Args:
        job, learner: of the run; the model is the final one.
        steps: steps done.
        metrics: of the last evaluation.
        samples: rows for samples.jsonl.
        told: what result.json says besides what it says of every run; its ``kl`` goes into kltune.json as well.
    """
    final = save_with_card(job, learner, told["kl"])
    if ranks.is_first():
        job.run.record(machine=(job.run.machine or {}) | speed_and_peak(job.run.folder))
    job.report.samples(steps, [{"final": True, **row} for row in samples])
    result = job.run.finish({
        "schema": "kltune.result/1",
        "status": "finished",
        "stage": job.recipe.stage,
        "output": str(job.run.folder),
        "final": str(final),
        "steps": steps,
        **told,
        "reference": learner.policy.fingerprint.as_dict(),
        "eval": metrics,
        "seconds": job.run.seconds(),
    })
    doing("drawing the page")
    if ranks.is_first():
        write_page(job.run.folder)
    return result


def speed_and_peak(folder: Path) -> dict[str, float | None]:
    """Median tokens a second of a run's steps, and the most memory that one took, GB; None where there are none."""
    rows = read_jsonl(folder / "metrics.jsonl")
    found = {}
    for name, key, of_all in (("tokens_per_second", "tokens_per_second", median), ("peak_gb", "memory/peak_gb", max)):
        values = [row[key] for row in rows if row.get(key) is not None]
        found[name] = of_all(values) if values else None
    return found


def save_with_card(job: Job, learner: Learner, kl: dict[str, Any] | None) -> Path:
    """Save the model as ``final``; its README says how far it is from which reference, and how to measure that."""
    info = job.about(learner.model, kl)

    def write(folder: Path) -> None:
        learner.model.save(folder)
        if kl is not None:
            with open(folder / "README.md", "a", encoding="utf-8") as file:
                file.write(model_card(info, getattr(job.recipe, "kl", None), job.held_out.seed))

    with ranks.phase("saving final"):
        learner.policy.network.close()      # as in ``save``
        ranks.from_first(lambda: save_final(job.run.folder, write, info=info) and None)
    return job.run.folder / "final"


def model_card(info: dict[str, Any], budget: KLSection | None, seed: int) -> str:
    """The part of a model's README about its KL. info: as kltune.json has it; budget: what the run was held to.

    seed: with which the same responses are drawn again.
    """
    kl, measure, reference = info["kl"], info["measure"], info["reference"]
    ends = "no interval, of one prompt" if kl["ci95"] is None else f"95 %: {interval(kl['ci95'])}"
    held = [f"{name.replace('_', ' ')} {value:g} {budget.unit.replace('_', ' ')}" for name, value in (
        ("target", budget.target if budget.control == "target" else None), ("hard_cap", budget.hard_cap),
    ) if value is not None] if budget is not None else []
    how = "merged" if reference["merge"] else "beside it"
    sft = "" if reference["sft_adapter"] is None else f" with {reference['sft_adapter']} {how}"
    command = ["kltune", "eval-kl", "this/folder", "--responses", str(kl["responses"]), "--temperature",
               f"{measure['temperature']:g}", "--max-new-tokens", str(measure["max_new_tokens"]), "--seed", str(seed)]
    if measure["prompts"] is not None:
        command += ["--prompts", str(measure["prompts"])]
    if budget is not None and budget.hard_cap is not None:
        command += ["--max-kl", f"{budget.hard_cap:g}", "--unit", budget.unit]
    return (
        "\n## How far it is from its reference\n\n"
        f"- KL(policy ‖ reference): {with_error(kl['nats_per_response'], kl['stderr'])} nats per response ({ends}), "
        f"{number(kl['nats_per_token'])} per token, exact over the vocabulary\n"
        f"- measured on {kl['responses']} responses to {kl['prompts']} prompts of {measure['prompts']}, at temperature "
        f"{measure['temperature']:g}, cut at {measure['max_new_tokens']} tokens\n"
        f"- budget: {', '.join(held) or 'none'}\n"
        f"- reference: {reference['path']}{sft}, {reference['dtype']}; sha256 of its weights {reference['sha256']}, "
        f"tokenizer {reference['tokenizer_sha256']}, chat template {reference['template_sha256']}\n\n"
        f"```\n{shlex.join(command)}      # the same responses; without --seed others\n```\n"
    )


def watch_over(job: Job, learner: Learner, step: int, metrics: Mapping[str, float | None]) -> None:
    """Let the alarms hear of an evaluation of the policy after a step; they may end the run."""
    if learner.alarms is None:
        return
    looks = -(-most_steps(job.recipe.run, job.steps) // job.recipe.run.eval_every)      # and at the end
    nearer = NEARER if learner.budget is None else learner.budget.advice()
    learner.parts[ALARMS] = learner.alarms.observed(
        step, metrics, looks, nearer=nearer, warn=job.report.warn, copied=learner.model_copied
    )


def return_to_peak(job: Job, learner: Learner) -> int:
    """Let the policy of a run that was stopped early be that of its gold peak; the steps it had done."""
    learner.put_model_back(learner.alarms.peak)
    job.report.say(learner.alarms.farewell(job.steps))
    return learner.alarms.stopped["gold_peak_step"]


def stop(job: Job, learner: Learner, reason: str) -> NoReturn:
    """End a run at its cap: ``final`` is the state gone back to, once it is measured afresh."""
    found = settle(job, learner, learner.budget.last_within.step)
    save_with_card(job, learner, kl_result(found.measured))
    size = "trpo.max_step_kl" if job.recipe.stage == "trpo" else "optim.lr"
    error = DivergedError(
        f"{reason}, and kl.on_cap is stop. final is the policy after step {found.step}, measured at "
        f"{learner.budget.describe(found.kl)}. {learner.budget.advice()}, lower {size}, or write kl.on_cap: rollback."
    )
    job.run.close(error)      # before the page, which says how the run ended
    if ranks.is_first():
        write_page(job.run.folder)
    raise error


def settle(job: Job, learner: Learner, newest: int) -> Final:
    """Find the newest state that a fresh measurement leaves within the cap; the policy holds it from then on.

    With ``kl.land``, the newest one that is not is dialled back until it is. Without a cap it is the policy as it is.

    Raises:
        DivergedError: none is; nothing is called final.
    """
    budget = learner.budget
    check_frozen(learner.policy)
    if budget is None or budget.cap is None:
        return evaluate_final(job, learner, newest)
    lands, nearest = budget.section.land, math.inf
    for step in _states(job, learner, newest):
        found = decided(job, learner, evaluate_final(job, learner, step))
        if budget.standing(found.kl) == "within":
            return found
        nearest = min(nearest, budget.in_unit(found.kl))
        job.report.warn(
            f"the policy after step {step} is {budget.describe(found.kl)} from its reference: not within kl.hard_cap, "
            f"{budget.cap:g}, at 95 % confidence, so it is not final."
        )
        if lands:
            lands = False       # one landing is enough: what comes next is older, and was itself within the cap once
            landed = land_within_cap(job, learner, step)
            if landed is not None:
                return landed
    raise DivergedError(
        f"kl.hard_cap: no state that this run has kept is within {budget.cap:g} {budget.unit_text} at 95 % confidence "
        f"(the nearest was measured at {apart(nearest, budget.cap)[0]}), so nothing is called final. "
        f"{budget.advice()}; or give eval.prompts more rows and raise eval.responses, for a narrower interval."
    )


def evaluate_final(job: Job, learner: Learner, step: int, times: int = 1) -> Final:
    """Evaluate the policy, of after some step, on ``times`` as many held-out responses as the recipe says."""
    if job.held_out.prompts:
        job.report.say(f"measuring final on {times * job.held_out.responses} responses")
    return Final(step, *job.measured(learner.model, learner.scorer, times))


def decided(job: Job, learner: Learner, found: Final) -> Final:
    """The evaluation, or one on more responses where it leaves open whether the cap is held."""
    undecided = learner.budget.standing(found.kl) == "open"
    return evaluate_final(job, learner, found.step, MORE_RESPONSES) if undecided else found


def land_within_cap(job: Job, learner: Learner, step: int) -> Final | None:
    """Dial the policy back until it is within the cap, as ``kltune project`` does.

    Returns:
        Its evaluation; None, and the policy as it was, if that could not be shown.
    """
    count, interpolation = job.held_out.responses, make_interpolation(job, learner)
    for share in LANDINGS:
        search, check = interpolation.land(share * learner.budget.cap, count, MORE_RESPONSES * count)
        if check is None:
            break
        found = decided(job, learner, evaluate_final(job, learner, step))
        if learner.budget.standing(found.kl) == "within":
            job.report.say(f"landing: final is {search.alpha:.4f} times the adapter after step {step}.")
            return replace(found, alpha=search.alpha)
    interpolation.scale.set(1.0)
    return None


def land_on_target(job: Job, learner: Learner, found: Final) -> tuple[Job, Final]:
    """Dial a policy that was measured beyond its target back to it.

    Beyond is an interval that lies above the target altogether. A policy below its target stays where it is: an adapter
    times more than 1 is no policy that was ever trained. What has landed is measured with other random numbers: those
    it was found beyond with say more of a policy than there is (4.32 ± 0.15 of one that was at its target of 4). The
    job that is returned has them.
    """
    budget = learner.budget
    if budget is None or not budget.section.land or not budget.is_passed(found.kl):
        return job, found
    share = make_interpolation(job, learner).meet(budget.target, MORE_RESPONSES * job.held_out.responses)
    alpha = found.alpha * share     # the cap may have had its share already
    job.report.say(
        f"landing: {budget.describe(found.kl)} is beyond the target {budget.target:g}; final is {alpha:.4f} times the "
        "adapter."
    )
    job = replace(job, held_out=job.held_out.redrawn())
    return job, replace(evaluate_final(job, learner, found.step), alpha=alpha)


def make_interpolation(job: Job, learner: Learner) -> Interpolation:
    """The policy ready to be scaled back, with random numbers that its evaluation does not use."""
    doing("landing: measuring shares of the adapter")
    held_out = job.held_out
    draw = replace(held_out.draw, seed=held_out.seed + LANDING_SEED)
    return Interpolation(learner.policy, held_out.prompts, draw, unit=learner.budget.section.unit)


def _states(job: Job, learner: Learner, newest: int) -> Iterator[int]:
    """Steps of the states that could be final, newest first; the policy holds each while it is looked at."""
    last = learner.budget.last_within
    here = learner.policy.trainable_parameters()
    if not all(torch.equal(here[name], tensor) for name, tensor in last.tensors["model"].items()):
        yield newest
    learner.put_back(last.tensors)
    yield last.step
    for folder in whole_checkpoints(job.run.folder):
        if saved_step(folder) < last.step:
            learner.policy.load_adapter(folder)
            yield saved_step(folder)
