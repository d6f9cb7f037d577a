"""Which way of pricing KL(policy ‖ reference) has its gradient: the table of MATH 2.1 (ORACLE-C), by listing.

TinyLM has fifteen responses, so the expected gradient of a sampled loss is a weighted sum of fifteen gradients. Each
row is built from kltune.core as a training step would build it, for one response at a time, and compared with the
gradient of the listed KL.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kltune.core.kl.divergence import kl_exact, kl_k1, kl_k2, kl_k3
from kltune.core.objectives.advantages import gae, penalize, strictly_future, to_go
from kltune.core.objectives.losses import clipped_policy_loss, exact_kl_loss, k2_kl_loss
from kltune.core.tensors import per_response, token_logprobs
from tests.oracles import Responses, tilt, tiny_policy_logits, tiny_reference_logits

RESPONSES = Responses()
REFERENCE, POLICY = tiny_reference_logits(), tiny_policy_logits()


@dataclass(frozen=True)
class Sample:
    """One response, as a loss sees it."""

    logprobs: Tensor        # [1, T], carrying the gradient
    ref_logprobs: Tensor    # [1, T]
    exact: Tensor           # [1, T], carrying the gradient
    mask: Tensor            # [1, T]
    score: Tensor           # [1]


def sample(logits: Tensor, row: int) -> Sample:
    rows = slice(row, row + 1)
    states, tokens, mask = RESPONSES.states[rows], RESPONSES.tokens[rows], RESPONSES.mask[rows]
    return Sample(
        token_logprobs(logits[states], tokens, 1.0),
        token_logprobs(REFERENCE[states], tokens, 1.0),
        kl_exact(logits[states], REFERENCE[states], 1.0),
        mask,
        RESPONSES.rewards[rows],
    )


def gradients(loss: Callable[[Sample], Tensor], logits: Tensor = POLICY) -> tuple[Tensor, Tensor]:
    """The gradient of the loss at each of the fifteen responses, [15, 21], and their probabilities."""
    logits = logits.clone().requires_grad_()
    rows = [torch.autograd.grad(loss(sample(logits, row)), logits)[0].flatten() for row in range(15)]
    return torch.stack(rows), RESPONSES.probabilities(logits.detach())


def moments(loss: Callable[[Sample], Tensor], logits: Tensor = POLICY) -> tuple[Tensor, float]:
    """Expected gradient, [21], and the trace of its covariance."""
    each, p = gradients(loss, logits)
    mean = p @ each
    return mean, (p @ each.square().sum(-1) - mean.square().sum()).item()


def true_gradient(second: Tensor = REFERENCE, *, forward: bool = False) -> Tensor:
    """∇KL(π ‖ ρ) at POLICY, or ∇KL(ρ ‖ π)."""
    logits = POLICY.clone().requires_grad_()
    listed = RESPONSES.kl(second, logits) if forward else RESPONSES.kl(logits, second)
    return torch.autograd.grad(listed, logits)[0].flatten()


def policy_gradient(s: Sample, advantages: Tensor) -> Tensor:
    """−Σ A log π, as PPO's first minibatch has it: the ratio is 1."""
    return clipped_policy_loss(s.logprobs, s.logprobs.detach(), advantages, s.mask, clip_range=0.2, tokens=1)


def priced(s: Sample, k: Tensor) -> Tensor:
    """Rewards of a score of 0 and a price of 1 for what ``k`` measured."""
    return penalize(torch.zeros(1, dtype=k.dtype), k, 1.0, s.mask)


def k1_in_reward(s: Sample) -> Tensor:
    rewards = priced(s, kl_k1(s.logprobs, s.ref_logprobs, s.mask))
    return policy_gradient(s, to_go(rewards, s.mask))


def k1_in_reward_full_return(s: Sample) -> Tensor:
    rewards = priced(s, kl_k1(s.logprobs, s.ref_logprobs, s.mask))
    return policy_gradient(s, per_response(rewards, s.mask)[:, None].expand_as(rewards))


def k1_in_reward_through_gae(s: Sample) -> Tensor:
    rewards = priced(s, kl_k1(s.logprobs, s.ref_logprobs, s.mask))
    values = 0.3 * torch.arange(3, dtype=rewards.dtype)[None]      # any function of the position is a baseline
    advantages, _ = gae(rewards, values, s.mask, gamma=1.0, gae_lambda=1.0)
    return policy_gradient(s, advantages)


def k1_in_reward_own_token(s: Sample) -> Tensor:
    rewards = priced(s, kl_k1(s.logprobs, s.ref_logprobs, s.mask))
    advantages, _ = gae(rewards, torch.zeros_like(rewards), s.mask, gamma=0.0, gae_lambda=1.0)
    return policy_gradient(s, advantages)


def k1_as_loss(s: Sample) -> Tensor:
    return kl_k1(s.logprobs, s.ref_logprobs, s.mask).sum()


def k2_of_the_response(s: Sample) -> Tensor:
    return k2_kl_loss(s.logprobs, s.ref_logprobs, s.mask, responses=1)


def k2_of_the_token(s: Sample) -> Tensor:
    return kl_k2(s.logprobs, s.ref_logprobs, s.mask).sum()


def k3_as_loss(s: Sample) -> Tensor:
    return kl_k3(s.logprobs, s.ref_logprobs, s.mask).sum()


def k3_in_reward(s: Sample) -> Tensor:
    rewards = priced(s, kl_k3(s.logprobs, s.ref_logprobs, s.mask))
    return policy_gradient(s, to_go(rewards, s.mask))


def exact_pathwise_only(s: Sample) -> Tensor:
    return per_response(s.exact, s.mask).sum()


def exact_with_consequence(s: Sample) -> Tensor:
    return exact_kl_loss(s.exact, s.logprobs, s.mask, responses=1)


def exact_with_the_whole_sum(s: Sample) -> Tensor:
    total = per_response(s.exact, s.mask)
    return (total + total.detach() * per_response(s.logprobs, s.mask)).sum()


UNBIASED = [
    (k1_in_reward_full_return, 0.30387),
    (k1_in_reward, 0.23694),
    (exact_with_consequence, 0.02805),
    (exact_with_the_whole_sum, 0.04983),
    (k2_of_the_response, 0.30387),
]
BIASED = [      # relative bias, cosine, trace of the covariance
    (k2_of_the_token, 0.1828, 0.9878, 0.13785),
    (k3_as_loss, 0.2611, 0.9884, 0.23006),
    (k3_in_reward, 1.2009, -0.7159, None),
    (exact_pathwise_only, 0.1828, 0.9878, 0.02460),
    (k1_in_reward_own_token, 0.1828, 0.9878, None),
]


def relative_bias(mean: Tensor) -> float:
    true = true_gradient()
    return ((mean - true).norm() / true.norm()).item()


def test_the_gradient_of_the_listed_kl():
    assert true_gradient().norm().item() == pytest.approx(0.157382, abs=1e-6)


@pytest.mark.parametrize(("loss", "trace"), UNBIASED)
def test_the_right_ones_are_unbiased(loss, trace):
    mean, noise = moments(loss)
    assert relative_bias(mean) < 1e-10
    assert noise == pytest.approx(trace, abs=1e-5)


def test_credit_through_gae_with_lambda_one_is_unbiased_for_any_values():
    mean, _ = moments(k1_in_reward_through_gae)
    assert relative_bias(mean) < 1e-10


@pytest.mark.parametrize(("loss", "bias", "cosine", "trace"), BIASED)
def test_the_wrong_ones_are_wrong_by_as_much_as_they_should_be(loss, bias, cosine, trace):
    mean, noise = moments(loss)
    assert relative_bias(mean) == pytest.approx(bias, abs=1e-3)
    assert torch.cosine_similarity(mean, true_gradient(), dim=0).item() == pytest.approx(cosine, abs=1e-3)
    if trace is not None:
        assert noise == pytest.approx(trace, abs=1e-5)


def test_k1_as_a_loss_is_nothing_but_noise():
    mean, noise = moments(k1_as_loss)
    assert mean.norm().item() < 1e-12
    assert noise == pytest.approx(1.46179, abs=1e-5)


def test_k3_in_the_reward_gives_the_difference_of_two_gradients_at_each_token():
    # at every token ∇KL(π ‖ ρ) − ∇KL(ρ ‖ π), here on a single step, where sequence and token are the same
    p = torch.tensor([0.8, 0.2]).double()
    logits, reference = p.log()[None].requires_grad_(), torch.tensor([[0.5, 0.5]]).double().log()
    one, mask = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    slopes = {}
    for name in ("k1 loss", "k2 loss", "k3 loss", "k3 reward", "k1 reward"):
        total = torch.zeros(2, dtype=torch.float64)
        for arm in (0, 1):
            logprobs = token_logprobs(logits[None], one + arm, 1.0)
            ref_logprobs = token_logprobs(reference[None], one + arm, 1.0)
            estimator, place = name.split()
            k = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[estimator](logprobs, ref_logprobs, mask)
            loss = k.sum() if place == "loss" else (k.detach() * logprobs).sum()
            total += p[arm] * torch.autograd.grad(loss, logits)[0][0]
        slopes[name] = (total[0] / (p[0] * p[1])).item()      # dz₀ = dp / (p(1 − p)) with z₁ held
    expected = {"k1 loss": 0.0, "k2 loss": 1.386294, "k3 loss": 1.875, "k3 reward": -0.488706, "k1 reward": 1.386294}
    assert slopes == pytest.approx(expected, abs=1e-6)


def test_the_two_directions_of_a_coin():
    logits = torch.tensor([[0.8, 0.2]]).double().log().requires_grad_()
    reference = torch.tensor([[0.5, 0.5]]).double().log()
    reverse = torch.autograd.grad(kl_exact(logits, reference, 1.0).sum(), logits)[0][0, 0].item() / 0.16
    forward = torch.autograd.grad(kl_exact(reference, logits, 1.0).sum(), logits)[0][0, 0].item() / 0.16
    assert (reverse, forward) == pytest.approx((1.386294, 1.875), abs=1e-6)


def test_a_state_baseline_takes_some_of_the_noise_left():
    # Σ_t D_t + Σ_t g_t (F_t − E[F_t | state]): MATH 2.1, "RB + state baseline"
    states, mask = RESPONSES.states, RESPONSES.mask
    p = RESPONSES.probabilities(POLICY)
    ahead = strictly_future(kl_exact(POLICY[states], REFERENCE[states], 1.0), mask)
    expected = torch.zeros(7, dtype=torch.float64)
    for state in range(7):
        here = mask & (states == state)
        expected[state] = (p[:, None] * ahead)[here].sum() / (p[:, None] * here)[here].sum()
    logits = POLICY.clone().requires_grad_()
    rows = []
    for row in range(15):
        s = sample(logits, row)
        baseline = expected[states[row]][None]
        loss = exact_kl_loss(s.exact, s.logprobs, s.mask, responses=1) - (baseline * s.logprobs)[s.mask].sum()
        rows.append(torch.autograd.grad(loss, logits)[0].flatten())
    each = torch.stack(rows)
    mean = p @ each
    assert relative_bias(mean) < 1e-10
    assert (p @ each.square().sum(-1) - mean.square().sum()).item() == pytest.approx(0.02502, abs=1e-5)


def between_the_reference_and_the_optimum(share: float) -> Tensor:
    """The policy whose log-probabilities are this share of the way from ρ to π* (β = 1)."""
    best = RESPONSES.logits_of(tilt(RESPONSES.probabilities(REFERENCE), RESPONSES.rewards, 1.0))
    return torch.lerp(REFERENCE.log_softmax(-1), best.log_softmax(-1), share)


@pytest.mark.parametrize(("share", "k1_trace"), [(0.0, 1.217), (0.5, 0.304), (0.9, 0.0113), (1.0, 0.0)])
def test_near_the_optimum_k1_in_the_reward_leaves_no_noise_and_the_exact_loss_all_of_it(share, k1_trace):
    # MATH 2.5: the noise that counts is that of R − βU, and at π* that is log Z for every response
    logits = between_the_reference_and_the_optimum(share)
    p = RESPONSES.probabilities(logits)
    mean_score = (p * RESPONSES.rewards).sum()
    objective = mean_score - RESPONSES.kl(logits, REFERENCE)

    def with_k1(s: Sample) -> Tensor:
        rewards = penalize(s.score, kl_k1(s.logprobs, s.ref_logprobs, s.mask), 1.0, s.mask)
        advantages = per_response(rewards, s.mask) - objective
        return policy_gradient(s, advantages[:, None].expand_as(s.mask))

    def with_exact(s: Sample) -> Tensor:
        advantages = (s.score - mean_score)[:, None].expand_as(s.mask)
        return policy_gradient(s, advantages) + exact_kl_loss(s.exact, s.logprobs, s.mask, responses=1)

    (k1_mean, k1_noise), (exact_mean, exact_noise) = moments(with_k1, logits), moments(with_exact, logits)
    torch.testing.assert_close(k1_mean, exact_mean, atol=1e-12, rtol=0.0)
    assert k1_noise == pytest.approx(k1_trace, abs=5e-4)
    assert exact_noise > 1.0
