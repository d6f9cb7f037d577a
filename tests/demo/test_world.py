"""The tiny world: a tokenizer that loses nothing, a model that learns, a build whole or absent."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kltune.demo import world as tiny
from kltune.demo.world import ROW, UNFINISHED, WORLD_MARKER, make_tiny_world, new_model, pack, pretrain, train_tokenizer
from kltune.errors import StorageError
from tests.demo.test_grammar import HOUSE, LOOSE


def quiet(text: str) -> None:
    """Progress nobody listens to."""


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([review.text for review in LOOSE])


@pytest.fixture
def small(monkeypatch):
    """Worlds in this test hold few reviews."""
    counts = {"PRETRAIN_TEXTS": 100, "TEXTS": 30, "HELD_OUT_TEXTS": 4, "PROMPTS": 20, "EVAL_PROMPTS": 5}
    for name, count in counts.items():
        monkeypatch.setattr(tiny, name, count)


# the tokenizer and pretraining


@pytest.mark.parametrize("text", [
    LOOSE[0].text, " two  spaces ", "Grüße, 東京 🙂\n\ttab", "n't 's . , !", "ALL CAPS 1234",
])
def test_decoding_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_text_begins_with_bos_and_never_ends_with_eos(tokenizer):
    ids = tokenizer("The battery")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids


def test_an_opening_is_cut_off_where_its_response_begins(tokenizer):
    for review in HOUSE[:50]:
        response = tokenizer(review.response, add_special_tokens=False)["input_ids"]
        assert tokenizer(review.prompt)["input_ids"] + response == tokenizer(review.text)["input_ids"]


def test_reviews_have_a_handy_length(tokenizer):
    lengths = [len(tokenizer(review.text)["input_ids"]) for review in LOOSE]
    assert 25 < sum(lengths) / len(lengths) < 60
    assert max(lengths) < ROW


def test_a_row_holds_whole_texts_and_scores_no_padding(tokenizer):
    ids, labels = pack(["Good.", "Bad."], tokenizer)
    texts = [*tokenizer("Good.")["input_ids"], tokenizer.eos_token_id]
    texts += [*tokenizer("Bad.")["input_ids"], tokenizer.eos_token_id]
    assert ids[0, : len(texts)].tolist() == texts
    assert set(ids[0, len(texts) :].tolist()) == {tokenizer.pad_token_id}
    scored = [token for token in texts if token != tokenizer.bos_token_id]
    assert labels[labels != tiny.IGNORED].tolist() == scored


def test_a_few_steps_lower_the_loss(tokenizer):
    model = new_model(tokenizer, seed=0)
    ids, labels = pack([review.text for review in LOOSE], tokenizer)
    losses = list(pretrain(model, ids, labels, steps=12, seed=0))
    assert losses[0] > 6.0                       # log 2048 = 7.62 knows nothing
    assert sum(losses[-3:]) / 3 < losses[0] - 0.5


def test_the_callers_random_numbers_stay(tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    new_model(tokenizer, seed=0)
    assert torch.rand(1) == expected


# the world as files


def eval_sum(prompt: str) -> str:
    first, _, second, _ = prompt.split()
    return str(int(first) + int(second))


def test_the_data_files_hold_what_the_recipes_read(tmp_path):
    tiny.write_data(tmp_path / "data", seed=0)
    data = {
        file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in (tmp_path / "data").iterdir()
    }
    counts = {name: len(rows) for name, rows in data.items()}
    assert counts == {
        "texts": 2000, "heldout": 200, "prompts": 512, "eval_prompts": 256, "pairs": 800, "eval_pairs": 128,
        "hinted": 1600, "guesses": 3000, "sums": 24, "eval_sums": 12,
    }
    sums = {row["prompt"]: row["answer"] for row in data["sums"] + data["eval_sums"]}
    assert len(sums) == 36
    assert all(eval_sum(prompt) == answer for prompt, answer in sums.items())
    right = [row["response"] == f" {sums[row['prompt']]}" for row in data["guesses"]]
    assert sum(right) / len(right) == pytest.approx(0.6, abs=0.03)
    hinted = {row["prompt"].removeprefix("Kindly: ") for row in data["hinted"] if row["prompt"].startswith("Kindly: ")}
    assert hinted == {row["prompt"] for row in data["hinted"] if not row["prompt"].startswith("Kindly: ")}
    assert set(data["pairs"][0]) == {"prompt", "chosen", "rejected"}
    assert all(row["chosen"] != row["rejected"] for row in data["pairs"])
    assert set(data["texts"][0]) == set(data["heldout"][0]) == {"prompt", "response"}
    trained = {row["prompt"] for row in data["texts"] + data["prompts"] + data["pairs"]}
    held_out = {row["prompt"] for row in data["heldout"] + data["eval_prompts"] + data["eval_pairs"]}
    assert trained.isdisjoint(held_out)


@pytest.mark.usefixtures("small")
def test_it_loads_like_any_other_model(tmp_path):
    make_tiny_world(tmp_path, say=quiet, steps=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.padding_side == "left"
    assert tokenizer("The")["input_ids"][0] == tokenizer.bos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.num_parameters() < 1_000_000
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.usefixtures("small")
def test_the_same_seed_makes_the_same_world(tmp_path):
    for name in ("one", "two"):
        make_tiny_world(tmp_path / name, say=quiet, steps=2, seed=3)
    files = [file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*") if file.is_file()]
    assert len(files) >= 9
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


@pytest.mark.usefixtures("small")
def test_a_complete_world_is_left_alone_and_another_seed_is_another_world(tmp_path):
    make_tiny_world(tmp_path, say=quiet, steps=1)
    weights, texts = tmp_path / "model" / "model.safetensors", tmp_path / "data" / "texts.jsonl"
    before, said, written = weights.stat(), [], texts.read_bytes()
    make_tiny_world(tmp_path, say=said.append, steps=1)
    assert (weights.stat().st_mtime_ns, weights.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert len(said) == 1
    make_tiny_world(tmp_path, say=quiet, steps=1, seed=1)
    assert texts.read_bytes() != written
    assert json.loads((tmp_path / WORLD_MARKER).read_text(encoding="utf-8"))["seed"] == 1


@pytest.mark.parametrize("where", ["pretrain", "os.replace"])
@pytest.mark.usefixtures("small")
def test_a_killed_build_is_made_again(tmp_path, monkeypatch, where):
    calls = 0

    def killed(*_, **__):
        nonlocal calls
        calls += 1
        if where == "pretrain" or calls == 2:        # the second move: model in place, data not
            raise KeyboardInterrupt
        return real(*_, **__)

    real = tiny.os.replace
    with monkeypatch.context() as patch:
        patch.setattr(f"kltune.demo.world.{where}", killed)
        with pytest.raises(KeyboardInterrupt):
            make_tiny_world(tmp_path, say=quiet, steps=1)
    assert not (tmp_path / WORLD_MARKER).exists()
    make_tiny_world(tmp_path, say=quiet, steps=1)
    assert (tmp_path / WORLD_MARKER).is_file()
    assert not (tmp_path / UNFINISHED).exists()
    assert len(list((tmp_path / "data").iterdir())) == 10


@pytest.mark.usefixtures("small")
def test_somebody_elses_model_is_not_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("precious", encoding="utf-8")
    with pytest.raises(StorageError, match="choose another output folder"):
        make_tiny_world(tmp_path, say=quiet, steps=1)
    assert [file.name for file in tmp_path.rglob("*")] == ["model", "weights"]
