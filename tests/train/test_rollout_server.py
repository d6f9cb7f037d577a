"""A server samples for the policy: its numbers are the trainer's, or the run stops, says why, and can be resumed."""

import json
import signal
from pathlib import Path

import pytest

from kltune.errors import RecipeError, SamplerError, ServerError
from kltune.recipe import load_recipe
from kltune.run.files import read_record
from kltune.stages.dpo import run_dpo
from kltune.stages.ppo import run_ppo
from kltune.stages.trpo import run_trpo
from kltune.train import rollout_server
from tests.rollout_servers import serving
from tests.stages.conftest import ONLINE, PPO, TRPO, letter_tokenizer, read_jsonl, small_llama, write_recipe

STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Like the tiny Llama of the stages' tests."""
    folder = tmp_path_factory.mktemp("served") / "llama"
    small_llama(31).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(rollout_server, "PAUSES", (0.01,) * 6)


def recipe_of(tmp_path: Path, model: Path, server, base=PPO, **sampling):
    """A recipe whose responses that server draws."""
    keys = {"engine": "vllm", "url": server.url, "publish": "adapters", "temperature": 0.8} | sampling
    whole = base | {"sampling": base["sampling"] | keys, "run": {"steps": STEPS, "save_every": 1, "eval_every": 100}}
    return load_recipe(write_recipe(tmp_path / "recipe", whole, model))


@pytest.mark.parametrize(("base", "run", "passing"), [
    (PPO, run_ppo, "503 at first"), (TRPO, run_trpo, "lost answers"), (ONLINE, run_dpo, None),
])
def test_a_server_samples_what_the_trainer_would(tmp_path, model, base, run, passing):
    with serving(model, passing) as server:
        recipe = recipe_of(tmp_path, model, server, base)
        run(recipe, resume=False)
    rows = read_jsonl(Path(recipe.run.output) / "metrics.jsonl")
    assert len(rows) == STEPS
    assert all(0.0 <= row["sampler/kl_nats_per_token"] < 1e-9 for row in rows)
    assert len(set(server.names)) == len(set(server.paths)) == STEPS
    assert server.unloaded == server.names
    assert list((tmp_path / "recipe" / "adapters").iterdir()) == []
    seeds = [body["seed"] for body in server.asked]
    assert min(abs(a - b) for a, b in zip(sorted(set(seeds)), sorted(set(seeds))[1:], strict=False)) > 1000
    assert {body["model"] for body in server.asked} == {"base", *server.names}


CAUSES = {
    "stale adapter": (3, SamplerError, "the adapter of the step before"),
    "no adapter": (2, SamplerError, "the base alone, without the adapter"),
    "raw log-probs": (1, SamplerError, "before the temperature; start it with --logprobs-mode processed_logprobs"),
    "other dtype": (1, SamplerError, "another dtype; wanted --dtype float32"),
    "hangs up": (2, ServerError, "does not answer"),
    "dies of it": (2, ServerError, r"does not answer: .*; at first: HTTP 500 \(.*EngineCore"),
    "503": (2, ServerError, r"does not answer: HTTP 503 \(.*busy"),
    "short answer": (2, SamplerError, "wanted one that ends with an end token, or at 6 tokens"),
    "two replicas": (2, SamplerError, r"of 16 responses are of the right weights: .*data_parallel_size"),
    "slow": (2, ServerError, r"no answer within 12 s \(sampling\.timeout_s\)"),
    "no token ids": (1, SamplerError, "return_token_ids"),
    "refuses adapters": (0, SamplerError, "refuses /v1/load_lora_adapter with HTTP 404"),
    "other base": (0, SamplerError, "its base is .* nats per token, .*another base"),
}


@pytest.mark.parametrize("fault", sorted(CAUSES))
def test_a_server_that_fails_is_caught_within_a_step_and_the_run_goes_on_later(tmp_path, model, fault):
    since, kind, cause = CAUSES[fault]
    with serving(model, fault, since) as server:
        recipe = recipe_of(tmp_path, model, server, **({"timeout_s": 12.0} if fault == "slow" else {}))
        with pytest.raises(kind, match=cause) as raised:
            run_ppo(recipe, resume=False)
    output = Path(recipe.run.output)
    done = len(read_jsonl(output / "metrics.jsonl")) if (output / "metrics.jsonl").exists() else 0
    assert done == max(0, since - 1)
    assert raised.value.exit_code == (75 if kind is ServerError else 5)
    if done:
        assert f"Nothing is lost: --resume goes on after step {done}" in str(raised.value)
        assert len(list(output.glob("checkpoints/step-*"))) == done
        assert read_record(output)["status"] == ("interrupted" if kind is ServerError else "failed")
    with serving(model) as server:
        again = load_recipe(recipe.folder / "recipe.yaml", [f"sampling.url={server.url}"])
        assert run_ppo(again, resume=True)["status"] == "finished"


@pytest.mark.parametrize(("told", "cause"), [
    ({"model_config": {"dtype": "torch.bfloat16"}}, "found dtype bfloat16: wanted --dtype float32"),
    ({"model_config": {"logprobs_mode": "raw_logprobs"}}, "wanted --logprobs-mode processed_logprobs"),
    ({"lora_config": {"max_lora_rank": 2}}, "found adapters of rank 2 at most: wanted rank 4: start it as VLLM_ALLOW"),
    ({"parallel_config": {"data_parallel_size": 2}}, "found 2 replicas"),
])
def test_what_a_server_says_of_itself_is_held_against_what_is_needed(tmp_path, model, told, cause):
    with serving(model, **told) as server, pytest.raises(SamplerError, match=cause):
        run_ppo(recipe_of(tmp_path, model, server), resume=False)
    assert server.names == []


def test_a_server_that_is_not_there_is_told_how_to_start(tmp_path, model):
    with serving(model) as server:
        recipe = recipe_of(tmp_path, model, server)
    with pytest.raises(ServerError, match=r"does not answer: .*vllm serve .*--enable-lora --max-lora-rank 8"):
        run_ppo(recipe, resume=False)


def test_a_signal_is_obeyed_while_a_server_is_waited_for(tmp_path, model, monkeypatch):
    from kltune.errors import Interrupted

    with serving(model, "slow", 2) as server:
        recipe = recipe_of(tmp_path, model, server)
        wait = rollout_server.RolloutServer._together

        def signalled(self, ask, count):
            if len(server.names) == 2:
                signal.raise_signal(signal.SIGTERM)
            return wait(self, ask, count)

        monkeypatch.setattr(rollout_server.RolloutServer, "_together", signalled)
        with pytest.raises(Interrupted, match="--resume goes on after step 1"):
            run_ppo(recipe, resume=False)
    assert json.loads((Path(recipe.run.output) / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize(("changes", "said"), [
    ({"engine": "vllm"}, r"sampling\.url: missing with engine: vllm"),
    ({"url": "http://127.0.0.1:1"}, r"sampling\.url: read only with engine: vllm"),
])
def test_a_recipe_names_a_server_whole_or_not_at_all(tmp_path, model, changes, said):
    whole = PPO | {"sampling": PPO["sampling"] | changes}
    with pytest.raises(RecipeError, match=said):
        load_recipe(write_recipe(tmp_path, whole, model))
