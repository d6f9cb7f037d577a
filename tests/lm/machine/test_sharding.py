"""A base spread over two processes gives the same logits and gradients, closed, opened and closed again."""

import json
from pathlib import Path

import pytest
import torch

from kltune.core import ranks
from kltune.lm.fast import memory
from kltune.lm.model.opening import check_frozen, load_policy
from kltune.lm.model.policy import Policy
from kltune.recipe import LoraSection, ModelSection
from tests.core.test_ranks import as_several
from tests.tiny_policies import randomize


def opened(path: Path) -> Policy:
    """A policy whose adapter holds random numbers, the same in every process."""
    torch.manual_seed(0)
    policy = load_policy(ModelSection(path=str(path)), LoraSection(rank=4), device=torch.device("cpu"))
    randomize(policy.trainable_parameters())
    return policy


def spread_over_two(path: Path, saved: Path) -> list[dict]:
    """What each of two processes finds."""
    def work(rank: int) -> str:
        policy = opened(path)
        ids = torch.arange(3, 27).remainder(20).view(2, 12)
        scored = torch.ones_like(ids, dtype=torch.bool)
        scored[:, 0] = False

        def logits() -> torch.Tensor:
            with torch.no_grad():
                return policy.network.logits(policy.network.hidden(ids))

        def off() -> torch.Tensor:
            with policy.reference():
                return logits()

        def gradients() -> list[torch.Tensor]:
            loss = policy.logprobs(ids, scored).sum()
            return list(torch.autograd.grad(loss, list(policy.trainable_parameters().values())))

        def held() -> int:
            layers = policy.network.sharded.layers
            own = (getattr(t, "to_local", lambda t=t: t)() for layer in layers for t in layer.parameters()
                   if not t.requires_grad)
            return sum(t.numel() for t in own)

        with policy.network.whole_graphs():
            before = [logits(), off(), *gradients()]
            policy.shard()
            local = held()
            policy.network.open()
            found = {"half": local / held()}
            policy.network.close()
            for name, change in (("closed", policy.network.close), ("opened", policy.network.open),
                                 ("closed again", policy.network.close)):
                change()
                after = [logits(), off()]
                with policy.network.in_step() if name != "opened" else policy.network.whole_graphs():
                    after += gradients()
                found[name] = all(map(torch.equal, before, after))
        policy.network.open()
        for _ in range(3 + 5 * rank):       # as many as each likes
            logits()
        check_frozen(policy)
        policy.network.close()
        if ranks.is_first():
            saved.mkdir()
            policy.save(saved)
        policy.network.open()
        found["after a save"] = torch.equal(before[0], logits())
        ranks.gathered(lambda: None)
        policy.load_adapter(saved)
        found["loaded"] = torch.equal(before[0], logits())
        return json.dumps(found)

    return [json.loads(said) for said in as_several(2, work)]


@pytest.mark.parametrize("architecture", ["llama", *(
    pytest.param(name, marks=pytest.mark.stress) for name in ("gpt2", "gemma2", "qwen3", "granite", "cohere")
)])
def test_logits_and_gradients_are_those_of_a_whole_base(tiny_model, tmp_path, architecture):
    for found in spread_over_two(tiny_model(architecture), tmp_path / "saved"):
        assert found.pop("half") == pytest.approx(0.5, abs=0.1)
        assert found == dict.fromkeys(("closed", "opened", "closed again", "after a save", "loaded"), True)


def test_stories_is_spread_as_well(stories_model, tmp_path):
    for found in spread_over_two(stories_model, tmp_path / "saved"):
        assert found.pop("half") == pytest.approx(0.5, abs=0.05)
        assert all(found.values())
    assert memory.PIECES > 1
