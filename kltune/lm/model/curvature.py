"""The Fisher matrix of a policy, known by its products with vectors: exact over the vocabulary, never written down.

    F v = (1/B) Σ_b Σ_t Jᵀ (diag(p) − ppᵀ) J v / τ²,    J = ∂ logits / ∂ parameters

J v is not computed in forward mode, which few attention kernels know, but by differentiating twice: Jᵀw is linear in
w, so its derivative along w is J. That costs one backward pass and half a one, and needs an attention whose backward
can be differentiated again: the plain one, which is switched to here. The head comes last and is cheap to run again,
so it is taken in chunks of positions: logits of all positions never exist at once.

Source: docs/maths.md 13.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from kltune.core import ranks
from kltune.core.control.trust_region import fisher_cotangent
from kltune.lm.model.batches import Parts
from kltune.lm.model.policy import Policy

# The peak of memory in multiples of what the trunk's graph keeps, which grows with the square of the length: the plain
# attention keeps its weights. Measured 1.0.
PEAK = 1.2


def to_vector(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors into one vector. [P]."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def from_vector(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a vector into tensors of these shapes; the inverse of ``to_vector``."""
    pieces = vector.split([tensor.numel() for tensor in like])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, like, strict=True)]


@dataclass(frozen=True)
class _Trunk:
    """The trunk of some rows, linearised: hidden [N, H] with its graph, and w -> Jᵀw for a w that is 0."""

    hidden: Tensor
    w: Tensor
    pulled_back: list[Tensor]  # Jᵀw by parameter, differentiable in w; empty where the trunk is not trained


class Fisher:
    """Products with the Fisher matrix of whole responses, in nats per response.

    The trunk's graphs are kept between products where those of all rows fit in memory; where not, they are built again
    for each, so that memory stays that of one micro-batch.
    """

    def __init__(self, policy: Policy, ids: Tensor, scored: Tensor, temperature: float, micro_batch: int | None):
        """Take the responses (``ids``, ``scored``) that the matrix is an average over, sampled at a temperature τ.

        The policy's parameters must not change while this is used. micro_batch: rows in memory at once; None: as many
        as fit.
        """
        self._policy, self._temperature, self._rows = policy, temperature, len(ids)
        self._parameters = list(policy.trainable_parameters().values())
        trained = {id(tensor) for tensor in self._parameters}
        self._head = policy.network.head if policy.network.split else nn.Identity()
        self._after = policy.network.after
        self._head_names = {
            name: next(i for i, own in enumerate(self._parameters) if own is tensor)
            for name, tensor in self._head.named_parameters() if id(tensor) in trained
        }
        network = policy.network
        network.open()
        lengths = network.batching.lengths(ids, scored)
        whole = network.batching.rows_of(self._linearised_all, PEAK, max(lengths))
        cut = network.micro_batches(lengths, micro_batch, most=whole)
        self._parts = Parts(ids, scored, cut)
        self._kept: dict[int, _Trunk] | None = {}
        if len(cut) > 1 and (micro_batch is not None or len(ids) > whole):
            self._kept = None

    def __call__(self, vector: Tensor) -> Tensor:
        """F v. [P] -> [P] float32."""
        directions = from_vector(vector, self._parameters)
        total = torch.zeros_like(vector, dtype=torch.float64)

        def one(place: int) -> tuple[()]:
            own = [torch.zeros_like(tensor) for tensor in self._parameters]
            for at, part in self._product(self._trunk(place), directions):
                own[at] += part
            total.add_(to_vector(own))
            return ()

        self._parts.spread(one)
        return (ranks.summed(total) / self._rows).float()

    def _trunk(self, place: int) -> _Trunk:
        """A part linearised, from the first product on where it is kept."""
        if self._kept is None:
            return self._linearised(*self._parts[place])
        if place not in self._kept:
            self._kept[place] = self._linearised(*self._parts[place])
        return self._kept[place]

    def _linearised_all(self, ids: Tensor) -> _Trunk:
        scored = torch.ones_like(ids, dtype=torch.bool)
        scored[:, 0] = False
        return self._linearised(ids, scored)

    def _linearised(self, ids: Tensor, scored: Tensor) -> _Trunk:
        with sdpa_kernel(SDPBackend.MATH), self._policy.network.whole_graphs():
            hidden = self._policy.network.before(ids, scored)
            w = torch.zeros_like(hidden, requires_grad=True)
            if not hidden.requires_grad:
                return _Trunk(hidden, w, [])
            pulled_back = torch.autograd.grad(
                hidden, self._parameters, w, create_graph=True, allow_unused=True, materialize_grads=True
            )
        return _Trunk(hidden, w, list(pulled_back))

    def _product(self, trunk: _Trunk, directions: list[Tensor]) -> list[tuple[int, Tensor]]:
        """(which parameter, its part of the sum over these rows)."""
        hidden = trunk.hidden.detach()
        change = torch.zeros_like(hidden)
        linear = [pair for pair in zip(trunk.pulled_back, directions, strict=False) if pair[0].requires_grad]
        if linear:
            sums, along = zip(*linear, strict=True)
            (change,) = torch.autograd.grad(sums, trunk.w, along, retain_graph=True)
        head_parts, pushed = self._through_head(hidden, change, directions)
        if trunk.pulled_back:
            parts = torch.autograd.grad(
                trunk.hidden, self._parameters, pushed, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            head_parts += list(enumerate(parts))
        return head_parts

    def _through_head(
        self, hidden: Tensor, change: Tensor, directions: list[Tensor]
    ) -> tuple[list[tuple[int, Tensor]], Tensor]:
        """Hidden states and their change -> the head's own part of F v, and what goes back into the trunk. [N, H]."""
        own = {name: self._parameters[place].detach() for name, place in self._head_names.items()}
        own_change = {name: directions[place] for name, place in self._head_names.items()}

        def logits(states: Tensor, weights: dict[str, Tensor]) -> Tensor:
            return self._after(functional_call(self._head, weights, (states,)))

        pushed: list[Tensor] = []
        sums = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
        rows = self._policy.network.chunk_rows
        for states, moved in zip(hidden.split(rows), change.split(rows), strict=True):
            z, dz = jvp(logits, (states, own), (moved, own_change))
            cotangent = fisher_cotangent(z, dz, self._temperature).to(z.dtype)
            back, own_back = vjp(logits, states, own)[1](cotangent)
            pushed.append(back)
            for name, part in own_back.items():
                sums[name] += part
        return [(self._head_names[name], part) for name, part in sums.items()], torch.cat(pushed)
