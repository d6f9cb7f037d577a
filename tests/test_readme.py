"""What the README and the guides show can be typed: commands exist, recipes are sound, files and modules are there."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from kltune.cli import app
from kltune.recipe import STAGES, load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = sorted((ROOT / "kltune" / "docs").glob("*.md"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *GUIDES)}
BLOCKS = [
    (name, language, text) for name, page in TEXTS.items()
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```", page, re.M | re.S)
]
COMMAND = re.compile(r"^(?:\$ |- run: |for .* do )?kltune (.+)$")       # at a prompt, in a workflow, in a loop
COMMANDS = [
    pytest.param(re.split(r"; | > ", match[1])[0], id=f"{name}: {match[1]}")
    for name, _, text in BLOCKS for line in re.sub(r"\\\n\s*", "", text).splitlines()
    if (match := COMMAND.match(line.strip()))
]
SECTIONS = {key for stage in STAGES.values() for key in stage.model_fields}
YAML = [
    pytest.param(text, id=f"{name}: {text.splitlines()[0]}")
    for name, language, text in BLOCKS if language == "yaml" and yaml.safe_load(text).keys() <= SECTIONS
]
FRAME = """\
stage: ppo
model: {path: some/model}
data: {prompts: prompts.jsonl}
reward: [{kind: function, path: "rewards.py:score"}]
run: {steps: 1}
"""
HOUSE = README.partition("\n## The house\n")[2].partition("\n## ")[0]
MAP = re.findall(r"^  (\S+) +(\S.*)$", re.sub(r"\n {3,}", " ", HOUSE), re.M)       # a row may be wrapped


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_one_that_kltune_reads(line: str):
    command, words = typer.main.get_command(app), shlex.split(line, comments=True)
    context = command.context_class(command, info_name="kltune")
    while hasattr(command, "resolve_command"):
        _, command, words = command.resolve_command(context, words)
        context = command.context_class(command, info_name=command.name, parent=context)
    command.parse_args(context, words)      # reads every option, runs nothing; refuses what it does not know
    assert set(context.params) == {parameter.name for parameter in command.params if parameter.expose_value}


@pytest.mark.parametrize("text", YAML)
def test_a_recipe_is_sound_and_a_part_of_one_fits_into_a_whole(text: str, tmp_path: Path):
    whole = text if "stage" in yaml.safe_load(text) else yaml.safe_dump(yaml.safe_load(FRAME) | yaml.safe_load(text))
    for name in re.findall(r"[\w/]+\.(?:py|jsonl)", whole):
        (tmp_path / name).touch()
    (tmp_path / "recipe.yaml").write_text(whole, encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml").stage == yaml.safe_load(whole)["stage"]


def test_there_are_commands_and_recipes_to_try():
    assert len(COMMANDS) >= 25
    assert len(YAML) >= 3


def test_the_readme_can_be_read_at_one_sitting():
    assert len(README.splitlines()) <= 250


def test_every_guide_is_in_the_table_of_guides():
    table = README.partition("\n## Guides\n")[2].partition("\n## ")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")][1:]
    assert sorted(re.findall(r"`([\w-]+)`", " ".join(cells))) == [path.stem for path in GUIDES]


def test_every_promise_names_a_test_that_is_there():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXTS["reliability.md"])
    assert len(named) >= 20
    assert [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / file).read_text()] == []


def test_the_house_map_names_what_is_there_and_all_of_it():
    rooms = {path.name for path in (ROOT / "kltune").iterdir() if not path.name.startswith(("_", "."))}
    assert {name.rstrip("/") for name, _ in MAP} == rooms
    for room, words in MAP:
        named = set(re.findall(r"[\w-]+", words.partition(": ")[2]))
        there = {path.stem for path in (ROOT / "kltune" / room).glob("*") if not path.name.startswith("_")}
        assert not named or named == there, room        # a room whose row lists its modules lists all of them
    outside = re.search(r"^\w+/ .*?  ", HOUSE, re.M)[0].split()
    assert all((ROOT / folder / "README.md").is_file() for folder in outside)
    for path in re.findall(r"`([\w/]+(?:\.py|/))`", HOUSE):
        assert (ROOT / "kltune" / path).exists(), path
