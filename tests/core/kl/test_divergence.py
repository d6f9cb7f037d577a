"""The four measurements of KL against closed forms: MATH 1.3, 1.4, 8.1 and 8.2."""

import math

import pytest
import torch

from kltune.core.kl.divergence import compare, kl_exact, kl_k1, kl_k2, kl_k3
from kltune.core.tensors import log_distribution, per_response, token_logprobs
from tests.oracles import (
    BANDIT_REFERENCE,
    BANDIT_REWARDS,
    STATES,
    Responses,
    kl,
    log_partition,
    tilt,
    tiny_policy_logits,
    tiny_reference_logits,
    variance,
)

ESTIMATORS = [kl_k1, kl_k2, kl_k3]


def everywhere(x: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(x, dtype=torch.bool)


def estimates(estimator, policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The estimator at each arm of two listed distributions."""
    return estimator(policy.log()[None], reference.log()[None], everywhere(policy[None]))[0]


@pytest.mark.parametrize(
    ("estimator", "values", "mean", "sd"),
    [
        (kl_k1, [0.470004, -0.916291], 0.192745, 0.554518),
        (kl_k2, [0.110452, 0.419794], 0.172320, None),
        (kl_k3, [0.095004, 0.583709], 0.192745, 0.195482),
    ],
)
def test_estimators_of_a_biased_coin(estimator, values, mean, sd):
    policy, reference = torch.tensor([0.8, 0.2], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    k = estimates(estimator, policy, reference)
    assert k.tolist() == pytest.approx(values, abs=1e-6)
    assert (policy * k).sum().item() == pytest.approx(mean, abs=1e-6)
    if sd is not None:
        assert math.sqrt(variance(policy, k)) == pytest.approx(sd, abs=1e-6)


def test_exact_kl_of_a_biased_coin_in_both_directions():
    policy, reference = torch.tensor([[0.8, 0.2]]).double().log(), torch.tensor([[0.5, 0.5]]).double().log()
    assert kl_exact(policy, reference, 1.0).item() == pytest.approx(0.192745, abs=1e-6)
    assert kl_exact(reference, policy, 1.0).item() == pytest.approx(0.223144, abs=1e-6)


@pytest.mark.parametrize("gap", [0.1, 1.0, 2.0])
def test_moments_between_two_gaussians(gap):
    # N(d, 1) against N(0, 1): KL = d²/2, and the moments of MATH 1.3 in closed form, here by quadrature on a grid
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


def test_k3_keeps_its_digits_where_the_models_nearly_agree():
    # u = 1e-4: k3 = u²/2 − u³/6 + …; exp(−u) − 1 + u in float32 would have one digit left, at best
    logprobs = torch.tensor([[-1.0]], dtype=torch.float32)
    u = (logprobs - (logprobs - 1e-4)).item()
    k3 = kl_k3(logprobs, logprobs - 1e-4, everywhere(logprobs)).item()
    assert k3 == pytest.approx(u * u / 2, rel=0.02)


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


def test_large_log_ratios_are_not_clamped():
    logprobs, ref_logprobs = torch.tensor([[-0.5]]), torch.tensor([[-60.5]])
    assert kl_k1(logprobs, ref_logprobs, everywhere(logprobs)).item() == 60.0
    assert kl_k3(ref_logprobs, logprobs, everywhere(logprobs)).item() == pytest.approx(math.exp(60), rel=1e-5)


def test_exact_kl_of_a_model_with_itself_is_exactly_zero():
    logits = torch.randn(20, 500, generator=torch.Generator().manual_seed(0))
    assert (kl_exact(logits, logits.clone(), 0.7) == 0).all()


def test_exact_kl_does_not_feel_a_constant_added_to_the_logits():
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 20, 500, generator=generator)
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


def test_saying_what_the_reference_cannot_is_infinitely_far():
    d = kl_exact(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -math.inf]]), 1.0)
    assert d.item() == math.inf


def test_logits_that_are_no_numbers_are_passed_on():
    assert kl_exact(torch.tensor([[0.0, math.nan]]), torch.zeros(1, 2), 1.0).isnan().all()


def test_the_variance_of_the_log_ratio_is_that_of_k1():
    policy, reference = torch.tensor([[0.8, 0.2]]).double().log(), torch.tensor([[0.5, 0.5]]).double().log()
    assert compare(policy, reference).log_ratio_variance.item() == pytest.approx(0.554518**2, abs=1e-6)
    impossible = torch.tensor([[0.0, -math.inf]])
    assert compare(impossible, impossible).log_ratio_variance.item() == 0.0


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


def test_a_token_of_probability_zero_adds_no_entropy():
    logprobs = torch.log_softmax(torch.tensor([[0.0, 0.0, -math.inf]]), dim=-1)
    assert compare(logprobs, logprobs).entropy.item() == pytest.approx(math.log(2.0))


def test_the_entropies_of_tiny_lm_are_those_of_its_fifteen_responses():
    responses = Responses()
    for logits, expected in ((POLICY, 2.40009531), (REFERENCE, 2.46041251)):
        p = responses.probabilities(logits)
        logprobs = logits.log_softmax(-1)
        by_token = (compare(logprobs, logprobs).entropy[responses.states] * responses.mask).sum(-1)
        assert -(p * p.log()).sum().item() == pytest.approx(expected, abs=1e-7)
        assert (p * by_token).sum().item() == pytest.approx(expected, abs=1e-7)


def test_one_pass_finds_the_same_kl_as_the_differentiable_one():
    logits = torch.randn(40, 17, generator=torch.Generator().manual_seed(0))
    ref_logits = logits + 0.3 * torch.randn(40, 17, generator=torch.Generator().manual_seed(1))
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


def test_temperature_divides_both_models():
    p, q = torch.tensor([0.8, 0.2]).double(), torch.tensor([0.5, 0.5]).double()
    # at τ = ½ the odds 4 : 1 become 16 : 1
    expected = 16 / 17 * math.log(32 / 17) + 1 / 17 * math.log(2 / 17)
    assert kl_exact(p.log()[None], q.log()[None], 0.5).item() == pytest.approx(expected, abs=1e-9)


# --- ORACLE-D: two steps for which the exact KL has more variance than k1 (MATH 1.3) ---


def two_steps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, C and probability of the four responses of the counterexample."""
    policy = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.01, 0.99]]).double().log()       # at '', at 0, at 1
    reference = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.99, 0.01]]).double().log()
    tokens = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    states = torch.stack([torch.zeros(4, dtype=torch.int64), 1 + tokens[:, 0]], dim=-1)
    mask = torch.ones(4, 2, dtype=torch.bool)
    logprobs = token_logprobs(policy[states], tokens, 1.0)
    u = per_response(kl_k1(logprobs, token_logprobs(reference[states], tokens, 1.0), mask), mask)
    c = per_response(kl_exact(policy[states], reference[states], 1.0), mask)
    return u, c, logprobs.sum(-1).exp()


def test_exact_and_k1_have_the_same_mean_on_the_counterexample():
    u, c, p = two_steps()
    assert (p * u).sum().item() == pytest.approx(2.3954498, abs=1e-7)
    assert (p * c).sum().item() == pytest.approx(2.3954498, abs=1e-7)


def test_exact_kl_need_not_have_less_variance_than_k1():
    u, c, p = two_steps()
    m = u - c
    assert variance(p, u) == pytest.approx(3.3159136, abs=1e-7)
    assert variance(p, c) == pytest.approx(5.0697417, abs=1e-6)
    assert variance(p, c + 1.71825 * m) == pytest.approx(2.9445761, abs=1e-6)


# --- ORACLE-A: the bandit of MATH 8.1 ---

BANDIT = [
    (0.5, [0.00742401, 0.04114233, 0.20266865, 0.74876501], 1.39880433, 2.69277466, 3.98674499, 1.986745),
    (1.0, [0.08507291, 0.17343910, 0.31430424, 0.42718375], 0.53564290, 2.08359884, 1.54795593, 0.547956),
    (2.0, [0.21203942, 0.26219543, 0.28819146, 0.23757369], 0.14095738, 1.55129941, 0.63469233, 0.134692),
    (4.0, [0.30151090, 0.29036074, 0.24855372, 0.15957464], 0.03388964, 1.26619211, 0.28265839, 0.032658),
]


@pytest.mark.parametrize(("beta", "optimum", "reverse", "reward", "log_z", "forward"), BANDIT)
def test_the_bandits_optimum(beta, optimum, reverse, reward, log_z, forward):
    best = tilt(BANDIT_REFERENCE, BANDIT_REWARDS, beta)
    assert best.tolist() == pytest.approx(optimum, abs=1e-8)
    assert (best * BANDIT_REWARDS).sum().item() == pytest.approx(reward, abs=1e-8)
    assert log_partition(BANDIT_REFERENCE, BANDIT_REWARDS, beta) == pytest.approx(log_z, abs=1e-8)
    policy, reference = best.log()[None], BANDIT_REFERENCE.log()[None]
    assert kl_exact(policy, reference, 1.0).item() == pytest.approx(reverse, abs=1e-8)
    assert kl_exact(reference, policy, 1.0).item() == pytest.approx(forward, abs=1e-6)
    for estimator in (kl_k1, kl_k3):
        assert (best * estimates(estimator, best, BANDIT_REFERENCE)).sum().item() == pytest.approx(reverse, abs=1e-8)


@pytest.mark.parametrize(
    ("target", "beta", "feed_forward"),
    [
        (0.05, 3.31248663, 3.162),
        (0.1, 2.36581549, 2.236),
        (0.25, 1.50281465, 1.414),
        (0.5, 1.03993107, 1.000),
        (1.0, 0.66895260, 0.707),
    ],
)
def test_the_price_that_buys_a_target_is_near_its_feed_forward(target, beta, feed_forward):
    best = tilt(BANDIT_REFERENCE, BANDIT_REWARDS, beta)
    assert kl_exact(best.log()[None], BANDIT_REFERENCE.log()[None], 1.0).item() == pytest.approx(target, abs=1e-7)
    spread = math.sqrt(variance(BANDIT_REFERENCE, BANDIT_REWARDS))
    assert spread == pytest.approx(1.0)
    assert spread / math.sqrt(2 * target) == pytest.approx(feed_forward, abs=1e-3)
    assert feed_forward == pytest.approx(beta, rel=0.06)


# --- ORACLE-B: TinyLM, the `eval-kl` fixture of MATH 8.2 ---

POLICY, REFERENCE = tiny_policy_logits(), tiny_reference_logits()


def measured(policy: torch.Tensor, reference: torch.Tensor, temperature: float = 1.0, longest: int = 3):
    """U and C of every response through kltune.core, and the responses."""
    responses = Responses(longest)
    states, mask = responses.states, responses.mask
    logprobs = token_logprobs(policy[states], responses.tokens, temperature)
    ref_logprobs = token_logprobs(reference[states], responses.tokens, temperature)
    u = per_response(kl_k1(logprobs, ref_logprobs, mask), mask)
    c = per_response(kl_exact(policy[states], reference[states], temperature), mask)
    return u, c, responses


def test_tiny_lm_has_fifteen_responses_of_which_seven_end():
    responses = Responses()
    assert len(responses.names) == 15
    assert sum("E" in name for name in responses.names) == 7
    assert responses.probabilities(POLICY).sum().item() == pytest.approx(1.0, abs=1e-12)


def test_divergence_of_the_fixture():
    u, c, responses = measured(POLICY, REFERENCE)
    p = responses.probabilities(POLICY)
    assert kl(p, responses.probabilities(REFERENCE)) == pytest.approx(0.11253952, abs=1e-8)
    assert (p * u).sum().item() == pytest.approx(0.11253952, abs=1e-8)
    assert (p * c).sum().item() == pytest.approx(0.11253952, abs=1e-8)
    assert variance(p, u) == pytest.approx(0.193111, abs=1e-6)
    assert variance(p, c) == pytest.approx(0.002980, abs=1e-6)


def test_token_k3_of_the_fixture_is_unbiased():
    responses = Responses()
    logprobs = token_logprobs(POLICY[responses.states], responses.tokens, 1.0)
    ref_logprobs = token_logprobs(REFERENCE[responses.states], responses.tokens, 1.0)
    k3 = per_response(kl_k3(logprobs, ref_logprobs, responses.mask), responses.mask)
    assert (responses.probabilities(POLICY) * k3).sum().item() == pytest.approx(0.11253952, abs=1e-8)


def test_forward_divergence_of_the_fixture_comes_from_the_references_responses():
    u, c, responses = measured(REFERENCE, POLICY)
    q = responses.probabilities(REFERENCE)
    assert (q * c).sum().item() == pytest.approx(0.12869274, abs=1e-8)
    assert (q * u).sum().item() == pytest.approx(0.12869274, abs=1e-8)
    assert 0.11253952 + (q * c).sum().item() == pytest.approx(0.24123226, abs=1e-8)       # Jeffreys


def test_divergence_of_the_fixture_per_token_is_a_ratio_of_sums():
    u, c, responses = measured(POLICY, REFERENCE)
    p, lengths = responses.probabilities(POLICY), responses.lengths
    mean_length = (p * lengths).sum().item()
    assert mean_length == pytest.approx(2.415901, abs=1e-6)
    assert (p * c).sum().item() / mean_length == pytest.approx(0.04658283, abs=1e-8)
    assert (p * u / lengths).sum().item() == pytest.approx(0.01402, abs=1e-5)             # the mean to avoid
    assert p[["E" not in name for name in responses.names]].sum().item() == pytest.approx(0.362289, abs=1e-6)


def test_divergence_of_the_fixture_at_each_state():
    expected = [0.04913360, 0.01012785, 0.08258103, 0.05356131, 0.02884387, 0.12758787, 0.02952511]
    assert len(STATES) == len(expected)
    assert kl_exact(POLICY, REFERENCE, 1.0).tolist() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("longest", "expected"), [(1, 0.049134), (2, 0.086986), (3, 0.112540)])
def test_divergence_of_the_fixture_grows_with_the_length_allowed(longest, expected):
    u, c, responses = measured(POLICY, REFERENCE, longest=longest)
    p = responses.probabilities(POLICY)
    assert (p * c).sum().item() == pytest.approx(expected, abs=1e-6)
    assert (p * u).sum().item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("temperature", "expected"), [(0.7, 0.188646), (1.3, 0.0733)])
def test_divergence_of_the_fixture_at_another_temperature_of_both(temperature, expected):
    u, c, responses = measured(POLICY, REFERENCE, temperature)
    p = responses.probabilities(POLICY / temperature)
    assert (p * c).sum().item() == pytest.approx(expected, abs=5e-5 if temperature > 1 else 1e-6)
    assert (p * u).sum().item() == pytest.approx((p * c).sum().item(), abs=1e-12)


def test_divergence_of_the_fixture_with_only_the_policy_at_another_temperature():
    _, c, responses = measured(POLICY / 0.7, REFERENCE)
    assert (responses.probabilities(POLICY / 0.7) * c).sum().item() == pytest.approx(0.218411, abs=1e-6)


def test_the_mean_over_tokens_of_each_response_can_have_the_wrong_sign():
    u, _, responses = measured(POLICY, REFERENCE, 1.3)
    p = responses.probabilities(POLICY / 1.3)
    assert (p * u / responses.lengths).sum().item() == pytest.approx(-0.0045, abs=5e-5)


def test_sampling_at_one_temperature_and_scoring_at_another_shows_as_disagreement():
    u, c, responses = measured(POLICY, REFERENCE)
    wrong = responses.probabilities(POLICY / 0.7)
    assert (wrong * u).sum().item() == pytest.approx(0.189833, abs=1e-6)
    assert (wrong * c).sum().item() == pytest.approx(0.110564, abs=1e-6)
    assert (wrong * (u - c)).sum().item() == pytest.approx(0.07927, abs=1e-5)
    assert math.sqrt(variance(wrong, u - c)) == pytest.approx(0.392, abs=5e-4)


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Logits with everything outside the smallest set of mass ``top_p`` at −∞."""
    p, order = torch.softmax(logits, -1).sort(-1, descending=True)
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) - p >= top_p)
    return logits.masked_fill(dropped, -torch.inf)


def test_divergence_of_a_nucleus_sampler():
    filtered = nucleus(POLICY, 0.8)
    responses = Responses()
    p = responses.probabilities(filtered).nan_to_num(0.0)
    c = per_response(kl_exact(filtered, REFERENCE, 1.0)[responses.states], responses.mask)
    assert (p * c).sum().item() == pytest.approx(0.579609, abs=1e-6)
    kept = REFERENCE.masked_fill(filtered == -torch.inf, -torch.inf)      # ρ renormalised on π's kept set
    c = per_response(kl_exact(filtered, kept, 1.0)[responses.states], responses.mask)
    assert (p * c).sum().item() == pytest.approx(0.046278, abs=1e-6)


@pytest.mark.parametrize(
    ("beta", "log_z", "reward", "reverse"),
    [
        (0.5, 3.11853005, 2.13258167, 1.14663329),
        (1.0, 1.20734544, 1.61987106, 0.41252563),
        (2.0, 0.49643673, 1.21141421, 0.10927038),
    ],
)
def test_the_optimum_of_tiny_lm(beta, log_z, reward, reverse):
    responses = Responses()
    rho = responses.probabilities(REFERENCE)
    best = tilt(rho, responses.rewards, beta)
    assert log_partition(rho, responses.rewards, beta) == pytest.approx(log_z, abs=1e-8)
    assert (best * responses.rewards).sum().item() == pytest.approx(reward, abs=1e-8)
    u, c, _ = measured(responses.logits_of(best), REFERENCE)
    assert (best * c).sum().item() == pytest.approx(reverse, abs=1e-8)
    # at the optimum R − βU is the same for every response (MATH 2.4)
    assert (responses.rewards - beta * u).tolist() == pytest.approx([beta * log_z] * 15, abs=1e-8)


def test_the_table_of_tiny_lms_optimum():
    responses = Responses()
    rho = responses.probabilities(REFERENCE)
    best = dict(zip(responses.names, tilt(rho, responses.rewards, 1.0).tolist(), strict=True))
    expected = {
        "E": 0.057828, "aE": 0.148858, "bE": 0.030717, "aaE": 0.095754, "abE": 0.064096, "baE": 0.031379,
        "bbE": 0.021186, "aaa": 0.156700, "aab": 0.099321, "aba": 0.083954, "abb": 0.054637, "baa": 0.082206,
        "bab": 0.041919, "bba": 0.017576, "bbb": 0.013868,
    }
    assert best == pytest.approx(expected, abs=1e-6)
    assert (rho * responses.rewards).sum().item() == pytest.approx(0.77951751, abs=1e-8)
    assert variance(rho, responses.rewards) == pytest.approx(0.81509021, abs=1e-8)


def test_what_is_missing_to_the_optimum_is_the_divergence_from_it():
    # J* − J(π) = β KL(π ‖ π*), for a policy that is neither (MATH 2.4)
    responses = Responses()
    beta, rho, p = 0.5, responses.probabilities(REFERENCE), responses.probabilities(POLICY)
    best = tilt(rho, responses.rewards, beta)
    u, _, _ = measured(POLICY, REFERENCE)
    objective = (p * (responses.rewards - beta * u)).sum().item()
    _, to_best, _ = measured(POLICY, responses.logits_of(best))
    missing = beta * log_partition(rho, responses.rewards, beta) - objective
    assert missing == pytest.approx(beta * (p * to_best).sum().item(), abs=1e-10)


def test_at_the_reference_what_is_missing_is_the_forward_divergence():
    responses = Responses()
    rho = responses.probabilities(REFERENCE)
    best = tilt(rho, responses.rewards, 1.0)
    assert kl(rho, best) == pytest.approx(0.42782793, abs=1e-8)
    assert 1.20734544 - (rho * responses.rewards).sum().item() == pytest.approx(0.42782793, abs=1e-8)


def test_a_nat_more_costs_the_variance_of_the_reward():
    # dKL*/d log β = −Var_{π*}(r)/β² (MATH 2.4), by a central difference
    step, beta = 1e-4, 2.0
    ends = [tilt(BANDIT_REFERENCE, BANDIT_REWARDS, beta * math.exp(s)).log()[None] for s in (step, -step)]
    high, low = (kl_exact(end, BANDIT_REFERENCE.log()[None], 1.0).item() for end in ends)
    best = tilt(BANDIT_REFERENCE, BANDIT_REWARDS, beta)
    assert (high - low) / (2 * step) == pytest.approx(-variance(best, BANDIT_REWARDS) / beta**2, rel=1e-6)
    # the log-log gain of MATH 3.1: about 2.03 at KL .141
    assert variance(best, BANDIT_REWARDS) / beta**2 / 0.14095738 == pytest.approx(2.03, abs=5e-3)


def test_log_distribution_is_what_the_oracle_tables_use():
    torch.testing.assert_close(log_distribution(POLICY, 1.0), POLICY - POLICY.logsumexp(-1, keepdim=True))
