"""A rollout holds what was sampled and what teacher forcing says of it, and refuses a sampler that is another."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kltune.core.tensors import per_response
from kltune.errors import DivergedError, ModelError
from kltune.lm.data.examples import Prompt
from kltune.lm.model import sampler as rollout_module
from kltune.lm.model.batches import Rollout
from kltune.lm.model.sampler import measured_rollout, sample, sample_rollout, uniform_numbers
from tests.oracles import BOS, Responses, tiny_policy_logits, tiny_reference_logits
from tests.tiny_policies import plain_logprobs

PROMPTS = [Prompt(tuple(ids), "text", "prompts.jsonl:1") for ids in ([3, 4], [9], [20, 21, 22, 23, 24, 25, 26])]
UNIFORMS = uniform_numbers(np.random.default_rng(3), 4 * len(PROMPTS), 30)
START = Prompt((BOS,), "<s>", "prompts.jsonl:1")
MEASURED = ("logprobs", "ref_logprobs", "ref_kl", "entropy", "ref_entropy", "log_ratio_variance")

# docs/maths.md 22: KL of the fixture's policy to ρ, by temperature, and the other way round.
POLICY_KL, POLICY_KL_COOL, REFERENCE_KL = 0.11253952, 0.188646, 0.12869274


def listed() -> tuple[Tensor, Tensor, Responses]:
    """All fifteen responses of TinyLM as a batch: ids, scored, and what they are."""
    responses = Responses()
    ids = torch.cat([torch.full((15, 1), BOS), responses.tokens], dim=1)
    return ids, torch.nn.functional.pad(responses.mask, (1, 0), value=False), responses


@pytest.fixture
def rollout(trained_policy) -> Rollout:
    return sample_rollout(trained_policy, PROMPTS, UNIFORMS, temperature=1.0)


# --- hidden states that are kept -------------------------------------------------------------------------------------


def test_what_is_kept_is_what_passes_give_and_saves_the_reference_one(trained_policy):
    kept = sample_rollout(trained_policy, PROMPTS, UNIFORMS, temperature=1.0, keep=("states", "ref_states"))
    network, ids, scored = trained_policy.network, kept.ids, kept.scored
    with torch.no_grad():
        torch.testing.assert_close(kept.kept("states"), network.before(ids, scored), atol=1e-5, rtol=0.0)
        with trained_policy.reference():
            torch.testing.assert_close(kept.kept("ref_states"), network.before(ids, scored), atol=1e-5, rtol=0.0)
    some = kept.select(torch.tensor([7, 2, 4]))
    found = trained_policy.logprobs_and_ref_kl(some.ids, some.scored, 1.0, ref_states=some.kept("ref_states"))
    wanted = trained_policy.logprobs_and_ref_kl(some.ids, some.scored, 1.0)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0.0)
    again = replace(kept, ref_states=kept.states)
    assert measured_rollout(trained_policy, again, 1.0).ref_states is None      # of another reference, maybe


def test_a_policy_that_acts_as_its_reference_is_measured_in_one_pass(trained_policy, rollout, monkeypatch):
    theirs = sample_rollout(trained_policy, PROMPTS, UNIFORMS, temperature=1.0, from_reference=True)
    with trained_policy.reference():
        passes, before = [], type(trained_policy.network).before
        monkeypatch.setattr(type(trained_policy.network), "before", lambda *args: passes.append(1) or before(*args))
        alone = sample_rollout(trained_policy, PROMPTS, UNIFORMS, temperature=1.0)
        assert len(passes) == len(trained_policy.network.parts(alone.ids, alone.scored))
    for name in ("ids", "logprobs", "entropy"):
        assert torch.equal(getattr(alone, name), getattr(theirs, name))
    assert alone.ref_kl.abs().max() == 0.0
    assert measured_rollout(trained_policy, alone, 1.0).ref_kl.abs().max() > 0.0      # and after it the two are two


# --- KL by listing every response ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "kl"), [(1.0, POLICY_KL), (0.7, POLICY_KL_COOL)])
def test_kl_of_tiny_lm_is_the_one_of_the_listing(tiny_lm_policy, temperature, kl):
    ids, scored, responses = listed()
    measured = tiny_lm_policy.measure(ids, scored, temperature)
    probabilities = responses.probabilities(tiny_policy_logits() / temperature)
    for values in (measured.ref_kl, measured.logprobs - measured.ref_logprobs):  # exact, and k1
        per_token = torch.zeros(15, 3).masked_scatter(responses.mask, values)
        assert (probabilities * per_token.sum(1)).sum().item() == pytest.approx(kl, abs=1e-6)
    entropy = torch.zeros(15, 3).masked_scatter(responses.mask, measured.entropy)
    by_hand = -(probabilities * probabilities.log()).sum().item()
    assert (probabilities * entropy.sum(1)).sum().item() == pytest.approx(by_hand, abs=1e-6)


def test_kl_of_the_swapped_pair_is_the_one_from_the_reference(tiny_lm_policy):
    ids, scored, responses = listed()
    measured = tiny_lm_policy.measure(ids, scored, swap=True)
    probabilities = responses.probabilities(tiny_reference_logits())
    for values in (measured.ref_kl, measured.logprobs - measured.ref_logprobs):
        per_token = torch.zeros(15, 3).masked_scatter(responses.mask, values)
        assert (probabilities * per_token.sum(1)).sum().item() == pytest.approx(REFERENCE_KL, abs=1e-6)


@pytest.mark.parametrize("from_reference", [False, True])
def test_sampled_kl_is_the_true_one_within_its_error_in_both_directions(tiny_lm_policy, from_reference):
    uniforms = uniform_numbers(np.random.default_rng(8), 4000, 3)
    rollout = sample_rollout(tiny_lm_policy, [START], uniforms, temperature=1.0, from_reference=from_reference)
    wanted, other = (REFERENCE_KL, POLICY_KL) if from_reference else (POLICY_KL, REFERENCE_KL)
    exact = per_response(rollout.ref_kl, rollout.response_mask).double()
    error = (exact.std() / math.sqrt(len(exact))).item()
    assert abs(exact.mean().item() - wanted) < 4 * error
    assert abs(exact.mean().item() - other) > 8 * error  # so the two directions cannot be mistaken
    k1 = per_response(rollout.logprobs - rollout.ref_logprobs, rollout.response_mask).double()
    assert abs(k1.mean().item() - wanted) < 4 * (k1.std() / math.sqrt(len(k1))).item()


def test_from_the_reference_the_two_change_places(trained_policy, tiny_model):
    rollout = sample_rollout(trained_policy, PROMPTS, UNIFORMS, temperature=1.0, from_reference=True)
    with trained_policy.reference():
        samples = sample(trained_policy, PROMPTS, UNIFORMS, temperature=1.0)
    assert torch.equal(rollout.ids, samples.ids)
    base = AutoModelForCausalLM.from_pretrained(tiny_model()).eval()
    by_hand = plain_logprobs(base, rollout.ids, rollout.scored)
    assert (rollout.logprobs[rollout.response_mask] - by_hand).abs().max() < 1e-5
    policy = trained_policy.measure_logprobs(rollout.ids, rollout.scored)
    assert (rollout.ref_logprobs[rollout.response_mask] - policy).abs().max() < 1e-5


# --- the tensors ---------------------------------------------------------------------------------------------------


def test_measured_numbers_are_exactly_0_outside_the_mask(rollout):
    mask = rollout.response_mask
    assert not mask.all()
    for name in MEASURED:
        values = getattr(rollout, name)
        assert values.shape == mask.shape
        assert values.dtype == torch.float32
        assert torch.equal(values[~mask], torch.zeros(int((~mask).sum()))), name
        assert (values[mask] != 0).all(), name


def test_every_number_stands_at_its_own_token(rollout, trained_policy):
    flat = trained_policy.measure(rollout.ids, rollout.scored)
    start = 0
    for row, length in enumerate(rollout.lengths.tolist()):
        for name in MEASURED:
            assert torch.equal(getattr(rollout, name)[row, :length], getattr(flat, name)[start : start + length])
        start += length


def test_without_exact_measures_they_are_none_rather_than_0(trained_policy):
    rollout = sample_rollout(trained_policy, PROMPTS, UNIFORMS, temperature=1.0, exact=False)
    unwanted = ("ref_kl", "entropy", "ref_entropy", "log_ratio_variance", "values")
    assert [getattr(rollout, name) for name in unwanted] == [None] * 5
    assert rollout.logprobs.shape == rollout.response_mask.shape


def test_selected_rows_are_the_rows_cut_to_the_longest_among_them(rollout):
    rollout = replace(rollout, values=rollout.logprobs + 1.0)
    lengths = rollout.lengths
    rows = lengths.argsort()[:3].flip(0)
    chosen = rollout.select(rows)
    width = int(lengths[rows].max())
    assert width < rollout.response_mask.shape[1]
    assert torch.equal(chosen.lengths, lengths[rows])
    assert chosen.response_mask.shape == (3, width)
    assert int(chosen.scored.nonzero()[:, 1].max()) + 1 == chosen.ids.shape[1] == chosen.scored.shape[1]
    for name in (*MEASURED, "values", "response_mask"):
        assert torch.equal(getattr(chosen, name), getattr(rollout, name)[rows, :width]), name
    for name in ("prompt_index", "truncated"):
        assert torch.equal(getattr(chosen, name), getattr(rollout, name)[rows])
    for name in ("ids", "scored"):
        assert torch.equal(getattr(chosen, name), getattr(rollout, name)[rows, : chosen.ids.shape[1]])
    assert chosen.responses == tuple(rollout.responses[i] for i in rows.tolist())
    assert chosen.prompts == tuple(rollout.prompts[i] for i in rows.tolist())
    assert [field.name for field in fields(chosen)] == [field.name for field in fields(rollout)]


def test_all_rows_selected_in_order_are_the_rollout(rollout):
    same = rollout.select(torch.arange(len(rollout.ids)))
    for field in fields(rollout):
        one, other = getattr(rollout, field.name), getattr(same, field.name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_a_selection_without_exact_measures_has_none(trained_policy):
    rollout = sample_rollout(trained_policy, PROMPTS, UNIFORMS, temperature=1.0, exact=False)
    assert rollout.select(torch.tensor([1])).ref_kl is None


def test_measuring_selected_rows_gives_the_same_numbers(rollout, trained_policy):
    rows = torch.tensor([7, 2])
    chosen = rollout.select(rows)
    again = trained_policy.measure(chosen.ids, chosen.scored)
    assert (again.ref_kl - chosen.ref_kl[chosen.response_mask]).abs().max() < 1e-5


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", ["tiny_lm_policy", "trained_policy"])
def test_a_sampler_at_another_temperature_is_refused(request, monkeypatch, fixture):
    policy = request.getfixturevalue(fixture)

    def too_cool(policy, prompts, uniforms, *, temperature):
        return sample(policy, prompts, uniforms, temperature=0.9 * temperature)

    prompts = [START] if fixture == "tiny_lm_policy" else PROMPTS
    sample_rollout(policy, prompts, UNIFORMS[:, :3], temperature=1.0)
    monkeypatch.setattr(rollout_module, "sample", too_cool)
    with pytest.raises(ModelError, match="not drawn from the distribution that is measured"):
        sample_rollout(policy, prompts, UNIFORMS[:, :3], temperature=1.0)


def test_a_sampler_that_is_the_reference_is_refused(trained_policy, monkeypatch):
    def other(policy, prompts, uniforms, *, temperature):
        with policy.reference():
            return sample(policy, prompts, uniforms, temperature=temperature)

    monkeypatch.setattr(rollout_module, "sample", other)
    with pytest.raises(ModelError, match="not drawn from the distribution that is measured"):
        sample_rollout(trained_policy, PROMPTS, UNIFORMS, temperature=1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", MEASURED)
def test_a_measured_number_that_is_not_finite_stops_the_run_and_is_named(trained_policy, monkeypatch, name, bad):
    measure = trained_policy.measure

    def broken(*args, **keywords):
        found = measure(*args, **keywords)
        return found._replace(**{name: getattr(found, name).index_fill(0, torch.tensor([3]), bad)})

    monkeypatch.setattr(trained_policy, "measure", broken)
    with pytest.raises(DivergedError, match=f"^{name} of sampled tokens is not finite"):
        sample_rollout(trained_policy, PROMPTS, UNIFORMS, temperature=1.0)
