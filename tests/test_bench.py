"""``scripts/bench.py`` runs what it times."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("stage", ["ppo", "trpo", "dpo"])
def test_a_step_of_a_stage_is_timed(stories_model, stage):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench.py", stage, "--model", stories_model, "--responses", "8",
         "--new-tokens", "8", "--repeat", "1"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{stage}, 8 responses:" in done.stdout + done.stderr
