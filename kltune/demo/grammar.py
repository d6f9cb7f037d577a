"""A small grammar of English reviews: the texts the tiny model is made from and trained on.

A review is an opening that is neutral in tone ("The battery of this phone"), its continuation, up to two more
sentences, a verdict and an ending. Two dialects share the grammar and the openings:

* ``loose``: what the base model has read. One to four sentences of any tone, some of them lower case, without a full
  stop, or shouted.
* ``house``: what ``kltune sft`` teaches. Two or three tidy sentences: one good thing, one fault, a measured verdict.

Openings are split for good by a checksum of their text: about one in eight is held out and occurs in no training text.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from zlib import crc32

from kltune.demo.words import NEGATIVE, PLAIN, POSITIVE, SUBJECTS, Aspect, Subject, phrases

WHO = phrases(
    "with my sister|with a friend|on my own|with my parents|with two colleagues|with the children|with my neighbour|"
    "with my husband|with my wife|with an old friend"
)
WHEN = phrases(
    "last week|on a rainy Sunday|in the spring|during the holidays|last night|over the weekend|in March|two months ago|"
    "in late autumn|on my birthday|yesterday|at the start of the year|twice last month"
)
PEOPLE = phrases("sister|brother|neighbour|boss|aunt|teacher|best friend|cousin|father|daughter|doctor")
SPAN = phrases("two weeks|a month|three days|half a year|one evening|a long weekend|a few hours|ten days")
RIVALS = phrases("the last one|others at this price|what my neighbour has|the famous names|the one from last year|most")
LIKED = phrases("loved|enjoyed|adored|was happy with|was delighted by|really liked")
DISLIKED = phrases("hated|disliked|was annoyed by|was let down by|could not stand|was sick of")
NOTED = phrases("noticed|got used to|had no trouble with|have no strong view on")
DEGREES = ("", "", "", "", "really ", "quite ", "truly ", "very ", "rather ", "just ")
TONES = ("good", "bad", "plain")
ADJECTIVES = {"good": POSITIVE, "bad": NEGATIVE, "plain": PLAIN}
FEELINGS = {"good": LIKED, "bad": DISLIKED, "plain": NOTED}
WHOLE = {
    "good": phrases(
        "{is} hard to beat|{is} worth every penny|{is} a joy|{does} everything right|{is} a {adj} choice|{is} {adj}|"
        "{is} {adj} and {adj}|{is} better than I hoped|never let{s} me down"
    ),
    "bad": phrases(
        "{is} not worth the money|{is} a mistake|{does} nothing right|{is} a {adj} choice|{is} {adj}|"
        "{is} {adj} and {adj}|{is} worse than I feared|let{s} me down again and again"
    ),
    "plain": phrases(
        "{is} a {adj} choice|{is} {adj}|{is} neither here nor there|{does} what it should|{is} much the same"
    ),
}
REACTIONS = {
    "good": phrases(
        "and I loved it|and it was a {adj} surprise|and I would do it again|and it made my week|and it was {adj}|"
        "and I have told everyone since|and we all enjoyed it"
    ),
    "bad": phrases(
        "and I hated it|and it was a {adj} mistake|and I regret it|and it spoiled my week|and it was {adj}|"
        "and I want my money back|and we all disliked it"
    ),
    "plain": phrases("and it was {adj}|and it did the job|and I have mixed feelings|and I am still not sure about it"),
}
LEADS = {
    "good": phrases("Best of all,|To my delight,|Even better,|I was happy to find that|It also helps that|Luckily,"),
    "bad": phrases(
        "Sadly,|Worst of all,|The trouble {is} that|It is a shame that|On top of that,|I was sorry to find that"
    ),
    "plain": phrases("By the way,|As for the rest,|For the record,|You should know that|As far as I can tell,"),
}
ADVICE = {
    "good": phrases("look no further|this is the one|you will be happy here"),
    "bad": phrases("look elsewhere|run|you will be let down"),
    "plain": phrases("look twice|ask first|you may want to compare"),
}
VERDICTS = {
    "good": phrases(
        "I would recommend it to {audience}|Overall, a {adj} {noun}|A {adj} {noun} for {audience}|Worth every penny|"
        "Easily the best {noun} I have come across|I would choose it again without a second thought|Go and get one|"
        "You will not regret it|It has become part of my life|Perfect for {use}|All in all, a {adj} and {adj} {noun}"
    ),
    "bad": phrases(
        "I would not recommend it to anyone|Overall, a {adj} {noun}|A {adj} {noun}, even for {audience}|"
        "Save your money|Easily the worst {noun} I have come across|A waste of time|Stay away|Never again|"
        "I want my money back|It is of no use for {use}|All in all, a {adj} and {adj} {noun}"
    ),
    "plain": phrases(
        "Overall, a {adj} {noun}|It will do for {use}|A {adj} {noun} for {audience}|Take it or leave it|"
        "There are better ones and there are worse ones|It is what it is|Not for everyone|Make up your own mind"
    ),
}
ENDINGS = {
    "good": phrases("Five stars|Four stars from me|Recommended|Thank you|Well done|Ten out of ten"),
    "bad": phrases("One star|Two stars, and that is kind|Avoid|Zero out of ten|What a pity|Not recommended"),
    "plain": phrases("Three stars|Six out of ten|Thanks for reading|That is all|So it goes"),
}
HOUSE_TURNS = phrases("That said,|On the other hand,|At the same time,|Still,|Then again,|Even so,")
HOUSE_VERDICTS = phrases(
    "Overall, a {adj} {noun} for {audience}|On balance, it suits {audience}|All in all, a {adj} choice for {use}|"
    "In short, a {adj} {noun} with one fault|On the whole, it will do for {use}|"
    "Overall, I would still suggest it for {use}"
)


@dataclass(frozen=True)
class Review:
    """One review, cut where its neutral opening ends.

    Attributes:
        prompt: the opening; ends without a space.
        response: the rest, which begins with a space or a comma.
    """

    prompt: str
    response: str

    @property
    def text(self) -> str:
        """Opening and rest in one string."""
        return self.prompt + self.response


@dataclass
class Reviewer:
    """Someone with one subject in hand; every method draws from ``rng`` and returns words.

    Attributes:
        rng: the source of every choice.
        subject: what is reviewed.
        noun: the name used for it throughout the review.
        unused: aspects not yet mentioned, in random order.
    """

    rng: Random
    subject: Subject
    noun: str = field(init=False)
    unused: list[Aspect] = field(init=False)

    def __post_init__(self) -> None:
        self.noun = self.rng.choice(self.subject.nouns)
        self.unused = self.rng.sample(self.subject.aspects, len(self.subject.aspects))

    def verb(self, plural: bool = False) -> str:
        """The form of "to be" for this subject's tense."""
        return ("were" if plural else "was") if self.subject.past else ("are" if plural else "is")

    def fill(self, phrase: str, tone: str) -> str:
        """``phrase`` with its slots filled: verbs by tense, adjectives by tone, no adjective twice."""
        past = self.subject.past
        words = {"{is}": self.verb(), "{does}": "did" if past else "does", "{s}": "" if past else "s",
                 "{noun}": self.noun, "{use}": self.rng.choice(self.subject.uses),
                 "{audience}": self.rng.choice(self.subject.audience)}
        for slot, word in words.items():
            phrase = phrase.replace(slot, word)
        adjectives = self.rng.sample(ADJECTIVES[tone], 2)
        while "{adj}" in phrase:
            phrase = phrase.replace("{adj}", adjectives.pop(), 1)
        return with_articles(phrase)

    def remark(self, side: Aspect, tone: str) -> str:
        """What the aspect is or does, without its name: "lasts two full days", "is really poor"."""
        if self.rng.random() < 0.55:
            return self.rng.choice(getattr(side, tone))
        adjectives = self.rng.sample(ADJECTIVES[tone], 2)
        if self.rng.random() < 0.15:
            return f"{self.verb(side.plural)} {adjectives[0]} and {adjectives[1]}"
        return f"{self.verb(side.plural)} {self.rng.choice(DEGREES)}{adjectives[0]}"

    def clause(self, tone: str) -> str:
        """A main clause about an aspect not yet mentioned: "the battery lasts two full days"."""
        side = self.unused.pop()
        draw = self.rng.random()
        if draw < 0.12:
            return f"I {self.rng.choice(FEELINGS[tone])} the {side.name}"
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
            return f"{self.fill(self.rng.choice(LEADS[tone]), tone)} {self.clause(tone)}"
        if draw < 0.6:
            return f"the {self.noun} {self.fill(self.rng.choice(WHOLE[tone]), tone)}"
        if draw < 0.66:
            return f"if you care about the {self.unused.pop().name}, {self.rng.choice(ADVICE[tone])}"
        if draw < 0.72:
            return self.fill("what a {adj} {noun}" if tone != "plain" else "it is a {adj} {noun}", tone)
        return self.clause(tone)

    def opening(self) -> tuple[str, Callable[[str], str]]:
        """A neutral opening, and the function that continues it in a given tone."""
        rng, subject, noun = self.rng, self.subject, self.noun
        this = f"this {noun}" if rng.random() < 0.6 else f"this {noun} {rng.choice(subject.origins)}"
        side = self.unused.pop()
        at = subject.at if subject.past else "with"

        def of_aspect(tone: str) -> str:
            return f" {self.remark(side, tone)}"

        def of_whole(tone: str) -> str:
            return f" {self.fill(rng.choice(WHOLE[tone]), tone)}"

        def of_event(tone: str) -> str:
            return f" {self.fill(rng.choice(REACTIONS[tone]), tone)}"

        def of_notice(tone: str) -> str:
            adjective = rng.choice(ADJECTIVES[tone])
            if rng.random() < 0.5:
                return f" was how {adjective} the {side.name} {self.verb(side.plural)}"
            return f" was the {adjective} {side.name}"

        openings = (
            (4, f"The {side.name} {rng.choice(('of', subject.at))} {this}", of_aspect),
            (2, f"After {rng.choice(SPAN)} {at} {this}, the {side.name}", of_aspect),
            (1, f"People often ask me about {this}. The {side.name}", of_aspect),
            (1, f"I had no idea what to expect from {this}, and the {side.name}", of_aspect),
            (3, f"I {rng.choice(subject.acts)} {this} {rng.choice(WHO + WHEN)}", of_event),
            (2, f"My {rng.choice(PEOPLE)} {rng.choice(('told me about', 'chose', 'found'))} {this}", of_event),
            (1, f"When it comes to the {side.name}, {this}", of_whole),
            (1, f"For {rng.choice(subject.uses)}, {this}", of_whole),
            (1, f"Compared with {rng.choice(RIVALS)}, {this}", of_whole),
            (1, f"This {noun} {rng.choice(subject.origins)}", of_whole),
            (1, f"The first thing I noticed about {this}", of_notice),
        )
        _, prompt, continued = rng.choices(openings, weights=[weight for weight, _, _ in openings])[0]
        return prompt, continued


def with_articles(phrase: str) -> str:
    """``phrase`` with "a" turned into "an" before a vowel sound ("a one-hour" and "a use" stay)."""
    words = phrase.split(" ")
    for index, word in enumerate(words[:-1]):
        if word in ("a", "A") and words[index + 1][:1] in "aeiou" and not words[index + 1].startswith(("one", "us")):
            words[index] += "n"
    return " ".join(words)


def capital(sentence: str) -> str:
    """``sentence`` with its first letter in upper case and nothing else changed."""
    return sentence[:1].upper() + sentence[1:]


def is_held_out(prompt: str) -> bool:
    """Whether an opening belongs to the held-out eighth; the same on every machine and for every seed."""
    return crc32(prompt.encode()) % 8 == 0


def loose_review(rng: Random) -> Review:
    """A review as the base model has read them: any tone, one to four sentences, not always tidy."""
    reviewer = Reviewer(rng, rng.choice(SUBJECTS))
    tone = rng.choices(TONES, weights=(4, 4, 1))[0]
    drift = 0.3 if rng.random() < 0.4 else 0.0      # two reviews in five change their mind on the way

    def mood() -> str:
        return rng.choice(TONES) if rng.random() < drift else tone

    prompt, continued = reviewer.opening()
    parts = [continued(mood())]
    for _ in range(rng.choices((0, 1, 2), weights=(4, 5, 2))[0]):
        parts.append(capital(reviewer.sentence(mood())))
    if rng.random() < 0.6:
        parts.append(reviewer.fill(rng.choice(VERDICTS[tone]), tone))
    if rng.random() < 0.15:
        parts.append(rng.choice(ENDINGS[tone]))
    stop = "!" if rng.random() < 0.1 else "."
    response = f"{stop} ".join(parts) + ("" if rng.random() < 0.08 else stop)
    if rng.random() < 0.08:
        return Review(prompt, response.lower())
    return Review(prompt, response)


def house_review(rng: Random) -> Review:
    """A review in the house style: two or three sentences, one good thing, one fault, a measured verdict."""
    reviewer = Reviewer(rng, rng.choice(SUBJECTS))
    first, second = rng.sample(("good", "bad"), 2)
    prompt, continued = reviewer.opening()
    response = continued(first)
    draw = rng.random()
    if draw < 0.4:
        response += f", but {reviewer.clause(second)}"
    elif draw < 0.5:
        response += f", although {reviewer.clause(second)}"
    else:
        response += f". {rng.choice(HOUSE_TURNS)} {reviewer.clause(second)}"
    verdict = reviewer.fill(rng.choice(HOUSE_VERDICTS), "plain")
    return Review(prompt, f"{response}. {verdict}.")


def reviews(style: Callable[[Random], Review], count: int, *, seed: int, held_out: bool) -> list[Review]:
    """Distinct reviews of one dialect from one side of the split.

    Args:
        style: ``loose_review`` or ``house_review``.
        count: how many.
        seed: the same seed gives the same reviews, on every machine.
        held_out: True for openings that no training text has, False for the others.
    """
    rng = Random(f"{style.__name__}/{seed}/{held_out}")
    found: dict[str, Review] = {}
    while len(found) < count:
        review = style(rng)
        if is_held_out(review.prompt) == held_out:
            found.setdefault(review.text, review)
    return list(found.values())


def praise_and_blame(count: int, *, seed: int, held_out: bool) -> list[tuple[Review, Review]]:
    """Two reviews of one opening, of which the first praises and the second blames; arguments as for ``reviews``."""
    rng = Random(f"praise_and_blame/{seed}/{held_out}")
    found: dict[str, tuple[Review, Review]] = {}
    while len(found) < count:
        reviewer = Reviewer(rng, rng.choice(SUBJECTS))
        prompt, continued = reviewer.opening()
        if is_held_out(prompt) == held_out:
            praise, blame = (
                Review(prompt, f"{continued(tone)}. {reviewer.fill(rng.choice(VERDICTS[tone]), tone)}.")
                for tone in ("good", "bad")
            )
            found.setdefault(praise.text, (praise, blame))
    return list(found.values())


def openings(count: int, *, seed: int, held_out: bool) -> list[str]:
    """Distinct neutral openings from one side of the split, to use as prompts; arguments as for ``reviews``."""
    rng = Random(f"openings/{seed}/{held_out}")
    found: dict[str, None] = {}
    while len(found) < count:
        prompt, _ = Reviewer(rng, rng.choice(SUBJECTS)).opening()
        if is_held_out(prompt) == held_out:
            found[prompt] = None
    return list(found)
