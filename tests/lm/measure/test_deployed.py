"""The deployed TinyLM, sampled: both of its KLs, and a policy whose sampler cuts elsewhere."""

import pytest
import torch

from kltune.core.kl.truncation import Cut
from kltune.errors import ModelError
from kltune.lm.measure import deployed as deploying
from kltune.lm.measure.deployed import measure_deployed
from kltune.lm.measure.measurement import Round
from kltune.lm.model.sampler import Draw, sample
from tests.lm.measure.test_measurement import starts


@pytest.mark.parametrize(
    ("temperature", "cut", "vs_base", "both"),
    [
        (1.0, Cut(), 0.11253952, 0.11253952),
        (0.7, Cut(), 0.218411, 0.188646),
        (1.0, Cut(top_p=0.8), 0.579609, 0.046278),
    ],
)
def test_kls_of_the_deployed_tiny_lm_are_the_listed_ones(tiny_lm_policy, temperature, cut, vs_base, both):
    answered = Round.of(starts(4000), 4000)
    found = measure_deployed(tiny_lm_policy, answered, Draw(3, temperature), cut)
    assert found.ties == 0.0
    for name, listed in (("vs_base", vs_base), ("both", both)):
        kl = found.summary(name, 0.95)
        assert abs(kl.nats_per_response - listed) < 4 * kl.stderr + 1e-6, name
        assert abs(found.z(name)) < 4


def test_a_deployed_sampler_says_nothing_that_is_cut_off(trained_policy):
    from tests.lm.model.test_rollout import PROMPTS, UNIFORMS

    samples = sample(trained_policy, PROMPTS, UNIFORMS, temperature=1.0, cut=Cut(top_k=3))
    logits = trained_policy.network.logits(trained_policy.network.before(samples.ids, samples.scored))
    best = logits.topk(3).indices
    assert (best == samples.ids[samples.scored][:, None]).any(-1).all()


def test_a_token_on_the_edge_that_rounding_lets_through_is_counted_and_too_many_are_refused(
    tiny_lm_policy, monkeypatch
):
    # a sampler that keeps all, measured as if it cut at .8: one token in five lies outside
    monkeypatch.setattr(deploying, "sample", lambda *args, cut, **more: sample(*args, cut=None, **more))
    answered = Round.of(starts(300), 300)
    with pytest.raises(ModelError, match=r"differ|disagree"):
        measure_deployed(tiny_lm_policy, answered, Draw(3), Cut(top_p=0.8))


def test_without_a_cut_the_deployed_policy_is_the_policy(trained_policy):
    from kltune.lm.measure.measurement import measure_kl
    from tests.lm.model.test_rollout import PROMPTS

    plan = Round.of(PROMPTS, 12), Draw(10)
    found = measure_deployed(trained_policy, *plan, Cut())
    plain = measure_kl(trained_policy, *plan)
    torch.testing.assert_close(found.vs_base.exact, plain.exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.both.exact, plain.exact, atol=1e-5, rtol=0)
    assert torch.equal(found.tokens, plain.tokens)
