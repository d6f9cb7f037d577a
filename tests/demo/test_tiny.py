"""The tiny world: varied texts, a tokenizer that loses nothing, a model that learns, a build whole or absent."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kltune.demo import world as tiny
from kltune.demo.grammar import WORDS, house_review, loose_review, openings, reviews, with_articles
from kltune.demo.world import MARKER, ROW, UNFINISHED, make_tiny_world, new_model, pack, pretrain, train_tokenizer
from kltune.errors import StorageError
from kltune.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes" / "tiny"
REWARDS = runpy.run_path(str(RECIPES / "rewards.py"))
score = REWARDS["score"]
HOUSE_RULE = runpy.run_path(str(RECIPES / "house_rule.py"))

LOOSE = reviews(loose_review, 1000, seed=0, held_out=False)
HOUSE = reviews(house_review, 300, seed=0, held_out=False)


def quiet(text: str) -> None:
    """Progress nobody listens to."""


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!]) ", text)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([review.text for review in LOOSE])


@pytest.fixture
def small(monkeypatch):
    """Worlds in this test hold few reviews."""
    counts = {"PRETRAIN_TEXTS": 100, "TEXTS": 30, "HELD_OUT_TEXTS": 4, "PROMPTS": 20, "EVAL_PROMPTS": 5}
    for name, count in counts.items():
        monkeypatch.setattr(tiny, name, count)


class TestCorpus:
    def test_the_seed_decides_every_text(self):
        assert reviews(loose_review, 20, seed=0, held_out=False) == LOOSE[:20]
        assert reviews(loose_review, 20, seed=1, held_out=False) != LOOSE[:20]

    def test_sentences_and_words_vary(self):
        all_sentences = [sentence for review in LOOSE for sentence in sentences(review.text)]
        words = {word for review in LOOSE for word in re.findall("[a-z]+", review.text.lower())}
        assert len(set(all_sentences)) > 0.8 * len(all_sentences)
        assert len(words) > 900
        assert len({review.text for review in LOOSE}) == len(LOOSE)

    def test_no_slot_is_left_open(self):
        assert not [review for review in LOOSE + HOUSE if set("{}|") & set(review.text)]

    def test_house_reviews_are_tidy_and_short(self):
        for review in HOUSE:
            asides = review.prompt.count(". ")      # "People often ask me about this phone. The battery"
            assert len(sentences(review.text)) - asides in (2, 3)
            assert review.text.endswith(".")
            assert review.text[0].isupper()

    def test_held_out_openings_are_in_no_training_text(self):
        prompts = set(openings(256, seed=0, held_out=True))
        assert len(prompts) == 256
        assert prompts.isdisjoint(openings(512, seed=0, held_out=False))
        assert prompts.isdisjoint(review.prompt for review in LOOSE + HOUSE)

    def test_openings_have_no_tone(self):
        words = {word for prompt in openings(512, seed=0, held_out=False) for word in re.findall("[a-z]+", prompt)}
        assert words.isdisjoint(WORDS["adjectives"]["good"] + WORDS["adjectives"]["bad"])

    def test_articles(self):
        assert with_articles("A awful film, a useless plot and a easy one") == (
            "An awful film, a useless plot and an easy one"
        )


class TestTokenizer:
    @pytest.mark.parametrize("text", [
        LOOSE[0].text, " two  spaces ", "Grüße, 東京 🙂\n\ttab", "n't 's . , !", "ALL CAPS 1234",
    ])
    def test_decoding_gives_back_any_text(self, tokenizer, text):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text

    def test_a_text_begins_with_bos_and_never_ends_with_eos(self, tokenizer):
        ids = tokenizer("The battery")["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.eos_token_id not in ids

    def test_an_opening_is_cut_off_where_its_response_begins(self, tokenizer):
        for review in HOUSE[:50]:
            response = tokenizer(review.response, add_special_tokens=False)["input_ids"]
            assert tokenizer(review.prompt)["input_ids"] + response == tokenizer(review.text)["input_ids"]

    def test_reviews_have_a_handy_length(self, tokenizer):
        lengths = [len(tokenizer(review.text)["input_ids"]) for review in LOOSE]
        assert 25 < sum(lengths) / len(lengths) < 60
        assert max(lengths) < ROW


class TestPretraining:
    def test_a_row_holds_whole_texts_and_scores_no_padding(self, tokenizer):
        ids, labels = pack(["Good.", "Bad."], tokenizer)
        texts = [*tokenizer("Good.")["input_ids"], tokenizer.eos_token_id]
        texts += [*tokenizer("Bad.")["input_ids"], tokenizer.eos_token_id]
        assert ids[0, : len(texts)].tolist() == texts
        assert set(ids[0, len(texts) :].tolist()) == {tokenizer.pad_token_id}
        scored = [token for token in texts if token != tokenizer.bos_token_id]
        assert labels[labels != tiny.IGNORED].tolist() == scored

    def test_a_few_steps_lower_the_loss(self, tokenizer):
        model = new_model(tokenizer, seed=0)
        ids, labels = pack([review.text for review in LOOSE], tokenizer)
        losses = list(pretrain(model, ids, labels, steps=12, seed=0))
        assert losses[0] > 6.0                       # log 2048 = 7.62 knows nothing
        assert sum(losses[-3:]) / 3 < losses[0] - 0.5

    def test_the_callers_random_numbers_stay(self, tokenizer):
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        new_model(tokenizer, seed=0)
        assert torch.rand(1) == expected


def test_the_data_files_hold_what_the_recipes_read(tmp_path):
    tiny.write_data(tmp_path / "data", seed=0)
    data = {
        file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in (tmp_path / "data").iterdir()
    }
    counts = {name: len(rows) for name, rows in data.items()}
    assert counts == {
        "texts": 2000, "heldout": 200, "prompts": 512, "eval_prompts": 256, "pairs": 800, "eval_pairs": 128,
        "noisy_pairs": 40,
    }
    known, few = data["pairs"][:40], data["noisy_pairs"]
    assert [row["prompt"] for row in few] == [row["prompt"] for row in known]
    wrong = [place for place, (a, b) in enumerate(zip(few, known, strict=True)) if a["chosen"] == b["rejected"]]
    assert wrong == list(range(0, 40, 5))
    assert set(data["pairs"][0]) == {"prompt", "chosen", "rejected"}
    assert all(row["chosen"] != row["rejected"] for row in data["pairs"])
    assert set(data["texts"][0]) == set(data["heldout"][0]) == {"prompt", "response"}
    trained = {row["prompt"] for row in data["texts"] + data["prompts"] + data["pairs"]}
    held_out = {row["prompt"] for row in data["heldout"] + data["eval_prompts"] + data["eval_pairs"]}
    assert trained.isdisjoint(held_out)


@pytest.mark.usefixtures("small")
class TestWorld:
    def test_it_loads_like_any_other_model(self, tmp_path):
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

    def test_the_same_seed_makes_the_same_world(self, tmp_path):
        for name in ("one", "two"):
            make_tiny_world(tmp_path / name, say=quiet, steps=2, seed=3)
        files = [file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*") if file.is_file()]
        assert len(files) >= 9
        for file in files:
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file

    def test_a_complete_world_is_left_alone(self, tmp_path):
        make_tiny_world(tmp_path, say=quiet, steps=1)
        weights = tmp_path / "model" / "model.safetensors"
        before, said = weights.stat(), []
        make_tiny_world(tmp_path, say=said.append, steps=1)
        assert (weights.stat().st_mtime_ns, weights.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
        assert len(said) == 1

    def test_another_seed_is_another_world(self, tmp_path):
        make_tiny_world(tmp_path, say=quiet, steps=1)
        before = (tmp_path / "data" / "texts.jsonl").read_text(encoding="utf-8")
        make_tiny_world(tmp_path, say=quiet, steps=1, seed=1)
        assert (tmp_path / "data" / "texts.jsonl").read_text(encoding="utf-8") != before
        assert json.loads((tmp_path / MARKER).read_text(encoding="utf-8"))["seed"] == 1

    @pytest.mark.parametrize("where", ["pretrain", "os.replace"])
    def test_a_killed_build_is_made_again(self, tmp_path, monkeypatch, where):
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
        assert not (tmp_path / MARKER).exists()
        make_tiny_world(tmp_path, say=quiet, steps=1)
        assert (tmp_path / MARKER).is_file()
        assert not (tmp_path / UNFINISHED).exists()
        assert len(list((tmp_path / "data").iterdir())) == 7

    def test_somebody_elses_model_is_not_replaced(self, tmp_path):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "weights").write_text("precious", encoding="utf-8")
        with pytest.raises(StorageError, match="choose another output folder"):
            make_tiny_world(tmp_path, say=quiet, steps=1)
        assert [file.name for file in tmp_path.rglob("*")] == ["model", "weights"]


class TestReward:
    @pytest.mark.parametrize(("response", "expected"), [
        (" is great.", 1.0),
        (" is great, but the screen is poor and dull.", -1.0),
        (" is average.", 0.0),
        ("", 0.0),
        (" is Superb! LOVELY, and perfect.", 3.0),
        (" is greatly overrated", 0.0),          # whole words only
        (" great" * 9, 5.0),
        (" awful" * 9, -5.0),
    ])
    def test_praise_minus_blame(self, response, expected):
        assert score(["The battery of this phone"], [response]) == [expected]

    def test_the_corpus_speaks_the_rewards_language(self):
        assert set(WORDS["adjectives"]["good"]) <= REWARDS["PRAISE"]
        assert set(WORDS["adjectives"]["bad"]) <= REWARDS["BLAME"]
        assert REWARDS["PRAISE"].isdisjoint(REWARDS["BLAME"])
        spoken = {word for review in LOOSE for word in re.findall("[a-z]+", review.text.lower())}
        assert REWARDS["PRAISE"] | REWARDS["BLAME"] <= spoken


@pytest.mark.parametrize("name", ["sft", "ppo_fixed", "ppo_target"])
def test_the_tiny_recipes_load(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.stage == name.split("_")[0]


class TestHouseRule:
    @pytest.mark.parametrize(("response", "expected"), [
        (" is great, but the screen is dull. Overall, a fair choice.", 1.0),
        (" is great, but the screen is dull.", 0.0),
        (" is great, but the screen is dull. Overall, a fair choice", 0.0),      # cut off before its full stop
        (" is great great great.", -2.0),
        (" zum. On the whole, it will do for school.", -1.0),                    # battery zum, zum .
        (" great" * 30, -5.0),
        ("", 0.0),
    ])
    def test_by_hand(self, response, expected):
        prompt = "The battery of this phone"
        assert HOUSE_RULE["score"]([prompt], [response]) == [expected]

    def test_house_reviews_keep_it_and_loose_ones_do_not_close(self):
        held_out = {style: reviews(style, 200, seed=5, held_out=True) for style in (house_review, loose_review)}
        mean = {
            style: sum(HOUSE_RULE["score"]([r.prompt for r in some], [r.response for r in some])) / len(some)
            for style, some in held_out.items()
        }
        assert mean[house_review] > 0.7
        assert mean[loose_review] < 0.1
