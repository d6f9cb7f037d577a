"""Which prompts are answered how often, intervals that cover, and a sampler that draws from something else."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from kltune.core.tensors import log_distribution
from kltune.lm.data.examples import Prompt
from kltune.lm.measure.breakdown import examples, token_part, token_text, top_tokens
from kltune.lm.measure.measurement import Round, measure_kl
from kltune.lm.model import sampler as rollouts
from kltune.lm.model.sampler import Draw, sample, uniform_numbers
from tests.oracles import BOS, EOS, Responses, tiny_policy_logits, tiny_reference_logits

KL = 0.11253952         # docs/maths.md 22, nats per response
DRAW = Draw(3)


def starts(count: int) -> list[Prompt]:
    """TinyLM's one prompt, as often as prompts are wanted: each is a cluster of its own."""
    return [Prompt((BOS,), "<s>", f"prompts.jsonl:{i}") for i in range(count)]


# --- the plan of a drawing -------------------------------------------------------------------------------------------


def test_few_prompts_are_answered_equally_often_and_of_many_some():
    prompts = starts(10)
    assert [(d.count, d.per_prompt) for d in (Round.of(prompts, n) for n in (4, 10, 11, 40))] == [
        (4, 1), (10, 1), (10, 2), (10, 4),
    ]  # fmt: skip
    assert Round.of(prompts, 4).leaves_prompts
    assert not Round.of(prompts, 11).leaves_prompts


def lines(*starts: int) -> list[Prompt]:
    """Prompts that differ where the numbers do."""
    return [Prompt((BOS, start), f"{start}", f"prompts.jsonl:{place}") for place, start in enumerate(starts)]


def test_of_a_long_file_a_seeded_draw_is_answered_and_not_its_first_rows():
    prompts = lines(*range(1000))
    drawn = Round.of(prompts, 100, seed=3)
    chosen = [prompt.ids[1] for prompt in drawn.prompts[:100]]
    assert sorted(prompt.ids[1] for prompt in drawn.prompts) == list(range(1000))
    assert abs(np.mean(chosen) - 499.5) < 4 * 289 / 10
    assert [prompt.ids[1] for prompt in Round.of(prompts, 400, seed=3).prompts[:100]] == chosen    # more beside them
    assert Round.of(prompts, 100, seed=4).prompts[:100] != drawn.prompts[:100]
    assert drawn.drawn_note(3) == "answers 100 of 1000 prompts, drawn at random with seed 3"
    assert Round.of(prompts, 1000, seed=3).prompts is prompts
    assert Round.of(prompts, 1000, seed=3).drawn_note(3) is None
    assert Round.of(prompts, 1001).drawn_note(0) == (
        "answers each of 1000 prompts 2 times: 2000 responses, where 1001 were asked for"
    )
    assert Round.of(prompts, 1001).following(7).drawn_note(0) is None


def test_a_prompt_on_many_lines_is_one_prompt():
    answered = Round.of(lines(7, 8, 7, 9, 8), 10)
    assert answered.prompt_index().tolist() == [0, 0, 1, 1, 0, 0, 3, 3, 1, 1]
    assert Round.of(starts(4), 4).prompt_index().tolist() == [0, 1, 2, 3]       # one prompt alone: its own answers


def test_further_rounds_answer_what_was_not_answered_and_then_all_again():
    first = Round.of(starts(10), 4)
    second = first.following(4)
    third = second.following(8)
    fourth = third.following(25)
    assert [(d.first, d.count, d.per_prompt, d.number) for d in (second, third, fourth)] == [
        (4, 4, 1, 1), (8, 2, 1, 2), (0, 10, 3, 3),
    ]  # fmt: skip
    assert second.prompt_index().tolist() == [4, 5, 6, 7]
    assert fourth.prompt_index().tolist() == sorted(list(range(10)) * 3)
    assert [d.leaves_prompts for d in (first, second, third, fourth)] == [True, True, False, False]
    few = Round.of(starts(4), 8).following(2)       # the last two alone would count more than the others
    assert (few.first, few.count, few.per_prompt) == (0, 4, 1)


def test_every_round_has_random_numbers_of_its_own_and_the_first_those_of_every_evaluation():
    answered = Round.of(starts(8), 4)
    assert not torch.equal(answered.uniforms(DRAW), answered.following(4).uniforms(DRAW))
    listed = uniform_numbers(np.random.default_rng([7, 0xE7A1]), 4, 3)
    assert torch.equal(answered.uniforms(Draw(3, seed=7)), listed)


def test_two_rounds_together_are_one_measurement(tiny_lm_policy):
    answered = Round.of(starts(30), 20)
    rounds = [measure_kl(tiny_lm_policy, d, DRAW) for d in (answered, answered.following(20))]
    both = rounds[0] + rounds[1]
    assert both.prompt_index.tolist() == list(range(30))
    assert both.exact.sum().item() == pytest.approx(sum(part.exact.sum().item() for part in rounds))
    assert len(both.texts()[1]) == 30


# --- how sure it is --------------------------------------------------------------------------------------------------


def test_of_400_intervals_on_tiny_lm_95_percent_cover_its_kl(tiny_lm_policy):
    # One pass of 400 × 60 responses, cut into 400 experiments of 60 prompts; the error of 95 % is 1.1 %.
    whole = measure_kl(tiny_lm_policy, Round.of(starts(24_000), 24_000), DRAW)
    covered = {"exact": 0, "k1": 0, "cv": 0}
    for number in range(400):
        rows = slice(60 * number, 60 * (number + 1))
        parts = {name: getattr(whole, name)[rows] for name in ("exact", "k1", "k3", "tokens", "prompt_index")}
        one = replace(whole, **parts)
        for name in covered:
            low, high = one.summary(name).ci
            covered[name] += low <= KL <= high
    assert all(0.92 * 400 <= count <= 0.98 * 400 for count in covered.values()), covered


def test_intervals_cover_where_prompts_are_answered_several_times(tiny_lm_policy):
    # 400 experiments of 20 prompts with 3 answers each
    whole = measure_kl(tiny_lm_policy, Round.of(starts(8_000), 24_000), replace(DRAW, seed=1))
    covered = 0
    for number in range(400):
        rows = slice(60 * number, 60 * (number + 1))
        parts = {name: getattr(whole, name)[rows] for name in ("exact", "k1", "k3", "tokens", "prompt_index")}
        low, high = replace(whole, **parts).summary().ci
        covered += low <= KL <= high
    assert 0.92 * 400 <= covered <= 0.98 * 400


def test_a_sampler_at_another_temperature_is_found_out(tiny_lm_policy, monkeypatch):
    # E[M] = .07927 and sd .392 at T = .7 scored at 1, so 4,000 responses stand 12.8 errors away
    draw = rollouts.sample

    def colder(policy, prompts, uniforms, *, temperature):
        samples = draw(policy, prompts, uniforms, temperature=0.7)
        scored = policy.measure(samples.ids, samples.scored, exact=False).logprobs      # as if it had drawn at 1
        return replace(samples, logprobs=rollouts.response_scatter(scored, samples.response_mask))

    assert abs(measure_kl(tiny_lm_policy, Round.of(starts(4000), 4000), DRAW).z) < 4
    monkeypatch.setattr(rollouts, "sample", colder)
    assert 9 < measure_kl(tiny_lm_policy, Round.of(starts(4000), 4000), DRAW).z < 17


# --- where the drift went --------------------------------------------------------------------------------------------


def test_shares_by_token_are_those_of_the_listing(tiny_lm_policy):
    policy, reference = (log_distribution(z, 1.0) for z in (tiny_policy_logits(), tiny_reference_logits()))
    responses = Responses()
    p = responses.probabilities(tiny_policy_logits())
    visits = torch.zeros(7, dtype=torch.float64).index_add(
        0, responses.states[responses.mask], p[:, None].expand(-1, 3)[responses.mask]
    )
    parts = policy.exp() * (policy - reference) + reference.exp() - policy.exp()      # [state, word]
    nats = (visits[:, None] * parts).sum(0)
    assert nats.sum().item() == pytest.approx(KL, abs=1e-6)

    sums = measure_kl(tiny_lm_policy, Round.of(starts(20_000), 20_000), DRAW, by_token=True).sums
    torch.testing.assert_close(sums.nats[:3] / 20_000, nats, atol=2e-3, rtol=0.0)
    expected = (visits[:, None] * policy.exp()).sum(0)
    torch.testing.assert_close(sums.policy[:3] / 20_000, expected, atol=0.02, rtol=0.0)
    rows = top_tokens(sums, 20_000, tiny_lm_policy, 10)
    assert [row["id"] for row in rows] == nats.argsort(descending=True).tolist()
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    end = token_part(sums, list(tiny_lm_policy.end_ids), 20_000)
    assert end["share"] == pytest.approx(nats[EOS].item() / KL, abs=0.02)


def test_a_token_that_begins_a_word_is_told_from_one_within_a_word():
    pieces = {"<unk>": 0, "\u2581a": 1, "a": 2, "\u2581": 3}
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast.decode([1]) == fast.decode([2]) == "a"
    assert [token_text(fast, number) for number in (1, 2, 3)] == [" a", "a", " "]
    assert token_text(fast, 7) == "<7>"     # a vocabulary that was padded has tokens of which no tokenizer knows


def test_shown_responses_go_from_the_most_to_the_least_and_their_tokens_add_up(tiny_lm_policy):
    measured = measure_kl(tiny_lm_policy, Round.of(starts(600), 600), DRAW)
    shown = examples(measured, tiny_lm_policy, 3)
    assert shown[0]["nats"] == pytest.approx(measured.exact.max().item())
    assert shown[2]["nats"] == pytest.approx(measured.exact.min().item())
    assert shown[1]["nats"] == pytest.approx(measured.exact.median().item(), rel=0.05)
    for row in shown:
        assert math.fsum(part["nats"] for part in row["tokens"]) == pytest.approx(row["nats"], abs=1e-6)
        assert "".join(part["token"] for part in row["tokens"]).replace("</s>", "").split() == row["response"].split()
    assert examples(measured, tiny_lm_policy, 0) == []


def test_the_noise_floor_is_the_kl_of_the_policy_to_itself_and_counts_in_narrow_dtypes_only(open_policy):
    prompts, draw, floors = starts(16), Draw(12, 1.0, 0), {}
    for dtype in ("float32", "bfloat16"):
        policy = open_policy(dtype=dtype)       # it is its reference: all KL there is would be rounding
        measured = measure_kl(policy, Round.of(prompts, 64), draw)
        assert not measured.exact.any()
        sampled = [sample(policy, *part[:2], temperature=1.0) for part in Round.of(prompts, 64).parts(draw)]
        gap = torch.cat([
            (rollout.logprobs - drawn.logprobs).double()[drawn.response_mask]
            for rollout, drawn in zip(measured.rollouts, sampled, strict=True)
        ])
        floors[dtype] = measured.noise_floor["nats_per_token"]
        assert floors[dtype] == pytest.approx((gap.exp() - 1 - gap).mean().item(), rel=0.02, abs=1e-9)
    assert floors["float32"] < 1e-9
    assert 1e-6 < floors["bfloat16"] < 1e-3
