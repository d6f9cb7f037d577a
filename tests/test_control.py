"""``scripts/control.py``: its rows, and a slice of its bench, where a reward has a constant, a scale, or is rare."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def bench(folder: Path, stories_model: str, *options: str) -> tuple[list[dict], str]:
    """The rows and the table of a bench on a few openings of stories."""
    openings = ("Once upon a time", "One day, Lily", "The little dog", "Tom had a red ball", "Mom said", "In the park")
    prompts = folder / "openings.jsonl"
    rows = [json.dumps({"prompt": f"{opening} {n}"}) for n in range(40) for opening in openings]
    prompts.write_text("\n".join(rows) + "\n")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "control.py", folder / "out", "--model", stories_model,
         "--prompts", prompts, "--new-tokens", "24", *options],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in (folder / "out" / "rows.jsonl").read_text().splitlines()], done.stdout


def test_a_row_for_each_run_and_none_again(tmp_path, stories_model):
    options = ("--rewards", "learnt", "judge", "--methods", "dpo", "--targets", "1", "--seeds", "0", "--steps", "3",
               "--responses", "16")
    rows, table = bench(tmp_path, stories_model, *options)
    assert [(row["reward"], row["method"], row["target"], row["seed"]) for row in rows] == [
        ("learnt", "dpo", 1.0, 0), ("judge", "dpo", 1.0, 0)
    ]
    assert table.count("| dpo | 1 | 0 |") == 2
    assert bench(tmp_path, stories_model, *options) == (rows, table)


def test_a_constant_on_every_score_changes_neither_kl_nor_score_and_the_target_is_met(tmp_path, stories_model):
    rows, _ = bench(
        tmp_path, stories_model, "--rewards", "dense", "dense_shifted", "--methods", "rloo", "--targets", "1",
        "--seeds", "0", "--steps", "14", "--responses", "64",
    )
    plain, shifted = rows
    # Not to the last digit: beside 50 a score loses bits, and one other token changes all that follow.
    assert shifted["kl"] == pytest.approx(plain["kl"], abs=4 * math.hypot(plain["stderr"], shifted["stderr"]))
    assert shifted["after"] + 50.0 == pytest.approx(plain["after"], abs=0.25)
    for row in rows:
        assert 0.5 < row["kl"] < 1.2
        assert row["peak"] < 1.25
        assert row["after"] > row["before"] + 0.15
