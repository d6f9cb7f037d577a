"""What stages write into metrics.jsonl, held against the registry that ``kltune explain`` reads."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kltune.run.metrics import metric_named


def unknown_metrics(keys: Iterable[str], stage: str) -> list[str]:
    """Those of the keys that a stage writes which have no entry, or one that does not name the stage."""
    found = {key: metric_named(key) for key in keys}
    return [key for key, metric in found.items() if metric is None or stage not in metric.stages]


def known_only(step: Callable[..., None]) -> Callable[..., None]:
    """``Report.step``, but with an assertion that every key is in the registry, and there as one of that stage."""

    def checked(report: Any, number: int, metrics: Mapping[str, float | None]) -> None:
        unknown = unknown_metrics(metrics, report.stage)
        assert unknown == [], f"run/metrics.py does not have these as keys that {report.stage} writes: {unknown}"
        step(report, number, metrics)

    return checked
