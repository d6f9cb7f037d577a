"""The policy as it is deployed: tempered, cut to its likeliest tokens (top-k, top-p), and renormalised.

    π̃(v) = π_τ(v) / π_τ(S) for v in S, else 0;    S = the tokens kept

Its KL from the reference is another number than the policy's own, and there are two of it (docs/maths.md 6): against
the whole reference at temperature 1, and against a reference that is tempered likewise and renormalised on *the
policy's* S. (The reference's own S may leave out a token of the policy's, and the KL would be infinite.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kltune.core.tensors import expect_same_shape


@dataclass(frozen=True)
class Cut:
    """What a deployed policy samples from. top_p: fewest likeliest tokens that reach it; 1 keeps all.

    top_k: so many likeliest tokens; None keeps all.

    Raises:
        ValueError: ``top_p`` or ``top_k`` is out of range.
    """

    top_p: float = 1.0
    top_k: int | None = None

    def __post_init__(self):
        if not 0.0 < self.top_p <= 1.0 or (self.top_k is not None and self.top_k < 1):
            raise ValueError(f"top_p is {self.top_p} and top_k is {self.top_k}; wanted 0 < top_p ≤ 1 and top_k above 0")

    def kept(self, logprobs: Tensor) -> Tensor:
        """The tokens that top-k and then top-p leave, in transformers' order and with its rule for the last one.

        top-p looks at what top-k left, renormalised, and keeps a token while those before it have not reached p; so at
        least one token stays.

        Args:
            logprobs: log π_τ of every token. [N, V] (or [..., V]).

        Returns:
            True where a token is kept. Same shape, bool.
        """
        if self.top_p == 1.0 and (self.top_k is None or self.top_k >= logprobs.shape[-1]):
            return torch.ones_like(logprobs, dtype=torch.bool)
        ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            ordered[..., self.top_k :] = -torch.inf
        p = ordered.softmax(-1)
        kept = (p.cumsum(-1) - p < self.top_p) & (ordered > -torch.inf)
        return torch.zeros_like(kept).scatter(-1, order, kept)


def renormalized(logprobs: Tensor, kept: Tensor) -> Tensor:
    """A distribution cut to some of its tokens.

    Args:
        logprobs: log-probabilities. [N, V] (or [..., V]).
        kept: True on the tokens that stay, at least one a row. Same shape, bool.

    Returns:
        Log-probabilities that sum to 1 over the kept tokens, −∞ elsewhere. Same shape.

    Raises:
        ValueError: the shapes differ.
    """
    expect_same_shape(logprobs=logprobs, kept=kept)
    return torch.log_softmax(logprobs.masked_fill(~kept, -torch.inf), dim=-1)
