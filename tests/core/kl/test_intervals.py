"""Standard errors and intervals by hand, against printed tables, and by how often intervals cover."""

import math

import numpy as np
import pytest
import torch

from kltune.core.kl.divergence import kl_exact, kl_k1
from kltune.core.kl.intervals import KLSummary, agreement_z, clustered_share, student_t_quantile, summarize, wilson
from kltune.core.tensors import per_response, token_logprobs
from tests.oracles import Responses, tiny_policy_logits, tiny_reference_logits


def one_each(nats: list[float] | np.ndarray | torch.Tensor, **kwargs) -> KLSummary:
    """Every response its own prompt, 10 tokens long."""
    nats = torch.as_tensor(nats, dtype=torch.float64)
    return summarize("exact", nats, torch.full_like(nats, 10.0), torch.arange(len(nats)), **kwargs)


@pytest.mark.parametrize(
    ("confidence", "degrees", "t"),
    [
        (0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.95, 3, 3.1824), (0.95, 4, 2.7764), (0.95, 5, 2.5706),
        (0.95, 9, 2.2622), (0.95, 10, 2.2281), (0.95, 30, 2.0423), (0.95, 120, 1.9799), (0.95, 100_000, 1.9600),
        (0.90, 1, 6.3138), (0.90, 7, 1.8946), (0.80, 2, 1.8856), (0.50, 1, 1.0000),
        (0.99, 1, 63.6567), (0.99, 2, 9.9248), (0.99, 8, 3.3554), (0.99, 40, 2.7045), (0.999, 6, 5.9588),
    ],
)  # fmt: skip
def test_t_quantiles_are_those_of_the_printed_table(confidence, degrees, t):
    assert student_t_quantile(confidence, degrees) == pytest.approx(t, abs=5.1e-5)


@pytest.mark.parametrize(("confidence", "degrees"), [(0.0, 5), (1.0, 5), (math.nan, 5), (0.95, 0)])
def test_t_quantiles_that_do_not_exist_are_refused(confidence, degrees):
    with pytest.raises(ValueError, match="confidence"):
        student_t_quantile(confidence, degrees)


def test_three_prompts_by_hand():
    # prompt means 1, 2, 6: mean 3, sd √7, se √(7/3), t₂ = 4.3027; deviations −2, −1, 3: n_eff = 14²/98 = 2, so the
    # prompt that was not drawn lies 4 · 3 above the mean, the most, and the end is further than t's
    summary = summarize(
        "exact", torch.tensor([0.0, 2.0, 1.0, 3.0, 5.0, 7.0]), torch.full((6,), 4), torch.tensor([0, 0, 1, 1, 2, 2])
    )
    assert (summary.responses, summary.tokens, summary.prompts) == (6, 24, 3)
    assert summary.nats_per_response == pytest.approx(3.0)
    assert summary.stderr == pytest.approx(math.sqrt(7 / 3))
    low, high = summary.ci
    assert 3 + 4.302653 * math.sqrt(7 / 3) < high < 21.0
    assert low == pytest.approx(3 - 4.302653 * math.sqrt(7 / 3), abs=1e-5)
    assert summary.nats_per_token == pytest.approx(0.75)
    assert summary.token_stderr == pytest.approx(math.sqrt(7 / 3) / 4)
    assert summary.token_ci == pytest.approx(tuple(end / 4 for end in summary.ci))


def test_a_prompt_asked_more_often_weighs_more():
    # prompt 0 three times at 1, prompt 1 once at 5: Σ/Σ = 8/4 = 2, residuals 3 − 2·3 = −3 and 5 − 2 = 3,
    # se = √(2/1 · 18)/4 = 1.5
    summary = summarize("exact", torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.ones(4), torch.tensor([0, 0, 0, 1]))
    assert summary.nats_per_response == pytest.approx(2.0)
    assert summary.stderr == pytest.approx(1.5)


def test_nats_per_token_is_a_ratio_of_sums_with_its_own_standard_error():
    # R = 9/30; residuals 2 − 3, 3 − 3, 4 − 3; √(1 + 0 + 1)/(3 · 10) · √(3/2)
    summary = summarize("exact", torch.tensor([2.0, 3.0, 4.0]), torch.tensor([10, 10, 10]), torch.arange(3))
    assert summary.nats_per_token == pytest.approx(0.3)
    assert summary.token_stderr == pytest.approx(math.sqrt(2) / 30 * math.sqrt(1.5))
    # and where nats follow length exactly, the rate is known exactly
    summary = summarize("exact", torch.tensor([1.0, 2.0, 5.0]), torch.tensor([2, 4, 10]), torch.arange(3))
    assert summary.nats_per_token == pytest.approx(0.5)
    assert summary.token_stderr == pytest.approx(0.0, abs=1e-12)
    assert summary.stderr > 1.0


def test_copies_of_a_response_do_not_make_its_prompt_surer():
    nats = torch.rand(40, generator=torch.Generator().manual_seed(0))
    once = one_each(nats)
    twice = summarize("exact", nats.repeat(2), torch.full((80,), 10), torch.arange(40).repeat(2))
    assert twice.stderr == pytest.approx(once.stderr)
    assert twice.ci == pytest.approx(once.ci)
    assert twice.responses == 80


def test_prompts_are_told_apart_by_any_integers_in_any_order():
    nats, tokens = torch.rand(6, generator=torch.Generator().manual_seed(0)), torch.ones(6)
    plain = summarize("exact", nats, tokens, torch.tensor([0, 0, 1, 1, 2, 2]))
    order = torch.tensor([5, 0, 3, 2, 4, 1])
    odd = summarize("exact", nats[order], tokens, torch.tensor([70, 70, -1, -1, 9, 9])[order])
    assert odd.ci == pytest.approx(plain.ci)


def test_one_prompt_has_no_standard_error_and_equal_prompts_leave_no_doubt():
    summary = summarize("exact", torch.tensor([1.0, 2.0]), torch.tensor([3, 3]), torch.tensor([0, 0]))
    assert summary.nats_per_response == pytest.approx(1.5)
    assert summary.stderr is summary.ci is summary.token_stderr is summary.token_ci is None
    summary = one_each(torch.zeros(20))
    assert (summary.stderr, summary.ci) == (0.0, (0.0, 0.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_shown_and_has_no_interval(bad):
    summary = one_each([1.0, bad, 2.0])
    assert not math.isfinite(summary.nats_per_response)
    assert summary.ci is summary.stderr is None


@pytest.mark.parametrize(
    ("nats", "tokens", "prompts", "message"),
    [([], [], [], "at least 1"), ([1.0], [1.0, 2.0], [0], "one length"), ([1.0], [1.0], [0, 1], "one length"),
     ([1.0], [0.0], [0], "at least one token")],
)  # fmt: skip
def test_what_is_no_list_of_responses_is_refused(nats, tokens, prompts, message):
    with pytest.raises(ValueError, match=message):
        summarize("exact", torch.tensor(nats), torch.tensor(tokens), torch.tensor(prompts))


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, math.nan])
def test_a_confidence_that_is_no_probability_is_refused(confidence):
    with pytest.raises(ValueError, match="confidence"):
        one_each([1.0, 2.0], confidence=confidence)


def test_the_same_numbers_give_the_same_interval_and_more_confidence_a_wider_one():
    nats = np.random.default_rng(0).gamma(1.5, size=50)
    assert one_each(nats).ci == one_each(nats).ci
    (low95, high95), (low99, high99) = one_each(nats).ci, one_each(nats, confidence=0.99).ci
    assert low99 < low95 < high95 < high99


def test_the_interval_of_a_normal_kl_is_students_and_a_skewed_ones_reaches_further_up():
    nats = np.random.default_rng(0).normal(3.0, 1.0, size=400)
    summary = one_each(nats)
    assert summary.stderr == pytest.approx(nats.std(ddof=1) / math.sqrt(400))
    for end in summary.ci:
        assert abs(end - summary.nats_per_response) == pytest.approx(1.9659 * summary.stderr, rel=0.05)
    summary = one_each(np.random.default_rng(0).gamma(1.5, size=60))
    low, high = summary.ci
    assert high - summary.nats_per_response > 1.1 * (summary.nats_per_response - low)


def coverage(draw, truth: float, prompts: int, times: int) -> float:
    """How often the 95 % interval of fresh samples holds the truth."""
    rng = np.random.default_rng(1)
    intervals = (one_each(draw(rng, prompts)).ci for _ in range(times))
    return sum(low <= truth <= high for low, high in intervals) / times


@pytest.mark.parametrize("prompts", [5, 16, 64])
def test_intervals_of_a_skewed_kl_cover_it(prompts):
    # gamma(1.5), like an exact KL; ± t covers .905 at 16
    assert 0.93 <= coverage(lambda rng, n: rng.gamma(1.5, size=n), 1.5, prompts, times=400) <= 0.985


@pytest.mark.parametrize("prompts", [2, 3, 20])
def test_intervals_of_a_normal_kl_cover_it(prompts):
    assert 0.92 <= coverage(lambda rng, n: rng.normal(3.0, 1.0, size=n), 3.0, prompts, times=500) <= 0.985


def test_one_odd_prompt_among_equal_ones_gives_a_finite_interval():
    low, high = one_each([0.0] * 9 + [0.5]).ci
    assert math.isfinite(low)
    assert 0.2 < high < 1.0


# z of k1 − exact: does the sampler draw from the distribution that is scored?


def sampled(temperature: float, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k1, exact KL and prompt of TinyLM responses sampled at a temperature and scored at 1."""
    policy, reference, responses = tiny_policy_logits(), tiny_reference_logits(), Responses()
    logprobs = token_logprobs(policy[responses.states], responses.tokens, 1.0)
    ref_logprobs = token_logprobs(reference[responses.states], responses.tokens, 1.0)
    u = per_response(kl_k1(logprobs, ref_logprobs, responses.mask), responses.mask)
    c = per_response(kl_exact(policy, reference, 1.0)[responses.states], responses.mask)
    generator = torch.Generator().manual_seed(seed)
    rows = responses.probabilities(policy / temperature).multinomial(count, replacement=True, generator=generator)
    return u[rows], c[rows], torch.arange(count) // 2


def test_a_wrong_sampling_temperature_is_detected():
    # M = k1 − exact: E[M] = .07927, sd .392: z near 12.8 at n = 4000; with the variance that honest sampling implies,
    # about .18, it is smaller
    u, c, prompts = sampled(0.7, 4000, seed=0)
    assert agreement_z(u, c, prompts) == pytest.approx(12.8, abs=3.0)
    assert agreement_z(u, c, prompts, torch.full_like(u, 0.18)) > 8.0


def test_the_right_sampler_is_not_accused():
    zs = [agreement_z(*sampled(1.0, 400, seed)) for seed in range(40)]
    assert max(map(abs, zs)) < 4.0
    assert np.std(zs) == pytest.approx(1.0, abs=0.35)


def test_identical_models_agree_and_rounding_is_no_disagreement():
    assert agreement_z(torch.zeros(8), torch.zeros(8), torch.arange(8)) == 0.0
    assert abs(agreement_z(torch.full((8,), 3e-7), torch.zeros(8), torch.arange(8))) < 0.1


@pytest.mark.parametrize(("gap", "prompts"), [([-1.0, -1.0, 3.0, 3.0], [0, 0, 1, 1]), ([-1.0, 3.0], [7, 7])])
def test_agreement_is_by_prompt_and_within_one_prompt_by_response(gap, prompts):
    # means of two prompts, or two responses of one: −1 and 3; mean 1, sd √8, se √8/√2 = 2
    assert agreement_z(torch.tensor(gap), torch.zeros(len(gap)), torch.tensor(prompts)) == pytest.approx(0.5)


def test_a_nearly_certain_policy_is_not_accused_for_lack_of_rare_tokens():
    # 256 responses of one token, said with probability .999 and .5: none of the thousandth ones was drawn
    often, rare = math.log(0.999 / 0.5), math.log(0.001 / 0.5)
    exact = 0.999 * often + 0.001 * rare
    u, c = torch.full((256,), often, dtype=torch.float64), torch.full((256,), exact, dtype=torch.float64)
    implied = torch.full((256,), 0.999 * 0.001 * (often - rare) ** 2, dtype=torch.float64)
    assert agreement_z(u, c, torch.arange(256)) > 4.0
    # .001·Δ·√n / (√(.999·.001)·Δ)
    assert agreement_z(u, c, torch.arange(256), implied) == pytest.approx(0.016 / math.sqrt(0.999 * 0.001), rel=1e-6)


def test_agreement_that_cannot_be_known_is_nan():
    assert math.isnan(agreement_z(torch.ones(1), torch.zeros(1), torch.zeros(1)))
    assert math.isnan(agreement_z(torch.tensor([1.0, math.inf]), torch.zeros(2), torch.arange(2)))


def test_the_floor_is_what_more_answers_to_the_same_prompts_cannot_lower():
    # 40 prompts with own means of sd 2, 8 answers each of sd 1: se² = 2²/40 + 1²/320, of which the first part stays
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40), 8)
    means = rng.normal(5.0, 1.0, 40)
    means = 2.0 * (means - means.mean()) / means.std(ddof=1) + 5.0
    noise = rng.normal(size=(40, 8))
    noise -= noise.mean(1, keepdims=True)
    noise /= math.sqrt((noise**2).sum() / (320 - 40))
    nats = torch.tensor((means[:, None] + noise).ravel())
    summary = summarize("exact", nats, torch.full((320,), 10.0), torch.tensor(prompts))
    assert summary.stderr == pytest.approx(2.0 / math.sqrt(40))     # the noise has mean 0 within each prompt here
    assert summary.floor == pytest.approx(math.sqrt(4.0 / 40 - 1.0 / 320))
    assert summary.token_floor == pytest.approx(summary.floor / 10)


def test_prompts_that_do_not_differ_leave_no_floor_and_one_answer_each_does_not_tell():
    nats = torch.tensor(np.random.default_rng(0).normal(size=400))
    assert summarize("exact", nats, torch.ones(400), torch.arange(400) // 40).floor < 0.05
    assert one_each(nats).floor is None


@pytest.mark.parametrize("confidence", [0.99, 0.999])
def test_a_normal_kls_far_tails_are_students_too(confidence):
    nats = np.random.default_rng(3).normal(5.0, 1.0, 60)
    summary = one_each(nats, confidence=confidence)
    half = student_t_quantile(confidence, 59) * summary.stderr
    assert summary.ci[1] - summary.ci[0] == pytest.approx(2 * half, rel=0.15)


@pytest.mark.parametrize(("share", "count", "low", "high"), [
    (0.5, 100, 0.40383, 0.59617), (0.0, 10, 0.0, 0.27753), (1.0, 10, 0.72247, 1.0), (0.9, 20, 0.69896, 0.97214),
    (0.8, 10, 0.49016, 0.94332),        # Agresti and Coull 1998: 0.490 to 0.943
])
def test_wilson_by_published_numbers(share, count, low, high):
    found = wilson(share, count)
    assert found == pytest.approx((low, high), abs=5e-5)
    assert 0.0 <= found[0] < found[1] <= 1.0


@pytest.mark.parametrize("p", [0.55, 0.7, 0.9])
def test_wilsons_interval_covers_what_it_says(p):
    # Exactly, over all outcomes of 40 trials; Wilson's coverage swings around its level.
    held = [k for k in range(41) if wilson(k / 40, 40)[0] <= p <= wilson(k / 40, 40)[1]]
    assert 0.92 < sum(math.comb(40, k) * p**k * (1 - p) ** (40 - k) for k in held) < 0.98


def test_a_share_of_pairs_that_repeat_their_prompts_is_worth_fewer_pairs():
    outcomes = torch.tensor([1.0] * 30 + [0.0] * 10)
    each = clustered_share(outcomes, torch.arange(40))
    assert each == pytest.approx((0.75, *wilson(0.75, 40)))
    # four pairs of each prompt that all come out alike are ten outcomes: p(1 − p)/se² = 9, as of sd²/10 with n − 1
    assert clustered_share(outcomes, torch.arange(40) // 4)[1] < wilson(0.75, 12)[0]
    assert clustered_share(torch.ones(40), torch.arange(40) // 4) == pytest.approx((1.0, *wilson(1.0, 10)))
