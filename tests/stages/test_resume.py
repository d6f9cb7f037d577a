"""A run that was stopped, or killed, and continued is the run that was never stopped, to the last bit."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kltune.cli import main
from kltune.errors import InputError, Interrupted, ScorerError
from kltune.recipe import Recipe, load_recipe
from kltune.run.checkpoint import read_state
from kltune.run.recorder import Report
from kltune.stages.ppo import run_ppo
from tests.stages.conftest import (
    DISTILL,
    DPO,
    ONLINE,
    PPO,
    REWARD,
    RUNS,
    SFT,
    TRPO,
    ran,
    read_jsonl,
    rows_of,
    write_recipe,
    write_rows,
)

ROOT = Path(__file__).parents[2]
STEPS = 6
CUTS = (1, 2, 5)  # of 6 steps; an epoch of prompts ends within step 2, of texts after step 2
ONE_CUTS = (1, 2, 4, 5)
LONG = 24


def timeless(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock measured, and how often a judge was asked."""
    clocked = "time/", "judge/", "memory/"
    return [
        {n: value for n, value in row.items() if not n.startswith(clocked) and "per_second" not in n}
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
    assert results[0].get("stopped_early") == results[1].get("stopped_early")


@contextmanager
def signalled_in(step: int) -> Iterator[None]:
    """Within: SIGTERM arrives in this step of a run."""
    record = Report.step

    def step_and_signal(self: Report, now: int, metrics: dict) -> None:
        record(self, now, metrics)
        if now == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Report, "step", step_and_signal)
        yield


def run_with_stops(run_stage: Callable[..., dict], recipe: Recipe, cuts: tuple[int, ...]) -> None:
    """Run a stage, a SIGTERM arriving in each step of ``cuts``, and continue it each time."""
    for stop in cuts:
        with signalled_in(stop), pytest.raises(Interrupted) as caught:
            run_stage(recipe, resume=stop != cuts[0])
        assert caught.value.exit_code == 143
        assert json.loads((Path(recipe.run.output) / "run.json").read_text())["status"] == "interrupted"
        assert [row["step"] for row in rows_of(recipe)] == list(range(1, stop + 1))
    assert run_stage(recipe, resume=True)["status"] == "finished"
    assert json.loads((Path(recipe.run.output) / "run.json").read_text())["resumed_at"] == list(cuts)


FIXED, TARGET = ("kl.control=fixed", "kl.beta=0.2"), ("kl.control=target", "kl.beta=auto", "kl.target=0.3")
NORMALIZED, ALONE = "reward.0.normalize=true", ("optim.lr=1e-4", "trpo.value_minibatch_size=64")
MODEL = "reward=[{{kind: model, path: {reward_model}, normalize: true}}]"
PEAK = (*FIXED, "kl.beta=0", "run.steps=16", "run.eval_every=3", "eval.prompts=many.jsonl",
        "eval.responses=130", "eval.stop_at_gold_peak=true",
        'eval.gold={{kind: function, path: "rewards.py:few"}}')
MANY = ("eval.prompts=many.jsonl", "eval.responses=130")
PULL = ("kl.control=fixed", "kl.beta=0.05", "sampling.prompts_per_step=32", "optim.lr=0.1", *MANY)
CAPPED = (*PULL, "sampling.responses_per_prompt=1", "kl.hard_cap=0.8", "kl.target=null")
PAIRS = ("data.prompts=many.jsonl", "dpo.beta=0.05", *PULL)
FOLLOWED = ("dpo.reference_alpha=0.6", "dpo.reference_every=2", "dpo.dynamic_beta=0.6")

# Of each: its recipe, and the groups of tensors that its checkpoint holds besides the model.
RESUMED = {
    "sft, dropout": (SFT, ("lora.dropout=0.1",), "policy_optimizer"),
    "sft, full": (SFT, ("lora=null", "optim.lr=1e-3"), "policy_optimizer"),
    "reward, dropout": (REWARD, ("lora.dropout=0.1", "optim.micro_batch_size=4"), "reward_optimizer"),
    "ppo, values, target": (PPO, (NORMALIZED,), "policy_optimizer value value_optimizer"),
    "ppo, a head alone, dual": (
        PPO, ("ppo.value_function=head", "ppo.value_lr=0.01", "kl.controller=dual", "ppo.epochs=1"),
        "policy_optimizer value value_optimizer",
    ),
    "ppo, values above": (
        PPO, ("ppo.value_function=upper", "ppo.value_layers=0.5", "ppo.epochs=1"),
        "policy_optimizer value value_optimizer",
    ),
    "ppo, rloo, fixed": (PPO, ("ppo.baseline=rloo", "ppo.entropy_floor=3.2", NORMALIZED, *FIXED), "policy_optimizer"),
    "ppo, a reward model": (PPO, (MODEL,), "policy_optimizer value value_optimizer"),
    "ppo, a reward model, rloo": (PPO, (MODEL, "ppo.baseline=rloo", "kl.controller=ziegler"), "policy_optimizer"),
    "ppo, gold peak": (PPO, ("ppo.baseline=rloo", *PEAK), "policy_optimizer alarms"),
    "ppo, cap": (PPO, ("ppo.minibatch_size=16", *CAPPED), "policy_optimizer value value_optimizer budget"),
    "trpo, values": (TRPO, (NORMALIZED,), "trust_region value value_optimizer"),
    "trpo, rloo": (TRPO, ("trpo.baseline=rloo", NORMALIZED, *ALONE), "trust_region"),
    "trpo, cap": (TRPO, (*CAPPED, "trpo.max_step_kl=0.3"), "trust_region value value_optimizer budget"),
    "dpo": (DPO, (), "policy_optimizer"),
    "dpo, bco": (DPO, ("dpo.loss=bco",), "policy_optimizer"),
    "dpo, kto, priced": (DPO, ("dpo.loss=kto", *FIXED, "dpo.reference_alpha=1.0"), "policy_optimizer loss_reference"),
    "dpo, target": (DPO, (*TARGET, *FOLLOWED, "eval.pairs=held_out_pairs.jsonl"), "policy_optimizer loss_reference"),
    "dpo, cap": (DPO, (*PAIRS, *FOLLOWED, "kl.hard_cap=0.8"), "policy_optimizer loss_reference budget"),
    "distill": (DISTILL, ("distill.epochs=2",), "policy_optimizer"),
    "distill, cap": (DISTILL, (*PULL, "kl.hard_cap=0.5", "optim.lr=0.01"), "policy_optimizer budget"),
    "online": (ONLINE, (NORMALIZED, *TARGET), "policy_optimizer"),
    "online, moving": (ONLINE, FOLLOWED, "policy_optimizer loss_reference"),
    "online, cap": (ONLINE, (*PULL, "data.prompts=many.jsonl", "kl.hard_cap=0.5"), "policy_optimizer budget"),
}


@pytest.mark.parametrize(("base", "keys", "groups"), RESUMED.values(), ids=RESUMED.keys())
def test_a_stopped_run_goes_on_bit_for_bit(request, tmp_path, llama, base, keys, groups):
    shared = request.getfixturevalue("reward_model") if MODEL in keys else None
    if "budget" in groups:      # the cap is to be met
        request.getfixturevalue("unlimited")
    file = write_recipe(tmp_path, base | {"run": base["run"] | {"steps": STEPS, "eval_every": 2}}, llama)
    keys = [key.format(reward_model=shared) for key in keys]
    broken, unbroken = (load_recipe(file, keys, output=str(tmp_path / name)) for name in ("broken", "unbroken"))
    run = RUNS[base["stage"]]
    done = run(unbroken, resume=False)
    peak = done.get("stopped_early")
    run_with_stops(run, broken, CUTS if peak is None else (1, done["final_step"] + 1))
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken", done["steps"])

    checkpoint = tmp_path / "unbroken" / "checkpoints" / f"step-{done['steps']:06d}"
    tensors, state = read_state(checkpoint)
    wanted = set(groups.split())
    # Whether a cap refuses the last step depends on a processor's last digits; trpo holds no direction then.
    assert wanted - ({"trust_region"} if "budget" in wanted else set()) <= tensors.keys() <= wanted
    assert (checkpoint / "reward_head.safetensors").exists() == (base is REWARD)
    assert ("means" in state) == any(key in keys for key in ("dpo.loss=bco", "dpo.dynamic_beta=0.6"))
    if "ppo.value_function=head" in keys:
        assert tensors["value"].keys() == {"head.linear.bias", "head.linear.weight"}
    if "budget" in tensors:
        assert state["budget"]["rollbacks"] + state["budget"]["refusals"] > 0
    if base is TRPO:
        assert state["trust_region"]["damping"] != {"relative": 100.0, "adapts": True}
        assert state["trust_region"]["radius"]["seen"] > 0
    assert (peak is not None) == ("eval.stop_at_gold_peak=true" in keys)


PRICES = {"fixed": FIXED, "target": TARGET}
ONE_CUT = {"sft": (SFT, ()), "reward": (REWARD, ())} | {
    f"{name}, {price}": (base, (*keys, *PRICES[price])) for price in PRICES for name, (base, keys) in {
        "ppo, values": (PPO, ()), "ppo, rloo": (PPO, ("ppo.baseline=rloo",)), "trpo": (TRPO, ()),
        "dpo": (DPO, ()), "online": (ONLINE, ()),
    }.items()
}


@pytest.mark.parametrize(("base", "keys"), [
    pytest.param(*case, id=name, marks=() if name == "trpo, fixed" else pytest.mark.stress)
    for name, case in ONE_CUT.items()
])  # fmt: skip
def test_one_cut_anywhere_changes_no_bit(tmp_path, llama, base, keys, record_property):
    file = write_recipe(tmp_path, base | {"run": base["run"] | {"steps": STEPS, "eval_every": 2}}, llama)
    names = ("unbroken", *map(str, ONE_CUTS))
    unbroken, *broken = (load_recipe(file, keys, output=str(tmp_path / name)) for name in names)
    RUNS[base["stage"]](unbroken, resume=False)
    for cut, recipe in zip(ONE_CUTS, broken, strict=True):
        run_with_stops(RUNS[base["stage"]], recipe, (cut,))
        assert_same_run(tmp_path / str(cut), tmp_path / "unbroken", STEPS)
    record_property("cuts", len(ONE_CUTS))


def test_a_reward_that_draws_random_numbers_draws_the_same_ones_again(ppo_recipe, tmp_path):
    keys = ("run.steps=3", "reward.0.path=rewards.py:drawn")
    broken, unbroken = (ppo_recipe(*keys, output=str(tmp_path / name)) for name in ("broken", "unbroken"))
    file = broken.folder / "rewards.py"
    file.write_text(file.read_text() + """
import random
import numpy as np
import torch
def drawn(prompts, responses):
    return [random.random() + np.random.rand() + torch.rand(1).item() for _ in responses]
""")
    run_ppo(unbroken, resume=False)
    run_with_stops(run_ppo, broken, (1,))
    scores = [[row["score/mean"] for row in rows_of(recipe)] for recipe in (broken, unbroken)]
    assert scores[0] == scores[1]
    assert len(set(scores[0])) == 3


def test_a_run_does_not_go_on_with_another_reward_function(ppo_recipe):
    recipe = ppo_recipe("run.steps=3")
    with signalled_in(1), pytest.raises(Interrupted):
        run_ppo(recipe, resume=False)
    file = recipe.folder / "rewards.py"
    known = json.loads((Path(recipe.run.output) / "run.json").read_text())["rewards"]
    assert known[0]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_text(file.read_text() + "\n# changed\n")
    with pytest.raises(ScorerError, match=r"reward.0: .*rewards.py:score has changed: it is not what the run in"):
        run_ppo(recipe, resume=True)


def test_a_run_does_not_go_on_with_a_chat_template_that_makes_other_rows(ppo_recipe, llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    recipe = ppo_recipe("run.steps=3", f"model.path={model}")
    write_rows(recipe.folder / "prompts.jsonl", [{"messages": [{"role": "user", "content": "the "}]}] * 3)
    with signalled_in(1), pytest.raises(Interrupted):
        run_ppo(recipe, resume=False)
    (model / "chat_template.jinja").write_text("so " + template)
    with pytest.raises(InputError, match="chat template: found"):
        run_ppo(recipe, resume=True)
    (model / "chat_template.jinja").write_text("{# says the same #}" + template)
    assert run_ppo(recipe, resume=True)["status"] == "finished"


def test_dropout_is_on_in_training_and_off_in_measuring(sft_recipe, tmp_path):
    losses = []
    for share in (0.0, 0.5):
        _, rows = ran(sft_recipe(f"lora.dropout={share}", "run.steps=3", output=str(tmp_path / str(share))))
        losses.append([row["loss/mean"] for row in rows])
    assert losses[0][0] == losses[1][0]  # a fresh adapter adds 0, dropped or not
    assert losses[0][2] != losses[1][2]


def test_the_last_step_is_not_interrupted(ppo_recipe):
    with signalled_in(2):
        assert ran(ppo_recipe("run.steps=2"))[0]["status"] == "finished"


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
