"""KL of the policy as it is deployed, with temperature, top-p and top-k: two numbers beside its own (docs/maths.md 6).

vs_base: KL(π̃ ‖ ρ), the reference whole and at temperature 1. both: KL(π̃ ‖ ρ̃), the reference tempered likewise and
renormalised on the tokens that the *policy* keeps. They can differ tenfold, so each carries its name.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kltune.core.kl.divergence import TokenDivergence, compare
from kltune.core.kl.intervals import KLSummary, agreement_z, summarize
from kltune.core.kl.truncation import Cut, renormalized
from kltune.core.tensors import log_distribution, per_response
from kltune.errors import DivergedError, ModelError
from kltune.lm.measure.measurement import Progress, Round
from kltune.lm.model.batches import response_scatter
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import Draw, check_sampler, sample

MOST_TIES = 0.01        # share of sampled tokens that rounding may put on the other side of the cut


@dataclass(frozen=True)
class Distance:
    """KL of the deployed policy from one reference. exact, k1: nats per response. variance: nats². All [B]."""

    exact: Tensor
    k1: Tensor
    variance: Tensor


@dataclass(frozen=True)
class Deployed:
    """Both distances, on responses of the deployed policy. tokens, prompt_index: [B]. ties: share of sampled tokens
    on the edge of the cut, which teacher forcing alone would have cut off."""

    vs_base: Distance
    both: Distance
    tokens: Tensor
    prompt_index: Tensor
    ties: float

    def summary(self, name: str, confidence: float) -> KLSummary:
        """The mean of ``vs_base`` or ``both``, with its interval."""
        return summarize(name, getattr(self, name).exact, self.tokens, self.prompt_index, confidence)

    def z(self, name: str) -> float:
        """Agreement of k1 and exact, as ``Measurement.z``."""
        distance: Distance = getattr(self, name)
        return agreement_z(distance.k1, distance.exact, self.prompt_index, distance.variance)


def measure_deployed(
    policy: Policy, answered: Round, draw: Draw, cut: Cut, progress: Progress = lambda done: None
) -> Deployed:
    """Sample from the deployed policy and measure both of its distances; errors as ``measure_kl``.

    The temperature of ``draw`` is the deployed policy's, and the reference's in ``both``.
    """
    temperature = draw.temperature
    rows: list[tuple[Tensor, ...]] = []
    ties = count = 0
    for prompts, uniforms, done in answered.parts(draw):
        samples = sample(policy, prompts, uniforms, temperature=temperature, cut=cut)
        flat = policy.over_vocabulary(
            samples.ids, samples.scored, lambda *logits: _measure(*logits, cut=cut, temperature=temperature)
        )
        if not all(torch.isfinite(column).all() for column in flat):
            raise DivergedError("a log-probability or KL of the deployed policy is not finite; are the weights whole?")
        inside, logprobs, *rest = (response_scatter(column, samples.response_mask) for column in flat)
        check_sampler(samples, logprobs, samples.response_mask & inside.bool(), policy.network.rounds_as)
        ties += int((samples.response_mask & ~inside.bool()).sum())
        count += int(samples.response_mask.sum())
        rows.append((samples.lengths.cpu(), *(per_response(x, samples.response_mask).cpu() for x in rest)))
        progress(done)
    if ties > MOST_TIES * count:
        raise ModelError(
            f"{ties} of {count} sampled tokens lie outside the top-p or top-k cut when measured again: the sampler and "
            "teacher forcing disagree on what the deployed policy is."
        )
    tokens, *sums = (torch.cat(column) for column in zip(*rows, strict=True))
    return Deployed(Distance(*sums[:3]), Distance(*sums[3:]), tokens, answered.prompt_index(), ties / count)


def _measure(
    logits: Tensor, ref_logits: Tensor, tokens: Tensor, *, cut: Cut, temperature: float
) -> tuple[Tensor, ...]:
    """Per token: within the cut, log π̃; exact, k1, variance against the whole and the cut reference. [n] each."""
    tempered = log_distribution(logits, temperature)
    kept = cut.kept(tempered)
    at = tokens[:, None]
    inside = kept.gather(-1, at).squeeze(-1)
    kept = kept.scatter(-1, at, True)       # a tie that the sampler's rounding decided the other way
    policy = renormalized(tempered, kept)
    references = log_distribution(ref_logits, 1.0), renormalized(log_distribution(ref_logits, temperature), kept)
    mine = policy.gather(-1, at).squeeze(-1)
    columns = [inside.float(), mine]
    for reference in references:
        kl: TokenDivergence = compare(policy, reference)
        columns += [kl.kl, mine - reference.gather(-1, at).squeeze(-1), kl.log_ratio_variance]
    return tuple(columns)
