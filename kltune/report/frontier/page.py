"""The frontier for people: a table, a picture, and one page that needs no network and no script."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from kltune.core.hacking.overoptimization import tilt_gain
from kltune.recipe.faults import visible
from kltune.report.frontier.held_out import held_out_lines, held_out_svg
from kltune.report.pages import environment
from kltune.report.plots import Z95, Curve, CurvePoint, Frame, curve_svg
from kltune.report.text import Table, aligned
from kltune.run.files import storing, write_json, write_whole
from kltune.run.screen import ABSENT, apart, common_places, interval, number, with_error

NATS = "KL(policy ‖ reference), nats per response"
AXIS = 200              # points along σ√(2 KL)
MOST_LABELS = 24        # in a picture; more hide each other
BEST_OF_N = (           # number of its colour and mark, where its KL stands, and what it is called
    (6, "kl_bound", "best of n, KL at most"),
    (7, "kl_with_ties", "best of n, KL with its ties"),
)


def write_frontier(folder: Path, document: dict[str, Any]) -> None:
    """Write frontier.json, frontier.svg and frontier.html into a folder that is made if need be.

    Without a score there is nothing to draw, and no picture.
    """
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "frontier.json", document)
    if svg := frontier_svg(document, document["judge"]):
        write_whole(folder / "frontier.svg", svg + "\n")
    else:
        (folder / "frontier.svg").unlink(missing_ok=True)      # of an earlier frontier, about other numbers
    write_whole(folder / "frontier.html", frontier_html(document))


def frontier_html(document: dict[str, Any]) -> str:
    """The page: pictures, tables and fits."""
    wins = ["win_rate"] if has_wins(document) else []
    names = dict.fromkeys([document["judge"], *(["score"] if document["judge"] == "gold" else []), *wins])
    held = [] if document.get("held_out") is None else list(held_out_lines(document["held_out"]))[:1]
    return environment().get_template("frontier.html.j2").render(
        document=document,
        judged=spoken(document["judge"]),
        headline=(advice := advice_on_budget(document))[:1].upper() + advice[1:],
        picked=picked_row(document),
        pictures=[
            # safe: matplotlib escapes what it writes
            *((f"{spoken(name)} against KL", Markup(svg)) for name in names
              if (svg := frontier_svg(document, name, inside=True))),
            *((line, Markup(held_out_svg(document["held_out"], inside=True))) for line in held),
        ],
        settings=settings_table(document),
        best_of_n=best_of_n_table(document),
        at=at_table(document),
        fits=[(fit["curve"], fit_line(fit)) for fit in document["fits"]],
    )


def spoken(name: str) -> str:
    """A figure as people say it."""
    return {"win_rate": "win rate over the reference"}.get(name, name)


def has_wins(document: dict[str, Any]) -> bool:
    """Whether a judge has compared some policy with the reference."""
    return any(row["win_rate"] is not None for row in document["settings"])


def picked_row(document: dict[str, Any]) -> list[str] | None:
    """Curve and setting of the one to pick; None where none is."""
    picked = document["pick"] or {"curve": None}
    return None if picked["curve"] is None else [picked["curve"], picked["setting"]]


def frontier_svg(document: dict[str, Any], name: str, inside: bool = False) -> str:
    """One of the figures against KL with 95 % error bars, best of n and σ√(2 KL), an ``<svg>``; "" where none is known.
    """
    curves = _measured_curves(document, name)
    if not curves:
        return ""
    best_of_n, base = document["best_of_n"], document["reference"].get(name)
    sigma = best_of_n["sigma"].get(name) if best_of_n is not None else None
    if sigma and base is not None:
        far = max(point.x + point.x_error for curve in curves for point in curve.points)
        nats = np.linspace(0.0, far**0.5, AXIS) ** 2
        gains = zip(nats, base + tilt_gain(sigma, nats), strict=True)
        curves.append(Curve("σ√(2 KL), Gaussian scores", [CurvePoint(x, y) for x, y in gains], marked=False))
    title = f"{spoken(name)} against KL"
    budget = None if document["pick"] is None else document["pick"]["budget"]
    return curve_svg(curves, Frame(
        x=NATS, y=spoken(name), title=title, name=f"frontier-{name}", root=True, inside=inside, budget=budget,
    ))


def _measured_curves(document: dict[str, Any], name: str) -> list[Curve]:
    return [*_curves_of_settings(document, name), *_curves_of_best_of_n(document, name)]


def _curves_of_settings(document: dict[str, Any], name: str) -> Iterator[Curve]:
    known = [row for row in document["settings"] if row[name] is not None]
    labelled = len(known) <= MOST_LABELS
    for style, curve in enumerate(dict.fromkeys(row["curve"] for row in document["settings"])):
        points = [
            CurvePoint(
                row["kl"], row[name], Z95 * (row["kl_stderr"] or 0.0), _half(row, name),
                row["setting"].partition(",")[0].rpartition("=")[2] if labelled else "",
                f"pick: {row['setting']}" if [row["curve"], row["setting"]] == picked_row(document) else "",
            )
            for row in known if row["curve"] == curve
        ]
        if points:
            yield Curve(curve, points, style, joined=len(points) > 1)


def _half(row: dict[str, Any], name: str) -> float:
    """Half of a figure's 95 % interval; 0 where it is not known."""
    ci = row[f"{name}_ci95"]
    return 0.0 if ci is None else 0.5 * (ci[1] - ci[0])


def _curves_of_best_of_n(document: dict[str, Any], name: str) -> Iterator[Curve]:
    """At the bound of its KL, and where responses tie often, at the KL that those ties leave."""
    points = (document["best_of_n"] or {"points": []})["points"]
    scored = [point for point in points if point.get(name) is not None]
    tied = any(point["kl_with_ties"] < 0.98 * point["kl_bound"] for point in scored)
    for style, kl, title in (BEST_OF_N if tied else BEST_OF_N[:1]) if scored else ():
        yield Curve(title, [
            CurvePoint(
                point[kl], point[name], 0.0, Z95 * (point[f"{name}_stderr"] or 0.0),
                str(point["n"]) if kl == "kl_bound" else "",
            )
            for point in scored
        ], style)


def frontier_text(document: dict[str, Any]) -> str:
    """The document as lines of text."""
    reference, name = document["reference"], document["judge"]
    lines = [
        f"{document['direction']}, nats per response; reference {visible(reference['path'])}, sha256 "
        f"{reference['sha256'][:12]}; measured {document['measured']}",
        *aligned(settings_table(document)),
        *([f"the reference's own {name}: {with_error(reference[name], reference[f'{name}_stderr'])}"]
          if name != "win_rate" else []),
    ]
    best_of_n = document["best_of_n"]
    if best_of_n is not None:
        lines += [
            "",
            f"best of n by {best_of_n['ranked_by']}, from {best_of_n['responses_per_prompt']} responses of the "
            f"reference to each of {best_of_n['prompts']} prompts",
            *aligned(best_of_n_table(document)),
        ]
    if document["at"]:
        lines += ["", f"{spoken(name)} at equal KL", *aligned(at_table(document))]
    lines += ["", "Gao's law of over-optimisation"] if document["fits"] else []
    lines += [f"  {visible(fit['curve'])}: {fit_line(fit)}" for fit in document["fits"]]
    if document.get("held_out") is not None:
        lines += ["", *(visible(line) for line in held_out_lines(document["held_out"]))]
    lines += [f"note: {visible(note)}" for note in document["notes"]]
    lines += ["", advice_on_budget(document)] if document["pick"] is not None else []
    if document["output"] is not None:
        picture = ", frontier.svg" if _measured_curves(document, name) else ""
        lines.append(f"saved: {document['output']}/frontier.json{picture} and frontier.html")
    return "\n".join(lines)


def settings_table(document: dict[str, Any]) -> Table:
    """One row for each setting; a column only where some setting has it."""
    golden, won = any(row["gold"] is not None for row in document["settings"]), has_wins(document)
    steps = any(step is not None for row in document["settings"] for step in row["steps_to_target"])
    share = any(row["efficiency"] is not None for row in document["settings"])
    table = [[
        "curve", "setting", "seeds", "KL", "95 %", "score", *(["gold"] if golden else []),
        *(["win rate"] if won else []), *(["of σ√(2 KL)"] if share else []), *(["steps to target"] if steps else []),
    ]]
    places = places_of(document["settings"], ("kl", "score", "gold", "win_rate"))
    for row in document["settings"]:
        cells = [
            row["curve"], row["setting"], str(row["seeds"]), with_error(row["kl"], row["kl_stderr"], places["kl"]),
            interval(row["kl_ci95"], places["kl"]), with_error(row["score"], row["score_stderr"], places["score"]),
        ]
        cells += [with_error(row["gold"], row["gold_stderr"], places["gold"])] if golden else []
        cells += [with_error(row["win_rate"], row["win_rate_stderr"], places["win_rate"])] if won else []
        cells += [ABSENT if row["efficiency"] is None else f"{number(100 * row['efficiency'], 0)} %"] if share else []
        cells += [", ".join(number(step) for step in row["steps_to_target"])] if steps else []
        table.append(cells)
    return table


def places_of(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, int]:
    """Places after the point for each column of figures with errors."""
    return {name: common_places((row[name], row[f"{name}_stderr"]) for row in rows) for name in names}


def best_of_n_table(document: dict[str, Any]) -> Table:
    """One row for each n; [] where best of n was not measured."""
    if document["best_of_n"] is None:
        return []
    points = document["best_of_n"]["points"]
    names = [name for name in ("score", "gold") if points[0][name] is not None]
    table, places = [["n", "KL at most", "with its ties", *names]], places_of(points, names)
    for point in points:
        scores = [with_error(point[name], point[f"{name}_stderr"], places[name]) for name in names]
        table.append([str(point["n"]), f"{point['kl_bound']:.3f}", f"{point['kl_with_ties']:.3f}", *scores])
    return table


def at_table(document: dict[str, Any]) -> Table:
    """A row for each curve, a column for each KL of ``--at``; [] without."""
    if not document["at"]:
        return []
    name = document["judge"]
    table = [["curve", *(f"{column['kl']:g} nats" for column in document["at"])]]
    for curve in document["at"][0]["curves"]:
        scores = [column["curves"][curve] or {} for column in document["at"]]
        table.append([curve, *(with_error(score.get(name), score.get(f"{name}_stderr")) for score in scores)])
    return table


def fit_line(fit: dict[str, Any]) -> str:
    """One fit in words."""
    law = fit["fit"]
    if law is None:
        return fit["claim"]
    clusters = "prompts" if fit["form"] == "best_of_n" else "runs"
    formula = "d(α − β log d)" if fit["form"] == "rl" else "d(α − β d)"
    alpha, beta = (f"{number(law[name])} (95 %: {interval(law[f'{name}_ci'])})" for name in ("alpha", "beta"))
    text = f"{formula} of the {fit['of']}'s gain, d = √KL: α {alpha}, β {beta}"
    if law["observed"]:
        peak = law["peak"]
        text += f"; peak at {number(peak['kl'])} nats (95 %: {interval(peak['kl_ci'])}), gain {number(peak['gain'])}"
    else:
        text += f"; {law['claim']}"
    return f"{text} ({law['points']} points of {law['runs']} {clusters})"


def advice_on_budget(document: dict[str, Any]) -> str:
    """Which setting to pick; without a budget, how many settings there are."""
    picked = document["pick"]
    if picked is None:
        curves = {row["curve"] for row in document["settings"]}
        return (
            f"{len(document['points'])} policies, {len(document['settings'])} settings on {len(curves)} "
            f"curve{'s' if len(curves) > 1 else ''}; --budget NATS picks one."
        )
    name, budget = picked["judge"], picked["budget"]
    if picked["curve"] is None:
        return f"budget {budget:g} nats: no setting with a known {spoken(name)} keeps within it at 95 % confidence."
    text = (
        f"budget {budget:g} nats: pick {picked['curve']}, {picked['setting']}: {spoken(name)} "
        f"{with_error(picked[name], picked[f'{name}_stderr'])} at {apart(picked['kl'], budget)[0]} nats "
        f"(95 %: {interval(picked['kl_ci95'], against=(budget,))})."
    )
    if not picked["better_than_reference"]:
        text += f" That is not shown to be better than the reference's own {number(picked['reference'])}."
    if picked["tied"]:
        others = "; ".join(f"{one['curve']}, {one['setting']} ({number(one['kl'])} nats)" for one in picked["tied"])
        text += f" Within error of it: {others}."
    return text
