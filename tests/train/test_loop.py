"""How long a run is, and how far its steps go."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from kltune.core.control.step_size import StepSize
from kltune.recipe import KLSection, OptimSection, RunSection
from kltune.run.optimizer import UNTIL_MOST
from kltune.train.budget import Budget
from kltune.train.loop import goes_on, schedule_share, step_size
from tests.train.test_budget import ROLLOUT, measured


def job(until: str = "target", steps: int = 12, **optim):
    recipe = SimpleNamespace(run=RunSection(steps=steps, until=until), optim=OptimSection(**optim))
    return SimpleNamespace(recipe=recipe, steps=steps)


def learner(*kls: float, stopped: bool = False, **controller):
    """One whose batches had these KLs at a target of 2."""
    budget = replace(Budget.of(KLSection(target=2.0), steps=12), course=kls)
    budget = replace(budget, controller=replace(budget.controller, **controller))
    alarms = SimpleNamespace(stopped={"step": 3} if stopped else None)
    return SimpleNamespace(budget=budget, alarms=alarms)


HELD = (0.5, 1.0, 1.5, 1.8, 1.9, 2.0, 1.9, 2.0, 2.1, 2.0, 1.9, 2.1)


def test_a_run_until_its_steps_is_as_long_as_they_are():
    assert goes_on(job("steps"), learner(0.1), 11)
    assert not goes_on(job("steps"), learner(0.1), 12)


def test_a_run_until_its_target_goes_on_until_a_third_of_it_was_held():
    assert goes_on(job(), learner(*HELD), 11)       # the recipe's own steps are taken
    assert not goes_on(job(), learner(*HELD), 12)
    assert goes_on(job(), learner(*HELD[:-1], 2.5), 12)
    assert not goes_on(job(), learner(*HELD[:-1], 2.5), 12 * UNTIL_MOST)
    assert not goes_on(job(), learner(0.1, stopped=True), 3)
    assert goes_on(job(steps=3), learner(2.0, 2.0, 2.0), 3)      # of three steps a third says nothing


def test_it_ends_where_the_reward_pulls_no_further_and_not_while_the_kl_grows():
    flat, growing = [0.5] * 12, [0.1 * step for step in range(12)]
    assert not goes_on(job(), learner(*flat, integral=-3.0), 12)
    assert not goes_on(job(), learner(*flat, beta=1e-4), 12)
    assert goes_on(job(), learner(*flat, integral=-1.0, beta=0.1), 12)
    assert goes_on(job(), learner(*growing, integral=-3.0), 12)


@pytest.mark.parametrize(("until", "shares"), [("steps", [0.5, 1.0, 0.5]), ("target", [0.5, 1.0, 1.0])])
def test_the_schedule_falls_where_a_run_has_a_last_step(until, shares):
    one = job(until, warmup_steps=2)
    assert [schedule_share(one, step) for step in (1, 3, 8)] == pytest.approx(shares)


def test_on_the_way_to_a_target_a_step_is_as_long_as_it_may_be_however_late_it_is():
    known = learner()
    known.budget = replace(known.budget, size=StepSize(math.log(0.1 / 1e-3**2)))    # a step at 1e-3: 0.1 nats
    batch = SimpleNamespace(rollout=ROLLOUT, kl=measured(0.4, 0.5, 0.6))
    late, room = step_size(job("steps", lr=1e-3), known, 12, batch)
    assert room == pytest.approx(0.06 * 2.0)
    assert late == pytest.approx(1e-3 * math.sqrt(0.7 * 0.12 / 0.1))
    there = SimpleNamespace(rollout=ROLLOUT, kl=measured(1.9, 2.0, 2.1))
    held, room = step_size(job("steps", lr=1e-3), known, 7, there)
    assert room == pytest.approx(0.005 * 2.0 * 0.5)
    assert held == pytest.approx(1e-3 * math.sqrt(0.7 * 0.005 / 0.1))
    assert step_size(job("steps", lr=1e-3, warmup_steps=12), known, 6, batch)[0] == 0.5e-3
    assert step_size(job("steps", lr=1e-3), known, 7, None) == (pytest.approx(0.5e-3), math.inf)


def test_a_course_is_kept_in_the_unit_of_the_target():
    per_token = Budget.of(KLSection(target=0.4, unit="nats_per_token"), steps=12)
    assert per_token.priced(ROLLOUT, measured(1.0, 2.0, 3.0), pull=1.0).course == (0.4,)
