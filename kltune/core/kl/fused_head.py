"""The head of a language model with its gradient computed in the forward pass.

What is asked of a position's logits is one number, as the log-probability of a token or a KL. Its derivative by the
hidden state,

    ∂f/∂h = Wᵀ ∂f/∂z,    z = W h + b,

does not depend on what is done with f later. So it is computed at once, while the logits are there, and the backward
pass is a product with one number per position: two matrix products in all where recomputing takes three, and of the
vocabulary nothing is kept: memory does not grow with positions × vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kltune.core.kl.divergence import gap_where_possible, kl_of_distributions, never_below_zero
from kltune.core.products import product
from kltune.core.tensors import log_distribution


class Reading(NamedTuple):
    """A number at each of n positions, and how it changes with the logits there.

    value: [n] float32. slope: ∂ value / ∂ logits, [n, V] float32; None unless asked for.
    """

    value: Tensor
    slope: Tensor | None


@dataclass(frozen=True)
class AfterHead:
    """What a model makes of its head's logits x:  z = s x  or  x / s,  then  c tanh(z / c).

    scale: s. divides: by it. cap: c; None: no cap. Each is done as models do it, so that the numbers are theirs.
    """

    scale: float = 1.0
    divides: bool = False
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The model's logits, of those of its head. [n, V]."""
        if self.scale != 1.0:
            logits = logits / self.scale if self.divides else logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def before(self, slope: Tensor, logits: Tensor) -> Tensor:
        """∂f/∂x of ∂f/∂z, written over it; logits: z. [n, V] each."""
        if self.cap is not None:
            slope.mul_((logits.to(slope.dtype) / self.cap).square_().neg_().add_(1.0))
        if self.scale != 1.0:
            slope = slope.div_(self.scale) if self.divides else slope.mul_(self.scale)
        return slope


AS_THEY_ARE = AfterHead()
Reader = Callable[..., tuple[Reading, ...]]  # (logits [n, V], *tensors of n positions, slopes=) -> readings


def read_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float, slopes: bool) -> tuple[Reading]:
    """The log-probability of each token.

        ∂ log π(y) / ∂z = (1_y − π) / τ

    Args:
        logits: [n, V].
        tokens: [n] int64.
        temperature: τ, above 0.
        slopes: also say how they change; else they are differentiable in the logits.
    """
    a = log_distribution(logits, temperature)
    value = _chosen(a, tokens)
    # In place: a fresh tensor of a chunk's size costs more than what is computed in it.
    return (Reading(value, _logprob_slope(a.exp_(), tokens, temperature) if slopes else None),)


def read_logprobs_and_kl(
    logits: Tensor, tokens: Tensor, *ref_logits: Tensor, temperature: float, slopes: bool
) -> tuple[Reading, ...]:
    """The log-probability of each token, and exact KL(policy ‖ reference) at its position for each reference given.

        ∂D / ∂z = π (a − b − D) / τ,    a = log π, b = log π_ref

    Arguments as in ``read_logprobs``; ref_logits: of each reference, [n, V], taken as constant.
    """
    a, others = log_distribution(logits, temperature), [log_distribution(other, temperature) for other in ref_logits]
    value = _chosen(a, tokens)
    if not slopes:
        return Reading(value, None), *(Reading(kl_of_distributions(a, b), None) for b in others)
    gaps = [gap_where_possible(a, b) for b in others]
    p = a.exp_()
    kls = []
    for b, gap in zip(others, gaps, strict=True):
        # ``kl_of_distributions`` again, in tensors that are there already: half of its passes and no fresh memory.
        kl = never_below_zero(b.exp_().sub_(p).add_(p * gap).sum(-1))
        kls.append(Reading(kl, gap.sub_(kl[:, None]).mul_(p).div_(temperature)))
    return Reading(value, _logprob_slope(p, tokens, temperature)), *kls


def read_logprobs_and_head(
    logits: Tensor, tokens: Tensor, heads: Tensor, head_logprobs: Tensor, usual: Tensor, *ref_logits: Tensor,
    temperature: float, slopes: bool,
) -> tuple[Reading, ...]:
    """``read_logprobs_and_kl``, and at each position what a few tokens S add to KL(policy ‖ other), of either sign.

        F = Σ_{v∈S} π(v) (a(v) − b(v)),    ∂F / ∂z := that of F − (1 + u) π(S) = π (1_S (a − b − u) − F + u π(S)) / τ

    What the slope leaves out is made up for by what ``head_and_tail`` leaves out of the other tokens'.

    heads: the tokens in S, none twice. [n, K] int64. head_logprobs: b, the other's log-probabilities of them, taken as
    constant. [n, K]. usual: u, any number that the token does not decide. [n]. The rest as there.
    """
    read = read_logprobs_and_kl(logits, tokens, *ref_logits, temperature=temperature, slopes=slopes)
    a = log_distribution(logits, temperature)
    p, gap = a.gather(-1, heads).exp(), gap_where_possible(a.gather(-1, heads), head_logprobs)
    value, mass = (p * gap).sum(-1), p.sum(-1)
    if not slopes:
        return *read, Reading(value - (1.0 + usual) * (mass - mass.detach()), None)
    slope = a.exp_().mul_((usual * mass - value)[:, None] / temperature)
    return *read, Reading(value, slope.scatter_add_(1, heads, p * (gap - usual[:, None]) / temperature))


def _chosen(a: Tensor, tokens: Tensor) -> Tensor:
    return a.gather(-1, tokens[:, None]).squeeze(-1)


def _logprob_slope(p: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """(1_y − p) / τ, written over p."""
    slope = p.mul_(-1.0 / temperature)
    return slope.scatter_add_(1, tokens[:, None], slope.new_full((len(tokens), 1), 1.0 / temperature))


def through_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, reader: Reader, others: Sequence[Tensor], rows: int,
    after: AfterHead = AS_THEY_ARE,
) -> tuple[Tensor, ...]:
    """Read numbers off the logits of all positions, so many positions at a time; differentiable in ``hidden``, once.

    Args:
        hidden: hidden states. [N, H].
        weight, bias: of the head, not trained. [V, H] and [V] or None.
        reader: what to read.
        others: what it takes besides the logits, without gradients: tensors of N positions, or functions that give
            those of a slice.
        rows: positions whose logits may exist at once.
        after: what becomes of the head's logits before they are read.

    Returns:
        One tensor for each reading, [N] float32 (float64 for float64 hidden states).
    """
    return _ThroughHead.apply(hidden, weight, bias, reader, others, rows, after)


class _ThroughHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, reader, others, rows, after):
        """Values by position; for the backward pass, ∂ value / ∂ hidden of each reading."""
        ctx.set_materialize_grads(False)
        slopes = ctx.needs_input_grad[0]
        values: list[list[Tensor]] = []
        moved: list[list[Tensor]] = []
        for start in range(0, max(1, len(hidden)), rows):
            part = slice(start, start + rows)
            logits = after(product(hidden[part], weight, bias))
            beside = [other[part] if isinstance(other, Tensor) else other(part) for other in others]
            readings = reader(logits, *beside, slopes=slopes)
            values.append([reading.value for reading in readings])
            if slopes:
                backs = (after.before(reading.slope, logits).to(weight.dtype) for reading in readings)
                moved.append([product(back, weight.t()) for back in backs])
        if slopes:
            ctx.save_for_backward(*(torch.cat(column) for column in zip(*moved, strict=True)))
        return tuple(torch.cat(column) for column in zip(*values, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        """Each position's number times how it moves with the hidden state."""
        total = None
        for gradient, slope in zip(gradients, ctx.saved_tensors, strict=True):
            if gradient is not None:
                part = gradient[:, None].to(slope.dtype) * slope
                total = part if total is None else total.add_(part)
        return total, None, None, None, None, None, None
