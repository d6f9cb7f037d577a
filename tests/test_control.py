"""``scripts/control.py``: its rows, and a slice of its bench, where a reward has a constant, a scale, or is rare."""

import json
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


@pytest.mark.parametrize("method", ["rloo", "value"])
def test_shift_and_scale_of_a_reward_change_neither_kl_nor_score(tmp_path, stories_model, method):
    rows, _ = bench(
        tmp_path, stories_model, "--rewards", "dense", "dense_shifted", "--methods", method, "--targets", "2",
        "--seeds", "0", "--steps", "16", "--responses", "64",
    )
    plain, shifted = rows
    assert shifted["kl"] == pytest.approx(plain["kl"], rel=0.02)
    assert shifted["after"] + 50.0 == pytest.approx(plain["after"], rel=0.02)
    assert 0.8 * 2.0 < plain["kl"] < 1.15 * 2.0
    assert plain["peak"] < 1.25
    assert plain["after"] > plain["before"] + 0.3
