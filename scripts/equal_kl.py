"""Ways of training at equal measured KL: the score that each has at some KLs, over its runs.

    python scripts/equal_kl.py --group PPO runs/p2s0 runs/p4s0 ... --group TRPO runs/t2s0 ... --recipe ppo.yaml \
        --at 2 4 8 --output DIR

Every run is measured afresh on the recipe's held-out prompts with the same number of responses and random numbers. A
group's score at a KL is read off the line through its points in √KL (a tilt of Gaussian scores gains in proportion to
it), by least squares over its runs that were within a factor of 2.5 of that KL; its error is from their spread around
the line, or the errors of their own scores where these are larger. Writes points.json and equal_kl.svg, and prints the
table, with how many steps each run took to come within 15 % of its target.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from alpha_curve import measured

from kltune.run.curve import Curve, CurvePoint, curve_svg

NEAR = 0.15
FACTOR = 2.5


def score_at(points: list[dict], nats: float) -> tuple[float, float] | None:
    """Score and standard error at a KL; None where fewer than three runs, or runs of one KL only, came near it."""
    near = [point for point in points if 1 / FACTOR < point["nats_per_response"] / nats < FACTOR]
    if len(near) < 3:
        return None
    x = np.sqrt([point["nats_per_response"] for point in near]) - np.sqrt(nats)
    y = np.array([point["score"] for point in near])
    if np.ptp(x) < 0.1:  # all at one KL: a slope would be noise
        return None
    design = np.stack([np.ones_like(x), x], axis=1)
    solution, *_ = np.linalg.lstsq(design, y, rcond=None)
    own = np.mean([point["score_stderr"] ** 2 for point in near])
    variance = max(own, ((y - design @ solution) ** 2).sum() / max(len(y) - 2, 1))
    return float(solution[0]), float((variance * np.linalg.inv(design.T @ design)[0, 0]) ** 0.5)


def course(run: str) -> dict:
    """How a run came to its target: steps and seconds to within 15 %, highest KL ÷ target, share of its last third."""
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    target = json.loads((Path(run) / "result.json").read_text())["target"]
    if target is None:
        return {}
    share = np.array([row["kl/ref_nats_per_response"] for row in rows]) / target
    inside = np.flatnonzero(share >= 1.0 - NEAR)
    last = share[-(len(share) // 3):]
    return {
        "target": target,
        "steps_to_target": int(inside[0]) + 1 if len(inside) else None,
        "peak": float(share.max()),
        "held": float((np.abs(last - 1.0) <= NEAR).mean()),
    }


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", action="append", nargs="+", required=True, metavar=("NAME", "RUN"))
    parser.add_argument("--recipe", required=True, help="where the score comes from")
    parser.add_argument("--at", type=float, nargs="+", default=[2.0, 4.0, 8.0], help="KLs, nats per response")
    parser.add_argument("--responses", type=int, default=1000)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "points.json"
    held = json.loads(file.read_text()) if file.exists() else {}
    groups: dict[str, list[dict]] = {}
    for name, *runs in arguments.group:
        for run in runs:
            if run not in held:
                held[run] = measured(run, arguments.recipe, arguments.responses, (1.0,))[0] | course(run)
                file.write_text(json.dumps(held, indent=2))
            groups.setdefault(name, []).append(held[run])

    curves = [
        Curve(name, [
            CurvePoint(p["nats_per_response"], p["score"], 1.96 * p["stderr"], 1.96 * p["score_stderr"]) for p in points
        ], joined=False)
        for name, points in groups.items()
    ]
    axes = {"x": "KL(policy ‖ reference), nats per response", "y": "score"}
    svg = curve_svg(curves, **axes, title="Score against measured KL")
    (arguments.output / "equal_kl.svg").write_text(svg + "\n", encoding="utf-8")

    print("| | " + " | ".join(f"score at {nats:g} nats" for nats in arguments.at) + " | steps to target |")
    print("|---" * (len(arguments.at) + 2) + "|")
    for name, points in groups.items():
        scores = [score_at(points, nats) for nats in arguments.at]
        cells = ["" if found is None else f"{found[0]:.2f} ± {found[1]:.2f}" for found in scores]
        steps = [str(point["steps_to_target"] or "never") for point in points if "target" in point]
        print(f"| {name} | " + " | ".join(cells) + f" | {', '.join(steps)} |")


if __name__ == "__main__":
    main()
