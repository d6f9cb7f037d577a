"""How many threads a CPU computes with: as many as there are cores that this process may use and others leave free.

Threads that wait for one another on cores that are busy with something else are far slower than one. Sums of floats may
differ in their last digits with the number of threads, and so may everything that follows from them.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

LOOK_SECONDS = 0.25      # how long a look at the load takes
GIVEN = "OMP_NUM_THREADS"


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Within: so many threads for torch's operations on a CPU."""
    import torch

    before = torch.get_num_threads()
    if threads != before:       # where it is the same already, whatever the environment's libraries do stays as it is
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def choose_threads(
    wanted: int | Literal["auto"], recorded: int | None, environment: Mapping[str, str], processes: int = 1
) -> tuple[int, str]:
    """Threads of a run, and a line on how they were chosen.

    The first of these that there is: what the environment says, the recipe's own number, that with which the run began,
    the cores that are free.

    Args:
        wanted: the recipe's ``run.threads``.
        recorded: of the run so far; None for one that begins.
        environment: of this process, as it was when torch was imported.
        processes: of the run on this machine, who share what is free.
    """
    import torch

    if environment.get(GIVEN):
        threads, why = torch.get_num_threads(), f"{GIVEN} says so"
        why += f", and not run.threads: {wanted}" if wanted not in ("auto", threads) else ""
    elif wanted != "auto":
        threads, why = wanted, "run.threads says so"
    elif recorded is not None:
        threads, why = recorded, "as the run began"
    else:
        threads, why = free_threads(torch.get_num_threads())
        threads, why = max(1, threads // processes), why + (f"; {processes} processes share them" * (processes > 1))
    if recorded not in (None, threads):
        why += f"; the run began with {recorded}, so numbers may differ in their last digits"
    return threads, f"threads: {threads} ({why})"


def free_threads(most: int) -> tuple[int, str]:
    """Threads for the cores that are free at the moment, at least 1 and at most ``most``, and why so many."""
    allowed, idle = allowed_cores(), idle_cores()
    threads = max(1, min(most, allowed, math.floor(idle + 0.5)))
    why = f"this process may use {allowed} of {os.cpu_count() or 1} cores, and {idle:.1f} are idle"
    return threads, why + ("" if threads == min(most, allowed) else "; run.threads sets it whatever the load")


def allowed_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use by its affinity and the limits of its cgroups, rounded down, at least 1.

    root: of the file system, in which the cgroups of Linux are looked for; elsewhere there are none.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min([cores, *_cgroup_limits(root)])))


def _cgroup_limits(root: Path) -> Iterator[float]:
    """Cores that each cgroup around this process grants, of either version."""
    listed = root / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in ("sys/fs/cgroup", "sys/fs/cgroup/unified") if not controllers else ("sys/fs/cgroup/cpu",):
            folder = root / mount
            inside = folder / path.lstrip("/")
            # In a container the path may be that of the host: then what is mounted is this process's own.
            for group in (inside, *inside.parents) if inside.is_dir() else (folder,):
                yield from _quota(group)
                if group == folder:
                    break


def _quota(group: Path) -> Iterator[float]:
    """The cores of one cgroup; nothing where it sets no limit."""
    if (file := group / "cpu.max").exists():
        quota, period = file.read_text().split()
    elif (file := group / "cpu.cfs_quota_us").exists():
        quota, period = file.read_text().strip(), (group / "cpu.cfs_period_us").read_text()
    else:
        return
    if quota not in ("max", "-1"):
        yield int(quota) / int(period)


def idle_cores(root: Path = Path("/")) -> float:
    """Cores of this process's affinity that nobody keeps busy, on average over a moment in which it sleeps itself.

    Where the system does not say, all cores less the load average of the last minute.
    """
    before = _ticks(root)
    time.sleep(LOOK_SECONDS)
    after = _ticks(root)
    shares = [(idle - before[core][0]) / (whole - before[core][1])
              for core, (idle, whole) in after.items() if core in before and whole > before[core][1]]
    return sum(shares) if shares else max(0.0, (os.cpu_count() or 1) - os.getloadavg()[0])


def _ticks(root: Path) -> dict[int, tuple[int, int]]:
    """Of each core that this process may use: (ticks idle, ticks in all) since the system began; {} if not Linux."""
    stat = root / "proc/stat"
    if not stat.exists():
        return {}
    mine, found = os.sched_getaffinity(0), {}
    for name, *ticks in (line.split() for line in stat.read_text().splitlines() if line.startswith("cpu")):
        core = name.removeprefix("cpu")
        if core and int(core) in mine:
            counts = [int(tick) for tick in ticks[:8]]      # what comes after is counted among the first as well
            found[int(core)] = counts[3] + counts[4], sum(counts)
    return found
