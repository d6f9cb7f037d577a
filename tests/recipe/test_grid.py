"""The points of a sweep: names that stay, and every fault of every point at once."""

from pathlib import Path

import pytest

from kltune.errors import RecipeError
from kltune.recipe import load_grid, load_recipe
from kltune.recipe.grid import point_name, split_values
from tests.recipe.test_reading import PPO, write


@pytest.fixture
def recipe(folder) -> str:
    return str(write(folder, PPO))


def test_the_grid_is_the_product_of_its_axes_the_last_one_fastest(recipe, tmp_path):
    axes, points = load_grid(recipe, ["kl.target=1,3", "run.seed=0,1"], ["optim.lr=1e-5"], output=tmp_path / "out")
    assert [(axis.key, axis.values) for axis in axes] == [("kl.target", ("1", "3")), ("run.seed", ("0", "1"))]
    assert [point.name for point in points] == [
        "kl.target=1,run.seed=0", "kl.target=1,run.seed=1", "kl.target=3,run.seed=0", "kl.target=3,run.seed=1",
    ]
    third = points[2]
    assert third.overrides == ("kl.target=3", "run.seed=0")
    wanted = load_recipe(recipe, ["optim.lr=1e-5", *third.overrides], output=str(tmp_path / "out" / third.name))
    assert third.recipe == wanted


@pytest.mark.parametrize(("text", "parts"), [
    ("1,3", ["1", "3"]), ("[q_proj,v_proj],all-linear", ["[q_proj,v_proj]", "all-linear"]),
    ("'a,b',c", ["'a,b'", "c"]), ("{x: [1,2]},3", ["{x: [1,2]}", "3"]), ("", [""]),
])
def test_commas_in_brackets_and_quotes_part_nothing(text, parts):
    assert split_values(text) == parts


@pytest.mark.parametrize(("overrides", "name"), [
    (["kl.target=3"], "kl.target=3"), (["kl.target=3.0"], "kl.target=3"), (["optim.lr=1e-3"], "optim.lr=0.001"),
    (["optim.lr=1.0e-05", "run.seed=7"], "optim.lr=1e-05,run.seed=7"), (["ppo.baseline=rloo"], "ppo.baseline=rloo"),
])
def test_a_name_does_not_depend_on_how_a_number_was_written(overrides, name):
    assert point_name(overrides) == name


def test_what_no_folder_can_be_called_keeps_its_own_name():
    names = [point_name([f"data.prompts={value}"]) for value in ("../a/b.jsonl", "../a-b.jsonl", "x" * 400, "x" * 401)]
    assert len(set(names)) == 4
    assert all("/" not in name and len(name) <= 200 for name in names)


def test_every_fault_of_every_point_is_told_once(recipe, tmp_path):
    with pytest.raises(RecipeError) as caught:
        load_grid(recipe, ["kl.target=1,-1,x", "run.seed=0,1"], ["kl.betta=2"], output=tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("recipe.yaml has 3 faults")
    assert [line.strip().partition(": ")[0] for line in lines[1:]] == [
        "--set kl.betta=2", "--over kl.target=-1", "--over kl.target=x",
    ]


@pytest.mark.parametrize(("over", "sets", "wanted"), [
    (["kl.target"], [], "wanted section.key=value,value"),
    (["kl.target=1,,2"], [], "wanted section.key=value,value"),
    (["kl.target=1", "kl.target=2"], [], "given to --over twice"),
    (["kl.target=1,1.0"], [], "a value is given twice"),
    (["kl.target=1"], ["kl.target=2"], "also given to --set"),
    (["run.output=a,b"], [], "a folder of its own"),
    (["stage=ppo,trpo"], [], "one stage"),
    (["run.keep=1,2"], [], "the same run as run.keep=1"),
])
def test_what_is_no_grid_is_refused(recipe, tmp_path, over, sets, wanted):
    with pytest.raises(RecipeError, match=wanted):
        load_grid(recipe, over, sets, output=tmp_path)


def test_a_packaged_recipe_makes_a_grid_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, points = load_grid("tiny/ppo_target", ["kl.target=2,4"], output=Path("out"))
    assert [point.recipe.kl.target for point in points] == [2.0, 4.0]
