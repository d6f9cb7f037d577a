"""Python that other people's folders name runs only where it was asked for, after it was compared."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

from kltune.recipe import load_recipe, recipe_digest

SPRUNG = "import pathlib\npathlib.Path({sprung!r}).touch()\ndef score(prompts, responses):\n    return []\n"


@pytest.fixture
def changed_run(run_folder, tmp_path) -> tuple[Path, Path]:
    """A finished run whose recipe names other Python, by a function from where that lies; and what it leaves."""
    copy, sprung = tmp_path / "run", tmp_path / "sprung"
    shutil.copytree(run_folder, copy)
    return copy, sprung


@pytest.mark.parametrize("inside", [True, False])
def test_a_frontier_compares_the_python_of_a_run_before_it_runs(changed_run, tmp_path, command, inside):
    run, sprung = changed_run
    code = (run if inside else tmp_path) / "evil.py"
    code.write_text(SPRUNG.format(sprung=str(sprung)))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["reward"][0]["path"] = f"{'evil.py' if inside else code}:score"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"recipe_sha256": "0" * 64}))
    planted = command("frontier", run)
    if not inside:      # a record that fits the recipe lets it name the file; what it was trained on stays the same
        (run / "run.json").write_text(json.dumps(record))
        assert planted[0] == 2
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kltune.recipe.reading.is_recorded", lambda *_: True)
            (run / "run.json").write_text(json.dumps(record | {"recipe_sha256": recipe_digest(
                load_recipe(run / "recipe.yaml"))}))
        planted = command("frontier", run)
    assert planted[0] == 5
    assert "It was not run" in planted[2]
    assert not sprung.exists()


def test_a_run_that_was_forged_whole_cannot_lead_to_python_beside_it(changed_run, tmp_path, command, monkeypatch):
    """All digests fit; but whoever hands a folder over does not know where it will lie."""
    run, sprung = changed_run
    (tmp_path / "evil.py").write_text(SPRUNG.format(sprung=str(sprung)))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert Path(recipe["reward"][0]["path"]).is_absolute()
    recipe["reward"][0]["path"] = "../evil.py:score"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with monkeypatch.context() as patch:
        patch.setattr("kltune.recipe.checks.os.path.isabs", lambda _: True)
        patch.setattr("kltune.recipe.reading.is_recorded", lambda *_: True)
        digest = recipe_digest(load_recipe(run / "recipe.yaml"))
    record = json.loads((run / "run.json").read_text())
    record["rewards"][0]["sha256"] = hashlib.sha256((tmp_path / "evil.py").read_bytes()).hexdigest()
    (run / "run.json").write_text(json.dumps(record | {"recipe_sha256": digest}))
    code, _, err = command("frontier", run)
    assert code == 2
    assert "../evil.py, wanted a file in the recipe's own folder" in err
    assert not sprung.exists()


@pytest.mark.parametrize("stage", ["ppo", "sweep"])
def test_a_recipe_alone_never_has_a_models_python_run(ppo_recipe, tmp_path, command, stage):
    recipe = next(tmp_path.glob("*/recipe.yaml"))
    words = {"ppo": [], "sweep": ["--over", "run.seed=0,1"]}[stage]
    code, _, err = command(stage, "--recipe", recipe, "--set", "model.trust_remote_code=true", *words, "-o",
                           tmp_path / "out")
    assert code == 2
    assert "--trust-remote-code" in err
    assert not (tmp_path / "out").exists()
