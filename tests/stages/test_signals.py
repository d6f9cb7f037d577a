"""A run that is asked to stop, at whatever moment, ends with the signal's code, and what is resumed is the whole run.

Each run is a fork of this process, where all that takes seconds is imported already; start-up, which they have not, is
that of real processes.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kltune.cli import main
from kltune.errors import Interrupted
from kltune.lm.model.policy import Policy
from kltune.recipe import load_recipe
from kltune.run import session
from kltune.run.files import read_jsonl
from kltune.run.subprocesses import STOP_SIGNALS
from kltune.stages.ppo import run_ppo
from tests.judges import Reply, part, serving
from tests.stages.conftest import PPO, write_recipe
from tests.stages.test_resume import assert_same_run

ROOT = Path(__file__).parents[2]
STEPS, TIMES = 5, 20
KINDS = {number.name: (number, number) for number in STOP_SIGNALS}      # the signal, and the second one of a double
DOUBLE = {f"{number.name} twice": (number, second) for number, second in zip(STOP_SIGNALS, STOP_SIGNALS[::-1],
                                                                            strict=True)}


def forked(arguments: list[str], log: Path, before: Callable[[], object] = lambda: None) -> int:
    """``kltune ...`` in a fork, which first calls ``before``; its process id. What it prints is added to ``log``."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = sys.__stderr__ = os.fdopen(1, "w", buffering=1, closefd=False)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        torch.set_num_threads(1)      # the threads of before the fork are not here
        before()
        main(arguments)
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        code = 1
        traceback.print_exc()
        raise
    finally:
        os._exit(code)


def ended(pid: int, within: float = 300.0, log: Path | None = None) -> int:
    """The exit code of a process as a shell has it; it is killed, and the test fails, where it takes longer."""
    give_up = time.monotonic() + within
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if time.monotonic() > give_up:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail(f"did not end within {within} s" + ("" if log is None else f": {log.read_text()}"))
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, llama):
    """A recipe whose runs evaluate every other step, the folder of one that nothing stopped, and how long it took."""
    base = PPO | {"run": {"steps": STEPS, "save_every": 2, "eval_every": 2, "keep": 2}}
    file = write_recipe(tmp_path_factory.mktemp("signals"), base, llama)
    run_ppo(load_recipe(file, output=str(file.parent / "warm")), resume=False)
    began = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_ppo(load_recipe(file, output=str(file.parent / "whole")), resume=False)
    torch.set_num_threads(threads)
    return file, file.parent / "whole", time.monotonic() - began


def stopped_at_random(whole, output: Path, numbers: tuple[int, int], seed: int, *, double: bool) -> None:
    """Send a signal, or two, at a random moment, until the run is through; each end is one that was asked for."""
    file, unbroken, seconds = whole
    draw, log = random.Random(seed), output.with_suffix(".log")
    command = ["ppo", "--recipe", str(file), "--output", str(output), "--json"]
    pid = forked(command, log)
    time.sleep(draw.uniform(0.0, 1.1 * seconds))
    os.kill(pid, numbers[0])
    if double:
        time.sleep(draw.choice([0.0, 0.01, 0.15, 0.3]))
        os.kill(pid, numbers[1])
    code = ended(pid)
    assert code in {0, *(128 + number for number in numbers)}, log.read_text()
    assert ended(forked([*command, "--resume"], log)) == 0, log.read_text()
    assert "Traceback" not in log.read_text()
    assert_same_run(output, unbroken, STEPS)


@pytest.mark.parametrize(("kind", "seed"), [
    pytest.param(kind, seed, marks=() if seed == number and number < 4 else pytest.mark.stress)
    for number, kind in enumerate(KINDS | DOUBLE) for seed in range(TIMES)
])
def test_a_signal_at_any_moment_ends_a_run_that_can_be_resumed(whole, tmp_path, record_property, kind, seed):
    record_property("signals", 1 + (kind in DOUBLE))
    numbers = (KINDS | DOUBLE)[kind]
    moment = 100 * list(KINDS | DOUBLE).index(kind) + seed
    stopped_at_random(whole, tmp_path / "run", numbers, moment, double=kind in DOUBLE)


def test_a_signal_while_models_are_loaded_waits_for_no_step(ppo_recipe, monkeypatch):
    recipe, load = ppo_recipe("run.steps=1"), session.load_policy

    def signalled(*arguments: object, **options: object) -> Policy:
        signal.raise_signal(signal.SIGTERM)
        return load(*arguments, **options)

    monkeypatch.setattr(session, "load_policy", signalled)
    with pytest.raises(Interrupted, match="before step 1; --resume") as caught:
        run_ppo(recipe, resume=False)
    assert caught.value.exit_code == 143
    assert read_jsonl(Path(recipe.run.output) / "metrics.jsonl") == []
    monkeypatch.setattr(session, "load_policy", load)
    assert run_ppo(recipe, resume=True)["status"] == "finished"


# --- an AI judge that hangs, or is to be asked again later ------------------------------------------------------------

# How long a judge is waited for once a signal came is counted, in looks, in tests/lm/rewards/test_judge.py. Here a run
# has to end long before its judge would answer: how long it takes to save is the disk's affair.
OBEYED, ANSWERED = 60.0, 600.0      # seconds
TROUBLE = {"hangs": Reply(seconds=ANSWERED), "waits to retry": Reply(status=503, headers={"Retry-After": "60"})}


@pytest.mark.parametrize(("trouble", "number", "answers"), [
    ("hangs", signal.SIGTERM, 20), ("waits to retry", signal.SIGUSR1, 20),
    *(pytest.param(trouble, number, answers, marks=pytest.mark.stress)
      for trouble in TROUBLE for number in STOP_SIGNALS for answers in (0, 60)),
])
def test_a_signal_is_obeyed_while_a_judge_is_waited_for(whole, tmp_path, trouble, number, answers):
    good = [True]

    def answer(count: int, question: str) -> Reply | str:
        if good[0] and count >= answers:
            (tmp_path / "waiting").touch()
            return TROUBLE[trouble]
        return json.dumps({"score": min(10, part(question, "response").count("a"))})

    with serving(answer) as endpoint:
        entry = {"kind": "judge", "url": endpoint.url, "model": "m", "name": "j", "timeout_s": ANSWERED, "retries": 9}
        command = ["ppo", "--recipe", str(whole[0]), "--set", f"reward={json.dumps([entry])}", "--set", "run.steps=4"]
        run, log = [*command, "--output", str(tmp_path / "run")], tmp_path / "run.log"
        pid, give_up = forked(run, log), time.monotonic() + 300
        while not (tmp_path / "waiting").exists():
            assert time.monotonic() < give_up
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(pid, number)
        assert ended(pid, OBEYED, log) == 128 + number, log.read_text()
        assert "Traceback" not in log.read_text()
        assert "Nothing is lost" in log.read_text() or answers == 0
        assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
        good[0] = False
        assert ended(forked([*run, "--resume"], log)) == 0, log.read_text()
        assert ended(forked([*command, "--output", str(tmp_path / "whole")], log)) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole", 4)


# --- real processes, start-up included --------------------------------------------------------------------------------


def process_of(*arguments: object) -> subprocess.Popen:
    """``python -m kltune ...``."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "kltune", *map(str, arguments)], env=env, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )


@pytest.mark.stress
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_while_a_process_starts_ends_it(whole, tmp_path, number, share):
    began = time.monotonic()
    assert process_of("recipe", "check", whole[0]).wait(120) == 0
    seconds = time.monotonic() - began
    process = process_of("ppo", "--recipe", whole[0], "--output", tmp_path / "run")
    time.sleep(seconds * (1.0 + 2.0 * share))       # while it imports torch
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    code = process.returncode
    assert (code if code >= 0 else 128 - code) == 128 + number
    assert (out, "Traceback" in err) == ("", False)
    command = ["ppo", "--recipe", str(whole[0]), "--output", str(tmp_path / "run"), "--resume"]
    assert ended(forked(command, tmp_path / "log")) == 0
    assert_same_run(tmp_path / "run", whole[1], STEPS)


@pytest.mark.stress
@pytest.mark.parametrize("number", [*STOP_SIGNALS, signal.SIGKILL], ids=lambda number: number.name)
def test_a_sweep_takes_its_points_with_it_and_goes_on(whole, tmp_path, number):
    out = tmp_path / "sweep"
    command = ("sweep", "-r", whole[0], "--over", "run.seed=0,1", "--set", "run.steps=400", "-o", out, "-j", 2)
    process, give_up = process_of(*command), time.monotonic() + 300
    while len(list(out.glob("*/metrics.jsonl"))) < 2:
        assert time.monotonic() < give_up
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(120)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    while [pid for pid in map(Path, Path("/proc").glob("[0-9]*")) if str(out).encode() in command_of(pid)]:
        assert time.monotonic() < give_up, "an orphan is left"
        time.sleep(0.05)
    records = [json.loads(path.read_text()) for path in out.glob("*/run.json")]
    assert [record["status"] for record in records] == ["interrupted"] * 2


def command_of(process: Path) -> bytes:
    """The command line of a process of /proc; nothing of one that is gone."""
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("redirect", ["2>/dev/full", *(
    pytest.param(other, marks=pytest.mark.stress) for other in ("2>&-", "2> >(exit)", "2> >(head -c 50 >/dev/null)")
)])
def test_a_whole_run_whose_messages_nobody_takes_prints_one_document(whole, tmp_path, redirect):
    file = write_recipe(tmp_path, PPO, Path(load_recipe(whole[0]).model.path))
    rewards = file.parent / "rewards.py"
    code = rewards.read_text().replace("    return", "    print('scored')\n    return")
    rewards.write_text(f"print('imported')\n{code}")
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "kltune", "ppo", "--recipe", str(file), "--json"]
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirect}', "bash", *command], env=env, capture_output=True, text=True, check=False,
    )
    assert (done.returncode, json.loads(done.stdout)["status"]) == (0, "finished")


@pytest.mark.stress
def test_a_full_disk_under_stdout_is_74_and_the_run_is_finished(whole, tmp_path):
    command = ["ppo", "--recipe", str(whole[0]), "--output", str(tmp_path / "run"), "--json"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kltune", *command], env=env, stdout=full, stderr=subprocess.PIPE, text=True,
            check=False,
        )
    assert done.returncode == 74
    assert "Traceback" not in done.stderr
    assert_same_run(tmp_path / "run", whole[1], STEPS)
