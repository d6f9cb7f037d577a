"""What preference data are learnt from: losses on log-ratios of whole responses, one number per pair or response.

    ℓ = log π(y|x) − log ρ(y|x)  (summed over the response's tokens, end token included),    h = ℓ_chosen − ℓ_rejected

``beta`` scales ℓ as the reward it stands for, r = β ℓ. It is no price on KL(policy ‖ reference) and bounds none: the
losses see pairs that were written down, not what the policy says (docs/maths.md 18). ORPO and SimPO do not even see ρ.

Every loss is finite, with a finite gradient, wherever its inputs are.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

EXPONENT = 20.0         # from here on e^x goes on as its tangent, so that nothing overflows and no gradient becomes 0
LEAST_BETA = 0.01       # of its own value that a dynamic beta keeps: 0 would teach nothing, below it the opposite
SURE = -1e-6            # mean log-probability from which the odds count as no longer rising


def sigmoid_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The loss of DPO; with ``label_smoothing`` that of conservative DPO, for labels that are wrong as often.

        −(1 − ε) log σ(βh) − ε log σ(−βh),    d/dh = β (σ(βh) − (1 − ε))

    With ε = 0 labels that never contradict each other are never satisfied: h → ∞ for every β. With ε > 0 the minimum is
    at h = log((1 − ε)/ε) / β.

    Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7; Mitchell 2023, "A note on DPO with noisy preferences".

    Args:
        margin: h. [N], nats.
        beta: reward per nat, above 0.
        label_smoothing: ε, from 0 to below ½.

    Returns:
        [N], log 2 at h = 0.
    """
    z = beta * margin
    return (1.0 - label_smoothing) * softplus(-z) + label_smoothing * softplus(z)


def dynamic_beta(beta: float, gain: float, margin: float, usual: float) -> float:
    """The beta of one batch, larger where its pairs are further apart than usual.

        β_batch = β · max(1 + a (M − M₀), 0.01),    M = mean h of the batch,    M₀ its running mean

    Source: Wu et al. 2024, arXiv 2407.08639 (β-DPO), equation 6 for a batch, M in nats as in the authors' code; every
    pair is kept, where they leave out some by chance.

    Args:
        beta: β, reward per nat, above 0.
        gain: a, per nat, 0 or above.
        margin: M, nats.
        usual: M₀, nats.

    Returns:
        Reward per nat, above 0.
    """
    return beta * max(1.0 + gain * (margin - usual), LEAST_BETA)


def robust_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """What has the expectation of DPO's loss on clean labels when a share of the labels was flipped at random.

        [(1 − ε) L(h) − ε L(−h)] / (1 − 2ε),    L(h) = −log σ(βh),    d/dh = −β [(1 − ε) σ(−βh) + ε σ(βh)] / (1 − 2ε)

    Source: Chowdhury et al. 2024, arXiv 2403.00409 (rDPO).

    Args:
        margin: h. [N], nats.
        beta: reward per nat, above 0.
        label_smoothing: ε, the share of flipped labels, from 0 to below ½.

    Returns:
        [N], of either sign: unbounded below where h is large.
    """
    z = beta * margin
    clean = (1.0 - label_smoothing) * softplus(-z) - label_smoothing * softplus(z)
    return clean / (1.0 - 2.0 * label_smoothing)


def ipo_loss(margin: Tensor, tau: float) -> Tensor:
    """A margin to be met rather than exceeded.

        (h − 1/(2τ))²,    d/dh = 2 (h − 1/(2τ))

    Source: Azar et al. 2023, arXiv 2310.12036, equation 17; h is of sums over tokens. TRL has means, and τ per token.

    Args:
        margin: h. [N], nats.
        tau: τ, above 0; the larger, the smaller the margin.

    Returns:
        [N], nats².
    """
    return (margin - 0.5 / tau).square()


def hinge_loss(margin: Tensor, beta: float) -> Tensor:
    """Nothing to gain beyond a margin.

        max(0, 1 − βh),    d/dh = −β where βh < 1, else 0

    Source: Zhao et al. 2023, arXiv 2305.10425 (SLiC); Liu et al. 2023, arXiv 2309.06657.

    Args:
        margin: h. [N], nats.
        beta: reward per nat, above 0.

    Returns:
        [N].
    """
    return torch.relu(1.0 - beta * margin)


def divergence_loss(
    chosen: Tensor, rejected: Tensor, beta: float, divergence: str, alpha: float = 0.5
) -> Tensor:
    """DPO for a reward that is regularised by another f-divergence than KL(policy ‖ reference).

        −log σ(β [f′(e^ℓw) − f′(e^ℓl)])

        reverse_kl  f′(t) = log t                       (DPO itself)
        forward_kl  f′(t) = −1/t
        js          f′(t) = log(2t / (1 + t))
        alpha       f′(t) = (t^(α−1) − 1) / (α − 1)     (1: reverse_kl, 0: forward_kl)

    Source: Wang et al. 2023, arXiv 2309.16240; the convention of α as in TRL.

    Args:
        chosen: ℓ_w. [N], nats.
        rejected: ℓ_l. [N], nats.
        beta: reward per unit of f′, above 0.
        divergence: one of the four names above.
        alpha: α, not 1; read with ``alpha`` only.

    Returns:
        [N], log 2 at ℓ_w = ℓ_l.

    Raises:
        ValueError: another name, or α = 1.
    """
    if divergence == "alpha" and alpha == 1.0:
        raise ValueError("alpha is 1, where the divergence is reverse_kl and the formula is 0/0")
    slopes = {
        "reverse_kl": lambda x: x,
        "forward_kl": lambda x: -_exp(-x),
        "js": lambda x: -softplus(-x),                 # + log 2, which the difference loses
        "alpha": lambda x: _exp((alpha - 1.0) * x) / (alpha - 1.0),
    }
    if divergence not in slopes:
        raise ValueError(f"divergence is {divergence!r}, must be one of {', '.join(slopes)}")
    slope = slopes[divergence]
    return softplus(-beta * (slope(chosen) - slope(rejected)))


def chi_po_loss(chosen: Tensor, rejected: Tensor, beta: float, reward_limit: float) -> Tensor:
    """DPO with χ² beside KL, which offline data can hold without covering all the policy may say.

        −log σ(clip(β [φ(e^ℓw) − φ(e^ℓl)], −2R, 2R)),    φ(t) = t + log t

    Source: Huang et al. 2024, arXiv 2407.13399.

    Args:
        chosen: ℓ_w. [N], nats.
        rejected: ℓ_l. [N], nats.
        beta: reward per unit of φ, above 0.
        reward_limit: R, above 0: beyond a difference of 2R there is no gradient; ∞ for no limit.

    Returns:
        [N], log 2 at ℓ_w = ℓ_l.
    """
    difference = beta * (_exp(chosen) + chosen - _exp(rejected) - rejected)
    return softplus(-difference.clamp(-2.0 * reward_limit, 2.0 * reward_limit))


def kto_loss(
    log_ratio: Tensor, wanted: Tensor, z0: float, beta: float, wanted_weight: float = 1.0, unwanted_weight: float = 1.0
) -> Tensor:
    """Responses judged one by one, against a point of reference as in prospect theory.

        λ_D (1 − σ(β (ℓ − z₀)))  if wanted,    λ_U (1 − σ(β (z₀ − ℓ)))  if not

    z₀ stands for KL(policy ‖ reference), from responses paired with other prompts than their own (`mismatch_point`). It
    is biased and takes no gradient.

    Source: Ethayarajh et al. 2024, arXiv 2402.01306, equation 8.

    Args:
        log_ratio: ℓ. [N], nats.
        wanted: True where the response is a wanted one. [N], bool.
        z0: z₀, not negative, nats.
        beta: reward per nat, above 0.
        wanted_weight: λ_D, above 0.
        unwanted_weight: λ_U, above 0.

    Returns:
        [N], from 0 to the weight.
    """
    value = beta * (log_ratio - z0)
    return torch.where(wanted, wanted_weight * torch.sigmoid(-value), unwanted_weight * torch.sigmoid(value))


def mismatch_point(log_ratio: Tensor) -> float:
    """KTO's z₀ from responses to other prompts: max(0, mean ℓ), nats.

    Args:
        log_ratio: ℓ of each prompt with another prompt's response. [N], nats.
    """
    return max(0.0, log_ratio.detach().mean().item())


def bco_loss(log_ratio: Tensor, wanted: Tensor, delta: float, beta: float) -> Tensor:
    """A classifier of wanted and unwanted responses, whose logit is the reward above its running mean.

        −log σ(βℓ − δ)  if wanted,    −log σ(−(βℓ − δ))  if not

    Source: Jung et al. 2024, arXiv 2404.04656.

    Args:
        log_ratio: ℓ. [N], nats.
        wanted: True where the response is a wanted one. [N], bool.
        delta: δ, the running mean of the rewards βℓ of both kinds; no gradient.
        beta: reward per nat, above 0.

    Returns:
        [N], log 2 at βℓ = δ.
    """
    logit = beta * log_ratio - delta
    return softplus(torch.where(wanted, -logit, logit))


def orpo_loss(chosen_mean: Tensor, rejected_mean: Tensor, weight: float) -> Tensor:
    """Imitate the chosen response and raise its odds over the rejected one; there is no reference in it.

        −p̄_w − λ log σ(odds_w − odds_l),    odds = p̄ − log(1 − e^p̄),    p̄ = mean log π per token

    Source: Hong et al. 2024, arXiv 2403.07691.

    Args:
        chosen_mean: p̄_w. [N], nats per token.
        rejected_mean: p̄_l. [N], nats per token.
        weight: λ, not negative.

    Returns:
        [N], nats per token.
    """
    return -chosen_mean + weight * softplus(_log_odds(rejected_mean) - _log_odds(chosen_mean))


def simpo_loss(chosen_mean: Tensor, rejected_mean: Tensor, scale: float, gap: float) -> Tensor:
    """The mean log-probability of the chosen response a gap above that of the rejected one; no reference in it.

        −log σ(β (p̄_w − p̄_l) − γ),    p̄ = mean log π per token

    Source: Meng et al. 2024, arXiv 2405.14734.

    Args:
        chosen_mean: p̄_w. [N], nats per token.
        rejected_mean: p̄_l. [N], nats per token.
        scale: β, above 0.
        gap: γ, not negative.

    Returns:
        [N].
    """
    return softplus(gap - scale * (chosen_mean - rejected_mean))


def _exp(x: Tensor) -> Tensor:
    """e^x up to EXPONENT, and its tangent beyond."""
    below = x.clamp(max=EXPONENT)
    return below.exp() * (1.0 + (x - below))


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 − p)) of p = e^mean, for mean < 0."""
    mean = mean.clamp(max=SURE)
    # Two ways to 1 − e^x that keep their digits where the other loses them (Mächler 2012, "log1mexp").
    near = mean > -math.log(2.0)
    small, large = mean.where(near, -1.0), mean.where(~near, -1.0)
    return mean - torch.where(near, (-torch.expm1(small)).log(), torch.log1p(-large.exp()))
