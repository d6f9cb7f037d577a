"""Verdicts by hand: what passes, what is open, what would settle it, and how often looking in turn is wrong.

The search for α on KL curves that are known.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from kltune.core.kl.gate import (
    GRID,
    AlphaPoint,
    Verdict,
    confidence_per_look,
    largest_alpha,
    looks,
    standing,
    verdict,
)
from kltune.core.kl.intervals import KLSummary, summarize
from tests.core.kl.test_intervals import one_each

SUMMARY = KLSummary(
    "exact", 5.0, 0.5, None, (4.0, 6.2), 0.25, 0.05, None, (0.15, 0.35), 100, 2000, 50, 0.95
)  # fmt: skip


@pytest.mark.parametrize(
    ("max_kl", "unit", "expected"),
    [
        (6.2, "nats_per_response", "pass"),          # the upper end itself is within
        (6.19, "nats_per_response", "inconclusive"),
        (4.0, "nats_per_response", "inconclusive"),
        (3.99, "nats_per_response", "fail"),
        (0.35, "nats_per_token", "pass"),
        (0.2, "nats_per_token", "inconclusive"),
        (0.1, "nats_per_token", "fail"),
    ],
)
def test_verdicts_at_the_ends_of_the_interval(max_kl, unit, expected):
    result = verdict(SUMMARY, max_kl, unit)
    assert result.verdict == expected
    assert (result.more_responses is None) == (expected != "inconclusive")


def test_an_open_verdict_says_how_many_more_responses_would_settle_it():
    # below: reach 1.5 up, distance .75: four times the responses.  above: reach 1 down, distance .5: the same
    assert verdict(replace(SUMMARY, ci=(4.0, 6.5)), 5.75, "nats_per_response") == Verdict("inconclusive", 300)
    assert verdict(SUMMARY, 4.5, "nats_per_response") == Verdict("inconclusive", 300)
    assert verdict(SUMMARY, 4.0, "nats_per_response") == Verdict("inconclusive", 1)
    assert verdict(SUMMARY, 5.0, "nats_per_response") == Verdict("inconclusive", None)      # on the budget: none does


def test_that_many_more_responses_do_settle_it():
    # the same spread and mean again, in as many responses as asked for: all but a percent of the way in
    nats = np.random.default_rng(1).gamma(2.0, size=250)
    summary = one_each(nats)
    budget = summary.nats_per_response + 0.1
    more = verdict(summary, budget).more_responses
    assert 250 < more < 2500
    settled = one_each(np.resize(nats, 250 + more))
    assert settled.ci[1] == pytest.approx(budget, abs=0.02)


def test_identical_models_hold_any_budget_and_one_prompt_is_inconclusive_however_far_it_is():
    assert verdict(one_each(torch.zeros(64)), 0.0).verdict == "pass"
    summary = summarize("exact", torch.tensor([0.1, 0.2]), torch.tensor([3, 3]), torch.tensor([0, 0]))
    assert verdict(summary, 1e6) == Verdict("inconclusive", wants_prompts=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_passes_no_gate(bad):
    for broken in (
        one_each([1.0, bad, 2.0]),
        replace(SUMMARY, nats_per_response=bad),
        replace(SUMMARY, ci=(4.0, bad)),
        replace(SUMMARY, ci=(bad, 6.0)),
    ):
        with pytest.raises(ValueError, match="no verdict"):
            verdict(broken, 100.0)
    with pytest.raises(ValueError, match="no verdict"):
        verdict(SUMMARY, bad)


@pytest.mark.parametrize(("options", "words"), [({"confidence": 0.99}, "confidence"), ({"unit": "bits"}, "per_token")])
def test_a_verdict_at_another_confidence_than_the_intervals_or_in_no_unit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        verdict(SUMMARY, 8.0, **options)


def test_a_budget_that_rounding_alone_could_reach_is_neither_passed_nor_failed():
    numbers = torch.from_numpy(np.random.default_rng(0).normal(1.0, 0.2, 400))
    summary = summarize("exact", numbers, torch.full((400,), 10), torch.arange(400))
    low, high = summary.ci
    for max_kl, rounding, expected in (
        (high + 0.01, 0.0, "pass"), (high + 0.01, 0.02, "inconclusive"), (high + 0.03, 0.02, "pass"),
        (low - 0.01, 0.0, "fail"), (low - 0.01, 0.02, "inconclusive"), (low - 0.03, 0.02, "fail"),
    ):
        found = verdict(summary, max_kl, rounding=rounding)
        assert found.verdict == expected
        assert (found.reason or "").startswith("rounding in the weights' dtype alone makes 0.02 of it") == (
            expected == "inconclusive"
        )


def test_where_all_prompts_were_answered_only_the_answers_part_of_the_error_shrinks():
    # se .5, of which .3 stays; the budget .75 above: half 1.2 must shrink to .75, se to .3125 (floor .3)
    #   n' = 100 · (.25 − .09) / (.09765625 − .09) = 2089.8
    summary = replace(SUMMARY, floor=0.3)
    open_one = verdict(summary, 5.75, fresh_prompts=False)
    assert open_one == Verdict("inconclusive", math.ceil(100 * 0.16 / (0.3125**2 - 0.09)) - 100)
    assert verdict(summary, 5.75).more_responses < 200      # further prompts shrink all of it
    # and if se would have to fall below what stays, no number of answers tells
    assert verdict(replace(SUMMARY, floor=0.4), 5.75, fresh_prompts=False) == Verdict("inconclusive", None, True)


def test_few_responses_pass_a_far_budget_and_not_a_near_one_and_say_why():
    # 2 % of the responses stay away from 182 of them with a chance of .98^182 = .0253, from 183 with .0248
    nats = np.random.default_rng(3).gamma(1.5, size=400)
    few, enough = one_each(nats[:182]), one_each(nats[:183])
    near = verdict(few, few.ci[1])
    assert near == Verdict("inconclusive", 1)
    assert near.reason.startswith("182 responses cannot show what 2% of them may do, 183 can")
    assert verdict(few, few.ci[1] + (1 - 0.025 ** (1 / 182)) * 10 * nats[:182].max()).verdict == "pass"
    assert verdict(enough, enough.ci[1]) == Verdict("pass")
    assert standing(few, few.ci[1]) == "within"
    surer = one_each(nats[:183], confidence=0.99)
    assert verdict(surer, surer.ci[1], confidence=0.99) == Verdict("inconclusive", 263 - 183)    # .98^263 = .00493


def test_a_spread_of_few_responses_passes_no_near_budget_however_many_were_drawn():
    nats = np.full(1000, 1.0)
    nats[:6] = 100.0                                # n_eff is all but 6
    summary = one_each(nats)
    found = verdict(summary, summary.ci[1])
    assert summary.effective_responses == pytest.approx(6.0, rel=0.03)
    assert found.verdict == "inconclusive"
    assert 900 < found.more_responses < 1100
    assert "about 6 of the 1000 responses" in found.reason
    assert verdict(summary, 10 * summary.ci[1]).verdict == "pass"


def test_per_token_the_spread_is_that_of_the_nats_per_token():
    tokens = 2.5 * np.arange(1.0, 401.0)
    nats = 0.02 * tokens
    nats[7] = 45.0                      # of 20 tokens: among the largest by response, and alone by token
    summary = summarize("exact", torch.tensor(nats), torch.tensor(tokens), torch.arange(400))
    assert summary.effective_responses > 30.0 > 1.1 > summary.token_effective
    found = verdict(summary, summary.token_ci[1], "nats_per_token")
    assert (found.verdict, found.reason[:24]) == ("inconclusive", "the spread sits in about")


def test_few_prompts_are_said_whatever_the_verdict():
    nats = np.random.default_rng(4).gamma(4.0, size=(8, 40))
    summary = summarize("exact", torch.tensor(nats.ravel()), torch.ones(320), torch.arange(320) // 40)
    for budget, expected in ((100.0, "pass"), (0.1, "fail"), (summary.nats_per_response, "inconclusive")):
        found = verdict(summary, budget)
        assert found.verdict == expected
        assert "8 prompts say little of others" in found.reason


def test_looks_double_up_to_the_most_and_each_has_its_share_of_the_doubt():
    assert looks(256, 4096) == (256, 512, 1024, 2048, 4096)
    assert looks(100, 350) == (100, 200, 350)
    assert looks(500, 300) == (300,)
    assert confidence_per_look(0.95, 5) == pytest.approx(0.99)
    assert confidence_per_look(0.9, 1) == 0.9


def test_looking_until_it_is_decided_is_wrong_no_more_often_than_it_says():
    # A policy exactly on its budget: every pass or fail is wrong, so deciding at all must happen at most 5 % of the
    # time. One 95 % interval a look would be wrong in about 14 % of such runs.
    rng = np.random.default_rng(0)
    counts = looks(200, 3200)
    wrong = {"corrected": 0, "naive": 0}
    for _ in range(300):
        nats = rng.gamma(4.0, 1.25, counts[-1])      # mean 5
        for name, level in (("corrected", confidence_per_look(0.95, len(counts))), ("naive", 0.95)):
            for count in counts:
                if verdict(one_each(nats[:count], confidence=level), 5.0, confidence=level).verdict != "inconclusive":
                    wrong[name] += 1
                    break
    assert wrong["corrected"] <= 0.05 * 300
    assert wrong["naive"] > 0.08 * 300


def test_within_a_cap_is_the_whole_interval_and_beyond_it_the_estimate():
    summary = one_each([4.0, 5.0, 6.0, 5.0])  # 5 nats, 0.5 per token, and some interval around it
    low, high = summary.ci
    assert low < 5.0 < high
    assert standing(summary, high) == "within"
    assert standing(summary, 0.5 * (5.0 + high)) == "open"
    assert standing(summary, 5.0) == "open"
    assert standing(summary, 4.99) == "beyond"
    assert standing(summary, 0.49, "nats_per_token") == "beyond"
    assert standing(summary, summary.token_ci[1], "nats_per_token") == "within"


def test_one_prompt_proves_nothing_and_what_is_no_number_is_beyond_any_cap():
    assert standing(one_each([1.0]), 5.0) == "open"
    assert standing(one_each([1.0, math.nan]), 5.0) == "beyond"
    assert standing(one_each([1.0, math.inf]), 5.0) == "beyond"


# the search for α


class Curve:
    """KL as a function of α, without noise; ``margin`` is how far the bound lies above it. Counts its calls."""

    def __init__(self, kl, margin=0.0):
        self.kl, self.margin, self.calls = kl, margin, []

    def __call__(self, alpha):
        self.calls.append(alpha)
        return AlphaPoint(alpha, self.kl(alpha), 0.01, self.kl(alpha) + self.margin)


@pytest.mark.parametrize("power", [1.0, 1.7, 2.0, 3.0])
@pytest.mark.parametrize("budget", [0.01, 0.5, 4.0, 7.9])
def test_a_power_law_is_met_from_below_within_the_tolerance(power, budget):
    curve = Curve(lambda alpha: 8.0 * alpha**power)
    found = largest_alpha(curve, budget)
    assert 0.99 * budget <= 8.0 * found.alpha**power <= budget
    assert len(curve.calls) <= len(GRID) + 8
    assert found.falls == ()


def test_an_adapter_within_its_budget_is_left_as_it_is():
    curve = Curve(lambda alpha: 3.0 * alpha)
    assert largest_alpha(curve, 4.0).alpha == 1.0
    assert curve.calls == [1.0]


def bent(alpha):
    """Linear at first, and then steep: no power law."""
    return 0.2 * alpha if alpha < 0.6 else 0.12 + 30 * (alpha - 0.6)


def unknown(alpha):
    """One prompt, or a single response that overflows: the bound is unknown until alpha is small."""
    return math.inf if alpha > 0.4 else 8 * alpha**2


@pytest.mark.parametrize(("kl", "margin", "budget", "least", "most"), [
    (lambda alpha: 8.0 * alpha**2, 0.5, 4.0, 3.46, 3.5),        # it is the bound that must meet the budget
    (bent, 0.0, 1.0, 0.97, 1.0), (unknown, 0.0, 4.0, 8 * 0.35**2, 8 * 0.4**2),
    (lambda alpha: 5.0 * (alpha > 0.0), 0.0, 1.0, 0.0, 0.0),    # no alpha meets it: the answer is none of the adapter
])
def test_a_curve_that_is_no_power_law_is_met_from_below_too(kl, margin, budget, least, most):
    assert least <= kl(largest_alpha(Curve(kl, margin), budget).alpha) <= most


def test_a_kl_that_falls_is_said_and_the_largest_alpha_within_is_found():
    # within below .3 and again between .7 and .8
    def kl(alpha):
        return {1.0: 9.0, 0.75: 0.5, 0.5: 5.0, 0.25: 0.4}.get(alpha, 0.5 + 20 * (alpha - 0.75))

    found = largest_alpha(Curve(kl), 1.0)
    assert 0.75 < found.alpha < 0.8
    assert found.falls == ((0.5, 0.75),)


def test_noise_alone_is_no_fall():
    curve = Curve(lambda alpha: 2.0 - 0.02 * alpha)
    assert largest_alpha(curve, 5.0, grid=(1.0, 0.5)).falls == ()
    assert largest_alpha(curve, 1.0, grid=(1.0, 0.5), tries=0).falls == ()
