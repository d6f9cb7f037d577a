"""Where the seconds of a step go."""

import time


class Clock:
    """Laps of one step, by wall clock."""

    def __init__(self):
        self._began = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Everything since the last lap was ``name``."""
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def metrics(self, rows: int, what: str = "responses") -> dict[str, float]:
        """Seconds by lap and in all, and rows per second of everything but evaluation."""
        whole = time.perf_counter() - self._began
        working = max(whole - self._laps.get("eval", 0.0), 1e-9)
        return {f"time/{name}_seconds": seconds for name, seconds in self._laps.items()} | {
            "time/step_seconds": whole,
            f"{what}_per_second": rows / working,
        }
