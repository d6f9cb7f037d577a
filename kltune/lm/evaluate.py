"""What a stage measures on held-out prompts and texts while it trains, and of what it saved."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kltune.errors import DivergedError
from kltune.lm.batches import pad_right, response_scatter
from kltune.lm.data import Counts, Example, Prompt, load_examples, load_prompts
from kltune.lm.measurement import Draw, Measurement, measure_kl
from kltune.lm.policy import Policy
from kltune.lm.scorers import Scorer, load_scorer
from kltune.recipe import DataSection, EvalSection, SamplingSection

TEXTS_PER_PASS = 256



def document_nats(policy: Policy, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each text's scored tokens, and how many they are. [D] float64 nats, [D] int64.

    Raises:
        DivergedError: a log-probability is not finite.
    """
    nats, tokens = [], []
    for start in range(0, len(examples), TEXTS_PER_PASS):
        ids, scored = example_batch(examples[start : start + TEXTS_PER_PASS], policy)
        logprobs = policy.measure_logprobs(ids, scored)
        if not torch.isfinite(logprobs).all():
            raise DivergedError("the log-probability of a held-out token is not finite; lower optim.lr.")
        nats.append(-response_scatter(logprobs.double(), scored).sum(dim=1).cpu())
        tokens.append(scored.sum(dim=1).cpu())
    return torch.cat(nats), torch.cat(tokens)


def log_perplexity(policy: Policy, examples: Sequence[Example]) -> float:
    """Mean negative log-likelihood of the scored tokens of all texts together, nats per token."""
    nats, tokens = document_nats(policy, examples)
    return (nats.sum() / tokens.sum()).item()


@dataclass(frozen=True)
class HeldOut:
    """What evaluations are made on. notes: one line on each file that was read."""

    prompts: list[Prompt]
    texts: list[Example]
    gold: Scorer | None
    responses: int
    notes: tuple[str, ...]


def described(source: str, counts: Counts) -> str:
    """One line on a file that was read: every row accounted for."""
    rest = [
        f"{number} {what}"
        for what, number in (
            ("truncated", counts.truncated),
            ("dropped as over-long", counts.dropped),
            ("skipped as faulty", counts.skipped),
        )
        if number
    ]
    return f"{source}: {counts.kept} of {counts.read} rows" + (f" ({', '.join(rest)})" if rest else "")


def text_limits(data: DataSection, policy: Policy) -> dict[str, int]:
    """The longest prompt and response that are read from data; a prompt takes at most half of the model's context."""
    context = policy.max_context
    prompt = policy.prompt_limit(data.max_prompt_tokens, min(data.max_response_tokens, (context or 1024) // 2))
    room = data.max_response_tokens if context is None else min(data.max_response_tokens, context - prompt)
    return {"max_prompt_tokens": prompt, "max_response_tokens": room}


def load_held_out(
    section: EvalSection,
    data: DataSection,
    policy: Policy,
    fallback: list[Prompt],
    *,
    prompt_limit: int,
    folder: Path,
    note: str,
) -> HeldOut:
    """Read the recipe's ``eval`` section; without prompts of its own, evaluations use ``fallback``."""
    rules = {"template": data.template, "on_overlong": data.on_overlong, "on_bad_row": data.on_bad_row}
    prompts, texts, notes = fallback, [], [note]
    if section.prompts is not None:
        prompts, counts = load_prompts(section.prompts, policy.tokenizer, max_tokens=prompt_limit, **rules)
        notes.append(described(section.prompts, counts))
    if section.texts is not None:
        ends = {"end_token": policy.tokenizer.eos_token_id, "max_response_tokens": data.max_response_tokens}
        texts, counts = load_examples(section.texts, policy.tokenizer, max_prompt_tokens=prompt_limit, **ends, **rules)
        notes.append(described(section.texts, counts))
    gold = None if section.gold is None else load_scorer([section.gold], folder, policy.device, policy)
    notes += () if gold is None else gold.notes
    return HeldOut(prompts, texts, gold, section.responses, tuple(notes))


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
        if compare:
            reference = measure_kl(policy, draw, from_reference=True, **drawn)
            metrics |= judged("eval/reference_", judges, reference, sampling.missing_end_penalty)
    if held_out.texts:
        nats = log_perplexity(policy, held_out.texts)
        metrics |= {"eval/texts_nats_per_token": nats, "eval/perplexity": math.exp(nats)}
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


def example_batch(examples: Sequence[Example], policy: Policy) -> tuple[Tensor, Tensor]:
    """Examples as right-padded ids and scored marks, [B, S] each, on the policy's device."""
    ids = pad_right([example.ids for example in examples], policy.tokenizer.pad_token_id)
    scored = pad_right([example.scored for example in examples], False, torch.bool)
    return ids.to(policy.device), scored.to(policy.device)


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
