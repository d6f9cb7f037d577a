"""What kltune saves is a plain PEFT adapter: a process that never imports kltune loads the same model from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kltune.lm.opening import load_saved_policy
from kltune.recipe import load_recipe
from kltune.stages.ppo import run_ppo
from tests.stages.conftest import HELD_OUT, PPO, write_recipe

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"

SCRIPT = '''
"""Load adapters with peft and transformers alone: logits of given ids, and KL(policy || base) on samples of its own."""
import json, sys

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

for job in json.load(open(sys.argv[1])):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, job["adapter"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["adapter"])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(job["ids"])).logits
        totals = []
        for text in job["prompts"]:
            rows = job["responses"]
            ids = torch.tensor([tokenizer(text)["input_ids"]]).repeat(rows, 1)
            alive, total = torch.ones(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.float64)
            for _ in range(job["max_new_tokens"]):
                log_p = model(input_ids=ids).logits[:, -1].double().log_softmax(-1)
                with model.disable_adapter():
                    log_q = model(input_ids=ids).logits[:, -1].double().log_softmax(-1)
                total += alive * (log_p.exp() * (log_p - log_q)).sum(-1)
                drawn = torch.multinomial(log_p.exp(), 1)
                alive &= ~torch.isin(drawn[:, 0], torch.tensor(job["ends"]))
                ids = torch.cat([ids, drawn], dim=1)
            totals.append(total.mean())
    means = torch.stack(totals)
    save_file({"logits": logits}, job["out"] + ".safetensors")
    figures = {"nats": means.mean().item(), "stderr": (means.std() / len(means) ** 0.5).item()}
    json.dump(figures, open(job["out"] + ".json", "w"))
assert "kltune" not in sys.modules
'''


@pytest.fixture(scope="module")
def stories_run(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """Three quick PPO steps on stories260K; None where that model is not at hand."""
    if not STORIES.exists():
        return None
    base = PPO | {"data": {"prompts": "prompts.jsonl", "template": "none"}}
    path = write_recipe(tmp_path_factory.mktemp("stories"), base, STORIES, ("Once upon a time", "Tom had a", "The dog"))
    keys = ["run.steps=3", "optim.lr=5e-3", "sampling.max_new_tokens=12", "ppo.baseline=rloo"]
    return Path(run_ppo(load_recipe(path, keys), resume=False)["output"])


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, run_folder: Path, stories_run: Path | None) -> dict[str, Path]:
    """What the script found, by model."""
    folder = tmp_path_factory.mktemp("elsewhere")
    jobs = []
    for name, run in (("llama", run_folder), ("stories", stories_run)):
        if run is not None:
            section = load_recipe(run / "recipe.yaml")
            jobs.append({
                "base": section.model.path, "adapter": str(run / "final"), "out": str(folder / name),
                "ids": [[0, 4, 9, 3, 11], [0, 12, 7, 5, 6]], "prompts": list(HELD_OUT), "responses": 40,
                "max_new_tokens": section.sampling.max_new_tokens, "ends": [1] if name == "llama" else [1, 2],
            })  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "script.py").write_text(SCRIPT)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, str(folder / "script.py"), str(folder / "jobs.json")],
        env=env, cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {name: folder / name for name in ("llama", "stories")}


@pytest.mark.parametrize("name", ["llama", "stories"])
def test_an_adapter_is_the_same_model_without_kltune(name, elsewhere, eval_kl, run_folder, stories_run):
    run = run_folder if name == "llama" else stories_run
    if run is None:
        pytest.skip("shared/models/stories260K is not beside the repository")
    recipe = load_recipe(run / "recipe.yaml")
    policy = load_saved_policy(run / "final", recipe.model, device=torch.device("cpu"), is_adapter=True)
    ids = torch.tensor([[0, 4, 9, 3, 11], [0, 12, 7, 5, 6]])
    with torch.no_grad():
        mine = policy.network.logits(policy.network.hidden(ids))
    assert torch.equal(mine, load_file(f"{elsewhere[name]}.safetensors")["logits"])

    theirs = json.loads(Path(f"{elsewhere[name]}.json").read_text())
    code, document, _ = eval_kl(run, "--responses", 400)
    exact = document["kl"]["exact"]
    assert code == 0
    assert exact["nats_per_response"] > 0.05
    # The same ten prompts on both sides, so that the spread between prompts is in neither difference.
    assert abs(exact["nats_per_response"] - theirs["nats"]) < 3 * max(exact["stderr"], theirs["stderr"])
