"""Adapters at a share α of themselves: exact in plain PEFT, and dialled to budgets that fresh numbers confirm."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from kltune.core.kl.gate import verdict
from kltune.core.kl.intervals import summarize
from kltune.errors import ModelError
from kltune.lm.measure.interpolation import AdapterScale, Interpolation, Look
from kltune.lm.measure.measurement import Round, measure_kl
from tests.lm.measure.test_measurement import DRAW, KL, starts
from tests.lm.model.test_made_elsewhere import IDS, ONE_SET, open_foreign, opened_logits, plain_logits, save_foreign

SCALABLE = ("lora", "rslora", "dora", "all-linear", "embedding", "ia3")


@pytest.mark.parametrize("kind", SCALABLE)
def test_nothing_of_an_adapter_is_the_reference_and_all_of_it_itself(tiny_model, tmp_path, kind):
    base = tiny_model("llama")
    save_foreign(base, ONE_SET[kind], tmp_path)
    policy = open_foreign(base, tmp_path)
    before, reference = opened_logits(policy)
    scale = AdapterScale(policy)
    scale.set(0.3)
    assert not torch.allclose(opened_logits(policy)[0], before)
    scale.set(0.0)
    torch.testing.assert_close(opened_logits(policy)[0], reference, atol=1e-6, rtol=0)
    scale.set(1.0)
    assert torch.equal(opened_logits(policy)[0], before)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_half_of_a_lora_is_half_of_its_update_in_every_weight(tiny_model, tmp_path, kind):
    base = tiny_model("llama")
    save_foreign(base, ONE_SET[kind], tmp_path / "whole")
    policy = open_foreign(base, tmp_path / "whole")
    AdapterScale(policy).set(0.5)
    policy.save(tmp_path / "half")

    def merged(adapter):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        return dict(PeftModel.from_pretrained(model, adapter).merge_and_unload().named_parameters())

    plain = dict(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).named_parameters())
    whole, half = merged(tmp_path / "whole"), merged(tmp_path / "half")
    changed = [name for name in plain if not torch.equal(whole[name], plain[name])]
    assert len(changed) == 6
    for name in changed:
        torch.testing.assert_close(half[name] - plain[name], 0.5 * (whole[name] - plain[name]), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", SCALABLE)
def test_a_dialled_adapter_is_a_plain_one_with_its_scale_baked_in(tiny_model, tmp_path, kind):
    base = tiny_model("llama")
    save_foreign(base, ONE_SET[kind], tmp_path / "whole")
    policy = open_foreign(base, tmp_path / "whole")
    AdapterScale(policy).set(0.4)
    policy.save(tmp_path / "dialled")
    torch.testing.assert_close(
        opened_logits(policy)[0], plain_logits(base, tmp_path / "dialled"), atol=1e-6, rtol=0
    )
    assert opened_logits(policy)[0].shape[:2] == IDS.shape


def test_what_has_no_scale_is_refused(tiny_model, tmp_path):
    base = tiny_model("llama")
    save_foreign(base, ONE_SET["loha"], tmp_path)
    with pytest.raises(ModelError, match="hada"):
        AdapterScale(open_foreign(base, tmp_path))


def test_a_landing_keeps_within_its_budget_on_fresh_numbers_and_leaves_little_unused(tiny_lm_policy):
    # The fixture's adapter at 1 has .1125 nats; to land at .05 it takes about 2/3 of it.
    interpolation = Interpolation(tiny_lm_policy, starts(2000), DRAW)
    search, check = interpolation.land(0.05, 500, 2000)
    assert 0.5 < search.alpha < 0.75
    assert verdict(check.kl, 0.05, confidence=check.kl.confidence).verdict == "pass"
    again = measure_kl(tiny_lm_policy, Round.of(starts(2000), 2000), replace(DRAW, seed=99)).summary()
    assert again.nats_per_response > 0.85 * 0.05
    assert again.ci[1] <= 0.05
    assert {look.purpose for look in interpolation.looks} == {"search", "check"}


def test_an_adapter_within_the_budget_is_checked_and_left_alone(tiny_lm_policy):
    interpolation = Interpolation(tiny_lm_policy, starts(500), DRAW)
    search, check = interpolation.land(2 * KL, 500, 500)
    assert search.alpha == 1.0
    assert check.kl.nats_per_response == pytest.approx(KL, abs=0.02)


class Simulated(Interpolation):
    """An adapter whose KL is 9 α^1.8 nats on average; prompts differ by a third, a fifth of the numbers by α."""

    def __init__(self, prompts: int, seed: int):
        self.prompts, self.numbers, self.draw = starts(prompts), seed, replace(DRAW, seed=seed)
        self.effects = np.random.default_rng(seed).gamma(9.0, 1 / 9, (prompts, 1))
        self.unit, self.confidence, self.looks = "nats_per_response", 0.95, []
        self.scale = SimpleNamespace(set=lambda alpha: None)

    def measure(self, alpha: float, responses: int, purpose: str, seed: int) -> Look:
        answered = Round.of(self.prompts, responses)
        same, own = (np.random.default_rng([self.numbers, seed, part]) for part in (0, int(1e9 * alpha)))
        size = answered.count, answered.per_prompt
        nats = np.where(own.random(size) < 0.2, own.gamma(1.5, 1 / 1.5, size), same.gamma(1.5, 1 / 1.5, size))
        nats = 9.0 * alpha**1.8 * self.effects[: answered.count] * nats
        rows = torch.tensor(nats.ravel()), torch.ones(nats.size), answered.prompt_index()
        self.looks.append(Look(alpha, purpose, summarize("exact", *rows), None, None))
        return self.looks[-1]


@pytest.mark.parametrize(("prompts", "least"), [(256, 0.9), (20, 0.75)])
def test_landings_use_their_budget_and_do_not_end_beyond_it(prompts, least):
    # Of 20 prompts that differ by a third no interval knows the mean better than within 16 % above.
    landed, ends = [], []
    for seed in range(40):
        adapter = Simulated(prompts, seed)
        search, check = adapter.land(4.0, 256, 4096)
        landed.append(9.0 * search.alpha**1.8 / 4.0)
        ends.append(check.kl.ci[1] / 4.0)
        assert len(adapter.looks) <= 20
    assert np.mean(landed) >= least
    assert sum(share > 1.0 for share in landed) <= 3        # 2.5 % of 40 is 1; 4 and more has a chance of 2 %
    assert np.mean(ends) >= 0.95
    assert max(ends) <= 1.0


def test_a_check_of_exactly_0_ends_the_landing_there():
    class Rounded(Simulated):
        def measure(self, alpha: float, responses: int, purpose: str, seed: int) -> Look:
            if purpose == "search":
                return super().measure(alpha, responses, purpose, seed)
            answered = Round.of(self.prompts, responses)
            index = answered.prompt_index()
            self.looks.append(Look(alpha, purpose, summarize("exact", 0.0 * index, 0 * index + 1, index), None, None))
            return self.looks[-1]

    adapter = Rounded(20, 0)
    search, check = adapter.land(1e-9, 40, 40)
    assert check.kl.nats_per_response == 0.0
    assert 0.0 < search.alpha == check.alpha < 1e-3
    assert [look.purpose for look in adapter.looks].count("check") == 1


def test_one_prompt_can_show_nothing(tiny_lm_policy):
    search, check = Interpolation(tiny_lm_policy, starts(1), DRAW).land(0.05, 50, 50)
    assert check is None
    assert search.alpha == 0.0
