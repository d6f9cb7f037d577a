"""lm/fast can be left out: every stage gives the same KL the plain way, only later, and nothing else knows of it."""

from pathlib import Path

import pytest

import kltune
from kltune.lm.fast import ways
from kltune.lm.model.network import Network
from kltune.stages.dpo import run_dpo
from kltune.stages.eval_kl import EvalKLOptions, eval_kl
from kltune.stages.ppo import run_ppo
from kltune.stages.reward import run_reward
from kltune.stages.sft import run_sft
from kltune.stages.trpo import run_trpo
from tests.stages.conftest import read_jsonl

RUNS = {"ppo": run_ppo, "trpo": run_trpo, "dpo": run_dpo}


@pytest.mark.parametrize("stage", RUNS)
def test_a_run_and_its_kl_are_the_same_without_the_fast_ways(stage, request, tmp_path, monkeypatch):
    make = request.getfixturevalue(f"{stage}_recipe")
    opened, make_network = [], Network.__init__
    monkeypatch.setattr(Network, "__init__", lambda self, causal: opened.append(self) or make_network(self, causal))

    def measured(output: Path) -> list[float]:
        recipe = make("run.steps=3", "run.eval_every=1", output=str(output))
        RUNS[stage](recipe, False)
        rows = read_jsonl(output / "metrics.jsonl")
        steps = [row[name] for row in rows for name in ("kl/ref_nats_per_response", "eval/kl_ref_nats_per_response")
                 if row.get(name) is not None]
        document, _ = eval_kl([str(output)], EvalKLOptions(responses=40, direction="both", top_p=0.9))
        kls = (document["kl"]["exact"], document["forward"]["exact"], document["deployed"]["both"])
        return steps + [kl["nats_per_response"] for kl in kls]

    fast = measured(tmp_path / "fast")
    assert all(network.fast.decodes and network.fast.shares_prefixes for network in opened)
    opened.clear()
    with ways.off():
        plain = measured(tmp_path / "plain")
    assert opened
    assert {network.fast for network in opened} == {None}
    assert max(fast) > 0.01
    assert plain == pytest.approx(fast, rel=1e-3, abs=1e-5)


def test_a_reward_model_and_a_full_model_are_trained_the_plain_way_too(reward_recipe, sft_recipe, tmp_path):
    recipes = {run_reward: reward_recipe("run.steps=3"), run_sft: sft_recipe("run.steps=3", "lora=null")}

    def losses(folder: Path) -> list[float]:
        rows = []
        for number, (run, recipe) in enumerate(recipes.items()):
            output = folder / str(number)
            run(recipe.model_copy(update={"run": recipe.run.model_copy(update={"output": str(output)})}), False)
            rows += read_jsonl(output / "metrics.jsonl")
        return [row["loss/mean"] for row in rows]

    fast = losses(tmp_path / "fast")
    with ways.off():
        assert losses(tmp_path / "plain") == pytest.approx(fast, rel=1e-4)
    assert len(fast) == 6


def test_one_module_knows_of_the_fast_ways():
    package = Path(kltune.__file__).parent
    users = [path.relative_to(package) for path in package.rglob("*.py") if "kltune.lm.fast" in path.read_text()]
    plans = "lm/measure/footprint.py"       # says what memory they take
    assert {str(path) for path in users if path.parts[:2] != ("lm", "fast")} == {"lm/model/network.py", plans}
