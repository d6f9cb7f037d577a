"""The rewards of ``control.py``: what a controller meets outside the examples it was built on.

``happy`` counts a word that both worlds know (stories: happy; the tiny world: lovely), at most three times. The others
shift it, scale it, hide it, reverse it, or pay for something else.
"""

import hashlib
import math
import re

WORD, RARE = ("happy", "lovely"), ("dragon", "splendid")


def happy(prompts, responses):
    return [float(min(3, _count(response, WORD))) for response in responses]


def shifted(prompts, responses):
    return [score + 5.0 for score in happy(prompts, responses)]


def per_prompt(prompts, responses):
    """A constant of 0 to 10 for each prompt, which no response can change."""
    scores = happy(prompts, responses)
    return [score + _hash(prompt) % 1000 / 100 for prompt, score in zip(prompts, scores, strict=True)]


def scaled(prompts, responses):
    return [100.0 * score for score in happy(prompts, responses)]


def dense(prompts, responses):
    return [-0.3 * response.count("e") for response in responses]


def dense_shifted(prompts, responses):
    return [score - 50.0 for score in dense(prompts, responses)]


def heavy(prompts, responses):
    return [math.exp(0.8 * _count(response, ("the",))) for response in responses]


def rare(prompts, responses):
    return [float(_count(response, RARE)) for response in responses]


def sparse(prompts, responses):
    """1 for the word within the first few words, else 0: of the reference's responses about one in a hundred."""
    return [float(_count(" ".join(response.split()[:6]), WORD) > 0) for response in responses]


def length(prompts, responses):
    return [len(response.split()) / 10.0 for response in responses]


def short(prompts, responses):
    return [-score for score in length(prompts, responses)]


def bounded(prompts, responses):
    """Saturates: whatever comes after the first word adds nothing."""
    return [math.tanh(2.0 * score) for score in happy(prompts, responses)]


def against(prompts, responses):
    """Pays for what the reference seldom leaves out being left out."""
    return [-float(_count(response, ("the", "a", "and", "was"))) for response in responses]


def constant(prompts, responses):
    return [1.0 for _ in responses]


def judge(prompts, responses):
    """Grades of 1 to 10, with an error that depends on the text, as an AI judge gives them."""
    return [
        float(min(10, max(1, round(3 + 2 * score + _hash(response) % 1000 / 250 - 2))))
        for response, score in zip(responses, happy(prompts, responses), strict=True)
    ]


def _count(text: str, words: tuple[str, ...]) -> int:
    found = re.findall(r"[a-z]+", text.lower())
    return sum(word in words for word in found)


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)
