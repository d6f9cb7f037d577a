"""``kltune init``: what it writes runs without editing, for every kind of data and with or without a chat template."""

import csv
import json
import shlex
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kltune.cli import main
from kltune.recipe import load_recipe

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant {% endif %}"
REWARD = "import helper\n\n\ndef score(prompts, responses):\n    return helper.lengths(responses)\n"
TURNS = [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5 w6"}]
HH = {"chosen": "\n\nHuman: w3\n\nAssistant: w4 w5", "rejected": "\n\nHuman: w3\n\nAssistant: w5 w4"}
PLAIN = {"prompt": "w3 w4"}
SHARED = {"conversations": [{"from": "human", "value": "w3 w4"}, {"from": "gpt", "value": "w5 w6"}]}
ALPACA = {"instruction": "w3", "input": "w4", "output": "w5 w6"}
QUICK = ["run.steps=1", "eval.responses=4", "sampling.max_new_tokens=4"]


@pytest.fixture
def init(tmp_path, tiny_model, capsys, monkeypatch):
    """Write a model (with a chat template or without), data and a reward, and call ``kltune init`` on them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helper.py").write_text("def lengths(texts):\n    return [float(len(text)) for text in texts]\n")
    (tmp_path / "rewards.py").write_text(REWARD)

    def call(rows, *arguments, chat=False, name="rows.jsonl", output="out"):
        folder = shutil.copytree(tiny_model("llama"), tmp_path / "model", dirs_exist_ok=True)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        config |= {"chat_template": TEMPLATE} if chat else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if name.endswith(".csv"):
            with open(name, "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter=";")
                writer.writeheader()
                writer.writerows(rows)
        elif name == "rows":
            datasets.Dataset.from_list(rows).save_to_disk(name)
        elif name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), name)
        elif name.endswith(".json"):
            (tmp_path / name).write_text(json.dumps(rows, indent=1))
        elif name.endswith(".txt"):
            (tmp_path / name).write_text("".join(f"{row['prompt']}\n" for row in rows))
        else:
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(SystemExit) as left:
            main(["init", *arguments, "--model", "model", "--prompts", name, "--output", output])
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return call


@pytest.mark.parametrize(("rows", "name", "arguments", "chat", "keys"), [
    (PLAIN, "rows.jsonl", ["--reward", "rewards.py"], False, {"stage": "ppo", "template": "auto"}),
    (PLAIN, "rows.jsonl", ["--reward", "rewards.py"], True, {"stage": "ppo", "template": "chat"}),
    (HH, "rows.jsonl", [], False, {"stage": "dpo", "template": "auto"}),
    (HH, "rows.jsonl", [], True, {"stage": "dpo", "template": "auto"}),
    (HH, "rows.jsonl", ["reward"], True, {"stage": "reward"}),
    ({"id": 1, "question": "w3 w4", "answer": "w5"}, "rows.csv", [], True,
     {"stage": "sft", "template": "chat", "columns": {"prompt": "question", "response": "answer"}}),
    ({"messages": json.dumps(TURNS)}, "rows.csv", ["trpo"], False,
     {"stage": "trpo", "chat_template": "chat.jinja"}),
    ({"messages": TURNS}, "rows.parquet", [], True, {"stage": "sft"}),
    ({"messages": TURNS}, "rows.parquet", ["--reward", "rewards.py"], False, {"chat_template": "chat.jinja"}),
    (SHARED, "rows.parquet", [], True, {"stage": "sft"}),
    (SHARED, "rows.json", [], True, {"stage": "sft"}),
    (SHARED, "rows.json", ["--reward", "rewards.py"], True, {"stage": "ppo"}),
    (ALPACA, "rows.json", [], False, {"stage": "sft"}),
    (ALPACA, "rows.json", ["--reward", "rewards.py"], True, {"stage": "ppo"}),
    (PLAIN, "rows.txt", ["--reward", "rewards.py"], False, {"stage": "ppo"}),
    (PLAIN, "rows", ["--reward", "rewards.py"], False, {"stage": "ppo"}),
])
def test_what_it_writes_runs_as_it_is(init, rows, name, arguments, chat, keys, tmp_path, monkeypatch):
    other = {key: value.replace("w3", "w6") if isinstance(value, str) and key != "messages" else value
             for key, value in rows.items()}
    code, out, err = init([rows, other] * 8, *arguments, chat=chat, name=name)
    assert code == 0, err
    (file,) = (tmp_path / "out").glob("*.yaml")
    recipe = load_recipe(file)
    found = {"stage": recipe.stage, **recipe.data.model_dump()}
    found["chat_template"] = found["chat_template"] and "chat.jinja"
    assert found | keys == found
    lines = file.read_text().splitlines()
    shown = [line.split() for line in out.splitlines() if f"{file.name}:" in line]
    assert len(shown) == 3
    for place, key in shown:
        assert lines[int(place.rpartition(":")[2]) - 1].strip().startswith((key.rpartition(".")[2], "- {"))
    more = [word for key in QUICK[: 1 if recipe.stage == "reward" else None] for word in ("--set", key)]
    monkeypatch.setattr("kltune.train.evaluation.finish.write_page", lambda folder: None)
    with pytest.raises(SystemExit) as left:
        main([recipe.stage, "--recipe", str(file), *more])
    assert left.value.code == 0
    assert (tmp_path / "out" / "runs" / recipe.stage / "result.json").exists()


@pytest.mark.parametrize(("rows", "arguments", "code", "words"), [
    ([PLAIN], [], 2, "nothing says which answers are good: give --reward rewards.py"),
    ([PLAIN], ["nosuch"], 2, "no stage nosuch; the stages are sft"),
    ([PLAIN], ["distill"], 2, "copy one: kltune recipe copy tiny/distill"),
    ([PLAIN], ["dpo"], 5, "found prompt; wanted prompt, chosen, rejected"),
    ([{"text": "a"}], ["sft", "--reward", "rewards.py"], 2, "--reward is for ppo and trpo"),
    ([{"prompt": None, "id": 1}], ["--reward", "rewards.py"], 5, 'field "prompt": found null, wanted a value'),
    ([{"prompts": ["a", "b"]}], ["--reward", "rewards.py"], 5, "jq -c '.prompts[] | {prompt: .}' FILE"),
    ([PLAIN], ["--reward", "no.py"], 5, "--reward: no.py does not exist"),
    ([PLAIN], ["--reward", "rewards.txt"], 2, "wanted rewards.py"),
    ([HH, HH | {"rejected": HH["chosen"]}, HH | {"chosen": "x"}], ["dpo"], 5, "2 of 3 rows are faulty"),
])
def test_what_cannot_be_begun_says_what_is_wanted(init, rows, arguments, code, words, tmp_path):
    left, out, err = init(rows, *arguments)
    assert (left, out) == (code, "")
    assert words in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", ["{bad", '{"id2label": {"a": "x", "b": "y"}}', '{"id2label": [1, 2]}'])
def test_a_scorer_whose_config_is_odd_is_named(init, tmp_path, config):
    (tmp_path / "scorer").mkdir()
    (tmp_path / "scorer" / "config.json").write_text(config)
    left, _, err = init([PLAIN], "--reward", str(tmp_path / "scorer"))
    assert left == 5
    assert "scorer/config.json" in err


def test_nothing_is_overwritten(init, tmp_path):
    assert init([PLAIN] * 4, "--reward", "rewards.py")[0] == 0
    (tmp_path / "out" / "rewards.py").write_text("# mine\n")
    code, _, err = init([PLAIN] * 4, "--reward", "rewards.py")
    assert (code, "rewards.py is already there" in err) == (2, True)
    assert (tmp_path / "out" / "rewards.py").read_text() == "# mine\n"


def test_without_a_reward_there_is_one_to_change(init, tmp_path):
    code, _, err = init([PLAIN] * 4, "ppo")
    assert (code, "rewards.py was written too" in err) == (0, True)
    assert "def score(prompts" in (tmp_path / "out" / "rewards.py").read_text()


def test_the_command_it_names_can_be_pasted(init):
    code, out, err = init([PLAIN] * 4, "ppo", output="i 5 # x")
    assert code == 0, err
    command = shlex.split(out.splitlines()[-1].removeprefix("Then: "), comments=True)
    assert command == ["kltune", "ppo", "i 5 # x/ppo.yaml"]
