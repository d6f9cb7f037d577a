"""Memory that runs out in a run: said with phase and key, halved once, and the way on named."""

import pytest
import torch

from kltune.errors import OutOfMemory
from kltune.lm.model.policy import Policy
from kltune.lm.rewards.scorers import Scorer
from kltune.stages.ppo import run_ppo
from kltune.stages.sft import run_sft
from kltune.stages.trpo import run_trpo
from tests.stages.conftest import read_jsonl

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a capacity of 23.64 GiB")


@pytest.fixture
def fails(monkeypatch):
    """Let a method run out of memory so many times, from some call on; whether gradients are on or not."""

    def fail(owner: type, name: str, times: int, *, after: int = 0, error: Exception = FULL):
        own, calls = getattr(owner, name), []

        def failing(self, *args, **kwargs):
            if name != "logprobs" or torch.is_grad_enabled():
                calls.append(None)
                if after < len(calls) <= after + times:
                    raise error
            return own(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, failing)
        return calls

    return fail


def test_an_update_that_does_not_fit_is_made_in_halves_and_is_the_same(sft_recipe, tmp_path, fails, capsys):
    plain = run_sft(sft_recipe("run.steps=2", output=str(tmp_path / "plain")), resume=False)
    calls = fails(Policy, "logprobs", 1)
    halved = run_sft(sft_recipe("run.steps=2", output=str(tmp_path / "halved")), resume=False)
    err = capsys.readouterr().err
    assert err.count("warning: memory ran out while updating: 21.47 GB more were wanted, of") == 1
    assert "Half as many sequences are trained on at once from now on" in err
    assert len(calls) > 3      # one that failed, and two halves in each of two steps
    whole, parts = (
        [row["loss/mean"] for row in read_jsonl(tmp_path / name / "metrics.jsonl")] for name in ("plain", "halved")
    )
    assert parts == pytest.approx(whole, rel=1e-5)
    assert halved["kl"]["nats_per_response"] == pytest.approx(plain["kl"]["nats_per_response"], rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("error", [FULL, RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), MemoryError()])
def test_halves_that_do_not_fit_end_the_run_with_the_key_and_the_way_on(sft_recipe, fails, error):
    recipe = sft_recipe("run.steps=4", "run.save_every=1")
    fails(Policy, "logprobs", 100, after=3, error=error)
    words = r"step \d: .*while updating.*optim.micro_batch_size.*--resume goes on after step \d"
    with pytest.raises(OutOfMemory, match=words):
        run_sft(recipe, resume=False)


def test_a_run_that_ran_out_of_memory_is_resumed_with_smaller_micro_batches(sft_recipe, monkeypatch, fails, tmp_path):
    out = str(tmp_path / "run")
    with monkeypatch.context():
        fails(Policy, "logprobs", 100, after=3)
        with pytest.raises(OutOfMemory):
            run_sft(sft_recipe("run.steps=4", "run.save_every=1", output=out), resume=False)
    monkeypatch.undo()
    smaller = ("optim.micro_batch_size=1", "run.memory_fraction=0.5", "optim.checkpoint_layers=always")
    result = run_sft(sft_recipe("run.steps=4", "run.save_every=1", *smaller, output=out), resume=True)
    assert (result["status"], result["steps"]) == ("finished", 4)


@pytest.mark.parametrize(("owner", "name", "told"), [
    (Policy, "measure", "while sampling responses and measuring them: .*sampling.max_new_tokens"),
    (Scorer, "total", "while scoring responses: .*sampling.prompts_per_step"),
])
def test_a_phase_of_a_step_that_does_not_fit_names_its_own_keys(ppo_recipe, fails, owner, name, told):
    recipe = ppo_recipe("run.steps=1")
    fails(owner, name, 100)
    with pytest.raises(OutOfMemory, match=told):
        run_ppo(recipe, resume=False)


def test_a_gradient_of_trpo_is_halved_too(trpo_recipe, fails, capsys):
    fails(Policy, "logprobs", 1)
    assert run_trpo(trpo_recipe("run.steps=1"), resume=False)["status"] == "finished"
    assert "Half as many sequences" in capsys.readouterr().err
