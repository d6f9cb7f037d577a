"""Another state of the policy's own tensors: followed, and measured against."""

import numpy as np
import pytest
import torch

from kltune.lm.data.examples import Prompt
from kltune.lm.model.network import Network
from kltune.lm.model.sampler import sample_rollout, uniform_numbers
from kltune.lm.model.snapshot import Snapshot, StepKL, kl_to
from tests.tiny_policies import randomize

PROMPTS = [Prompt(tuple(ids), "text", "prompts.jsonl:1") for ids in ([3, 4], [9], [20, 21, 22, 23])]
TEMPERATURE = 0.8


def test_a_copy_goes_part_of_the_way_or_all_of_it(trained_policy):
    parameters = trained_policy.trainable_parameters()
    copy = Snapshot(parameters)
    old = {name: tensor.clone() for name, tensor in copy.tensors.items()}
    randomize(parameters, seed=7)
    copy.approach(0.25)
    for name, tensor in parameters.items():
        torch.testing.assert_close(copy.tensors[name], 0.75 * old[name] + 0.25 * tensor.detach())
    copy.approach(1.0)
    assert all(torch.equal(copy.tensors[name], tensor) for name, tensor in parameters.items())


def test_the_kl_to_another_state_is_that_of_the_listed_distributions(trained_policy):
    policy, parameters = trained_policy, trained_policy.trainable_parameters()
    other = Snapshot(parameters)
    randomize(parameters, seed=7)
    uniforms = uniform_numbers(np.random.default_rng(3), len(PROMPTS), 6)
    rollout = sample_rollout(policy, PROMPTS, uniforms, temperature=TEMPERATURE)
    found = kl_to(policy, other, rollout, TEMPERATURE)

    def table() -> torch.Tensor:
        with torch.no_grad():
            logits = policy.model(input_ids=rollout.ids, use_cache=False).logits[:, :-1]
        return (logits / TEMPERATURE).log_softmax(-1).double()

    mine = table()
    with other.in_place():
        theirs = table()
    kl = (mine.exp() * (mine - theirs)).sum(-1)
    assert found == pytest.approx((kl * rollout.scored[:, 1:]).sum().item() / len(PROMPTS), rel=1e-4)
    assert found > 0.01
    assert kl_to(policy, Snapshot(parameters), rollout, TEMPERATURE) == 0.0


@pytest.mark.parametrize("reference", [False, True])
def test_states_that_scoring_kept_save_a_step_its_passes_and_change_no_bit(trained_policy, monkeypatch, reference):
    policy, parameters = trained_policy, trained_policy.trainable_parameters()
    uniforms = uniform_numbers(np.random.default_rng(3), 4 * len(PROMPTS), 6)
    plain, kept = (
        sample_rollout(policy, PROMPTS, uniforms, temperature=TEMPERATURE, keep=keep)
        for keep in ((), ("states", "ref_states"))
    )
    old = Snapshot(parameters)
    randomize(parameters, seed=7)
    passes: list[int] = []
    before = Network.before
    monkeypatch.setattr(Network, "before", lambda *args: passes.append(1) or before(*args))
    found = StepKL(policy, old, plain, TEMPERATURE, reference=reference).measure()
    taken = len(passes)
    again = StepKL(policy, old, kept, TEMPERATURE, reference=reference).measure()
    assert all(a is b or torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert taken == (3 if reference else 2) * (len(passes) - taken) > 0
