"""How far a step may go, and which learning rate goes so far."""

import math

import numpy as np
import pytest

from kltune.core.control.step_size import FIRST_SHARE, USED, StepSize, step_limit


@pytest.mark.parametrize(("ref_kl", "share", "limit"), [
    (0.0, 1.0, 0.24),                       # far: a share of the aim
    (1.44, 1.0, 0.25 * 0.8**2),             # half of the way in √KL
    (4.0, 1.0, 0.02),                       # there: 7 % of √aim
    (4.0, 0.5, 0.01),
    (3.0, 0.0, 0.25 * (2.0 - math.sqrt(3.0)) ** 2),
    (4.0, 0.0, 0.004),
    (9.0, 1.0, 0.02),                       # beyond: no longer than there
    (-0.01, 1.0, 0.24),                      # a KL estimated from samples may be below 0
])
def test_a_step_covers_half_of_the_way_and_little_once_there(ref_kl, share, limit):
    assert step_limit(ref_kl, 4.0, share) == pytest.approx(limit)


def test_a_run_that_is_late_takes_longer_steps_on_the_way_and_none_once_there():
    assert step_limit(1.0, 4.0, 1.0, late=0.5) == pytest.approx(0.24)           # half of the way at half of the time
    assert step_limit(1.0, 4.0, 1.0, late=0.75) == pytest.approx(1.5**2 * 0.24)
    assert step_limit(0.1, 4.0, 1.0, late=1.0) == pytest.approx(4 * 0.24)
    assert step_limit(2.56, 4.0, 1.0, late=1.0) == pytest.approx(0.25 * (1.25 * 0.4) ** 2)
    assert step_limit(4.0, 4.0, 1.0, late=1.0) == pytest.approx(0.02)


def test_a_tilt_pushed_with_the_wrong_sign_at_every_step_stays_near_its_aim():
    tilt = 2.0
    for _ in range(50):     # the worst there is: every step goes on outwards, its price too low
        tilt += math.sqrt(step_limit(tilt**2, 4.0, 1.0))
        if tilt**2 > 4.0:
            break
    assert tilt**2 <= 4.0 * 1.15


def test_the_learning_rate_finds_the_limit_of_any_model():
    size = StepSize()
    assert size.learning_rate(1e-3, 0.1) == FIRST_SHARE * 1e-3
    lr = FIRST_SHARE * 1e-3
    for _ in range(3):      # a model of which a step of this rate moves 0.5 nats, seen after half of its updates
        size = size.observed(lr, 0.5 * (lr / 1e-3) ** 2 * 0.25, share=0.5)
        lr = size.learning_rate(1e-3, 0.02)
    assert 0.5 * (lr / 1e-3) ** 2 == pytest.approx(USED * 0.02)
    assert size.learning_rate(1e-5, 0.02) == 1e-5


def test_one_odd_step_is_half_believed_and_one_that_did_not_move_says_nothing():
    size = StepSize().observed(1e-3, 0.01, share=1.0)
    odd = size.observed(1e-3, 1.0, share=1.0)
    assert odd.learning_rate(1.0, 0.1) == pytest.approx(size.learning_rate(1.0, 0.1) / math.sqrt(10.0))
    assert all(size.observed(*odd) is size for odd in ((1e-3, 0.0, 1.0), (0.0, 0.1, 1.0), (1e-3, 0.1, 0.0)))


@pytest.mark.parametrize("limit", [0.3, 0.06, 0.01])
def test_steps_that_rounding_hides_leave_the_learning_rate_where_it_was(limit):
    rounding, reach, rng = 0.05, 1e7, np.random.default_rng(0)      # SmolLM2 in bfloat16: a rate of 1e-4 moves 0.1 nats
    size, lr, moved = StepSize(), 1e-4, []
    for step in range(200):
        true = reach * lr**2
        moved.append(true)
        seen = max(true * rng.lognormal(0.0, 0.3) + 0.5 * rounding * rng.standard_normal(), 0.0)
        size = size.observed(lr, seen, 1.0, rounding)
        lr = size.learning_rate(3e-4, 0.3 if step < 10 else limit)      # on its way first
    assert 0.5 * USED * limit <= sum(moved[100:]) / 100 <= 1.5 * USED * limit


def test_a_model_that_moves_further_than_was_known_is_seen_above_rounding():
    size = StepSize().observed(1e-4, 0.1, 1.0, 0.05)
    for _ in range(6):      # from now on twenty times as far, where a twentieth of rounding was foretold
        size = size.observed(1e-5, 20 * 0.001 * 10, 1.0, 0.05)
    assert math.exp(size.log_reach) * 1e-10 == pytest.approx(0.2, rel=0.5)
