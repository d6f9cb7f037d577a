"""The watch on made-up series of evaluations."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from kltune.core.hacking.detector import Detector, chance_of_fewer, errors_of, pairs_of

STEADY = {
    "eval/prompts": 100, "eval/distinct_2_adjusted_stderr": 0.02, "eval/reference_distinct_2_adjusted_stderr": 0.02,
    "eval/response_tokens_stderr": 1.0, "eval/reference_response_tokens_stderr": 1.0,
    "eval/distinct_2_adjusted": 0.8, "eval/reference_distinct_2_adjusted": 0.8,
    "eval/duplicate_fraction": 0.01, "eval/reference_duplicate_fraction": 0.0,
    "eval/response_tokens": 30.0, "eval/reference_response_tokens": 30.0,
    "eval/end_fraction": 0.9, "eval/reference_end_fraction": 0.9,
}


def scored(gold, score, error=0.1):
    """An evaluation of a policy whose reference has gold 0 and score 0."""
    return {
        "eval/prompts": 100, "eval/gold_mean": gold, "eval/gold_stderr": error, "eval/score_mean": score,
        "eval/reference_gold_mean": 0.0, "eval/reference_gold_stderr": 0.1, "eval/reference_score_mean": 0.0,
    }


def heard(evaluations, looks=1):
    """What set in at which step of one evaluation in ten, and the watch after the last."""
    watch, seen = Detector(), []
    for place, metrics in enumerate(evaluations, start=1):
        watch, alarms = watch.observed(10 * place, metrics, looks)
        seen += [(10 * place, alarm.kind, alarm.found) for alarm in alarms]
    return seen, watch


def test_gold_that_falls_while_the_score_rises_is_said_once_with_its_figures():
    seen, watch = heard([scored(0.5, 1), scored(1.0, 2), scored(0.8, 3), scored(0.4, 4), scored(0.3, 5)])
    assert [(step, kind) for step, kind, _ in seen] == [(40, "gold")]
    assert seen[0][2] == (
        "on 100 prompts the gold score fell to 0.4 ± 0.1 from 1 ± 0.1 at its best, after step 20, while the score that "
        "is trained on rose from 2 to 4"
    )
    assert (watch.peak.step, watch.peak.gold, watch.under_way) == (20, 1.0, ("gold",))


@pytest.mark.parametrize(("gold", "falls"), [(1.0 - 0.415, False), (1.0 - 0.419, True)])
def test_gold_falls_by_more_standard_errors_of_the_difference_than_chance_gives(gold, falls):
    # one look: 1 % over five watches, P(t₉₉ > 2.946) = .002; √(0.1² + 0.1²) · 2.946 = 0.4166
    seen, _ = heard([scored(1.0, 2.0), scored(gold, 3.0)])
    assert bool(seen) == falls


def test_the_reference_is_a_peak_too():
    seen, watch = heard([scored(-0.5, 1.0)])
    assert [kind for _, kind, _ in seen] == ["gold"]
    assert "at its best, under the reference, while" in seen[0][2]
    assert watch.peak.step == 0


def test_where_nothing_is_scored_gold_alone_decides():
    rows = [{k: v for k, v in scored(gold, 0).items() if "score" not in k} for gold in (1.0, 0.2)]
    seen, _ = heard(rows)
    assert seen[0][2].endswith("at its best, after step 10")


def test_gold_that_recovered_may_fall_again():
    rows = [scored(1.0, 1), scored(0.4, 2), scored(0.9, 3), scored(0.3, 4)]
    assert [step for step, _, _ in heard(rows)[0]] == [20, 40]


def test_diversity_that_halves_and_duplicates_are_told():
    few = STEADY | {"eval/distinct_2_adjusted": 0.39}
    twice = STEADY | {"eval/duplicate_fraction": 0.14}
    seen, _ = heard([STEADY, few, few, STEADY, twice])
    assert [(step, kind) for step, kind, _ in seen] == [(20, "diversity"), (50, "diversity")]
    assert seen[0][2] == "responses to 100 prompts have become alike: adjusted distinct-2 is 0.39, the reference's 0.8"
    assert "14 % of the responses repeat another one, of the reference's 0 %" in seen[1][2]


def test_length_that_grows_beyond_the_reference_is_told_once_until_it_is_back():
    rows = [STEADY | {"eval/response_tokens": tokens} for tokens in (44, 46, 60, 60, 55, 44, 47)]
    seen, _ = heard(rows)
    assert [(step, kind) for step, kind, _ in seen] == [(20, "length"), (70, "length")]
    assert seen[0][2] == (
        "length is running away, on 100 prompts: responses have 46 tokens, 44 before, the reference's 30"
    )


def test_a_long_response_that_no_longer_grows_does_not_set_anything_in():
    _, watch = heard([STEADY | {"eval/response_tokens": 44}])
    later = Detector(tokens=60.0)
    assert later.observed(20, STEADY | {"eval/response_tokens": 50.0}, looks=1)[1] == ()
    assert watch.observed(20, STEADY | {"eval/response_tokens": 50.0}, looks=1)[1] != ()


def test_responses_that_no_longer_end_are_told():
    seen, _ = heard([STEADY | {"eval/end_fraction": share} for share in (0.6, 0.44, 0.2)])
    assert [(step, kind) for step, kind, _ in seen] == [(20, "length")]
    assert "44 % of the responses come to an end, 60 % before, of the reference's 90 %" in seen[0][2]


@pytest.mark.parametrize("evaluations", [
    [scored(1.0, 2.0), scored(0.2, 1.9)],                                   # gold fell with the score: no exploit
    [scored(1.0, 1, error=None), scored(-9.0, 2, error=None)],              # without an error nothing is judged
    [dict.fromkeys(STEADY | scored(0, 0)), {}, {"eval/gold_mean": 1.0}],    # nor what was not measured
    [STEADY | {"eval/distinct_2_adjusted": 0.41, "eval/duplicate_fraction": 0.09}],
    [STEADY | {"eval/reference_end_fraction": 0.05, "eval/end_fraction": 0.0}] * 2,      # 5 of 100: p = .03
    [STEADY | {"eval/prompts": 16, "eval/reference_end_fraction": 0.12, "eval/end_fraction": 0.0}] * 2,
    [STEADY | {"eval/response_tokens": 46.0, "eval/response_tokens_stderr": 9.0}],
    [STEADY | {"eval/distinct_2_adjusted": 0.3, "eval/distinct_2_adjusted_stderr": None}],
    [STEADY | {"eval/prompts": 10, "eval/duplicate_fraction": 0.3}],
])
def test_these_are_no_alarm(evaluations):
    assert heard(evaluations)[0] == []


def test_a_watch_survives_json():
    _, watch = heard([scored(0.5, 1) | STEADY, scored(-0.1, 2) | STEADY | {"eval/distinct_2_adjusted": 0.1}])
    assert watch.under_way == ("gold", "diversity")
    assert Detector.of(json.loads(json.dumps(asdict(watch)))) == watch
    assert Detector.of(json.loads(json.dumps(asdict(Detector())))) == Detector()


def test_a_fall_has_to_be_larger_the_more_often_a_run_looks_and_the_fewer_prompts():
    assert errors_of(1, 100) == pytest.approx(2.946, abs=2e-3)          # P(t₉₉ > 2.946) = .01 / 5
    assert errors_of(pairs_of(10), 100) == pytest.approx(4.16, abs=0.02)      # of 55
    assert errors_of(1, 100_000) == pytest.approx(2.878, abs=2e-3)      # Φ⁻¹(.998)
    assert errors_of(1, 8) > 4.2
    rows = [scored(1.0, 2.0), scored(0.5, 3.0)]               # 3.5 standard errors of the difference
    assert heard(rows, looks=2)[0] != []
    assert heard(rows, looks=10)[0] == []


def test_fishers_test_by_hand():
    # 0 of 16 and 2 of 16: C(16, 2) / C(32, 2) = 120 / 496
    assert chance_of_fewer(0, 2, 16) == pytest.approx(120 / 496)
    # the tea: 1 and 3 of 4 each: (C(4, 0) C(4, 4) + C(4, 1) C(4, 3)) / C(8, 4) = 17 / 70
    assert chance_of_fewer(1, 3, 4) == pytest.approx(17 / 70)


@pytest.mark.parametrize("prompts", [16, 64])
def test_runs_in_which_nothing_changes_are_quiet(prompts):
    # ten looks of a policy that stays its reference, on other random numbers each time; 1 % of 500 is 5
    rng, runs = np.random.default_rng(prompts), 500

    def look(prefix: str) -> dict[str, float]:
        gold, tokens = rng.gamma(0.5, 2.0, prompts), rng.geometric(0.03, prompts)
        return {
            f"{prefix}gold_mean": gold.mean(), f"{prefix}gold_stderr": gold.std(ddof=1) / prompts**0.5,
            f"{prefix}response_tokens": tokens.mean(),
            f"{prefix}response_tokens_stderr": tokens.std(ddof=1) / prompts**0.5,
            f"{prefix}end_fraction": rng.binomial(prompts, 0.12) / prompts,
            f"{prefix}duplicate_fraction": rng.binomial(prompts, 0.2) / prompts,
            f"{prefix}distinct_2_adjusted": rng.normal(0.2, 0.05), f"{prefix}distinct_2_adjusted_stderr": 0.05,
        }

    loud = 0
    for _ in range(runs):
        reference = look("eval/reference_") | {"eval/prompts": prompts}
        loud += bool(heard([look("eval/") | reference for _ in range(10)], looks=10)[0])
    assert loud <= 10       # 11 of 500 has a chance of 1 % where the rate is 1 %
