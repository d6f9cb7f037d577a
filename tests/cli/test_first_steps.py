"""What a newcomer gets wrong in the first half hour: a message that says the way on, and the exit code of its kind."""

import json
import shlex

import pytest

from kltune.cli import main
from kltune.lm.rewards import missing

RECIPE = """\
stage: ppo
model: {path: model}
data: {prompts: prompts.jsonl}
reward: [{kind: function, path: "rewards.py:score"}]
"""
STEPS = [       # the command, what was changed before it, the exit code, and what the message says
    ("ppo", {}, 2, "wanted a recipe: kltune ppo R.yaml"),
    ("ppo ppo.yml", {}, 2, "no such file, and no packaged recipe of that name"),
    ("ppo ppo.yaml --recipe other.yaml", {}, 2, "found two recipes, ppo.yaml and --recipe other.yaml"),
    ("pop ppo.yaml", {}, 2, "No such command 'pop'"),
    ("sft ppo.yaml", {}, 2, "the command is kltune sft; run kltune ppo"),
    ("ppo ppo.yaml --set lr=3", {}, 2, "write optim.lr"),
    ("ppo ppo.yaml --set steps=10", {}, 2, "write run.steps"),
    ("ppo ppo.yaml --set run.device=gpu", {}, 2, "did you mean cuda?"),
    ("ppo ppo.yaml --set kl.target", {}, 2, "wanted section.key=value, such as --set kl.target=4"),
    ("ppo ppo.yaml --set kl.target=low", {}, 2, 'found "low", wanted a number above 0'),
    ("ppo ppo.yaml --set model=model", {}, 2, "--set model.path=model"),
    ("ppo ppo.yaml --set reward=[{kind:model}]", {}, 2, "write a space behind the colon: kind: model"),
    ("ppo ppo.yaml", {"model": None}, 5, "model.path: found model, which is no folder here"),
    ("ppo ppo.yaml --set model.path=models/x", {}, 5, "which is no folder here (neither is its folder"),
    ("ppo ppo.yaml --set model.path=rewards.py", {}, 5, "which is a file; wanted the folder of a model"),
    ("ppo ppo.yaml", {"prompts.jsonl": None}, 5, "prompts.jsonl does not exist"),
    ("ppo ppo.yaml", {"prompts.jsonl": ""}, 5, "has no rows"),
    ("ppo ppo.yaml", {"prompts.jsonl": '{"question": "a"}'}, 5, "data.columns: {prompt: question}"),
    ("ppo ppo.yaml", {"prompts.jsonl": '{"prompt": "a"'}, 5, "prompts.jsonl:1: not JSON"),
    ("ppo ppo.yaml --set data.prompts=p.xlsx", {"p.xlsx": "x"}, 5, "no kind of data file that can be read here"),
    ("ppo ppo.yaml", {"rewards.py": None}, 5, "rewards.py does not exist"),
    ("ppo ppo.yaml", {"rewards.py": "def scores(p, r): ..."}, 5, "has no function 'score'"),
    ("ppo ppo.yaml", {"rewards.py": "import nothing_of_that_name"}, 5, "No module named 'nothing_of_that_name'"),
    ("ppo ppo.yaml", {"rewards.py": "def score(responses): ..."}, 5, "cannot be called with prompts and responses"),
    ("ppo ppo.yaml --set run.output=out", {"out/notes.txt": "mine"}, 2, "is not empty and is no kltune run"),
    ("recipe check ppo.yaml", {"rewards.py": None, "prompts.jsonl": None}, 5, "names 2 things"),
    ("recipe copy start/pop", {}, 2, "did you mean"),
    ("eval-kl out --responses abc", {}, 2, "found abc, wanted a whole number of at least 2"),
    ("eval-kl out --unit nats", {}, 2, "found nats, wanted nats_per_response or nats_per_token"),
    ("eval-kl out --confidence 95", {}, 2, "found 95, wanted at least 0.5 and below 1"),
    ("eval-kl out", {}, 5, "out"),
    ("frontier out --gold {kind:x}", {}, 2, "write a space behind the colon: kind: x"),
    ("sweep ppo.yaml --over kl.target -o out", {}, 2, "wanted section.key=value,value"),
    ("sweep ppo.yaml --over kl.target=1,2 -o out", {"rewards.py": None}, 5, "rewards.py does not exist"),
    ("init --model model", {}, 2, "wanted --prompts P"),
    ("explain kl.taget", {}, 2, "did you mean kl.target"),
    ("ppo ppo.yaml --set kl.target=–4", {}, 2, "its signs are not those of a keyboard: write -4"),
    ("ppo ppo.yaml --set optim.lr=1e−4", {}, 2, "write 1e-4"),
    ("ppo ppo.yaml —resume", {}, 2, "—resume: its dashes are not those of a keyboard; write --resume"),
    ("ppo ppo.yaml –-set=kl.target=4", {}, 2, "–-set: its dashes are not those of a keyboard; write --set"),
    ("ppo ppo.yaml --set reward.0.path=“rewards.py:score”", {}, 2, "quotes and dashes have to be those of a keyboard"),
    ("ppo ppo.yaml --steps 10", {}, 2, "write --set run.steps=VALUE"),
    ("ppo ppo.yaml --learning-rate=1e-4", {}, 2, "write --set optim.lr=VALUE"),
    ("ppo ppo.yaml --set data=prompts.jsonl", {}, 2, "write data: {prompts: prompts.jsonl}"),
    ("ppo ppo.yaml --set reward=rewards.py:score", {}, 2, 'write reward: [{kind: function, path: "rewards.py:score"}]'),
    ("ppo ppo.yaml --set kl.target=0", {}, 2, "found 0, wanted a number above 0"),
    ("ppo ppo.yaml --set run.steps=1e3", {}, 2, "found 1000.0, wanted a whole number at least 1 or null"),
    ("ppo ppo.yaml", {"ppo.yaml": RECIPE + 'run: {steps: "10"}\n'}, 2, 'found "10" (text in quotes)'),
    ("ppo ppo.yaml", {"ppo.yaml": RECIPE + "kl: {init_kl_coef: 0.2}\n"}, 2, "called kl.beta here"),
    ("ppo ppo.yaml", {"prompts.jsonl": None, "prompts.jsonl/a.md": "{}"}, 5, "is a folder without files of rows"),
    ("ppo ppo.yaml --set data.prompts=p.json", {"p.json": '{"data": [{"prompt": "a"}]}'}, 5, "jq .data FILE"),
    ("ppo ppo.yaml --set data.prompts=p.json", {"p.json": '{"prompts": ["a"]}'}, 5, "jq -c '.prompts[] | {prompt: .}'"),
    ("ppo ppo.yaml --set data.prompts=p.csv", {"p.csv": "Frage;Antwort\na;b\n"}, 5, "data.columns: {prompt: Frage}"),
    ("ppo ppo.yaml --set data.prompts=p.jsonl.gz", {"p.jsonl.gz": "{}"}, 5, "the gzip file is cut off or damaged"),
    ("ppo ppo.yaml --set data.prompts=~/none.jsonl", {}, 5, "/none.jsonl does not exist"),
    ("ppo sub/ppo.yaml", {"sub/ppo.yaml": RECIPE}, 2, "paths start at the recipe: write ../model"),
    ("ppo ppo.yaml --set reward.0.path=rewards.py:scre", {}, 5, "has no function 'scre'; did you mean score?"),
    ("ppo ppo.yaml", {"rewards.py": "async def score(prompts, responses): ..."}, 5, "score is async"),
    ("ppo ppo.yaml --set model.path=org/name-7b", {}, 5, "as a name on the hub it is not in the cache"),
    ("init ppo --model modle --prompts promts.jsonl --reward reward.py", {}, 5, "--prompts: promts.jsonl does not "
     "exist; did you mean prompts.jsonl?\n  --reward: reward.py does not exist; did you mean rewards.py?"),
    ("init ppo --model org/name-7b --prompts prompts.jsonl --reward rewards.py", {}, 5, "it is not in the cache, and"),
    ("init --model prompts.jsonl --prompts model", {}, 5, "--model: found prompts.jsonl, which is a file; wanted the"),
]
LIBRARY_WORDS = (
    "Input should be", "range>", "<int", "<str", "Value error", "discriminator", "Traceback", "couldn't connect",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a recipe and all that it names."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("{}")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a"}))
    (tmp_path / "rewards.py").write_text("def score(prompts, responses):\n    return [0.0] * len(responses)\n")
    (tmp_path / "ppo.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(missing, "_is_offline", lambda: True)
    return tmp_path


@pytest.mark.parametrize(("command", "changed", "code", "words"), STEPS, ids=[f"{at}" for at in range(len(STEPS))])
def test_a_wrong_first_step(folder, capsys, command, changed, code, words):
    for name, content in changed.items():
        path = folder / name
        if content is None:
            path.rename(path.with_name(f"kept-{path.name}"))
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
    with pytest.raises(SystemExit) as left:
        main(shlex.split(command))
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (code, ""), err
    assert words in err
    assert not any(word in err for word in LIBRARY_WORDS), err


COMMANDS = [
    "sft", "reward", "ppo", "trpo", "dpo", "eval-kl", "project", "merge", "sweep", "frontier", "sample", "explain",
    "init", "doctor", "demo", "report", "recipe list", "recipe show", "recipe copy", "recipe check", "recipe schema",
]


@pytest.mark.parametrize("command", ["", "recipe", *COMMANDS])
def test_help_fits_80_columns_in_plain_words_with_an_example(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0
    assert not any(word in out for word in LIBRARY_WORDS)
    if command in COMMANDS:
        assert f"\n  kltune {command}" in out       # an example
    else:
        listed = out.partition("Commands:")[2]
        assert "..." not in listed
        assert max(map(len, listed.splitlines())) <= 80
