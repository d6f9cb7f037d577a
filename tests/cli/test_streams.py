"""A result has stdout to itself whatever prints, and nothing that happens to stderr ends a command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kltune import __version__
from kltune.cli.streams import result_stream, results_alone
from tests.conftest import RECIPE

ROOT = Path(__file__).parents[2]
# As a command does it, without one: to import torch takes longer than all of this.
NOISY = """
import os, subprocess, sys, threading
from kltune.cli.output import emit_json
from kltune.cli.streams import guard_streams, results_alone
guard_streams()
with results_alone():
    print("noise")
    sys.stdout.write("noise\\n")
    if not int(sys.argv[1]):        # past Python's own stream, and so as full as what is behind it
        sys.__stdout__.write("noise\\n")
        os.write(1, b"noise\\n")
    os.system("echo noise")
    subprocess.run(["echo", "noise"])
    thread = threading.Thread(target=print, args=("noise",))
    thread.start()
    thread.join()
    for _ in range(int(sys.argv[1])):
        print("message", file=sys.stderr, flush=True)
    emit_json({"score": 1.5})
print("help", flush=True)
"""


def run_noisy(messages: int = 0, redirect: str = "") -> subprocess.CompletedProcess:
    """The script above under a shell that redirects its streams."""
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirect}', "bash", sys.executable, "-c", NOISY, str(messages)], cwd=ROOT,
        capture_output=True, text=True, timeout=120, check=False,
    )


def test_whatever_prints_while_a_command_runs_goes_to_stderr():
    done = run_noisy()
    assert (done.returncode, done.stderr) == (0, "noise\n" * 7)
    document, end = json.JSONDecoder().raw_decode(done.stdout)
    assert document == {"score": 1.5}
    assert done.stdout[end:] == "\nhelp\n"


@pytest.mark.parametrize("redirect", ["2>/dev/full", "2>&-", "2> >(exit)", "2>&- <&-"])
def test_a_stderr_that_takes_nothing_ends_no_command(redirect):
    done = run_noisy(2000, redirect)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.JSONDecoder().raw_decode(done.stdout)[0] == {"score": 1.5}


@pytest.mark.parametrize(("redirect", "read"), [("<&-", "''"), (r"< <(printf 'a \xff\n')", r"'a \udcff\n'")])
def test_a_stdin_that_is_closed_or_no_text_can_be_read(redirect, read):
    code = "import sys; from kltune.cli.streams import guard_streams; guard_streams(); print(repr(sys.stdin.read()))"
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirect}', "bash", sys.executable, "-c", code], cwd=ROOT, text=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"}, capture_output=True, check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{read}\n")


def test_what_is_printed_while_the_interpreter_ends_is_no_part_of_the_result():
    """``main`` as the command calls it, with what a reward function may leave behind it."""
    code = "import atexit, os, sys\nfrom kltune.cli import main\natexit.register(print, 'late')\n" \
           "atexit.register(os.write, 1, b'late\\n')\nsys.argv = ['kltune', '--version']\nmain()\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"kltune {__version__}\n")
    assert done.stderr == "late\n" * 2


def test_a_stdout_that_was_closed_takes_no_file_with_it(tmp_path):
    code = "import os, sys\nfrom kltune.cli.streams import guard_streams\nguard_streams()\n" \
           f"file = open({str(tmp_path / 'data')!r}, 'w')\nprint('noise')\nprint('noise', file=sys.stderr)\n" \
           "os.write(1, b'noise')\nos.write(2, b'noise')\nfile.write('data')\n"
    command = ["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, check=False)
    assert done.returncode == 0
    assert (tmp_path / "data").read_text() == "data"


def test_in_a_program_that_calls_a_command_the_streams_are_put_back(capsys):
    stdout = sys.stdout
    with results_alone():
        print("noise")
        print("result", file=result_stream())
    with pytest.raises(ZeroDivisionError), results_alone():
        raise ZeroDivisionError
    assert sys.stdout is result_stream() is stdout
    assert capsys.readouterr() == ("result\n", "noise\n")


SLOW = """
import kltune.cli as cli
from functools import partial
cli.signs_of_life = partial(cli.signs_of_life, silence=0.1)
cli.main(["recipe", "check", "ppo.yaml"])
"""


def test_a_command_that_takes_long_says_what_it_is_doing(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}')
    waits = "import time\ntime.sleep(1.0)\n"        # as where it imports a large library
    (tmp_path / "rewards.py").write_text(f"{waits}\n\ndef score(prompts, responses):\n    return [0.0]\n")
    (tmp_path / "ppo.yaml").write_text(RECIPE.replace("some/model", "model"))
    done = subprocess.run(
        [sys.executable, "-c", SLOW], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=120, check=False,
    )
    assert (done.returncode, done.stdout[:10]) == (0, "stage: ppo")
    assert "looking at what the recipe names, 1 s so far\n" in done.stderr
