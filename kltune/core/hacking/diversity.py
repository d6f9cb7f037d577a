"""How much responses repeat each other: distinct n-grams, self-BLEU, duplicates.

All of it reads token ids, cut to the first ``FIRST_TOKENS`` of a response and without its end token. Li et al. and Zhu
et al. count words, Liu et al. need a vocabulary of known size: a model's tokens have that in every language, and policy
and reference share them. So a figure is to be held against the reference's and not against another tokenizer's; and,
since every one depends on length and number of responses, against as many responses.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_TOKENS = 50       # of a response: each of these figures depends on the length
PARTS = 10              # of the prompts, for a standard error
LONGEST_NGRAM = 4       # of BLEU
NO_MATCH = 0.1          # matches that an n-gram order without any counts as
Tokens = Sequence[int]


@dataclass(frozen=True)
class Diversity:
    """What there is to say of a set of responses; None where it is not defined.

    per_input, across_input: distinct-2 of the answers to one prompt (mean over prompts), and of one answer to each.
    """

    distinct_1: float | None
    distinct_2: float | None
    distinct_3: float | None
    distinct_2_adjusted: float | None
    self_bleu: float | None
    per_input: float | None
    across_input: float | None
    duplicates: float


def diversity(responses: Sequence[Tokens], prompts: Sequence[int], vocabulary: int) -> Diversity:
    """Every measure of a set of responses.

    Duplicates are judged on whole responses, the rest on their first ``FIRST_TOKENS`` tokens. Across inputs, one answer
    to each prompt is looked at: the first. Source of the split: Kirk et al. 2023, arXiv 2310.06452.

    Args:
        responses: token ids without the end token; at least one response.
        prompts: which prompt each answers.
        vocabulary: V, tokens there are.
    """
    cut = [tuple(tokens[:FIRST_TOKENS]) for tokens in responses]
    answers: dict[int, list[Tokens]] = {}
    for prompt, tokens in zip(prompts, cut, strict=True):
        answers.setdefault(prompt, []).append(tokens)
    within = [distinct_n(group, 2) for group in answers.values() if len(group) > 1]
    known = [share for share in within if share is not None]
    return Diversity(
        distinct_1=distinct_n(cut, 1),
        distinct_2=distinct_n(cut, 2),
        distinct_3=distinct_n(cut, 3),
        distinct_2_adjusted=distinct_adjusted(cut, 2, vocabulary),
        self_bleu=self_bleu(cut),
        per_input=sum(known) / len(known) if known else None,
        across_input=distinct_n([group[0] for group in answers.values()], 2) if len(answers) > 1 else None,
        duplicates=duplicate_fraction(responses),
    )


def distinct_n(responses: Sequence[Tokens], n: int) -> float | None:
    """Different n-grams as a share of all n-grams of all responses together; None if there are none.

    Source: Li et al. 2016, arXiv 1510.03055.
    """
    found = [gram for tokens in responses for gram in ngrams(tokens, n)]
    return len(set(found)) / len(found) if found else None


def distinct_adjusted(responses: Sequence[Tokens], n: int, vocabulary: int) -> float | None:
    """Different n-grams as a share of those expected if all were equally likely; None if there are none.

        EAD = N / (K · (1 − ((K − 1)/K)^C)),    K = V^n

    with N different ones among C. Longer text repeats more, and this takes out what it would repeat by chance alone:
    much where C is of the order of K; for C ≪ K it is distinct-n. Kirk et al. leave K = V for every n, and then the
    value for bigrams can pass 1 as soon as C passes V.

    Source: Liu et al. 2022, arXiv 2202.13587, for n = 1.
    """
    found = [gram for tokens in responses for gram in ngrams(tokens, n)]
    if not found:
        return None
    kinds = float(vocabulary) ** n
    expected = 1.0 if kinds == 1.0 else -kinds * math.expm1(len(found) * math.log1p(-1.0 / kinds))
    return len(set(found)) / expected


def distinct_stderr(responses: Sequence[Tokens], prompts: Sequence[int], vocabulary: int) -> float | None:
    """Standard error of ``distinct_adjusted`` of bigrams: a jackknife that leaves out a tenth of the prompts at a time.

        se = √((G − 1)/G Σ_g (EAD_g − mean)²)

    EAD depends on how much is read, so what is left in all G parts alike is compared, and not with the whole.

    Args:
        responses, prompts, vocabulary: as of ``diversity``.

    Returns:
        None where there are fewer than ``PARTS`` prompts, or a part has no bigrams.
    """
    place = {prompt: at for at, prompt in enumerate(dict.fromkeys(prompts))}
    if len(place) < PARTS:
        return None
    parts = [place[prompt] % PARTS for prompt in prompts]
    left = [
        distinct_adjusted([row[:FIRST_TOKENS] for row, own in zip(responses, parts, strict=True) if own != part], 2,
                          vocabulary)
        for part in range(PARTS)
    ]
    if None in left:
        return None
    mean = sum(left) / PARTS
    return math.sqrt((PARTS - 1) / PARTS * sum((value - mean) ** 2 for value in left))


def self_bleu(responses: Sequence[Tokens]) -> float | None:
    """Mean BLEU-4 of each response against all others, 0 to 1: 1 says that everything has been said before.

        BLEU = min(1, exp(1 − r/c)) · (Π_n p_n)^(1/4)

    p_n: share of a response's n-grams that occur as often in one of the others; c: its length, r: the nearest of
    theirs (the shorter of two). An order without a match counts as 0.1 of one, orders that a short response lacks are
    left out, and empty responses too. As sacrebleu's ``sentence_bleu`` with ``smooth_method="floor"``, over 100.

    Sources: Zhu et al. 2018, arXiv 1802.01886 (self-BLEU); Chen and Cherry 2014 (smoothing method 1).

    Returns:
        None with fewer than two responses that are not empty.
    """
    rows = [tuple(tokens) for tokens in responses if len(tokens)]
    if len(rows) < 2:
        return None
    counted = [[Counter(ngrams(tokens, n)) for tokens in rows] for n in range(1, LONGEST_NGRAM + 1)]
    matches = [matches_elsewhere(counts) for counts in counted]
    lengths = Counter(len(tokens) for tokens in rows)
    total = 0.0
    for row, tokens in enumerate(rows):
        orders = range(min(LONGEST_NGRAM, len(tokens)))
        if matches[0][row] == 0:
            continue        # no token in common, so no longer n-gram either: BLEU is 0 and not what the smoothing makes
        shares = [(matches[n][row] or NO_MATCH) / (len(tokens) - n) for n in orders]
        brevity = min(0.0, 1.0 - nearest_other(lengths, len(tokens)) / len(tokens))
        total += math.exp(brevity + sum(map(math.log, shares)) / len(shares))
    return total / len(rows)


def duplicate_fraction(responses: Sequence[Tokens]) -> float:
    """Share of the responses that say, token for token, what an earlier one says."""
    return 1.0 - len({tuple(tokens) for tokens in responses}) / len(responses)


def ngrams(tokens: Tokens, n: int) -> list[tuple[int, ...]]:
    """The n-grams of one response, in order."""
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def matches_elsewhere(counts: Sequence[Counter]) -> list[int]:
    """For each response, how many of its n-grams (given with their counts) occur as often in another one."""
    most: dict[tuple[int, ...], tuple[int, int, int]] = {}      # largest count, whose it is, second largest
    for row, own in enumerate(counts):
        for gram, count in own.items():
            first, holder, second = most.get(gram, (0, -1, 0))
            most[gram] = (count, row, first) if count > first else (first, holder, max(second, count))

    def elsewhere(row: int, gram: tuple[int, ...]) -> int:
        first, holder, second = most[gram]
        return second if holder == row else first

    return [sum(min(count, elsewhere(row, gram)) for gram, count in own.items()) for row, own in enumerate(counts)]


def nearest_other(lengths: Counter, own: int) -> int:
    """The length nearest to ``own`` among the other responses', the shorter of two; ``lengths`` counts all."""
    others = (length for length, count in lengths.items() if length != own or count > 1)
    return min(others, key=lambda length: (abs(length - own), length))
