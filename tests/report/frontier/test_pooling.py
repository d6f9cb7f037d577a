"""Seeds pooled, what to pick, the law that is fitted, and what is read off a curve."""

import math

import numpy as np
import pytest

from kltune.core.hacking.overoptimization import best_of_n_kl, best_of_n_kl_of_levels
from kltune.report.frontier.points import FrontierPoint, find_sources, points_of
from kltune.report.frontier.pooling import Setting, curves_at, fits, pick, pooled


def test_seeds_are_one_point_with_the_error_between_them(make_run):
    paths = [make_run(str(s), "kl.target=2", f"run.seed={s}", kl=2.0 + s, score=0.1 * s) for s in range(3)]
    setting, = pooled(points_of(find_sources(paths)))
    assert (setting.seeds, setting.kl, setting.score) == (3, 3.0, pytest.approx(0.1))
    assert setting.kl_stderr == pytest.approx(math.hypot(1.0 / math.sqrt(3), 0.1))
    # 0, .1 and .2: between seeds .1/√3, times t₂ = 4.3027; and the measurements' own .05, which they share
    half = math.hypot(4.302653 * 0.1 / math.sqrt(3), 1.96 * 0.05)
    assert setting.score_ci95 == (pytest.approx(0.1 - half), pytest.approx(0.1 + half))
    assert setting.kl_ci95 == (pytest.approx(1.8), pytest.approx(4.2))      # all their intervals
    assert setting.runs == tuple(paths)
    # four that answered the same prompts alike are no surer than one
    alike = [make_run(f"x{s}", "kl.target=5", f"run.seed={s}", kl=5.0) for s in range(4)]
    assert pooled(points_of(find_sources(alike)))[0].kl_stderr == pytest.approx(0.1)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_of_pooled_seeds_hold_the_mean_of_all_seeds_and_prompts(seeds):
    # Seeds of sd .1, 64 prompts of sd .8 that all seeds share, and .3 of noise: dividing by √seeds covered .84 to .63.
    rng, held = np.random.default_rng(seeds), 0
    for _ in range(400):
        cells = rng.normal(0, 0.1, (seeds, 1)) + rng.normal(0, 0.8, 64) + rng.normal(0, 0.3, (seeds, 64))
        points = [
            FrontierPoint(str(s), str(s), "c", "x", s, 1.0, 1.0, 0.1, (0.8, 1.2), row.mean(), row.std(ddof=1) / 8)
            for s, row in enumerate(cells)
        ]
        shares = {str(s): {"score": (row - row.mean()) / 64} for s, row in enumerate(cells)}
        low, high = pooled(points, shares)[0].score_ci95
        held += low <= 0.0 <= high
    assert 0.93 * 400 <= held <= 0.995 * 400


def test_copies_of_a_run_are_no_surer_than_one():
    row = np.random.default_rng(0).normal(size=64)
    error = row.std(ddof=1) / 8
    names = [str(seed) for seed in range(3)]
    points = [FrontierPoint(s, s, "c", "x", int(s), 1.0, 1.0, 0.1, (0.8, 1.2), row.mean(), error) for s in names]
    shares = {name: {"score": (row - row.mean()) / 64} for name in names}
    assert pooled(points, shares)[0].score_stderr == pytest.approx(error)


# picking


def setting(name: str, kl: float, score: float, *, stderr: float = 0.01, half: float = 0.2) -> Setting:
    return Setting("c", name, 1, kl, 0.1, (kl - half, kl + half), score, stderr, None, None, (None,), (name,))


REFERENCES = {"score": 0.0, "score_stderr": 0.01}


def test_the_best_score_whose_whole_interval_is_within_the_budget():
    settings = [setting("a", 1.0, 0.5), setting("b", 2.0, 0.9), setting("c", 2.9, 1.5), setting("d", 9.0, 3.0)]
    found = pick(settings, 3.0, "score", REFERENCES)
    assert (found["setting"], found["tied"], found["better_than_reference"]) == ("b", [], True)
    assert pick(settings, 3.1, "score", REFERENCES)["setting"] == "c"
    assert pick(settings, 0.5, "score", REFERENCES)["setting"] is None
    assert pick(settings, 3.0, "gold", REFERENCES | {"gold": None})["setting"] is None      # nobody measured it


def test_settings_within_error_of_the_best_are_named():
    settings = [setting("a", 1.0, 0.88, stderr=0.03), setting("b", 2.0, 0.9, stderr=0.03), setting("c", 1.5, 0.7)]
    found = pick(settings, 3.0, "score", REFERENCES)
    assert found["setting"] == "b"
    assert [one["setting"] for one in found["tied"]] == ["a"]


def test_what_is_no_better_than_the_reference_is_not_called_better():
    settings = [setting("a", 1.0, 0.02, stderr=0.02)]
    assert not pick(settings, 3.0, "score", REFERENCES)["better_than_reference"]


# fits and reading off


def test_the_law_is_fitted_where_there_are_runs_enough(make_run):
    nats = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    gain = [math.sqrt(k) * (0.6 - 0.35 * 0.5 * math.log(k)) for k in nats]
    paths = [
        make_run(f"r{k}", f"kl.target={k}", kl=k, score=0.1 + g) for k, g in zip(nats, gain, strict=True)
    ]
    points = points_of(find_sources(paths))
    fit, = fits(points, "score", {"score": 0.1}, None)
    assert (fit["curve"], fit["fit"]["alpha"], fit["fit"]["beta"]) == (
        "ppo target", pytest.approx(0.6), pytest.approx(0.35),
    )
    assert fit["fit"]["observed"]
    few, = fits(points[:3], "score", {"score": 0.1}, None)
    assert (few["fit"], few["claim"]) == (None, "not claimed: 3 points of 3 runs beyond 0.09 nats; wanted 5 of 5")
    assert fits(points, "score", {"score": None}, None)[0]["fit"] is None
    at = curves_at(points, 2.0, "score")["curves"]["ppo target"]
    assert at["score"] == pytest.approx(0.1 + math.sqrt(2) * (0.6 - 0.175 * math.log(2)), abs=0.05)
    assert curves_at(points, 100.0, "score")["curves"]["ppo target"] is None


def test_best_of_n_of_a_reward_of_0_or_1_is_fitted_over_the_kl_that_its_ties_leave():
    # Of 40 prompts half of the answers score 1: gains are d (α − β d) of the KL with ties by construction, not of the
    # bound, which grows without end while the score cannot.
    sizes, alpha, beta = (1, 2, 4, 8, 16), 0.5, 0.1
    nats = [best_of_n_kl_of_levels([0.5, 0.5], n) for n in sizes]
    gains = [math.sqrt(kl) * (alpha - beta * math.sqrt(kl)) for kl in nats]
    rows = [gain + np.random.default_rng(1).normal(0.0, 0.001, 40) for gain in gains]
    best_of_n = {
        "by_prompt": {"score": rows}, "prompt_numbers": list(range(40)),
        "points": [
            {"n": n, "kl_bound": best_of_n_kl(n), "kl_with_ties": kl, "score": gain, "score_stderr": 0.01}
            for n, kl, gain in zip(sizes, nats, gains, strict=True)
        ],
    }
    fit = next(row for row in fits([], "score", {"score": 0.0}, best_of_n) if row["form"] == "best_of_n")
    assert fit["fit"]["alpha"] == pytest.approx(alpha, abs=0.01)
    assert fit["fit"]["beta"] == pytest.approx(beta, abs=0.02)
