"""The frontier's page says what to pick and shows it: the budget in the picture, the pick in picture and table."""

import json
import re
from pathlib import Path

import pytest

from kltune.report.frontier.page import fit_line, frontier_html, frontier_svg, frontier_text, settings_table
from kltune.stages.sweeps.frontier import FrontierOptions, frontier
from tests.report.test_pages import Tags, assert_loads_and_runs_nothing


@pytest.fixture
def document(make_run):
    """Three targets with a budget for two of them, the second the better."""
    runs = [
        make_run(f"t{target:g}", f"kl.target={target}", kl=kl, score=score, target=target)
        for target, kl, score in ((1.0, 0.87, 0.2), (4.0, 3.5, 0.9), (8.0, 7.25, 1.4))
    ]
    return frontier(runs, FrontierOptions(best_of=0, budget=4.0)) | {"judge": "score"}


def test_budget_and_pick_are_in_picture_and_table(document):
    svg = frontier_svg(document, "score", inside=True)
    text = re.sub(r"<[^>]*>", " ", svg)
    assert "budget 4 nats" in text
    assert "pick: kl.target=1" in text      # gold, on which all are alike, picks the first
    assert "the axis is spaced by square roots" in text
    page = frontier_html(document)
    assert_loads_and_runs_nothing(page)
    picked, = re.findall(r'<tr class="pick">(.*?)</tr>', page, re.DOTALL)
    assert "kl.target=1" in picked
    read = " ".join(Tags(page).text.split())
    assert "Budget 4 nats: pick ppo target, kl.target=1" in read
    assert "axis spaced by square roots" in read


def test_without_a_budget_nothing_is_drawn_or_picked(document):
    document["pick"] = None
    assert "budget" not in frontier_svg(document, "score")
    assert 'class="pick"' not in frontier_html(document)


def test_a_column_has_equal_places(document):
    heading, *rows = settings_table(document)
    cells = {name: [row[index] for row in rows] for index, name in enumerate(heading)}
    assert cells["KL"] == ["0.87 ± 0.10", "3.50 ± 0.10", "7.25 ± 0.10"]
    assert cells["95 %"] == ["0.67 to 1.07", "3.30 to 3.70", "7.05 to 7.45"]
    assert cells["score"] == ["0.20 ± 0.05", "0.90 ± 0.05", "1.40 ± 0.05"]


def test_a_fit_is_written_with_signs_as_wide_as_a_plus():
    law = {"alpha": -0.5, "alpha_ci": (-1.0, 0.25), "beta": -0.125, "beta_ci": (-0.25, 0.5), "observed": False,
           "claim": "no peak yet", "points": 9, "runs": 9}
    line = fit_line({"form": "rl", "of": "score", "fit": law})
    assert "α −0.5 (95 %: −1.00 to 0.25), β −0.125 (95 %: −0.25 to 0.50)" in line


def test_where_nothing_is_scored_there_is_a_page_and_no_picture(make_run, tmp_path):
    runs = [make_run(f"t{seed}", f"run.seed={seed}", score=None) for seed in (0, 1)]
    for run in runs:
        result = json.loads((file := Path(run) / "result.json").read_text())
        file.write_text(json.dumps(result | {"eval": {}}))
    folder = tmp_path / "frontier"
    folder.mkdir()
    (folder / "frontier.svg").write_text("of another")
    document = frontier(runs, FrontierOptions(best_of=0, budget=4.0, output=str(folder)))
    assert sorted(path.name for path in folder.iterdir()) == ["frontier.html", "frontier.json"]
    read = " ".join(Tags((folder / "frontier.html").read_text()).text.split())
    assert "no setting with a known score keeps within it" in read
    assert frontier_text(document).endswith(f"saved: {folder}/frontier.json and frontier.html")
