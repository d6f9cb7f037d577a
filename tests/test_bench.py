"""``scripts/bench.py`` runs what it times, and says what moved between two of its documents."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench_compare import compare

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("stage", ["ppo", "trpo", "dpo", "distill"])
def test_a_step_of_a_stage_is_timed(stories_model, stage):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench.py", stage, "--model", stories_model, "--responses", "8",
         "--new-tokens", "8", "--repeat", "1", "--json"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{stage}, 8 responses:" in done.stderr
    document = json.loads(done.stdout)
    assert document["rows"][0]["kernels"] > document["rows"][0]["waits"] > 0
    assert {"commit", "date", "machine", "threads"} < document.keys()


ROW = {
    "work": "ppo", "model": "m", "responses": 8, "seconds": 2.0, "range": [1.9, 2.2], "responses_per_second": 4.0,
    "update_seconds": 1.0, "peak_mb_above_model": 100.0, "kernels": 500, "waits": 10,
}
PLACE = {"commit": "a", "date": "2026-01-01", "machine": "one", "threads": 2}


@pytest.mark.parametrize(("change", "moved", "code"), [
    ({}, "ppo, m, responses 8: nothing moved", 0),
    ({"seconds": 2.3, "range": [2.1, 2.6]}, "nothing moved", 0),                     # the ranges overlap
    ({"seconds": 1.0, "range": [0.9, 1.1]}, "seconds                                2 ->            1  x 0.50", 0),
    ({"update_seconds": 1.05}, "nothing moved", 0),
    ({"peak_mb_above_model": 120.0}, "peak mb above model                  100 ->          120  x 1.20", 0),
    ({"kernels": 499}, "kernels                              500 ->          499  x 1.00", 0),
    ({"waits": 11}, "waits                                 10 ->           11  x 1.10", 1),
    ({"responses": 16}, "only after: ppo, m, responses 16", 0),
], ids=str)
def test_what_moved_is_told_from_chance(tmp_path, capsys, change, moved, code):
    for name, row in (("a", ROW), ("b", ROW | change)):
        (tmp_path / f"{name}.json").write_text(json.dumps(PLACE | {"rows": [row]}))
    assert compare(tmp_path / "a.json", tmp_path / "b.json") == code
    said = capsys.readouterr().out
    assert moved in said
    assert "Not of one kind" not in said


def test_seconds_of_another_machine_are_not_compared_in_silence(tmp_path, capsys):
    for name, machine in (("a", "one"), ("b", "another")):
        (tmp_path / f"{name}.json").write_text(json.dumps(PLACE | {"machine": machine, "rows": [ROW]}))
    assert compare(tmp_path / "a.json", tmp_path / "b.json") == 0
    assert "Not of one kind of machine" in capsys.readouterr().out
