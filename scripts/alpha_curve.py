"""One adapter at every share of itself against runs that were trained for a KL each: score at equal measured KL.

    python scripts/alpha_curve.py --far runs/t8s0 --far runs/t8s1 --trained runs/t1s0 ... --recipe ppo.yaml --output DIR

Every point is measured afresh on the recipe's held-out prompts with the same number of responses and the same random
numbers. Writes points.json and curve.svg (the mean over the far runs, and each trained run), and prints a table: the
score of each trained run, and that of the dialled ones at the same KL, read off between their neighbouring points.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from kltune.run.curve import Curve, CurvePoint, curve_svg
from kltune.run.subject import find_checkpoint, open_subject, settle
from kltune.stages.project import CURVE, ProjectOptions, check_options, make_dial, row


def measured(run: str, recipe: str, responses: int, alphas: tuple[float, ...]) -> list[dict]:
    """A run at some shares of its adapter."""
    options = ProjectOptions(recipe=recipe, responses=responses, curve=True)
    check_options(options)
    subject = find_checkpoint(run, options)
    settings = settle([subject], options)
    dial = make_dial(open_subject(subject, options), settings, options)
    return [row(dial.measure(alpha, responses, "curve", 0)) for alpha in alphas]


def at_kl(points: list[dict], nats: float) -> tuple[float, float]:
    """Score and standard error of a dialled run at a KL, along a straight line between its points."""
    kl = [point["nats_per_response"] for point in points]
    return tuple(float(np.interp(nats, kl, [point[name] for point in points])) for name in ("score", "score_stderr"))


def averaged(curves: list[list[dict]]) -> list[dict]:
    """Mean and standard error over runs, α by α."""
    rows = []
    for points in zip(*curves, strict=True):
        mean = {name: float(np.mean([point[name] for point in points])) for name in ("nats_per_response", "score")}
        errors = {
            f"{name}_error": float(np.std([point[name] for point in points], ddof=1) / len(points) ** 0.5)
            if len(points) > 1 else 0.0
            for name in mean
        }
        rows.append({"alpha": points[0]["alpha"], **mean, **errors})
    return rows


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--far", action="append", required=True, help="a run to dial back")
    parser.add_argument("--trained", action="append", default=[], help="a run to hold it against")
    parser.add_argument("--recipe", required=True, help="where the score comes from")
    parser.add_argument("--responses", type=int, default=1000)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    shared, file = (arguments.recipe, arguments.responses), arguments.output / "points.json"
    held = json.loads(file.read_text()) if file.exists() else {"far": {}, "trained": {}}
    far = {run: held["far"].get(run) or measured(run, *shared, (0.0, *CURVE)) for run in arguments.far}
    trained = {run: held["trained"].get(run) or measured(run, *shared, (1.0,))[0] for run in arguments.trained}
    file.write_text(json.dumps({"far": far, "trained": trained}, indent=2))

    mean = averaged(list(far.values()))
    dialled = Curve(f"one run dialled back, mean of {len(far)}", [
        CurvePoint(
            point["nats_per_response"], point["score"], 1.96 * point["nats_per_response_error"],
            1.96 * point["score_error"], f"{point['alpha']:g}",
        )
        for point in mean
    ])
    single = Curve("runs trained for the KL", [
        CurvePoint(p["nats_per_response"], p["score"], 1.96 * p["stderr"], 1.96 * p["score_stderr"])
        for p in trained.values()
    ], joined=False)
    axes = {"x": "KL(policy ‖ reference), nats per response", "y": "score"}
    svg = curve_svg([dialled, single], **axes, title="Score against KL: one run dialled back, and trained runs")
    (arguments.output / "curve.svg").write_text(svg + "\n", encoding="utf-8")

    print("| trained run | its KL | its score | dialled runs at that KL | difference |\n|---|---|---|---|---|")
    gaps = []
    for run, point in trained.items():
        others = [at_kl(points, point["nats_per_response"]) for points in far.values()]
        score = float(np.mean([s for s, _ in others]))
        error = float(np.mean([e for _, e in others])) / len(others) ** 0.5
        gaps.append(score - point["score"])
        print(
            f"| {Path(run).name} | {point['nats_per_response']:.2f} ± {point['stderr']:.2f} | {point['score']:.2f} ± "
            f"{point['score_stderr']:.2f} | {score:.2f} ± {error:.2f} | {gaps[-1]:+.2f} |"
        )
    if gaps:
        print(f"mean difference {np.mean(gaps):+.3f} ± {np.std(gaps, ddof=1) / len(gaps) ** 0.5:.3f}", file=sys.stderr)


if __name__ == "__main__":
    main()
