"""What teacher forcing tells of each token, from the two models' logits at its position."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kltune.core.divergence import ByToken, compare
from kltune.core.logprobs import log_distribution, token_logprobs


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

    def add(self, more: ByToken) -> None:
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
