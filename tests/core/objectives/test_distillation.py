"""The gradient of distillation, by listing every response of TinyLM; nothing listed here uses kltune."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kltune.core.kl.divergence import kl_exact
from kltune.core.kl.fused_head import read_logprobs_and_head
from kltune.core.objectives.distillation import (
    expected_after,
    head_and_tail,
    token_loss,
    whole_response_loss,
)
from tests.oracles import Responses, tiny_policy_logits, tiny_reference_logits

RESPONSES = Responses()
REFERENCE, POLICY = tiny_reference_logits(), tiny_policy_logits()
TEACHER = REFERENCE + 1.1 * torch.sin(3.0 * torch.arange(21, dtype=torch.float64)).view(7, 3)
ONE_STEP_ON = POLICY + 0.3 * torch.cos(5.0 * torch.arange(21, dtype=torch.float64)).view(7, 3)
PRICE = 0.7


def listed_gradient(logits: Tensor) -> Tensor:
    """∇ [KL(π ‖ teacher) + c KL(π ‖ reference)] over whole responses, from their probabilities. [7, 3]"""
    logits = logits.clone().requires_grad_()
    (RESPONSES.kl(logits, TEACHER) + PRICE * RESPONSES.kl(logits, REFERENCE)).backward()
    return logits.grad


def cost_from(logits: Tensor, old: Tensor, k: int, tail: bool = True, usual: Tensor | float = 0.0) -> Tensor:
    """The same where the teacher gives log-probs of its k likeliest tokens and of the one that was said. [B, T]"""
    states, theirs = RESPONSES.states, TEACHER.log_softmax(-1)[RESPONSES.states]
    heads = theirs.topk(k).indices
    usual = torch.zeros_like(RESPONSES.mask, dtype=torch.float64) + usual
    *_, head = read_logprobs_and_head(
        logits[states].flatten(0, 1), RESPONSES.tokens.flatten(), heads.flatten(0, 1),
        theirs.gather(-1, heads).flatten(0, 1), usual.flatten(), temperature=1.0, slopes=False,
    )
    outside = RESPONSES.mask & (heads != RESPONSES.tokens[..., None]).all(-1) & tail
    logprobs, said = RESPONSES.logprobs(logits), RESPONSES.logprobs(TEACHER)
    cost = head_and_tail(head.value.view(states.shape), logprobs, RESPONSES.logprobs(old), said, outside, usual)
    return cost + PRICE * kl_exact(logits[states], REFERENCE[states], 1.0)


def cost_at(logits: Tensor, states: Tensor) -> Tensor:
    """Exact KL to the teacher + c times that to the reference, where tokens are chosen. [B, T]"""
    mine = logits[states]
    return kl_exact(mine, TEACHER[states], 1.0) + PRICE * kl_exact(mine, REFERENCE[states], 1.0)


def expected_gradient(
    logits: Tensor, sampled_from: Tensor, *, horizon: str, expected: Tensor, **few: Any
) -> Tensor:
    """What the loss's gradient tends to on responses of ``sampled_from``: each response by its probability. [7, 3]"""
    logits = logits.clone().requires_grad_()
    costs = cost_from(logits, sampled_from, **few) if few else cost_at(logits, RESPONSES.states)
    logprobs, old = RESPONSES.logprobs(logits), RESPONSES.logprobs(sampled_from)
    probabilities = RESPONSES.probabilities(sampled_from)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(probabilities)):
        some, mask = slice(row, row + 1), RESPONSES.mask[row : row + 1]
        if horizon == "full":
            loss = whole_response_loss(costs[some], logprobs[some], old[some], mask, 1, expected[some])
        else:
            loss = token_loss(costs[some], mask, 1)
        total = total + probabilities[row] * loss
    total.backward()
    return logits.grad


NOTHING = torch.zeros_like(RESPONSES.states, dtype=torch.float64)
BY_PREFIX = torch.where(RESPONSES.mask, torch.sin(1.0 + RESPONSES.states), 0.0)       # of what comes before a token


@pytest.mark.parametrize("expected", [NOTHING, BY_PREFIX], ids=["no baseline", "a baseline"])
@pytest.mark.parametrize("now", [POLICY, ONE_STEP_ON], ids=["on policy", "a step on"])
def test_the_gradient_is_that_of_the_two_kls_of_whole_responses(now, expected):
    found = expected_gradient(now, POLICY, horizon="full", expected=expected)
    assert torch.allclose(found, listed_gradient(now), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("horizon", ["full", "token"])
@pytest.mark.parametrize("now", [POLICY, ONE_STEP_ON], ids=["on policy", "a step on"])
def test_a_few_tokens_of_the_teacher_and_the_one_that_was_said_give_the_gradient_of_all(now, horizon, k):
    asked = {"horizon": horizon, "expected": BY_PREFIX}
    whole = expected_gradient(now, POLICY, **asked)
    for usual in (0.0, -1.0, BY_PREFIX):
        found = expected_gradient(now, POLICY, **asked, k=k, usual=usual)
        assert torch.allclose(found, whole, rtol=0.0, atol=1e-6)
    if k < 3:       # which the head alone does not
        alone = expected_gradient(now, POLICY, **asked, k=k, tail=False)
        assert (alone - whole).norm() > 0.1 * whole.norm()


def test_at_the_teacher_nothing_is_left_of_the_noise_of_what_it_does_not_speak_of():
    logits, states = TEACHER.clone().requires_grad_(), RESPONSES.states
    cost = cost_from(logits, TEACHER, k=1) - PRICE * kl_exact(logits[states], REFERENCE[states], 1.0)
    assert cost.detach().abs().max() < 1e-12
    for row in range(15):
        (gradient,) = torch.autograd.grad(cost[row][RESPONSES.mask[row]].sum(), logits, retain_graph=True)
        assert gradient.abs().max() < 1e-12


def test_without_the_prefix_term_it_is_another():
    listed = listed_gradient(POLICY)
    found = expected_gradient(POLICY, POLICY, horizon="token", expected=NOTHING)
    assert (found - listed).norm() > 0.1 * listed.norm()


def test_a_baseline_of_what_usually_follows_makes_the_gradient_calmer():
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(RESPONSES.probabilities(POLICY), 64 * 200, replacement=True, generator=generator)
    gradients: dict[str, list[Tensor]] = {"none": [], "others": []}
    for rows in draws.split(64):
        states, mask = RESPONSES.states[rows], RESPONSES.mask[rows]
        for name, found in gradients.items():
            logits = POLICY.clone().requires_grad_()
            cost = cost_at(logits, states)
            logprobs = RESPONSES.logprobs(logits)[rows]
            expected = expected_after(cost, mask) if name == "others" else torch.zeros_like(cost)
            whole_response_loss(cost, logprobs, logprobs.detach(), mask, 64, expected.detach()).backward()
            found.append(logits.grad)
    noise = {name: torch.stack(found).var(dim=0).sum().item() for name, found in gradients.items()}
    means = {name: torch.stack(found).mean(dim=0) for name, found in gradients.items()}
    assert noise["others"] < 0.9 * noise["none"]
    assert (means["others"] - listed_gradient(POLICY)).norm() < 4.0 * (noise["others"] / 200) ** 0.5


def test_what_follows_is_the_mean_of_the_other_responses_that_are_as_long():
    cost = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 9.0], [32.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    # after each token: 6 4 0; 16 0; 0. Of the others: (16 + 0)/2, 0; (6 + 0)/2, 4; (6 + 16)/2
    assert expected_after(cost, mask).tolist() == [[8.0, 0.0, 0.0], [3.0, 4.0, 0.0], [11.0, 0.0, 0.0]]


def test_it_changes_no_value_and_micro_batches_add_up():
    mask, cost = RESPONSES.mask, kl_exact(POLICY, TEACHER, 1.0)[RESPONSES.states]
    new, old = RESPONSES.logprobs(ONE_STEP_ON), RESPONSES.logprobs(POLICY)
    whole = whole_response_loss(cost, new, old, mask, 15, BY_PREFIX)
    assert whole.item() == pytest.approx(whole_response_loss(cost, new, old, mask, 15, NOTHING).item(), abs=1e-12)
    parts = [slice(0, 4), slice(4, 15)]
    assert whole.item() == pytest.approx(sum(
        whole_response_loss(cost[p], new[p], old[p], mask[p], 15, BY_PREFIX[p]).item() for p in parts
    ))
    alone = sum(token_loss(cost[p], mask[p], 15).item() for p in parts)
    assert token_loss(cost, mask, 15).item() == pytest.approx(alone)


def test_a_count_of_nothing_is_refused():
    with pytest.raises(ValueError, match="responses is 0"):
        token_loss(NOTHING, RESPONSES.mask, 0)
