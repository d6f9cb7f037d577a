"""A prompt that is read once for all its responses gives what whole rows give, and the same gradient."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kltune.lm.data.examples import Prompt
from kltune.lm.fast import shared_prefix
from kltune.lm.fast.shared_prefix import shared_prefixes
from kltune.lm.model import network as network_module
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import sample_rollout, uniform_numbers
from kltune.recipe import LoraSection
from kltune.train.experience import Experience
from tests.foreign_models import save_model
from tests.tiny_policies import EOS, VOCABULARY, randomize, save_tiny_model

SHARING = ("llama", "gpt2", "qwen3", "granite", "cohere")
NOT_SHARING = ("gemma2",)       # a sliding window


def rows_of(groups: list[tuple[int, list[int]]], seed: int = 3) -> tuple[Tensor, Tensor]:
    """Right-padded rows: for each group, a prompt of so many tokens and responses of so many to it."""
    numbers = np.random.default_rng(seed)
    texts, marks = [], []
    for prompt, responses in groups:
        asked = numbers.integers(0, VOCABULARY, prompt).tolist()
        for length in responses:
            texts.append(asked + numbers.integers(0, VOCABULARY, length).tolist())
            marks.append([False] * prompt + [True] * length)
    width = max(map(len, texts))
    ids = torch.tensor([text + [EOS] * (width - len(text)) for text in texts])
    return ids, torch.tensor([row + [False] * (width - len(row)) for row in marks])


PAIRS = rows_of([(20, [5, 9]), (17, [1, 1]), (23, [6, 2])])
GROUPS = rows_of([(21, [4, 5, 1, 3]), (30, [2, 6]), (24, [3]), (28, [2, 2, 7])])
EQUAL_LENGTHS = rows_of([(24, [6, 6, 6])] * 2)
HOLED = (GROUPS[0], GROUPS[1] & (torch.arange(GROUPS[0].shape[1]) % 7 != 5))  # not every response token is scored


def gradient(policy: Policy, ids: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and exact KL of scored tokens, and the gradient of a sum that weighs each differently."""
    policy.model.zero_grad()
    found = torch.stack(policy.logprobs_and_ref_kl(ids, scored, 0.7))
    (found * torch.linspace(-1.0, 2.0, found.numel()).view_as(found)).sum().backward()
    return found.detach(), torch.cat([tensor.grad.flatten() for tensor in policy.trainable_parameters().values()])


@pytest.mark.parametrize("architecture", SHARING)
@pytest.mark.parametrize("batch", [PAIRS, GROUPS, EQUAL_LENGTHS, HOLED], ids=["pairs", "groups", "equal", "holed"])
def test_a_shared_prompt_changes_no_number_and_no_gradient(open_policy, architecture, batch):
    policy = open_policy(architecture)
    randomize(policy.trainable_parameters())
    assert policy.network.fast.shares_prefixes
    assert shared_prefixes(*batch) is not None
    found, grad = gradient(policy, *batch)
    policy.network.fast.shares_prefixes = False
    wanted, wanted_grad = gradient(policy, *batch)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    assert (grad - wanted_grad).norm() < 1e-5 * wanted_grad.norm()


def test_values_too_are_read_off_shared_prompts(policy):
    policy.add_value_function(LoraSection(rank=4, alpha=8.0))
    randomize(policy.value_parameters())
    found = policy.values(*GROUPS)
    policy.network.fast.shares_prefixes = False
    torch.testing.assert_close(found, policy.values(*GROUPS), atol=1e-5, rtol=1e-5)


def test_a_prompt_goes_through_the_trunk_once(policy, monkeypatch):
    """The growth law: prompts + responses, not responses × (prompt + response)."""
    seen = []
    policy.network._trunk.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    ids, scored = rows_of([(40, [8] * 8)])
    policy.measure_logprobs(ids, scored)
    assert seen == [40, 8 * 7]


@pytest.mark.parametrize(
    "batch",
    [
        rows_of([(20, [5]), (20, [5])]),                                    # nothing in common
        rows_of([(3, [20, 20])]),                                           # too little
        (GROUPS[0], GROUPS[1] & (torch.arange(len(GROUPS[0])) > 0)[:, None]),  # a row without anything to measure
    ],
    ids=["different prompts", "short prompt", "nothing scored"],
)
def test_where_nothing_is_saved_rows_stay_whole(batch):
    assert shared_prefixes(*batch) is None


def test_rows_whose_prompts_differ_in_one_token_share_nothing():
    ids, scored = rows_of([(30, [3, 3])])
    other = ids.clone()
    other[1, 0] = (ids[1, 0] + 1) % VOCABULARY
    assert shared_prefixes(ids, scored) is not None
    assert shared_prefixes(other, scored) is None


@pytest.mark.parametrize("architecture", NOT_SHARING)
def test_a_model_that_attends_or_ends_otherwise_reads_whole_rows(open_policy, architecture):
    policy = open_policy(architecture)
    assert not policy.network.fast.shares_prefixes
    assert torch.isfinite(policy.logprobs(*PAIRS)).all()


def test_a_window_over_the_context_means_whole_rows(open_policy, tmp_path):
    """Its mask would be replaced by ours, which knows no window."""
    folder = save_tiny_model(tmp_path / "windowed", "qwen3", sliding_window=8, use_sliding_window=True)
    assert not open_policy(path=folder).network.fast.shares_prefixes


@pytest.mark.parametrize(("kind", "windowed"), [
    ("gpt_neo", {"window_size": 8}), ("doge", {"keep_window_size": 8}), ("llama", {"attention_window_size": 8}),
])
def test_a_window_by_any_name_means_whole_rows(open_policy, tmp_path, kind, windowed):
    folder = save_model(kind, tmp_path / "windowed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | windowed))
    policy = open_policy(path=folder)
    assert not policy.network.fast.shares_prefixes
    ids, scored = PAIRS
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits[:, :-1].log_softmax(-1)
    wanted = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)[scored[:, 1:]]
    torch.testing.assert_close(policy.logprobs(ids, scored).detach(), wanted, atol=2e-5, rtol=1e-5)


def test_a_trunk_that_ignores_what_it_should_see_is_found_out(open_policy, monkeypatch):
    monkeypatch.setattr(shared_prefix, "_visible", lambda starts, s, t, dtype: torch.zeros(len(starts), 1, t, s + t))
    assert not open_policy().network.fast.shares_prefixes


def test_minibatches_keep_the_responses_to_a_prompt_together_and_take_each_row_once(policy):
    prompts = [Prompt((0, 4 + at), f"w{4 + at}", "here") for at in range(6)]
    numbers = np.random.default_rng(0)
    rollout = sample_rollout(policy, prompts, uniform_numbers(numbers, 24, 3), temperature=1.0, exact=False)
    experience = Experience(rollout, torch.arange(24.0)[:, None] * rollout.response_mask, None, 0.0)
    orders = set()
    for seed in range(5):
        parts = list(experience.minibatches(8, np.random.default_rng(seed)))
        rows = torch.cat([part.advantages.amax(dim=1) for part in parts])
        assert sorted(rows.tolist()) == list(range(24))
        for part in parts:
            owners = part.rollout.prompt_index
            assert owners.tolist() == [owners[0]] * 4 + [owners[4]] * 4
        orders.add(tuple(rows.tolist()))
    assert len(orders) == 5


@pytest.mark.parametrize("rows", [1, 64])
def test_a_chunked_head_sees_shared_states(trained_policy, monkeypatch, rows):
    monkeypatch.setattr(network_module.Network, "chunk_rows", property(lambda self: rows))
    found = trained_policy.measure(*GROUPS)
    trained_policy.network.fast.shares_prefixes = False
    torch.testing.assert_close(found.ref_kl, trained_policy.measure(*GROUPS).ref_kl, atol=2e-5, rtol=1e-5)
