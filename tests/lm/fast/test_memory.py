"""What fits in memory, and that what does not fit goes through in parts, or layer by layer, to the same result."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kltune.lm.data.examples import Prompt
from kltune.lm.fast import memory
from kltune.lm.fast.decoding import bytes_held
from kltune.lm.fast.memory import micro_batches, saved_bytes
from kltune.lm.machine import device_memory
from kltune.lm.machine.device_memory import device_bytes, free_bytes
from kltune.lm.model.batches import Parts
from kltune.lm.model.curvature import Fisher
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import sample, sample_rollout, uniform_numbers
from kltune.recipe import LoraSection
from tests.tiny_policies import ARCHITECTURES, random_batch, randomize

PROMPTS = [Prompt(tuple(range(3, 4 + length)), "", "test") for length in (5, 2, 7, 1, 4)]


@pytest.fixture
def both(open_policy) -> Policy:
    """A policy and a value function, both with adapters that hold random numbers."""
    policy = open_policy()
    policy.add_value_function(LoraSection(rank=4, alpha=8.0))
    randomize(policy.trainable_parameters())
    randomize(policy.value_parameters(), seed=7)
    return policy


def hold(monkeypatch, policy: Policy, beside: float) -> None:
    """Let the device have so many bytes beside the weights and what training adds to them."""
    needed = device_memory.SHARE * device_bytes(policy.device) - free_bytes(policy.network.causal, policy.device)
    monkeypatch.setattr(device_memory, "device_bytes", lambda _: (needed + beside) / device_memory.SHARE)
    policy.network.refresh()
    policy.network.batching.trained_rows(1)


def gradients(function, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a weighted sum of what a function gives on a batch."""
    ids, scored = random_batch()
    found = function(ids, scored)
    grads = torch.autograd.grad((found * torch.linspace(-1.0, 1.0, len(found))).sum(), tuple(tensors.values()))
    return dict(zip(tensors, grads, strict=True))


def all_cuts(count: int):
    """Every way to cut so many rows into runs: where each run ends."""
    for size in range(count):
        for inner in itertools.combinations(range(1, count), size):
            yield [*inner, count]


@pytest.mark.parametrize("cost", [0, 3, 20, 1000])
@pytest.mark.parametrize("most", [1, 2, 100])
def test_a_batch_is_cut_where_padding_and_parts_cost_least(cost, most):
    lengths = [4, 9, 4, 30, 8, 5, 9]
    ordered = sorted(lengths, reverse=True)

    def price(ends: list[int]) -> float:
        runs = list(zip([0, *ends], ends, strict=False))
        if any(end - start > most for start, end in runs):
            return math.inf
        return sum(cost + (end - start) * ordered[start] for start, end in runs)

    parts = micro_batches(lengths, lambda _: most, cost)
    assert sorted(place for part in parts for place in part) == list(range(len(lengths)))
    assert max(map(len, parts)) <= most
    assert max(lengths[place] for place in parts[0]) == 30
    found = sum(cost + len(part) * max(lengths[place] for place in part) for part in parts)
    assert found == min(map(price, all_cuts(len(lengths))))


def test_rows_of_one_length_stay_in_one_part_and_in_order():
    assert micro_batches([7] * 50, lambda _: 10**6, 1) == [list(range(50))]


def test_a_row_that_fits_nowhere_is_a_part_of_its_own():
    assert micro_batches([3, 50, 3], lambda length: 10 // length, 1) == [[1], [0, 2]]


def test_responses_to_one_prompt_stay_together(both):
    uniforms = uniform_numbers(np.random.default_rng(0), 10, 6)
    rollout = sample_rollout(both, PROMPTS, uniforms, temperature=1.0, exact=False)
    ids, scored = rollout.ids, rollout.scored & (torch.rand(rollout.scored.shape) < 0.7)
    scored[:, 8] |= rollout.scored[:, 8]  # no row without any
    scored[torch.arange(10), rollout.scored.int().argmax(1)] = True  # all of one prompt begin alike
    own = [int(row.nonzero().max()) + 1 for row in scored]
    lengths = both.network.batching.lengths(ids, scored)
    assert lengths == [max(own[2 * (at // 2)], own[2 * (at // 2) + 1]) for at in range(10)] != own
    both.network.batching.shares_prefixes = False
    assert both.network.batching.lengths(ids, scored) == own


def test_what_is_measured_in_parts_comes_back_row_by_row(trained_policy, monkeypatch):
    ids, scored = random_batch(9)
    whole = Parts(ids, scored, [range(9)])
    trained_policy.network.batching._pass_tokens = 0
    parts = trained_policy.network.parts(ids, scored)
    assert len(list(parts)) > 4
    wanted, found = (
        division.in_order(torch.cat([trained_policy.logprobs(*part) for part in division]))
        for division in (whole, parts)
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert torch.equal(parts.in_order(torch.cat([part[marks] for part, marks in parts])), ids[scored])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_a_batch_keeps_is_foreseen(open_policy, architecture):
    policy = open_policy(architecture)
    net = policy.network
    held = {tensor.untyped_storage()._cdata for tensor in (*net.causal.parameters(), *net.causal.buffers())}
    net.batching.trained_rows(1)
    for rows, length in ((4, 24), (16, 48)):
        kept = saved_bytes(lambda r=rows, n=length: net.hidden(torch.zeros(r, n, dtype=torch.long)), held)
        room = net.batching._room
        foreseen = rows * (room.per_token * length + room.per_square * length**2) / memory.BACKWARD
        assert kept / foreseen == pytest.approx(1.0, abs=0.15)


def test_memory_that_tensors_share_counts_once():
    x = torch.randn(100, requires_grad=True)
    y = x.exp()  # keeps its result
    assert saved_bytes(lambda: (x.exp() * 2.0).sum()) == 400
    assert saved_bytes(lambda: y.view(10, 10) * y.view(10, 10)) == 400
    assert saved_bytes(lambda: y * y, {y.untyped_storage()._cdata}) == 0


def test_measuring_draws_no_random_numbers_and_asks_for_the_devices_memory_once(open_policy, monkeypatch):
    policy = open_policy(lora=LoraSection(rank=4, alpha=8.0, dropout=0.5))
    asked = []
    monkeypatch.setattr(device_memory, "device_bytes", lambda device: asked.append(device) or 10**9)
    torch.manual_seed(3)
    with policy.dropout():
        rows = [policy.network.batching.trained_rows(50), policy.network.batching.trained_rows(100)]
    assert rows[0] >= 2 * rows[1] > 1
    assert len(asked) == 1
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)


def test_processes_plan_with_their_part_of_the_machines_memory(open_policy, monkeypatch):
    policy = open_policy(lora=LoraSection(rank=4, alpha=8.0))
    needed = device_memory.held_bytes(policy.network.causal)
    monkeypatch.setattr(device_memory, "device_bytes", lambda _: 4 * (needed + 2**20) / device_memory.SHARE)

    def rows(processes: int) -> tuple[int, int]:
        monkeypatch.setattr(device_memory.ranks, "beside", lambda: processes)
        policy.network.refresh()
        return policy.network.batching.trained_rows(50), policy.network.batching.sampled_rows(50, 10**6)

    assert all(2 * several < one for one, several in zip(rows(1), rows(4), strict=True))
    assert free_bytes(policy.network.causal, policy.device) == pytest.approx(2**20)
    assert free_bytes(policy.network.causal, torch.device("cuda")) == pytest.approx(3 * needed + 2**22)


def test_a_trunk_that_is_not_trained_fits_always(tiny_lm_policy):
    assert tiny_lm_policy.network.batching.trained_rows(10**6) > 10**9  # the adapter is on the head


def test_a_container_may_hold_less_than_its_machine(monkeypatch, tmp_path):
    whole = device_bytes(torch.device("cpu"))
    monkeypatch.setattr(device_memory, "CGROUPS", (str(tmp_path / "max"), str(tmp_path / "none")))
    (tmp_path / "max").write_text("12345678\n")
    assert device_bytes(torch.device("cpu")) == 12345678
    (tmp_path / "max").write_text("max\n")
    assert device_bytes(torch.device("cpu")) >= whole


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sequence_that_does_not_fit_is_computed_twice_to_the_same_gradient(open_policy, architecture, monkeypatch):
    policy = open_policy(architecture)
    randomize(policy.trainable_parameters())
    plain = gradients(policy.logprobs, policy.trainable_parameters())
    kept = saved_bytes(lambda: policy.logprobs(*random_batch()))
    hold(monkeypatch, policy, 1.0)
    again = gradients(policy.logprobs, policy.trainable_parameters())
    assert saved_bytes(lambda: policy.logprobs(*random_batch())) < 0.6 * kept
    for name, wanted in plain.items():
        torch.testing.assert_close(again[name], wanted, rtol=1e-4, atol=1e-6)


def test_it_is_computed_again_with_the_adapter_of_the_first_time(both, monkeypatch):
    # The backward pass of a value comes when the policy's adapter is on again.
    plain = gradients(both.values, both.value_parameters())
    hold(monkeypatch, both, 1.0)
    again = gradients(both.values, both.value_parameters())
    for name, wanted in plain.items():
        torch.testing.assert_close(again[name], wanted, rtol=1e-4, atol=1e-6)
    assert max(tensor.abs().max() for tensor in plain.values()) > 0.1


def test_layers_are_as_before_once_the_pass_is_over(trained_policy, monkeypatch):
    hold(monkeypatch, trained_policy, 1.0)
    trained_policy.logprobs(*random_batch()).sum().backward()
    assert all("forward" not in vars(module) for module in trained_policy.model.modules())


@pytest.mark.parametrize("rows_that_fit", [0, 2, 9])
def test_a_batch_is_trained_on_in_as_many_parts_as_memory_asks_for(trained_policy, monkeypatch, rows_that_fit):
    net = trained_policy.network
    net.batching.trained_rows(20)
    per_row = net.batching._room.per_token * 20 + net.batching._room.per_square * 400
    hold(monkeypatch, trained_policy, (rows_that_fit + 0.5) * per_row)
    assert net.batching.trained_rows(20) == rows_that_fit
    parts = net.micro_batches([20] * 9, None)
    assert sorted(map(len, parts)) == sorted({0: [1] * 9, 2: [2, 2, 2, 2, 1], 9: [9]}[rows_that_fit])


def test_what_a_recipe_asks_for_is_done_and_pairs_stay_whole(trained_policy):
    net = trained_policy.network
    assert net.micro_batches([20] * 4, 2) == [[0, 1], [2, 3]]
    assert net.micro_batches([20] * 4, 4, group=2) == [[0, 1], [2, 3]]
    assert net.micro_batches([20] * 2, 1, group=2) == [[0], [1]]
    assert net.micro_batches([20] * 4, None, group=2) == [[0, 1, 2, 3]]


def test_curvature_goes_in_parts_where_its_graph_does_not_fit(trained_policy, monkeypatch):
    ids, scored = random_batch()
    vector = torch.randn(sum(tensor.numel() for tensor in trained_policy.trainable_parameters().values()))
    whole = Fisher(trained_policy, ids, scored, 1.0, None)
    hold(monkeypatch, trained_policy, 1.0)  # not even one row: its layers are differentiated twice all the same
    parts = Fisher(trained_policy, ids, scored, 1.0, None)
    assert (len(whole._parts), len(parts._parts)) == (1, len(ids))
    assert (parts(vector) - whole(vector)).norm() < 1e-4 * whole(vector).norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_are_read_and_answered_in_parts_that_fit(open_policy, architecture, monkeypatch):
    policy = open_policy(architecture)
    randomize(policy.trainable_parameters())
    uniforms = uniform_numbers(np.random.default_rng(1), 10, 8)
    whole = sample(policy, PROMPTS, uniforms, temperature=1.0)
    monkeypatch.setattr(memory, "TOKENS_PER_PASS", 16)     # two prompts of 8
    assert torch.equal(sample(policy, PROMPTS, uniforms, temperature=1.0).ids, whole.ids)
    rows = policy.network.batching.sampled_rows(16, 2048)
    hold(monkeypatch, policy, 4.5 * memory.CACHE * bytes_held(policy.network.batching._token_cache) * 16)
    assert (rows, policy.network.batching.sampled_rows(16, 2048)) == (512, 4)
    assert torch.equal(sample(policy, PROMPTS, uniforms, temperature=1.0).ids, whole.ids)
