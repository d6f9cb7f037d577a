"""How far is a checkpoint from its reference: KL(policy ‖ reference) with error bars, and a gate on it.

The headline is exact: at every position the divergence is summed over the whole vocabulary, and only the prefixes are
sampled. k1, k3 and a control variate stand beside it; that k1 agrees with it (z) shows that the text was drawn from the
very distribution that was measured, and a checkpoint where it does not is refused.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kltune.core import ranks
from kltune.core.kl.gate import confidence_per_look, looks, verdict
from kltune.core.kl.truncation import Cut
from kltune.errors import ModelError, RecipeError
from kltune.lm.data.examples import Example, Prompt
from kltune.lm.measure.deployed import Deployed, measure_deployed
from kltune.lm.measure.kl_document import DIRECTIONS, CheckpointKL, described_kl, paired_differences
from kltune.lm.measure.likelihood import alignment_tax, document_nats, reference_nats
from kltune.lm.measure.measurement import Measurement, Round, measure_kl
from kltune.lm.model.policy import Policy
from kltune.run.recorder import counting
from kltune.run.saved_policy import (
    MeasureOptions,
    Settings,
    Subject,
    computed_on,
    find_checkpoint,
    measured_prompts,
    measured_texts,
    open_subject,
    other_dtype,
    resolve_settings,
)

VERDICT_CODES = {"fail": 3, "inconclusive": 4, "pass": 0}      # worst first
WORST_Z = 4.0  # |k1 − exact| in standard errors; chance alone passes it once in 16,000 runs


@dataclass(frozen=True)
class EvalKLOptions(MeasureOptions):
    """The command's options.

    auto: keep sampling until the gate is decided or there are ``max_responses``. top_p, top_k: also measure the policy
    as it is deployed with these.
    """

    direction: str = "reverse"
    texts: str | None = None
    top: int = 10
    show: int = 3
    auto: bool = False
    max_responses: int = 4096
    top_p: float | None = None
    top_k: int | None = None

    @property
    def cut(self) -> Cut | None:
        """What a deployed policy samples from, if that was asked for."""
        if self.top_p is None and self.top_k is None:
            return None
        return Cut(1.0 if self.top_p is None else self.top_p, self.top_k)


def eval_kl(checkpoints: list[str], options: EvalKLOptions) -> tuple[dict[str, Any], int]:
    """``kltune eval-kl``: measure checkpoints on common prompts and random numbers, and hold them against a budget.

    Args:
        checkpoints: run folders, checkpoint folders, PEFT adapters or full models.

    Returns:
        (the JSON document, the exit code: that of the worst checkpoint).

    Raises:
        RecipeError: options that make no sense. CheckpointError, ModelError, DataError: what cannot be measured.
        DivergedError: a number is not finite.
    """
    check_options(options)
    with ranks.joined("auto", ranks.TIMEOUT, "auto"):
        return _eval_kl(checkpoints, options)


def _eval_kl(checkpoints: list[str], options: EvalKLOptions) -> tuple[dict[str, Any], int]:
    subjects = [find_checkpoint(path, options) for path in checkpoints]
    settings = resolve_settings(subjects, options)
    documents, measured = zip(*(measure_checkpoint(subject, settings, options) for subject in subjects), strict=True)
    verdicts = {document["gate"]["verdict"] for document in documents if document["gate"] is not None}
    code = next((code for name, code in VERDICT_CODES.items() if name in verdicts), 0)
    if len(documents) == 1:
        return documents[0], code
    differences = paired_differences(checkpoints, measured, options.confidence)
    return {"schema": "kltune.eval_kl_list/1", "checkpoints": list(documents), "differences": differences}, code


def check_options(options: EvalKLOptions) -> None:
    """Raise RecipeError for numbers that no measurement could be made with."""
    if options.max_kl is not None and not (math.isfinite(options.max_kl) and options.max_kl > 0.0):
        raise RecipeError(f"--max-kl: found {options.max_kl}, wanted a number of nats above 0.")
    if not 0.5 <= options.confidence < 1.0:
        raise RecipeError(f"--confidence: found {options.confidence}, wanted at least 0.5 and below 1, as 0.95.")
    if options.temperature is not None and not (math.isfinite(options.temperature) and options.temperature > 0.0):
        raise RecipeError(f"--temperature: found {options.temperature}, wanted a number above 0.")
    if options.top_p is not None and not 0.0 < options.top_p <= 1.0:
        raise RecipeError(f"--top-p: found {options.top_p}, wanted a probability above 0, as 0.9; 1 keeps all tokens.")
    for name in ("responses", "max_new_tokens", "top_k", "max_responses"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise RecipeError(f"--{name.replace('_', '-')}: found {value}, wanted at least 1.")
    if options.auto and options.max_kl is None:
        raise RecipeError("--auto: samples until a budget is decided; give the budget as --max-kl.")


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint that is ready to be measured, on what and how."""

    path: str
    policy: Policy
    prompts: list[Prompt]
    settings: Settings
    options: EvalKLOptions

    @property
    def first_round(self) -> Round:
        """The prompts that are answered, the same for every checkpoint and both sides."""
        return Round.of(self.prompts, self.settings.responses, self.options.seed)


def measure_checkpoint(
    subject: Subject, settings: Settings, options: EvalKLOptions
) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """The document of one checkpoint; and exact KL [B] and prompt [B] of its responses, to compare it with others."""
    policy = open_subject(subject, options)
    opened = OpenCheckpoint(subject.path, policy, measured_prompts(policy, settings), settings, options)
    if note := opened.first_round.drawn_note(options.seed):
        print(f"{subject.path}: {note}", file=sys.stderr)
    measured = measure(opened)
    document = {
        "schema": "kltune.eval_kl/1",
        "checkpoint": subject.path,
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "seed": options.seed,
        **computed_on(policy),
        "template_date": None if policy.template_day is None else policy.template_day.isoformat(),
        "confidence": options.confidence,
        **described_kl(measured, policy, confidence=options.confidence, top=options.top, show=options.show),
        "warnings": [*other_dtype(subject, policy), *does_nothing(subject, policy, measured.reverse)],
    }
    for warning in document["warnings"][len(other_dtype(subject, policy)) :]:     # that was said when it was opened
        print(f"warning: {subject.path}: {warning}", file=sys.stderr)
    return document, (measured.reverse.exact, measured.reverse.prompt_index)


def does_nothing(subject: Subject, policy: Policy, measured: Measurement) -> list[str]:
    """What there is to say of an adapter that has tensors, and a KL of exactly 0; [] of any other."""
    trained = (subject.folder / "adapter_config.json").exists() and any(
        tensor.any() for tensor in policy.trainable_parameters().values()
    )
    if not trained or measured.exact.any():
        return []
    return [
        f"the KL is exactly 0 on all {len(measured.exact)} responses though the adapter's tensors are not all 0: it "
        "changes nothing here. Was it trained, and does it act on these prompts?"
    ]


def measure(opened: OpenCheckpoint) -> CheckpointKL:
    """All that was asked for of one policy; the gate is on the direction that was asked for."""
    options, forward = opened.options, None
    texts = measured_texts(opened.policy, opened.settings)
    if options.direction == "forward":
        forward, gate = sample_and_gate(opened, from_reference=True)
        reverse, _ = sample_and_gate(opened, gated=False)
    else:
        reverse, gate = sample_and_gate(opened)
        if options.direction == "both":
            forward, _ = sample_and_gate(opened, gated=False, from_reference=True)
    return CheckpointKL(
        reverse=reverse,
        forward=forward,
        deployed=None if options.cut is None else deploy(opened),
        tax=tax_document(opened.policy, texts, options.confidence) if texts else None,
        gate=gate,
        prompts_in_file=len(opened.prompts),
    )


def sample_and_gate(
    opened: OpenCheckpoint, *, gated: bool = True, from_reference: bool = False
) -> tuple[Measurement, dict[str, Any] | None]:
    """Sample one side, and hold it against the budget if there is one; with ``auto``, as often as it takes.

    How often to look is fixed before the first look, and each look's interval is as much wider as that takes for all
    of them to hold together: to stop when it pleases is then no advantage.

    Returns:
        (the measurement, the gate's part of the document or None).
    """
    settings, options = opened.settings, opened.options
    gated = gated and options.max_kl is not None
    counts = (settings.responses,)
    if gated and options.auto:
        counts = looks(settings.responses, options.max_responses)
    confidence = confidence_per_look(options.confidence, len(counts))
    side = "the reference" if from_reference else "the policy"

    def measure_round(answered: Round) -> Measurement:
        with counting("sampling the reference" if from_reference else "sampling", answered.responses) as progress:
            return measure_kl(
                opened.policy, answered, settings.draw(options.seed), progress=progress,
                from_reference=from_reference, by_token=not from_reference,
            )

    answered = Round.of(opened.prompts, counts[0], options.seed)
    measured = measure_round(answered)
    seen: list[dict[str, Any]] = []
    for count in counts:
        while len(measured.exact) < count:
            answered = answered.following(count - len(measured.exact))
            measured += measure_round(answered)
        check_agreement(opened.path, side, measured.z)
        if not gated:
            return measured, None
        kl = measured.summary("exact", confidence)
        gate = verdict(
            kl, options.max_kl, options.unit, confidence, fresh_prompts=answered.leaves_prompts,
            rounding=measured.noise_floor[options.unit],
        )
        ci = kl.ci if options.unit == "nats_per_response" else kl.token_ci
        seen.append({"responses": kl.responses, "confidence": confidence, "ci": ci, "verdict": gate.verdict})
        if gate.verdict != "inconclusive" or gate.wants_prompts:
            break
    return measured, {
        "max_kl": options.max_kl,
        "unit": options.unit,
        "confidence": options.confidence,
        "direction": DIRECTIONS["forward" if from_reference else "reverse"],
        "verdict": gate.verdict,
        "reason": gate.reason,
        "noise_floor": measured.noise_floor[options.unit],
        "more_responses": gate.more_responses,
        "wants_prompts": gate.wants_prompts,
        "planned_looks": len(counts),
        "looks": seen,
    }


def deploy(opened: OpenCheckpoint) -> Deployed:
    """The policy as it is deployed, on responses of its own."""
    answered, draw = opened.first_round, opened.settings.draw(opened.options.seed)
    with counting("sampling the deployed policy", answered.responses) as progress:
        deployed = measure_deployed(opened.policy, answered, draw, opened.options.cut, progress)
    for name in ("vs_base", "both"):
        check_agreement(opened.path, "the deployed policy", deployed.z(name))
    return deployed


def check_agreement(path: str, who: str, z: float) -> None:
    """Raise ModelError if the sampled and the exact KL differ by more than chance: then neither can be trusted."""
    if not abs(z) <= WORST_Z:  # NaN must not pass
        raise ModelError(
            f"{path}: the sampled KL (k1) and the exact KL of {who} differ by {z:.1f} standard errors, so the "
            "responses were not drawn from the distribution that was measured. No KL of this checkpoint is reported."
        )


def tax_document(policy: Policy, examples: list[Example], confidence: float) -> dict[str, Any]:
    """The alignment tax on held-out texts, for the document."""
    nats, tokens = document_nats(policy, examples)
    tax = alignment_tax(nats, reference_nats(policy, examples), tokens, examples, confidence)
    return {
        "nats_per_token": tax.nats_per_token,
        "stderr": tax.token_stderr,
        "ci": tax.token_ci,
        "documents": len(tokens),
        "tokens": int(tokens.sum()),
    }
