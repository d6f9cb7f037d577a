"""Log-probabilities from logits, and means and sums over response tokens that padding never reaches."""

import math

import torch
from torch import Tensor

from kltune.errors import DivergedError

# Share of the largest that rounding may move the numbers of a deep network by; 0.05 in narrower dtypes.
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-8}
NEARER = "Lower optim.lr, or raise kl.beta where there is one."


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
        temperature: τ of the sampling, above 0. Policy and reference are both scored at it (docs/maths.md 6).

    Returns:
        [N] float32 (float64 for float64 logits), nats, never above 0.

    Raises:
        ValueError: the shapes do not fit, or ``temperature`` is not above 0.
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"one row of logits per token: logits {list(logits.shape)}, tokens {list(tokens.shape)}")
    return log_distribution(logits, temperature).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def expect_same_shape(**tensors: Tensor) -> None:
    """Refuse tensors that would broadcast in silence.

    Args:
        tensors: the tensors by the name the caller uses for them.

    Raises:
        ValueError: the shapes differ; the message names every tensor and its shape.
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"these tensors must have one shape: {found}")


def expect_leading_mask(mask: Tensor) -> None:
    """Refuse a response mask that is not a run of True from the first column on.

    Args:
        mask: True on response tokens. [B, T], bool.

    Raises:
        ValueError: ``mask`` is not bool or not [B, T], or a row is empty, starts with False or has a hole.
    """
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"a response mask is bool [B, T]; found {mask.dtype} {list(mask.shape)}")
    starts = mask[:, :1].sum(-1) == 1
    falls_once = (mask[:, 1:] <= mask[:, :-1]).all(-1)
    wrong = (~(starts & falls_once)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"each row of a response mask is one or more True followed by False only; rows {wrong[:8]} are not"
        )


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is when it is float64 already (bfloat16 keeps 8 bits: too few for nats).

    Args:
        x: any floating tensor.

    Returns:
        The same shape; float64 stays float64, everything else becomes float32.
    """
    return x if x.dtype == torch.float64 else x.float()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens of the whole batch, each token counting once.

        Σ_{b,t} m_bt x_bt / Σ_{b,t} m_bt

    Args:
        x: one number per token. [B, T], any unit.
        mask: True where the token counts. [B, T], bool.

    Returns:
        A scalar in the unit of ``x``, at least float32.

    Raises:
        ValueError: the shapes differ, or the mask is empty.
    """
    expect_same_shape(x=x, mask=mask)
    if not mask.any():
        raise ValueError("the mask is empty: there is no mean over no tokens")
    return torch.where(mask, at_least_float32(x), 0.0).sum() / mask.sum()


def masked_whiten(x: Tensor, mask: Tensor, floor: float = 1e-8) -> Tensor:
    """Shift to mean 0 and scale to standard deviation 1 over the tokens of the whole batch.

        (x − mean) / max(sd, floor)        sd over the tokens themselves (divided by n, not n − 1)

    One token, or equal values everywhere, gives exactly 0: near the optimum all shaped returns coincide
    (docs/maths.md 10) and dividing by their tiny spread would blow rounding up into an update; ``floor`` is the guard.

    Source: lm-human-preferences (``whiten``); Huang et al. 2024, "The N Implementation Details of RLHF with PPO".

    Args:
        x: one number per token, for example advantages. [B, T], any unit.
        mask: True where the token counts. [B, T], bool.
        floor: the smallest standard deviation to divide by, in the unit of ``x``, above 0.

    Returns:
        [B, T], no unit; exactly 0 outside the mask.

    Raises:
        ValueError: the shapes differ, the mask is empty, or ``floor`` is not above 0.
    """
    if not floor > 0.0:
        raise ValueError(f"floor is {floor}, must be above 0")
    x = at_least_float32(x)
    # Measured from one of the values, equal values are exactly 0 apart; measured from a rounded mean they are not.
    anchor = torch.where(mask, x, -torch.inf).amax()
    centred = torch.where(mask, x - anchor, 0.0)
    centred = centred - masked_mean(centred, mask)
    sd = masked_mean(centred.square(), mask).sqrt()
    return torch.where(mask, centred / sd.clamp(min=floor), 0.0)


def per_response(x: Tensor, mask: Tensor) -> Tensor:
    """The sum over each response's tokens.

        Σ_t m_bt x_bt

    Args:
        x: one number per token. [B, T], any unit.
        mask: True on response tokens. [B, T], bool.

    Returns:
        [B] in the unit of ``x`` (nats per token become nats per response), at least float32.

    Raises:
        ValueError: the shapes differ.
    """
    expect_same_shape(x=x, mask=mask)
    return torch.where(mask, at_least_float32(x), 0.0).sum(-1)


def expect_finite(
    site: str, *values: Tensor | float | None, advice: str = NEARER, error: type[DivergedError] = DivergedError
) -> None:
    """Stop at a number that is NaN or infinite, where it arises: before anything learns from it or saves it.

    Args:
        site: what the numbers are, in words; the message begins with it.
        values: of any shape; None, which was not measured, is fine.
        advice: what to do about it.
        error: of which kind it is.

    Raises:
        DivergedError: one of them is not finite.
    """
    for value in values:
        if isinstance(value, Tensor):
            finite = torch.isfinite(value.detach())
            if not finite.all():
                first = value.detach()[~finite][0].item()
                raise error(
                    f"{site}: found {first} in {int((~finite).sum()):,} of {finite.numel():,} numbers, wanted finite "
                    f"ones; nothing of it was saved. {advice}"
                )
        elif value is not None and not math.isfinite(value):
            raise error(f"{site}: found {value}, wanted a finite number; nothing of it was saved. {advice}")


def close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two ways to the same states or logits differ by no more than rounding, in the dtype of what is wanted."""
    gap = (found - wanted).abs().max() / wanted.abs().max()
    return bool(gap <= CLOSE.get(wanted.dtype, 0.05))
