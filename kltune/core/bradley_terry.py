"""What a reward model minimises: the Bradley-Terry loss of a pair, the logistic loss of a label, a centring penalty.

Each gives one number per row, so that the sums of micro-batches add up to the batch's.
"""

from torch import Tensor
from torch.nn.functional import softplus

from kltune.core.masking import at_least_float32, expect_same_shape


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Score the chosen response of a pair above the rejected one, by its margin or more.

        −(1 − ε) log σ(Δ − m) − ε log σ(−Δ − m),    Δ = r_chosen − r_rejected

    dL/dΔ = −(1 − ε) σ(m − Δ) + ε σ(m + Δ). With m = 0 and ε = 0 it is the negative log-likelihood of the Bradley-Terry
    model, P(chosen) = σ(Δ); with ε the pair counts as the wrong way round with that probability, and Δ has a finite
    optimum, log((1 − ε)/ε).

    Sources: Bradley and Terry 1952; Christiano et al. 2017, arXiv 1706.03741 (label noise); Touvron et al. 2023,
    arXiv 2307.09288, section 3.2.2 (margin).

    Args:
        chosen: r of the chosen responses, carrying the gradient. [N], unit of score.
        rejected: r of the rejected responses, carrying the gradient. [N], unit of score.
        margins: m, how much better the chosen one is said to be. [N], unit of score, not negative.
        label_smoothing: ε, from 0 to below ½.

    Returns:
        [N], nats.

    Raises:
        ValueError: the shapes differ, or ``label_smoothing`` is out of range.
    """
    expect_same_shape(chosen=chosen, rejected=rejected, margins=margins)
    _expect_smoothing(label_smoothing)
    gap, margins = at_least_float32(chosen) - at_least_float32(rejected), at_least_float32(margins)
    loss = (1.0 - label_smoothing) * softplus(margins - gap)
    return loss + label_smoothing * softplus(margins + gap) if label_smoothing else loss


def label_loss(scores: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Let the score be the log-odds of a good response (logistic regression).

        −y log σ(r) − (1 − y) log σ(−r),    y = (1 − ε) label + ε (1 − label)

    dL/dr = σ(r) − y.

    Args:
        scores: r, carrying the gradient. [N], unit of score (log-odds).
        labels: 1 for good, 0 for bad. [N].
        label_smoothing: ε, from 0 to below ½.

    Returns:
        [N], nats.

    Raises:
        ValueError: the shapes differ, or ``label_smoothing`` is out of range.
    """
    expect_same_shape(scores=scores, labels=labels)
    _expect_smoothing(label_smoothing)
    scores = at_least_float32(scores)
    target = label_smoothing + (1.0 - 2.0 * label_smoothing) * labels.to(scores.dtype)
    return softplus(scores) - target * scores


def centring_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Hold the two scores of a pair around 0: the loss of a pair knows their difference only, and lets both drift.

        (r_chosen + r_rejected)²

    Source: Eisenstein et al. 2023, arXiv 2312.09244, appendix A (η = 0.01).

    Args:
        chosen: r of the chosen responses, carrying the gradient. [N], unit of score.
        rejected: r of the rejected responses, carrying the gradient. [N], unit of score.

    Returns:
        [N], unit of score squared.

    Raises:
        ValueError: the shapes differ.
    """
    expect_same_shape(chosen=chosen, rejected=rejected)
    return (at_least_float32(chosen) + at_least_float32(rejected)).square()


def _expect_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}, must be from 0 to below 0.5")
