"""What is read is written: recipes, their digests and differences, copies and the schema."""

import json

import pytest

from kltune.errors import RecipeError
from kltune.recipe import (
    STAGES,
    copy_recipe,
    differing_keys,
    dump_recipe,
    load_recipe,
    recipe_digest,
    recipe_schema,
)
from tests.recipe.test_reading import DPO, JUDGED, ONLINE, PPO, SFT, write


@pytest.mark.parametrize("text", [
    PPO, SFT, DPO, ONLINE, ONLINE.replace("mode: pair", "mode: score"),
    JUDGED.replace("m,", "m, rubric: \"Be: strict.\\n\\n- fair #1\\n\","),
    PPO + "lora: {targets: [a, '1e-5', 'yes', '010', 'null', ' ', 'a: b']}\noptim: {lr: 3e-7}\n",
])
def test_a_dumped_recipe_loads_again_to_an_equal_one(text, folder):
    recipe = load_recipe(write(folder, text))
    dumped = dump_recipe(recipe)
    again = load_recipe(write(folder, dumped, "again.yaml"))
    assert again == recipe
    assert dump_recipe(again) == dumped
    assert recipe_digest(again) == recipe_digest(recipe)


def test_the_recipe_in_a_run_folder_loads_although_its_function_lies_elsewhere(folder, tmp_path):
    recipe = load_recipe(write(folder, PPO))
    run = tmp_path / "run"
    run.mkdir()
    file = write(run, dump_recipe(recipe))
    with pytest.raises(RecipeError, match="the recipe's own folder"):
        load_recipe(file)
    for planted in ("{}", '{"schema": "kltune.run/1"}', '{"schema": "kltune.run/1", "recipe_sha256": "0"}', "[" * 9999):
        (run / "run.json").write_text(planted)      # no record of this recipe, whoever wrote it
        with pytest.raises(RecipeError, match="the recipe's own folder"):
            load_recipe(file)
    (run / "run.json").write_text(json.dumps({"schema": "kltune.run/1", "recipe_sha256": recipe_digest(recipe)}))
    assert load_recipe(file) == recipe
    assert load_recipe(file, ["kl.target=3"]).kl.target == 3.0


def test_a_recipe_cannot_be_changed(folder):
    recipe = load_recipe(write(folder, PPO))
    with pytest.raises(ValueError, match="frozen"):
        recipe.kl.target = 3.0
    with pytest.raises(ValueError, match="frozen"):
        recipe.stage = "sft"


def test_the_digest_is_of_the_numbers_not_of_where_they_are_kept(folder):
    file = write(folder, PPO)
    recipe = load_recipe(file)
    assert recipe_digest(load_recipe(file, ["run.keep=9"], output="x")) == recipe_digest(recipe)
    changed = load_recipe(file, ["kl.target=4", "reward.0.weight=2", "run.keep=9"])
    assert recipe_digest(changed) != recipe_digest(recipe)
    assert differing_keys(recipe, changed) == ["kl.target: was 6.0, now 4.0", "reward.0.weight: was 1.0, now 2.0"]
    assert differing_keys(recipe, recipe) == []


def test_how_patiently_a_judge_is_asked_is_not_part_of_the_numbers(folder):
    file = write(folder, JUDGED + "eval: {gold: {kind: judge, url: 'https://a/v1', model: m}}\n")
    recipe = load_recipe(file)
    keys = ["concurrency=1", "timeout_s=5", "retries=0", "key_env=A_KEY"]
    patient = [f"{entry}.{key}" for entry in ("reward.0", "eval.gold") for key in keys]
    assert recipe_digest(load_recipe(file, patient)) == recipe_digest(recipe)
    other = load_recipe(file, ["reward.0.rubric=other"])
    assert differing_keys(recipe, other)[0].startswith("reward.0.rubric: was")


def test_a_key_that_was_written_where_its_name_belongs_is_not_repeated(folder):
    with pytest.raises(RecipeError, match=r"reward\.0\.key_env: found something else") as caught:
        load_recipe(write(folder, JUDGED.replace("m,", "m, key_env: sk-123456789,")))
    assert "123456789" not in str(caught.value)


def test_the_schema_explains_every_key_and_knows_no_others():
    whole = recipe_schema()
    json.dumps(whole, allow_nan=False)
    assert set(whole["discriminator"]["mapping"]) == set(STAGES)
    sections = [section for section in whole["$defs"].values() if "properties" in section]
    assert len(sections) > 15
    for section in sections:
        assert section["additionalProperties"] is False
        for key, field in section["properties"].items():
            assert field.get("description"), f"{section['title']}.{key} has no description"


def test_each_stage_has_its_schema_and_no_other():
    assert [recipe_schema(stage)["properties"]["stage"]["const"] for stage in STAGES] == list(STAGES)
    with pytest.raises(RecipeError, match="no stage gpo"):
        recipe_schema("gpo")


def test_copying_takes_the_reward_function_along_and_overwrites_nothing(folder, tmp_path):
    file = write(folder, PPO)
    written, notes = copy_recipe(str(file), tmp_path / "mine")
    assert written == [tmp_path / "mine" / "recipe.yaml", tmp_path / "mine" / "rewards.py"]
    assert written[0].read_bytes() == file.read_bytes()
    lines = [note for note in notes if "data.prompts" in note]
    assert len(notes) == len(lines) == 1        # said once, with the line of each
    assert f"{written[0]}:4  data.prompts" in lines[0]
    assert "reward.0" not in lines[0]
    written[0].write_text("changed")
    with pytest.raises(RecipeError, match="already there"):
        copy_recipe(str(file), tmp_path / "mine")
    assert written[0].read_text() == "changed"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rewards.py").write_text("mine")
    with pytest.raises(RecipeError, match=r"rewards\.py is already there"):
        copy_recipe(str(file), tmp_path / "other" / "new.yaml")
    assert not (tmp_path / "other" / "new.yaml").exists()
