"""From logits to log-probabilities: of the whole vocabulary, and of one token."""

import torch
from torch import Tensor

from kltune.core.masking import at_least_float32


def log_distribution(logits: Tensor, temperature: float) -> Tensor:
    """The log-probabilities of the whole vocabulary.

        log π(v) = z_v / τ − log Σ_w exp(z_w / τ)

    The statistics are float32 whatever the model's dtype: in bfloat16 they would be wrong by about 1e-3 nats.

    Args:
        logits: z. [..., V], any floating dtype.
        temperature: τ, above 0; the same number the tokens were sampled with.

    Returns:
        [..., V] float32 (float64 for float64 logits), nats.

    Raises:
        ValueError: ``temperature`` is not a finite number above 0.
    """
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, must be a finite number above 0")
    logits = at_least_float32(logits)
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """The log-probability of each token under the distribution it was sampled from.

        log π(y_n) = z_{n, y_n} / τ − log Σ_v exp(z_{n, v} / τ)

    The row of logits must already be the one that predicts the token (position i − 1 predicts token i).
    Gradient flows to ``logits``.

    Args:
        logits: one row per token. [N, V] (or [..., V]), any floating dtype.
        tokens: the tokens. [N] (or [...]), int64.
        temperature: τ of the sampling, above 0. Policy and reference are both scored at it (MATH 1.4).

    Returns:
        [N] float32 (float64 for float64 logits), nats, never above 0.

    Raises:
        ValueError: the shapes do not fit, or ``temperature`` is not above 0.
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"one row of logits per token: logits {list(logits.shape)}, tokens {list(tokens.shape)}")
    return log_distribution(logits, temperature).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
