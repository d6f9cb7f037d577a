"""Diversity against cases counted by hand, and self-BLEU against figures of sacrebleu."""

import math
import random

import pytest

from kltune.core.hacking.diversity import (
    FIRST_TOKENS,
    distinct_adjusted,
    distinct_n,
    diversity,
    duplicate_fraction,
    self_bleu,
)

# 1 2 1 2 and 1 2 3: 7 unigrams of 3 kinds; bigrams 12 21 12 12 23, 5 of 3 kinds; trigrams 121 212 123, all different
PAIR = [(1, 2, 1, 2), (1, 2, 3)]


@pytest.mark.parametrize(("n", "share"), [(1, 3 / 7), (2, 3 / 5), (3, 1.0)])
def test_distinct_n_by_hand(n, share):
    assert distinct_n(PAIR, n) == pytest.approx(share)


def test_without_n_grams_nothing_is_said():
    assert distinct_n([(1,), ()], 2) is None
    assert distinct_adjusted([(1,), ()], 2, 10) is None
    assert self_bleu([(1, 2), ()]) is None


def test_adjusted_distinct_by_hand():
    # two unigrams of a vocabulary of two: 1, 2, 1, 2 and 1, 2, 3 with V = 4: C = 7, N = 3, E = 4 (1 − (3/4)^7)
    assert distinct_adjusted(PAIR, 1, 4) == pytest.approx(3 / (4 * (1 - 0.75**7)))
    # bigrams: K = 16, C = 5, N = 3
    assert distinct_adjusted(PAIR, 2, 4) == pytest.approx(3 / (16 * (1 - (15 / 16) ** 5)))
    assert distinct_adjusted([(7, 7, 7)], 2, 1) == 1.0
    # of a large vocabulary it is plain distinct
    assert distinct_adjusted(PAIR, 2, 150_000) == pytest.approx(distinct_n(PAIR, 2), rel=1e-9)


def test_adjusted_distinct_of_chance_is_one_at_every_length_where_plain_distinct_falls():
    rng = random.Random(0)
    short, long = ([[rng.randrange(20) for _ in range(50)] for _ in range(count)] for count in (2, 40))
    plain = [distinct_n(rows, 2) for rows in (short, long)]
    adjusted = [distinct_adjusted(rows, 2, 20) for rows in (short, long)]
    assert plain[0] > 3 * plain[1]
    assert adjusted == pytest.approx([1.0, 1.0], abs=0.05)


@pytest.mark.parametrize(("responses", "by_hand"), [
    # 1 2 3 4 against 1 2 3 5 and 9: p = 3/4, 2/3, 1/2, and no 4-gram of one, which counts as 0.1; equal length.
    # 9 has no token in common with either.
    ([(1, 2, 3, 4), (1, 2, 3, 5), (9,)], [(3 / 4 * 2 / 3 * 1 / 2 * 0.1 / 1) ** 0.25] * 2 + [0.0]),
    # it pays for being shorter than the nearest other: p = 1, 1, too short for more, and exp(1 − 3/2); the other way
    # p = 2/3, 1/2 and 0.1 of one trigram
    ([(1, 2), (1, 2, 3)], [math.exp(-0.5), (2 / 3 * 1 / 2 * 0.1) ** (1 / 3)]),
    # what is said more often than by any other is clipped: one of three unigrams counts, neither bigram nor trigram
    ([(1, 1, 1), (1, 2, 3)], [(1 / 3 * 0.1 / 2 * 0.1) ** (1 / 3)] * 2),
    ([(1, 2, 3, 4, 5)] * 3, [1.0] * 3),
])
def test_self_bleu_by_hand(responses, by_hand):
    assert self_bleu(responses) == pytest.approx(sum(by_hand) / len(by_hand))


# of sacrebleu 2.6.0: sentence_bleu(..., smooth_method="floor", smooth_value=0.1, tokenize="none"), mean over responses
SACREBLEU_SMALL, SACREBLEU_RANDOM = 0.45204012572439695, 0.5536737630073995


def test_self_bleu_is_that_of_sacrebleu():
    small = [(1, 2, 3, 4, 5), (1, 2, 3, 4, 6, 7), (1, 2, 1, 2), (8, 9, 10), (1,), (1, 2, 3, 4, 5, 6, 7, 8, 9)]
    assert self_bleu(small) == pytest.approx(SACREBLEU_SMALL, abs=1e-12)
    rng = random.Random(7)
    rows = [[rng.choice([1, 2, 2, 3, 3, 3, 4, 5, 6, 7]) for _ in range(rng.randrange(1, 15))] for _ in range(40)]
    assert self_bleu(rows) == pytest.approx(SACREBLEU_RANDOM, abs=1e-12)


def test_duplicates_are_what_an_earlier_response_says():
    assert duplicate_fraction([(1, 2), (1, 2), (2, 1), (), (1, 2), ()]) == pytest.approx(3 / 6)


def test_answers_to_one_prompt_are_told_from_answers_across_prompts():
    # every prompt is answered twice alike: within a prompt all is said twice, across prompts nothing is
    rows = [(1, 2, 3), (1, 2, 3), (4, 5, 6), (4, 5, 6)]
    found = diversity(rows, [0, 0, 1, 1], 10)
    assert (found.per_input, found.across_input, found.duplicates) == (0.5, 1.0, 0.5)
    # and the other way round: the two answers differ, and both prompts get the same two
    found = diversity([(1, 2, 3), (4, 5, 6), (1, 2, 3), (4, 5, 6)], [0, 0, 1, 1], 10)
    assert (found.per_input, found.across_input) == (1.0, 0.5)


def test_one_answer_to_each_prompt_says_nothing_of_answers_to_one():
    found = diversity(PAIR, [0, 1], 10)
    assert found.per_input is None
    assert found.across_input == found.distinct_2 == pytest.approx(3 / 5)
    assert diversity([(1, 2), (2, 3)], [5, 5], 10).across_input is None


def test_only_the_first_tokens_count_but_for_duplicates():
    head = tuple(range(FIRST_TOKENS))
    found = diversity([(*head, 1, 1, 1), (*head, 2, 2, 2)], [0, 1], 1000)
    assert found.distinct_1 == 0.5
    assert found.self_bleu == pytest.approx(1.0)
    assert found.duplicates == 0.0
