"""The figures of finished runs beside each other, and the tables they stand in."""

from collections.abc import Iterator
from typing import Any

from kltune.run.storage import visible

Rows = list[list[str]]


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """KL, score and gold of a result.json, each with its standard error; None where not measured.

    reference_score and reference_gold are those of the reference's own responses to the same prompts.
    """
    kl, measured = result.get("kl") or {}, result.get("eval") or {}
    return {
        "kl": kl.get("nats_per_response"),
        "kl_stderr": kl.get("stderr"),
        "kl_ci95": kl.get("ci95"),
        "score": measured.get("eval/score_mean", result.get("score")),
        "score_stderr": measured.get("eval/score_stderr"),
        "reference_score": measured.get("eval/reference_score_mean"),
        "reference_score_stderr": measured.get("eval/reference_score_stderr"),
        "gold": measured.get("eval/gold_mean"),
        "gold_stderr": measured.get("eval/gold_stderr"),
        "reference_gold": measured.get("eval/reference_gold_mean"),
        "reference_gold_stderr": measured.get("eval/reference_gold_stderr"),
    }


def aligned(rows: Rows) -> Iterator[str]:
    """Columns under their headings."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (f"{visible(cell):<{width}}" for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def with_error(value: float | None, stderr: float | None) -> str:
    """A number ± its standard error; a dash where nothing was measured."""
    if value is None:
        return "–"
    return f"{value:.3g}" + ("" if stderr is None else f" ± {stderr:.2g}")
