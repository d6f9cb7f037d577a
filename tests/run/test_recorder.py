"""One row per step for programs and for people: the same numbers, and plain text wherever nobody watches."""

import json
import os
import pty
import re
import sys

import pytest
import torch
from killing import exit_code, start

from kltune.errors import StorageError
from kltune.run import loggers
from kltune.run import recorder as report_module
from kltune.run.recorder import Board, Report
from kltune.run.screen import wants_colour

METRICS = {
    "kl/ref_nats_per_response": 5.934, "kl/ref_stderr": 0.114, "kl/ref_nats_per_token": 0.12, "kl/beta": 0.05,
    "score/mean": 1.25, "responses_per_second": 33.3, "kl/step_nats_per_response": None,
}

# what every row of every stage has, whatever the stage measures
UNMEASURED = dict.fromkeys((
    "kl/ref_nats_per_response", "kl/ref_stderr", "kl/ref_nats_per_token", "kl/beta", "kl/step_nats_per_response",
    "score/mean", "time/step_seconds", "time/sample_seconds", "time/update_seconds", "responses_per_second",
))


def rows_of(folder, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch):
    """Importing it takes a second, and none of these tests is about it."""
    monkeypatch.setattr(loggers, "AUTOMATIC", ())


def test_metrics_are_written_as_they_are_measured(tmp_path):
    with Report(tmp_path, "ppo", 2, target=6.0) as report:
        report.step(1, METRICS)
        assert rows_of(tmp_path) == [{"step": 1, **UNMEASURED, **METRICS}]      # without waiting for the end
        report.step(2, {"score/mean": torch.tensor(0.5), "response/tokens": 12})
    assert rows_of(tmp_path)[1] == {"step": 2, **UNMEASURED, "score/mean": 0.5, "response/tokens": 12}


def test_what_is_not_finite_is_null_and_named(tmp_path):
    with Report(tmp_path, "ppo", 1) as report:
        report.step(1, {"score/mean": float("nan"), "kl/beta": float("-inf"), "kl/ref_stderr": 0.1})
    (row,) = rows_of(tmp_path)
    assert row == {"step": 1, **UNMEASURED, "kl/ref_stderr": 0.1, "nonfinite": row["nonfinite"]}
    assert set(row["nonfinite"]) == {"score/mean", "kl/beta"}


def test_samples_keep_their_text(tmp_path):
    row = {"prompt": "é\u2028\n", "response": "\ud800 \x1b[2J", "score": 1.0, "ref_kl": float("inf")}
    with Report(tmp_path, "ppo", 1) as report:
        report.samples(1, [row, {"prompt": "second"}])
    data = (tmp_path / "samples.jsonl").read_bytes().split(b"\n")
    assert json.loads(data[0]) == {"step": 1, **row, "ref_kl": None, "nonfinite": ["ref_kl"]}
    assert json.loads(data[1]) == {"step": 1, "prompt": "second"}


def test_a_line_says_what_people_ask_for(tmp_path, capsys):
    with Report(tmp_path, "ppo", 100, target=6.0) as report:
        report.step(1, METRICS)
    line = capsys.readouterr().err
    assert line.startswith("ppo 1/100  KL 5.93 ± 0.11 of 6 nats/response  score 1.250  beta 0.05  33.3/s  ")
    assert line.endswith(" left\n")


def test_a_target_per_token_is_held_against_the_kl_per_token(tmp_path, capsys):
    with Report(tmp_path, "ppo", 100, target=0.1, unit="nats_per_token") as report:
        report.step(1, METRICS)
    assert "KL 0.12 of 0.1 nats/token" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "shown"), [
    (1.0, [6, 10, 14, 18, 20, 24, 28, 30]),
    (3.0, list(range(6, 31))),       # the next one would come after 6 seconds
])
def test_plain_output_is_first_last_evaluations_and_never_long_silent(tmp_path, capsys, monkeypatch, seconds, shown):
    now = [0.0]
    monkeypatch.setattr(report_module.time, "monotonic", lambda: now[0])
    with Report(tmp_path, "ppo", 30, start_step=5) as report:
        for step in range(6, 31):
            now[0] += seconds
            report.step(step, {"score/mean": 0.0, "eval/score_mean": 1.0 if step == 20 else None})
    captured = capsys.readouterr()
    assert [int(line.split()[1].split("/")[0]) for line in captured.err.splitlines()] == shown
    assert captured.out == ""


def test_plain_output_has_no_ansi_whatever_the_text(tmp_path, capsys):
    with Report(tmp_path, "ppo", 3) as report:
        report.step(1, METRICS)
        report.say("[bold]\x1b[31mred\x1b[0m\r over")
        report.warn("careful")
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert "\r" not in err
    assert "[bold]\\x1b[31mred" in err
    assert "warning: careful\n" in err


def two_steps(folder) -> None:
    with Report(folder, "ppo", 2, target=6.0) as report:
        report.step(1, METRICS)
        report.say("[bold] is text")
        report.step(2, METRICS)


def two_points(_folder) -> None:
    with Board(("point", "step", "KL", "")) as board:
        board.show(lambda: [("[a] kl.target=3", "1/40", "0.5 of 3 nats/response", "score 1.250")])
        board.say("point [b] started")


def on_a_terminal(tmp_path, shows=two_steps, **environment: str) -> str:
    """What is written on stderr when that is a terminal."""
    ours, theirs = pty.openpty()

    def work() -> None:
        for name in ("NO_COLOR", "CI", "TERM"):
            os.environ.pop(name, None)
        os.environ.update({"TERM": "xterm", **environment})
        sys.stderr = os.fdopen(theirs, "w")
        shows(tmp_path)
        sys.stderr.flush()

    pid = start(work)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:      # Linux says so when the other end is closed
            part = b""
        if not part:
            break
        written += part
    os.close(ours)
    assert exit_code(pid) == 0
    return written.decode()


def test_a_terminal_gets_a_live_line(tmp_path):
    written = on_a_terminal(tmp_path)
    assert "\x1b[" in written
    assert "KL 5.93 ± 0.11 of 6 nats/response" in written
    assert "[bold] is text" in written


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"CI": "true"}, {"TERM": "dumb"}])
def test_a_terminal_that_wants_plain_text_gets_it(tmp_path, environment):
    written = on_a_terminal(tmp_path, **environment)
    assert "\x1b" not in written
    assert "KL 5.93" in written


def test_points_that_run_are_a_table_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "TABLE_SECONDS", 0.0)
    written = on_a_terminal(tmp_path, two_points)
    assert "\x1b[" in written
    assert "point [b] started" in written
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    head, row = (next(line for line in plain.splitlines() if word in line) for word in ("step", "[a]"))
    assert row[head.index("step"):].startswith("1/40")
    assert "0.5 of 3 nats/response" in row


@pytest.mark.parametrize(("passed", "lines"), [(3.9, 0), (4.1, 1)])
def test_points_that_run_are_lines_elsewhere(tmp_path, capsys, monkeypatch, passed, lines):
    now = [0.0]
    monkeypatch.setattr(report_module.time, "monotonic", lambda: now[0])
    with Board(("point", "step", "KL", "")) as board:
        now[0] += passed
        for _ in range(3):
            board.show(lambda: [("point 1/2 a", "1/40", "0.5 of 3", "score 1"), ("point 2/2 b", "", "", "\x1b[2J")])
    shown = ["point 1/2 a: step 1/40  KL 0.5 of 3  score 1", "point 2/2 b: \\x1b[2J"]
    assert capsys.readouterr().err.splitlines() == shown * lines


def test_a_pipe_is_never_live(capsys):
    assert not wants_colour(sys.stderr)


def test_a_full_disk_is_named_and_leaves_whole_lines(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with Report(tmp_path, "ppo", 1) as report, pytest.raises(StorageError, match=r"metrics\.jsonl.*No space left"):
        report.step(1, METRICS)


def test_a_line_that_fits_in_part_is_taken_away(tmp_path):
    def fill() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (350, 350))
        with Report(tmp_path, "ppo", 9) as report:
            for step in range(1, 9):
                report.step(step, METRICS)

    assert exit_code(start(fill)) == 74
    assert [row["step"] for row in rows_of(tmp_path)] == [1]
