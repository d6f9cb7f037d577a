"""Four measurements of KL(policy ‖ reference): exact over the vocabulary, and k1, k2, k3 from the sampled token alone.

The first argument is always the distribution that sampled. KL(reference ‖ policy) is the same functions with the two
swapped, on responses the *reference* sampled. A sum over a response's tokens (``per_response``) is that response's
value, and the mean of these estimates the KL between the two distributions over whole responses (chain rule,
docs/maths.md 1). No estimate is ever clamped: that would bias it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kltune.core.tensors import at_least_float32, expect_same_shape, log_distribution, token_logprobs


def log_ratios(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The log-ratio of each sampled token.

        u = log π(a) − log π_ref(a)

    Args:
        logprobs: log π of the sampled tokens. [B, T], nats.
        ref_logprobs: log π_ref of the same tokens. [B, T], nats.
        mask: True on response tokens. [B, T], bool.

    Returns:
        [B, T] float32 (float64 if both are), nats, of either sign; exactly 0 outside the mask. Gradient flows.

    Raises:
        ValueError: the three shapes differ.
    """
    expect_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    return torch.where(mask, at_least_float32(logprobs) - at_least_float32(ref_logprobs), 0.0)


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Estimate KL(policy ‖ reference) at each sampled token by its log-ratio; unbiased, of either sign.

        k1 = log π(a) − log π_ref(a),    a ~ π

    In the reward (detached, with the tokens after it credited) it gives the gradient of the KL; as a loss its
    expected gradient is 0 (docs/maths.md 9).

    Source: Schulman 2020, "Approximating KL Divergence" (q is our policy, p our reference).

    Args:
        logprobs: log π of the sampled tokens. [B, T], nats.
        ref_logprobs: log π_ref of the same tokens. [B, T], nats.
        mask: True on response tokens. [B, T], bool.

    Returns:
        [B, T] float32 (float64 if both are), nats; exactly 0 outside the mask.

    Raises:
        ValueError: the three shapes differ.
    """
    return log_ratios(logprobs, ref_logprobs, mask)


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Half the squared log-ratio of each sampled token; never negative, biased as a value.

        k2 = ½ (log π(a) − log π_ref(a))²,    a ~ π,    E k2 = KL + O(|π − π_ref|³)

    Its use is as a loss, and then on the *response* (``losses.k2_kl_loss``): the sum over tokens given here misses how
    a token moves the ones after it (docs/maths.md 9).

    Source: Schulman 2020, "Approximating KL Divergence".

    Args:
        logprobs: log π of the sampled tokens. [B, T], nats.
        ref_logprobs: log π_ref of the same tokens. [B, T], nats.
        mask: True on response tokens. [B, T], bool.

    Returns:
        [B, T] float32 (float64 if both are), nats; exactly 0 outside the mask.

    Raises:
        ValueError: the three shapes differ.
    """
    return 0.5 * log_ratios(logprobs, ref_logprobs, mask).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Estimate KL(policy ‖ reference) at each sampled token; unbiased and never negative.

        r = π_ref(a) / π(a),    k3 = (r − 1) − log r,    a ~ π

    Unbiased only if the tokens were drawn from the policy that gave ``logprobs``, unfiltered. Its variance can be
    infinite (docs/maths.md 3), so an interval around it is not to be trusted. It measures; it is no loss and no reward:
    the gradient of the one is KL(reference ‖ policy) and of the other can point uphill (docs/maths.md 9).

    Source: Schulman 2020, "Approximating KL Divergence".

    Args:
        logprobs: log π of the sampled tokens. [B, T], nats.
        ref_logprobs: log π_ref of the same tokens. [B, T], nats.
        mask: True on response tokens. [B, T], bool.

    Returns:
        [B, T] float32 (float64 if both are), nats; exactly 0 outside the mask; ∞ where r overflows.

    Raises:
        ValueError: the three shapes differ.
    """
    log_r = -log_ratios(logprobs, ref_logprobs, mask)
    return torch.expm1(log_r) - log_r       # expm1: near r = 1 exp(log_r) − 1 would keep no digits


def kl_exact(logits: Tensor, ref_logits: Tensor, temperature: float) -> Tensor:
    """KL(policy ‖ reference) of the next token, summed over the whole vocabulary.

        D = Σ_v e^a (a − b),    a = log π(v), b = log π_ref(v), both at logits / τ

    It is computed as Σ_v [e^a (a − b) + e^b − e^a], the same number because both sum to 1, but with no term below 0,
    and a rounding of either normaliser cancels to first order: off by 1e-8 nats in float32 at 32,000 tokens where the
    plain sum is off by 1e-6, of either sign. Averaged over prefixes the policy itself sampled, the sum over a
    response's tokens is the KL of the whole response (Rao-Blackwell); as a loss on those prefixes alone it misses the
    drift of the prefixes: see ``losses.exact_kl_loss``. Gradient flows to both arguments.

    Source: docs/maths.md 3; Amini et al. 2025, arXiv 2504.10637.

    Args:
        logits: the policy's. [N, V] (or [..., V]), any floating dtype.
        ref_logits: the reference's at the same positions. Same shape.
        temperature: τ of the sampling, above 0; it divides both.

    Returns:
        [N] float32 (float64 if both are), nats, never negative: what rounding leaves below 0 (about −1e-7) becomes 0,
        without touching the gradient. A value that is not finite is passed on: ∞ says the reference cannot say what
        the policy says, NaN that the logits were no numbers; what to do about it is the caller's to decide.

    Raises:
        ValueError: the shapes differ, or ``temperature`` is not above 0.
    """
    expect_same_shape(logits=logits, ref_logits=ref_logits)
    return kl_of_distributions(log_distribution(logits, temperature), log_distribution(ref_logits, temperature))


def kl_of_distributions(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``kl_exact`` from a and b, the log-probabilities of every token as ``log_distribution`` gives them."""
    p = logprobs.exp()
    return never_below_zero((p * gap_where_possible(logprobs, ref_logprobs) + (ref_logprobs.exp() - p)).sum(-1))


class ByToken(NamedTuple):
    """What each token of the vocabulary has to do with a KL, summed over N positions. Each [V].

    nats: its part of the KL,

        K_v = Σ_n [e^a (a − b) + e^b − e^a]

    none below 0, and all together Σ_n D_n: so each token has a share, one that the policy says more often than its
    reference as well as one it has given up. policy, reference: how often each of the two expects to say the token.
    """

    nats: Tensor
    policy: Tensor
    reference: Tensor


class TokenDivergence(NamedTuple):
    """Two next-token distributions held against each other; the first is the one that samples. Each [N], nats.

    kl: KL(first ‖ second), over the whole vocabulary. entropy, ref_entropy: of the first and of the second.
    log_ratio_variance: of log first − log second under the first, nats². by_token: None unless asked for.
    """

    kl: Tensor
    entropy: Tensor
    ref_entropy: Tensor
    log_ratio_variance: Tensor
    by_token: ByToken | None = None


def compare(logprobs: Tensor, ref_logprobs: Tensor, *, by_token: bool = False) -> TokenDivergence:
    """All that is measured of two next-token distributions, with every pass over the vocabulary made once.

    It works in place on what it makes, so no gradient flows.

        D = Σ_v e^a (a − b),    H = −Σ_v e^a a,    V = Σ_v e^a (a − b − D)²

    V, summed along responses, is the variance of k1 − exact that honest sampling implies, rare tokens included that a
    sample may not hold: see ``intervals.agreement_z``.

    Args:
        logprobs: a, log π of every token, as ``log_distribution`` gives them. [N, V] (or [..., V]).
        ref_logprobs: b, log π_ref at the same positions. Same shape.
        by_token: also sum over positions, token by token; then the shape is [N, V].

    Returns:
        Tensors of [N]; kl as ``kl_exact`` describes it.

    Raises:
        ValueError: the shapes differ.
    """
    expect_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    p, q, gap = logprobs.exp(), ref_logprobs.exp(), gap_where_possible(logprobs, ref_logprobs)
    parts = p * gap
    mean = parts.sum(-1, keepdim=True)
    parts += q - p
    sums = ByToken(parts.sum(0), p.sum(0), q.sum(0)) if by_token else None
    kl = never_below_zero(parts.sum(-1))
    # In place from here on: a fresh tensor of the vocabulary's size costs more than what is computed in it.
    variance = gap.sub_(mean).square_().mul_(p).sum(-1)
    return TokenDivergence(kl, _entropy(p, logprobs), _entropy(q, ref_logprobs), variance, sums)


def never_below_zero(kl: Tensor) -> Tensor:
    """What rounding leaves below 0 becomes 0, without touching the gradient; NaN and ∞ pass."""
    return kl - kl.detach().clamp(max=0.0)


def _entropy(p: Tensor, logprobs: Tensor) -> Tensor:
    """−Σ p log p, with 0 · log 0 = 0; written over p."""
    where = logprobs if _all_possible(logprobs) else logprobs.masked_fill(logprobs == -torch.inf, 0.0)
    return -p.mul_(where).sum(-1)


def gap_where_possible(a: Tensor, b: Tensor) -> Tensor:
    """a − b where the policy can go, and 0 where it cannot: 0 · log 0 = 0, and −∞ − −∞ would be NaN."""
    return a - b if _all_possible(a) else torch.where(a == -torch.inf, 0.0, a - b)


def _all_possible(logprobs: Tensor) -> bool:
    """No token has probability 0: nearly always so, and then two passes over the vocabulary can be left out."""
    return bool(logprobs.amin() > -torch.inf)


class TokenMeasures(NamedTuple):
    """What teacher forcing tells of N scored tokens; each [N] float32, in nats.

    logprobs, ref_logprobs: of the tokens. ref_kl: exact KL(policy ‖ reference) at their positions, over the whole
    vocabulary. entropy, ref_entropy: of the distributions there. log_ratio_variance: of log π − log π_ref under π
    there, nats². The last four are None unless asked for.
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    ref_kl: Tensor | None = None
    entropy: Tensor | None = None
    ref_entropy: Tensor | None = None
    log_ratio_variance: Tensor | None = None


@dataclass(frozen=True)
class VocabularySums:
    """``divergence.ByToken`` added up over all positions of a measurement; filled while measuring. float64, CPU."""

    nats: Tensor
    policy: Tensor
    reference: Tensor

    @classmethod
    def zero(cls, vocabulary: int) -> "VocabularySums":
        """Nothing measured yet."""
        return cls(*(torch.zeros(vocabulary, dtype=torch.float64) for _ in range(3)))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three, as ``add`` takes them."""
        return self.nats, self.policy, self.reference

    def add(self, more: ByToken | tuple[Tensor, Tensor, Tensor]) -> None:
        """Count more positions."""
        for whole, part in zip((self.nats, self.policy, self.reference), more, strict=True):
            whole.add_(part.double().cpu())


def measure_tokens(
    logits: Tensor, ref_logits: Tensor, tokens: Tensor, temperature: float, sums: VocabularySums | None = None
) -> TokenMeasures:
    """All measures of N tokens from one pass over the two models' logits.

    Args:
        logits: of the model that sampled. [N, V].
        ref_logits: of the other one. [N, V].
        tokens: what was sampled. [N].
        temperature: of both.
        sums: also add up by token of the vocabulary, into these.
    """
    a, b = log_distribution(logits, temperature), log_distribution(ref_logits, temperature)
    found = compare(a, b, by_token=sums is not None)
    if sums is not None:
        sums.add(found.by_token)
    chosen = (part.gather(-1, tokens[:, None]).squeeze(-1) for part in (a, b))
    return TokenMeasures(*chosen, found.kl, found.entropy, found.ref_entropy, found.log_ratio_variance)


def measure_sampled(logits: Tensor, ref_logits: Tensor, tokens: Tensor, temperature: float) -> TokenMeasures:
    """The log-probabilities of N tokens alone. Arguments as in ``measure_tokens``."""
    return TokenMeasures(*(token_logprobs(part, tokens, temperature) for part in (logits, ref_logits)))
