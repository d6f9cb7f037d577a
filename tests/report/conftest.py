"""Run folders that were never run."""

import json
from pathlib import Path

import pytest

from kltune.recipe import dump_recipe, recipe_digest

RECORD = {
    "schema": "kltune.run/1", "versions": {"torch": "2.13.0"}, "started": "2026-11-22T15:00:00+00:00", "ended": None,
    "command": "kltune ppo --recipe r.yaml", "resumed_at": [], "error": None,
    "reference": {"path": "some/model", "sha256": "0123456789abcdef" * 4, "template_sha256": None},
}


@pytest.fixture
def run_folder(make_recipe):
    """A function that writes a run folder from its parts, and returns it: finished where there is a result."""

    def write(*overrides: str, name="out", rows=(), samples=(), result=None, **record: object) -> Path:
        recipe = make_recipe(*overrides, output=name)
        folder = Path(recipe.run.output)
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(dump_recipe(recipe))
        about = {"stage": recipe.stage, "status": "finished" if result else "running", "seed": recipe.run.seed,
                 "recipe_sha256": recipe_digest(recipe)}
        (folder / "run.json").write_text(json.dumps(RECORD | about | record))
        for file, lines in (("metrics.jsonl", rows), ("samples.jsonl", samples)):
            (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        if result is not None:
            (folder / "result.json").write_text(json.dumps(result))
        return folder

    return write
