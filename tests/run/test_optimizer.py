"""The learning rate follows its schedule, a step that would do harm is not taken, and its memory comes back exactly."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kltune.errors import CheckpointError, DivergedError
from kltune.recipe import OptimSection, RunSection
from kltune.run.optimizer import (
    accumulate,
    guarded_step,
    learning_rate_share,
    load_optimizer,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
    total_steps,
)


def shares(steps: int, **section) -> list[float]:
    return [learning_rate_share(OptimSection(**section), step, steps) for step in range(1, steps + 1)]


def test_the_linear_schedule_by_hand():
    assert shares(4, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    # two steps of warm-up, then four down from 1
    assert shares(6, schedule="linear", warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_the_cosine_schedule_by_hand():
    half = math.sqrt(0.5)
    assert shares(4, schedule="cosine") == pytest.approx([1.0, (1 + half) / 2, 0.5, (1 - half) / 2])


def test_the_constant_schedule_only_warms_up():
    assert shares(5, schedule="constant", warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_warm_up_longer_than_the_run_and_a_run_of_one_step_are_no_division_by_zero(schedule):
    assert shares(2, schedule=schedule, warmup_steps=4) == pytest.approx([0.25, 0.5])
    assert shares(1, schedule=schedule) == [1.0]
    assert shares(2, schedule=schedule, warmup_steps=1) == [1.0, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_every_step_of_a_run_has_a_learning_rate_above_0(schedule):
    assert all(0.0 < share <= 1.0 for share in shares(50, schedule=schedule, warmup_steps=7))


@pytest.mark.parametrize(
    ("epochs", "rows", "rows_per_step", "steps"),
    [(1.0, 64, 32, 2), (1.0, 65, 32, 3), (0.5, 64, 32, 1), (0.001, 64, 32, 1), (3.0, 10, 10, 3), (0.07, 100, 1, 7)],
)
def test_epochs_become_steps_with_the_last_one_begun_counted(epochs, rows, rows_per_step, steps):
    # 0.07 · 100 is 7.000000000000001 in binary: not an eighth step
    assert total_steps(RunSection(epochs=epochs), rows, rows_per_step) == steps


def test_steps_are_steps_whatever_the_data():
    assert total_steps(RunSection(steps=7), 1_000_000, 2) == 7


def weights_and_optimizer() -> tuple[nn.Parameter, torch.optim.AdamW]:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make_optimizer({"weight": weight}, OptimSection(lr=0.1, weight_decay=0.0), "policy")
    weight.grad = torch.tensor([3.0, 4.0])
    return weight, optimizer


def test_the_norm_before_clipping_is_returned_and_the_gradient_is_cleared():
    weight, optimizer = weights_and_optimizer()
    assert guarded_step(optimizer, max_grad_norm=1.0, what="policy") == pytest.approx(5.0)
    # the first step of Adam is lr in the direction of the sign
    assert weight.tolist() == pytest.approx([0.9, -2.1], abs=1e-5)
    assert weight.grad is None


def test_the_gradient_is_scaled_to_the_norm_allowed():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    guarded_step(torch.optim.SGD([weight], lr=1.0), max_grad_norm=1.0, what="policy")
    assert weight.tolist() == pytest.approx([-0.6, -0.8], abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_stops_the_run_and_changes_nothing(bad):
    weight, optimizer = weights_and_optimizer()
    guarded_step(optimizer, max_grad_norm=1.0, what="policy")
    before, moments = weight.detach().clone(), {k: v.clone() for k, v in optimizer.state[weight].items()}
    weight.grad = torch.tensor([1.0, bad])
    with pytest.raises(DivergedError, match=r"gradient of the value function is (nan|inf); nothing was updated"):
        guarded_step(optimizer, max_grad_norm=1.0, what="value function")
    assert torch.equal(weight, before)
    assert all(torch.equal(optimizer.state[weight][key], moments[key]) for key in moments)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("memory", ["exp_avg", "exp_avg_sq"])
def test_a_memory_that_is_not_finite_stops_the_run_at_the_next_step(memory, bad):
    # With an infinite square Adam's step is 0: the weight would never move again.
    weight, optimizer = weights_and_optimizer()
    guarded_step(optimizer, max_grad_norm=1.0, what="policy")
    optimizer.state[weight][memory][1] = bad
    weight.grad = torch.tensor([1.0, 1.0])
    with pytest.raises(DivergedError, match=r"of the policy after its step: found (nan|inf)"):
        guarded_step(optimizer, max_grad_norm=1.0, what="policy")


def test_large_numbers_whose_squares_overflow_are_finite():
    weight, optimizer = weights_and_optimizer()
    guarded_step(optimizer, max_grad_norm=1.0, what="policy")
    optimizer.state[weight]["exp_avg_sq"].fill_(3e38)
    before = weight.detach().clone()
    guarded_step(optimizer, max_grad_norm=1.0, what="policy")
    assert torch.isfinite(weight).all()
    assert weight.detach().sub(before).abs().max() < 1e-6       # as good as no step


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named_though_its_gradient_is_finite(bad):
    weight, _ = weights_and_optimizer()
    weight.grad = None
    with pytest.raises(DivergedError, match=f"^the loss of the policy: found {bad}"):
        accumulate(SimpleNamespace(in_step=nullcontext), [weight], [0], lambda _: (weight.sum() + bad,), "policy")
    assert weight.grad is None


def test_a_new_learning_rate_holds_from_the_next_step_on():
    weight, optimizer = weights_and_optimizer()
    set_learning_rate(optimizer, 0.01)
    guarded_step(optimizer, max_grad_norm=10.0, what="policy")
    assert weight.tolist() == pytest.approx([0.99, -2.01], abs=1e-5)


def test_an_optimizer_of_nothing_or_of_what_cannot_be_trained_is_a_bug():
    weight, optim = nn.Parameter(torch.zeros(2)), OptimSection()
    with pytest.raises(AssertionError, match="policy: nothing is trainable"):
        make_optimizer({}, optim, "policy")
    with pytest.raises(AssertionError, match="float32"):
        make_optimizer({"weight": nn.Parameter(weight.bfloat16())}, optim, "policy")
    weight.requires_grad_(False)
    with pytest.raises(AssertionError, match="frozen"):
        make_optimizer({"weight": weight}, optim, "policy")


def test_an_optimizer_that_has_taken_no_step_has_nothing_to_save_and_loads_nothing():
    _, optimizer = weights_and_optimizer()
    assert optimizer_tensors(optimizer) == {}
    load_optimizer(optimizer, {})
    guarded_step(optimizer, max_grad_norm=1.0, what="policy")
    assert optimizer_tensors(optimizer).keys() == {"0/step", "0/exp_avg", "0/exp_avg_sq"}


@pytest.mark.parametrize("tensors", [{"0/exp_avg": torch.zeros(2, 2)}, {"1/exp_avg": torch.zeros(2)}])
def test_an_optimizer_of_other_parameters_is_refused(tensors):
    with pytest.raises(CheckpointError, match=r"/exp_avg, \[2.* belongs to no parameter"):
        load_optimizer(weights_and_optimizer()[1], tensors)
