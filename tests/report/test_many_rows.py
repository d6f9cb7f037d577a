"""A run of many steps: its page costs one reading, is no larger than one of few steps, and hides no extreme."""

import json
import random

from kltune.report.figures import KLLimits, Recorded, draw, plots_for
from kltune.report.pages import write_page
from kltune.report.plots import MOST_POINTS, Z95, thinned
from kltune.run.files import read_metrics

NAMES = ("kl/ref_nats_per_response", "score/mean", "kl/beta", "ppo/clip_fraction", "eval/score_mean", "eval/gold_mean")


def rows_of(count: int) -> list[dict[str, float]]:
    numbers = random.Random(0)
    errors = {"kl/ref_stderr": 0.5, "eval/score_stderr": 0.5}
    return [
        {"step": step, **{name: 1.0 + numbers.random() for name in NAMES}, **errors} for step in range(1, count + 1)
    ]


def test_a_thinned_series_keeps_its_ends_and_the_extremes_of_values_and_intervals():
    numbers = random.Random(1)
    series = [(step, numbers.gauss(0.0, 1.0), numbers.random()) for step in range(50_000)]
    for at, value in ((20_001, 40.0), (33_333, -40.0)):
        series[at] = (at, value, None)
    series[40_404] = (40_404, 1.0, 90.0)
    found = thinned(series)
    assert len(found) <= MOST_POINTS < len(series) / 20
    assert found == sorted(found)
    assert set(found) <= set(series)
    assert found[0] == series[0]
    assert found[-1] == series[-1]
    assert {(20_001, 40.0, None), (33_333, -40.0, None), (40_404, 1.0, 90.0)} <= set(found)
    for begin in range(0, 50_000, 2_500):       # the same look: every stretch reaches as far up and down as before
        whole, drawn = ([point for point in points if begin <= point[0] < begin + 2_500] for points in (series, found))
        for sign in (-1.0, 1.0):
            for width in (0.0, Z95):
                ends = [max(sign * v + width * (e or 0.0) for _, v, e in points) for points in (whole, drawn)]
                assert ends[0] == ends[1]


def test_a_short_series_is_drawn_as_it_is():
    series = [(float(step), float(step % 7), None) for step in range(MOST_POINTS)]
    assert thinned(series) == series


class Counted(list):
    """Rows that count how often they are gone through, all of them or from the end."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_rows_are_read_once_for_all_pictures_and_once_for_each_curve():
    rows = Counted(rows_of(50))
    recorded = Recorded(rows, {})
    drawn = [draw(plot, recorded, KLLimits(target=1.5)) for plots in plots_for(KLLimits()).values() for plot in plots]
    assert sum(figure is not None for figure in drawn) == 5
    assert rows.passes <= 2 + len(NAMES)        # the names, the last step, and each curve


def test_a_page_of_many_steps_is_as_large_as_one_of_few(run_folder):
    sizes = [
        write_page(run_folder(name=f"run-{count}", rows=rows_of(count))).stat().st_size for count in (3_000, 9_000)
    ]
    assert sizes[1] < 1.05 * sizes[0]


def test_names_of_metrics_are_kept_once(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(3)))
    first, *_, last = read_metrics(tmp_path)
    assert all(one is other for one, other in zip(first, last, strict=True))
