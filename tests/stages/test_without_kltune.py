"""What kltune saves is a plain PEFT adapter: a process that never imports kltune loads the same model from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kltune.lm.model.opening import load_saved_policy
from kltune.recipe import load_recipe
from kltune.stages.ppo import run_ppo
from tests.stages.conftest import HELD_OUT, PPO, write_recipe, write_rows

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"

SCRIPT = '''
"""Load adapters or models with peft and transformers alone: logits of given ids, and KL(policy || base) on samples."""
import contextlib, json, sys

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

for job in json.load(open(sys.argv[1])):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32).eval()
    if job["adapter"]:
        model = reference = PeftModel.from_pretrained(base, job["policy"]).eval()
    else:
        model, reference = AutoModelForCausalLM.from_pretrained(job["policy"], dtype=torch.float32).eval(), base
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(job["ids"])).logits
        totals = []
        for text in job["prompts"]:
            rows = job["responses"]
            ids = torch.tensor([tokenizer(text)["input_ids"]]).repeat(rows, 1)
            alive, total = torch.ones(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.float64)
            for _ in range(job["max_new_tokens"]):
                log_p = model(input_ids=ids).logits[:, -1].double().log_softmax(-1)
                with model.disable_adapter() if job["adapter"] else contextlib.nullcontext():
                    log_q = reference(input_ids=ids).logits[:, -1].double().log_softmax(-1)
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
IDS = [[0, 4, 9, 3, 11], [0, 12, 7, 5, 6]]


def in_plain_transformers(folder: Path, jobs: list[dict]) -> None:
    """Run the script on these jobs in a process of its own; what it finds lies at each job's ``out``."""
    (folder / "jobs.json").write_text(json.dumps([{"adapter": True, "ids": IDS, **job} for job in jobs]))
    (folder / "script.py").write_text(SCRIPT)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, str(folder / "script.py"), str(folder / "jobs.json")],
        env=env, cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


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
                "base": section.model.path, "policy": str(run / "final"), "out": str(folder / name),
                "prompts": list(HELD_OUT), "responses": 40, "max_new_tokens": section.sampling.max_new_tokens,
                "ends": [1] if name == "llama" else [1, 2],
            })  # fmt: skip
    in_plain_transformers(folder, jobs)
    return {name: folder / name for name in ("llama", "stories")}


@pytest.mark.parametrize("name", ["llama", "stories"])
def test_an_adapter_is_the_same_model_without_kltune(name, elsewhere, eval_kl, run_folder, stories_run):
    run = run_folder if name == "llama" else stories_run
    if run is None:
        pytest.skip("shared/models/stories260K is not beside the repository")
    recipe = load_recipe(run / "recipe.yaml")
    policy = load_saved_policy(run / "final", recipe.model, device=torch.device("cpu"), is_adapter=True)
    ids = torch.tensor(IDS)
    with torch.no_grad():
        mine = policy.network.logits(policy.network.hidden(ids))
    plain = load_file(f"{elsewhere[name]}.safetensors")["logits"]
    torch.testing.assert_close(mine, plain, atol=1e-5, rtol=0.0)

    theirs = json.loads(Path(f"{elsewhere[name]}.json").read_text())
    code, document, _ = eval_kl(run, "--responses", 400)
    exact = document["kl"]["exact"]
    assert code == 0
    assert exact["nats_per_response"] > 0.02
    # The same ten prompts on both sides, so that the spread between prompts is in neither difference.
    assert abs(exact["nats_per_response"] - theirs["nats"]) < 3 * max(exact["stderr"], theirs["stderr"])


# --- what kltune did not make ----------------------------------------------------------------------------------------

# The scale of a random B, in LoRA's three forms: from a few hundredths of a nat to several.
FOREIGN = {
    "rslora": (0.005, {"use_rslora": True}),
    "lora": (0.01, {}),
    "dora": (0.02, {"use_dora": True}),
}


def save_foreign_adapter(base: Path, folder: Path, scale: float, form: dict) -> None:
    """A LoRA on all linear layers whose B is random, saved by PEFT."""
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", **form)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    model.save_pretrained(folder)


def save_fine_tuned(base: Path, folder: Path, texts: list[str]) -> None:
    """All weights of the base, trained for a few steps on other texts; saved by transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for step in range(12):
        ids = [tokenizer(text)["input_ids"][:24] for text in texts[8 * step : 8 * step + 8]]
        width = max(map(len, ids))
        batch = torch.tensor([row + [1] * (width - len(row)) for row in ids])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in ids])
        model(input_ids=batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Three adapters and a full fine-tune of stories260K, and what the script found of each; {} without that model."""
    sst2 = STORIES.parents[1] / "data" / "sst2" / "train.jsonl"
    if not STORIES.exists() or not sst2.exists():
        return {}
    folder = tmp_path_factory.mktemp("foreign")
    for name, (scale, form) in FOREIGN.items():
        save_foreign_adapter(STORIES, folder / name, scale, form)
    with open(sst2, encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(96), file, strict=False)]
    save_fine_tuned(STORIES, folder / "full", [next(v for v in row.values() if isinstance(v, str)) for row in rows])
    prompts = [f"{who} {what}" for who in ("Once upon a time", "Tom", "The dog", "One day, Lily") for what in (
        "there was", "had a big", "wanted to")]  # fmt: skip
    write_rows(folder / "prompts.jsonl", [{"prompt": text} for text in prompts])
    in_plain_transformers(folder, [
        {"base": str(STORIES), "policy": str(folder / name), "adapter": name != "full", "prompts": prompts,
         "responses": 20, "max_new_tokens": 16, "ends": [1, 2], "out": str(folder / f"{name}.out")}
        for name in (*FOREIGN, "full")
    ])  # fmt: skip
    return {
        name: {"policy": folder / name, "prompts": folder / "prompts.jsonl"}
        | json.loads((folder / f"{name}.out.json").read_text())
        for name in (*FOREIGN, "full")
    }


@pytest.mark.parametrize("name", [*FOREIGN, "full"])
def test_adapters_and_models_made_elsewhere_are_measured_as_plain_transformers_does(foreign, eval_kl, name):
    if not foreign:
        pytest.skip("shared/models/stories260K and shared/data/sst2 are not beside the repository")
    found = foreign[name]
    reference = ("--reference", STORIES) if name == "full" else ()
    code, document, err = eval_kl(
        found["policy"], "--prompts", found["prompts"], "--responses", 240, "--max-new-tokens", 16, *reference
    )
    assert code == 0, err
    exact = document["kl"]["exact"]
    assert exact["nats_per_response"] > 0.01
    # The same twelve prompts on both sides: 3 standard errors of the difference, the prompts' spread counted twice.
    allowed = 3 * (exact["stderr"] ** 2 + found["stderr"] ** 2) ** 0.5
    assert abs(exact["nats_per_response"] - found["nats"]) < allowed
