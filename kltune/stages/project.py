"""Scale a finished adapter down until its measured KL meets a budget; or measure all shares of it from 0 to 1.

    π_α: the adapter's effect times α;    the largest α with KL(π_α ‖ reference) ≤ budget, at a stated confidence

The result is a plain adapter with its scale baked in. What lies between is worth a look of its own (``--curve``): from
one run it gives KL and score of every α. Measured, a policy that was trained far and scaled down scores 0 to 0.07 of
about 1.5 less than one that was trained for the KL it is scaled to (docs/project.md; the theory has it on or above,
docs/maths.md 17).
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kltune.core import ranks
from kltune.errors import ModelError, RecipeError
from kltune.lm.measure.interpolation import Interpolation, Look
from kltune.lm.measure.kl_document import kl_figures
from kltune.lm.measure.measurement import Round
from kltune.lm.model.policy import Policy
from kltune.lm.rewards.scorers import load_scorer
from kltune.recipe import asks_for_pairs, load_recipe
from kltune.report.plots import Z95, Curve, CurvePoint, Frame, curve_svg
from kltune.run.checkpoint import measure_settings, save_adapter
from kltune.run.files import storing, write_json, write_whole
from kltune.run.saved_policy import (
    MeasureOptions,
    Settings,
    Subject,
    check_budget,
    computed_on,
    find_checkpoint,
    measured_prompts,
    open_subject,
    refuse_filled,
    resolve_settings,
)
from kltune.run.screen import apart, doing, percent, with_error

CURVE = tuple(round(0.1 * step, 1) for step in range(1, 11))
SEARCH_SEED = 3_000_017     # beyond --seed: a gate is not to draw again what chose the share that it judges


@dataclass(frozen=True)
class ProjectOptions(MeasureOptions):
    """The command's options. output: where the adapter goes. curve: also measure a grid of α."""

    output: str | None = None
    curve: bool = False
    max_responses: int = 4096


def project(checkpoint: str, options: ProjectOptions) -> dict[str, Any]:
    """``kltune project``: find the share of an adapter that meets a budget, and save it.

    Returns:
        The JSON document: the same as ``project.json`` in the output folder.

    Raises:
        RecipeError: options that make no sense, or an output folder that is not empty. CheckpointError, ModelError,
            DataError, ScorerError: what cannot be measured. DivergedError: a number is not finite.
    """
    with ranks.joined("auto", ranks.TIMEOUT, "auto"):
        return _project(checkpoint, options)


def _project(checkpoint: str, options: ProjectOptions) -> dict[str, Any]:
    ranks.from_first(lambda: check_options(options))
    subject = find_checkpoint(checkpoint, options)
    settings = resolve_settings([subject], options)
    policy = open_subject(subject, options)
    if not policy.held.own:
        raise RecipeError(f"--reference: {options.reference} is not the base of this adapter, and to scale the adapter "
                          "down leads to its base alone; leave --reference out.")
    doing("measuring shares of the adapter")
    interpolation = make_interpolation(policy, settings, options)
    document: dict[str, Any] = {
        "schema": "kltune.project/1",
        "checkpoint": subject.path,
        "reference": policy.fingerprint.as_dict(),
        "direction": "KL(policy||reference)",
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "prompts": len(interpolation.prompts),
        "seed": options.seed,
        **computed_on(policy),
        "max_kl": options.max_kl,
        "unit": options.unit,
        "confidence": options.confidence,
        "alpha": None,
        "kl": None,
        "score": None,
        "falls": [],
        "rewards": interpolation.rewards,
        "output": options.output,
    }
    if options.curve:
        for alpha in (0.0, *CURVE):
            interpolation.measure(alpha, settings.responses, "curve", options.seed)
    if options.max_kl is not None:
        document |= land(interpolation, options, settings)
    document["looks"] = [row(look) for look in interpolation.looks]
    if options.output is not None and ranks.is_first():
        save_projection(Path(options.output), policy, document, subject, settings)
    return document


def check_options(options: ProjectOptions) -> None:
    """Raise RecipeError for what could not end well, before anything is loaded."""
    if options.max_kl is None and not options.curve:
        raise RecipeError("--max-kl: missing; give the budget to scale down to, or --curve to measure what is between.")
    check_budget(options)
    if options.max_kl is not None and options.output is None:
        raise RecipeError("--output: missing; the scaled adapter has to go somewhere.")
    if options.output is not None:
        refuse_filled(Path(options.output))


def make_interpolation(policy: Policy, settings: Settings, options: ProjectOptions) -> Interpolation:
    """The policy ready to be measured at any α; scored as well where the recipe says by what."""
    scorer, penalty = None, 0.0
    recipe = None if options.recipe is None else load_recipe(options.recipe)
    scoring = [entry for entry in getattr(recipe, "reward", ()) if not asks_for_pairs(entry)]
    if scoring:
        scorer = load_scorer(scoring, recipe.folder, policy.device, policy)
        print(*scorer.notes, sep="\n", end="\n" if scorer.notes else "", file=sys.stderr)
        penalty = recipe.sampling.missing_end_penalty
    interpolation = Interpolation(
        policy, measured_prompts(policy, settings), settings.draw(options.seed + SEARCH_SEED),
        confidence=options.confidence, unit=options.unit, scorer=scorer, missing_end_penalty=penalty,
        say=lambda text: print(text, file=sys.stderr),
    )
    interpolation.standardize(settings.responses)
    if note := Round.of(interpolation.prompts, settings.responses, options.seed).drawn_note(options.seed):
        print(f"each measurement {note}", file=sys.stderr)
    return interpolation


def land(interpolation: Interpolation, options: ProjectOptions, settings: Settings) -> dict[str, Any]:
    """Search, check, and what the document says of it; the adapter is left at the α that was found."""
    most = max(settings.responses, options.max_responses)
    search, check = interpolation.land(options.max_kl, settings.responses, most)
    unit = options.unit.replace("_", " ")
    if check is None:
        raise ModelError(
            f"No share of this adapter could be shown to keep within {options.max_kl:g} {unit} at "
            f"{percent(options.confidence)}% confidence; the last tried was {search.alpha:.4g}. Measure on more "
            "prompts, or raise --max-responses."
        )
    for low, high in search.falls:
        print(
            f"warning: the KL falls between alpha {low:.3g} and {high:.3g}: it does not grow with alpha everywhere. "
            "The result is the largest alpha found within the budget; some below it may not be.", file=sys.stderr,
        )
    return {
        "alpha": search.alpha,
        "kl": {"exact": kl_figures(check.kl), "confidence": check.kl.confidence, "responses": check.kl.responses},
        "score": check.score,
        "falls": search.falls,
    }


def save_projection(
    folder: Path, policy: Policy, document: dict[str, Any], subject: Subject, settings: Settings
) -> None:
    """The adapter with its record, if there is one to save; the curve as numbers and as a picture."""
    adapter = document["alpha"] is not None
    with storing(folder):
        (folder.parent if adapter else folder).mkdir(parents=True, exist_ok=True)
    if not adapter:
        write_files(folder, document)
        return
    info = {
        "stage": "project",
        "kind": "adapter",
        "reference": policy.fingerprint.as_dict(),
        "kl": document["kl"]["exact"],
        "projected": {"from": subject.path, "alpha": document["alpha"], "max_kl": document["max_kl"]},
        "measure": measure_settings(
            settings.prompts, settings.data, settings.max_new_tokens, settings.temperature,
            policy.template_day,
        ),
    }

    def write(hidden: Path) -> None:
        policy.save(hidden)
        write_files(hidden, document)

    save_adapter(folder, write, info=info)


def write_files(folder: Path, document: dict[str, Any]) -> None:
    """project.json, and curve.svg where a curve was measured."""
    write_json(folder / "project.json", document)
    looks = [look for look in document["looks"] if look["purpose"] == "curve"]
    if looks:
        write_whole(folder / "curve.svg", curve_of(looks, document["checkpoint"]))


def curve_of(looks: list[dict[str, Any]], name: str) -> str:
    """Score against KL where there is a score, else KL against α."""
    nats = "KL(policy ‖ reference), nats per response"
    scored = looks[0]["score"] is not None
    points = []
    for look in looks:
        kl, kl_error = look["nats_per_response"], Z95 * (look["stderr"] or 0.0)
        if scored:
            y_error = Z95 * (look["score_stderr"] or 0.0)
            points.append(CurvePoint(kl, look["score"], kl_error, y_error, f"{look['alpha']:g}"))
        else:
            points.append(CurvePoint(look["alpha"], kl, 0.0, kl_error))
    axes = {"x": nats, "y": "score"} if scored else {"x": "alpha, share of the adapter", "y": nats}
    return curve_svg([Curve(name, points)], Frame(**axes, title="KL and score by the share of the adapter"))


def row(look: Look) -> dict[str, Any]:
    """One line of the table."""
    return {
        "alpha": look.alpha,
        "purpose": look.purpose,
        "responses": look.kl.responses,
        "score": look.score,
        "score_stderr": look.score_stderr,
        **kl_figures(look.kl),
        "confidence": look.kl.confidence,
    }


def project_text(document: dict[str, Any]) -> str:
    """The document as lines of text."""
    per_token, unit = document["unit"] == "nats_per_token", document["unit"].replace("_", " ")
    kl, error = ("nats_per_token", "token_stderr") if per_token else ("nats_per_response", "stderr")
    scored = any(look["score"] is not None for look in document["looks"])
    lines = [
        f"{document['direction']}, {unit}; the adapter of {document['checkpoint']} times alpha",
        f"  {'alpha':<10}{'KL':<18}{'score' if scored else '':<18}responses",
    ]
    for look in document["looks"]:
        score = with_error(look["score"], look["score_stderr"]) if scored else ""
        measured = with_error(look[kl], look[error])
        lines.append(f"  {look['alpha']:<10.4f}{measured:<18}{score:<18}{look['responses']} ({look['purpose']})")
    if document["alpha"] is not None:
        exact, confidence = document["kl"]["exact"], document["kl"]["confidence"]
        high, _ = apart(exact["token_ci" if per_token else "ci"][1], document["max_kl"], places=3)
        lines += [
            f"  alpha {document['alpha']:.4f} keeps within {document['max_kl']:g} {unit}: "
            f"{with_error(exact[kl], exact[error])}, upper end {high} at {percent(confidence)}%,",
            "  measured on random numbers that the search did not use",
            f"  saved: {document['output']}",
        ]
    elif document["output"] is not None:
        lines.append(f"  saved: {document['output']}/project.json and curve.svg")
    return "\n".join(lines)
