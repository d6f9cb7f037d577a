"""One process of several fails, wherever and of whatever: the run ends with the code of that, and can be resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kltune.errors import RecipeError
from kltune.recipe import load_recipe
from kltune.run.checkpoint import latest_checkpoint
from kltune.run.files import read_record
from kltune.run.subprocesses import code_of_all
from kltune.stages.ppo import run_ppo
from tests.driven import CODES, KINDS, PHASES
from tests.stages.conftest import PPO, write_recipe
from tests.stages.test_processes import UNEVEN
from tests.stages.test_resume import assert_same_run
from tests.stages.test_signals import command_of, ended
from tests.together import codes, together

ROOT = Path(__file__).parents[2]
STEPS = 4
WITHIN = 30.0       # seconds from a fault to the end of all processes
AFTER = {"sampling": 8, "update": 12, "save": 2, "evaluation": 0}       # times that one of two has passed each phase
MATRIX = [(kind, phase, rank) for kind in KINDS for phase in PHASES for rank in (0, 1)]
SLICE = {("SIGTERM", "update", 1), ("killed", "sampling", 1), ("killed", "save", 0), ("exception", "evaluation", 1),
         ("NaN", "save", 1), ("full disk", "save", 0)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, llama):
    """A recipe, and the folder of its run by one process that nothing stopped."""
    base = PPO | {"run": {"steps": STEPS, "save_every": 1, "eval_every": 2}}
    file = write_recipe(tmp_path_factory.mktemp("processes"), base, llama, UNEVEN)
    unbroken = file.parent / "whole"
    assert codes(together(1, ["ppo", "--recipe", str(file), "--output", str(unbroken)], file.parent / "log")) == [0]
    return file, unbroken


def assert_goes_on(file: Path, unbroken: Path, output: Path) -> None:
    """What is left of a run is whole, and one process makes the rest of it."""
    assert latest_checkpoint(output) is not None
    assert read_record(output)["status"] != "finished"
    log = output.with_suffix(".again")
    assert codes(together(1, ["ppo", "--recipe", str(file), "--output", str(output), "--resume"], log)) == [0]
    assert_same_run(output, unbroken, STEPS)


@pytest.mark.parametrize(("kind", "phase", "rank"), [
    pytest.param(*death, marks=() if death in SLICE else pytest.mark.stress) for death in MATRIX
])
def test_a_process_that_fails_ends_all_of_them(whole, tmp_path, record_property, kind, phase, rank):
    file, unbroken = whole
    fault = {"kind": kind, "phase": phase, "rank": rank, "after": AFTER[phase]}
    output = tmp_path / "run"
    pids = together(2, ["ppo", "--recipe", str(file), "--output", str(output)], output.with_suffix(".log"), fault)
    found = codes(pids, WITHIN + 60.0)
    log = "".join(path.read_text() for path in sorted(tmp_path.glob("run.[01]")))
    other = 75 if kind in ("killed", "exception") else CODES[kind]
    assert (found[rank], found[1 - rank]) == (CODES[kind], other), log
    assert log.count("Traceback") == (kind == "exception"), log
    assert code_of_all(found) == CODES[kind]
    record_property("deaths of a process", 1)
    assert_goes_on(file, unbroken, output)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_hangs_is_named_after_the_timeout(whole, tmp_path, rank):
    fault = {"kind": "hangs", "phase": "evaluation", "rank": rank, "after": 0}
    pids = together(
        2, ["ppo", "--recipe", str(whole[0]), "--output", str(tmp_path / "run"), "--set", "run.timeout_s=3"],
        tmp_path / "log", fault,
    )
    assert ended(pids[1 - rank], 60) == 75
    os.kill(pids[rank], signal.SIGKILL)
    ended(pids[rank])
    said = (tmp_path / f"log.{1 - rank}").read_text()
    assert f"process {rank} of 2 did not come within 3 s (run.timeout_s) while evaluating" in said


# --- real processes, started by one command ---------------------------------------------------------------------------


def started(file: Path, output: Path, fault: dict | None = None, *more: str) -> subprocess.Popen:
    """``kltune ppo --processes 2``, whose processes share small batches and may fail."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.driven", "ppo", "--recipe", file, "--output", output, "--processes", "2"]
    return subprocess.Popen(
        [*map(str, command), *more], env=environment | {"FAULT": json.dumps(fault)}, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


def of_run(output: Path, but: int | None = None) -> list[int]:
    """The processes that were started to write a folder."""
    ids = [int(path.name) for path in Path("/proc").glob("[0-9]*") if str(output).encode() in command_of(path)]
    return [pid for pid in ids if pid != but]


def wait_for(output: Path, process: subprocess.Popen) -> None:
    """Until a run has saved its first checkpoint."""
    give_up = time.monotonic() + 300
    while not list(output.glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.05)


def assert_all_end(process: subprocess.Popen, output: Path, code: int) -> str:
    """All processes end in time, with a code; what they said."""
    out, err = process.communicate(timeout=WITHIN)
    returned = process.returncode
    assert (returned if returned >= 0 else 128 - returned, out) == (code, ""), err
    assert of_run(output) == []
    return err


@pytest.mark.parametrize("number", [
    signal.SIGTERM, *(pytest.param(other, marks=pytest.mark.stress) for other in (signal.SIGINT, signal.SIGKILL)),
])
def test_a_signal_to_the_one_that_started_them_reaches_all(whole, tmp_path, number):
    output = tmp_path / "run"
    process = started(whole[0], output, None, "--set", "run.steps=400")
    wait_for(output, process)
    process.send_signal(number)
    if number == signal.SIGKILL:
        process.wait(WITHIN)
        give_up = time.monotonic() + WITHIN
        while of_run(output):
            assert time.monotonic() < give_up, "an orphan is left"
            time.sleep(0.05)
        assert read_record(output)["status"] == "interrupted"
        return
    err = assert_all_end(process, output, 128 + number)
    assert err.count(f"{number.name}: finishing this step") == 1
    assert err.count("kltune: stopped:") == 1


@pytest.mark.stress
@pytest.mark.parametrize(("kind", "phase", "rank"), [
    (kind, PHASES[(place + rank) % 4], rank) for place, kind in enumerate(KINDS) for rank in (0, 1)
])
def test_who_started_them_ends_with_the_code_of_who_failed(whole, tmp_path, record_property, kind, phase, rank):
    file, unbroken = whole
    output = tmp_path / "run"
    process = started(file, output, {"kind": kind, "phase": phase, "rank": rank, "after": AFTER[phase]})
    wait_for(output, process)
    err = assert_all_end(process, output, CODES[kind])
    assert err.count("Traceback") == (kind == "exception"), err
    record_property("deaths of a process", 1)
    assert_goes_on(file, unbroken, output)


@pytest.mark.stress
def test_torchrun_starts_them_as_well(whole, tmp_path):
    output = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "tests.driven", "ppo", "--recipe", whole[0], "--output", output, "--json"]
    done = subprocess.run([*map(str, command)], env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "finished"
    assert_same_run(output, whole[1], STEPS)


def test_more_processes_than_the_recipe_says_are_refused(whole, tmp_path):
    pids = together(2, ["ppo", "--recipe", str(whole[0]), "--output", str(tmp_path / "run"), "--set",
                        "run.processes=3"], tmp_path / "log")
    assert codes(pids) == [2, 2]
    assert "found 3, but 2 processes were started" in (tmp_path / "log.0").read_text()


def test_a_program_that_is_one_process_refuses_to_be_several(whole, tmp_path):
    recipe = load_recipe(whole[0], ["run.processes=2"], output=str(tmp_path / "run"))
    with pytest.raises(RecipeError, match=r"run\.processes: found 2 in a program that is one process"):
        run_ppo(recipe, resume=False)


def test_the_code_of_all_is_that_of_who_failed_first_and_not_of_who_only_lost_another():
    assert [code_of_all(codes) for codes in ([0, 0], [75, 137], [75, 75], [1, 75], [0, 74, 75], [143, 143])] == [
        0, 137, 75, 1, 74, 143]
