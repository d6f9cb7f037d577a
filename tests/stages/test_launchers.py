"""Real processes, by ``--processes 2`` and by torchrun: whatever happens to which, all end in time, with its code."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kltune.run.files import read_record
from tests.driven import CODES
from tests.stages.test_processes_failing import AFTER, MATRIX, STEPS, WITHIN, assert_goes_on, named, whole  # noqa: F401
from tests.stages.test_resume import assert_same_run
from tests.stages.test_signals import command_of

ROOT = Path(__file__).parents[2]
OWN, TORCHRUN = "--processes", "torchrun"
STARTS = {
    OWN: ("-m", "tests.driven", "ppo", "--processes", "2"),
    TORCHRUN: ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.driven", "ppo"),
}
# torchrun waits for 30 s before it kills who does not end, and ends with 1 itself, whatever it was.
LIMIT = {OWN: WITHIN, TORCHRUN: 45.0}
RAISING = '''
calls = []

def score(prompts, responses):
    calls.append(None)
    if len(calls) > 5:
        raise KeyError("odd")
    return [float(response.count("a")) for response in responses]
'''
BOTH = pytest.mark.parametrize("launcher", STARTS)


def started(launcher: str, file: Path, output: Path, fault: dict | None = None, *more: str) -> subprocess.Popen:
    """``kltune ppo`` as two processes, which share small batches and may fail."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *STARTS[launcher], "--recipe", str(file), "--output", str(output), *more]
    return subprocess.Popen(
        command, env=environment | {"FAULT": json.dumps(fault)}, cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


def of_run(output: Path) -> list[int]:
    """The processes that were started to write a folder."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if str(output).encode() in command_of(path)]


def rank_of(pid: int) -> int | None:
    """The rank of a process; None of one that has none."""
    given = dict(pair.partition(b"=")[::2] for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return int(given[b"RANK"]) if b"RANK" in given else None


def wait_for(output: Path, process: subprocess.Popen, pattern: str = "checkpoints/step-*") -> None:
    """Until a run has saved its first checkpoint, or there is another file of it."""
    give_up = time.monotonic() + 300
    while not list(output.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.05)


def assert_all_end(launcher: str, process: subprocess.Popen, output: Path, code: int) -> str:
    """All processes end in time, with a code; what they said."""
    out, err = process.communicate(timeout=LIMIT[launcher])
    returned = process.returncode
    wanted = code if launcher == OWN else 1
    assert (returned if returned >= 0 else 128 - returned, out) == (wanted, ""), err
    assert of_run(output) == []
    return err


@pytest.mark.stress
@pytest.mark.parametrize(("kind", "phase", "rank"), MATRIX)
def test_who_fails_is_named_and_decides_the_code(whole, tmp_path, record_property, kind, phase, rank):  # noqa: F811
    output, now = tmp_path / "run", tmp_path / "now"
    fault = {"kind": kind, "phase": phase, "rank": rank, "after": AFTER[phase], "flag": str(now)}
    process = started(OWN, whole[0], output, fault)
    wait_for(tmp_path, process, "now")
    err = assert_all_end(OWN, process, output, CODES[kind])
    assert err.count("Traceback") == (kind == "exception"), err
    assert all(words in err for words in named(kind, phase, rank)), err
    record_property("deaths of a process", 1)
    assert_goes_on(*whole, output)


@pytest.mark.parametrize(("launcher", "number"), [
    (OWN, signal.SIGTERM), *(pytest.param(launcher, number, marks=pytest.mark.stress) for launcher, number in (
        (OWN, signal.SIGINT), (TORCHRUN, signal.SIGTERM), (TORCHRUN, signal.SIGINT))),
])
def test_a_signal_to_the_group_of_who_started_them_saves_and_ends_all(whole, tmp_path, launcher, number):  # noqa: F811
    output = tmp_path / "run"
    process = started(launcher, whole[0], output, None, "--set", "run.steps=400")
    wait_for(output, process)
    os.killpg(process.pid, number)      # as Ctrl-C does
    err = assert_all_end(launcher, process, output, 128 + number)
    assert err.count(f"{number.name}: finishing this step") == 1
    assert err.count("kltune: stopped:") == 1
    assert read_record(output)["status"] == "interrupted"


@pytest.mark.stress
@BOTH
def test_no_process_outlives_who_started_it(whole, tmp_path, launcher):  # noqa: F811
    output = tmp_path / "run"
    process = started(launcher, whole[0], output, None, "--set", "run.steps=400")
    wait_for(output, process)
    process.kill()
    process.wait(WITHIN)
    give_up = time.monotonic() + WITHIN
    while of_run(output):
        assert time.monotonic() < give_up, "an orphan is left"
        time.sleep(0.05)
    assert read_record(output)["status"] == "interrupted"


@pytest.mark.stress
@BOTH
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_stopped_ends_the_run_after_the_timeout(whole, tmp_path, launcher, rank):  # noqa: F811
    output = tmp_path / "run"
    more = ("--set", "run.steps=400", "--set", "run.timeout_s=3")
    process = started(launcher, whole[0], output, None, *more)
    wait_for(output, process)
    (stopped,) = [pid for pid in of_run(output) if rank_of(pid) == rank]
    os.kill(stopped, signal.SIGSTOP)
    err = assert_all_end(launcher, process, output, 75)
    assert f"process {rank} of 2 did not come within 3 s (run.timeout_s) while " in err
    assert ("did not end within 12 s" in err) == (launcher == OWN)


@pytest.mark.stress
@BOTH
@pytest.mark.parametrize(("kind", "phase", "rank"), [("memory", "sampling", 1), ("memory", "save", 0)])
def test_memory_that_runs_out_in_one_process_is_74(whole, tmp_path, launcher, kind, phase, rank):  # noqa: F811
    output = tmp_path / "run"
    fault = {"kind": kind, "phase": phase, "rank": rank, "after": AFTER[phase], "flag": str(tmp_path / "now")}
    process = started(launcher, whole[0], output, fault)
    wait_for(tmp_path, process, "now")
    err = assert_all_end(launcher, process, output, 74)
    assert f"process {rank} of 2, while " in err
    assert "memory ran out" in err
    assert_goes_on(*whole, output)


@pytest.mark.stress
@BOTH
def test_a_reward_function_that_raises_is_5(whole, tmp_path, launcher):  # noqa: F811
    (whole[0].parent / "raising.py").write_text(RAISING)
    output, reward = tmp_path / "run", json.dumps([{"kind": "function", "path": "raising.py:score"}])
    process = started(launcher, whole[0], output, None, "--set", f"reward={reward}")
    wait_for(output, process)
    err = assert_all_end(launcher, process, output, 5)
    assert "KeyError" in err
    assert "--resume goes on after step" in err


@pytest.mark.stress
@pytest.mark.parametrize(("kind", "rank", "code"), [("killed", 1, "-9"), ("NaN", 0, "6"), ("exception", 1, "1|75")])
def test_torchrun_names_the_code_of_who_failed(whole, tmp_path, kind, rank, code):  # noqa: F811
    output, now = tmp_path / "run", tmp_path / "now"
    fault = {"kind": kind, "phase": "update", "rank": rank, "after": AFTER["update"], "flag": str(now)}
    process = started(TORCHRUN, whole[0], output, fault)
    wait_for(tmp_path, process, "now")
    err = assert_all_end(TORCHRUN, process, output, 1)
    # torchrun tells of whoever ends first, which may be one that has heard of the error.
    assert re.search(rf"exitcode  : ({code}) +\(pid", err.partition("Root Cause")[2])
    assert_goes_on(*whole, output)


@pytest.mark.stress
def test_torchrun_starts_them_as_well(whole, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    process = started(TORCHRUN, whole[0], output, None, "--json")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out)["status"] == "finished"
    assert_same_run(output, whole[1], STEPS)
