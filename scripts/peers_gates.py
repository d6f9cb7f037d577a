"""What two sides must have in common before their speed is compared, and what they define differently."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from safetensors.numpy import load_file

CLOSE, TRACE_CLOSE = 1e-5, 1e-4
# The largest of thousands: in float32 each tool's own is up to 2.7e-5 from float64, whichever way it sums.
LOGPROBS_CLOSE = 5e-5
# In bfloat16 the mean and not the largest: every tool rounds elsewhere, by up to 1/256 of a number.
NARROW_CLOSE = {"logprobs": 0.1, "gradient": 0.1}       # measured: 0.02 to 0.05 and 0.02 to 0.08
GRADIENT_CLOSE = 1e-4       # of a model of 135 million weights, whose log-probabilities are 1.5e-5 apart, it is 3e-5
DEFINED_OTHERWISE = (
    "sigmoid with label smoothing (cDPO): TRL 1.16 dropped it; its aot is that on one pair at a time, and is so taken.",
    "ipo: TRL divides each log-ratio by its response's length, kltune (and the paper) does not. The gate compares "
    "kltune's formula on TRL's margin; as each tool trains: TRL {ipo_trl:.6g}, kltune {ipo_kltune:.6g}.",
    "f_dpo: from a log-ratio of 20 nats on kltune lets e^x go on as its tangent; TRL lets it grow (forward_kl) or cuts "
    "it at 80 (alpha). The gate's log-ratios stay below.",
    "bco: TRL adds the two responses of a pair, without a running mean; kltune averages them: TRL's is halved.",
    "kto: TRL pairs a prompt with the response of the row before (its own other response, where pairs were taken "
    "apart), kltune with the next other prompt's. Both get kltune's pairs.",
    "orpo: TRL imitates prompt and response, averaged over all tokens; kltune the response, averaged by pair. Compared "
    "is the odds-ratio term.",
    "simpo and orpo: TRL's functions of CPO and ORPO, on means per token of its own logits.",
    "prompts: TRL's own preparation gives {otherwise} of the {pairs} pairs other token ids: it ends a prompt where the "
    "two texts part, and tokenises prompt and response as one. Both get kltune's ids.",
)


def gap(ours: ArrayLike, theirs: ArrayLike) -> float:
    """How far values are apart, the worst of them, as a share of the larger of a pair where that is above 1.

    Infinite where the shapes differ or a value is not finite.
    """
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return math.inf
    size = np.maximum(1.0, np.maximum(np.abs(ours), np.abs(theirs)))
    return float((np.abs(ours - theirs) / size).max())


def gradient_gap(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """‖g − g′‖ / ‖g′‖ over all tensors together; infinite where their names or shapes differ, or g′ is 0."""
    if ours.keys() != theirs.keys() or any(ours[name].shape != theirs[name].shape for name in ours):
        return math.inf
    apart, size = (
        math.sqrt(sum(float(np.square(part, dtype=np.float64).sum()) for part in parts))
        for parts in ([ours[name] - theirs[name] for name in ours], theirs.values())
    )
    return apart / size if size > 0.0 and math.isfinite(apart) else math.inf


def gate_row(what: str, difference: float, allowed: float, values: tuple[float, float] | None = None) -> dict[str, Any]:
    """One gate: what it compares, how far kltune and TRL are apart, whether that is close enough, and their values."""
    ours, theirs = values or (None, None)
    return {"gate": what, "kltune": ours, "trl": theirs, "difference": difference, "passed": difference <= allowed}


def same_numbers(ours: Path, theirs: Path, dtype: str, on: str = "") -> list[dict[str, Any]]:
    """The gates on log-probabilities and one gradient, from what each side wrote; ``on`` names the model."""
    mine, others = (load_file(path.with_suffix(".safetensors")) for path in (ours, theirs))
    gradients = ({n: t for n, t in side.items() if n.startswith("gradient/")} for side in (mine, others))
    narrow, rows = dtype != "float32", []
    for name, said in (("logprobs", "log-probabilities"), ("ref_logprobs", "log-probabilities, reference")):
        apart = mean_gap(mine[name], others[name]) if narrow else gap(mine[name], others[name])
        rows.append(gate_row(said + on, apart, NARROW_CLOSE["logprobs"] if narrow else LOGPROBS_CLOSE))
    close = NARROW_CLOSE["gradient"] if narrow else GRADIENT_CLOSE
    return [*rows, gate_row(f"gradient of sigmoid, relative{on}", gradient_gap(*gradients), close)]


def mean_gap(ours: ArrayLike, theirs: ArrayLike) -> float:
    """How far values are apart on average; infinite as ``gap`` is."""
    if math.isinf(gap(ours, theirs)):
        return math.inf
    return float(np.abs(np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)).mean())


def compared(ours: Path, theirs: Path, in_ppo: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The gates on fixed pairs, from what each side wrote, and what the two define differently."""
    mine, ppo = (load_file(path.with_suffix(".safetensors"))["logprobs"] for path in (ours, in_ppo))
    rows = [
        *same_numbers(ours, theirs, "float32"),
        gate_row("log-probabilities, TRL's PPO", gap(mine, ppo), LOGPROBS_CLOSE),
    ]
    known = json.loads(theirs.read_text())
    values, peers = json.loads(ours.read_text())["losses"], known["losses"]
    said = {name: known[name] for name in ("pairs", "otherwise")}
    said |= {"ipo_trl": peers["ipo"], "ipo_kltune": values.pop("ipo")}
    peers |= {"bco": peers["bco"] / 2.0, "ipo, margin per token": peers.pop("ipo")}
    if values.keys() != peers.keys():
        raise SystemExit(f"the two sides computed other losses: {sorted(values.keys() ^ peers.keys())}")
    rows += [gate_row(name, gap(value, peers[name]), CLOSE, (value, peers[name])) for name, value in values.items()]
    return rows, [line.format(**said) for line in DEFINED_OTHERWISE]


def compared_traces(stage: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """The gate on the losses of some steps from the same start: each step's update is in those of the next."""
    return gate_row(f"losses of {len(ours)} {stage} steps", gap(ours, theirs), TRACE_CLOSE, (ours[-1], theirs[-1]))


def gate_line(row: dict[str, Any]) -> str:
    """A gate in one line."""
    values = "" if row["kltune"] is None else f"{row['kltune']:14.6f}{row['trl']:14.6f}"
    return f"{row['gate']:48}{values:28}{row['difference']:12.2e}  {'equal' if row['passed'] else 'DIFFERENT'}"
