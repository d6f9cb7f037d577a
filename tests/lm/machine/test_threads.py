"""As many threads as cores are free: by affinity, cgroups and load, and who may say otherwise."""

import os
from pathlib import Path

import pytest
import torch

from kltune.lm.machine import threads
from kltune.lm.machine.threads import allowed_cores, choose_threads, computing_with, idle_cores

MINE = {0, 1, 2, 3}


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """The root of a system with eight cores, of which this process may use four."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: MINE)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(("group", "files", "cores"), [
    ("0::/a/b", {"a/cpu.max": "250000 100000", "a/b/cpu.max": "max 100000"}, 2),       # the limit of one around it
    ("0::/a/b", {"a/b/cpu.max": "50000 100000"}, 1),                                   # half a core is one thread
    ("0::/a/b", {"a/b/cpu.max": "900000 100000"}, 4),                                  # more than its affinity
    ("0::/on/the/host", {"cpu.max": "300000 100000"}, 3),                              # a container's own, mounted
    ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "150000", "cpu/a/cpu.cfs_period_us": "50000"}, 3),
    ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "50000"}, 4),
    ("4:memory:/a", {"a/cpu.max": "100000 100000"}, 4),                                # not its cgroup
], ids=str)
def test_cores_are_those_of_affinity_and_of_every_cgroup_around(root, group, files, cores):
    write(root / "proc/self/cgroup", group + "\n")
    for name, text in files.items():
        write(root / "sys/fs/cgroup" / name, text + "\n")
    assert allowed_cores(root) == cores


def test_a_system_without_cgroups_leaves_the_affinity(root):
    assert allowed_cores(root) == 4


def stat(*idle: int, whole: int) -> str:
    lines = [f"cpu{core} {whole - ticks} 0 0 {ticks} 0 0 0 0 0 0" for core, ticks in enumerate(idle)]
    return "\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *lines, "intr 5"])


def test_what_others_leave_idle_is_measured_on_this_process_s_cores_alone(root, monkeypatch):
    write(root / "proc/stat", stat(0, 50, 50, 50, 0, whole=100))
    monkeypatch.setattr("time.sleep", lambda _: write(root / "proc/stat", stat(0, 70, 75, 75, 25, whole=125)))
    assert idle_cores(root) == pytest.approx(0.0 + 0.8 + 1.0 + 1.0)


def test_where_no_core_is_told_of_the_load_average_is(root, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (5.5, 0.0, 0.0))
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert idle_cores(root) == 2.5
    write(root / "proc/stat", stat(0, 0, 0, 0, whole=0))     # some sandboxes show the file and count nothing
    assert idle_cores(root) == 2.5


@pytest.mark.parametrize(
    ("allowed", "idle", "chosen"), [(4, 4.0, 4), (4, 2.6, 3), (4, 0.1, 1), (2, 7.9, 2), (9, 9.0, 8)]
)
def test_auto_takes_what_is_free(monkeypatch, allowed, idle, chosen):
    monkeypatch.setattr(threads, "allowed_cores", lambda: allowed)
    monkeypatch.setattr(threads, "idle_cores", lambda: idle)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    found, line = choose_threads("auto", None, {})
    assert found == chosen
    assert line.startswith(f"threads: {chosen} (")
    assert ("run.threads" in line) == (chosen < min(allowed, 8))


@pytest.mark.parametrize(("wanted", "recorded", "given", "chosen", "said"), [
    ("auto", None, "5", 8, "OMP_NUM_THREADS"),         # as torch took it
    (3, None, "5", 8, "and not run.threads: 3"),
    (3, None, "", 3, "run.threads says so"),
    (3, 2, "", 3, "began with 2, so numbers may differ"),
    ("auto", 2, "", 2, "as the run began"),
    ("auto", 2, "5", 8, "began with 2, so numbers may differ"),
])
def test_the_environment_goes_before_the_recipe_and_both_before_the_record(
    monkeypatch, wanted, recorded, given, chosen, said
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    found, line = choose_threads(wanted, recorded, {"OMP_NUM_THREADS": given})
    assert (found, said in line) == (chosen, True), line
    assert ("differ" in line) == (recorded not in (None, chosen))


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with computing_with(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_busy_core_is_seen():
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("only Linux says which cores are busy")
    assert 0.0 <= idle_cores() <= len(os.sched_getaffinity(0))
