"""``kltune sweep`` on the tiny model: stopped in the middle it goes on, and no point can lose another.

A point is a process of its own; here it is a fork of this one, where all that takes seconds is imported already.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from kltune.cli import main
from kltune.report.outcome import final_figures
from kltune.run import recorder
from kltune.run import subprocesses as children
from kltune.stages.sweeps import sweep as sweep_stage
from tests.run.killing import exit_code, start
from tests.stages.conftest import PPO, write_recipe


class Forked:
    """``subprocess.Popen`` of a ``python -m kltune`` command, as far as a sweep uses it."""

    def __init__(self, arguments, *, stdin, stdout, stderr, env, start_new_session, preexec_fn):
        # preexec_fn, which asks to be stopped with the parent, is left out: elsewhere than on Linux there is none.
        assert arguments[:3] == (sys.executable, "-m", "kltune")
        assert (stdin, stderr, start_new_session) == (subprocess.DEVNULL, subprocess.STDOUT, True)
        self.returncode = None
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        for link in Path("/proc/self/fd").glob("*"):      # as close_fds does: the sweep's lock is not its children's
            if link.is_symlink() and os.readlink(link).endswith(".lock"):
                os.close(int(link.name))
        os.dup2(stdout.fileno(), 1)
        os.dup2(stdout.fileno(), 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
        for number in children.STOP_SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        torch.set_num_threads(1)      # the threads of before the fork are not here
        code = 99
        try:
            main(list(arguments[3:]))
        except SystemExit as left:
            code = left.code or 0
        finally:
            sys.stdout.flush()
            os._exit(code)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


@pytest.fixture(autouse=True)
def _forked(monkeypatch, run_folder):
    """``run_folder`` is a run of this process: whatever a run imports when it needs it is here before the forks."""
    monkeypatch.setattr(children.subprocess, "Popen", Forked)
    monkeypatch.setattr(children, "POLL_SECONDS", 0.01)


@pytest.fixture
def recipe(tmp_path, llama) -> Path:
    return write_recipe(tmp_path / "recipe", PPO | {"run": {"steps": 2, "save_every": 1, "eval_every": 100}}, llama)


@pytest.fixture
def sweep(command, recipe, tmp_path):
    return partial(command, "sweep", "-r", recipe, "-o", tmp_path / "out")


SIX = ("--over", "kl.target=0.3,0.6,1.2", "--over", "run.seed=0,1")


def statuses(folder: Path) -> list[str]:
    file = folder / "sweep.json"
    return [row["status"] for row in json.loads(file.read_text())["points"]] if file.exists() else []


@pytest.mark.parametrize("number", [signal.SIGTERM, *(
    pytest.param(other, marks=pytest.mark.stress) for other in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
)])
def test_a_sweep_killed_in_the_middle_goes_on_and_finishes(sweep, recipe, tmp_path, number):
    out = tmp_path / "out"
    command = ["sweep", "-r", str(recipe), "-o", str(out), *SIX]
    pid = start(lambda: leave(command))
    while statuses(out).count("finished") < 1:
        time.sleep(0.02)
    os.kill(pid, number)
    assert exit_code(pid) == 128 + number
    stopped = statuses(out)
    assert 1 <= stopped.count("finished") < 6
    assert set(stopped) <= {"finished", "interrupted", "pending"}
    before = {path: path.read_bytes() for path in out.glob("*/result.json")}

    code, document, err = sweep(*SIX)
    assert code == 0
    assert statuses(out) == ["finished"] * 6
    assert err.count("finished already") == len(before)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert document == json.loads((out / "sweep.json").read_text())
    first = document["points"][0]
    assert first["overrides"] == {"kl.target": "0.3", "run.seed": "0"}
    result = json.loads((out / "kl.target=0.3,run.seed=0" / "result.json").read_text())
    assert (first["kl"], first["score"]) == (result["kl"]["nats_per_response"], result["score"])
    assert [first["kl_ci95"], first["seconds"], first["exit_code"]] == [result["kl"]["ci95"], result["seconds"], 0]


def test_a_sweep_does_not_go_on_with_other_rows(sweep, recipe, tmp_path):
    assert sweep("--over", "run.seed=0")[0] == 0
    rows = recipe.parent / "prompts.jsonl"
    rows.write_text(rows.read_text() + '{"prompt": "one more"}\n')
    code, _, err = sweep("--over", "run.seed=0,1")
    assert code == 5
    assert f"data.prompts: {rows} has changed" in err
    assert not (tmp_path / "out" / "run.seed=1").exists()


def test_points_that_outlive_a_killed_sweep_are_waited_for(sweep, recipe, tmp_path):
    out = tmp_path / "out"
    over = ("--over", "run.seed=0,1", "-s", "run.steps=8")
    pid = start(lambda: leave(["sweep", "-r", str(recipe), "-o", str(out), *over]))
    while not (out / "run.seed=0" / "run.json").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -signal.SIGKILL
    code, document, err = sweep(*over)
    assert code == 0
    assert "point 1/2 run.seed=0: still runs for a sweep that was killed; waiting for it" in err
    assert [row["status"] for row in document["points"]] == ["finished", "finished"]


def leave(command: list[str]) -> None:
    """Run a command in a forked process, which ends with its code."""
    try:
        main(command)
    except SystemExit as left:
        os._exit(left.code or 0)


FLAKY = """
import os
from pathlib import Path

def flaky(prompts, responses):
    if Path(__file__).with_name("broken").exists():
        raise FileExistsError("broken")
    return score(prompts, responses)

def kill(prompts, responses):
    os.kill(os.getpid(), 9)
"""


def test_a_point_that_fails_is_reported_and_not_fatal(sweep, recipe, tmp_path):
    rewards, broken = recipe.parent / "rewards.py", recipe.parent / "broken"
    rewards.write_text(rewards.read_text() + FLAKY)
    broken.touch()
    key = "reward.0.path="
    code, document, err = sweep("--over", f"{key}rewards.py:flaky,rewards.py:kill,rewards.py:score")
    assert code == 137      # the worst
    assert [row["status"] for row in document["points"]] == ["failed", "failed", "finished"]
    assert [row["exit_code"] for row in document["points"]] == [5, 137, 0]
    failed = document["points"][0]
    assert failed["exit_code"] == 5
    assert "FileExistsError: broken" in failed["error"][-1]
    assert "FileExistsError: broken" in Path(failed["log"]).read_text()
    assert "failed with exit code 5; the end of" in err
    assert (document["finished"], document["failed"]) == (1, 2)
    # put right, it is tried again, and the other is not
    broken.unlink()
    code, document, err = sweep("--over", f"{key}rewards.py:flaky,rewards.py:score")
    assert (code, document["points"][0]["error"]) == (0, [])
    assert document["points"][2]["status"] == "failed"      # of the grid before, and not of this one
    assert "tried again" in err
    assert "finished already" in err


@pytest.mark.parametrize(("codes", "worst"), [
    ([0, 0], 0), ([5, 0], 5), ([75, 2, 5, 6, 74, 1], 1), ([75, 2], 2), ([1, 139, 137], 139), ([130, 75], 75),
    ([None], 1),
])
def test_the_exit_code_is_that_of_the_worst(codes, worst):
    rows = [{"status": "finished" if code == 0 else "failed", "exit_code": code} for code in codes]
    assert sweep_stage.worst_code(rows) == worst


def test_a_grid_may_grow_and_a_recipe_may_not_change(sweep, tmp_path):
    assert sweep("--over", "kl.target=0.3")[0] == 0
    code, document, err = sweep("--over", "kl.target=0.3,0.6", as_json=False)
    assert code == 0
    assert "point 1/2 kl.target=0.3: finished already: KL" in err
    assert "2 of 2 points are finished" in document
    assert "kl.target=0.6  finished" in document
    # another axis: what was swept before stays in the list
    code, document, _ = sweep("--over", "run.seed=1", "-s", "kl.target=0.3")
    assert code == 0
    assert [row["name"] for row in document["points"]] == ["run.seed=1", "kl.target=0.3", "kl.target=0.6"]
    code, out, err = sweep("--over", "kl.target=0.3,0.6", "-s", "optim.lr=0.5")
    assert (code, out) == (2, "")
    assert "optim.lr: was 0.02, now 0.5" in err


def test_another_recipe_is_refused_before_anything_runs(sweep, recipe, tmp_path):
    assert sweep("--over", "kl.target=0.3")[0] == 0
    recipe.write_text(recipe.read_text().replace("lr: 0.02", "lr: 0.03"))
    before = (tmp_path / "out" / "sweep.json").read_bytes()
    code, _, err = sweep("--over", "kl.target=0.6")
    assert code == 2
    assert "optim.lr: was 0.02, now 0.03" in err
    assert (tmp_path / "out" / "sweep.json").read_bytes() == before
    assert not (tmp_path / "out" / "kl.target=0.6").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(sweep, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    code, _, err = sweep("--over", "kl.target=0.3")
    assert code == 2
    assert "is no kltune sweep (it holds notes.txt)" in err


def test_two_sweeps_in_one_folder(sweep, tmp_path):
    from kltune.run.files import locked

    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        assert sweep("--over", "kl.target=0.3")[0] == 75


def test_points_that_run_show_how_far_they_are(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "SILENCE_SECONDS", 0.0)
    code, _, err = sweep("--over", "kl.target=0.3,0.6", "--jobs", "2")
    assert code == 0
    for number, target in enumerate(("0.3", "0.6"), start=1):
        name = f"point {number}/2 kl.target={target}"
        assert f"{name}: started; its log is {tmp_path}/out/kl.target={target}.log\n" in err
        steps = re.findall(rf"^{name}: step (\d)/2  KL \S+ ± \S+ of {target} nats/response  score \S+ .*$", err, re.M)
        assert {*steps} <= {"1", "2"}
        assert steps
        assert f"{name}: starting\n" in err       # before it has said anything


def test_a_row_that_is_still_being_written_is_not_read(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert sweep_stage.newest_row(metrics) is None
    metrics.write_text('{"step": 1}\n' * 9000 + '{"step": 2}\n{"step": 3')
    assert sweep_stage.newest_row(metrics) == {"step": 2}
    metrics.write_text('{"ste')
    assert sweep_stage.newest_row(metrics) is None


def test_side_by_side_is_the_same_as_one_after_the_other(sweep, tmp_path):
    code, document, _ = sweep("--over", "kl.target=0.3,0.6", "--jobs", "2")
    assert code == 0
    assert [row["status"] for row in document["points"]] == ["finished", "finished"]
    alone = json.loads((tmp_path / "out" / "kl.target=0.3" / "result.json").read_text())
    assert document["points"][0]["kl"] == alone["kl"]["nats_per_response"]


def test_a_sweep_of_reward_models_shows_how_often_each_is_right():
    measured = {"eval/accuracy": 0.9996, "eval/accuracy_low": 0.9975, "eval/accuracy_high": 0.99999,
                "eval/score_mean": -0.1, "eval/score_stderr": 0.02}
    results = {"a": {"eval": measured, "score": -0.1, "seconds": 2.0}, "b": {}}
    rows = [
        {"name": name, "status": "finished" if result else "failed", "exit_code": 0 if result else 5, "folder": name,
         **final_figures(result), **sweep_stage.accuracy_of(result), "seconds": result.get("seconds")}
        for name, result in results.items()
    ]
    told = sweep_stage.sweep_text({"points": rows, "stage": "reward", "finished": 1, "output": "o"}).splitlines()
    assert [line.split() for line in told[:3]] == [
        ["point", "status", "accuracy", "time"],
        ["a", "finished", "0.9996", "(95", "%:", "0.99750", "to", "0.99999)", "2", "s"],
        ["b", "failed", "(5)", "–", "–"],
    ]
    assert told[3:] == ["1 of 2 points are finished: o/sweep.json"]      # no frontier: there is no KL
    assert sweep_stage.figures_text(rows[0]).startswith("accuracy 0.9996 (95 %: ")
