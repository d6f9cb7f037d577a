"""A run that was stopped, or killed, and continued is the run that was never stopped, to the last bit."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kltune.cli import main
from kltune.errors import Interrupted, ScorerError
from kltune.recipe import Recipe, load_recipe
from kltune.run.recorder import Report
from kltune.stages.ppo import run_ppo
from kltune.stages.reward import run_reward
from kltune.stages.sft import run_sft
from tests.stages.conftest import PPO, read_jsonl, write_recipe

ROOT = Path(__file__).parents[2]
STEPS = 6
CUTS = (1, 2, 5)  # of 6 steps; an epoch of prompts ends within step 2, of texts after step 2
LONG = 24


def timeless(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock measured, and how often a judge was asked."""
    return [
        {n: value for n, value in row.items() if not n.startswith(("time/", "judge/")) and "per_second" not in n}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]


def saved_tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint and ``final`` hold, by file and name."""
    checkpoint = folder / "checkpoints" / f"step-{step:06d}"
    files = [*checkpoint.rglob("*.safetensors"), *(folder / "final").glob("*.safetensors")]
    return {
        f"{path.relative_to(folder)}:{name}": tensor for path in files for name, tensor in load_file(path).items()
    }


def assert_same_run(folder: Path, unbroken: Path, step: int) -> None:
    """Same numbers, same samples, same weights and optimizer state."""
    assert timeless(folder) == timeless(unbroken)
    assert read_jsonl(folder / "samples.jsonl") == read_jsonl(unbroken / "samples.jsonl")
    mine, other = saved_tensors(folder, step), saved_tensors(unbroken, step)
    assert mine.keys() == other.keys()
    assert any("optimizer" in name or "lora" in name for name in mine)
    different = [name for name in mine if not torch.equal(mine[name], other[name])]
    assert different == []
    state = f"checkpoints/step-{step:06d}/state/state.json"
    assert json.loads((folder / state).read_text()) == json.loads((unbroken / state).read_text())
    results = [json.loads((path / "result.json").read_text()) for path in (folder, unbroken)]
    assert results[0]["kl"] == results[1]["kl"]
    assert results[0]["score"] == results[1]["score"]


def run_with_stops(
    run_stage: Callable[..., dict], recipe: Recipe, monkeypatch: pytest.MonkeyPatch, cuts: tuple[int, ...]
) -> None:
    """Run a stage, a SIGTERM arriving in each step of ``cuts``, and continue it each time."""
    record = Report.step

    def step_and_signal(self: Report, step: int, metrics: dict) -> None:
        record(self, step, metrics)
        if step == stop:
            signal.raise_signal(signal.SIGTERM)

    for stop in cuts:
        with monkeypatch.context() as patch:
            patch.setattr(Report, "step", step_and_signal)
            with pytest.raises(Interrupted) as caught:
                run_stage(recipe, resume=stop != cuts[0])
        assert caught.value.exit_code == 143
        folder = Path(recipe.run.output)
        assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
        assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == list(range(1, stop + 1))
    assert run_stage(recipe, resume=True)["status"] == "finished"
    assert json.loads((Path(recipe.run.output) / "run.json").read_text())["resumed_at"] == list(cuts)


@pytest.mark.parametrize("baseline", ["value", "rloo"])
@pytest.mark.parametrize("price", [("kl.control=target",), ("kl.control=fixed", "kl.beta=0.2")])
def test_a_stopped_ppo_run_goes_on_bit_for_bit(ppo_recipe, monkeypatch, tmp_path, baseline, price):
    keys = (f"run.steps={STEPS}", "run.eval_every=2", "reward.0.normalize=true", f"ppo.baseline={baseline}", *price)
    broken, unbroken = (ppo_recipe(*keys, output=str(tmp_path / name)) for name in ("broken", "unbroken"))
    run_ppo(unbroken, resume=False)
    run_with_stops(run_ppo, broken, monkeypatch, CUTS)
    assert_same_run(Path(broken.run.output), Path(unbroken.run.output), STEPS)
    held = saved_tensors(Path(broken.run.output), STEPS)
    assert any("state/value.safetensors:head" in name for name in held) == (baseline == "value")


def test_a_stopped_run_with_a_value_head_alone_goes_on_bit_for_bit(ppo_recipe, monkeypatch, tmp_path):
    keys = ("run.steps=4", "ppo.value_function=head", "ppo.value_lr=0.01")
    broken, unbroken = (ppo_recipe(*keys, output=str(tmp_path / name)) for name in ("broken", "unbroken"))
    run_ppo(unbroken, resume=False)
    run_with_stops(run_ppo, broken, monkeypatch, (2,))
    assert_same_run(Path(broken.run.output), Path(unbroken.run.output), 4)
    held = [name for name in saved_tensors(Path(broken.run.output), 4) if "state/value.safetensors" in name]
    assert sorted(name.rpartition(":")[2] for name in held) == ["head.linear.bias", "head.linear.weight"]


def test_a_run_does_not_go_on_with_another_reward_function(ppo_recipe, monkeypatch, tmp_path):
    recipe = ppo_recipe("run.steps=3", output=str(tmp_path / "run"))
    record = Report.step

    def step_and_signal(self: Report, step: int, metrics: dict) -> None:
        record(self, step, metrics)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Report, "step", step_and_signal)
        with pytest.raises(Interrupted):
            run_ppo(recipe, resume=False)
    file = recipe.folder / "rewards.py"
    known = json.loads((tmp_path / "run" / "run.json").read_text())["rewards"]
    assert known[0]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_text(file.read_text() + "\n# changed\n")
    with pytest.raises(ScorerError, match="but the run was started with"):
        run_ppo(recipe, resume=True)


@pytest.mark.parametrize("controller", ["ziegler", "dual"])
def test_other_controllers_are_restored_too(ppo_recipe, monkeypatch, tmp_path, controller):
    keys = ("run.steps=4", f"kl.controller={controller}", "ppo.epochs=1")
    broken, unbroken = (ppo_recipe(*keys, output=str(tmp_path / name)) for name in ("broken", "unbroken"))
    run_ppo(unbroken, resume=False)
    run_with_stops(run_ppo, broken, monkeypatch, (2,))
    assert_same_run(Path(broken.run.output), Path(unbroken.run.output), 4)


def test_a_stopped_sft_run_with_dropout_goes_on_bit_for_bit(sft_recipe, monkeypatch, tmp_path):
    keys = (f"run.steps={STEPS}", "run.eval_every=2", "lora.dropout=0.1")
    broken, unbroken = (sft_recipe(*keys, output=str(tmp_path / name)) for name in ("broken", "unbroken"))
    run_sft(unbroken, resume=False)
    run_with_stops(run_sft, broken, monkeypatch, CUTS)
    assert_same_run(Path(broken.run.output), Path(unbroken.run.output), STEPS)


def test_a_stopped_reward_run_with_dropout_goes_on_bit_for_bit(reward_recipe, monkeypatch, tmp_path):
    keys = (f"run.steps={STEPS}", "run.eval_every=2", "lora.dropout=0.1", "optim.micro_batch_size=4")
    broken, unbroken = (reward_recipe(*keys, output=str(tmp_path / name)) for name in ("broken", "unbroken"))
    run_reward(unbroken, resume=False)
    run_with_stops(run_reward, broken, monkeypatch, CUTS)
    assert_same_run(Path(broken.run.output), Path(unbroken.run.output), STEPS)
    held = saved_tensors(Path(broken.run.output), STEPS)
    assert any(name.startswith("checkpoints/") and "reward_head.safetensors:weight" in name for name in held)


@pytest.mark.parametrize("baseline", ["value", "rloo"])
def test_a_stopped_ppo_run_that_shares_a_reward_model_goes_on_bit_for_bit(
    ppo_recipe, reward_model, monkeypatch, tmp_path, baseline
):
    entry = f"[{{kind: model, path: {reward_model}, normalize: true}}]"
    keys = ("run.steps=4", f"reward={entry}", f"ppo.baseline={baseline}", "run.eval_every=2")
    broken, unbroken = (ppo_recipe(*keys, output=str(tmp_path / name)) for name in ("broken", "unbroken"))
    run_ppo(unbroken, resume=False)
    run_with_stops(run_ppo, broken, monkeypatch, (1, 3))
    assert_same_run(Path(broken.run.output), Path(unbroken.run.output), 4)


def test_a_stopped_full_fine_tuning_goes_on_bit_for_bit(sft_recipe, monkeypatch, tmp_path):
    keys = ("run.steps=4", "lora=null", "optim.lr=1e-3")
    broken, unbroken = (sft_recipe(*keys, output=str(tmp_path / name)) for name in ("broken", "unbroken"))
    run_sft(unbroken, resume=False)
    run_with_stops(run_sft, broken, monkeypatch, (2,))
    assert_same_run(Path(broken.run.output), Path(unbroken.run.output), 4)


def test_dropout_is_on_in_training_and_off_in_measuring(sft_recipe, tmp_path):
    losses = []
    for share in (0.0, 0.5):
        recipe = sft_recipe(f"lora.dropout={share}", "run.steps=3", output=str(tmp_path / str(share)))
        run_sft(recipe, resume=False)
        losses.append([row["loss/mean"] for row in read_jsonl(Path(recipe.run.output) / "metrics.jsonl")])
    assert losses[0][0] == losses[1][0]  # a fresh adapter adds 0, dropped or not
    assert losses[0][2] != losses[1][2]


def test_the_last_step_is_not_interrupted(ppo_recipe, monkeypatch):
    recipe = ppo_recipe("run.steps=2")
    record = Report.step

    def step_and_signal(self: Report, step: int, metrics: dict) -> None:
        record(self, step, metrics)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Report, "step", step_and_signal)
    assert run_ppo(recipe, resume=False)["status"] == "finished"


# --- real processes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_recipe(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A recipe that takes a second or two, saves every third step, and can be run into several folders."""
    base = PPO | {"run": {"steps": LONG, "save_every": 3, "eval_every": 7, "keep": 2}}
    return write_recipe(tmp_path_factory.mktemp("long"), base, llama)


@pytest.fixture(scope="module")
def unbroken(long_recipe: Path) -> Path:
    """Its folder after a run that nothing stopped."""
    recipe = load_recipe(long_recipe, output=str(long_recipe.parent / "unbroken"))
    run_ppo(recipe, resume=False)
    return Path(recipe.run.output)


def command(recipe: Path, output: Path) -> list[str]:
    return ["ppo", "--recipe", str(recipe), "--output", str(output), "--json"]


def start(recipe: Path, output: Path) -> subprocess.Popen:
    """``python -m kltune ppo`` in a process of its own, with as many threads as this one: sums depend on them."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, "-m", "kltune", *command(recipe, output)],
        env=env, cwd=recipe.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


def wait_for_steps(process: subprocess.Popen, output: Path, steps: int) -> None:
    """Return once the run has recorded so many steps."""
    deadline, metrics = time.monotonic() + 120, output / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def go_on(recipe: Path, output: Path, capsys: pytest.CaptureFixture) -> dict:
    """``--resume`` to the end, in this process; what it prints on stdout."""
    with pytest.raises(SystemExit) as caught:
        main([*command(recipe, output), "--resume"])
    assert caught.value.code == 0
    return json.loads(capsys.readouterr().out)


def test_sigterm_saves_exits_143_and_resumes(long_recipe, unbroken, capsys):
    output = long_recipe.parent / "terminated"
    process = start(long_recipe, output)
    wait_for_steps(process, output, 4)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 143, stderr
    assert stdout == ""
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    assert json.loads((output / "run.json").read_text())["status"] == "interrupted"
    done = read_jsonl(output / "metrics.jsonl")[-1]["step"]
    assert 4 <= done < LONG
    assert (output / "checkpoints" / f"step-{done:06d}").is_dir()

    result = go_on(long_recipe, output, capsys)
    assert result == json.loads((output / "result.json").read_text())
    assert_same_run(output, unbroken, LONG)


def test_sigkill_at_a_random_moment_loses_nothing_that_was_saved(long_recipe, unbroken, capsys):
    output = long_recipe.parent / "killed"
    process = start(long_recipe, output)
    wait_for_steps(process, output, random.randint(1, LONG // 2))
    time.sleep(random.uniform(0.0, 0.2))
    process.kill()
    process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("the run was over before the kill")
    assert json.loads((output / "run.json").read_text())["status"] == "running"
    go_on(long_recipe, output, capsys)
    assert_same_run(output, unbroken, LONG)
