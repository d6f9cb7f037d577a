"""Reward against KL: what each setting bought, what sampling alone buys, where over-optimisation begins, what to pick.

Points are runs, with the KL and score that each measured of its final policy, or measured afresh on common prompts and
random numbers (``--gold``, ``--recipe``, ``--responses``). Beside them stands what costs no training: the best of n
responses of the reference, and σ√(2 KL), the most that a KL buys where scores are Gaussian.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kltune.core.kl.intervals import clustered_share, prompt_shares
from kltune.errors import RecipeError, ScorerError
from kltune.lm.measure.best_of_n import Scorers, best_of_n_round, measure_best_of_n
from kltune.lm.measure.measurement import Round, measure_kl
from kltune.lm.model.policy import Policy
from kltune.lm.rewards.functions import read_sources, sources_sha256
from kltune.lm.rewards.scorers import Comparison, load_comparison, load_scorer
from kltune.recipe import FunctionReward, RewardEntry, asks_for_pairs, load_recipe
from kltune.report.frontier.held_out import held_out_document
from kltune.report.frontier.page import write_frontier
from kltune.report.frontier.points import (
    FrontierPoint,
    FrontierSource,
    check_one_reference,
    check_one_reward,
    differing_measures,
    find_sources,
    judges_of_wins,
    points_of,
)
from kltune.report.frontier.pooling import PromptShares, curves_at, efficiency, fits, pick, pooled
from kltune.report.outcome import error_of, final_figures
from kltune.run.files import refuse_place
from kltune.run.recorder import counting
from kltune.run.saved_policy import (
    MeasureOptions,
    computed_on,
    find_checkpoint,
    measured_prompts,
    open_subject,
    resolve_settings,
)

UNMEASURED = ("score", "score_stderr", "gold", "gold_stderr", "win_rate", "win_rate_stderr")


@dataclass(frozen=True)
class FrontierOptions(MeasureOptions):
    """The command's options.

    gold: a second scorer, None for none. judge: who prefers a policy's answers or the reference's. best_of: reference
    responses to each prompt, 0 for none. budget: nats to pick a setting for. at: KLs to compare curves at. scores:
    files of held-out benchmarks.
    """

    gold: RewardEntry | None = None
    judge: RewardEntry | None = None
    output: str | None = None
    budget: float | None = None
    best_of: int = 16
    at: tuple[float, ...] = ()
    scores: tuple[str, ...] = ()

    @property
    def afresh(self) -> bool:
        """Whether all runs are measured again, rather than taken as they measured themselves."""
        return any(asked is not None for asked in (self.gold, self.judge, self.recipe, self.responses, self.reference))


def frontier(runs: Sequence[str], options: FrontierOptions) -> dict[str, Any]:
    """``kltune frontier``: reward against KL over run folders, sweep folders, and curves of ``kltune project --curve``.

    Returns:
        The JSON document: the same as ``frontier.json`` in the output folder.

    Raises:
        CheckpointError: something is none of these or has not finished, or references or rewards differ. RecipeError:
            options that make no sense. ScorerError, ModelError, DataError: what cannot be measured.
    """
    if options.output is not None:
        refuse_place(Path(options.output), folder=True)
    sources = find_sources(runs)
    if options.reference is None:
        check_one_reference(sources)
    elif curves := [source.path for source in sources if source.folder is None]:
        raise RecipeError(f"--reference: {curves[0]} is a curve, measured against its own reference; give runs alone.")
    if options.recipe is None:
        check_one_reward(sources)
    notes = [] if options.afresh else differing_measures(sources)
    points = points_of(sources)
    trained = [source for source in sources if source.folder is not None]
    reference = recorded_reference(sources)
    best_of_n, shares, against = None, {}, sources[0].reference
    computed = dict.fromkeys(("dtype", "device"))
    if trained and (options.afresh or options.best_of):
        measured = measured_afresh(trained, points, reference, options)
        points, reference, best_of_n, shares = measured.points, measured.reference, measured.best_of_n, measured.shares
        notes, computed = notes + measured.notes, measured.computed
        against = against if measured.against is None else measured.against
    elif options.afresh:
        raise RecipeError("--gold, --judge, --recipe, --responses and --reference measure runs again; found none among "
                          "what was given.")
    if not options.afresh and judges_of_wins(sources) > 1:
        points = [replace(point, win_rate=None, win_rate_stderr=None) for point in points]
        notes.append("win rates are by different judges, so they do not compare and are left out; --judge measures "
                     "them all afresh.")
    if any(point.win_rate is not None for point in points):
        reference = reference | {"win_rate": 0.5, "win_rate_stderr": 0.0}
    name = judged_by(points, options)
    unscored = sorted({point.curve for point in points if getattr(point, name) is None})
    if unscored:
        notes.append(f"no {name} is known of: {'; '.join(unscored)}. --gold or --recipe score runs afresh.")
    settings = pooled(points, shares)
    document = {
        "schema": "kltune.frontier/1",
        "direction": "KL(policy||reference)",
        "unit": "nats_per_response",
        "reference": against | reference,
        "judge": name,
        "measured": "afresh" if options.afresh else "by the runs themselves",
        **computed,
        "notes": notes,
        "points": [asdict(point) for point in points],
        "settings": [asdict(setting) | efficiency(setting, name, reference, best_of_n) for setting in settings],
        "best_of_n": best_of_n,
        "fits": fits(points, name, reference, best_of_n),
        "at": [curves_at(points, kl, name) for kl in options.at],
        "pick": None if options.budget is None else pick(settings, options.budget, name, reference),
        "held_out": held_out_document(points, options.scores) if options.scores else None,
        "output": options.output,
    }
    if best_of_n is not None:
        del best_of_n["by_prompt"], best_of_n["prompt_numbers"]     # only the fits need them
    if options.output is not None:
        write_frontier(Path(options.output), document)
    return document


def judged_by(points: Sequence[FrontierPoint], options: FrontierOptions) -> str:
    """The figure that settings are picked by: gold where all have it, else the score, or where none has, the win rate.
    """
    if options.gold is not None or all(point.gold is not None for point in points):
        return "gold"
    only_wins = all(point.score is None for point in points) and any(point.win_rate is not None for point in points)
    return "win_rate" if only_wins else "score"


@dataclass(frozen=True)
class Afresh:
    """What was measured anew, and on what: points, the reference's scores, best of n, notes, prompt shares by run.

    against: ``--reference``, where one was given.
    """

    points: list[FrontierPoint]
    reference: dict[str, Any]
    best_of_n: dict[str, Any] | None
    notes: list[str]
    shares: dict[str, PromptShares]
    computed: dict[str, str]
    against: dict[str, Any] | None = None


def recorded_reference(sources: Sequence[FrontierSource]) -> dict[str, Any]:
    """The reference's own score and gold, as the first run that measured them did."""
    reference: dict[str, Any] = dict.fromkeys(("score", "score_stderr", "gold", "gold_stderr"))
    for source in sources:
        if source.folder is not None:
            figures, prefix = final_figures(source.document), "reference_"
        else:
            figures = next((look for look in source.document["looks"] if look["alpha"] == 0.0), {})
            prefix = ""
        for name in ("score", "gold"):
            if reference[name] is None:
                reference |= {each: figures.get(prefix + each) for each in (name, f"{name}_stderr")}
    return reference


def measured_afresh(
    trained: Sequence[FrontierSource], points: list[FrontierPoint], reference: dict[str, Any], options: FrontierOptions
) -> Afresh:
    """Every run measured afresh where that was asked for, the reference, and best of n on the first run's."""
    subjects = [find_checkpoint(source.path, options) for source in trained]
    settings = resolve_settings(subjects, options)
    notes: list[str] = []
    best_of_n = None
    scorers: Scorers | None = None
    comparison: Comparison | None = None
    fresh: dict[str, dict[str, Any]] = {}
    shares: dict[str, PromptShares] = {}
    for number, (source, subject) in enumerate(zip(trained, subjects, strict=True)):
        policy = open_subject(subject, options)
        prompts = measured_prompts(policy, settings)
        draw, answered = settings.draw(options.seed), Round.of(prompts, settings.responses, options.seed)
        if scorers is None:
            scorers = open_scorers(trained, policy, options)
            if options.judge is not None:
                comparison = load_comparison(options.judge, Path.cwd(), policy.device, policy)
                print(comparison.note, end="\n" if comparison.note else "", file=sys.stderr)
            if options.afresh or scorers.want_reference_samples:
                with counting("sampling the reference", answered.responses) as progress:
                    sampled = measure_kl(policy, answered, draw, from_reference=True, progress=progress)
                scorers = scorers.standardized(sampled)
                if options.afresh:
                    reference = dict.fromkeys(reference) | scorers.means(sampled)[0]
            if options.best_of and (scorers.score or scorers.gold):
                several = best_of_n_round(prompts, options.best_of, options.seed)
                with counting("best of n: sampling the reference", several.responses) as progress:
                    best_of_n = measure_best_of_n(policy, several, scorers, draw, progress)
            if options.afresh and (note := answered.drawn_note(options.seed)):
                notes.append(f"every run {note}")
        if not options.afresh:
            break
        with counting(f"measuring {source.path} ({number + 1}/{len(trained)})", answered.responses) as progress:
            measurement = measure_kl(policy, answered, draw, progress=progress)
        kl = measurement.summary("exact", options.confidence)
        means, shares[source.path] = scorers.means(measurement)
        shares[source.path]["kl"] = prompt_shares((measurement.exact, measurement.prompt_index))
        fresh[source.path] = {
            "kl": kl.nats_per_response, "kl_stderr": kl.stderr, "kl_ci95": kl.ci,
            **dict.fromkeys(UNMEASURED), **means,
        }
        if comparison is not None:
            preferred = comparison.preferences(measurement.rollouts, sampled.rollouts)
            rate, *ends = clustered_share(preferred, measurement.prompt_index)
            fresh[source.path] |= {"win_rate": rate, "win_rate_stderr": error_of(ends)}
            shares[source.path]["win_rate"] = prompt_shares((preferred, measurement.prompt_index))
    if options.afresh:
        others = sorted({point.curve for point in points if point.run not in fresh})
        if others:
            notes.append(f"not measured afresh, but as they were: {', '.join(others)}")
        points = [replace(point, **fresh.get(point.run, {})) for point in points]
    against = None if options.reference is None else policy.fingerprint.as_dict()
    return Afresh(points, reference, best_of_n, notes, shares, computed_on(policy), against)


def refuse_changed_code(run: FrontierSource, entries: Sequence[RewardEntry], folder: Path) -> None:
    """Before any of it runs: a run's Python is what the run was trained on, and lies outside of what was handed over.

    Raises:
        ScorerError: it is not.
    """
    names = [record.get("sha256") for record in run.rewards]
    digests = names if len(names) == len(entries) else [None] * len(entries)
    for entry, digest in zip(entries, digests, strict=True):
        if not isinstance(entry, FunctionReward):
            continue
        found = sources_sha256(read_sources(entry, folder))
        within = Path(folder, entry.path).resolve().is_relative_to(folder.resolve())
        if within or found != digest:
            where = "in the run's own folder, where no run has any" if within else f"now {found[:12]}"
            raise ScorerError(
                f"{run.path} was trained on the Python of sha256 {str(digest)[:12]}; found {entry.path}, {where}. It "
                "was not run. Put the file back, or give --recipe R.yaml to score all runs by another reward."
            )


def open_scorers(trained: Sequence[FrontierSource], policy: Policy, options: FrontierOptions) -> Scorers:
    """Load gold, and the reward of ``--recipe``, else that of the first run that has one, if it is still the same."""
    score, gold, penalty = None, None, 0.0
    rewarded = next((source for source in trained if source.rewards), None)
    file = options.recipe
    if file is None and rewarded is not None:
        file = rewarded.folder / "recipe.yaml"
    recipe = None if file is None else load_recipe(file)
    entries = [entry for entry in getattr(recipe, "reward", ()) if not asks_for_pairs(entry)]
    if entries:
        if options.recipe is None:
            refuse_changed_code(rewarded, entries, recipe.folder)
        score = load_scorer(entries, recipe.folder, policy.device, policy)
        print(*score.notes, sep="\n", end="\n" if score.notes else "", file=sys.stderr)
        penalty = recipe.sampling.missing_end_penalty
        if options.recipe is None and score.identity != rewarded.rewards:
            raise ScorerError(
                f"{rewarded.path} was trained on {rewarded.rewards}, found {score.identity}; put the files back, or "
                "give --recipe R.yaml to score all runs by another reward."
            )
    if options.gold is not None:
        gold = load_scorer([options.gold], Path.cwd(), policy.device, policy)
        print(*gold.notes, sep="\n", end="\n" if gold.notes else "", file=sys.stderr)
    return Scorers(score, gold, penalty)
