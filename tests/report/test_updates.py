"""What shaped an update, of metrics by hand."""

from pathlib import Path

import pytest

from kltune.report.outcome import Files
from kltune.report.updates import updates_of

RECIPE = {"optim": {"lr": 1e-3, "max_grad_norm": 1.0}, "kl": {"control": "target"}}
ROW = {
    "optim/lr": 2e-4, "kl/step_nats_per_response": 0.03, "kl/step_limit_nats_per_response": 0.04,
    "ppo/policy_grad_norm": 4.0, "ppo/clip_fraction": 0.07, "ppo/value_explained": 0.62, "kl/beta": 0.3,
    "kl/beta_feed_forward": 0.2,
}


def shown(rows: list[dict], recipe: dict = RECIPE) -> dict[str, str]:
    files = Files(Path("run"), {"stage": "ppo"}, "", recipe, rows, [], {})
    return {what: share for what, share, _ in updates_of(files)}


def test_each_thing_that_shapes_an_update_by_the_second_half_of_the_run():
    first = dict.fromkeys(ROW, 1e6)
    half_clipped = ROW | {"ppo/policy_grad_norm": 0.5, "ppo/value_explained": None}
    assert shown([first, first, ROW, half_clipped]) == {
        "learning rate": "20.0 %", "length of a step": "75.0 %", "gradient": "62.5 %", "clipped": "7.0 %",
        "value function": "62.0 %", "price": "150.0 %",
    }


def test_what_was_not_recorded_is_not_shown():
    assert shown([]) == shown([{"loss/mean": 1.0}]) == {}
    fixed = {"optim": {}, "kl": {"control": "fixed"}}
    assert shown([ROW | {"kl/step_limit_nats_per_response": None}], fixed) == {
        "gradient": "100.0 %", "clipped": "7.0 %", "value function": "62.0 %",
    }


@pytest.mark.parametrize("share", [-3.0, 0.04])
def test_a_value_function_that_explains_nothing_is_called_that(share):
    files = Files(Path("run"), {"stage": "ppo"}, "", RECIPE, [{"ppo/value_explained": share}], [], {})
    ((what, value, meaning),) = updates_of(files)
    assert (what, value, "explains nothing" in meaning) == ("value function", f"{100 * max(share, 0):.1f} %", True)
