"""Fisher-vector products against double backprop of the KL they are the Hessian of."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kltune.core.control.trust_region import surrogate
from kltune.core.kl.divergence import kl_exact
from kltune.lm.fast.memory import saved_bytes
from kltune.lm.model.batches import response_scatter
from kltune.lm.model.curvature import Fisher, to_vector
from kltune.lm.model.snapshot import Snapshot
from kltune.recipe import LoraSection
from tests.tiny_policies import ARCHITECTURES, random_batch, randomize

TEMPERATURE = 0.8


def direction_of(policy, seed: int = 3) -> torch.Tensor:
    size = sum(tensor.numel() for tensor in policy.trainable_parameters().values())
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def by_double_backprop(policy, ids, scored, vector) -> torch.Tensor:
    """The Hessian of the mean KL(old ‖ new) of a response at new = old, times a vector."""
    parameters = list(policy.trainable_parameters().values())
    with sdpa_kernel(SDPBackend.MATH):
        logits = policy.network.logits(policy.network.before(ids, scored))
        kl = kl_exact(logits.detach(), logits, TEMPERATURE).sum() / len(ids)
        gradients = torch.autograd.grad(kl, parameters, create_graph=True, materialize_grads=True, allow_unused=True)
        along = to_vector(gradients).dot(vector)
        found = torch.autograd.grad(along, parameters, materialize_grads=True, allow_unused=True)
    return to_vector(found)


def relative_gap(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_product_is_the_hessian_of_the_kl(open_policy, architecture):
    policy = open_policy(architecture)
    randomize(policy.trainable_parameters())
    ids, scored = random_batch()
    vector = direction_of(policy)
    found = Fisher(policy, ids, scored, TEMPERATURE, None)(vector)
    assert relative_gap(found, by_double_backprop(policy, ids, scored, vector)) < 1e-5


def test_an_adapter_on_the_head_is_part_of_it(open_policy):
    policy = open_policy(lora=LoraSection(rank=4, alpha=8.0, targets=("lm_head", "down_proj")))
    randomize(policy.trainable_parameters())
    ids, scored = random_batch()
    vector = direction_of(policy)
    found = Fisher(policy, ids, scored, TEMPERATURE, None)(vector)
    assert relative_gap(found, by_double_backprop(policy, ids, scored, vector)) < 1e-5


def test_micro_batches_and_chunks_add_up(trained_policy, monkeypatch):
    ids, scored = random_batch()
    vector = direction_of(trained_policy)
    whole = Fisher(trained_policy, ids, scored, TEMPERATURE, None)(vector)
    assert relative_gap(Fisher(trained_policy, ids, scored, TEMPERATURE, 2)(vector), whole) < 1e-5
    monkeypatch.setattr(type(trained_policy.network), "chunk_rows", 7)
    assert relative_gap(Fisher(trained_policy, ids, scored, TEMPERATURE, None)(vector), whole) < 1e-5


def test_products_are_symmetric_and_never_negative(trained_policy):
    fisher = Fisher(trained_policy, *random_batch(), 1.0, None)
    u, v = direction_of(trained_policy, 4), direction_of(trained_policy, 5)
    assert u.dot(fisher(v)).item() == pytest.approx(v.dot(fisher(u)).item(), rel=1e-4)
    assert u.dot(fisher(u)).item() > 0.0


def test_a_fresh_adapter_has_no_gradient_and_no_curvature_in_a(policy):
    # ΔW = s·B·A with B = 0: nothing that A does reaches the logits (docs/maths.md 16)
    ids, scored = random_batch()
    names, parameters = zip(*policy.trainable_parameters().items(), strict=True)
    mask = torch.arange(int(scored.sum(1).max()))[None] < scored.sum(1)[:, None]
    logprobs = response_scatter(policy.logprobs(ids, scored), mask)
    advantages = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    surrogate(logprobs, logprobs.detach(), advantages, mask, len(ids)).backward()
    product = Fisher(policy, ids, scored, 1.0, None)(direction_of(policy))
    curvature = product.split([tensor.numel() for tensor in parameters])
    for name, tensor, part in zip(names, parameters, curvature, strict=True):
        assert (tensor.grad.abs().max().item() == 0.0) == ("lora_A" in name), name
        assert (part.abs().max().item() == 0.0) == ("lora_A" in name), name


def test_a_snapshot_puts_everything_back_bit_for_bit(trained_policy):
    old = Snapshot(trained_policy.trainable_parameters())
    before = {name: tensor.detach().clone() for name, tensor in trained_policy.trainable_parameters().items()}
    old.step({name: torch.full_like(tensor, 0.3) for name, tensor in before.items()}, scale=1e-3)
    moved = trained_policy.trainable_parameters()
    assert all(not torch.equal(moved[name], before[name]) for name in before)
    with old.in_place():
        assert all(torch.equal(moved[name], before[name]) for name in before)
    assert all(not torch.equal(moved[name], before[name]) for name in before)
    old.restore()
    assert all(torch.equal(moved[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_planned_with_the_square_that_the_plain_attention_keeps(open_policy, dtype):
    policy, (ids, scored) = open_policy(dtype=dtype), random_batch()
    fisher = Fisher(policy, ids, scored, TEMPERATURE, None)
    assert len(fisher._parts) == 1
    room = policy.network.batching._other_room
    long = torch.zeros(1, 400, dtype=torch.long)
    own = {tensor.untyped_storage()._cdata for tensor in policy.model.parameters()}
    kept = saved_bytes(lambda: fisher._linearised_all(long), own)
    assert room.per_square * 400 > room.per_token
    assert kept <= room.per_token * 400 + room.per_square * 400**2 <= 1.3 * kept
