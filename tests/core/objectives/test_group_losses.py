"""The expected gradients of the policy losses of groups, by listing TinyLM's responses; sums by hand, not by kltune."""

import pytest
import torch
from torch import Tensor

from kltune.core.objectives.advantages import group_centred, group_normalized
from kltune.core.objectives.group_losses import averaged, sequence_logprobs, weighted_policy_loss
from kltune.core.objectives.losses import clip_fraction, clipped_policy_loss
from tests.oracles import Responses, tiny_policy_logits

RESPONSES = Responses()
OLD = tiny_policy_logits()
NEW = OLD + 0.5 * torch.cos(5.0 * torch.arange(21, dtype=torch.float64)).view(7, 3)
CHANCES = RESPONSES.probabilities(OLD)
MASK, LENGTHS = RESPONSES.mask, RESPONSES.lengths
GAIN = RESPONSES.rewards - (CHANCES * RESPONSES.rewards).sum()        # advantage in a group that never ends
LIMIT = MASK.shape[1]


def slopes(logits: Tensor) -> Tensor:
    """∇ log π of each token of each response. [15, T, 7, 3]"""
    found = torch.zeros(*MASK.shape, 7, 3, dtype=torch.float64)
    table = torch.softmax(logits, -1)
    for row, t in MASK.nonzero().tolist():
        state, token = RESPONSES.states[row, t], RESPONSES.tokens[row, t]
        found[row, t, state] = torch.nn.functional.one_hot(token, 3) - table[state]
    return found


def by_hand(coefficients: Tensor, logits: Tensor) -> Tensor:
    """−Σ_y P_old(y) Σ_t coefficient_{y,t} ∇ log π_t. [7, 3]"""
    return -torch.einsum("b,bt,btsv->sv", CHANCES, coefficients * MASK, slopes(logits))


def ratios() -> Tensor:
    return (RESPONSES.logprobs(NEW) - RESPONSES.logprobs(OLD)).exp()


def gradient(logits: Tensor, loss: str, average: str, **clip: float) -> Tensor:
    """What a loss's gradient tends to: each response alone, by its probability. [7, 3]"""
    logits = logits.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    now, old = RESPONSES.logprobs(logits), RESPONSES.logprobs(OLD)
    for row in range(15):
        some, count = slice(row, row + 1), int(LENGTHS[row])
        mask, advantages = MASK[some], torch.where(MASK[some], GAIN[row], 0.0)
        advantages = averaged(advantages, mask, average, tokens=count, responses=1, limit=LIMIT)
        if loss == "cispo":
            part = weighted_policy_loss(now[some], old[some], advantages, mask, clip["low"], clip["high"], count)
        else:
            mine = sequence_logprobs(now[some], old[some], mask) if loss == "sequence" else now[some]
            part = clipped_policy_loss(mine, old[some], advantages, mask, clip["low"], count, clip["high"])
        total = total + CHANCES[row] * (part if average != "tokens" else part * count)
    total.backward()
    return logits.grad


def listed() -> Tensor:
    """∇ E[reward] of the policy that sampled."""
    logits = OLD.clone().requires_grad_()
    (RESPONSES.probabilities(logits) * RESPONSES.rewards).sum().backward()
    return logits.grad


@pytest.mark.parametrize("loss", ["clip", "cispo"])
def test_on_policy_an_average_by_the_limit_has_the_gradient_of_the_score(loss):
    assert torch.allclose(gradient(OLD, loss, "limit", low=0.2, high=0.2), -listed() / LIMIT, atol=1e-12)


def test_an_average_by_each_response_has_another():
    found = gradient(OLD, "clip", "responses", low=0.2, high=0.2)
    assert torch.allclose(found, by_hand((GAIN / LENGTHS)[:, None].expand(MASK.shape), OLD), atol=1e-12)
    assert torch.nn.functional.cosine_similarity(found.flatten(), -listed().flatten(), dim=0) < 0.99


def test_tokens_are_those_of_the_batch():
    advantages = torch.where(MASK, GAIN[:, None], 0.0)
    count = int(MASK.sum())
    assert averaged(advantages, MASK, "tokens", tokens=count, responses=15, limit=LIMIT) is advantages
    for average, weights in (("limit", torch.full((15,), 1.0 / (15 * LIMIT))), ("responses", 1.0 / (15 * LENGTHS))):
        found = averaged(advantages, MASK, average, tokens=count, responses=15, limit=LIMIT) / count
        assert torch.allclose(found, advantages * weights[:, None].double(), atol=1e-12)


def test_gspo_clips_whole_responses():
    mean = (ratios().log() * MASK).sum(1) / LENGTHS
    ratio, low, high = mean.exp(), 0.05, 0.1
    keeps = torch.where(GAIN > 0, ratio <= 1 + high, ratio >= 1 - low)
    wanted = by_hand((ratio * GAIN * keeps / LENGTHS)[:, None].expand(MASK.shape), NEW)
    assert 0 < keeps.sum() < 15
    assert torch.allclose(gradient(NEW, "sequence", "responses", low=low, high=high), wanted, atol=1e-12)
    on_policy = gradient(OLD, "sequence", "responses", low=low, high=high)
    assert torch.allclose(on_policy, gradient(OLD, "clip", "responses", low=0.2, high=0.2), atol=1e-12)


def test_cispo_keeps_the_gradient_that_the_clip_takes_away():
    weight = ratios().clamp(1 - 0.1, 1 + 0.2)
    found = gradient(NEW, "cispo", "tokens", low=0.1, high=0.2)
    assert torch.allclose(found, by_hand(weight * GAIN[:, None], NEW), atol=1e-12)
    assert not torch.allclose(found, gradient(NEW, "clip", "tokens", low=0.1, high=0.2), atol=1e-2)


@pytest.mark.parametrize("high", [0.2, 0.28])
def test_dapo_lets_tokens_gain_a_little_more(high):
    w, gain = ratios(), GAIN[:, None]
    keeps = torch.where(gain > 0, w <= 1 + high, w >= 1 - 0.2)
    found = gradient(NEW, "clip", "tokens", low=0.2, high=high)
    assert torch.allclose(found, by_hand(w * gain * keeps, NEW), atol=1e-12)
    clipped = (((w > 1 + high) | (w < 1 - 0.2)) & MASK).sum() / MASK.sum()
    now, old = RESPONSES.logprobs(NEW), RESPONSES.logprobs(OLD)
    assert clip_fraction(now, old, MASK, 0.2, int(MASK.sum()), high).item() == pytest.approx(clipped.item())


def test_without_the_spread_of_a_group_the_gradient_is_the_scores_and_with_it_another():
    # all groups of two responses, each by its probability; a response of a group of n counts (n − 1)/n times
    pairs = torch.cartesian_prod(torch.arange(15), torch.arange(15))
    chances = CHANCES[pairs].prod(dim=1)
    whole = {"dr_grpo": group_centred, "grpo": group_normalized}
    found = {}
    for name, function in whole.items():
        advantages = function(RESPONSES.rewards[pairs].flatten(), 2).view(-1, 2)
        found[name] = torch.einsum("p,pi,pisv->sv", chances, advantages, slopes(OLD).sum(1)[pairs]) / 2
    assert torch.allclose(found["dr_grpo"], listed() / 2, atol=1e-12)
    assert torch.nn.functional.cosine_similarity(found["grpo"].flatten(), listed().flatten(), dim=0) < 0.998


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="tokens is 0"):
        weighted_policy_loss(*(torch.zeros(1, 1) for _ in range(3)), torch.ones(1, 1, dtype=torch.bool), 0.2, 0.2, 0)
