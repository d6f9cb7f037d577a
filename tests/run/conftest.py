"""A recipe that needs no model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kltune.recipe import PPORecipe, load_recipe

RECIPE = """
stage: ppo
model: {path: some/model}
data: {prompts: prompts.jsonl}
reward:
  - {kind: function, path: "rewards.py:score"}
run: {steps: 10, output: out}
"""


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., PPORecipe]:
    """A function from overrides to a recipe whose output is ``tmp_path/out``."""
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "prompts.jsonl").write_text('{"prompt": "once"}\n')
    (folder / "rewards.py").write_text("def score(prompts, responses):\n    return [0.0] * len(prompts)\n")
    (folder / "ppo.yaml").write_text(RECIPE)

    def make(*overrides: str, output: str = "out") -> PPORecipe:
        return load_recipe(folder / "ppo.yaml", overrides, output=str(tmp_path / output))

    return make
