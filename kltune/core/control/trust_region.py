"""A natural-gradient step inside a ball of KL(old ‖ new): the direction, its length, and the search that keeps it in.

    maximise  gᵀs   so that   ½ sᵀF s ≤ δ

with g the gradient of the surrogate and F the Fisher matrix of whole responses, in nats per response and parameter².
Vectors are flat, [P]: all trained tensors one after the other. What a step of some length does is measured by whoever
calls; nothing here knows a model.

Sources: Schulman et al. 2015, arXiv 1502.05477; damping and scale: docs/maths.md 14 and 15.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kltune.core.kl.divergence import log_ratios
from kltune.core.tensors import at_least_float32, expect_finite, expect_same_shape, log_distribution, per_response

Product = Callable[[Tensor], Tensor]  # [P] -> [P], linear, symmetric, never negative
MOST_WEIGHT = 2.0  # of a prefix that the new policy comes to more often than the old one


@dataclass(frozen=True)
class Solution:
    """What conjugate gradients reached. x: [P]. residual: ‖(F + λI)x − g‖ / ‖g‖, no unit. iterations: taken."""

    x: Tensor
    residual: float
    iterations: int


@dataclass(frozen=True)
class Trial:
    """What a step of one length does, measured on the whole batch.

    step_kl: exact KL(old ‖ new), nats per response. gain: surrogate, new less old, unit of the advantages.
    within_cap: whether the new policy stays within the cap on its KL to the reference; True without one.
    """

    step_kl: float
    gain: float
    within_cap: bool = True


@dataclass(frozen=True)
class SearchResult:
    """How a line search ended. scale: of the accepted step, 0 if none was. trials: all that were measured, in order."""

    scale: float
    trials: tuple[Trial, ...]

    @property
    def accepted(self) -> bool:
        """Whether a step was found."""
        return self.scale > 0.0


def fisher_cotangent(logits: Tensor, tangent: Tensor, temperature: float) -> Tensor:
    """The Fisher matrix of the next token, applied to a change of its logits.

        (diag(p) − ppᵀ) ż / τ²,    p = softmax(z / τ)

    Between a JVP and a VJP it gives the Fisher-vector product of any parameters behind the logits: exact over the
    vocabulary, with no label sampled, never negative. KL(old ‖ new) and KL(new ‖ old) both have this matrix as their
    Hessian where the two are one.

    Args:
        logits: z. [N, V], any floating dtype.
        tangent: ż, how the logits change along a direction. [N, V].
        temperature: τ of the sampling, above 0.

    Returns:
        [N, V] at least float32, nats per unit of logit.

    Raises:
        ValueError: the shapes differ, or ``temperature`` is not above 0.
    """
    expect_same_shape(logits=logits, tangent=tangent)
    p = log_distribution(logits, temperature).exp()
    tangent = at_least_float32(tangent)
    return p * (tangent - (p * tangent).sum(-1, keepdim=True)) / temperature**2


def surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, responses: int) -> Tensor:
    """What the new policy gains on the old one's responses, to first order in how far it is from it.

        (1/responses) Σ_b Σ_t (w − 1) A,    w = π(a) / π_old(a)

    0 at π = π_old, where its gradient is the policy gradient of whole responses, (1/responses) Σ A ∇log π.

    Source: Schulman et al. 2015, arXiv 1502.05477, equation 14.

    Args:
        logprobs: log π now, carrying the gradient. [B, T], nats.
        old_logprobs: log π_old of the same tokens. [B, T], nats.
        advantages: A. [B, T], any unit.
        mask: True on response tokens. [B, T], bool.
        responses: responses of the whole batch, at least 1; parts of a batch add up.

    Returns:
        A scalar, in the unit of the advantages.

    Raises:
        ValueError: the shapes differ, or ``responses`` is below 1.
    """
    expect_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    if responses < 1:
        raise ValueError(f"responses is {responses}, must be at least 1: it is what the sum is divided by")
    excess = torch.expm1(log_ratios(logprobs, old_logprobs.detach(), mask))
    return per_response(excess * at_least_float32(advantages.detach()), mask).sum() / responses


def carried_ref_kl(
    ref_kl: Tensor, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, most: float = MOST_WEIGHT
) -> Tensor:
    """KL(new ‖ reference) of each response, on responses that the *old* policy sampled.

        Σ_t min(W_t, most) D_t,    W_t = Π_{s<t} π(a_s) / π_old(a_s),    D_t = exact KL(new ‖ reference) at position t

    W_t is how much more often the new policy comes to this prefix than the old one; without it the drift of the
    prefixes would be missing. Untruncated it is unbiased and of no use: one response that the step makes 30 times as
    likely then outweighs all others, and the error says that nothing is known. Truncated it is a little too low where
    the step is large; what it is for, refusing a step, is followed by a measurement on the new policy's own responses.

    Source: Ionides 2008, "Truncated Importance Sampling".

    Args:
        ref_kl: D at every position, of the new policy. [B, T], nats.
        logprobs: log π of the sampled tokens under the new policy. [B, T], nats.
        old_logprobs: log π_old of the same tokens. [B, T], nats.
        mask: True on response tokens. [B, T], bool.
        most: the largest weight, at least 1; ∞ does not truncate.

    Returns:
        [B], nats per response.

    Raises:
        ValueError: the shapes differ.
    """
    expect_same_shape(ref_kl=ref_kl, logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    ratio = log_ratios(logprobs, old_logprobs, mask)
    before = ratio.cumsum(-1) - ratio
    return per_response(before.exp().clamp(max=most) * ref_kl, mask)


def conjugate_gradient(product: Product, g: Tensor, iterations: int, tolerance: float = 1e-2) -> Solution:
    """Solve (F + λI) x = g from x = 0, given only products with the matrix.

    Stops early once ‖r‖ / ‖g‖ < ``tolerance`` (g is mostly noise: more digits of x gain nothing, and took twice the
    products), and before a direction in which rounding or noise makes the curvature
    0 or negative: the x so far is then the answer. g = 0 gives x = 0.

    Args:
        product: v -> (F + λI) v.
        g: right-hand side. [P].
        iterations: at most; one product each.
        tolerance: relative residual, no unit.

    Raises:
        DivergedError: a product or the solution is not finite.
    """
    x, residual, direction = torch.zeros_like(g), g.clone(), g.clone()
    size = g.norm().item()
    squared = residual.dot(residual)
    taken = 0
    while taken < iterations and squared.sqrt().item() > tolerance * size:
        image = product(direction)
        curvature = direction.dot(image)
        expect_finite("the curvature along a direction of conjugate gradients", curvature)
        if not curvature.item() > 0.0:
            break
        step = squared / curvature
        x, residual = x + step * direction, residual - step * image
        before, squared = squared, residual.dot(residual)
        direction = residual + (squared / before) * direction
        taken += 1
    expect_finite("the natural gradient", x)
    return Solution(x, squared.sqrt().item() / size if size > 0.0 else 0.0, taken)


def step_scale(curvature: float, slope: float, max_step_kl: float, beta: float) -> float:
    """How far to go along the natural gradient x = (F + λI)⁻¹ g.

        s = min( √(2δ / xᵀFx), gᵀx / (β xᵀFx) )

    The first is where the quadratic model of KL(old ‖ new) meets δ; it takes F *without* damping, which would
    underrate the step. The second is the optimum of E[score] − β·KL(policy ‖ reference) along x in the same model:
    beyond it a step can only overshoot, and without it a step would always be of full length, and chatter around the
    optimum for ever. Without damping it is 1/β, the exact step to the optimum itself; a heavily damped x is short, and
    1/β of it would be next to no step at all.

    Source: docs/maths.md 14, and its 1/β carried over to λ > 0.

    Args:
        curvature: xᵀFx, undamped, nats per response.
        slope: gᵀx, unit of the advantages.
        max_step_kl: δ, nats per response, above 0.
        beta: price of a nat in the unit of the advantages, 0 or above; 0 sets no optimum.

    Returns:
        s, 0 or above; 0 where x has no curvature, and so nothing bounds the step.

    Raises:
        DivergedError: curvature or slope is not finite.
    """
    expect_finite("the curvature of a step", curvature)
    expect_finite("the slope of a step", slope)
    if not (curvature > 0.0 and slope > 0.0):
        return 0.0
    ball = math.sqrt(2.0 * max_step_kl / curvature)
    return min(ball, slope / (beta * curvature)) if beta > 0.0 else ball


def line_search(measure: Callable[[float], Trial], scale: float, max_step_kl: float, tries: int) -> SearchResult:
    """The longest step tried that stays in the ball, gains, and stays within the cap.

    A step that leaves the ball is rescaled by what the quadratic model says of its *measured* KL, with 2 % to spare:
    s ← s · min(0.9, 0.98 √(δ / KL)).  Every other refusal halves it. (Where the first try is far outside, its KL has
    grown by less than the square, and one rescaling leaves the next outside still: halved then, steps of a 135M model
    took 0.1 of 0.3 nats.) A number that is not finite is a refusal: of a step that is far too long it may be one; of
    the shortest that is tried it is not.

    Source: docs/maths.md 15.

    Args:
        measure: the effect of a step of this length, on all responses.
        scale: the length to try first, above 0.
        max_step_kl: δ, nats per response.
        tries: at most, at least 1.

    Raises:
        DivergedError: the last step tried still gives a number that is not finite.
    """
    trials: list[Trial] = []
    while len(trials) < tries:
        trial = measure(scale)
        trials.append(trial)
        finite = math.isfinite(trial.step_kl) and math.isfinite(trial.gain)     # −∞ is below every limit
        if finite and trial.step_kl <= max_step_kl and trial.gain > 0.0 and trial.within_cap:
            return SearchResult(scale, tuple(trials))
        outside = math.isfinite(trial.step_kl) and trial.step_kl > max_step_kl
        scale *= min(0.9, 0.98 * math.sqrt(max_step_kl / trial.step_kl)) if outside else 0.5
    expect_finite("KL(old ‖ new) and gain of the shortest step tried", trials[-1].step_kl, trials[-1].gain)
    return SearchResult(0.0, tuple(trials))


def mean_curvature(product: Product, probes: Tensor) -> float:
    """tr F / P from a few random sign vectors (Hutchinson).

        (1/KP) Σ_k v_kᵀ F v_k

    Args:
        product: v -> F v.
        probes: entries ±1. [K, P].

    Returns:
        Nats per response and parameter², 0 or above.

    Raises:
        DivergedError: a product is not finite.
    """
    total = sum(probe.dot(product(probe)).item() for probe in probes)
    expect_finite("the mean curvature", total)
    return max(total / probes.numel(), 0.0)
