"""Commands as processes: as many at a time as allowed, logs, exit codes, and signals that reach them once."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from kltune.run.subprocesses import (
    STOP_SIGNALS,
    Command,
    last_lines,
    on_stop_signals,
    run_commands,
    signal_of_parents_death,
    tell_at_once,
    thread_share,
)
from tests.run.killing import exit_code, start


class Watch:
    """What happened, in order."""

    def __init__(self):
        self.events, self.codes, self.now, self.most = [], {}, 0, 0

    def started(self, command):
        self.now += 1
        self.most = max(self.most, self.now)
        self.events.append(f"+{command.name}")

    def ended(self, command, code, seconds):
        self.now -= 1
        self.codes[command.name] = code
        self.events.append(f"-{command.name}")


@pytest.fixture
def run(tmp_path):
    """Run Python lines by name; what was seen of them, and the signal that ended it."""

    def run(jobs=1, **lines):
        watch = Watch()
        commands = [
            Command(name, (sys.executable, "-S", "-c", line), tmp_path / f"{name}.log") for name, line in lines.items()
        ]
        number = run_commands(commands, jobs, environment=os.environ, started=watch.started, ended=watch.ended)
        return watch, number

    return run


def test_one_after_the_other_each_with_its_exit_code_and_log(run, tmp_path):
    watch, number = run(
        a="print('said'); raise SystemExit(5)", b="import os; os.kill(os.getpid(), 9)", c="print('fine')"
    )
    assert number is None
    assert watch.events == ["+a", "-a", "+b", "-b", "+c", "-c"]
    assert watch.codes == {"a": 5, "b": 137, "c": 0}
    assert (tmp_path / "a.log").read_text() == "said\n"


def test_as_many_at_a_time_as_jobs(run):
    watch, _ = run(jobs=2, **dict.fromkeys("abcd", "import time; time.sleep(0.15)"))
    assert watch.most == 2
    assert set(watch.codes.values()) == {0}


def test_a_log_is_added_to(run, tmp_path):
    run(a="print('first')")
    run(a="import sys; print('second', file=sys.stderr)")
    assert last_lines(tmp_path / "a.log", 5) == ["first", "second"]
    assert last_lines(tmp_path / "a.log", 5, after=6) == ["second"]
    assert last_lines(tmp_path / "none.log", 5) == []


CAREFUL = """
import signal, sys, time
count = []
signal.signal(signal.{name}, lambda *_: count.append(1))
print('ready', flush=True)
while not count: time.sleep(0.01)
time.sleep(0.2)
print('times', len(count), flush=True)
sys.exit(128 + signal.{name})
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_is_handed_on_once_and_nothing_more_starts(run, tmp_path, name):
    number = getattr(signal, name)

    def interrupt():
        while "ready" not in (log.read_text() if (log := tmp_path / "a.log").exists() else ""):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=interrupt)
    thread.start()
    watch, received = run(a=CAREFUL.format(name=name), b="print('never')")
    thread.join()
    assert received == number
    assert watch.events == ["+a", "-a"]
    assert watch.codes == {"a": 128 + number}
    assert "times 1" in (tmp_path / "a.log").read_text()
    assert signal.getsignal(number) == before


SLEEPING = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


@pytest.mark.parametrize("number", [*STOP_SIGNALS, signal.SIGKILL])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells children that their parent died")
def test_no_child_outlives_whoever_runs_it(tmp_path, number):
    commands = [Command(name, (sys.executable, "-S", "-c", SLEEPING), tmp_path / f"{name}.log") for name in "ab"]

    def work():
        run_commands(commands, 2, environment=os.environ, started=lambda _: None, ended=lambda *_: None)

    def lines() -> list[str]:
        return [line for command in commands for line in last_lines(command.log, 1)]

    pid, give_up = start(work), time.monotonic() + 60
    while len(lines()) < 2:
        assert time.monotonic() < give_up
        time.sleep(0.01)
    os.kill(pid, number)
    exit_code(pid)
    while any(Path(f"/proc/{child}").exists() for child in lines()):
        assert time.monotonic() < give_up, "a child is left"
        time.sleep(0.01)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells children that their parent died")
def test_of_a_parent_with_threads_the_death_is_heard_once():
    # On a busy machine more threads may die before the handler has run; a run takes those for one signal.
    assert sum(deaths_heard() == 1 for _ in range(5)) >= 3


def deaths_heard() -> int:
    """How often a process hears that its parent, of nine threads, died, if it wants no more after the first."""
    reading, writing = os.pipe()

    def child() -> None:
        heard = []

        def hear(number, _frame):
            heard.append(number)
            signal_of_parents_death(0)

        signal.signal(signal.SIGTERM, hear)
        signal_of_parents_death(signal.SIGTERM)
        os.write(writing, b"+")
        deadline = time.monotonic() + 20
        while not heard and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        os.write(writing, str(len(heard)).encode())

    def parent() -> None:
        start(child)
        for _ in range(8):
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        time.sleep(60)

    pid = start(parent)
    assert os.read(reading, 1) == b"+"
    time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    exit_code(pid)
    return int(os.read(reading, 1))


def test_a_hang_up_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)      # as by nohup
    try:
        with on_stop_signals(lambda *_: pytest.fail("heard of it")):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stderr_that_is_gone_is_no_error_where_a_signal_is_handled(tmp_path):
    def say():
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 2)
        tell_at_once("SIGTERM: saving\n")

    assert exit_code(start(say)) == 0


def test_where_something_goes_wrong_here_no_child_is_left(tmp_path):
    class Full(OSError):
        pass

    def started(command):
        if command.name == "b":
            raise Full

    line = "import signal, time; time.sleep(60)"
    commands = [Command(name, (sys.executable, "-S", "-c", line), tmp_path / f"{name}.log") for name in "ab"]
    began = time.monotonic()
    with pytest.raises(Full):
        run_commands(commands, 2, environment=os.environ, started=started, ended=lambda *_: None)
    assert time.monotonic() - began < 10      # the first was asked to stop, and waited for


def test_processes_side_by_side_share_the_cores(monkeypatch):
    monkeypatch.setattr("kltune.run.subprocesses.allowed_cores", lambda: 8)
    assert thread_share({"A": "1"}, 3) == {"A": "1", "OMP_NUM_THREADS": "2"}
    assert thread_share({}, 20) == {"OMP_NUM_THREADS": "1"}
    assert thread_share({}, 1) == {}
    assert thread_share({"OMP_NUM_THREADS": "6"}, 2) == {"OMP_NUM_THREADS": "6"}
