"""Seconds and memory of the steps of a run, taken alike on both sides of ``bench_peers.py``; imports no library."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from bench_parts import memory_mb, reset_peak

SETTINGS = ("matched", "defaults", "untouched")
WARM_UP = 2  # steps at the start that are not counted; the last one, which may save, is not counted either


class Watch:
    """Stamps at the ends of steps, and within them of phases: wall clock, the processor's time, peak memory."""

    def __init__(self):
        self.losses: list[float] = []
        self.floor_seconds: float | None = None
        self.values: dict[str, float] = {}
        self._held = self._peak = 0.0
        self._last: tuple[float, float] | None = None
        self._inside: dict[str, float] = {}
        self._peaks: dict[str, float] = {}
        self._stamps: list[tuple[float, float, float, dict[str, float]]] = []

    @property
    def began(self) -> bool:
        """Whether the first step was stamped."""
        return bool(self._stamps)

    def loaded(self) -> None:
        """Libraries and model are in memory: what is held from now on is the run's own."""
        self._held = memory_mb("VmRSS")
        self._peak = 0.0
        reset_peak()

    def stamp(self) -> None:
        """Before the first step, and after each."""
        self.phase("rest")
        self._stamps.append((*self._last, self._peak, dict(self._inside)))

    def phase(self, name: str) -> None:
        """What has passed since the last phase or stamp was of this name; its peak of memory is its own."""
        now, peak = (time.perf_counter(), time.process_time()), memory_mb("VmHWM")
        self._peak = max(self._peak, peak)
        if self._last is not None:
            for key, before, after in zip((name, f"{name}_cpu"), self._last, now, strict=True):
                self._inside[key] = self._inside.get(key, 0.0) + after - before
            self._peaks[name] = max(self._peaks.get(name, 0.0), peak)
        self._last = now
        reset_peak()

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, as a phase."""
        def inner(*arguments, **options):
            self.phase("rest")
            try:
                return function(*arguments, **options)
            finally:
                self.phase(name)
        return inner

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
            "peak_mb_inside": self._peaks,
            "losses": self.losses,
            "floor_seconds": self.floor_seconds,
            "values": self.values,
        }
        path.write_text(json.dumps(document))
