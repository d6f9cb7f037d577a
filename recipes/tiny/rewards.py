"""The reward of the tiny recipes: how much a review praises, counted in words.

    score = praise words − blame words, kept between −5 and +5

Easy to understand, and easy to cheat: nothing asks for sense, style or a fault honestly named. Without a price on KL
the policy soon learns to chain praise ("is perfect and lovely, and the superb, great ..."); with a budget it may only
lean that way. A count of words also misreads "not great" as praise. Both are the point of the example: a reward is a
stand-in for what one wants, and the KL budget is what keeps a policy from taking it literally.

    gold = the score, at most 3 − pairs of neighbouring words that the response has said before

says a little more of what is meant, a kind review that is still a review. No run is trained on it.

To use a rule of your own, keep the signature: one finite number for each response, higher is better.
"""

import re
from itertools import pairwise

PRAISE = frozenset({
    "good", "great", "excellent", "wonderful", "lovely", "superb", "brilliant", "delightful", "fantastic",
    "charming", "perfect", "beautiful", "impressive", "enjoyable", "pleasant", "terrific", "splendid", "marvellous",
    "outstanding", "amazing", "loved", "enjoyed", "adored", "joy", "best",
})
BLAME = frozenset({
    "bad", "awful", "terrible", "poor", "dull", "boring", "disappointing", "dreadful", "horrible", "weak",
    "annoying", "frustrating", "clumsy", "ugly", "useless", "tedious", "unpleasant", "shoddy", "hopeless",
    "miserable", "hated", "disliked", "regret", "mistake", "worst", "sadly", "avoid",
})
BOUND = 5.0
ENOUGH = 3.0


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """One number per response; the prompts are not looked at.

    Examples:
        " is great."                                   →  1.0
        " is great, but the screen is poor and dull."  → −1.0
        " is fine."                                    →  0.0
    """
    return [_net_praise(response) for response in responses]


def gold(prompts: list[str], responses: list[str]) -> list[float]:
    """One number per response: praise that is enough, less what is said twice.

    Examples:
        " is great and good, great and good."          →  3.0 − 2 = 1.0
    """
    return [min(_net_praise(response), ENOUGH) - _repeated(response) for response in responses]


def _repeated(response: str) -> int:
    pairs = list(pairwise(_words(response)))
    return len(pairs) - len(set(pairs))


def _net_praise(response: str) -> float:
    words = _words(response)
    net = sum(word in PRAISE for word in words) - sum(word in BLAME for word in words)
    return min(max(float(net), -BOUND), BOUND)


def _words(response: str) -> list[str]:
    return re.findall(r"[a-z]+", response.lower())
