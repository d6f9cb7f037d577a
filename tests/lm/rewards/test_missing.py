"""What a recipe names and is not there is said at once, with its line, and before torch is imported."""

import json

import pytest

from kltune.lm.rewards.missing import check_inputs
from kltune.recipe import InputFaults, load_recipe

RECIPE = """\
stage: ppo
model:
  path: model
data:
  prompts: prompts.jsonl
reward:
  - kind: function
    path: "rewards.py:score"
eval:
  prompts: held_out.jsonl
"""
USER = {"role": "user", "content": "a"}


@pytest.fixture
def folder(tmp_path):
    """A folder in which all is there that RECIPE names."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text("{}")
    for name in ("prompts.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a"}\n')
    (tmp_path / "rewards.py").write_text("def score(prompts, responses):\n    return [0.0] * len(responses)\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def faults(folder):
    """A function from changes of keys to what is wrong then, by key, with the line."""

    def found(*overrides: str) -> dict[str, tuple[int, str]]:
        with pytest.raises(InputFaults) as caught:
            check_inputs(load_recipe(folder / "recipe.yaml", overrides))
        assert caught.value.exit_code == 5
        return {fault.key: (fault.place.line, fault.text) for fault in caught.value.faults}

    return found


def test_all_is_there(folder):
    assert check_inputs(load_recipe(folder / "recipe.yaml")) == []


def test_all_that_is_missing_is_said_at_once_with_its_line(folder, faults):
    for name in ("prompts.jsonl", "held_out.jsonl", "rewards.py"):
        (folder / name).unlink()
    (folder / "prompt.jsonl").write_text("")
    (folder / "model").rename(folder / "modell")
    assert {key: line for key, (line, _) in faults().items()} == {
        "model.path": 3, "data.prompts": 5, "reward.0.path": 8, "eval.prompts": 10}
    assert faults()["data.prompts"][1].endswith("prompts.jsonl does not exist; did you mean prompt.jsonl?")
    assert faults()["model.path"][1] == "found model, which is no folder here; did you mean modell?"


@pytest.mark.parametrize(("missing", "words"), [
    ("config.json", "holds no model (config.json is missing)"),
    ("model.safetensors", "holds no weights in safetensors"),
    ("tokenizer.json tokenizer_config.json", "holds no tokenizer"),
])
def test_a_folder_that_is_no_model_is_told_by_what_it_lacks(folder, faults, missing, words):
    for name in missing.split():
        (folder / "model" / name).unlink()
    assert words in faults()["model.path"][1]


@pytest.mark.parametrize("path", ["models/small", "./small", "/no/such/model", "a/b/c", "model/small"])
def test_a_missing_folder_is_never_looked_up_on_the_hub(faults, path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert "is no folder here" in faults(f"model.path={path}")["model.path"][1]


def test_a_name_on_the_hub_is_looked_up_by_the_run_unless_that_is_forbidden(folder, faults, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    note, = check_inputs(load_recipe(folder / "recipe.yaml", ["model.path=some-one/some-model"]))
    assert "the run looks it up on the hub" in note
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "not in the cache" in faults("model.path=some-one/some-model")["model.path"][1]


@pytest.mark.parametrize(("code", "words"), [
    ("def other(prompts, responses): ...", "has no function 'score'"),
    ("import no_such_module_here", "ModuleNotFoundError"),
    ("def score(responses): ...", "cannot be called with prompts and responses"),
    ("def score(prompts, responses):", "IndentationError"),
])
def test_a_function_that_cannot_be_called_is_told_before_the_run(folder, faults, code, words):
    (folder / "rewards.py").write_text(code)
    assert words in faults()["reward.0.path"][1]


@pytest.mark.parametrize(("rows", "words"), [
    ([{"question": "a"}], "data.columns: {prompt: question}"),
    ([{"prompt": "a"}, {"prompt": ""}], "prompts.jsonl:2: field"),
    ([], "has no rows"),
    ([{"messages": [USER]}], "no chat template to write them; write data.chat_template: FILE"),
])
def test_rows_are_looked_at_without_a_tokenizer(folder, faults, rows, words):
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert words in faults()["data.prompts"][1]


def test_a_chat_template_from_a_file_will_do_if_it_is_one(folder, faults):
    (folder / "prompts.jsonl").write_text(json.dumps({"messages": [USER]}) + "\n")
    (folder / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert check_inputs(load_recipe(folder / "recipe.yaml", ["data.chat_template=chat.jinja"])) == []
    (folder / "chat.jinja").write_text("{% for m in messages %}\n{{ m.content }}")
    assert "chat.jinja:2: not a Jinja template" in faults("data.chat_template=chat.jinja")["data.chat_template"][1]


def test_the_key_of_a_judge_has_to_be_set(faults, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    judge = "{kind: judge, url: 'http://127.0.0.1:1/v1', model: m, key_env: NO_SUCH_KEY}"
    assert "NO_SUCH_KEY is not set" in faults(f"reward=[{judge}]")["reward.0.key_env"][1]


def test_a_run_stands_for_nothing_but_its_final(folder, faults):
    for name in ("runs/sft/final", "runs/judge/final"):
        (folder / name).mkdir(parents=True)
    found = faults("model.sft_adapter=runs/sft", "reward=[{kind: model, path: runs/judge}]")
    assert found["model.sft_adapter"][1].endswith("of a run write " + str(folder / "runs/sft/final"))
    assert found["reward.0.path"][1].endswith("of a run write " + str(folder / "runs/judge/final"))
