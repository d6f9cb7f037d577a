"""What an evaluation says besides the KL, by hand and on a tiny policy."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from kltune.core.hacking.diversity import diversity
from kltune.lm.data.examples import Example, Prompt
from kltune.lm.measure.likelihood import alignment_tax
from kltune.lm.measure.measurement import Round, measure_kl
from kltune.lm.model.sampler import Draw
from kltune.lm.rewards.scorers import Scorer, ScoreSource
from kltune.recipe import SamplingSection
from kltune.train.evaluation.held_out import (
    HeldOut,
    before_and_after,
    response_tokens,
    scales_of,
    score_metrics,
    text_metrics,
)
from tests.tiny_policies import plain_sample

SAMPLING = SamplingSection(max_new_tokens=8)
PROMPTS = [Prompt((0, 5 + place), f"prompt {place}", f"row {place}") for place in range(6)]


def scorer(name, function):
    """A scorer of one Python function of a response."""
    return Scorer([ScoreSource(name, lambda prompts, responses: [function(r) for r in responses], 1.0, False, {})])


def held_out(seed, gold=None):
    return HeldOut(PROMPTS, [], gold, 12, SAMPLING, seed)


def test_scores_stand_on_the_scale_of_the_reference():
    reference = {"score": torch.tensor([1.0, 3.0]), "gold": torch.tensor([2.0, 2.0, 8.0])}
    scales = scales_of(reference)
    assert scales["score"] == pytest.approx((2.0, 2**0.5))
    assert scales["gold"] == pytest.approx((4.0, 12**0.5))
    now = {"score": torch.tensor([4.0, 4.0, 8.0, 8.0]), "gold": torch.tensor([0.0, 0.0, 4.0, 4.0])}
    found = score_metrics("eval/", now, torch.tensor([0, 0, 1, 1]), scales)
    assert found["eval/score_mean"] == 6.0
    assert found["eval/score_stderr"] == pytest.approx(2.0)   # prompts 4 and 8: sd 2.83 / √2
    assert found["eval/score_z"] == pytest.approx(4.0 / 2**0.5)
    assert found["eval/score_z_stderr"] == pytest.approx(2.0 / 2**0.5)
    assert found["eval/gold_z"] == pytest.approx(-2.0 / 12**0.5)
    assert found["eval/gold_gap"] == pytest.approx(4.0 / 2**0.5 + 2.0 / 12**0.5)


def test_a_reference_that_always_scores_alike_is_no_scale():
    scales = scales_of({"score": torch.full((300,), -52.9), "gold": torch.tensor([1.0])})
    assert scales == {}
    found = score_metrics("eval/", {"score": torch.tensor([1.0]), "gold": torch.tensor([2.0])}, torch.tensor([0]), {})
    assert (found["eval/score_z"], found["eval/gold_z"], found["eval/gold_gap"]) == (None, None, None)
    assert found["eval/gold_stderr"] is None


def test_the_end_token_is_no_part_of_what_was_said(trained_policy):
    measured = measure_kl(trained_policy, Round.of(PROMPTS, 60), Draw(8))
    said, end = response_tokens(measured), trained_policy.tokenizer.eos_token_id
    assert 0 < measured.truncated.sum() < 60
    lengths = [len(tokens) for tokens in said]
    assert lengths == (measured.tokens - (~measured.truncated).long()).tolist()
    assert all(end not in tokens for tokens in said)
    decoded = [trained_policy.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]
    assert [text.split() for text in decoded] == [text.split() for text in measured.texts()[1]]


def test_text_metrics_are_those_of_the_responses(trained_policy):
    measured = measure_kl(trained_policy, Round.of(PROMPTS, 12), Draw(8))
    found = text_metrics("eval/", measured, trained_policy.network.vocabulary)
    alone = diversity(response_tokens(measured), measured.prompt_index.tolist(), trained_policy.network.vocabulary)
    assert found["eval/distinct_2_adjusted"] == alone.distinct_2_adjusted
    assert found["eval/distinct_2_per_input"] == alone.per_input
    mask = torch.cat([rollout.response_mask.flatten() for rollout in measured.rollouts])
    entropy = torch.cat([rollout.entropy.flatten() for rollout in measured.rollouts])[mask].mean().item()
    assert found["eval/entropy_nats_per_token"] == pytest.approx(entropy, rel=1e-5)
    assert found["eval/response_tokens"] == pytest.approx(measured.tokens.double().mean().item())
    assert found["eval/end_fraction"] == pytest.approx(1.0 - measured.truncated.double().mean().item())


def test_the_reference_is_drawn_once_and_is_its_own_scale(trained_policy, monkeypatch):
    drawn = []

    def counted(*arguments, **keys):
        measured = measure_kl(*arguments, **keys)
        drawn.append("policy" if measured.exact.any() else "reference")
        return measured

    monkeypatch.setattr("kltune.train.evaluation.held_out.measure_kl", counted)
    held, proxy = held_out(seed=3, gold=scorer("gold", len)), scorer("score", lambda text: text.count("1"))
    first, second = (held.measured(trained_policy, proxy)[0] for _ in range(2))
    assert drawn == ["reference", "policy", "policy"]
    assert first == second
    assert first["eval/reference_score_z"] == pytest.approx(0.0, abs=1e-6)
    assert first["eval/reference_gold_z_stderr"] == pytest.approx(
        first["eval/reference_gold_stderr"] / held._references[12].scales["gold"][1]
    )
    assert first["eval/gold_gap"] == pytest.approx(first["eval/score_z"] - first["eval/gold_z"])


def test_a_policy_that_is_its_reference_is_measured_like_it(policy):
    found, _ = held_out(seed=0).measured(policy, scorer("score", len))
    names = [name for name in found if name.startswith("eval/reference_")]
    assert len(names) == 16
    for name in names:
        assert found[name.replace("reference_", "")] == pytest.approx(found[name], abs=1e-5), name


def test_the_alignment_tax_by_hand():
    # two documents of 10 and 30 tokens, 1 and 5 nats worse: 6 / 40 per token; residuals −0.5 and 0.5
    nats, ref_nats, tokens = torch.tensor([21.0, 65.0]), torch.tensor([20.0, 60.0]), torch.tensor([10, 30])
    texts = [Example((place,), (True,), "texts.jsonl") for place in range(2)]
    found = alignment_tax(nats, ref_nats, tokens, texts)
    assert found.nats_per_token == pytest.approx(0.15)
    assert found.token_stderr == pytest.approx((2 / 1 * 2 * 0.5**2) ** 0.5 / 40)
    # a document that is on nine lines is one
    again = alignment_tax(nats.repeat(9), ref_nats.repeat(9), tokens.repeat(9), texts * 9)
    assert again.token_stderr == pytest.approx(found.token_stderr)


def shown(policy, held: HeldOut) -> list[dict]:
    """What a page shows before and after, of an evaluation."""
    return before_and_after(held, held.measured(policy, None)[1], None, policy.tokenizer)


def test_before_is_what_the_reference_alone_says_with_the_same_numbers(trained_policy, tiny_model):
    rows = shown(trained_policy, held_out(3))
    uniforms = Round.of(PROMPTS, 12).uniforms(held_out(3).draw)[::2].tolist()       # two answers to each prompt
    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    said = [
        plain_sample(base, prompt.ids, numbers, trained_policy.end_ids)
        for prompt, numbers in zip(PROMPTS, uniforms, strict=True)
    ]
    texts = trained_policy.tokenizer.batch_decode(said, skip_special_tokens=True)
    assert [row["reference_response"] for row in rows] == texts
    assert any(row["response"] != row["reference_response"] for row in rows)
    assert [row["prompt"] for row in rows] == [prompt.text for prompt in PROMPTS]
    assert {row["held_out"] for row in rows} == {True}
    assert {row["score"] for row in rows} == {row["reference_score"] for row in rows} == {None}


def test_what_is_shown_is_of_the_evaluation_and_nothing_is_sampled_for_it(trained_policy, monkeypatch):
    monkeypatch.setattr("kltune.lm.measure.measurement.RESPONSES_PER_PASS", 8)       # so that it is in parts
    held, proxy = held_out(seed=3), scorer("score", len)
    _, measured = held.measured(trained_policy, proxy, times=2)
    monkeypatch.setattr(trained_policy.network, "hidden", None)      # what passes through the model now fails
    rows = before_and_after(held, measured, proxy, trained_policy.tokenizer)
    assert [row["response"] for row in rows] == measured.texts()[1][::4]
    assert [row["ref_kl"] for row in rows] == measured.exact[::4].tolist()
    assert [sum(row["token_kl"]) for row in rows] == pytest.approx(measured.exact[::4].tolist(), rel=1e-5)
    assert [row["reference_response"] for row in rows] == held._references[24].answers.texts()[1][::4]
    for response, score in (("response", "score"), ("reference_response", "reference_score")):
        assert [row[score] for row in rows] == [float(len(row[response])) for row in rows]


def test_a_policy_that_has_learnt_nothing_says_what_its_reference_says(policy):
    rows = shown(policy, held_out(0))
    assert all(row["response"] == row["reference_response"] for row in rows)
    assert all(nats == 0.0 for row in rows for nats in row["token_kl"])


def test_without_prompts_there_is_nothing_to_show(policy):
    assert shown(policy, replace(held_out(0), prompts=[])) == []
