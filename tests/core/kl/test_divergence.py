"""The four measurements of KL against closed forms, a bandit whose optimum is known, and all TinyLM can say."""

import math

import pytest
import torch

from kltune.core.kl.divergence import compare, kl_exact, kl_k1, kl_k2, kl_k3
from kltune.core.tensors import per_response, token_logprobs
from tests.oracles import (
    BANDIT_REFERENCE,
    BANDIT_REWARDS,
    Responses,
    tilt,
    tiny_policy_logits,
    tiny_reference_logits,
    variance,
)

ESTIMATORS = [kl_k1, kl_k2, kl_k3]
POLICY, REFERENCE = tiny_policy_logits(), tiny_reference_logits()
COIN, FAIR = torch.tensor([0.8, 0.2], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)


def everywhere(x: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(x, dtype=torch.bool)


def estimates(estimator, policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The estimator at each arm of two listed distributions."""
    return estimator(policy.log()[None], reference.log()[None], everywhere(policy[None]))[0]


@pytest.mark.parametrize(
    ("estimator", "values", "mean", "sd"),
    [
        (kl_k1, [0.470004, -0.916291], 0.192745, 0.554518),
        (kl_k2, [0.110452, 0.419794], 0.172320, 0.123737),
        (kl_k3, [0.095004, 0.583709], 0.192745, 0.195482),
    ],
)
def test_estimators_of_a_biased_coin(estimator, values, mean, sd):
    k = estimates(estimator, COIN, FAIR)
    assert k.tolist() == pytest.approx(values, abs=1e-6)
    assert (COIN * k).sum().item() == pytest.approx(mean, abs=1e-6)
    assert math.sqrt(variance(COIN, k)) == pytest.approx(sd, abs=1e-6)


def test_exact_kl_of_a_biased_coin_in_both_directions_and_at_another_temperature():
    policy, reference = COIN.log()[None], FAIR.log()[None]
    assert kl_exact(policy, reference, 1.0).item() == pytest.approx(0.192745, abs=1e-6)
    assert kl_exact(reference, policy, 1.0).item() == pytest.approx(0.223144, abs=1e-6)
    # at τ = ½ the odds 4 : 1 become 16 : 1
    colder = 16 / 17 * math.log(32 / 17) + 1 / 17 * math.log(2 / 17)
    assert kl_exact(policy, reference, 0.5).item() == pytest.approx(colder, abs=1e-9)


@pytest.mark.parametrize("gap", [0.1, 1.0, 2.0])
def test_moments_between_two_gaussians(gap):
    # N(d, 1) against N(0, 1): KL = d²/2, sd(k1) = d, E k2 = d²/2 + d⁴/8, …, here by quadrature on a grid
    x = torch.linspace(gap - 14, gap + 14, 200_001, dtype=torch.float64)
    policy, reference = -0.5 * (x - gap).square(), -0.5 * x.square()
    weights = torch.softmax(policy, dim=0)
    k1, k2, k3 = (f(policy[None], reference[None], everywhere(x[None]))[0] for f in ESTIMATORS)
    means = [(weights * k).sum().item() for k in (k1, k2, k3)]
    sds = [math.sqrt(variance(weights, k)) for k in (k1, k2, k3)]
    d2 = gap * gap
    assert means == pytest.approx([d2 / 2, d2 / 2 + d2**2 / 8, d2 / 2], rel=1e-6)
    assert sds == pytest.approx(
        [gap, 0.5 * math.sqrt(2 * d2**2 + d2**3), math.sqrt(math.exp(d2) - 1 - d2)], rel=1e-6
    )


@pytest.mark.parametrize(("gap", "k3", "rel"), [(1e-4, 0.5e-8, 0.02), (-60.0, math.exp(60.0), 1e-5)])
def test_k3_keeps_its_digits_where_the_models_nearly_agree_and_large_log_ratios_are_not_clamped(gap, k3, rel):
    # u = 1e-4: k3 = u²/2 − u³/6 + …; exp(−u) − 1 + u in float32 would have one digit left, at best
    logprobs = torch.tensor([[gap]])
    assert kl_k3(logprobs, torch.zeros(1, 1), everywhere(logprobs)).item() == pytest.approx(k3, rel=rel)
    assert kl_k1(logprobs, torch.zeros(1, 1), everywhere(logprobs)).item() == pytest.approx(gap)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates_are_zero_in_the_padding_whatever_lies_there(estimator):
    mask = torch.tensor([[True, False, False]])
    logprobs = torch.tensor([[-1.0, math.nan, -math.inf]], requires_grad=True)
    k = estimator(logprobs, torch.tensor([[-2.0, 5.0, math.nan]]), mask)
    k.sum().backward()
    assert k[0, 1:].tolist() == [0.0, 0.0]
    assert logprobs.grad[0, 1:].tolist() == [0.0, 0.0]
    assert logprobs.grad.isfinite().all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates_refuse_shapes_that_would_broadcast(estimator):
    with pytest.raises(ValueError, match="ref_logprobs"):
        estimator(torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 3, dtype=torch.bool))


def test_exact_kl_of_a_model_with_itself_is_exactly_zero_and_feels_no_constant_added_to_the_logits():
    logits, ref_logits = torch.randn(2, 20, 500, generator=torch.Generator().manual_seed(0))
    assert (kl_exact(logits, logits.clone(), 0.7) == 0).all()
    shifted = kl_exact(logits + 8.0, ref_logits - 4.0, 1.0)
    torch.testing.assert_close(shifted, kl_exact(logits, ref_logits, 1.0), atol=2e-6, rtol=0.0)


def test_exact_kl_survives_a_near_copy_of_a_large_flat_model_in_float32():
    # Σ e^a (a − b) alone comes out below −1e-6 here: each normaliser is rounded at log V = 10.4
    generator = torch.Generator().manual_seed(0)
    logits = 0.1 * torch.randn(64, 32_000, generator=generator)
    ref_logits = logits + 1e-4 * torch.randn(64, 32_000, generator=generator)
    exact = kl_exact(logits.double(), ref_logits.double(), 1.0)           # about 5e-9 nats
    torch.testing.assert_close(kl_exact(logits, ref_logits, 1.0).double(), exact, atol=2e-8, rtol=0.0)


def test_exact_kl_is_never_negative_and_rounding_is_all_that_is_lifted():
    generator = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(64, 4_000, generator=generator)
    ref_logits = logits + 1e-5 * torch.randn(64, 4_000, generator=generator)
    a, b = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    d = kl_exact(logits.requires_grad_(), ref_logits, 1.0)
    d.sum().backward()
    assert (d >= 0).all()
    assert (d < 2e-7).all()
    # the gradient is π (a − b − D), also where the value was lifted to 0
    expected = a.exp() * (a - b - (a.exp() * (a - b)).sum(-1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected, atol=3e-7, rtol=0.0)


def test_a_token_neither_model_can_say_adds_nothing():
    logits = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    ref_logits = torch.tensor([[1.0, 0.0, -math.inf]])
    d = kl_exact(logits, ref_logits, 1.0)
    d.sum().backward()
    # p = σ(±1): KL = (σ(1) − σ(−1)) · 1 = tanh(½)
    assert d.item() == pytest.approx(math.tanh(0.5))
    assert logits.grad.isfinite().all()


def test_saying_what_the_reference_cannot_is_infinitely_far_and_no_number_is_passed_on():
    d = kl_exact(torch.tensor([[0.0, 0.0], [0.0, math.nan]]), torch.tensor([[0.0, -math.inf], [0.0, 0.0]]), 1.0)
    assert d[0].item() == math.inf
    assert d[1].isnan()


def test_the_variance_of_the_log_ratio_is_that_of_k1():
    assert compare(COIN.log(), FAIR.log()).log_ratio_variance.item() == pytest.approx(0.554518**2, abs=1e-6)
    impossible = torch.tensor([[0.0, -math.inf]])
    assert compare(impossible, impossible).log_ratio_variance.item() == 0.0


def measured(policy: torch.Tensor, reference: torch.Tensor, temperature: float = 1.0, longest: int = 3):
    """k1 and exact KL of every response of TinyLM, U and C, and the responses."""
    responses = Responses(longest)
    states, mask = responses.states, responses.mask
    logprobs = token_logprobs(policy[states], responses.tokens, temperature)
    ref_logprobs = token_logprobs(reference[states], responses.tokens, temperature)
    u = per_response(kl_k1(logprobs, ref_logprobs, mask), mask)
    c = per_response(kl_exact(policy[states], reference[states], temperature), mask)
    return u, c, responses


def test_along_a_response_it_sums_to_the_variance_of_k1_less_exact():
    # M = U − C is a martingale: its variance is the mean of the summed conditional ones
    u, c, responses = measured(POLICY, REFERENCE)
    p = responses.probabilities(POLICY)
    by_state = compare(POLICY.log_softmax(-1), REFERENCE.log_softmax(-1)).log_ratio_variance
    implied = per_response(by_state[responses.states], responses.mask)
    assert (p * implied).sum().item() == pytest.approx(variance(p, u - c), abs=1e-12)


def test_entropy_of_known_odds():
    odds = torch.tensor([[1.0, 2.0, 5.0], [1.0, 1.0, 1.0]])
    logprobs = (odds / odds.sum(-1, keepdim=True)).log()
    by_hand = -(math.log(1 / 8) + 2 * math.log(2 / 8) + 5 * math.log(5 / 8)) / 8
    found = compare(logprobs, logprobs.flip(0))
    torch.testing.assert_close(found.entropy, torch.tensor([by_hand, math.log(3.0)]))
    torch.testing.assert_close(found.ref_entropy, torch.tensor([math.log(3.0), by_hand]))
    impossible = torch.log_softmax(torch.tensor([[0.0, 0.0, -math.inf]]), dim=-1)      # adds nothing
    assert compare(impossible, impossible).entropy.item() == pytest.approx(math.log(2.0))


def test_one_pass_finds_the_same_kl_as_the_differentiable_one():
    logits, ref_logits = torch.randn(2, 40, 17, generator=torch.Generator().manual_seed(0))
    found = compare(logits.log_softmax(-1), ref_logits.log_softmax(-1))
    assert torch.equal(found.kl, kl_exact(logits, ref_logits, 1.0))


def test_the_parts_of_the_vocabulary_add_up_to_the_kl_and_none_is_negative():
    # π = (.5, .5, 0), ρ = (.25, .25, .5): the given-up token's part is its ρ; each of the others .5 log 2 + .25 − .5
    policy, reference = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    parts = compare(policy, reference, by_token=True).by_token.nats
    raised = 0.5 * math.log(2.0) - 0.25
    torch.testing.assert_close(parts, torch.tensor([raised, raised, 0.5]))
    assert parts.sum().item() == pytest.approx(compare(policy, reference).kl.item()) == pytest.approx(math.log(2.0))


def test_exact_kl_refuses_two_vocabularies():
    with pytest.raises(ValueError, match=r"ref_logits \[2, 4\]"):
        kl_exact(torch.zeros(2, 3), torch.zeros(2, 4), 1.0)


# the bandit with four arms: β, KL(π* ‖ ρ), KL(ρ ‖ π*), and the β that hold a target


@pytest.mark.parametrize(
    ("beta", "reverse", "forward"),
    [
        (0.5, 1.39880433, 1.986745), (1.0, 0.53564290, 0.547956), (2.0, 0.14095738, 0.134692),
        (4.0, 0.03388964, 0.032658), (3.31248663, 0.05, None), (2.36581549, 0.1, None), (1.50281465, 0.25, None),
        (1.03993107, 0.5, None), (0.66895260, 1.0, None),
    ],
)
def test_the_bandits_optimum(beta, reverse, forward):
    best = tilt(BANDIT_REFERENCE, BANDIT_REWARDS, beta)
    policy, reference = best.log()[None], BANDIT_REFERENCE.log()[None]
    assert kl_exact(policy, reference, 1.0).item() == pytest.approx(reverse, abs=1e-8)
    if forward is not None:
        assert kl_exact(reference, policy, 1.0).item() == pytest.approx(forward, abs=1e-6)
    for estimator in (kl_k1, kl_k3):
        assert (best * estimates(estimator, best, BANDIT_REFERENCE)).sum().item() == pytest.approx(reverse, abs=1e-8)


# TinyLM, π against ρ: all fifteen responses


def test_divergence_of_tiny_lm():
    u, c, responses = measured(POLICY, REFERENCE)
    p = responses.probabilities(POLICY)
    k3 = kl_k3(responses.logprobs(POLICY), responses.logprobs(REFERENCE), responses.mask).sum(-1)
    assert [(p * k).sum().item() for k in (u, c, k3)] == pytest.approx([0.11253952] * 3, abs=1e-8)
    assert [variance(p, u), variance(p, c)] == pytest.approx([0.193111, 0.002980], abs=1e-6)
    entropy = compare(POLICY.log_softmax(-1), REFERENCE.log_softmax(-1)).entropy[responses.states]
    assert (p * per_response(entropy, responses.mask)).sum().item() == pytest.approx(2.40009531, abs=1e-7)
    by_state = [0.04913360, 0.01012785, 0.08258103, 0.05356131, 0.02884387, 0.12758787, 0.02952511]
    assert kl_exact(POLICY, REFERENCE, 1.0).tolist() == pytest.approx(by_state, abs=1e-8)


def test_forward_divergence_comes_from_the_references_responses():
    u, c, responses = measured(REFERENCE, POLICY)
    q = responses.probabilities(REFERENCE)
    assert [(q * k).sum().item() for k in (u, c)] == pytest.approx([0.12869274] * 2, abs=1e-8)


def test_divergence_per_token_is_a_ratio_of_sums_and_no_mean_of_ratios():
    u, c, responses = measured(POLICY, REFERENCE)
    p, lengths = responses.probabilities(POLICY), responses.lengths
    assert ((p * c).sum() / (p * lengths).sum()).item() == pytest.approx(0.04658283, abs=1e-8)
    assert (p * u / lengths).sum().item() == pytest.approx(0.01402, abs=1e-5)
    # which can even have the wrong sign
    u, p = measured(POLICY, REFERENCE, 1.3)[0], responses.probabilities(POLICY / 1.3)
    assert (p * u / lengths).sum().item() == pytest.approx(-0.0045, abs=5e-5)


@pytest.mark.parametrize(
    ("longest", "temperature", "expected", "tolerance"),
    [(1, 1.0, 0.049134, 1e-6), (2, 1.0, 0.086986, 1e-6), (3, 0.7, 0.188646, 1e-6), (3, 1.3, 0.0733, 5e-5)],
)
def test_divergence_at_another_length_and_another_temperature_of_both(longest, temperature, expected, tolerance):
    u, c, responses = measured(POLICY, REFERENCE, temperature, longest)
    p = responses.probabilities(POLICY / temperature)
    assert (p * c).sum().item() == pytest.approx(expected, abs=tolerance)
    assert (p * u).sum().item() == pytest.approx((p * c).sum().item(), abs=1e-12)


@pytest.mark.parametrize(
    ("beta", "log_z", "reverse"),
    [(0.5, 3.11853005, 1.14663329), (1.0, 1.20734544, 0.41252563), (2.0, 0.49643673, 0.10927038)],
)
def test_at_the_optimum_score_less_price_is_the_same_for_every_response(beta, log_z, reverse):
    # π* = ρ e^{r/β} / Z: r(y) − β U(y) = β log Z
    responses = Responses()
    best = tilt(responses.probabilities(REFERENCE), responses.rewards, beta)
    u, c, _ = measured(responses.logits_of(best), REFERENCE)
    assert (best * c).sum().item() == pytest.approx(reverse, abs=1e-8)
    assert (responses.rewards - beta * u).tolist() == pytest.approx([beta * log_z] * 15, abs=1e-8)
