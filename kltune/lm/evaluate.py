"""Measure KL(policy ‖ reference) on prompts: the same lines behind every stage's evaluation and ``kltune eval-kl``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kltune.core.divergence import kl_k1, kl_k3
from kltune.core.intervals import KLSummary, agreement_z, summarize
from kltune.core.masking import per_response
from kltune.errors import DivergedError
from kltune.lm.batches import Rollout, pad_right, response_scatter
from kltune.lm.data import Counts, Example, Prompt, load_examples, load_prompts
from kltune.lm.policy import Policy
from kltune.lm.rollout import sample_rollout
from kltune.lm.sampler import uniform_numbers
from kltune.lm.scorers import Scorer, load_scorer
from kltune.recipe import DataSection, EvalSection, SamplingSection

RESPONSES_PER_PASS = 256  # bounds what is kept per token while a large evaluation runs


@dataclass(frozen=True)
class Measurement:
    """KL(policy ‖ reference) on fresh responses.

    exact, k1, k3: nats per response by estimator. tokens: per response. entropy, ref_entropy: nats per response.
    log_ratio_variance: what chance alone gives the sampled KL, nats² per response. All [B], as prompt_index and
    truncated. rollouts: the responses themselves, in parts.
    """

    exact: Tensor
    k1: Tensor
    k3: Tensor
    tokens: Tensor
    prompt_index: Tensor
    truncated: Tensor
    entropy: Tensor
    ref_entropy: Tensor
    log_ratio_variance: Tensor
    rollouts: tuple[Rollout, ...]

    def summary(self, estimator: str = "exact", confidence: float = 0.95) -> KLSummary:
        """Mean with clustered standard error and interval, per response and per token."""
        return summarize(estimator, getattr(self, estimator), self.tokens, self.prompt_index, confidence)

    @property
    def z(self) -> float:
        """Agreement of k1 and exact, in standard errors; beyond ±4 the sampler drew from another distribution."""
        return agreement_z(self.k1, self.exact, self.prompt_index, self.log_ratio_variance)

    def texts(self) -> tuple[list[str], list[str]]:
        """Prompts and responses, in order."""
        prompts = [text for rollout in self.rollouts for text in rollout.prompts]
        return prompts, [text for rollout in self.rollouts for text in rollout.responses]


def spread_over_prompts(prompts: Sequence[Prompt], responses: int) -> tuple[list[Prompt], int]:
    """Which prompts to answer, and how often each, to get about ``responses`` responses.

    Few prompts are answered several times, the same number each (rounded up); many are cut to the first ``responses``.
    """
    chosen = list(prompts[:responses])
    return chosen, -(-responses // len(chosen))


def measure_kl(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    responses: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    from_reference: bool = False,
) -> Measurement:
    """Sample from the policy and measure its KL from the reference: exact, k1 and k3.

    Args:
        policy: adapter on.
        prompts: at least one.
        responses: how many to draw, at least; see ``spread_over_prompts``.
        max_new_tokens: length limit of a response; the KL is that of the process cut there.
        temperature: of sampling and of both distributions.
        seed: the same seed and prompts give the same random numbers, whatever the policy.
        from_reference: let the two change places: sample from the reference and measure KL(reference ‖ policy).

    Raises:
        DivergedError: something is not finite.
        ModelError: the sampler drew from another distribution than the one measured.
    """
    chosen, per_prompt = spread_over_prompts(prompts, responses)
    uniforms = uniform_numbers(np.random.default_rng([seed, 0xE7A1]), len(chosen) * per_prompt, max_new_tokens)
    step = max(1, RESPONSES_PER_PASS // per_prompt)
    rollouts = []
    for start in range(0, len(chosen), step):
        part = chosen[start : start + step]
        rows = slice(start * per_prompt, (start + len(part)) * per_prompt)
        rollouts.append(
            sample_rollout(policy, part, uniforms[rows], temperature=temperature, from_reference=from_reference)
        )
    masks = [rollout.response_mask for rollout in rollouts]

    def gather(values: list[Tensor]) -> Tensor:
        return torch.cat([per_response(v, mask) for v, mask in zip(values, masks, strict=True)]).cpu()

    return Measurement(
        exact=gather([r.ref_kl for r in rollouts]),
        k1=gather([kl_k1(r.logprobs, r.ref_logprobs, r.response_mask) for r in rollouts]),
        k3=gather([kl_k3(r.logprobs, r.ref_logprobs, r.response_mask) for r in rollouts]),
        tokens=torch.cat([r.lengths for r in rollouts]).cpu(),
        prompt_index=torch.arange(len(chosen)).repeat_interleave(per_prompt),
        truncated=torch.cat([r.truncated for r in rollouts]).cpu(),
        entropy=gather([r.entropy for r in rollouts]),
        ref_entropy=gather([r.ref_entropy for r in rollouts]),
        log_ratio_variance=gather([r.log_ratio_variance for r in rollouts]),
        rollouts=tuple(rollouts),
    )


def document_nats(policy: Policy, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each text's scored tokens, and how many they are. [D] float64 nats, [D] int64.

    Raises:
        DivergedError: a log-probability is not finite.
    """
    nats, tokens = [], []
    for start in range(0, len(examples), RESPONSES_PER_PASS):
        ids, scored = example_batch(examples[start : start + RESPONSES_PER_PASS], policy)
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
    gold = None if section.gold is None else load_scorer([section.gold], folder, policy.device)
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
        drawn = {
            "responses": held_out.responses,
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": seed,
        }
        measured = measure_kl(policy, held_out.prompts, **drawn)
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
            reference = measure_kl(policy, held_out.prompts, from_reference=True, **drawn)
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
            scores = judge(*measured.texts()).total - missing_end_penalty * measured.truncated
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


def measure_settings(prompts: str | None, data: DataSection, sampling: SamplingSection) -> dict[str, Any]:
    """How the KL of a checkpoint is measured unless asked otherwise; kltune.json keeps it for ``kltune eval-kl``."""
    return {
        "prompts": prompts,
        "template": data.template,
        "max_prompt_tokens": data.max_prompt_tokens,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
    }
