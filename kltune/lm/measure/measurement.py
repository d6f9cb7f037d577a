"""Measure KL(policy ‖ reference) on prompts: the same lines behind every stage's evaluation and ``kltune eval-kl``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kltune.core.kl.divergence import VocabularySums, kl_k1, kl_k3
from kltune.core.kl.intervals import KLSummary, agreement_z, cluster_numbers, summarize
from kltune.core.kl.sequences import control_variate
from kltune.core.tensors import per_response
from kltune.errors import ModelError
from kltune.lm.data.examples import Prompt
from kltune.lm.machine.out_of_memory import SAMPLING, phase
from kltune.lm.model.batches import Rollout
from kltune.lm.model.policy import Policy, Reference
from kltune.lm.model.sampler import Draw, measured_rollout, sample_rollout
from kltune.lm.rewards.scorers import Scorer

RESPONSES_PER_PASS = 256  # bounds what is kept per token while a large evaluation runs
STREAM = 0xE7A1           # keeps these random numbers apart from those of training with the same seed
WORST_Z = 4.0  # |k1 − exact| in standard errors; chance alone passes it once in 16,000 runs
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Measurement:
    """KL(policy ‖ reference) on fresh responses.

    exact, k1, k3: nats per response by estimator. tokens: per response. entropy, ref_entropy: nats per response.
    log_ratio_variance: what chance alone gives the sampled KL, nats² per response. rounding: nats per response from the
    policy to itself, between sampling and measuring. All [B], as prompt_index and truncated. rollouts: the responses
    themselves, in parts.
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
    rounding: Tensor
    rollouts: tuple[Rollout, ...]

    def __add__(self, other: "Measurement") -> "Measurement":
        """Both together; their prompts are numbered alike."""
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return Measurement(*(a + b if isinstance(a, tuple) else torch.cat([a, b]) for a, b in pairs))

    def summary(self, estimator: str = "exact", confidence: float = 0.95) -> KLSummary:
        """Mean with clustered standard error and interval, per response and per token.

        estimator: exact, k1, k3, or cv: exact with k1 as its control variate.
        """
        cv = estimator == "cv"
        nats = control_variate(self.exact, self.k1, self.prompt_index) if cv else getattr(self, estimator)
        return summarize(estimator, nats, self.tokens, self.prompt_index, confidence)

    @property
    def z(self) -> float:
        """Agreement of k1 and exact, in standard errors; beyond ±4 the sampler drew from another distribution."""
        return agreement_z(self.k1, self.exact, self.prompt_index, self.log_ratio_variance)

    @property
    def noise_floor(self) -> dict[str, float]:
        """KL that rounding alone makes: of the policy to itself as other batches show it, by k3; 0 or above.

        In float32 about 1e-9 nats a token, in bfloat16 1e-4 to 1e-3: a KL or a budget of that size says nothing.
        """
        nats = self.rounding.double()
        return {
            "nats_per_response": nats.mean().item(), "nats_per_token": (nats.sum() / self.tokens.sum()).item(),
        }

    @property
    def sums(self) -> VocabularySums:
        """What each token of the vocabulary adds to the KL, where that was asked for."""
        columns = zip(*((part.sums.nats, part.sums.policy, part.sums.reference) for part in self.rollouts), strict=True)
        return VocabularySums(*(torch.stack(column).sum(dim=0) for column in columns))

    def texts(self) -> tuple[list[str], list[str]]:
        """Prompts and responses, in order."""
        prompts = [text for rollout in self.rollouts for text in rollout.prompts]
        return prompts, [text for rollout in self.rollouts for text in rollout.responses]


def check_agreement(path: str, who: str, z: float) -> None:
    """Raise ModelError if the sampled and the exact KL differ by more than chance: then neither can be trusted."""
    if not abs(z) <= WORST_Z:  # NaN must not pass
        raise ModelError(
            f"{path}: the sampled KL (k1) and the exact KL of {who} differ by {z:.1f} standard errors, so the "
            "responses were not drawn from the distribution that was measured. No KL of this checkpoint is reported."
        )


def kl_result(measured: Measurement) -> dict[str, Any]:
    """The ``kl`` object of result.json: exact KL(policy ‖ reference) of what was saved."""
    kl = measured.summary()
    return {
        "direction": "KL(policy||reference)",
        "nats_per_response": kl.nats_per_response,
        "stderr": kl.stderr,
        "ci95": kl.ci,
        "nats_per_token": kl.nats_per_token,
        "noise_floor": measured.noise_floor,
        "responses": kl.responses,
        "prompts": kl.prompts,
    }


@dataclass(frozen=True)
class Round:
    """Which prompts are answered, and how often each.

    prompts: all there are, in the order in which they are answered. first, count: those that are answered now.
    per_prompt: responses to each. number: of the round, from 0; each has random numbers of its own. asked: how many
    responses were asked for, of a first round.
    """

    prompts: Sequence[Prompt]
    first: int
    count: int
    per_prompt: int
    number: int = 0
    asked: int | None = None

    @classmethod
    def of(cls, prompts: Sequence[Prompt], responses: int, seed: int = 0) -> "Round":
        """The first round, of about so many responses.

        Few prompts are answered several times, the same number each (rounded up). Of many, some are drawn: files are
        often sorted, and their first rows are like each other. The same seed draws the same, and more responses draw
        more beside them.
        """
        count = min(len(prompts), responses)
        if count < len(prompts):
            prompts = [prompts[place] for place in np.random.default_rng([STREAM, seed]).permutation(len(prompts))]
        return cls(prompts, 0, count, -(-responses // count), asked=responses)

    def following(self, responses: int) -> "Round":
        """The round after this one, of about so many responses: prompts not answered yet first, then all again.

        All again is every one as often: files are often sorted, and part of one is not like the rest.
        """
        done = self.first + self.count
        if done < len(self.prompts):
            return Round(self.prompts, done, min(responses, len(self.prompts) - done), 1, self.number + 1)
        return Round(self.prompts, 0, len(self.prompts), -(-responses // len(self.prompts)), self.number + 1)

    @property
    def responses(self) -> int:
        """How many this round draws."""
        return self.count * self.per_prompt

    @property
    def leaves_prompts(self) -> bool:
        """There are prompts that no round so far has answered."""
        return self.first + self.count < len(self.prompts)

    def parts(self, draw: Draw) -> Iterator[tuple[Sequence[Prompt], Tensor, int]]:
        """The prompts a pass at a time, each with the random numbers of its responses, and how many rows are then done.

        The numbers are the same for every policy.
        """
        uniforms = self.uniforms(draw)
        step = max(1, RESPONSES_PER_PASS // self.per_prompt)
        chosen = self.prompts[self.first : self.first + self.count]
        for start in range(0, self.count, step):
            end = min(start + step, self.count)
            yield chosen[start:end], uniforms[start * self.per_prompt : end * self.per_prompt], end * self.per_prompt

    def uniforms(self, draw: Draw) -> Tensor:
        """The random numbers, a row per response. [B, T]"""
        return draw.uniforms(self.responses, STREAM, *([self.number] if self.number else []))

    def prompt_index(self) -> Tensor:
        """Which of all the prompts each response answers; a prompt on several lines is one. [B]"""
        lines = cluster_numbers([prompt.ids for prompt in self.prompts])[self.first : self.first + self.count]
        return lines.repeat_interleave(self.per_prompt)

    def drawn_note(self, seed: int) -> str | None:
        """That prompts were left out, and how the others were chosen; or that there are more responses than were asked
        for, as every prompt is answered as often; else None.
        """
        if not self.leaves_prompts:
            more = self.asked is not None and self.responses > self.asked
            times = f"answers each of {len(self.prompts)} prompts {self.per_prompt} times"
            return f"{times}: {self.responses} responses, where {self.asked} were asked for" if more else None
        return f"answers {self.count} of {len(self.prompts)} prompts, drawn at random with seed {seed}"


def measure_kl(
    policy: Policy,
    answered: Round,
    draw: Draw,
    *,
    from_reference: bool = False,
    by_token: bool = False,
    respond: Callable[..., Rollout] | None = None,
    progress: Progress = lambda done: None,
) -> Measurement:
    """Sample from the policy and measure its KL from the reference: exact, k1 and k3.

    The KL is that of the process cut at its length limit.

    Args:
        from_reference: let the two change places: sample from the reference and measure KL(reference ‖ policy).
        by_token: also add up by token of the vocabulary.
        respond: who draws the policy's responses, as ``sample_rollout`` does; None: that function.
        progress: told how many responses have been measured, after each pass.

    Raises:
        DivergedError: something is not finite.
        ModelError: the sampler drew from another distribution than the one measured.
    """
    if respond is None or from_reference:
        respond = partial(sample_rollout, temperature=draw.temperature, from_reference=from_reference)
    rollouts = []
    for prompts, uniforms, done in answered.parts(draw):
        with phase(SAMPLING, policy.device):
            rollouts.append(respond(policy, prompts, uniforms, by_token=by_token))
        progress(done)
    return measurement_of(rollouts, answered.prompt_index())


def against(policy: Policy, reference: Reference, measured: Measurement, temperature: float) -> Measurement:
    """The same responses of the policy, and their KL from another reference; raises as ``measure_kl``."""
    before = policy.held
    policy.hold(reference)
    try:
        rollouts = [measured_rollout(policy, rollout, temperature) for rollout in measured.rollouts]
    finally:
        policy.hold(before)
    return measurement_of(rollouts, measured.prompt_index)


def measurement_of(rollouts: Sequence[Rollout], prompt_index: Tensor) -> Measurement:
    """Sums by response of what was measured by token. prompt_index: which prompt each response answers. [B]"""
    masks = [rollout.response_mask for rollout in rollouts]

    def gather(values: list[Tensor]) -> Tensor:
        return torch.cat([per_response(v, mask) for v, mask in zip(values, masks, strict=True)]).cpu()

    return Measurement(
        exact=gather([r.ref_kl for r in rollouts]),
        k1=gather([kl_k1(r.logprobs, r.ref_logprobs, r.response_mask) for r in rollouts]),
        k3=gather([kl_k3(r.logprobs, r.ref_logprobs, r.response_mask) for r in rollouts]),
        tokens=torch.cat([r.lengths for r in rollouts]).cpu(),
        prompt_index=prompt_index,
        truncated=torch.cat([r.truncated for r in rollouts]).cpu(),
        entropy=gather([r.entropy for r in rollouts]),
        ref_entropy=gather([r.ref_entropy for r in rollouts]),
        log_ratio_variance=gather([r.log_ratio_variance for r in rollouts]),
        rounding=gather([torch.zeros_like(r.ref_kl) if r.rounding is None else r.rounding for r in rollouts]),
        rollouts=tuple(rollouts),
    )


def answer_both(policy: Policy, answered: Round, draw: Draw) -> tuple[Measurement, Measurement]:
    """Responses of the policy with KL(policy ‖ reference), and of the reference with KL(reference ‖ policy).

    Both answer the same prompts with the same random numbers.
    """
    return measure_kl(policy, answered, draw), measure_kl(policy, answered, draw, from_reference=True)


def measured_scores(
    scorers: Mapping[str, Scorer], measured: Measurement, missing_end_penalty: float
) -> dict[str, Tensor]:
    """Each scorer's score of each response, less the penalty where it never ended. [B] each."""
    texts = measured.texts()
    return {
        name: scorer.total(*texts, measured.rollouts, measured.truncated, missing_end_penalty)
        for name, scorer in scorers.items()
    }
