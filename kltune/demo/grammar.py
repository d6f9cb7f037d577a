"""A small grammar of English reviews: the texts the tiny model is made from and trained on.

A review is an opening that is neutral in tone ("The battery of this phone"), its continuation, up to two more
sentences, a verdict and an ending. Two dialects share the grammar and the openings:

* ``loose``: what the base model has read. One to four sentences of any tone, some of them lower case, without a full
  stop, or shouted.
* ``house``: what ``kltune sft`` teaches. Two or three tidy sentences: one good thing, one fault, a measured verdict.

Openings are split for good by a checksum of their text: about one in eight is held out and occurs in no training text.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import yaml

DEGREES = ("", "", "", "", "really ", "quite ", "truly ", "very ", "rather ", "just ")
TONES = ("good", "bad", "plain")


@dataclass(frozen=True)
class Aspect:
    """One side of a topic. plural: whether verbs after its name are. said: predicates of each tone, with their verb."""

    name: str
    plural: bool
    said: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Topic:
    """One kind of thing that gets reviewed; words.yaml says what its fields are."""

    nouns: tuple[str, ...]
    past: bool
    at: str
    acts: tuple[str, ...]
    origins: tuple[str, ...]
    uses: tuple[str, ...]
    audience: tuple[str, ...]
    aspects: tuple[Aspect, ...]


def phrases(value: Any) -> Any:
    """What words.yaml holds, with a tuple of phrases for every text."""
    if isinstance(value, str):
        return tuple(" ".join(phrase.split()) for phrase in value.split("|"))
    return {key: phrases(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _topic(entry: dict[str, Any]) -> Topic:
    aspects = (
        Aspect(name.rstrip("+"), name.endswith("+"), phrases(said)) for name, said in entry["aspects"].items()
    )
    return Topic(**phrases(entry) | {"at": entry["at"], "aspects": tuple(aspects)})


_TABLES = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
TOPICS = tuple(_topic(entry) for entry in _TABLES.pop("topics"))
WORDS: dict[str, Any] = phrases(_TABLES)      # {table: phrases}, or {table: {tone: phrases}}


@dataclass(frozen=True)
class Review:
    """One review, cut where its neutral opening ends; the response begins with a space or a comma."""

    prompt: str
    response: str

    @property
    def text(self) -> str:
        """Opening and rest in one string."""
        return self.prompt + self.response


@dataclass
class Reviewer:
    """The author of one review of one topic; every method draws from ``rng`` and returns words.

    noun: the topic's name throughout the review. unused: aspects not yet mentioned, in random order.
    """

    rng: Random
    topic: Topic
    noun: str = field(init=False)
    unused: list[Aspect] = field(init=False)

    def __post_init__(self) -> None:
        self.noun = self.rng.choice(self.topic.nouns)
        self.unused = self.rng.sample(self.topic.aspects, len(self.topic.aspects))

    def pick(self, table: str, tone: str | None = None) -> str:
        """A phrase from one of the tables of words.yaml."""
        return self.rng.choice(WORDS[table] if tone is None else WORDS[table][tone])

    def verb(self, plural: bool = False) -> str:
        """The form of "to be" for this topic's tense."""
        return ("were" if plural else "was") if self.topic.past else ("are" if plural else "is")

    def fill(self, phrase: str, tone: str) -> str:
        """``phrase`` with its slots filled: verbs by tense, adjectives by tone, no adjective twice."""
        past = self.topic.past
        words = {"{is}": self.verb(), "{does}": "did" if past else "does", "{s}": "" if past else "s",
                 "{noun}": self.noun, "{use}": self.rng.choice(self.topic.uses),
                 "{audience}": self.rng.choice(self.topic.audience)}
        for slot, word in words.items():
            phrase = phrase.replace(slot, word)
        adjectives = self.rng.sample(WORDS["adjectives"][tone], 2)
        while "{adj}" in phrase:
            phrase = phrase.replace("{adj}", adjectives.pop(), 1)
        return with_articles(phrase)

    def remark(self, side: Aspect, tone: str) -> str:
        """What the aspect is or does, without its name: "lasts two full days", "is really poor"."""
        if self.rng.random() < 0.55:
            return self.rng.choice(side.said[tone])
        adjectives = self.rng.sample(WORDS["adjectives"][tone], 2)
        if self.rng.random() < 0.15:
            return f"{self.verb(side.plural)} {adjectives[0]} and {adjectives[1]}"
        return f"{self.verb(side.plural)} {self.rng.choice(DEGREES)}{adjectives[0]}"

    def clause(self, tone: str) -> str:
        """A main clause about an aspect not yet mentioned: "the battery lasts two full days"."""
        side = self.unused.pop()
        draw = self.rng.random()
        if draw < 0.12:
            return f"I {self.pick('feelings', tone)} the {side.name}"
        if draw < 0.2 and len(self.unused) > 2:      # leaves two for the longest review: one sentence of contrast
            other = self.unused.pop()
            return f"the {side.name} {self.remark(side, tone)} and the {other.name} {self.remark(other, tone)}"
        return f"the {side.name} {self.remark(side, tone)}"

    def sentence(self, tone: str) -> str:
        """A sentence of one tone, or of two joined by a contrast, without its full stop."""
        draw = self.rng.random()
        other = {"good": "bad", "bad": "good", "plain": "good"}[tone]
        if draw < 0.15:
            return f"{self.clause(other)}, but {self.clause(tone)}"
        if draw < 0.25:
            return f"{self.rng.choice(('while', 'although', 'even if'))} {self.clause(other)}, {self.clause(tone)}"
        if draw < 0.5:
            return f"{self.fill(self.pick('leads', tone), tone)} {self.clause(tone)}"
        if draw < 0.6:
            return f"the {self.noun} {self.fill(self.pick('whole', tone), tone)}"
        if draw < 0.66:
            return f"if you care about the {self.unused.pop().name}, {self.pick('advice', tone)}"
        if draw < 0.72:
            return self.fill("what a {adj} {noun}" if tone != "plain" else "it is a {adj} {noun}", tone)
        return self.clause(tone)

    def opening(self) -> tuple[str, Callable[[str], str]]:
        """A neutral opening, and the function that continues it in a given tone."""
        rng, topic, noun = self.rng, self.topic, self.noun
        this = f"this {noun}" if rng.random() < 0.6 else f"this {noun} {rng.choice(topic.origins)}"
        side = self.unused.pop()
        at = topic.at if topic.past else "with"

        def of_aspect(tone: str) -> str:
            return f" {self.remark(side, tone)}"

        def of_whole(tone: str) -> str:
            return f" {self.fill(self.pick('whole', tone), tone)}"

        def of_event(tone: str) -> str:
            return f" {self.fill(self.pick('reactions', tone), tone)}"

        def of_notice(tone: str) -> str:
            adjective = self.pick("adjectives", tone)
            if rng.random() < 0.5:
                return f" was how {adjective} the {side.name} {self.verb(side.plural)}"
            return f" was the {adjective} {side.name}"

        openings = (
            (4, f"The {side.name} {rng.choice(('of', topic.at))} {this}", of_aspect),
            (2, f"After {self.pick('span')} {at} {this}, the {side.name}", of_aspect),
            (1, f"People often ask me about {this}. The {side.name}", of_aspect),
            (1, f"I had no idea what to expect from {this}, and the {side.name}", of_aspect),
            (3, f"I {rng.choice(topic.acts)} {this} {self.pick('circumstances')}", of_event),
            (2, f"My {self.pick('people')} {rng.choice(('told me about', 'chose', 'found'))} {this}", of_event),
            (1, f"When it comes to the {side.name}, {this}", of_whole),
            (1, f"For {rng.choice(topic.uses)}, {this}", of_whole),
            (1, f"Compared with {self.pick('rivals')}, {this}", of_whole),
            (1, f"This {noun} {rng.choice(topic.origins)}", of_whole),
            (1, f"The first thing I noticed about {this}", of_notice),
        )
        _, prompt, continued = rng.choices(openings, weights=[weight for weight, _, _ in openings])[0]
        return prompt, continued


def with_articles(phrase: str) -> str:
    """``phrase`` with "a" turned into "an" before a vowel sound ("a one-hour" and "a use" stay)."""
    return re.sub(r"(?<!\S)([aA]) (?=[aeiou])(?!one|us)", r"\1n ", phrase)


def is_held_out(prompt: str) -> bool:
    """Whether an opening belongs to the held-out eighth; the same on every machine and for every seed."""
    return crc32(prompt.encode()) % 8 == 0


def loose_review(rng: Random) -> Review:
    """A review as the base model has read them: any tone, one to four sentences, not always tidy."""
    reviewer = Reviewer(rng, rng.choice(TOPICS))
    tone = rng.choices(TONES, weights=(4, 4, 1))[0]
    drift = 0.3 if rng.random() < 0.4 else 0.0      # two reviews in five change their mind on the way

    def mood() -> str:
        return rng.choice(TONES) if rng.random() < drift else tone

    prompt, continued = reviewer.opening()
    sentences = [continued(mood())]
    for _ in range(rng.choices((0, 1, 2), weights=(4, 5, 2))[0]):
        sentence = reviewer.sentence(mood())
        sentences.append(sentence[:1].upper() + sentence[1:])
    if rng.random() < 0.6:
        sentences.append(reviewer.fill(reviewer.pick("verdicts", tone), tone))
    if rng.random() < 0.15:
        sentences.append(reviewer.pick("endings", tone))
    stop = "!" if rng.random() < 0.1 else "."
    response = f"{stop} ".join(sentences) + ("" if rng.random() < 0.08 else stop)
    if rng.random() < 0.08:
        return Review(prompt, response.lower())
    return Review(prompt, response)


def house_review(rng: Random) -> Review:
    """A review in the house style: two or three sentences, one good thing, one fault, a measured verdict."""
    reviewer = Reviewer(rng, rng.choice(TOPICS))
    first, second = rng.sample(("good", "bad"), 2)
    prompt, continued = reviewer.opening()
    response = continued(first)
    draw = rng.random()
    if draw < 0.4:
        response += f", but {reviewer.clause(second)}"
    elif draw < 0.5:
        response += f", although {reviewer.clause(second)}"
    else:
        response += f". {reviewer.pick('house_turns')} {reviewer.clause(second)}"
    verdict = reviewer.fill(reviewer.pick("house_verdicts"), "plain")
    return Review(prompt, f"{response}. {verdict}.")


def reviews(style: Callable[[Random], Review], count: int, *, seed: int, held_out: bool) -> list[Review]:
    """Distinct reviews of one dialect from one side of the split.

    Args:
        style: ``loose_review`` or ``house_review``.
        seed: the same seed gives the same reviews, on every machine.
        held_out: True for openings that no training text has, False for the others.
    """
    rng = Random(f"{style.__name__}/{seed}/{held_out}")
    distinct: dict[str, Review] = {}
    while len(distinct) < count:
        review = style(rng)
        if is_held_out(review.prompt) == held_out:
            distinct.setdefault(review.text, review)
    return list(distinct.values())


def praise_and_blame(count: int, *, seed: int, held_out: bool) -> list[tuple[Review, Review]]:
    """Two reviews of one opening, of which the first praises and the second blames; arguments as for ``reviews``."""
    rng = Random(f"praise_and_blame/{seed}/{held_out}")
    distinct: dict[str, tuple[Review, Review]] = {}
    while len(distinct) < count:
        reviewer = Reviewer(rng, rng.choice(TOPICS))
        prompt, continued = reviewer.opening()
        if is_held_out(prompt) == held_out:
            praise, blame = (
                Review(prompt, f"{continued(tone)}. {reviewer.fill(reviewer.pick('verdicts', tone), tone)}.")
                for tone in ("good", "bad")
            )
            distinct.setdefault(praise.text, (praise, blame))
    return list(distinct.values())


def openings(count: int, *, seed: int, held_out: bool) -> list[str]:
    """Distinct neutral openings from one side of the split, to use as prompts; arguments as for ``reviews``."""
    rng = Random(f"openings/{seed}/{held_out}")
    distinct: dict[str, None] = {}
    while len(distinct) < count:
        prompt, _ = Reviewer(rng, rng.choice(TOPICS)).opening()
        if is_held_out(prompt) == held_out:
            distinct[prompt] = None
    return list(distinct)
