"""Several processes compute what one does, to the last bit: adapters, heads, optimizers, states, metrics."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.stages.conftest import DISTILL, DPO, ONLINE, PPO, REWARD, SFT, TRPO, write_recipe
from tests.stages.test_resume import assert_same_run, saved_tensors, timeless
from tests.together import codes, together

STEPS = 3
RUN = {"steps": STEPS, "save_every": 2, "eval_every": 2}
UNEVEN = tuple("a" * length for length in (1, 30, 2, 25, 3, 20, 4, 1, 5, 1, 6, 1))      # ten tokens, or forty
STAGES = {
    "ppo": PPO | {"kl": {"target": 0.5, "hard_cap": 3.0}},
    "ppo rloo": PPO | {"ppo": PPO["ppo"] | {"baseline": "rloo"}},
    "ppo grpo": PPO | {"ppo": PPO["ppo"] | {"baseline": "grpo"}, "kl": {"target": 0.5, "placement": "loss"}},
    "ppo with a head alone": PPO | {"ppo": PPO["ppo"] | {"value_function": "head"}},
    "ppo with values above": PPO | {"ppo": PPO["ppo"] | {"value_function": "upper", "value_layers": 0.5}},
    "ppo of an upper layer": PPO | {"lora": {"rank": 4, "alpha": 8.0, "layers": 0.5}, "kl": {"placement": "loss"}},
    "trpo": TRPO | {"kl": {"target": 0.5, "hard_cap": 3.0}},
    "sft": SFT | {"lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1}},
    "sft of all weights": SFT | {"lora": None},
    "reward": REWARD | {"lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1}},
    "dpo": DPO | {"kl": {"target": 0.5}},
    "dpo online": ONLINE,
    "distill": DISTILL | {"kl": {"target": 0.5, "hard_cap": 3.0}},
}
FAST = ("ppo", "trpo", "sft", "reward", "dpo online", "distill")


def stage_of(name: str) -> str:
    return name.split()[0]


@pytest.fixture(name="recipe")
def recipe_fixture(tmp_path, llama):
    def make(name: str) -> Path:
        return write_recipe(tmp_path / name.replace(" ", "_"), STAGES[name] | {"run": RUN}, llama, UNEVEN)

    return make


def run(count: int, name: str, file: Path, output: Path, *more: str) -> Path:
    """A run by so many processes, which all end well."""
    arguments = [stage_of(name), "--recipe", str(file), "--output", str(output), *more]
    ends = codes(together(count, arguments, output.with_suffix(".log")))
    assert ends == [0] * count, "".join(path.read_text() for path in output.parent.glob(f"{output.name}.*"))
    return output


@pytest.mark.parametrize(("name", "counts"), [
    pytest.param(name, counts, marks=() if fast else pytest.mark.stress)
    for name in STAGES for counts, fast in (((2,), name in FAST), ((2, 3), False))
])
def test_a_run_of_several_processes_is_that_of_one(recipe, tmp_path, name, counts):
    file = recipe(name)
    one = run(1, name, file, tmp_path / "one")
    for count in counts:
        some = run(count, name, file, tmp_path / f"by{count}")
        assert_same_run(some, one, STEPS)
        assert saved_tensors(some, 2).keys() == saved_tensors(one, 2).keys()


def test_what_two_saved_one_and_three_go_on_from(recipe, tmp_path):
    file = recipe("ppo")
    whole = run(1, "ppo", file, tmp_path / "whole")
    fault = {"kind": "SIGTERM", "phase": "update", "rank": 1, "after": 9}
    cut = tmp_path / "cut"
    arguments = ["ppo", "--recipe", str(file), "--output", str(cut)]
    assert codes(together(2, arguments, tmp_path / "cut.log", fault)) == [143, 143]
    assert 0 < len(timeless(cut)) < STEPS
    for count in (1, 3):
        again = Path(shutil.copytree(cut, tmp_path / f"again{count}"))
        run(count, "ppo", file, again, "--resume")
        assert_same_run(again, whole, STEPS)


def test_what_is_printed_and_written_is_that_of_one(recipe, tmp_path):
    file = recipe("sft")
    two = run(2, "sft", file, tmp_path / "two", "--json")
    assert (tmp_path / "two.1").read_text() == ""
    document = (tmp_path / "two.0").read_text()
    assert json.loads(document[document.index("\n{"):])["status"] == "finished"
    assert not list(two.rglob(".tmp*"))


def test_eval_kl_and_project_of_several_processes_say_what_one_says(recipe, tmp_path):
    file = recipe("sft")
    checkpoint = run(1, "sft", file, tmp_path / "trained")
    common = [str(checkpoint), "--prompts", str(file.parent / "many.jsonl"), "--responses", "30", "--json"]
    documents = {}
    for count in (1, 2):
        junit = tmp_path / f"{count}.xml"
        measure = ["eval-kl", *common, "--direction", "both", "--top-p", "0.9", "--junit", str(junit)]
        assert codes(together(count, [*measure, "--max-kl", "0.01"], tmp_path / f"measured{count}")) == [3] * count
        scaled = ["project", *common, "--max-kl", "0.3", "--output", str(tmp_path / f"scaled{count}")]
        assert codes(together(count, scaled, tmp_path / f"projected{count}")) == [0] * count
        texts = [(tmp_path / f"{name}{count}.0").read_text() for name in ("measured", "projected")]
        found = [json.loads(text[text.index("\n{") :]) for text in texts]
        documents[count] = [{**document, "output": None} for document in found]
        assert junit.is_file()
    assert documents[2] == documents[1]
    assert all((tmp_path / f"{name}2.1").read_text() == "" for name in ("measured", "projected"))
    adapters = [load_file(tmp_path / f"scaled{count}" / "adapter_model.safetensors") for count in (1, 2)]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


@pytest.mark.parametrize("name", [
    "ppo", *(pytest.param(name, marks=pytest.mark.stress) for name in ("trpo", "dpo online", "dpo", "reward", "sft")),
])
def test_a_base_that_is_spread_over_two_trains_what_a_whole_one_does(recipe, tmp_path, name):
    file = recipe(name)
    whole = run(1, name, file, tmp_path / "one")
    spread = run(2, name, file, tmp_path / "two", "--set", "run.shard=full")
    mine, other = saved_tensors(spread, STEPS), saved_tensors(whole, STEPS)
    assert mine.keys() == other.keys()
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, other[key], rtol=1e-5, atol=1e-5)
    again = Path(shutil.copytree(spread, tmp_path / "again"))
    (again / "result.json").unlink()
    assert load_file(again / "final" / "adapter_model.safetensors").keys()
