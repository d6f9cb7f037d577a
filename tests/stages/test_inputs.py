"""A run keeps to what it began with: its rows, its scorers' files, and the day that its chat template is told."""

import json
import shutil
from datetime import date
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from kltune.errors import DataError, Interrupted, ModelError, ScorerError
from kltune.lm.data import chat
from kltune.run import saved_policy, session
from kltune.train.evaluation.held_out import EVALUATION_SEED
from tests.stages.conftest import RUNS, ran, read_jsonl, write_rows
from tests.stages.test_resume import signalled_in

CHANGES = {
    "ppo": ("data.prompts", "eval.prompts", "eval.texts", "reward.0", "eval.gold"),
    "sft": ("data.texts", "eval.prompts", "eval.texts"),
    "reward": ("data.pairs", "eval.pairs"),
    "dpo": ("data.pairs", "eval.prompts", "eval.pairs"),
}
MORE = {
    "ppo": ("eval.texts=held_out_texts.jsonl", "eval.gold={kind: function, path: 'gold.py:gold'}"),
    "reward": ("eval={pairs: held_out_pairs.jsonl}",),
    "dpo": ("eval.pairs=held_out_pairs.jsonl",),
}


@pytest.fixture(params=CHANGES)
def recipe(request, tmp_path):
    """A recipe of each stage, with as many files as it reads."""
    make = request.getfixturevalue(f"{request.param}_recipe")
    (tmp_path / request.param / "gold.py").write_text("import words\n\n\ndef gold(p, r):\n    return words.count(r)\n")
    (tmp_path / request.param / "words.py").write_text("def count(texts):\n    return [float(len(t)) for t in texts]\n")
    return make("run.steps=2", *MORE.get(request.param, ()))


def file_of(recipe, key: str) -> Path:
    if key == "reward.0":
        return recipe.folder / "rewards.py"
    if key == "eval.gold":
        return recipe.folder / "words.py"       # not the function's own file, but one that it imports
    return Path(getattr(getattr(recipe, key.partition(".")[0]), key.partition(".")[2]))


def test_what_has_changed_is_refused_on_resume_and_after_the_end(recipe):
    run = RUNS[recipe.stage]
    with signalled_in(1), pytest.raises(Interrupted):
        run(recipe, resume=False)
    for _ in range(2):      # interrupted, then finished
        for key in CHANGES[recipe.stage]:
            path = file_of(recipe, key)
            before = path.read_bytes()
            lines = before.splitlines(keepends=True)
            path.write_bytes(b"".join([*lines, lines[0] if path.suffix == ".jsonl" else b"# changed\n"]))
            kind = DataError if path.suffix == ".jsonl" else ScorerError
            with pytest.raises(kind, match=rf"{key}: .* has changed: .* put the file back"):
                run(recipe, resume=True)
            path.write_bytes(before)
        result = run(recipe, resume=True)
    assert result["status"] == "finished"


def test_the_same_rows_written_in_another_way_are_the_same(sft_recipe):
    recipe = sft_recipe("run.steps=1")
    result, _ = ran(recipe)
    path = Path(recipe.data.texts)
    path.write_text(json.dumps(read_jsonl(path), indent=2))
    assert RUNS["sft"](recipe, resume=False) == result
    path.unlink()           # a finished run does not need its rows any more
    assert RUNS["sft"](recipe, resume=False) == result


def test_a_finished_run_is_not_given_for_another_base(sft_recipe, llama, tmp_path, capsys):
    base = shutil.copytree(llama, tmp_path / "base")
    recipe = sft_recipe("run.steps=1", f"model.path={base}")
    result, _ = ran(recipe)
    capsys.readouterr()
    assert RUNS["sft"](recipe, resume=False) == result
    ended = json.loads((Path(recipe.run.output) / "run.json").read_text())["ended"]
    assert f"finished on {ended}; nothing was run." in capsys.readouterr().err
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor + 0.001 for name, tensor in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    for resume in (False, True):
        with pytest.raises(ModelError, match=r"model.path: .*base has changed: .* another --output"):
            RUNS["sft"](recipe, resume=resume)
    shutil.rmtree(base)         # a finished run does not need its model any more
    assert RUNS["sft"](recipe, resume=False) == result


CHAT = "<s>{% for m in messages %}{{ m.content }}{% if m.role == 'user' %} .{% else %}</s>{% endif %}{% endfor %}"


def test_a_chat_template_from_a_file_is_that_of_the_run_and_of_its_measurements(ppo_recipe, command, tmp_path):
    folder = tmp_path / "ppo"
    (folder / "chat.jinja").write_text(CHAT)
    for name in ("prompts", "held_out"):
        rows = read_jsonl(folder / f"{name}.jsonl")
        write_rows(folder / f"{name}.jsonl", [{"messages": [{"role": "user", "content": r["prompt"]}]} for r in rows])
    recipe = ppo_recipe("data.chat_template=chat.jinja", "run.steps=2")
    result, _ = ran(recipe)
    assert AutoTokenizer.from_pretrained(result["final"]).chat_template == CHAT
    code, document, _ = command("eval-kl", recipe.run.output, "--responses", 10, "--seed", EVALUATION_SEED)
    assert code == 0
    assert document["kl"]["exact"]["nats_per_response"] == pytest.approx(result["kl"]["nats_per_response"], rel=1e-6)
    (folder / "chat.jinja").write_text(CHAT.replace(" .", " ,"))
    with pytest.raises(DataError, match=r"data\.chat_template: .* has changed"):
        RUNS["ppo"](recipe, resume=False)


def test_a_run_whose_prompts_are_gone_says_how_to_give_them(sft_recipe, command, tmp_path):
    recipe = sft_recipe("run.steps=1")
    ran(recipe)
    moved = Path(recipe.run.output).rename(tmp_path / "moved")
    Path(recipe.eval.prompts).rename(tmp_path / "prompts.jsonl")
    code, _, err = command("eval-kl", moved, "--responses", 4)
    assert code == 5
    assert "give the file as --prompts FILE, or a recipe as --recipe R.yaml" in err
    assert command("eval-kl", moved, "--responses", 4, "--prompts", tmp_path / "prompts.jsonl")[0] == 0


DAYS = {date(2026, 1, 1): "a", date(2026, 1, 2): "b"}
TEMPLATE = (
    "<s>{{ {'01': 'a', '02': 'b'}[strftime_now('%d')] * 5 }} {% for m in messages %}{{ m.content }} {% endfor %}"
)


@pytest.fixture
def on_day(monkeypatch):
    """Sets the clock of everything that asks for the day."""

    def on(day: date) -> None:
        for module in (chat, session, saved_policy):
            monkeypatch.setattr(module, "today", lambda: day)

    return on


@pytest.fixture
def dated(ppo_recipe, llama, tmp_path):
    """PPO on messages, with a model whose chat template writes the day."""
    folder = shutil.copytree(llama, tmp_path / "dated")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    for name in ("prompts", "held_out"):
        rows = read_jsonl(tmp_path / "ppo" / f"{name}.jsonl")
        write_rows(tmp_path / "ppo" / f"{name}.jsonl",
                   [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in rows])
    return lambda *keys, **more: ppo_recipe(f"model.path={folder}", "run.steps=2", *keys, **more)


def test_a_run_goes_on_with_the_day_it_began_on_and_is_measured_with_it(dated, on_day, command, tmp_path):
    first, second = DAYS
    on_day(first)
    whole, _ = ran(dated(output=str(tmp_path / "whole")))
    recipe = dated(output=str(tmp_path / "cut"))
    with signalled_in(1), pytest.raises(Interrupted):
        RUNS["ppo"](recipe, resume=False)
    on_day(second)
    cut = RUNS["ppo"](recipe, resume=True)
    assert cut["kl"] == whole["kl"]
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["template_date"] == "2026-01-01"
    other, _ = ran(dated(output=str(tmp_path / "other")))
    assert other["kl"] != whole["kl"]
    pinned, _ = ran(dated("data.date=2026-01-01", output=str(tmp_path / "pinned")))
    assert pinned["kl"] == whole["kl"]
    again = ("eval-kl", tmp_path / "cut", "--responses", 10, "--seed", EVALUATION_SEED)
    code, document, err = command(*again)
    assert (code, document["template_date"]) == (0, "2026-01-01")
    assert document["kl"]["exact"]["nats_per_response"] == pytest.approx(whole["kl"]["nats_per_response"], rel=1e-6)
    assert "the chat template writes the date, and here it is always 2026-01-01" in err
    _, document, _ = command(*again, "--date", "2026-01-02")
    assert document["template_date"] == "2026-01-02"
    assert document["kl"]["exact"]["nats_per_response"] != pytest.approx(whole["kl"]["nats_per_response"], rel=1e-6)


@pytest.mark.parametrize("typed", ["today", "2026-13-01"])
def test_a_date_that_is_no_day_is_refused(command, run_folder, typed):
    code, _, err = command("eval-kl", run_folder, "--date", typed)
    assert (code, "wanted a day as 2026-01-31" in err) == (2, True)
