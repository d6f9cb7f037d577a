"""A KL budget's verbs by hand: what a nat costs, what is remembered, what going back and being refused cost."""

import math
from dataclasses import FrozenInstanceError, asdict, replace
from types import SimpleNamespace

import pytest
import torch

from kltune.core.control.controllers import FixedBeta, LogPI
from kltune.core.control.step_size import StepSize
from kltune.core.kl.intervals import KLSummary
from kltune.recipe import KLSection
from kltune.train.budget import Budget, LastWithinCap

ROLLOUT = SimpleNamespace(lengths=torch.tensor([4, 6]))       # 5 tokens a response
TENSORS = {"model": {"a/b": torch.tensor([1.0])}, "policy_optimizer": {"0/step": torch.tensor(2.0)}}
FIXED = {"control": "fixed", "target": None}


def measured(low: float, kl: float, high: float) -> KLSummary:
    """A KL with its interval, 5 tokens a response."""
    per_token = {"nats_per_token": kl / 5, "token_stderr": 0.02, "token_floor": None, "token_ci": (low / 5, high / 5)}
    return KLSummary("exact", kl, 0.1, None, (low, high), **per_token, responses=2, tokens=10, prompts=2,
                     confidence=0.95)


def budget(beta: float = 0.5, **keys) -> Budget:
    return Budget.of(KLSection(**FIXED | {"beta": beta} | keys), steps=50)


def test_a_fixed_price_stays_and_has_no_target():
    fixed = budget(0.5, target=3.0)
    assert (fixed.price, fixed.target, fixed.cap, fixed.controller) == (0.5, None, None, FixedBeta(0.5))
    assert fixed.priced(ROLLOUT, measured(8.0, 9.0, 10.0), pull=1.0).price == 0.5
    assert not fixed.is_unused(measured(0.0, 0.0, 0.0))
    assert not fixed.is_passed(measured(8.0, 9.0, 10.0))


@pytest.mark.parametrize(("unit", "target"), [("nats_per_response", 2.0), ("nats_per_token", 0.4)])
def test_a_controller_steers_towards_the_target_in_nats_per_response(unit, target):
    section = KLSection(target=target, unit=unit, controller="dual", beta=0.5, dual_lr=0.1)
    before = Budget.of(section, steps=100)
    after = before.priced(ROLLOUT, measured(2.0, 3.0, 4.0), pull=1.0)
    assert (before.price, before.target) == (0.5, target)
    assert after.price == pytest.approx(0.5 * math.exp(0.1 * (3.0 / 2.0 - 1.0)))


def test_the_controller_looks_ahead_in_updates_of_which_a_step_makes_several():
    controller = Budget.of(KLSection(look_ahead=4.0), steps=50, updates_per_step=8).controller
    assert isinstance(controller, LogPI)
    assert controller.look_ahead == 0.5


@pytest.mark.parametrize("unit", ["nats_per_response", "nats_per_token"])
def test_where_a_kl_stands_to_cap_and_target(unit):
    scale = 1.0 if unit == "nats_per_response" else 0.2
    held = Budget.of(KLSection(target=1.0 * scale, hard_cap=2.0 * scale, unit=unit), steps=50)
    within, still, beyond = measured(1.5, 1.7, 1.9), measured(1.5, 1.9, 2.3), measured(1.5, 2.1, 2.7)
    assert [held.standing(kl) for kl in (within, still, beyond)] == ["within", "open", "beyond"]
    assert [held.is_passed(kl) for kl in (measured(0.8, 0.9, 0.95), measured(0.9, 1.1, 1.2), within)] == [0, 0, 1]
    assert [held.is_unused(kl) for kl in (measured(0.8, 0.9, 0.95), measured(0.9, 0.95, 1.2), within)] == [1, 0, 0]
    assert budget().standing(beyond) == "within"     # without a cap everything is


def test_the_start_and_then_the_last_state_within_are_remembered():
    assert budget().guarded(TENSORS).last_within is None
    at_start = budget(hard_cap=2.0).guarded(TENSORS)
    assert (at_start.last_within.step, at_start.last_within.kl["nats_per_response"]) == (0, 0.0)
    kl = measured(0.5, 1.0, 1.5)
    assert at_start.remembered(7, kl, TENSORS).last_within == LastWithinCap(7, asdict(kl), TENSORS)
    assert at_start.last_within.step == 0


@pytest.mark.parametrize("unit", ["nats_per_response", "nats_per_token"])
def test_going_back_raises_the_price_at_least_halfway_to_an_ideal_policys(unit):
    cap = 2.0 if unit == "nats_per_response" else 0.4
    held = budget(0.5, hard_cap=cap, unit=unit)
    assert held.rolled_back(ROLLOUT, pull=1.0).price == pytest.approx(0.55)
    ideal = 3.0 / math.sqrt(2 * 2.0)
    assert held.rolled_back(ROLLOUT, pull=3.0).price == pytest.approx(math.sqrt(0.5 * ideal))
    free = budget(0.0, hard_cap=cap, unit=unit).rolled_back(ROLLOUT, pull=1.0)
    assert free.price == pytest.approx(math.sqrt(1e-4 * 0.5))           # from the least that a price may be
    assert free.rolled_back(ROLLOUT, pull=1.0).price == pytest.approx(2.0 * free.price)     # that was not enough
    twice = held.rolled_back(ROLLOUT, pull=1.0).rolled_back(ROLLOUT, pull=1.0)
    assert (twice.price, twice.rollbacks, held.rollbacks) == (pytest.approx(1.1), 2, 0)


@pytest.mark.parametrize("met", [lambda held: held.rolled_back(ROLLOUT, 1.0), lambda held: held.refused()])
def test_a_fixed_price_is_steered_below_its_cap_once_that_was_met_and_never_below_itself(met):
    held = budget(0.02, hard_cap=2.0)
    assert held.priced(ROLLOUT, measured(1.0, 1.9, 2.5), pull=1.0).price == 0.02
    steered = met(held)
    at_aim = steered.priced(ROLLOUT, measured(1.7, 1.8, 1.9), pull=1.0)
    assert at_aim.price == pytest.approx(steered.price, rel=0.2)    # at 0.9 of the cap it stays as raised
    for _ in range(100):    # and goes up to an ideal policy's, and beyond, where the policy stays above
        at_aim = at_aim.priced(ROLLOUT, measured(1.9, 2.0, 2.1), pull=1.0)
    assert at_aim.price > 1.0 / math.sqrt(2 * 1.8)
    at_aim = at_aim.priced(ROLLOUT, measured(1.4, 1.5, 1.6), pull=1.0)
    assert at_aim.price == 0.02     # what led up to the cap leads there again
    near = met(held).priced(ROLLOUT, measured(1.6, 1.7, 1.8), pull=1.0)
    assert near.price == pytest.approx((0.02 + near.controller.beta) / 2)   # halfway between 0.8 and 0.9 of the cap
    dear = met(budget(0.9, hard_cap=2.0)).priced(ROLLOUT, measured(0.4, 0.5, 0.6), pull=1.0)
    assert dear.price == 0.9


def test_a_cap_met_twice_in_one_step_is_paid_for_once():
    # a line search refuses a step at a price near 0, and the next batch is found beyond
    met = budget(0.02, hard_cap=2.0).refused().rolled_back(ROLLOUT, pull=1.0)
    assert met.price == pytest.approx(math.sqrt(0.022 * 0.5))
    after = met.priced(ROLLOUT, measured(1.7, 1.8, 1.9), pull=1.0)
    assert after.price == pytest.approx(met.price)


def test_a_refused_step_makes_a_nat_a_tenth_dearer():
    held = budget(0.5, hard_cap=2.0)
    assert (held.refused().price, held.refused().refusals) == (pytest.approx(0.55), 1)
    assert budget(0.0, hard_cap=2.0).refused().price == 0.0
    assert held.refused().rolled_back(ROLLOUT, 1.0).counts() == {"kl/cap_rollbacks": 1, "kl/cap_refusals": 1}
    assert budget().refused().counts() == {}


def test_a_step_has_the_room_that_target_or_cap_leave_it():
    kl = measured(0.8, 1.0, 1.2)
    assert Budget.of(KLSection(target=4.0), steps=50).room(ROLLOUT, kl, 1.0) == 0.24
    per_token = Budget.of(KLSection(target=0.8, unit="nats_per_token"), steps=50)
    assert per_token.room(ROLLOUT, kl, 1.0) == pytest.approx(0.24)
    assert budget(hard_cap=4.0 / 0.9).room(ROLLOUT, kl, 1.0) == pytest.approx(0.24)
    assert budget().room(ROLLOUT, kl, 1.0) == math.inf


def test_a_policy_is_short_of_a_target_and_on_its_way_below_seven_tenths_of_it():
    found = [
        (held.short_of_target(ROLLOUT, kl), held.on_its_way(ROLLOUT, kl))
        for held in (Budget.of(KLSection(target=0.4, unit="nats_per_token"), steps=50), budget(0.5, hard_cap=2.0))
        for kl in (measured(1.0, 1.3, 1.5), measured(1.3, 1.5, 1.8), measured(1.8, 2.1, 2.4))
    ]
    assert found == [(True, True), (True, False), (False, False)] + [(False, False)] * 3


def test_it_says_what_was_measured_and_what_to_change():
    kl = measured(2.0, 3.0, 4.25)
    assert budget().describe(kl) == "3 nats per response (95 %: 2.00 to 4.25)"
    assert budget().describe(replace(kl, ci=None)) == "3 nats per response"
    per_token = budget(unit="nats_per_token")
    assert per_token.describe(kl) == "0.6 nats per token (95 %: 0.40 to 0.85)"
    assert (per_token.in_unit(kl), budget().in_unit(kl), per_token.unit_text) == (0.6, 3.0, "nats per token")
    assert budget().advice() == "Raise kl.beta, or write kl.control: target"
    assert Budget.of(KLSection(), steps=50).advice() == "Lower kl.target"


def test_what_it_says_of_itself_gives_it_back():
    section = KLSection(hard_cap=2.0)
    fresh = Budget.of(section, steps=100).guarded({"model": {"a/b": torch.tensor([0.0])}})
    kl = measured(0.5, 1.0, 1.5)
    lived = replace(fresh, size=StepSize(1.5)).priced(ROLLOUT, kl, pull=1.0).refused().rolled_back(ROLLOUT, 1.0)
    lived = lived.remembered(3, kl, TENSORS)
    assert lived.tensors().keys() == {"model/a/b", "policy_optimizer/0/step"}
    assert fresh.restored(lived.state(), lived.tensors()) == lived != fresh
    fixed = budget(hard_cap=2.0)
    for lived in (fixed.priced(ROLLOUT, kl, 1.0), fixed.refused(), fixed.rolled_back(ROLLOUT, 1.0)):
        assert fixed.restored(lived.state(), {}) == lived


def test_nobody_changes_a_budget():
    held = budget(hard_cap=2.0).guarded(TENSORS)
    for thing, name in ((held, "controller"), (held, "rollbacks"), (held.last_within, "step"), (held.section, "beta")):
        with pytest.raises((FrozenInstanceError, ValueError), match=r"frozen|assign"):
            setattr(thing, name, 1.0)


def test_a_kl_is_described_in_as_many_digits_as_set_it_apart_from_cap_and_target():
    held = Budget.of(KLSection(target=4.0, hard_cap=5.0), steps=50)
    assert held.describe(measured(4.706, 5.003, 5.3)) == "5.003 nats per response (95 %: 4.71 to 5.30)"
    assert held.describe(measured(3.706, 3.8, 4.0003)) == "3.8 nats per response (95 %: 3.7060 to 4.0003)"
