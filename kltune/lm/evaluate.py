"""What a stage measures on held-out prompts and texts while it trains, and of what it saved."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kltune.lm.data import Example, Prompt, described, distinct, load_examples, load_prompts, row_rules
from kltune.lm.judge import Answers
from kltune.lm.measurement import Draw, Measurement, measure_kl
from kltune.lm.policy import Policy
from kltune.lm.preferences import KnownLogprobs, Preferences, load_preferences, pair_metrics
from kltune.lm.scorers import Scorer, load_scorer
from kltune.lm.texts import alignment_tax, document_nats, reference_nats
from kltune.lm.watching import Metrics, Reference, judged, scales_of, score_metrics, text_metrics
from kltune.recipe import DataSection, EvalSection, Recipe, SamplingSection


@dataclass(frozen=True)
class HeldOut:
    """What evaluations are made on. notes: one line on each file that was read.

    references: what ``evaluate`` has found of the reference, by number of responses; once per run.
    """

    prompts: list[Prompt]
    texts: list[Example]
    gold: Scorer | None
    responses: int
    notes: tuple[str, ...]
    pairs: Preferences | None = None
    references: dict[int, Reference] = field(default_factory=dict, compare=False)


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
    policy: Policy, held_out: HeldOut, sampling: SamplingSection, scorer: Scorer | None, *, seed: int
) -> tuple[Metrics, Measurement | None]:
    """KL, scores, diversity, and what becomes of texts, on held-out prompts and texts, beside the reference's own.

    Args:
        policy: adapter on.
        held_out: what to evaluate on; without prompts there is no KL and no score.
        sampling: length limit, temperature and missing-end penalty.
        scorer: the reward that is trained on; None where there is none.
        seed: the same for every evaluation of a run, so that they are paired.

    Returns:
        (metrics, the KL measurement or None).
    """
    judges = {name: judge for name, judge in (("score", scorer), ("gold", held_out.gold)) if judge is not None}
    if held_out.responses not in held_out.references:
        held_out.references[held_out.responses] = _reference(policy, held_out, sampling, judges, seed)
    reference = held_out.references[held_out.responses]
    metrics: Metrics = {}
    measured = None
    if held_out.prompts:
        measured = _answer(policy, held_out, sampling, seed)
        kl = measured.summary()
        metrics |= {
            "eval/kl_ref_nats_per_response": kl.nats_per_response,
            "eval/kl_ref_stderr": kl.stderr,
            "eval/kl_ref_nats_per_token": kl.nats_per_token,
            "eval/agreement_z": measured.z,
            "eval/truncated_fraction": measured.truncated.float().mean().item(),
        }
        scores = judged(judges, measured, sampling.missing_end_penalty)
        metrics |= score_metrics("eval/", scores, measured.prompt_index, reference.scales)
        metrics |= text_metrics("eval/", measured, policy.network.vocabulary)
    if held_out.texts:
        nats, tokens = document_nats(policy, held_out.texts)
        tax = alignment_tax(nats, reference.text_nats, tokens)
        mean = (nats.sum() / tokens.sum()).item()
        metrics |= {
            "eval/texts_nats_per_token": mean,
            "eval/perplexity": math.exp(mean),
            "eval/tax_nats_per_token": tax.nats_per_token,
            "eval/tax_stderr": tax.token_stderr,
        }
    if held_out.pairs is not None:
        metrics |= pair_metrics(policy, held_out.pairs)
    return metrics | reference.metrics, measured


def _answer(
    policy: Policy, held_out: HeldOut, sampling: SamplingSection, seed: int, *, from_reference: bool = False
) -> Measurement:
    """The answers to the held-out prompts, measured; with the same random numbers whoever gives them."""
    draw = Draw.of(held_out.prompts, held_out.responses)
    limits = {"max_new_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
    return measure_kl(policy, draw, **limits, seed=seed, from_reference=from_reference)


def _reference(
    policy: Policy, held_out: HeldOut, sampling: SamplingSection, judges: dict[str, Scorer], seed: int
) -> Reference:
    """The same of the reference, which stays what it is."""
    metrics: Metrics = {}
    scales, text_nats = {}, None
    if held_out.prompts:
        measured = _answer(policy, held_out, sampling, seed, from_reference=True)
        scores = judged(judges, measured, sampling.missing_end_penalty)
        scales = scales_of(scores)
        metrics |= score_metrics("eval/reference_", scores, measured.prompt_index, scales)
        metrics |= text_metrics("eval/reference_", measured, policy.network.vocabulary)
    if held_out.texts:
        text_nats = reference_nats(policy, held_out.texts)
        tokens = sum(sum(example.scored) for example in held_out.texts)
        metrics["eval/reference_texts_nats_per_token"] = text_nats.sum().item() / tokens
    return Reference(metrics, scales, text_nats)


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


def gold_result(metrics: Metrics) -> Metrics:
    """What result.json says of the scorer that was never trained on; None without one."""
    names = {"gold": "gold_mean", "gold_stderr": "gold_stderr", "reference_gold": "reference_gold_mean"}
    return {name: metrics.get(f"eval/{metric}") for name, metric in names.items()}


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
