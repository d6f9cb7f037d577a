"""How work grows with what is asked for, in operations, waits and bytes: a machine's mood is not in them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from bench_parts import counted, open_policy, random_llama

from kltune.lm.data.chat import EndTokens
from kltune.lm.data.examples import Prompt
from kltune.lm.fast.memory import saved_bytes
from kltune.lm.model import sampler
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import sample, uniform_numbers
from kltune.recipe import LoraSection

PROMPT_TOKENS, RESPONSES, TOKENS, LAYERS, VOCABULARY = 6, 8, 8, 2, 200


@pytest.fixture(scope="module")
def make_policy(tmp_path_factory) -> Callable[..., Policy]:
    """A function that opens a random Llama of so many layers and words, whose adapter does something; made once."""
    made: dict[tuple[int, int], Policy] = {}

    def make(layers: int = LAYERS, vocabulary: int = VOCABULARY) -> Policy:
        if (layers, vocabulary) not in made:
            folder = tmp_path_factory.mktemp("llama")
            made[layers, vocabulary] = open_policy(str(random_llama(
                folder, hidden=32, layers=layers, vocabulary=vocabulary, logits=3.0)), 1, 1)[0]
            made[layers, vocabulary].ends = EndTokens((-1,), None)
        return made[layers, vocabulary]

    return make


def rows_of(responses: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and which are scored, every row as long."""
    ids = torch.randint(3, VOCABULARY, (responses, PROMPT_TOKENS + tokens), generator=torch.Generator().manual_seed(0))
    return ids, (torch.arange(ids.shape[1]) >= PROMPT_TOKENS).expand(ids.shape)


def sampled(policy: Policy, responses: int = RESPONSES, tokens: int = TOKENS) -> dict[str, int]:
    prompts = [Prompt(tuple(row), "", "here") for row in rows_of(responses, 0)[0].tolist()]
    uniforms = uniform_numbers(np.random.default_rng(0), responses, tokens)
    sample(policy, prompts[:1], uniforms[:1], temperature=1.0)      # what is tried once per model
    return counted(lambda: sample(policy, prompts, uniforms, temperature=1.0))


def scored(policy: Policy, responses: int = RESPONSES, tokens: int = TOKENS) -> dict[str, int]:
    return counted(lambda: policy.measure(*rows_of(responses, tokens)))


def trained(policy: Policy, responses: int = RESPONSES, tokens: int = TOKENS) -> dict[str, int]:
    found = counted(lambda: policy.logprobs(*rows_of(responses, tokens)).sum().backward())
    policy.model.zero_grad()
    there = {tensor.untyped_storage()._cdata for tensor in policy.model.parameters()}
    return found | {"bytes": saved_bytes(lambda: policy.logprobs(*rows_of(responses, tokens)).sum(), there)}


WORKS = {"sample": sampled, "score": scored, "train": trained}


@pytest.mark.parametrize("work", WORKS)
def test_more_responses_are_no_more_operations_and_no_more_waits(make_policy, work):
    policy = make_policy()
    few, many = (WORKS[work](policy, responses=count) for count in (RESPONSES, 4 * RESPONSES))
    assert many["kernels"] <= 1.02 * few["kernels"]
    assert many["waits"] == few["waits"]
    assert many.get("bytes", 0) <= 4.1 * few.get("bytes", 0)


@pytest.mark.parametrize("work", ["score", "train"])
def test_longer_responses_are_no_more_operations(make_policy, work):
    policy = make_policy()
    short, long = (WORKS[work](policy, tokens=count) for count in (TOKENS, 4 * TOKENS))
    assert long["kernels"] <= 1.02 * short["kernels"]
    assert long["waits"] == short["waits"]
    positions = (PROMPT_TOKENS + 4 * TOKENS) / (PROMPT_TOKENS + TOKENS)
    assert long.get("bytes", 0) <= 1.1 * positions * short.get("bytes", 0)


def test_every_token_decoded_costs_as_much_as_the_one_before(make_policy):
    policy = make_policy()
    counts = [sampled(policy, tokens=count) for count in (8, 16, 32)]
    for name in ("kernels", "waits"):
        first, second = counts[1][name] - counts[0][name], counts[2][name] - counts[1][name]
        assert second <= 2.02 * first, name


@pytest.mark.parametrize("work", WORKS)
def test_every_layer_costs_as_much_as_the_one_before(make_policy, work):
    one, two, four = (WORKS[work](make_policy(layers=count)) for count in (1, 2, 4))
    assert four["kernels"] - two["kernels"] <= 2.02 * (two["kernels"] - one["kernels"])
    assert one["waits"] == two["waits"] == four["waits"]
    assert four.get("bytes", 0) - two.get("bytes", 0) <= 2.02 * (two.get("bytes", 0) - one.get("bytes", 0))


@pytest.mark.parametrize("work", WORKS)
def test_a_larger_vocabulary_is_no_more_operations_and_nothing_of_it_is_kept(make_policy, work):
    small, large = (WORKS[work](make_policy(vocabulary=count)) for count in (VOCABULARY, 8 * VOCABULARY))
    assert large["kernels"] <= 1.02 * small["kernels"]
    assert large["waits"] == small["waits"]
    assert large.get("bytes", 0) == small.get("bytes", 0)


def test_tokens_drawn_in_many_parts_are_waited_for_once(make_policy, monkeypatch):
    policy = make_policy()
    whole = sampled(policy)
    monkeypatch.setitem(sampler.DRAW_BYTES, "cpu", 4 * VOCABULARY)     # a row at a time
    parts = sampled(policy)
    assert parts["kernels"] > whole["kernels"]
    assert parts["waits"] == whole["waits"]


def test_an_adapter_that_is_switched_off_costs_nothing(make_policy):
    policy = make_policy(layers=3)
    alone = {work: count(policy) for work, count in WORKS.items()}
    policy.add_value_function(LoraSection())
    assert {work: count(policy) for work, count in WORKS.items()} == alone
