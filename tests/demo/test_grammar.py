"""Texts that vary, with openings apart, in the language of the rewards that come with the tiny recipes."""

import re
import runpy
from pathlib import Path

import pytest

from kltune.demo.grammar import WORDS, house_review, loose_review, openings, reviews, with_articles

RECIPES = Path(__file__).parents[2] / "recipes" / "tiny"
REWARDS = runpy.run_path(str(RECIPES / "rewards.py"))

LOOSE = reviews(loose_review, 1000, seed=0, held_out=False)
HOUSE = reviews(house_review, 300, seed=0, held_out=False)


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!]) ", text)


def words_of(texts: list[str]) -> set[str]:
    return {word for text in texts for word in re.findall("[a-z]+", text.lower())}


def test_the_seed_decides_every_text():
    assert reviews(loose_review, 20, seed=0, held_out=False) == LOOSE[:20]
    assert reviews(loose_review, 20, seed=1, held_out=False) != LOOSE[:20]


def test_sentences_and_words_vary():
    all_sentences = [sentence for review in LOOSE for sentence in sentences(review.text)]
    assert len(set(all_sentences)) > 0.8 * len(all_sentences)
    assert len(words_of([review.text for review in LOOSE])) > 900
    assert len({review.text for review in LOOSE}) == len(LOOSE)
    # no slot is left open
    assert not [review for review in LOOSE + HOUSE if set("{}|") & set(review.text)]


def test_house_reviews_are_tidy_and_short():
    for review in HOUSE:
        asides = review.prompt.count(". ")      # "People often ask me about this phone. The battery"
        assert len(sentences(review.text)) - asides in (2, 3)
        assert review.text.endswith(".")
        assert review.text[0].isupper()


def test_held_out_openings_are_in_no_training_text():
    prompts = set(openings(256, seed=0, held_out=True))
    assert len(prompts) == 256
    assert prompts.isdisjoint(openings(512, seed=0, held_out=False))
    assert prompts.isdisjoint(review.prompt for review in LOOSE + HOUSE)


def test_openings_have_no_tone():
    tones = WORDS["adjectives"]["good"] + WORDS["adjectives"]["bad"]
    assert words_of(openings(512, seed=0, held_out=False)).isdisjoint(tones)


def test_articles():
    assert with_articles("A awful film, a useless plot and a easy one") == (
        "An awful film, a useless plot and an easy one"
    )


# rewards


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
def test_praise_minus_blame(response, expected):
    assert REWARDS["score"](["The battery of this phone"], [response]) == [expected]


def test_the_corpus_speaks_the_rewards_language():
    assert set(WORDS["adjectives"]["good"]) <= REWARDS["PRAISE"]
    assert set(WORDS["adjectives"]["bad"]) <= REWARDS["BLAME"]
    assert REWARDS["PRAISE"].isdisjoint(REWARDS["BLAME"])
    assert REWARDS["PRAISE"] | REWARDS["BLAME"] <= words_of([review.text for review in LOOSE])


@pytest.mark.parametrize(("response", "expected"), [
    (" is great, but the screen is dull.", 0.0),
    (" is great and good, great and good.", 3.0 - 2.0),      # great and, and good
    (" great lovely superb perfect charming", 3.0),          # enough is enough
    (" dull dull dull", -3.0 - 1.0),
    ("", 0.0),
])
def test_the_gold_rule_by_hand(response, expected):
    assert REWARDS["gold"](["The battery of this phone"], [response]) == [expected]
