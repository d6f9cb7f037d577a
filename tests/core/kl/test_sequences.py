"""Divergences of whole responses against listing all of them, the control variate where it pays, tails by hand."""

import math

import pytest
import torch

from kltune.core.kl.divergence import compare
from kltune.core.kl.sequences import control_variate, jensen_shannon, tails, total_variation
from kltune.core.tensors import per_response
from tests.oracles import Responses, tiny_policy_logits, tiny_reference_logits

POLICY, REFERENCE = tiny_policy_logits(), tiny_reference_logits()


def every_response_as_often_as_it_is_said(logits: torch.Tensor, copies: int = 8_000_000) -> torch.Tensor:
    """Rows of TinyLM's list, each repeated in proportion to its probability (rounded to a row of 8 million)."""
    counts = (Responses().probabilities(logits) * copies).round().long()
    return torch.arange(len(counts)).repeat_interleave(counts)


def test_js_and_tv_of_tiny_lm_are_those_of_its_list():
    # ½ Σ p log(p/m) + ½ Σ q log(q/m) with m = (p + q)/2, and ½ Σ |p − q|, over the fifteen responses
    responses = Responses()
    u = (responses.logprobs(POLICY) - responses.logprobs(REFERENCE)).sum(-1)
    mine, theirs = (u[every_response_as_often_as_it_is_said(logits)] for logits in (POLICY, REFERENCE))
    prompts = [torch.arange(len(side)) % 2 for side in (mine, theirs)]
    assert jensen_shannon(mine, theirs, *prompts).value == pytest.approx(0.02929738, abs=1e-6)
    assert total_variation(mine, prompts[0]).value == pytest.approx(0.20037558, abs=1e-6)
    assert total_variation(mine, prompts[0], theirs, prompts[1]).value == pytest.approx(0.20037558, abs=1e-6)


def test_bounds_at_the_ends():
    far, prompts = torch.full((10,), 200.0), torch.arange(10)
    assert jensen_shannon(far, -far, prompts, prompts).value == pytest.approx(math.log(2.0))
    assert total_variation(far, prompts, -far, prompts).value == pytest.approx(1.0)
    same = torch.zeros(10)
    assert jensen_shannon(same, same, prompts, prompts) == (0.0, 0.0)
    assert total_variation(same, prompts) == (0.0, 0.0)


def test_standard_errors_are_by_prompt():
    u, prompts = torch.tensor([0.0, math.log(2.0)]), torch.arange(2)    # 1 − e^{−u}: 0 and ½; mean ¼, sd √(1/8)
    assert total_variation(u, prompts) == (pytest.approx(0.25), pytest.approx(math.sqrt(0.125 / 2)))
    assert total_variation(u[:1], prompts[:1]).stderr is None
    copies = total_variation(u.repeat(50), prompts.repeat(50))          # fifty answers alike to each make nothing surer
    assert copies == (pytest.approx(0.25), pytest.approx(math.sqrt(0.125 / 2)))


def test_two_sides_that_answer_the_same_prompts_are_not_independent():
    # 0 and ½ on prompts 0 and 1 on either side: mean ¼, and se √(1/8)/√2 as of one side alone
    u, prompts = torch.tensor([0.0, math.log(2.0)]), torch.arange(2)
    assert total_variation(u, prompts, -u, prompts).stderr == pytest.approx(math.sqrt(0.125 / 2))
    assert total_variation(u, prompts, -u, prompts + 2).stderr == pytest.approx(math.sqrt(4 / 3 * 4 * 0.0625**2))
    assert jensen_shannon(u, -u, prompts, prompts).stderr == pytest.approx(
        jensen_shannon(u.repeat(9), -u.repeat(9), prompts.repeat(9), prompts.repeat(9)).stderr
    )


def test_the_control_variate_beats_both_where_the_exact_sum_is_the_noisier():
    # two binary steps: π and ρ at first, after 0, after 1; no one step has an exact KL noisier than k1, their sum has
    table = torch.tensor([[[0.5, 0.5], [0.25, 0.75]], [[0.5, 0.5], [0.5, 0.5]], [[0.01, 0.99], [0.99, 0.01]]])
    p, q = table[:, 0].double().log(), table[:, 1].double().log()
    d = compare(p, q).kl
    generator = torch.Generator().manual_seed(0)
    first = torch.bernoulli(torch.full((200_000,), 0.5), generator=generator).long()
    second = (torch.rand(200_000, generator=generator) >= p.exp()[1 + first, 0]).long()
    u = (p - q)[0, first] + (p - q)[1 + first, second]
    c = d[0] + d[1 + first]
    assert c.var().item() == pytest.approx(5.0697, rel=0.02)
    assert u.var().item() == pytest.approx(3.3159, rel=0.02)
    corrected = control_variate(c, u, torch.arange(200_000))
    assert corrected.var().item() == pytest.approx(2.9446, rel=0.02)
    assert corrected.mean().item() == pytest.approx(2.39545, abs=4 * (2.9446 / 200_000) ** 0.5)


def test_a_response_has_no_say_in_its_own_coefficient():
    # in small samples a coefficient fitted on all of them is biased; across folds the mean stays that of the exact KL
    generator = torch.Generator().manual_seed(1)
    gaps = []
    for _ in range(400):
        c = torch.rand(10, generator=generator, dtype=torch.float64).exponential_(generator=generator)
        m = torch.randn(10, generator=generator, dtype=torch.float64) * c
        gaps.append((control_variate(c, c + m, torch.arange(10)) - c).mean())
    gaps = torch.stack(gaps)
    assert abs(gaps.mean()) < 3 * gaps.std() / 20


def test_one_prompt_has_no_other_folds():
    c, u = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 2.5])
    assert torch.equal(control_variate(c, u, torch.zeros(2)), c.double())


def test_on_tiny_lm_it_changes_next_to_nothing_and_stays_unbiased():
    responses = Responses()
    rows = every_response_as_often_as_it_is_said(POLICY, 20_000)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    u = (responses.logprobs(POLICY) - responses.logprobs(REFERENCE)).sum(-1)
    kl = compare(POLICY.log_softmax(-1), REFERENCE.log_softmax(-1)).kl
    c = per_response(kl[responses.states], responses.mask)
    corrected = control_variate(c[rows], u[rows], torch.arange(len(rows)))
    assert corrected.mean().item() == pytest.approx(0.11253952, abs=2e-4)
    assert corrected.var() <= 1.001 * c[rows].var()


def test_tails_of_a_hundred_and_one_responses_by_hand():
    found = tails(torch.arange(101.0))
    assert found.quantiles == pytest.approx({"0.01": 1, "0.1": 10, "0.5": 50, "0.9": 90, "0.99": 99, "0.999": 99.9})
    assert (found.minimum, found.maximum) == (0.0, 100.0)
    assert found.largest_share == pytest.approx(100 / 5050)
    assert found.kurtosis == pytest.approx(1.8, abs=1e-3)       # of a uniform distribution
    assert not found.heavy


def test_one_response_that_carries_all_is_a_heavy_tail_and_equal_ones_are_none():
    found = tails(torch.tensor([0.0] * 99 + [5.0]))
    assert (found.largest_share, found.heavy) == (1.0, True)
    assert tails(torch.full((5,), 2.0)).kurtosis is None
    assert tails(torch.zeros(5)).largest_share == 0.0


def test_tails_of_what_is_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        tails(torch.tensor([1.0, float("nan")]))
