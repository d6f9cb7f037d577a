"""Which way of pricing KL(policy ‖ reference) has its gradient, by listing, and where training with it ends.

TinyLM has fifteen responses, so the expected gradient of a sampled loss is a weighted sum of fifteen gradients. Each
row is built from kltune.core as a training step would build it, for one response at a time, and compared with the
gradient of the listed KL. Training is by 256 responses an iteration, 300 iterations of Adam at .05 that falls to 0,
β = 1: KL(π ‖ π*) should vanish and KL(π ‖ ρ) reach .41252563; a price with the wrong gradient ends somewhere else.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kltune.core.kl.divergence import kl_exact, kl_k1, kl_k2, kl_k3
from kltune.core.objectives.advantages import gae, leave_one_out, penalize, to_go
from kltune.core.objectives.losses import clipped_policy_loss, clipped_value_loss, exact_kl_loss, k2_kl_loss
from kltune.core.tensors import masked_whiten, per_response, token_logprobs
from tests.oracles import Responses, tilt, tiny_policy_logits, tiny_reference_logits

RESPONSES = Responses()
REFERENCE, POLICY = tiny_reference_logits(), tiny_policy_logits()
OPTIMUM = RESPONSES.logits_of(tilt(RESPONSES.probabilities(REFERENCE), RESPONSES.rewards, 1.0))
ITERATIONS, BATCH = 300, 256


@dataclass(frozen=True)
class Sample:
    """Responses, as a loss sees them."""

    logprobs: Tensor        # [B, T], carrying the gradient
    old_logprobs: Tensor    # [B, T], of the policy that sampled
    ref_logprobs: Tensor    # [B, T]
    exact: Tensor           # [B, T], carrying the gradient
    mask: Tensor            # [B, T]
    scores: Tensor          # [B]


def sample(logits: Tensor, rows: Tensor, sampler: Tensor | None = None) -> Sample:
    states, tokens = RESPONSES.states[rows], RESPONSES.tokens[rows]
    sampler = logits.detach() if sampler is None else sampler
    return Sample(
        token_logprobs(logits[states], tokens, 1.0),
        token_logprobs(sampler[states], tokens, 1.0),
        token_logprobs(REFERENCE[states], tokens, 1.0),
        kl_exact(logits, REFERENCE, 1.0)[states],
        RESPONSES.mask[rows],
        RESPONSES.rewards[rows],
    )


def moments(
    loss: Callable[[Sample], Tensor], logits: Tensor = POLICY, sampler: Tensor | None = None
) -> tuple[Tensor, float]:
    """Expected gradient over the fifteen responses, [21], and the trace of its covariance; they may be another's."""
    logits = logits.clone().requires_grad_()
    rows = torch.arange(15)[:, None]
    each = torch.stack([torch.autograd.grad(loss(sample(logits, row, sampler)), logits)[0].flatten() for row in rows])
    p = RESPONSES.probabilities(logits.detach() if sampler is None else sampler)
    mean = p @ each
    return mean, (p @ each.square().sum(-1) - mean.square().sum()).item()


def true_gradient() -> Tensor:
    """∇KL(π ‖ ρ) at POLICY."""
    logits = POLICY.clone().requires_grad_()
    return torch.autograd.grad(RESPONSES.kl(logits, REFERENCE), logits)[0].flatten()


def policy_gradient(s: Sample, advantages: Tensor) -> Tensor:
    """−Σ A log π per response, as PPO's first minibatch has it: the ratio is 1. ``advantages``: [B, T] or [B, 1]."""
    advantages = advantages.expand_as(s.logprobs)
    return clipped_policy_loss(s.logprobs, s.logprobs.detach(), advantages, s.mask, 0.2, tokens=len(s.scores))


def priced(s: Sample, estimator: Callable, scores: Tensor | None = None) -> Tensor:
    """Rewards of these scores (0) and a price of 1 for what the estimator measures."""
    scores = torch.zeros_like(s.scores) if scores is None else scores
    return penalize(scores, estimator(s.logprobs, s.ref_logprobs, s.mask), 1.0, s.mask)


def k1_in_reward(s: Sample) -> Tensor:
    return policy_gradient(s, to_go(priced(s, kl_k1), s.mask))


def k1_in_reward_full_return(s: Sample) -> Tensor:
    return policy_gradient(s, per_response(priced(s, kl_k1), s.mask)[:, None])


def k1_in_reward_through_gae(s: Sample) -> Tensor:
    rewards = priced(s, kl_k1)
    values = 0.3 * torch.arange(3, dtype=rewards.dtype)[None]      # any function of the position is a baseline
    return policy_gradient(s, gae(rewards, values, s.mask, gamma=1.0, gae_lambda=1.0)[0])


def k1_in_reward_own_token(s: Sample) -> Tensor:
    rewards = priced(s, kl_k1)
    return policy_gradient(s, gae(rewards, torch.zeros_like(rewards), s.mask, gamma=0.0, gae_lambda=1.0)[0])


def k1_as_loss(s: Sample) -> Tensor:
    return kl_k1(s.logprobs, s.ref_logprobs, s.mask).sum() / len(s.scores)


def k2_of_the_response(s: Sample) -> Tensor:
    return k2_kl_loss(s.logprobs, s.ref_logprobs, s.old_logprobs, s.mask, responses=len(s.scores))


def k2_of_the_token(s: Sample) -> Tensor:
    return kl_k2(s.logprobs, s.ref_logprobs, s.mask).sum()


def k3_as_loss(s: Sample) -> Tensor:
    return kl_k3(s.logprobs, s.ref_logprobs, s.mask).sum() / len(s.scores)


def k3_in_reward(s: Sample) -> Tensor:
    return policy_gradient(s, to_go(priced(s, kl_k3), s.mask))


def exact_pathwise_only(s: Sample) -> Tensor:
    return per_response(s.exact, s.mask).sum()


def exact_with_consequence(s: Sample) -> Tensor:
    return exact_kl_loss(s.exact, s.logprobs, s.old_logprobs, s.mask, responses=len(s.scores))


UNBIASED = [    # trace of the covariance
    (k1_in_reward_full_return, 0.30387),
    (k1_in_reward, 0.23694),
    (exact_with_consequence, 0.02805),
    (k2_of_the_response, 0.30387),
    (k1_in_reward_through_gae, None),   # with λ = 1, for any values
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


@pytest.mark.parametrize(("loss", "trace"), UNBIASED)
def test_the_right_ones_are_unbiased(loss, trace):
    mean, noise = moments(loss)
    assert relative_bias(mean) < 1e-10
    if trace is not None:
        assert noise == pytest.approx(trace, abs=1e-5)


@pytest.mark.parametrize("loss", [exact_with_consequence, k2_of_the_response])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_later_epochs_are_unbiased_on_the_responses_of_an_earlier_policy(loss, share):
    # the sampler lies between the reference and the policy: KL(old ‖ new) .11, .055 and .010
    sampler = REFERENCE + share * (POLICY - REFERENCE)
    assert relative_bias(moments(loss, sampler=sampler)[0]) < 1e-10


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
    p, fair = torch.tensor([[0.8], [0.2]]).double(), torch.tensor([[0.5], [0.5]]).double().log()
    logits, mask = p.log().requires_grad_(), torch.ones(2, 1, dtype=torch.bool)
    logprobs = logits.log_softmax(0)        # [2, 1]: the two arms are two responses of one token

    def slope(each: Tensor, weights: Tensor = p) -> float:
        (gradient,) = torch.autograd.grad((weights * each).sum(), logits, retain_graph=True)
        return gradient[0].item() / 0.16      # dz₀ = dp / (p(1 − p))

    def rewarded(estimator: Callable) -> float:
        return slope(estimator(logprobs.detach(), fair, mask) * logprobs)

    reverse, forward = 1.386294, 1.875
    assert slope(kl_exact(logits.T, fair.T, 1.0), torch.ones(1)) == pytest.approx(reverse, abs=1e-6)
    assert slope(kl_exact(fair.T, logits.T, 1.0), torch.ones(1)) == pytest.approx(forward, abs=1e-6)
    losses = [slope(estimator(logprobs, fair, mask)) for estimator in (kl_k1, kl_k2, kl_k3)]
    assert losses == pytest.approx([0.0, reverse, forward], abs=1e-6)
    assert [rewarded(kl_k1), rewarded(kl_k3)] == pytest.approx([reverse, reverse - forward], abs=1e-6)


def between_the_reference_and_the_optimum(share: float) -> Tensor:
    """The policy whose log-probabilities are this share of the way from ρ to π* (β = 1)."""
    return torch.lerp(REFERENCE.log_softmax(-1), OPTIMUM.log_softmax(-1), share)


@pytest.mark.parametrize(("share", "k1_trace"), [(0.0, 1.217), (0.5, 0.304), (0.9, 0.0113), (1.0, 0.0)])
def test_near_the_optimum_k1_in_the_reward_leaves_no_noise_and_the_exact_loss_all_of_it(share, k1_trace):
    # the noise that counts is that of R − βU, and at π* that is β log Z for every response
    logits = between_the_reference_and_the_optimum(share)
    p = RESPONSES.probabilities(logits)
    mean_score = (p * RESPONSES.rewards).sum()
    objective = mean_score - RESPONSES.kl(logits, REFERENCE)

    def with_k1(s: Sample) -> Tensor:
        return policy_gradient(s, (per_response(priced(s, kl_k1, s.scores), s.mask) - objective)[:, None])

    def with_exact(s: Sample) -> Tensor:
        return policy_gradient(s, (s.scores - mean_score)[:, None]) + exact_with_consequence(s)

    (k1_mean, k1_noise), (exact_mean, exact_noise) = moments(with_k1, logits), moments(with_exact, logits)
    torch.testing.assert_close(k1_mean, exact_mean, atol=1e-12, rtol=0.0)
    assert k1_noise == pytest.approx(k1_trace, abs=5e-4)
    assert exact_noise > 1.0


# training


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of the listed responses, drawn from the table as it is."""
    return RESPONSES.probabilities(logits.detach()).multinomial(BATCH, replacement=True, generator=generator)


def annealed(*parameters: Tensor) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / ITERATIONS)


def distances(logits: Tensor) -> tuple[float, float]:
    """KL to the optimum and to the reference, nats per response."""
    logits = logits.detach()
    return RESPONSES.kl(logits, OPTIMUM).item(), RESPONSES.kl(logits, REFERENCE).item()


def nothing(logprobs: Tensor, *_: Tensor) -> Tensor:
    return torch.zeros_like(logprobs)


def trained(in_reward: Callable, as_loss: Callable[[Sample], Tensor] | None) -> tuple[float, float]:
    """Where leave-one-out ends with this estimator priced in the reward, and this loss added."""
    generator = torch.Generator().manual_seed(0)
    logits = REFERENCE.clone().requires_grad_()
    optimizer, schedule = annealed(logits)
    for _ in range(ITERATIONS):
        s = sample(logits, draw(logits, generator))
        returns = per_response(priced(s, in_reward, s.scores), s.mask)
        loss = policy_gradient(s, leave_one_out(returns, BATCH)[:, None])
        optimizer.zero_grad()
        (loss if as_loss is None else loss + as_loss(s)).backward()
        optimizer.step()
        schedule.step()
    return distances(logits)


@pytest.mark.parametrize(
    ("in_reward", "as_loss", "most"), [(kl_k1, None, 1e-4), (nothing, exact_with_consequence, 3e-3)]
)
def test_leave_one_out_finds_the_optimum(in_reward, as_loss, most):
    to_optimum, to_reference = trained(in_reward, as_loss)
    assert to_optimum < most
    assert to_reference == pytest.approx(0.41252563, abs=0.05)


@pytest.mark.parametrize(("in_reward", "as_loss"), [(nothing, k1_as_loss), (kl_k3, None)])
def test_a_price_without_the_right_gradient_does_not_hold_the_policy(in_reward, as_loss):
    assert min(trained(in_reward, as_loss)) > 0.5


def test_k3_as_a_loss_stops_short_of_the_optimum():
    to_optimum, to_reference = trained(nothing, k3_as_loss)
    assert to_reference == pytest.approx(0.34, abs=0.03)
    assert 0.003 < to_optimum < 0.02


def test_clipped_steps_with_a_critic_find_the_optimum():
    generator = torch.Generator().manual_seed(0)
    logits, values = REFERENCE.clone().requires_grad_(), torch.zeros(7, dtype=torch.float64, requires_grad=True)
    optimizer, schedule = annealed(logits, values)
    for _ in range(ITERATIONS):
        rows = draw(logits, generator)
        s = sample(logits, rows)
        old, old_values = s.logprobs.detach(), values.detach()[RESPONSES.states[rows]]
        advantages, returns = gae(priced(s, kl_k1, s.scores), old_values, s.mask, gamma=1.0, gae_lambda=1.0)
        advantages = masked_whiten(advantages, s.mask, floor=1e-8)
        for part in [part for _ in range(4) for part in torch.randperm(BATCH, generator=generator).chunk(4)]:
            now, fitted = sample(logits, rows[part]), values[RESPONSES.states[rows[part]]]
            options = {"mask": now.mask, "clip_range": 0.2, "tokens": int(now.mask.sum())}
            loss = clipped_policy_loss(now.logprobs, old[part], advantages[part], **options)
            loss = loss + clipped_value_loss(fitted, old_values[part], returns[part], **options)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    to_optimum, to_reference = distances(logits)
    assert to_optimum < 1e-3
    assert to_reference == pytest.approx(0.41252563, abs=5e-3)
