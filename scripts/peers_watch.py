"""Seconds and memory of the steps of a run, taken alike on both sides of ``bench_peers.py``; imports no library."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from bench_parts import memory_mb, reset_peak

SETTINGS = ("matched", "defaults", "untouched")
WARM_UP = 2  # steps at the start that are not counted; the last one, which may save, is not counted either


class Watch:
    """Stamps at the ends of steps: wall clock, the processor's time, peak memory, both times within timed functions."""

    def __init__(self):
        self.losses: list[float] = []
        self._held = 0.0
        self._inside: dict[str, float] = {}
        self._stamps: list[tuple[float, float, float, dict[str, float]]] = []

    @property
    def began(self) -> bool:
        """Whether the first step was stamped."""
        return bool(self._stamps)

    def loaded(self) -> None:
        """Libraries and model are in memory: what is held from now on is the run's own."""
        self._held = memory_mb("VmRSS")
        reset_peak()

    def stamp(self) -> None:
        """Before the first step, and after each."""
        self._stamps.append((time.perf_counter(), time.process_time(), memory_mb("VmHWM"), dict(self._inside)))

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, its seconds added up under a name."""
        def inner(*arguments, **options):
            began, began_cpu = time.perf_counter(), time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self._add(name, time.perf_counter() - began)
                self._add(f"{name}_cpu", time.process_time() - began_cpu)
        return inner

    def _add(self, name: str, seconds: float) -> None:
        self._inside[name] = self._inside.get(name, 0.0) + seconds

    def write(self, path: Path) -> None:
        """The counted steps as one JSON document: seconds of each, and of the processor, and within timed functions."""
        counted = list(zip(self._stamps, self._stamps[1:], strict=False))[WARM_UP:-1]
        names = sorted(self._inside)
        document = {
            "seconds": [after[0] - before[0] for before, after in counted],
            "cpu_seconds": [after[1] - before[1] for before, after in counted],
            "inside": {n: [after[3].get(n, 0.0) - before[3].get(n, 0.0) for before, after in counted] for n in names},
            "before_seconds": {name: self._stamps[0][3].get(name, 0.0) for name in names},
            "held_mb": self._held,
            "peak_mb": counted[-1][1][2],
            "losses": self.losses,
        }
        path.write_text(json.dumps(document))
