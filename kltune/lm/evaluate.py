"""What a stage measures on held-out prompts and texts while it trains, and of what it saved."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kltune.lm.data import Example, Prompt, described, distinct, load_examples, load_prompts, row_rules
from kltune.lm.judge import Answers
from kltune.lm.measurement import Draw, Measurement, measure_kl
from kltune.lm.policy import Policy
from kltune.lm.preferences import KnownLogprobs, Preferences, load_preferences, pair_metrics
from kltune.lm.scorers import Scorer, load_scorer
from kltune.lm.texts import log_perplexity
from kltune.recipe import DataSection, EvalSection, Recipe, SamplingSection


@dataclass(frozen=True)
class HeldOut:
    """What evaluations are made on. notes: one line on each file that was read."""

    prompts: list[Prompt]
    texts: list[Example]
    gold: Scorer | None
    responses: int
    notes: tuple[str, ...]
    pairs: Preferences | None = None


def load_held_out(
    section: EvalSection,
    data: DataSection,
    policy: Policy,
    fallback: list[Prompt],
    *,
    prompt_limit: int,
    folder: Path,
    note: str,
    answers: Answers | None = None,
    ref_logprobs: KnownLogprobs | None = None,
) -> HeldOut:
    """Read the recipe's ``eval`` section; without prompts or pairs of its own, evaluations use ``fallback``.

    ``answers`` are those of a gold judge, as ``load_scorer`` takes them; ``ref_logprobs`` those of the reference that
    are known, as ``Preferences.measured`` takes them.
    """
    rules, own = row_rules(data), section.prompts or section.pairs
    prompts, texts, pairs, notes = fallback, [], None, [note]
    if own is not None:
        prompts, counts = load_prompts(own, policy.tokenizer, max_tokens=prompt_limit, **rules)
        prompts = prompts if section.prompts else distinct(prompts)
        notes.append(described(own, counts))
    if section.texts is not None:
        ends = {"end_token": policy.tokenizer.eos_token_id, "max_response_tokens": data.max_response_tokens}
        texts, counts = load_examples(section.texts, policy.tokenizer, max_prompt_tokens=prompt_limit, **ends, **rules)
        notes.append(described(section.texts, counts))
    if section.pairs is not None:
        pairs, note = load_preferences(section.pairs, policy, data)
        pairs = pairs.measured(policy, range(len(pairs)), ref_logprobs)
        notes.append(note)
    gold = None if section.gold is None else load_scorer([section.gold], folder, policy.device, policy, answers)
    notes += () if gold is None else gold.notes
    return HeldOut(prompts, texts, gold, section.responses, tuple(notes), pairs)


def evaluate(
    policy: Policy,
    held_out: HeldOut,
    sampling: SamplingSection,
    scorer: Scorer | None,
    *,
    seed: int,
    compare: bool = False,
) -> tuple[dict[str, float | None], Measurement | None]:
    """KL, score and perplexity on held-out prompts and texts.

    Args:
        policy: adapter on.
        held_out: what to evaluate on; without prompts there is no KL and no score.
        sampling: length limit, temperature and missing-end penalty.
        scorer: the reward that is trained on; None in supervised stages.
        seed: the same for every evaluation of a run, so that they are paired.
        compare: also score the reference's own responses, drawn with the same random numbers.

    Returns:
        (metrics, the KL measurement or None).
    """
    metrics: dict[str, float | None] = {}
    measured = None
    if held_out.prompts:
        draw = Draw.of(held_out.prompts, held_out.responses)
        drawn = {"max_new_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "seed": seed}
        measured = measure_kl(policy, draw, **drawn)
        kl = measured.summary()
        metrics |= {
            "eval/kl_ref_nats_per_response": kl.nats_per_response,
            "eval/kl_ref_stderr": kl.stderr,
            "eval/kl_ref_nats_per_token": kl.nats_per_token,
            "eval/agreement_z": measured.z,
            "eval/truncated_fraction": measured.truncated.float().mean().item(),
        }
        judges = {"score": scorer, "gold": held_out.gold}
        metrics |= judged("eval/", judges, measured, sampling.missing_end_penalty)
        if compare and any(judge is not None for judge in judges.values()):
            reference = measure_kl(policy, draw, from_reference=True, **drawn)
            metrics |= judged("eval/reference_", judges, reference, sampling.missing_end_penalty)
    if held_out.texts:
        nats = log_perplexity(policy, held_out.texts)
        metrics |= {"eval/texts_nats_per_token": nats, "eval/perplexity": math.exp(nats)}
    if held_out.pairs is not None:
        metrics |= pair_metrics(policy, held_out.pairs)
    return metrics, measured


def judged(
    prefix: str, judges: dict[str, Scorer | None], measured: Measurement, missing_end_penalty: float
) -> dict[str, float | None]:
    """Mean score and its standard error by each judge there is."""
    metrics: dict[str, float | None] = {}
    for name, judge in judges.items():
        if judge is not None:
            scores = judge(*measured.texts(), measured.rollouts).total - missing_end_penalty * measured.truncated
            error = scores.std().item() / len(scores) ** 0.5 if len(scores) > 1 else None
            metrics |= {f"{prefix}{name}_mean": scores.mean().item(), f"{prefix}{name}_stderr": error}
    return metrics


def kl_result(measured: Measurement) -> dict[str, Any]:
    """The ``kl`` object of result.json: exact KL(policy ‖ reference) of what was saved."""
    kl = measured.summary()
    return {
        "direction": "KL(policy||reference)",
        "nats_per_response": kl.nats_per_response,
        "stderr": kl.stderr,
        "ci95": kl.ci,
        "nats_per_token": kl.nats_per_token,
        "responses": kl.responses,
        "prompts": kl.prompts,
    }


def prompts_source(recipe: Recipe) -> str | None:
    """The file whose prompts a stage's KL is measured on; held-out ones where the recipe has any."""
    held_out, data = recipe.eval, recipe.data
    return held_out.prompts or held_out.pairs or data.prompts or data.pairs


def measure_settings(
    prompts: str | None, data: DataSection, max_new_tokens: int, temperature: float
) -> dict[str, Any]:
    """How the KL of a checkpoint is measured unless asked otherwise; kltune.json keeps it for ``kltune eval-kl``."""
    return {
        "prompts": prompts,
        "template": data.template,
        "max_prompt_tokens": data.max_prompt_tokens,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
    }
