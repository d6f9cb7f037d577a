"""Sample from the policy, then measure what was sampled by teacher forcing."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields

import torch
from torch import Tensor

from kltune.core.masking import per_response
from kltune.errors import DivergedError, ModelError
from kltune.lm.batches import Rollout, Samples, response_scatter
from kltune.lm.data import Prompt
from kltune.lm.measures import VocabularySums
from kltune.lm.policy import Policy
from kltune.lm.sampler import sample

# Largest mean gap between the sampler's log-probabilities and teacher forcing's, nats per token. Rounding gives 1e-6 in
# float32 and about 1e-2 in bfloat16; a wrong temperature, mask or position gives far more.
MEAN_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


def sample_rollout(
    policy: Policy,
    prompts: Sequence[Prompt],
    uniforms: Tensor,
    *,
    temperature: float,
    exact: bool = True,
    from_reference: bool = False,
    sums: VocabularySums | None = None,
) -> Rollout:
    """Draw responses from the policy and measure log-probabilities and exact KL(policy ‖ reference) on them.

    The log-probabilities are computed afresh rather than taken from the sampler, by the same function that training
    uses, so that the first ratio is 1; the sampler's own are held against them.

    Args:
        policy: the policy, adapter on.
        prompts: P prompts.
        uniforms: random numbers, [B, T] with B a multiple of P; see ``sampler.sample``.
        temperature: of sampling and of everything measured.
        exact: sum over the vocabulary for exact KL and entropies; without it they are None.
        from_reference: let the two change places: the reference responds, and ``ref_kl`` is KL(reference ‖ policy).
        sums: also add up by token of the vocabulary, into these.

    Raises:
        DivergedError: a log-probability or KL is not finite.
        ModelError: the sampler drew from another distribution than the one measured.
    """
    with policy.reference() if from_reference else nullcontext():
        samples = sample(policy, prompts, uniforms, temperature=temperature)
    mask = samples.response_mask
    measured = policy.measure(samples.ids, samples.scored, temperature, exact=exact, swap=from_reference, sums=sums)
    flat = measured._asdict()
    for name, values in flat.items():
        if values is not None and not torch.isfinite(values).all():
            raise DivergedError(f"{name} of sampled tokens is not finite; lower optim.lr or raise kl.beta.")
    tensors = {name: None if values is None else response_scatter(values, mask) for name, values in flat.items()}
    check_sampler(samples, tensors["logprobs"], mask, policy.dtype)
    own = {field.name: getattr(samples, field.name) for field in fields(samples)}
    return Rollout(**(own | tensors))


def check_sampler(samples: Samples, logprobs: Tensor, counted: Tensor, dtype: torch.dtype) -> None:
    """The sampler's log-probabilities are those of teacher forcing, but for rounding.

    Args:
        samples: as they were drawn.
        logprobs: of the same tokens by teacher forcing. [B, T], nats.
        counted: True on the tokens to compare. [B, T], bool.
        dtype: of the weights.

    Raises:
        ModelError: they are not.
    """
    gap = per_response((samples.logprobs - logprobs).abs(), counted).sum() / counted.sum()
    if gap.item() > MEAN_GAP[dtype]:
        raise ModelError(
            f"The sampler's log-probabilities differ from teacher forcing by {gap.item():.3g} nats per token on "
            f"average (allowed: {MEAN_GAP[dtype]}), so the text was not drawn from the distribution that is measured. "
            "Does the model need positions, a mask or a cache that kltune does not give it?"
        )
