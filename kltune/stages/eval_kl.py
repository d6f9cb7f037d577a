"""How far is a checkpoint from its reference: KL(policy ‖ reference) with error bars, and a gate on it.

The headline is exact: at every position the divergence is summed over the whole vocabulary, and only the prefixes are
sampled. k1 and k3 stand beside it; that k1 agrees with it (z) shows that the text was drawn from the very distribution
that was measured, and a checkpoint where it does not is refused.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import softplus

from kltune.core.intervals import KLSummary, summarize, verdict
from kltune.errors import CheckpointError, ModelError, RecipeError
from kltune.lm.adapters import read_adapter_config
from kltune.lm.attribution import by_position, top_prompts, top_tokens
from kltune.lm.data import Example, load_examples, load_prompts
from kltune.lm.evaluate import Measurement, described, document_nats, measure_kl
from kltune.lm.loading import pick_device
from kltune.lm.opening import load_saved_policy
from kltune.lm.policy import Policy
from kltune.recipe import DataSection, ModelSection, load_recipe
from kltune.run.checkpoint import read_info, resolve_checkpoint
from kltune.run.kl_text import render

__all__ = ["EvalKLOptions", "eval_kl", "render"]

EXIT_CODES = {"pass": 0, "fail": 3, "inconclusive": 4}
WORST_FIRST = ("fail", "inconclusive", "pass")
WORST_Z = 4.0  # |k1 − exact| in standard errors; chance alone passes it once in 16,000 runs


@dataclass(frozen=True)
class EvalKLOptions:
    """The command's options; None takes the checkpoint's own settings, then the defaults of ``Settings``."""

    recipe: str | None = None
    reference: str | None = None
    prompts: str | None = None
    responses: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int = 0
    max_kl: float | None = None
    unit: str = "nats_per_response"
    confidence: float = 0.95
    direction: str = "reverse"
    texts: str | None = None
    top: int = 10


@dataclass(frozen=True)
class Settings:
    """How one checkpoint is measured, all resolved."""

    prompts: str
    data: DataSection
    responses: int = 256
    max_new_tokens: int = 128
    temperature: float = 1.0
    texts: str | None = None


def eval_kl(checkpoints: list[str], options: EvalKLOptions) -> tuple[dict[str, Any], int]:
    """``kltune eval-kl``: measure checkpoints on common prompts and random numbers, and judge them against a budget.

    Args:
        checkpoints: run folders, checkpoint folders, PEFT adapters or full models.
        options: what was asked for.

    Returns:
        (the JSON document, the exit code: that of the worst checkpoint).

    Raises:
        RecipeError: options that make no sense. CheckpointError, ModelError, DataError: what cannot be measured.
    """
    check_options(options)
    documents = [measure_checkpoint(path, options) for path in checkpoints]
    verdicts = {document["gate"]["verdict"] for document in documents if document["gate"] is not None}
    code = next((EXIT_CODES[name] for name in WORST_FIRST if name in verdicts), 0)
    if len(documents) == 1:
        return documents[0], code
    return {"schema": "kltune.eval_kl_list/1", "checkpoints": documents}, code


def check_options(options: EvalKLOptions) -> None:
    """Raise RecipeError for numbers that no measurement could be made with."""
    if options.max_kl is not None and not (math.isfinite(options.max_kl) and options.max_kl > 0.0):
        raise RecipeError(f"--max-kl: found {options.max_kl}, wanted a number of nats above 0.")
    if not 0.5 <= options.confidence < 1.0:
        raise RecipeError(f"--confidence: found {options.confidence}, wanted at least 0.5 and below 1, as 0.95.")
    if options.temperature is not None and not (math.isfinite(options.temperature) and options.temperature > 0.0):
        raise RecipeError(f"--temperature: found {options.temperature}, wanted a number above 0.")
    for name in ("responses", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise RecipeError(f"--{name.replace('_', '-')}: found {value}, wanted at least 1.")


def measure_checkpoint(path: str, options: EvalKLOptions) -> dict[str, Any]:
    """The document of one checkpoint."""
    folder = resolve_checkpoint(path)
    info = read_info(folder) if (folder / "kltune.json").exists() else None
    policy = open_policy(folder, info, options.reference)
    settings = settle(info, options, folder)
    limit = policy.prompt_limit(settings.data.max_prompt_tokens, settings.max_new_tokens)
    rules = {
        "template": settings.data.template,
        "on_overlong": settings.data.on_overlong,
        "on_bad_row": settings.data.on_bad_row,
    }
    prompts, counts = load_prompts(settings.prompts, policy.tokenizer, max_tokens=limit, **rules)
    print(f"{path}: {policy.fingerprint.describe()}\n{described(settings.prompts, counts)}", file=sys.stderr)

    drawn = {
        "responses": settings.responses,
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "seed": options.seed,
    }
    reverse = measure_kl(policy, prompts, **drawn)
    check_agreement(path, reverse)
    forward = None
    if options.direction != "reverse":
        forward = measure_kl(policy, prompts, from_reference=True, **drawn)
        check_agreement(path, forward)
    tax = None
    if settings.texts is not None:
        examples, counts = load_examples(
            settings.texts,
            policy.tokenizer,
            end_token=policy.tokenizer.eos_token_id,
            max_prompt_tokens=limit,
            max_response_tokens=settings.data.max_response_tokens,
            **rules,
        )
        tax = alignment_tax(policy, examples, options.confidence)
    kl = {name: summary_of(reverse.summary(name, options.confidence)) for name in ("exact", "k1", "k3")}
    return {
        "schema": "kltune.eval_kl/1",
        "checkpoint": str(path),
        "reference": policy.fingerprint.as_dict(),
        "direction": "KL(policy||reference)",
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "seed": options.seed,
        "confidence": options.confidence,
        "prompts": reverse.summary().prompts,
        "responses": len(reverse.exact),
        "tokens": int(reverse.tokens.sum()),
        "truncated_fraction": reverse.truncated.double().mean().item(),
        "kl": kl,
        "forward": None if forward is None else {"exact": summary_of(forward.summary("exact", options.confidence))},
        "js": None if forward is None else jensen_shannon(reverse, forward),
        "entropy": {
            "policy": per_token(reverse.entropy, reverse),
            "reference": per_token(reverse.ref_entropy, reverse),
        },
        "agreement_z": reverse.z,
        "top_tokens": top_tokens(reverse, policy, options.top),
        "top_prompts": top_prompts(reverse, options.top),
        "by_position": by_position(reverse),
        "alignment_tax": tax,
        "gate": judge(reverse.summary("exact", options.confidence), options),
    }


def open_policy(folder: Path, info: dict[str, Any] | None, reference: str | None) -> Policy:
    """A checkpoint over its own reference; for one that kltune did not make, its base or ``--reference``.

    Raises:
        CheckpointError: the reference found is not the one the checkpoint was trained against, or none is known.
    """
    is_adapter = (folder / "adapter_config.json").exists()
    if info is not None:
        known = info["reference"]
        section = ModelSection(path=reference or known["path"], sft_adapter=known["sft_adapter"], dtype=known["dtype"])
    else:
        path = reference or (read_adapter_config(folder).get("base_model_name_or_path") if is_adapter else None)
        if path is None:
            raise CheckpointError(f"{folder}: which model is the reference? Give it as --reference MODEL.")
        section = ModelSection(path=path)
    policy = load_saved_policy(folder, section, device=pick_device("auto"), is_adapter=is_adapter)
    if info is not None and (differences := policy.fingerprint.differences(info["reference"])):
        raise CheckpointError(
            f"{folder}: this is not the reference it was trained against.\n  " + "\n  ".join(differences)
        )
    return policy


def settle(info: dict[str, Any] | None, options: EvalKLOptions, folder: Path) -> Settings:
    """Options first, then ``--recipe``, then what the checkpoint was made with, then the defaults.

    Raises:
        RecipeError: no prompts are known.
    """
    found: dict[str, Any] = {"data": DataSection(), "prompts": None}
    if options.recipe is not None:
        recipe = load_recipe(options.recipe)
        found |= {
            "prompts": recipe.eval.prompts or recipe.data.prompts,
            "data": recipe.data,
            "responses": recipe.eval.responses,
            "texts": recipe.eval.texts,
        }
        if hasattr(recipe, "sampling"):
            found |= {"max_new_tokens": recipe.sampling.max_new_tokens, "temperature": recipe.sampling.temperature}
    elif info is not None:
        own = info["measure"]
        found["data"] = DataSection(template=own["template"], max_prompt_tokens=own["max_prompt_tokens"])
        found |= {name: own[name] for name in ("prompts", "max_new_tokens", "temperature")}
    asked = {
        name: getattr(options, name) for name in ("prompts", "responses", "max_new_tokens", "temperature", "texts")
    }
    found |= {name: value for name, value in asked.items() if value is not None}
    if found["prompts"] is None:
        raise RecipeError(f"{folder}: no prompts to measure on; give --prompts FILE or --recipe R.yaml.")
    return Settings(**found)


def check_agreement(path: str, measured: Measurement) -> None:
    """Raise ModelError if the sampled and the exact KL differ by more than chance: then neither can be trusted."""
    if not abs(measured.z) <= WORST_Z:  # NaN must not pass
        raise ModelError(
            f"{path}: the sampled KL (k1) and the exact KL differ by {measured.z:.1f} standard errors, so the "
            "responses were not drawn from the distribution that was measured. No KL of this checkpoint is reported."
        )


def summary_of(kl: KLSummary) -> dict[str, Any]:
    """One estimator's figures, per response and per token (ratio of sums)."""
    return {
        "nats_per_response": kl.nats_per_response,
        "stderr": kl.stderr,
        "ci": kl.ci,
        "nats_per_token": kl.nats_per_token,
        "token_stderr": kl.token_stderr,
        "token_ci": kl.token_ci,
    }


def judge(kl: KLSummary, options: EvalKLOptions) -> dict[str, Any] | None:
    """The gate's part of the document; None without ``--max-kl``."""
    if options.max_kl is None:
        return None
    found = verdict(kl, options.max_kl, options.unit, options.confidence)
    return {
        "max_kl": options.max_kl,
        "unit": options.unit,
        "confidence": options.confidence,
        "verdict": found.verdict,
        "more_responses": found.more_responses,
    }


def per_token(sums: torch.Tensor, measured: Measurement) -> float:
    """Ratio of sums over all responses."""
    return (sums.double().sum() / measured.tokens.sum()).item()


def jensen_shannon(reverse: Measurement, forward: Measurement) -> float:
    """JS divergence of whole responses, in [0, log 2]: ½ E_π[log 2 − softplus(−U)] + ½ E_ρ[log 2 − softplus(U)].

    Source: MATH 1.3. ``forward.k1`` is −U on the reference's own samples.
    """
    halves = [(math.log(2.0) - softplus(-measured.k1.double())).mean() for measured in (reverse, forward)]
    return (0.5 * (halves[0] + halves[1])).item()


def alignment_tax(policy: Policy, examples: list[Example], confidence: float) -> dict[str, Any]:
    """How much worse the policy predicts held-out human text than its reference does, paired by document."""
    nats, tokens = document_nats(policy, examples)
    with policy.reference():
        before, _ = document_nats(policy, examples)
    found = summarize("tax", nats - before, tokens, torch.arange(len(tokens)), confidence)
    return {
        "nats_per_token": found.nats_per_token,
        "stderr": found.token_stderr,
        "ci": found.token_ci,
        "documents": len(tokens),
        "tokens": int(tokens.sum()),
    }
