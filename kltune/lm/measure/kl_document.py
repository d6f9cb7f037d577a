"""The JSON document of ``kltune eval-kl``, from what was measured."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kltune.core.kl.gate import confidence_per_look, verdict
from kltune.core.kl.intervals import KLSummary, summarize
from kltune.core.kl.sequences import jensen_shannon, tails, total_variation
from kltune.lm.measure.breakdown import by_position, examples, token_part, top_prompts, top_tokens
from kltune.lm.measure.deployed import Deployed
from kltune.lm.measure.measurement import Measurement
from kltune.lm.model.policy import Policy, Reference

FIGURES = ("nats_per_response", "stderr", "ci", "nats_per_token", "token_stderr", "token_ci")
ESTIMATORS = ("exact", "k1", "k3", "cv")
DIRECTIONS = {"reverse": "KL(policy||reference)", "forward": "KL(reference||policy)"}


@dataclass(frozen=True)
class CheckpointKL:
    """All that was measured of one checkpoint; None for what was not asked for.

    reverse: on the policy's responses, also by token of the vocabulary. forward: on the reference's. deployed: with
    top-p and top-k. tax: log-perplexity on held-out texts. gate: the budget's part. prompts_in_file: lines that
    prompts were drawn from. against: the same responses against each further reference, and the budget's part of it.
    """

    reverse: Measurement
    forward: Measurement | None
    deployed: Deployed | None
    tax: dict[str, Any] | None
    gate: dict[str, Any] | None
    prompts_in_file: int
    against: tuple[tuple[Measurement, dict[str, Any] | None], ...] = ()


def described_kl(measured: CheckpointKL, policy: Policy, *, confidence: float, top: int, show: int) -> dict[str, Any]:
    """The measured part of the document.

    confidence: of all intervals but those of the gate. top: how many tokens and prompts to list. show: how many
    responses to give token by token.
    """
    reverse, forward, sums = measured.reverse, measured.forward, measured.reverse.sums
    count = len(reverse.exact)
    other = None if forward is None else -forward.k1      # k1 of the reference's responses is log ρ − log π
    prompts, others = reverse.prompt_index, None if forward is None else forward.prompt_index
    js = None if other is None else jensen_shannon(reverse.k1, other, prompts, others)
    tv, spread = total_variation(reverse.k1, prompts, other, others), tails(reverse.exact)
    return {
        "reference": policy.fingerprint.as_dict(),
        "direction": DIRECTIONS["reverse"],
        "prompts": reverse.summary().prompts,
        "prompts_in_file": measured.prompts_in_file,
        "responses": count,
        "tokens": int(reverse.tokens.sum()),
        "truncated_fraction": reverse.truncated.double().mean().item(),
        "kl": {name: kl_figures(reverse.summary(name, confidence)) for name in ESTIMATORS},
        "noise_floor": reverse.noise_floor,
        "distribution": {**asdict(spread), "heavy": spread.heavy},
        "forward": None if forward is None else {"exact": kl_figures(forward.summary("exact", confidence))},
        "js": None if js is None else js.value,
        "js_stderr": None if js is None else js.stderr,
        "tv": tv.value,
        "tv_stderr": tv.stderr,
        "entropy": {
            "policy": _per_token(reverse.entropy, reverse),
            "reference": _per_token(reverse.ref_entropy, reverse),
        },
        "agreement_z": reverse.z,
        "deployed": None if measured.deployed is None else _deployed(measured.deployed, confidence),
        "end_token": token_part(sums, list(policy.end_ids), count),
        "top_tokens": top_tokens(sums, count, policy, top),
        "top_prompts": top_prompts(reverse, top),
        "by_position": by_position(reverse),
        "examples": examples(reverse, policy, show),
        "alignment_tax": measured.tax,
        "gate": measured.gate,
    }


class Gate:
    """A budget that one measurement is held against, as often as it takes."""

    def __init__(
        self, max_kl: float, unit: str, confidence: float, planned: int, direction: str, reference: str
    ):
        """Plan so many looks, all of which hold together at ``confidence``; the last two say what it is about."""
        self.max_kl, self.unit, self.planned, self.overall = max_kl, unit, planned, confidence
        self.confidence = confidence_per_look(confidence, planned)
        self.about = {"direction": direction, "reference": reference}
        self.seen: list[dict[str, Any]] = []

    def look(self, kl: KLSummary, leaves_prompts: bool = False, rounding: float = 0.0) -> bool:
        """Hold what was measured so far against the budget, unless that is decided; whether more would not help.

        kl: at the gate's own confidence. leaves_prompts: there are prompts that were not answered. rounding: KL that it
        alone makes, in the gate's unit.
        """
        if not self.seen or not self.ended:
            self.rounding, self.verdict = rounding, verdict(
                kl, self.max_kl, self.unit, self.confidence, fresh_prompts=leaves_prompts, rounding=rounding
            )
            self.seen.append({
                "responses": kl.responses, "confidence": self.confidence,
                "ci": kl.ci if self.unit == "nats_per_response" else kl.token_ci, "verdict": self.verdict.verdict,
            })
        return self.ended

    @property
    def ended(self) -> bool:
        """No further response would change the verdict."""
        return self.verdict.verdict != "inconclusive" or self.verdict.wants_prompts

    def document(self) -> dict[str, Any]:
        """The gate's part of the document."""
        said = {name: getattr(self.verdict, name) for name in ("verdict", "reason", "more_responses", "wants_prompts")}
        return {
            "max_kl": self.max_kl, "unit": self.unit, "confidence": self.overall, **self.about, **said,
            "noise_floor": self.rounding, "planned_looks": self.planned, "looks": self.seen,
        }


def described_against(
    measured: Measurement, reference: Reference, gate: dict[str, Any] | None, confidence: float
) -> dict[str, Any]:
    """What the document says of one further reference."""
    return {
        "reference": reference.fingerprint.as_dict(),
        "kl": {name: kl_figures(measured.summary(name, confidence)) for name in ESTIMATORS},
        "agreement_z": measured.z,
        "gate": gate,
    }


def kl_figures(kl: KLSummary) -> dict[str, Any]:
    """One estimator's figures, per response and per token (ratio of sums)."""
    return {name: getattr(kl, name) for name in FIGURES}


def paired_differences(
    paths: Sequence[str], measured: Sequence[tuple[Tensor, Tensor]], confidence: float
) -> list[dict[str, Any]]:
    """By how much each checkpoint is further from its reference than the first, on the same prompts and numbers.

    measured: exact KL of each response [B] and the prompt it answers [B], for each checkpoint. Where one kept sampling
    longer, what both have is compared.
    """
    rows = []
    first, prompts = measured[0]
    for path, (exact, _) in zip(paths[1:], measured[1:], strict=True):
        both = min(len(first), len(exact))
        gap = exact[:both].double() - first[:both].double()
        kl = summarize("difference", gap, torch.ones(both), prompts[:both], confidence)
        rows.append({
            "checkpoint": path,
            "minus": paths[0],
            "nats_per_response": kl.nats_per_response,
            "stderr": kl.stderr,
            "ci": kl.ci,
            "responses": kl.responses,
        })
    return rows


def _deployed(deployed: Deployed, confidence: float) -> dict[str, Any]:
    sides = {name: kl_figures(deployed.summary(name, confidence)) for name in ("vs_base", "both")}
    zs = {f"{name}_agreement_z": deployed.z(name) for name in ("vs_base", "both")}
    return {**sides, **zs, "ties": deployed.ties}


def _per_token(sums: Tensor, measured: Measurement) -> float:
    """Ratio of sums over all responses."""
    return (sums.double().sum() / measured.tokens.sum()).item()
