"""One process of several fails, wherever and of whatever: the run ends with the code of that, and can be resumed."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from kltune.errors import RecipeError
from kltune.recipe import load_recipe
from kltune.run import subprocesses
from kltune.run.checkpoint import latest_checkpoint
from kltune.run.files import read_record
from kltune.run.subprocesses import code_of_all
from kltune.stages.ppo import run_ppo
from tests.driven import CODES, KINDS, PHASES, install
from tests.stages.conftest import PPO, write_recipe
from tests.stages.test_processes import UNEVEN
from tests.stages.test_resume import assert_same_run
from tests.stages.test_signals import ended, forked
from tests.together import codes, together

STEPS = 4
WITHIN = 30.0       # seconds from a fault to the end of all processes
AFTER = {"sampling": 8, "update": 12, "save": 2, "evaluation": 0}       # times that one of two has passed each phase
DOING = {"sampling": "sampling", "update": "updating in step", "save": "saving step", "evaluation": "evaluating"}
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


def named(kind: str, phase: str, rank: int) -> list[str]:
    """What is said of who failed, and in the middle of what."""
    if kind.startswith("SIG"):
        return [f"{kind} to process 1 of 2" if rank else f"{kind}: finishing this step", "stopped: after step"]
    if kind == "killed":
        return [f"process {rank} of 2 was killed by SIGKILL", f"process {rank} of 2 ended while {DOING[phase]}"]
    if kind == "exception":
        return [f"process 1 of 2 failed while {DOING[phase]}"] if rank else ["LookupError: an odd one"]
    if kind == "NaN" and phase in ("sampling", "evaluation"):
        return ["not finite"]       # of what all have gathered
    return [f"process {rank} of 2, while {DOING[phase]}"]


class Forked:
    """A child of the launcher as a fork, where all that takes seconds is imported already; as Popen has it."""

    def __init__(self, arguments, *, env, preexec_fn, log: Path, fault: dict, **_streams):
        def become() -> None:
            os.setsid()
            preexec_fn()
            os.environ.update(env)
            install(fault)

        self.pid, self.returncode = forked(list(arguments[3:]), log, become), None

    def poll(self) -> int | None:
        if self.returncode is None:
            ended_one, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended_one else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def launched(arguments: list[str], log: Path, fault: dict) -> int:
    """``kltune ... --processes 2`` as a fork whose children are forks; its process id."""
    def prepare() -> None:
        subprocesses.subprocess.Popen = partial(Forked, log=log, fault=fault)

    return forked([*arguments, "--processes", "2"], log, prepare)


@pytest.mark.parametrize(("kind", "phase", "rank"), [
    pytest.param(*death, marks=() if death in SLICE else pytest.mark.stress) for death in MATRIX
])
def test_a_process_that_fails_ends_all_of_them(whole, tmp_path, record_property, kind, phase, rank):
    file, unbroken = whole
    output, log, now = tmp_path / "run", tmp_path / "log", tmp_path / "now"
    fault = {"kind": kind, "phase": phase, "rank": rank, "after": AFTER[phase], "flag": str(now)}
    pid = launched(["ppo", "--recipe", str(file), "--output", str(output)], log, fault)
    code, took = ended(pid, 300.0, log), time.time() - now.stat().st_mtime
    said = log.read_text()
    assert code == CODES[kind], said
    assert took < WITHIN, said
    assert said.count("Traceback") == (kind == "exception"), said
    for words in named(kind, phase, rank):
        assert words in said, said
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
