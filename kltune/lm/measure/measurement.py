"""Measure KL(policy ‖ reference) on prompts: the same lines behind every stage's evaluation and ``kltune eval-kl``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kltune.core.kl.divergence import VocabularySums, kl_k1, kl_k3
from kltune.core.kl.intervals import KLSummary, agreement_z, summarize
from kltune.core.kl.sequences import control_variate
from kltune.core.tensors import per_response
from kltune.lm.data.examples import Prompt
from kltune.lm.model.batches import Rollout
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import sample_rollout, uniform_numbers
from kltune.lm.rewards.scorers import Scorer

RESPONSES_PER_PASS = 256  # bounds what is kept per token while a large evaluation runs
STREAM = 0xE7A1           # keeps these random numbers apart from those of training with the same seed
Progress = Callable[[int], None]


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

    def __add__(self, other: "Measurement") -> "Measurement":
        """Both together; their prompts are numbered alike."""
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return Measurement(*(a + b if isinstance(a, tuple) else torch.cat([a, b]) for a, b in pairs))

    def summary(self, estimator: str = "exact", confidence: float = 0.95) -> KLSummary:
        """Mean with clustered standard error and interval, per response and per token.

        Args:
            estimator: exact, k1, k3, or cv: exact with k1 as its control variate.
            confidence: of the intervals.
        """
        cv = estimator == "cv"
        nats = control_variate(self.exact, self.k1, self.prompt_index) if cv else getattr(self, estimator)
        return summarize(estimator, nats, self.tokens, self.prompt_index, confidence)

    @property
    def z(self) -> float:
        """Agreement of k1 and exact, in standard errors; beyond ±4 the sampler drew from another distribution."""
        return agreement_z(self.k1, self.exact, self.prompt_index, self.log_ratio_variance)

    def texts(self) -> tuple[list[str], list[str]]:
        """Prompts and responses, in order."""
        prompts = [text for rollout in self.rollouts for text in rollout.prompts]
        return prompts, [text for rollout in self.rollouts for text in rollout.responses]


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


@dataclass(frozen=True)
class Draw:
    """Which prompts to answer, how often each, and with which random numbers.

    prompts: all there are. first, count: those that are answered now. per_prompt: responses to each. round: of the
    drawing, from 0; each has random numbers of its own.
    """

    prompts: Sequence[Prompt]
    first: int
    count: int
    per_prompt: int
    round: int = 0

    @classmethod
    def of(cls, prompts: Sequence[Prompt], responses: int) -> "Draw":
        """The first round, of about so many responses.

        Few prompts are answered several times, the same number each (rounded up); of many, the first are answered.
        """
        count = min(len(prompts), responses)
        return cls(prompts, 0, count, -(-responses // count))

    def following(self, responses: int) -> "Draw":
        """The round after this one, of about so many responses: prompts not answered yet first, then all again."""
        done = self.first + self.count
        if done < len(self.prompts):
            return Draw(self.prompts, done, min(responses, len(self.prompts) - done), 1, self.round + 1)
        count = min(len(self.prompts), responses)
        return Draw(self.prompts, len(self.prompts) - count, count, -(-responses // count), self.round + 1)

    @property
    def responses(self) -> int:
        """How many this round draws."""
        return self.count * self.per_prompt

    @property
    def leaves_prompts(self) -> bool:
        """There are prompts that no round so far has answered."""
        return self.first + self.count < len(self.prompts)

    def uniforms(self, seed: int, max_new_tokens: int) -> Tensor:
        """The random numbers, a row per response: the same for every policy. [B, T]"""
        stream = [seed, STREAM, self.round] if self.round else [seed, STREAM]
        return uniform_numbers(np.random.default_rng(stream), self.responses, max_new_tokens)

    def parts(self) -> list[tuple[Sequence[Prompt], slice]]:
        """The prompts a pass at a time, each with the rows of its responses."""
        step = max(1, RESPONSES_PER_PASS // self.per_prompt)
        chosen = self.prompts[self.first : self.first + self.count]
        starts = range(0, len(chosen), step)
        return [
            (chosen[a : a + step], slice(a * self.per_prompt, min(a + step, len(chosen)) * self.per_prompt))
            for a in starts
        ]

    def prompt_index(self) -> Tensor:
        """Which of all the prompts each response answers. [B]"""
        return torch.arange(self.first, self.first + self.count).repeat_interleave(self.per_prompt)


def measure_kl(
    policy: Policy,
    draw: Draw,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    from_reference: bool = False,
    sums: VocabularySums | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Sample from the policy and measure its KL from the reference: exact, k1 and k3.

    Args:
        policy: adapter on.
        draw: which prompts, how often.
        max_new_tokens: length limit of a response; the KL is that of the process cut there.
        temperature: of sampling and of both distributions.
        seed: the same seed and draw give the same random numbers, whatever the policy.
        from_reference: let the two change places: sample from the reference and measure KL(reference ‖ policy).
        sums: also add up by token of the vocabulary, into these.
        progress: told how many responses have been measured, after each pass.

    Raises:
        DivergedError: something is not finite.
        ModelError: the sampler drew from another distribution than the one measured.
    """
    uniforms = draw.uniforms(seed, max_new_tokens)
    rollouts = []
    for part, rows in draw.parts():
        rollouts.append(
            sample_rollout(
                policy, part, uniforms[rows], temperature=temperature, from_reference=from_reference, sums=sums
            )
        )
        if progress is not None:
            progress(rows.stop)
    masks = [rollout.response_mask for rollout in rollouts]

    def gather(values: list[Tensor]) -> Tensor:
        return torch.cat([per_response(v, mask) for v, mask in zip(values, masks, strict=True)]).cpu()

    return Measurement(
        exact=gather([r.ref_kl for r in rollouts]),
        k1=gather([kl_k1(r.logprobs, r.ref_logprobs, r.response_mask) for r in rollouts]),
        k3=gather([kl_k3(r.logprobs, r.ref_logprobs, r.response_mask) for r in rollouts]),
        tokens=torch.cat([r.lengths for r in rollouts]).cpu(),
        prompt_index=draw.prompt_index(),
        truncated=torch.cat([r.truncated for r in rollouts]).cpu(),
        entropy=gather([r.entropy for r in rollouts]),
        ref_entropy=gather([r.ref_entropy for r in rollouts]),
        log_ratio_variance=gather([r.log_ratio_variance for r in rollouts]),
        rollouts=tuple(rollouts),
    )


def answer_both(policy: Policy, draw: Draw, **drawn: Any) -> tuple[Measurement, Measurement]:
    """Responses of the policy and of the reference to the same prompts, with the same random numbers.

    Args:
        policy: adapter on.
        draw: which prompts, how often.
        drawn: the keywords of ``measure_kl`` that say how.

    Returns:
        (the policy's with KL(policy ‖ reference), the reference's with KL(reference ‖ policy)).
    """
    return measure_kl(policy, draw, **drawn), measure_kl(policy, draw, from_reference=True, **drawn)


def judged(judges: Mapping[str, Scorer], measured: Measurement, missing_end_penalty: float) -> dict[str, Tensor]:
    """Each judge's score of each response, less the penalty where it never ended. [B] each."""
    texts = measured.texts()
    return {
        name: judge.total(*texts, measured.rollouts, measured.truncated, missing_end_penalty)
        for name, judge in judges.items()
    }
