"""The figures of a finished run that are compared with those of others."""

from typing import Any


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
