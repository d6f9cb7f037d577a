"""What the tiny corpus knows to be right: a review in the house style says nothing that no review says, and closes.

    score = 1 if it ends with a measured verdict − pairs of neighbouring words that occur in no review of the corpus

kept at −5 or above. The grammar that wrote the corpus is at hand, so this is no model of what is meant but the thing
itself: what hacking.yaml holds against a reward model that learnt from a few labels. It is never trained on.
"""

import re
from itertools import pairwise

from kltune.demo.grammar import house_review, loose_review, reviews

REVIEWS = 4000      # of each dialect: most pairs that the grammar can make
VERDICT = re.compile(r"\b(overall|on balance|all in all|in short|on the whole)\b[^.]*\.\s*$", re.IGNORECASE)
LOWEST = -5.0


def words(text: str) -> list[str]:
    """Words and the marks that part them, in lower case."""
    return re.findall(r"[a-z'-]+|[.,!]", text.lower())


def pairs(text: str) -> list[tuple[str, str]]:
    """Neighbours."""
    return list(pairwise(words(text)))


KNOWN = {
    pair
    for style in (house_review, loose_review)
    for review in reviews(style, REVIEWS, seed=0, held_out=False)
    for pair in pairs(review.text)
}


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """One number per response, 1 at best; the pair at the seam of prompt and response counts too.

    Examples:
        " is great, but the screen is dull. Overall, a fair choice."  →   1.0
        " is great great great."                                      →  −2.0
    """
    return [_house(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def _house(prompt: str, response: str) -> float:
    seam = " ".join(words(prompt)[-1:])
    strange = sum(pair not in KNOWN for pair in pairs(seam + response))
    return max(float(bool(VERDICT.search(response))) - strange, LOWEST)
