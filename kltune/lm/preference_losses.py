"""Which of the losses on preferences a recipe asks for, and what its beta is to it."""

from torch import Tensor

from kltune.core import preferences as losses
from kltune.recipe import DPOSection


def preference_losses(dpo: DPOSection, ratio: Tensor, mean: Tensor, wanted: Tensor, point: float) -> Tensor:
    """The loss of each pair, or of each response that was judged on its own.

    Args:
        dpo: which one.
        ratio: log π(y|x) − log ρ(y|x) of each response. [R], nats.
        mean: log π(y|x) per token. [R], nats per token.
        wanted: True where a response was chosen. [R], bool.
        point: from ``reference_point``.
    """
    beta, smoothing = dpo.beta, dpo.label_smoothing
    if dpo.loss == "kto":
        return losses.kto_loss(ratio, wanted, point, beta, dpo.wanted_weight, dpo.unwanted_weight)
    if dpo.loss == "bco":
        return losses.bco_loss(ratio, wanted, point, beta)
    chosen, rejected = ratio[0::2], ratio[1::2]
    if dpo.loss == "f_dpo":
        return losses.divergence_loss(chosen, rejected, beta, dpo.divergence, dpo.alpha)
    if dpo.loss == "chi_po":
        return losses.chi_po_loss(chosen, rejected, beta, dpo.reward_limit)
    if dpo.loss == "orpo":
        return losses.orpo_loss(mean[0::2], mean[1::2], beta)
    if dpo.loss == "simpo":
        return losses.simpo_loss(mean[0::2], mean[1::2], beta, dpo.gap)
    margin = chosen - rejected
    if dpo.loss == "robust":
        return losses.robust_loss(margin, beta, smoothing)
    if dpo.loss == "ipo":
        return losses.ipo_loss(margin, beta)
    return losses.hinge_loss(margin, beta) if dpo.loss == "hinge" else losses.sigmoid_loss(margin, beta, smoothing)


def scale_of(dpo: DPOSection) -> float:
    """What the loss is divided by before its price is set, so that at h = 0 a nat of margin is worth about one."""
    return {"ipo": 1.0 / dpo.beta, "orpo": 1.0}.get(dpo.loss, dpo.beta)
