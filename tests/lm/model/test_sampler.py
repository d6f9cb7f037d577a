"""What is sampled is the policy's own distribution, and depends on nothing but prompt, numbers and weights."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from kltune.errors import DivergedError
from kltune.lm.data.examples import Prompt
from kltune.lm.fast import memory
from kltune.lm.fast.decoding import GrowingDecoder
from kltune.lm.model import sampler
from kltune.lm.model.batches import Samples
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import sample, uniform_numbers
from tests.counting import Counted
from tests.oracles import BOS, Responses, tiny_policy_logits, tiny_reference_logits
from tests.tiny_policies import ARCHITECTURES, EOS, plain_sample, randomize, save_tiny_model

ENDS = (EOS, 5, 11, 17)  # several, so that responses end at different times
LIMIT = 12
PROMPTS = [
    Prompt(tuple(ids), " ".join(f"w{i}" for i in ids), f"prompts.jsonl:{line}")
    for line, ids in enumerate([[3, 4], [9], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [20, 21, 22, 23, 24], [30, 31]])
]
UNIFORMS = uniform_numbers(np.random.default_rng(0), 4 * len(PROMPTS), LIMIT)


def tokens_of(samples: Samples) -> list[list[int]]:
    return [row[marks].tolist() for row, marks in zip(samples.ids, samples.scored, strict=True)]


def frequencies(samples: Samples) -> Counter[tuple[int, ...]]:
    return Counter(tuple(row) for row in tokens_of(samples))


def draw(policy: Policy, prompts=PROMPTS, uniforms=UNIFORMS, temperature: float = 1.0) -> Samples:
    return sample(policy, prompts, uniforms, temperature=temperature)


# --- the distribution ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("who", ["policy", "reference"])
def test_every_response_comes_as_often_as_its_probability_says(tiny_lm_policy, who, temperature):
    count = 20_000
    uniforms = uniform_numbers(np.random.default_rng(1), count, 3)
    prompt = Prompt((BOS,), "<s>", "")
    if who == "policy":
        samples = draw(tiny_lm_policy, [prompt], uniforms, temperature)
        logits = tiny_policy_logits()
    else:
        with tiny_lm_policy.reference():
            samples = draw(tiny_lm_policy, [prompt], uniforms, temperature)
        logits = tiny_reference_logits()
    responses = Responses()
    expected = responses.probabilities(logits / temperature)
    found = frequencies(samples)
    assert set(found) <= set(responses.listed)
    chi_square = 0.0
    for response, p in zip(responses.listed, expected.tolist(), strict=True):
        assert abs(found[response] / count - p) < 4 * math.sqrt(p * (1 - p) / count), response
        chi_square += (found[response] - count * p) ** 2 / (count * p)
    assert chi_square < 36.1  # 14 degrees of freedom, p = 0.001


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_response_is_the_one_that_the_plain_model_without_a_cache_gives(
    open_policy, tiny_model, architecture, temperature
):
    policy = open_policy(architecture)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture)).eval()
    uniforms = UNIFORMS[: 2 * len(PROMPTS)]
    samples = draw(policy, uniforms=uniforms, temperature=temperature)
    for index, response in enumerate(tokens_of(samples)):
        by_hand = plain_sample(model, PROMPTS[index // 2].ids, uniforms[index].tolist(), [EOS], temperature)
        assert response == by_hand


def test_a_trained_policy_and_its_reference_sample_what_each_says(ending_policy, many_ends):
    model = AutoModelForCausalLM.from_pretrained(many_ends).eval()
    with ending_policy.reference():
        reference = tokens_of(draw(ending_policy))
    assert reference == [
        plain_sample(model, PROMPTS[index // 4].ids, row.tolist(), ENDS) for index, row in enumerate(UNIFORMS)
    ]
    assert tokens_of(draw(ending_policy)) != reference


def test_the_models_generation_config_is_not_consulted(open_policy, tiny_model, tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        min_p=0.5,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(3, 20)),
        max_new_tokens=1,
        eos_token_id=EOS,
    ).save_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.top_k == 1
    assert tokens_of(draw(open_policy(path=folder))) == tokens_of(draw(open_policy(path=tiny_model())))


def test_a_token_of_probability_0_is_never_drawn_whatever_the_number():
    almost_one = np.nextafter(1.0, 0.0)
    edges = torch.tensor([0.0, np.nextafter(0.0, 1.0), 0.5, np.nextafter(0.5, 0.0), almost_one], dtype=torch.float64)
    logits = torch.tensor([[-math.inf, 0.0, -1e4, 0.0, -math.inf]]).expand(len(edges), -1)
    tokens, logprobs = sampler._draw(logits, edges, 1.0, None)
    assert tokens.tolist() == [1, 1, 3, 1, 3]
    assert logprobs.tolist() == pytest.approx([math.log(0.5)] * len(edges))
    generator = np.random.default_rng(0)
    for _ in range(200):  # sums of other sizes, where u · sum could round up to the sum itself
        row = torch.from_numpy(generator.normal(size=50)).float()
        row[generator.random(50) < 0.5] = -math.inf
        row[[0, -1]] = -math.inf
        row[25] = 0.0
        drawn, _ = sampler._draw(row.expand(len(edges), -1), edges, 1.0, None)
        assert torch.isfinite(row[drawn]).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_stop_the_run(policy, bad):
    with torch.no_grad():
        policy.network.causal.lm_head.weight[7] = bad
    with pytest.raises(DivergedError, match="logits are not finite"):
        draw(policy)


class StandingRows:
    """A decoder that runs nothing: the logits after every token are the same."""

    compact_below = 0.5

    def __init__(self, logits):
        self.logits = logits

    def feed(self, ids):
        return self.logits

    def keep(self, rows):
        self.logits = self.logits[rows]


def test_a_token_takes_a_gpu_few_kernels_and_the_cpu_waits_for_few_of_them(policy, monkeypatch):
    """Counted on a CPU that takes the way of a GPU, and for a large vocabulary on tensors without numbers."""
    monkeypatch.setattr(sampler, "_kind", lambda device: "gpu")
    logits = torch.zeros(16, 64)
    logits[:, EOS] = -20.0
    monkeypatch.setattr(policy.network, "start", lambda *_: (logits, StandingRows(logits)))

    def spent(tokens: int) -> Counted:
        uniforms = uniform_numbers(np.random.default_rng(0), 16, tokens)
        with Counted() as counted:
            sampler._decode(policy, PROMPTS[:1], uniforms, 1.0, None)
        return counted

    short, long = spent(16), spent(48)
    assert long.waits - short.waits == 32 / sampler.LOOK_EVERY["gpu"]
    with Counted() as drawn:
        sampler._draw(logits, torch.zeros(16, dtype=torch.float64), 1.0, None)
    beside = (long.kernels - short.kernels) / 32 - drawn.kernels
    large = torch.empty(512, 151_936, dtype=torch.bfloat16, device="meta")
    with Counted() as drawn:
        sampler._draw(large, torch.empty(512, dtype=torch.float64, device="meta"), 1.0, None)
    assert drawn.waits == 0
    assert beside + drawn.kernels <= 60


def test_how_often_a_gpu_is_asked_who_has_ended_changes_nothing(ending_policy, monkeypatch):
    wanted = draw(ending_policy)
    monkeypatch.setattr(sampler, "_kind", lambda device: "gpu")
    for every in (1, 2, 5, 100):
        monkeypatch.setitem(sampler.LOOK_EVERY, "gpu", every)
        found = draw(ending_policy)
        assert tokens_of(found) == tokens_of(wanted)
        torch.testing.assert_close(found.logprobs, wanted.logprobs)


# --- on nothing else -----------------------------------------------------------------------------------------------


def test_responses_end_at_different_times_in_these_tests(ending_policy):
    lengths = draw(ending_policy).lengths
    assert lengths.min() <= 2
    assert lengths.max() == LIMIT
    assert len(set(lengths.tolist())) >= 5


@pytest.mark.parametrize("rows", [1, 4, 8, 1000])
@pytest.mark.parametrize("compact_below", [0.0, 0.8, 1.1])
def test_the_split_into_passes_and_the_dropping_of_finished_rows_change_nothing(
    ending_policy, monkeypatch, rows, compact_below
):
    whole = draw(ending_policy)
    monkeypatch.setattr(memory, "ROWS_PER_PASS", rows)
    monkeypatch.setattr(GrowingDecoder, "compact_below", compact_below)
    again = draw(ending_policy)
    assert tokens_of(again) == tokens_of(whole)
    assert (again.logprobs - whole.logprobs).abs().max() < 1e-5
    assert torch.equal(again.prompt_index, whole.prompt_index)
    assert again.responses == whole.responses


def test_the_order_of_prompts_changes_nothing_but_the_order(ending_policy):
    whole = tokens_of(draw(ending_policy))
    order = [3, 0, 4, 2, 1]
    rows = [4 * index + k for index in order for k in range(4)]
    mixed = draw(ending_policy, [PROMPTS[index] for index in order], UNIFORMS[rows])
    assert tokens_of(mixed) == [whole[row] for row in rows]
    assert mixed.prompts == tuple(PROMPTS[index].text for index in order for _ in range(4))


def test_a_prompt_beside_longer_ones_is_answered_as_it_is_alone(ending_policy):
    whole = tokens_of(draw(ending_policy))
    for index, prompt in enumerate(PROMPTS):
        rows = slice(4 * index, 4 * index + 4)
        assert tokens_of(draw(ending_policy, [prompt], UNIFORMS[rows])) == whole[rows]


def test_responses_to_one_prompt_are_those_of_the_prompt_given_several_times(ending_policy):
    repeated = [prompt for prompt in PROMPTS for _ in range(4)]
    assert tokens_of(draw(ending_policy, repeated)) == tokens_of(draw(ending_policy))


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    one, same, other = (uniform_numbers(np.random.default_rng(seed), 3, 5) for seed in (4, 4, 5))
    assert one.dtype == torch.float64
    assert one.shape == (3, 5)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_numbers_that_do_not_divide_among_the_prompts_are_a_bug(policy):
    for rows in (7, 4, 0):
        with pytest.raises(ValueError, match=f"{rows} rows of random numbers do not divide among 5 prompts"):
            draw(policy, uniforms=UNIFORMS[:rows])


# --- what it costs: counts, not seconds -----------------------------------------------------------------------------


def counted_steps(policy: Policy, monkeypatch) -> list[tuple[int, int]]:
    """The shapes of all that goes through the model from now on: (rows, tokens) of each pass."""
    shapes, ways = [], policy.network.fast
    ways.batching.sampled_rows(1, 1)  # the cache of one token is measured once

    def counting(step):
        return lambda ids, *rest: shapes.append(tuple(ids.shape)) or step(ids, *rest)

    monkeypatch.setattr(ways, "step", counting(ways.step))
    next_step = ways.next_step
    monkeypatch.setattr(ways, "next_step", lambda positions: counting(next_step(positions)))
    return shapes


def test_each_prompt_goes_through_the_model_once_whatever_the_number_of_responses(ending_policy, monkeypatch):
    shapes = counted_steps(ending_policy, monkeypatch)
    draw(ending_policy)
    longest = max(len(prompt.ids) for prompt in PROMPTS)
    assert shapes[0] == (len(PROMPTS), longest)
    assert {tokens for _, tokens in shapes[1:]} == {1}


def test_ragged_responses_cost_the_sum_of_their_lengths(ending_policy, monkeypatch):
    limit = 32
    shapes = counted_steps(ending_policy, monkeypatch)
    lengths = draw(ending_policy, uniforms=uniform_numbers(np.random.default_rng(2), 40 * len(PROMPTS), limit)).lengths
    assert 0.15 < lengths.float().mean() / limit < 0.35  # about a quarter of the limit, as far apart as lengths get
    assert lengths.max() == limit
    rows = len(lengths) + sum(rows for rows, _ in shapes[1:])  # the first token of each comes with the prompt
    assert 1.0 <= rows / lengths.sum().item() <= 1.25


@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_drawing_a_few_rows_at_a_time_changes_nothing(monkeypatch, rows_at_once):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(10, 50, generator=generator)
    numbers = torch.rand(10, dtype=torch.float64, generator=generator)
    tokens, logprobs = sampler._draw(logits, numbers, 0.7, None)
    monkeypatch.setitem(sampler.DRAW_BYTES, "cpu", rows_at_once * 4 * 50)
    again, logprobs_again = sampler._draw(logits, numbers, 0.7, None)
    assert torch.equal(again, tokens)
    assert torch.equal(logprobs_again, logprobs)
    by_hand = torch.softmax(logits.double() / 0.7, -1).cumsum(-1)
    assert tokens.tolist() == [int((row > u).nonzero()[0]) for row, u in zip(by_hand, numbers, strict=True)]


# --- the shape of what comes back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_samplers_own_log_probabilities_are_those_of_teacher_forcing(open_policy, architecture):
    policy = open_policy(architecture)
    randomize(policy.trainable_parameters())
    samples = draw(policy, temperature=0.7)
    forced = policy.logprobs(samples.ids, samples.scored, 0.7).detach()
    assert (samples.logprobs[samples.response_mask] - forced).abs().max() < 1e-4
    assert samples.logprobs[~samples.response_mask].abs().sum() == 0.0


def test_the_end_token_belongs_to_the_response_and_nothing_after_it_does(ending_policy):
    assert ending_policy.end_ids == ENDS
    samples = draw(ending_policy)
    seen = set()
    for index, response in enumerate(tokens_of(samples)):
        assert not set(response[:-1]) & set(ENDS)
        ended = response[-1] in ENDS
        seen.add(response[-1] if ended else None)
        assert ended or len(response) == LIMIT
        assert samples.truncated[index] == (not ended)
        assert samples.response_mask[index].tolist() == [t < len(response) for t in range(LIMIT)]
        prompt = list(PROMPTS[index // 4].ids)
        assert samples.ids[index, : len(prompt) + len(response)].tolist() == prompt + response
        start, stop = len(prompt), len(prompt) + len(response)
        assert samples.scored[index].nonzero()[:, 0].tolist() == list(range(start, stop))
    assert {None, 5, 11} <= seen  # truncated, and more than one end token, all occurred
    assert samples.prompt_index.tolist() == [index for index in range(5) for _ in range(4)]


def test_a_response_that_ends_on_its_last_token_is_not_truncated(open_policy, many_ends):
    policy = open_policy(path=many_ends)
    longest = draw(policy)
    for index, response in enumerate(tokens_of(longest)):
        limit = len(response)  # cut exactly where it ended
        again = draw(policy, [PROMPTS[index // 4]], UNIFORMS[index : index + 1, :limit])
        assert tokens_of(again) == [response]
        assert again.truncated.tolist() == [response[-1] not in ENDS]


def test_the_text_of_a_response_is_its_tokens_without_special_ones(ending_policy):
    samples = draw(ending_policy)
    for text, response in zip(samples.responses, tokens_of(samples), strict=True):
        assert text.split() == [f"w{token}" for token in response if token > 2]


def test_one_token_responses_work(ending_policy):
    samples = draw(ending_policy, uniforms=UNIFORMS[:, :1])
    assert samples.lengths.tolist() == [1] * len(UNIFORMS)
    assert [row[0] for row in tokens_of(samples)] == [row[0] for row in tokens_of(draw(ending_policy))]
