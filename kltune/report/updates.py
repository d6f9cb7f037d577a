"""What an update of the policy went through, from gradient to step, by the metrics of a run's second half."""

import math
from typing import Any

from kltune.report.outcome import Files
from kltune.run.screen import percent

FORETELLS = 0.1     # of the returns' variance: a value function that explains less is no better than a constant
LIMIT = "kl/step_limit_nats_per_response"


def updates_of(files: Files) -> list[tuple[str, str, str]]:
    """(what, how much, what that means) of each thing that shapes an update; nothing where none was recorded."""
    rows, recipe = files.metrics[len(files.metrics) // 2 :], files.recipe
    optim, kl = recipe.get("optim") or {}, recipe.get("kl") or {}
    steered = kl.get("control") == "target"
    room = ", and the room that the KL budget leaves a step," if steered else ""
    shaped = [
        (
            "learning rate", _percent(_mean(rows, "optim/lr"), optim.get("lr")),
            f"of optim.lr: what the schedule{room} made of it",
        ),
        (
            "length of a step", _percent(_mean(rows, "kl/step_nats_per_response"), _mean(rows, LIMIT)),
            "of what it might move the policy, KL(old‖new)",
        ),
        (
            "gradient", _percent(_mean(rows, "ppo/policy_grad_norm", optim.get("max_grad_norm", math.inf)), 1.0),
            "of its length: what optim.max_grad_norm leaves",
        ),
        (
            "clipped", _percent(_mean(rows, "ppo/clip_fraction"), 1.0),
            "of the tokens: their probability ratio left 1 ± ppo.clip_range",
        ),
        ("value function", *_foretold(rows)),
        (
            "price", _percent(_mean(rows, "kl/beta"), _mean(rows, "kl/beta_feed_forward")),
            "of what the scores' spread asks for: the controller's own part in it",
        ),
    ]
    return [row for row in shaped if row[1] and (steered or row[0] != "price")]


def _foretold(rows: list[dict[str, Any]]) -> tuple[str, str]:
    name = next((name for name in ("ppo/value_explained", "trpo/value_explained") if _mean(rows, name) is not None), "")
    share = _mean(rows, name)
    if share is None:
        return "", ""
    if share < FORETELLS:
        return _percent(max(share, 0.0), 1.0), (
            "of the returns foretold: it explains nothing; several responses to a prompt and baseline: rloo need none"
        )
    return _percent(share, 1.0), "of the returns' variance foretold"


def _mean(rows: list[dict[str, Any]], name: str, limit: float | None = None) -> float | None:
    """Mean of a metric over the rows that have it; with a limit, of what the limit leaves of it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if limit is not None:
        values = [min(1.0, limit / value) for value in values if value > 0.0]
    return sum(values) / len(values) if values else None


def _percent(value: float | None, of: float | None) -> str:
    return "" if value is None or not of else f"{percent(value / of, 1)} %"
