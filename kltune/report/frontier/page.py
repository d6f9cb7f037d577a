"""The frontier for people: a table, a picture, and one page that needs no network and no script."""

from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kltune.core.hacking.overoptimization import tilt_gain
from kltune.report.numbers import Rows, aligned
from kltune.report.numbers import with_stderr as with_error
from kltune.report.plots import Curve, CurvePoint, Frame, curve_svg
from kltune.run.files import storing, visible, write_json, write_whole

NATS = "KL(policy ‖ reference), nats per response"
AXIS = 200              # points along σ√(2 KL)
MOST_LABELS = 24        # in a picture; more hide each other
BEST_OF_N = (           # colour and mark, where its KL stands, and what it is called
    (6, "kl_bound", "best of n, KL at most"),
    (7, "kl_with_ties", "best of n, KL with its ties"),
)


def write_frontier(folder: Path, document: dict[str, Any]) -> None:
    """frontier.json, frontier.svg and frontier.html in a folder that is made if need be.

    Raises:
        StorageError: they cannot be written.
    """
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "frontier.json", document)
    write_whole(folder / "frontier.svg", picture(document, document["judge"]) + "\n")
    write_whole(folder / "frontier.html", page(document))


def page(document: dict[str, Any]) -> str:
    """frontier.html."""
    environment = Environment(
        loader=PackageLoader("kltune.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=lambda value: visible(value) if type(value) is str else value,
    )
    judges = [document["judge"], *(["score"] if document["judge"] == "gold" else [])]
    return environment.get_template("frontier.html.j2").render(
        document=document,
        headline=headline_of(document),
        pictures=[
            # safe: matplotlib escapes what it writes
            (f"{judge} against KL", Markup(picture(document, judge, narrow=True))) for judge in judges
        ],
        settings=grouped(settings_table(document)),
        anchor=anchor_table(document),
        at=at_table(document),
        fits=[(fit["curve"], fit_line(fit)) for fit in document["fits"]],
    )


def picture(document: dict[str, Any], judge: str, narrow: bool = False) -> str:
    """Score or gold against KL with 95 % error bars, best of n and σ√(2 KL) as an ``<svg>``."""
    curves = []
    known = [row for row in document["settings"] if row[judge] is not None]
    labelled = len(known) <= MOST_LABELS
    for place, curve in enumerate(dict.fromkeys(row["curve"] for row in document["settings"])):
        points = [
            CurvePoint(
                row["kl"], row[judge], 1.96 * (row["kl_stderr"] or 0.0), 1.96 * (row[f"{judge}_stderr"] or 0.0),
                row["setting"].rpartition("=")[2] if labelled else "",
            )
            for row in known if row["curve"] == curve
        ]
        if points:
            curves.append(Curve(curve, points, place, joined=len(points) > 1))
    anchor, base = document["best_of_n"], document["reference"][judge]
    if anchor is not None:
        scored = [point for point in anchor["points"] if point[judge] is not None]
        tied = any(point["kl_with_ties"] < 0.98 * point["kl_bound"] for point in scored)
        for place, kl, label in BEST_OF_N if tied else BEST_OF_N[:1]:
            points = [
                CurvePoint(
                    p[kl], p[judge], 0.0, 1.96 * (p[f"{judge}_stderr"] or 0.0), str(p["n"]) if kl == "kl_bound" else ""
                )
                for p in scored
            ]
            curves += [Curve(label, points, place)] if points else []
        sigma = anchor["sigma"].get(judge)
        if sigma and base is not None and curves:
            far = max(point.x + point.x_error for curve in curves for point in curve.points)
            nats = np.linspace(0.0, far**0.5, AXIS) ** 2
            gains = zip(nats, base + tilt_gain(sigma, nats), strict=True)
            curves.append(Curve("σ√(2 KL), Gaussian scores", [CurvePoint(x, y) for x, y in gains], marked=False))
    title, name = f"{judge} against KL", f"frontier-{judge}"
    return curve_svg(curves, Frame(x=NATS, y=judge, title=title, name=name, root=True, narrow=narrow))


def render(document: dict[str, Any]) -> str:
    """The document as lines of text."""
    reference, judge = document["reference"], document["judge"]
    lines = [
        f"{document['direction']}, nats per response; reference {visible(reference['path'])}, sha256 "
        f"{reference['sha256'][:12]}; measured {document['measured']}",
        *aligned(settings_table(document)),
        f"the reference's own {judge}: {with_error(reference[judge], reference[f'{judge}_stderr'])}",
    ]
    anchor = document["best_of_n"]
    if anchor is not None:
        lines += [
            "",
            f"best of n by {anchor['ranked_by']}, from {anchor['responses_per_prompt']} responses of the reference to "
            f"each of {anchor['prompts']} prompts",
            *aligned(anchor_table(document)),
        ]
    if document["at"]:
        lines += ["", f"{judge} at equal KL", *aligned(at_table(document))]
    lines += ["", "Gao's law of over-optimisation"] if document["fits"] else []
    lines += [f"  {visible(fit['curve'])}: {fit_line(fit)}" for fit in document["fits"]]
    lines += [f"note: {visible(note)}" for note in document["notes"]]
    lines += ["", headline_of(document)] if document["pick"] is not None else []
    if document["output"] is not None:
        lines.append(f"saved: {document['output']}/frontier.json, frontier.svg and frontier.html")
    return "\n".join(lines)


def settings_table(document: dict[str, Any]) -> Rows:
    """One row for each setting, headings first."""
    golden = any(row["gold"] is not None for row in document["settings"])
    steps = any(step is not None for row in document["settings"] for step in row["steps_to_target"])
    share = any(row["efficiency"] is not None for row in document["settings"])
    rows = [[
        "curve", "setting", "seeds", "KL", "95 %", "score", *(["gold"] if golden else []),
        *(["of σ√(2 KL)"] if share else []), *(["steps to target"] if steps else []),
    ]]
    for row in document["settings"]:
        ci = row["kl_ci95"]
        cells = [
            row["curve"], row["setting"], str(row["seeds"]), with_error(row["kl"], row["kl_stderr"]),
            "–" if ci is None else f"{ci[0]:.3g} to {ci[1]:.3g}", with_error(row["score"], row["score_stderr"]),
        ]
        cells += [with_error(row["gold"], row["gold_stderr"])] if golden else []
        cells += ["–" if row["efficiency"] is None else f"{100 * row['efficiency']:.0f} %"] if share else []
        cells += [", ".join("–" if step is None else str(step) for step in row["steps_to_target"])] if steps else []
        rows.append(cells)
    return rows


def grouped(rows: Rows) -> Rows:
    """The first cell only where it differs from the one above."""
    return [
        ["" if above and above[0] == row[0] else row[0], *row[1:]]
        for above, row in zip([[], *rows], rows, strict=False)
    ]


def anchor_table(document: dict[str, Any]) -> Rows:
    """One row for each n; [] where best of n was not measured."""
    if document["best_of_n"] is None:
        return []
    points = document["best_of_n"]["points"]
    judges = [judge for judge in ("score", "gold") if points[0][judge] is not None]
    rows = [["n", "KL at most", "with its ties", *judges]]
    for point in points:
        scores = [with_error(point[judge], point[f"{judge}_stderr"]) for judge in judges]
        rows.append([str(point["n"]), f"{point['kl_bound']:.3f}", f"{point['kl_with_ties']:.3f}", *scores])
    return rows


def at_table(document: dict[str, Any]) -> Rows:
    """A row for each curve, a column for each KL of ``--at``; [] without."""
    if not document["at"]:
        return []
    judge = document["judge"]
    rows = [["curve", *(f"{column['kl']:g} nats" for column in document["at"])]]
    for curve in document["at"][0]["curves"]:
        found = [column["curves"][curve] for column in document["at"]]
        rows.append([curve, *("–" if one is None else with_error(one[judge], one[f"{judge}_stderr"]) for one in found)])
    return rows


def fit_line(fit: dict[str, Any]) -> str:
    """One fit in words."""
    found = fit["fit"]
    if found is None:
        return fit["claim"]
    clusters = "prompts" if fit["form"] == "best_of_n" else "runs"
    law = "d(α − β log d)" if fit["form"] == "rl" else "d(α − β d)"
    text = f"{law} of the {fit['of']}'s gain, d = √KL: α {_interval(found, 'alpha')}, β {_interval(found, 'beta')}"
    if found["observed"]:
        peak = found["peak"]
        high = peak["kl_ci"][1]
        text += (
            f"; peak at {peak['kl']:.3g} nats (95 %: {peak['kl_ci'][0]:.3g} to "
            f"{'any' if high is None else f'{high:.3g}'}), gain {peak['gain']:.3g}"
        )
    else:
        text += f"; {found['claim']}"
    return f"{text} ({found['points']} points of {found['runs']} {clusters})"


def _interval(found: dict[str, Any], name: str) -> str:
    low, high = found[f"{name}_ci"]
    return f"{found[name]:.3g} (95 %: {low:.3g} to {high:.3g})"


def headline_of(document: dict[str, Any]) -> str:
    """Which setting to pick; without a budget, how many settings there are."""
    picked = document["pick"]
    if picked is None:
        curves = {row["curve"] for row in document["settings"]}
        return (
            f"{len(document['points'])} policies, {len(document['settings'])} settings on {len(curves)} "
            f"curve{'s' if len(curves) > 1 else ''}; --budget NATS picks one."
        )
    judge, budget = picked["judge"], picked["budget"]
    if picked["curve"] is None:
        return f"budget {budget:g} nats: no setting with a known {judge} keeps within it at 95 % confidence."
    low, high = picked["kl_ci95"]
    text = (
        f"budget {budget:g} nats: pick {picked['curve']}, {picked['setting']}: {judge} "
        f"{with_error(picked[judge], picked[f'{judge}_stderr'])} at {picked['kl']:.3g} nats "
        f"(95 %: {low:.3g} to {high:.3g})."
    )
    if not picked["better_than_reference"]:
        text += f" That is not shown to be better than the reference's own {with_error(picked['reference'], None)}."
    if picked["tied"]:
        others = "; ".join(f"{one['curve']}, {one['setting']} ({one['kl']:.3g} nats)" for one in picked["tied"])
        text += f" Within error of it: {others}."
    return text
