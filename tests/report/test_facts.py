"""Which run to prefer, by what, and when none can be; numbers of a column to equal places."""

import pytest

from kltune.report.facts import Fact, columns_of, preference_of
from kltune.report.outcome import read_files


@pytest.fixture
def preferred(run_folder):
    """A function that says which of runs to prefer, each given by its overrides and what differs in its result."""

    def say(**runs) -> str:
        files = {}
        for name, (overrides, changes) in runs.items():
            rewards = [{"kind": "function", "path": changes.pop("by", "rewards.py:score"), "sha256": "ab"}]
            nats = changes.get("nats", 6.0)
            result = {
                "kl": {"nats_per_response": nats, "stderr": 0.1, "ci95": [nats - 0.2, nats + 0.2]},
                "score": 1.0, "score_stderr": 0.1, "reference_score": 0.0, "eval": {"eval/score_stderr": 0.1},
                **changes,
            }
            files[name] = read_files(run_folder(*overrides, name=name, result=result, rewards=rewards))
        return preference_of(files)

    return say


def test_the_clearly_best_within_its_budget_is_preferred(preferred):
    said = preferred(a=((), {}), b=((), {"score": 2.0}), far=((), {"score": 9.0, "nats": 12.0}))
    assert said == (
        "Prefer b: score 2.00 ± 0.10 at 6 nats, clearly the best; left out: far (above target); a gold score, never "
        "trained on, would say more."
    )


def test_of_runs_within_error_that_of_least_kl(preferred):
    assert preferred(a=((), {}), b=((), {"score": 1.1, "nats": 6.5})).startswith(
        "Prefer a: score 1.00 ± 0.10 at 6 nats, within error of b and at less KL"
    )


def test_gold_decides_where_it_is_known_and_a_fallen_gold_score_rules_out(preferred):
    free = ("kl.control=fixed", "kl.beta=0")
    gold = {"gold": 0.5, "gold_stderr": 0.1, "reference_gold": 0.0}
    evaluated = {"eval/gold_stderr": 0.1, "eval/reference_gold_stderr": 0.1, "eval/score_stderr": 0.1}
    said = preferred(held=((), gold), free=(free, {
        "score": 5.0, "gold": -6.0, "gold_stderr": 0.1, "reference_gold": 0.0, "eval": evaluated, "nats": 90.0,
    }))
    assert said == "Prefer held: gold score 0.50 ± 0.10 at 6 nats; left out: free (score rose, gold fell)."


def test_none_is_preferred_where_scores_do_not_compare(preferred):
    assert preferred(a=((), {}), b=((), {"score": 5.0, "by": "rewards.py:other"})).startswith("None can be preferred")
    assert preferred(c=((), {}), d=((), {"score": None})).startswith("None can be preferred")
    assert preferred(e=((), {"nats": 12.0}), f=((), {"nats": 9.0})) == (
        "None is to be preferred: e (above target), f (above target)."
    )


def test_a_column_has_equal_places():
    known, less = Fact(4.84, 0.05, reference=-0.109), Fact(47.8)
    rows = [{"score": known, "steps": Fact(30)}, {"score": less, "steps": Fact(None)}]
    assert columns_of(rows, ["score", "steps"]) == {
        "score": [("4.84 ± 0.05", "reference −0.11"), ("47.80", "")], "steps": [("30", ""), ("–", "")],
    }
