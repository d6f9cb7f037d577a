"""Trained tensors as they were: to put back bit for bit, and to measure a policy against another of its states."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kltune.core.kl.divergence import kl_exact
from kltune.core.tensors import per_response, token_logprobs
from kltune.lm.model.batches import Rollout, response_scatter
from kltune.lm.model.policy import Policy


class Snapshot:
    """A copy of some parameters, to go back to or to measure against."""

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

    def approach(self, share: float) -> None:
        """Let the copy go this share of the way to what the parameters hold now; 1 copies them bit for bit."""
        for name, tensor in self._parameters.items():
            self.tensors[name].lerp_(tensor.detach(), share)

    def step(self, direction: Mapping[str, Tensor], scale: float) -> None:
        """Set the parameters to old + scale · direction."""
        for name, tensor in self._parameters.items():
            tensor.data.copy_(self.tensors[name] + scale * direction[name])


class StepKL:
    """Exact KL(old ‖ new) of a policy from what it was when it sampled some responses; measured as often as asked.

    Of the old distributions only the hidden states behind them are kept: over a vocabulary they would not fit. They
    come from the very function that gives the new ones, in the same parts, also where the rollout kept them: so a
    policy that did not move is exactly 0 away.
    """

    @torch.no_grad()
    def __init__(self, policy: Policy, old: Snapshot, rollout: Rollout, temperature: float, *, reference: bool):
        """Take responses, and the policy's tensors when it sampled them; with ``reference``, measure KL to it as well.

        The policy's parameters may be anywhere by now.
        """
        self._policy, self._old, self._temperature, self._with_reference = policy, old, temperature, reference
        self._mask = rollout.response_mask
        self._parts = policy.network.parts(rollout.ids, rollout.scored)
        # A model whose head cannot be cut off gives logits for hidden states: too large to keep.
        self._kept: dict[int, tuple[Tensor, Tensor]] | None = {} if policy.network.split else None
        names = ("states", "ref_states") if reference else ("states",)
        if all(getattr(rollout, name) is not None for name in names):
            known = [self._parts.pieces(rollout.kept(name)) for name in names]
            self._kept = dict(enumerate(zip(known[0], known[-1], strict=True)))

    @torch.no_grad()
    def measure(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(log π_new of the tokens, exact KL(old ‖ new), exact KL(new ‖ reference) or None), [B, T] each, nats."""
        columns = self._parts.over(lambda place: self._part(*self._parts[place], *self._behind(place)))
        logprobs, step_kl, ref_kl = (response_scatter(column, self._mask) for column in columns)
        return logprobs, step_kl, ref_kl if self._with_reference else None

    def _behind(self, place: int) -> tuple[Tensor, Tensor]:
        """``_hidden_behind`` a part, kept from its first measurement on."""
        if self._kept is None:
            return self._hidden_behind(*self._parts[place])
        if place not in self._kept:
            self._kept[place] = self._hidden_behind(*self._parts[place])
        return self._kept[place]

    def _hidden_behind(self, ids: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of the old policy and, where it is asked for, of the reference. [N, H] each."""
        with self._old.in_place():
            old_hidden = self._policy.network.before(ids, scored)
        if not self._with_reference:
            return old_hidden, old_hidden
        with self._policy.reference():
            return old_hidden, self._policy.network.before(ids, scored)

    def _part(
        self, ids: Tensor, scored: Tensor, old_hidden: Tensor, ref_hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same for a few rows, in chunks of positions. Each [N]; the last is 0 without a reference."""
        policy, temperature = self._policy, self._temperature
        rows = policy.network.chunk_rows
        tensors = (policy.network.before(ids, scored), old_hidden, ref_hidden, ids[scored])
        columns = []
        for new, before, ref, tokens in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
            new_logits = policy.network.logits(new)
            with self._old.in_place():  # the head itself may carry an adapter
                old_logits = policy.network.logits(before)
            logprobs = token_logprobs(new_logits, tokens, temperature)
            step_kl = kl_exact(old_logits, new_logits, temperature)
            ref_kl = torch.zeros_like(step_kl)
            if self._with_reference:
                ref_kl = kl_exact(new_logits, policy.ref_logits(ref), temperature)
            columns.append((logprobs, step_kl, ref_kl))
        return tuple(torch.cat(column) for column in zip(*columns, strict=True))


def kl_to(policy: Policy, other: Snapshot, rollout: Rollout, temperature: float) -> float:
    """Exact KL(policy ‖ another state of it), nats per response, on responses that the policy as it is sampled."""
    sampled = StepKL(policy, Snapshot(policy.trainable_parameters()), rollout, temperature, reference=False)
    with other.in_place():
        _, kl, _ = sampled.measure()
    return per_response(kl.double(), rollout.response_mask).mean().item()
