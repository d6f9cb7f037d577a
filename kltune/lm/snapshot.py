"""Trained tensors as they were: to put back bit for bit, and to measure a new policy against the old one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kltune.core.divergence import kl_exact
from kltune.core.logprobs import token_logprobs
from kltune.lm.batches import Rollout, response_scatter
from kltune.lm.policy import Policy


class Snapshot:
    """A copy of some parameters."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        """Copy what they hold now."""
        self._parameters = dict(parameters)
        self.tensors = {name: tensor.detach().clone() for name, tensor in parameters.items()}

    def restore(self) -> None:
        """Let the parameters hold again what they held, to the last bit."""
        for name, tensor in self._parameters.items():
            tensor.data.copy_(self.tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within: the parameters are the old ones. After, exceptions included: the new ones. Nothing is copied."""
        new = {name: tensor.data for name, tensor in self._parameters.items()}
        for name, tensor in self._parameters.items():
            tensor.data = self.tensors[name]
        try:
            yield
        finally:
            for name, tensor in self._parameters.items():
                tensor.data = new[name]

    def step(self, direction: Mapping[str, Tensor], scale: float) -> None:
        """Set the parameters to old + scale · direction."""
        for name, tensor in self._parameters.items():
            tensor.data.copy_(self.tensors[name] + scale * direction[name])


@torch.no_grad()
def measure_move(
    policy: Policy, old: Snapshot, rollout: Rollout, temperature: float, *, reference: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """How far the policy is from what it was, on responses that the old one sampled; rows go in parts.

    The old distributions are computed again and not kept: over a vocabulary they would not fit. They come from the
    very function that gives the new ones, so that a policy that did not move is exactly 0 away.

    Args:
        policy: adapter on, as it is now.
        old: its tensors before the step.
        rollout: responses of the old policy.
        temperature: of the sampling.
        reference: also measure exact KL(new ‖ reference).

    Returns:
        (log π_new of the tokens, exact KL(old ‖ new), exact KL(new ‖ reference) or None), [B, T] each, nats.
    """
    parts = [_part(policy, old, *rows, temperature, reference) for rows in policy.parts(rollout.ids, rollout.scored)]
    logprobs, step_kl, ref_kl = (torch.cat(column) for column in zip(*parts, strict=True))
    mask = rollout.response_mask
    whole = None if not reference else response_scatter(ref_kl, mask)
    return response_scatter(logprobs, mask), response_scatter(step_kl, mask), whole


def _part(
    policy: Policy, old: Snapshot, ids: Tensor, scored: Tensor, temperature: float, reference: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a few rows, in chunks of positions. Each [N]; the last is 0 unless ``reference``."""
    new_hidden = policy.scored_hidden(ids, scored)
    with old.in_place():
        old_hidden = policy.scored_hidden(ids, scored)
    ref_hidden = new_hidden
    if reference:
        with policy.reference():
            ref_hidden = policy.scored_hidden(ids, scored)
    rows = policy.network.chunk_rows
    tensors = (new_hidden, old_hidden, ref_hidden, ids[scored])
    found = []
    for new, before, ref, tokens in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
        new_logits = policy.network.logits(new)
        with old.in_place():  # the head itself may carry an adapter
            old_logits = policy.network.logits(before)
        logprobs = token_logprobs(new_logits, tokens, temperature)
        step_kl = kl_exact(old_logits, new_logits, temperature)
        ref_kl = torch.zeros_like(step_kl)
        if reference:
            ref_kl = kl_exact(new_logits, policy.ref_logits(ref), temperature)
        found.append((logprobs, step_kl, ref_kl))
    return tuple(torch.cat(column) for column in zip(*found, strict=True))
