"""The real PPO, its sampler, scorer, advantages and losses, finds the optimum that can be listed (docs/maths.md 22).

    π* = ρ e^{r/β} / Z    is the one maximiser of    E[r] − β KL(π ‖ ρ)

Nothing of π* is known to the code under test: it samples 256 responses per step from a transformers model with a LoRA
on its head, and is asked at the end for the probability of every response there is. GRPO is not asked: dividing each
score by the spread of its group, its optimum is that of another reward.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kltune.core.kl.divergence import kl_k1, kl_k2, kl_k3
from kltune.core.objectives.advantages import leave_one_out, penalize
from kltune.core.objectives.losses import clipped_policy_loss, k2_kl_loss
from kltune.core.tensors import per_response
from kltune.errors import RecipeError
from kltune.lm.model.opening import load_saved_policy
from kltune.lm.model.policy import Policy
from kltune.recipe import PPORecipe
from kltune.stages.ppo import run_ppo
from tests.oracles import (
    BANDIT_REFERENCE,
    BANDIT_REWARDS,
    BOS,
    EOS,
    Responses,
    kl,
    tilt,
    tiny_reference_logits,
)

RESPONSES = Responses()
REFERENCE = tiny_reference_logits()
RHO = RESPONSES.probabilities(REFERENCE)
BEST = tilt(RHO, RESPONSES.rewards, 1.0)
BEST_KL = 0.41252563  # KL(π* ‖ ρ), docs/maths.md 22
BANDIT_BEST = tilt(BANDIT_REFERENCE, BANDIT_REWARDS, 1.0)
BANDIT_BEST_KL = 0.53564290

ONE_STEP = ("ppo.epochs=1", "ppo.minibatch_size=256", "optim.lr=0.1")
RLOO = ("ppo.baseline=rloo", *ONE_STEP)
# A critic that can keep up: the default coefficient and clip are for scores near 1 and many more steps.
CRITIC = ("ppo.baseline=value", "ppo.gae_lambda=1", "ppo.value_coef=1.0", "ppo.value_clip_range=10", "ppo.value_lr=0.1")


def trained(recipe: PPORecipe) -> tuple[Policy, dict]:
    """The policy in ``final`` after a real run, and the run's result."""
    result = run_ppo(recipe, resume=False)
    final, device = Path(result["final"]), torch.device("cpu")
    return load_saved_policy(final, recipe.model, device=device, is_adapter=True), result


def spoken(policy: Policy) -> Tensor:
    """P(y) of each of TinyLM's fifteen responses. [15] float64."""
    ids = torch.cat([torch.full((15, 1), BOS), torch.where(RESPONSES.mask, RESPONSES.tokens, EOS)], dim=1)
    scored = torch.nn.functional.pad(RESPONSES.mask, (1, 0))
    flat = policy.measure(ids, scored).logprobs.double()
    return torch.zeros(15, 3, dtype=torch.float64).masked_scatter(RESPONSES.mask, flat).sum(-1).exp()


def pulled(policy: Policy) -> Tensor:
    """P(arm) of the bandit's four. [4] float64."""
    ids = torch.tensor([[0, 3 + arm] for arm in range(4)])
    return policy.measure(ids, torch.tensor([[False, True]] * 4)).logprobs.double().exp()


def test_a_fresh_policy_is_the_listed_reference(bandit_recipe, tiny_recipe):
    from kltune.lm.model.opening import load_policy

    for recipe, listed, expected in ((tiny_recipe(), spoken, RHO), (bandit_recipe(), pulled, BANDIT_REFERENCE)):
        policy = load_policy(recipe.model, recipe.lora, device=torch.device("cpu"))
        assert torch.allclose(listed(policy), expected, atol=1e-6)


def test_rloo_finds_the_optimum_of_tiny_lm(tiny_recipe):
    policy, result = trained(tiny_recipe(*RLOO, "run.steps=120"))
    assert kl(spoken(policy), BEST) < 1e-4
    assert kl(spoken(policy), RHO) == pytest.approx(BEST_KL, abs=0.005)
    assert result["kl"]["nats_per_response"] == pytest.approx(BEST_KL, abs=0.02)  # measured on 256 responses
    assert result["score"] == pytest.approx(1.61987106, abs=0.25)


def test_ppo_with_a_value_function_finds_the_optimum_of_tiny_lm(tiny_recipe):
    recipe = tiny_recipe(*CRITIC, "optim.lr=0.05", "ppo.minibatch_size=256", "run.steps=180")
    policy, _ = trained(recipe)
    assert kl(spoken(policy), BEST) < 1e-3
    assert kl(spoken(policy), RHO) == pytest.approx(BEST_KL, abs=0.005)


def test_exact_kl_in_the_loss_comes_near_the_optimum(tiny_recipe):
    # Not as near as k1 in the reward, whose noise vanishes at π* as that of the exact loss does not: docs/maths.md 11.
    policy, _ = trained(tiny_recipe(*RLOO, "kl.placement=loss", "run.steps=120"))
    assert kl(spoken(policy), BEST) < 1e-2
    assert kl(spoken(policy), RHO) == pytest.approx(BEST_KL, abs=0.04)


def test_k2_in_the_loss_comes_near_the_optimum(tiny_recipe):
    policy, _ = trained(tiny_recipe(*RLOO, "kl.placement=loss", "kl.estimator=k2", "run.steps=120"))
    assert kl(spoken(policy), BEST) < 1e-2
    assert kl(spoken(policy), RHO) == pytest.approx(BEST_KL, abs=0.04)


def test_rloo_finds_the_optimum_of_the_bandit(bandit_recipe):
    policy, _ = trained(bandit_recipe(*RLOO, "run.steps=80"))
    assert kl(pulled(policy), BANDIT_BEST) < 1e-3
    assert kl(pulled(policy), BANDIT_REFERENCE) == pytest.approx(BANDIT_BEST_KL, abs=0.005)


def test_a_price_of_two_stops_sooner(bandit_recipe):
    policy, _ = trained(bandit_recipe(*RLOO, "kl.beta=2", "run.steps=60"))
    assert kl(pulled(policy), tilt(BANDIT_REFERENCE, BANDIT_REWARDS, 2.0)) < 1e-3


def test_ppo_with_a_value_function_finds_the_optimum_of_the_bandit(bandit_recipe):
    recipe = bandit_recipe(*CRITIC, "optim.lr=0.05", "ppo.minibatch_size=256", "run.steps=80")
    policy, _ = trained(recipe)
    assert kl(pulled(policy), BANDIT_BEST) < 1e-3


# --- negative controls: the same maximisation, priced in ways whose gradient is not the KL's ------------------------

Loss = Callable[[Tensor, Tensor], Tensor]  # (log π, log ρ) of all fifteen responses, [15, T] each -> scalar


def expected(values: Tensor, logprobs: Tensor) -> Tensor:
    """Σ_y sg(π(y)) · value(y): what the mean over sampled responses tends to. values: [15] or [15, T]."""
    weights = per_response(logprobs.detach(), RESPONSES.mask).exp()
    return (weights * (per_response(values, RESPONSES.mask) if values.dim() == 2 else values)).sum()


def reinforce(logprobs: Tensor, returns: Tensor) -> Tensor:
    """−E[return · Σ log π], by PPO's own loss at ratio 1; returns [15]."""
    weights = per_response(logprobs.detach(), RESPONSES.mask).exp()
    advantages = (weights * (returns - (weights * returns).sum()))[:, None].expand_as(logprobs)
    return clipped_policy_loss(logprobs, logprobs.detach(), advantages, RESPONSES.mask, clip_range=0.2, tokens=1)


def priced_in_reward(estimator: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    def loss(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        price = estimator(logprobs.detach(), ref_logprobs, RESPONSES.mask)
        rewards = penalize(RESPONSES.rewards, price, 1.0, RESPONSES.mask)
        return reinforce(logprobs, per_response(rewards, RESPONSES.mask))

    return loss


def priced_in_loss(estimator: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    def loss(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        price = estimator(logprobs, ref_logprobs, RESPONSES.mask)
        return reinforce(logprobs, RESPONSES.rewards) + expected(price, logprobs)

    return loss


def k2_of_the_response(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    rows = zip(logprobs.split(1), ref_logprobs.split(1), logprobs.detach().split(1), mask.split(1), strict=True)
    return torch.stack([k2_kl_loss(*row, 1) for row in rows])


def descend(loss: Loss) -> Tensor:
    """P(y) after 300 steps of Adam on the table of logits, the rate annealed to 0. [15]"""
    logits = REFERENCE.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    ref_logprobs = RESPONSES.logprobs(REFERENCE)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        optimizer.zero_grad()
        loss(RESPONSES.logprobs(logits), ref_logprobs).backward()
        optimizer.step()
    return RESPONSES.probabilities(logits.detach())


@pytest.mark.parametrize("loss", [priced_in_reward(kl_k1), priced_in_loss(k2_of_the_response)])
def test_the_two_prices_in_use_end_at_the_optimum(loss):
    assert kl(descend(loss), BEST) < 1e-4


@pytest.mark.parametrize("loss", [priced_in_loss(kl_k1), priced_in_reward(kl_k3)])
def test_k1_as_a_loss_and_k3_in_the_reward_run_away(loss):
    p = descend(loss)
    assert kl(p, BEST) > 0.5
    assert kl(p, RHO) > 2.0


def test_k3_as_a_loss_stops_short_of_the_optimum():
    p = descend(priced_in_loss(kl_k3))
    assert abs(kl(p, RHO) - BEST_KL) > 0.03
    assert 0.003 < kl(p, BEST) < 0.03


def test_k2_of_single_tokens_is_off_by_the_drift_of_prefixes():
    assert 5e-4 < kl(descend(priced_in_loss(kl_k2)), BEST) < 0.02


@pytest.mark.parametrize(
    "price",
    [
        ("kl.estimator=k1", "kl.placement=loss"),
        ("kl.estimator=k3", "kl.placement=loss"),
        ("kl.estimator=k3", "kl.placement=reward"),
        ("kl.estimator=k2", "kl.placement=reward"),
        ("kl.estimator=exact", "kl.placement=reward"),
    ],
)
def test_no_recipe_can_ask_for_a_wrong_price(tiny_recipe, price):
    with pytest.raises(RecipeError, match=r"kl\.estimator"):
        tiny_recipe(*price)


def test_at_the_optimum_every_response_returns_the_same():
    # R − β U = β log Z for every y: the zero-variance property that makes k1 in the reward noiseless at π*.
    returns = RESPONSES.rewards - (BEST.log() - RHO.log())
    assert returns.tolist() == pytest.approx([1.20734544] * 15, abs=1e-6)
    assert leave_one_out(returns, 15).abs().max().item() < 1e-12
    assert math.exp(1.20734544) == pytest.approx((RHO * RESPONSES.rewards.exp()).sum().item(), abs=1e-6)
