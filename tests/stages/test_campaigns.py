"""Every stage, killed, cut off and out of room at any moment: what it saved loads, and resumed it is the unbroken run.

A few moments of each are tried here always; all of them by ``make stress``.
"""

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kltune.cli import main
from kltune.recipe import Recipe, load_recipe
from kltune.run.checkpoint import latest_checkpoint, saved_step
from kltune.run.files import read_jsonl
from tests.run.killing import exit_code, start
from tests.stages.conftest import DPO, ONLINE, PPO, REWARD, RUNS, SFT, TRPO, write_recipe
from tests.stages.test_resume import assert_same_run, signalled_in

STEPS, KEEP = 3, 2
STAGES = {"sft": SFT, "reward": REWARD, "ppo": PPO, "trpo": TRPO, "dpo": DPO, "online": ONLINE}
KILLS, SIZES = 204, 40
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
STAGE = pytest.mark.parametrize("stage", STAGES)


@dataclass(frozen=True)
class Campaign:
    """A stage's recipe, its run that nothing stopped, and how many seconds that took."""

    file: Path
    unbroken: Path
    seconds: float

    def recipe(self, output: Path) -> Recipe:
        """The recipe of a run elsewhere."""
        return load_recipe(self.file, output=str(output))

    def run(self, output: Path, before: Callable[[], None], meanwhile: Callable[[int], None] = lambda pid: None) -> int:
        """Run in a process of its own; its exit code. ``before`` runs in it first, ``meanwhile`` here, with its pid."""
        reader, writer = os.pipe()

        def work() -> None:
            sys.stderr = os.fdopen(writer, "w", buffering=1)      # pytest's is a file, and would be out of room too
            before()
            recipe = self.recipe(output)
            RUNS[recipe.stage](recipe, resume=False)

        pid = start(work)
        os.close(writer)
        meanwhile(pid)
        code = exit_code(pid)
        with os.fdopen(reader) as log:
            said = log.read()
        assert "Traceback" not in said, said
        return code

    def goes_on(self, output: Path) -> None:
        """What was saved loads; resumed, or begun where nothing was saved, the run is the unbroken one."""
        rows = [row["step"] for row in read_jsonl(output / "metrics.jsonl")]
        newest = latest_checkpoint(output)
        assert (0 if newest is None else saved_step(newest)) >= max(rows, default=0) - 1
        recipe = self.recipe(output)
        RUNS[recipe.stage](recipe, resume=True)
        assert_same_run(output, self.unbroken, STEPS)
        names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (output, self.unbroken)]
        assert names[0] == names[1]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Iterator[Callable[[str], Campaign]]:
    """A function from a stage to its campaign; one thread, because a process that is forked has no others."""
    threads, known = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda _: None)      # takes most of a run's time; no exit or kill loses pages

    def of(stage: str) -> Campaign:
        if stage not in known:
            base = STAGES[stage]
            run = base["run"] | {"steps": STEPS, "save_every": 1, "eval_every": 2, "keep": KEEP, "loggers": []}
            folder = tmp_path_factory.mktemp(stage)
            file = write_recipe(folder, base | {"run": run}, llama)
            began = time.monotonic()
            RUNS[base["stage"]](load_recipe(file, output=str(folder / "unbroken")), resume=False)
            known[stage] = Campaign(file, folder / "unbroken", time.monotonic() - began)
        return known[stage]

    yield of
    patch.undo()
    torch.set_num_threads(threads)


def exit_before_change(folder: Path, number: int) -> None:
    """From now on, end this process at once before the ``number``-th change to what is in a folder."""
    left = number

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event not in CHANGES or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if isinstance(arguments[0], int):      # a descriptor that is open already
            return
        path = arguments[0] if isinstance(arguments[0], str) else os.fspath(arguments[0])
        if not os.path.isabs(path) or path.startswith(str(folder)):      # rmtree names what it removes from within
            left -= 1
            if left == 0:
                os._exit(9)

    sys.addaudithook(hook)


def exits(stage: Campaign, folder: Path, points: Sequence[int]) -> int:
    """Exit before each of these changes and go on; how many there were before the run came to its end."""
    for number, point in enumerate(points):
        output = folder / f"exit-{point}"
        code = stage.run(output, lambda output=output, point=point: exit_before_change(output, point))
        if code == 0:
            return number
        assert code == 9
        stage.goes_on(output)
    return len(points)


@pytest.mark.parametrize("stage", ["ppo"])
def test_an_exit_before_some_changes_to_the_folder_costs_nothing(campaign, tmp_path, stage, record_property):
    made = exits(campaign(stage), tmp_path, (2, 40, 95))
    record_property("exits", made)
    assert made == 3


@pytest.mark.stress
@STAGE
def test_an_exit_before_each_change_to_the_folder_costs_nothing(campaign, tmp_path, stage, record_property):
    made = exits(campaign(stage), tmp_path, range(1, 10_000))
    record_property("exits", made)
    assert made > 90


def kills(stage: Campaign, folder: Path, moments: Iterable[float], wanted: int) -> int:
    """Kill a run at these shares of the time it takes, and go on, until so many were killed before their end."""
    killed = 0
    for number, moment in enumerate(moments):
        if killed == wanted:
            break

        def kill(pid: int, moment: float = moment) -> None:
            time.sleep(moment * stage.seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

        output = folder / f"kill-{number}"
        code = stage.run(output, lambda: None, kill)
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        stage.goes_on(output)
    return killed


@pytest.mark.parametrize("stage", ["trpo"])
def test_sigkill_at_some_moments_costs_nothing(campaign, tmp_path, stage, record_property):
    made = kills(campaign(stage), tmp_path, (0.1, 0.4, 0.7), 3)
    record_property("kills", made)
    assert made >= 1        # the last moments may come after its end


@pytest.mark.stress
@STAGE
def test_sigkill_at_random_moments_costs_nothing(campaign, tmp_path, stage, record_property):
    chance = random.Random(stage)
    wanted = KILLS // len(STAGES)
    made = kills(campaign(stage), tmp_path, (chance.random() for _ in range(4 * wanted)), wanted)
    record_property("kills", made)
    assert made == wanted


def heard_by_nobody(arguments: Sequence[object], full: int, stop_in: int = 0) -> int:
    """``kltune ...`` in a fork with a full disk as stdout (1) or stderr (2), SIGTERM in a step of it; its exit code."""

    def work() -> None:
        for stream in (1, 2):
            os.dup2(os.open("/dev/full" if stream == full else os.devnull, os.O_WRONLY), stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
        sys.__stderr__ = sys.stderr
        try:
            with signalled_in(stop_in):
                main([*map(str, arguments), "--json"])
        except SystemExit as left:
            os._exit(left.code or 0)

    return exit_code(start(work))


def out_of_room(stage: Campaign, output: Path, limit: Callable[[], None], lift: Callable[[], None]) -> int:
    """Begin a run under a limit, lift it, and go on; the code that the run under the limit ended with."""
    code = stage.run(output, limit)
    assert code in (0, 74)
    lift()
    stage.goes_on(output)
    return code


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(("stage", "full", "told"), [
    pytest.param(stage, full, told, marks=() if (stage, full) == ("sft", 1) else pytest.mark.stress)
    for stage in STAGES for full, told in ((1, 74), (2, 0))
])
def test_a_full_disk_under_a_stream_costs_a_run_nothing(campaign, tmp_path, stage, full, told, record_property):
    one, output = campaign(stage), tmp_path / "run"
    command = (STAGES[stage]["stage"], "--recipe", one.file, "--output", output)
    assert heard_by_nobody(command, full, stop_in=2) == 143
    assert saved_step(latest_checkpoint(output)) == 2
    assert heard_by_nobody((*command, "--resume"), full) == told      # stdout alone has a result that is lost
    assert_same_run(output, one.unbroken, STEPS)
    assert heard_by_nobody(command, full) == told       # finished, and told once more
    gates = () if stage == "reward" else ((1e6, 0), (1e-9, 3))
    for budget, verdict in gates:
        # What the gate says to a script is its code; where the document is lost that is not enough.
        gate = ("eval-kl", output, "--prompts", one.file.parent / "held_out.jsonl", "--responses", 40)
        assert heard_by_nobody((*gate, "--max-kl", budget), full) == (verdict if full == 2 else 74)
    record_property("full streams", 3 + len(gates))


SIZE = [round(2 ** (17 * number / (SIZES - 1))) - 1 for number in range(SIZES)]      # bytes, 0 to 131,071


@pytest.mark.parametrize("number", [
    number if number in (0, 20, 30) else pytest.param(number, marks=pytest.mark.stress) for number in range(SIZES)
])  # fmt: skip
def test_no_file_larger_than_a_limit_ends_a_run_with_74_and_costs_nothing(campaign, tmp_path, number, record_property):
    stage = list(STAGES)[number % len(STAGES)]
    code = out_of_room(campaign(stage), tmp_path / "run", lambda: limit_file_size(SIZE[number]), lambda: None)
    record_property("file-size limits", 1)
    assert code == 74 or SIZE[number] > 4000


@pytest.mark.parametrize("options", [
    "size=64k", *(pytest.param(f"size={size}k", marks=pytest.mark.stress) for size in (8, 16, 32, 96, 128, 192, 256)),
    "nr_inodes=20", *(pytest.param(f"nr_inodes={n}", marks=pytest.mark.stress) for n in (3, 6, 9, 12, 16, 24, 28, 34)),
])  # fmt: skip
@pytest.mark.parametrize("stage", ["sft", pytest.param("ppo", marks=pytest.mark.stress)])
def test_a_file_system_without_bytes_or_inodes_ends_a_run_with_74_and_costs_nothing(
    campaign, tmp_path, stage, options, record_property
):
    one, place = campaign(stage), tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    try:
        grown = "size=64m" if options.startswith("size") else "nr_inodes=4096"
        out_of_room(
            one, place / "run", lambda: None,
            lambda: subprocess.run(["mount", "-o", f"remount,{grown}", place], check=True),
        )
        record_property("full file systems", 1)
    finally:
        subprocess.run(["umount", place], check=True)
