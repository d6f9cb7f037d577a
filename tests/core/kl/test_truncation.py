"""What top-k and top-p keep, by hand and as transformers does it; the deployed TinyLM by listing its responses."""

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from kltune.core.kl.divergence import compare
from kltune.core.kl.truncation import Cut, renormalized
from kltune.core.tensors import log_distribution, per_response
from tests.oracles import Responses, tiny_policy_logits, tiny_reference_logits

P = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        (Cut(), [1, 1, 1, 1]),
        (Cut(top_p=0.7), [1, 0, 1, 0]),
        (Cut(top_p=0.71), [1, 0, 1, 1]),
        (Cut(top_p=0.01), [1, 0, 0, 0]),
        (Cut(top_k=1), [1, 0, 0, 0]),
        (Cut(top_k=3), [1, 0, 1, 1]),
        (Cut(top_k=99), [1, 1, 1, 1]),
        (Cut(top_p=0.5, top_k=2), [1, 0, 0, 0]),     # of what top-k left, .4/.7 = .57 reaches ½ alone
    ],
)
def test_what_is_kept_by_hand(cut, kept):
    assert cut.kept(P.double()).int().tolist() == [kept]


@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, None), (0.35, None), (1.0, 7), (0.8, 12)])
def test_what_is_kept_is_what_transformers_keeps(top_p, top_k):
    logits = 3.0 * torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    theirs = logits if top_k is None else TopKLogitsWarper(top_k)(None, logits.clone())
    theirs = theirs if top_p == 1.0 else TopPLogitsWarper(top_p)(None, theirs.clone())
    assert torch.equal(Cut(top_p, top_k).kept(logits.log_softmax(-1)), theirs > -torch.inf)


def test_what_is_left_sums_to_one_and_the_rest_is_impossible():
    left = renormalized(P, Cut(top_k=2).kept(P)).exp()
    torch.testing.assert_close(left, torch.tensor([[4 / 7, 0.0, 3 / 7, 0.0]]))


@pytest.mark.parametrize(("top_p", "top_k"), [(0.0, None), (1.1, None), (float("nan"), None), (1.0, 0)])
def test_cuts_that_keep_nothing_are_refused(top_p, top_k):
    with pytest.raises(ValueError, match="top_p"):
        Cut(top_p, top_k)


@pytest.mark.parametrize(
    ("temperature", "cut", "vs_base", "both"),
    [
        (1.0, Cut(), 0.11253952, 0.11253952),
        (0.7, Cut(), 0.218411, 0.188646),            # the policy alone tempered, and both
        (1.0, Cut(top_p=0.8), 0.579609, 0.046278),   # against all of the reference, and against what is kept of it
    ],
)
def test_the_three_kls_of_the_deployed_tiny_lm_by_listing(temperature, cut, vs_base, both):
    policy = log_distribution(tiny_policy_logits(), temperature)
    kept = cut.kept(policy)
    deployed = renormalized(policy, kept)
    whole = log_distribution(tiny_reference_logits(), 1.0)
    alike = renormalized(log_distribution(tiny_reference_logits(), temperature), kept)
    responses = Responses()
    p = responses.probabilities(deployed)
    for reference, listed in ((whole, vs_base), (alike, both)):
        u = torch.where(p > 0, (responses.logprobs(deployed) - responses.logprobs(reference)).sum(-1), 0.0)
        exact = per_response(compare(deployed, reference).kl[responses.states], responses.mask)
        assert (p * u).sum().item() == pytest.approx(listed, abs=2e-6)
        assert (p * exact).sum().item() == pytest.approx(listed, abs=2e-6)
