"""Where scores come from: the kinds of an entry of ``reward``, and whether an AI judge can be asked as it says."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from kltune.recipe.faults import Clash
from kltune.recipe.sections.fields import Count, Lines, NotNegative, Positive, Section, Text, is_changed

KeyName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(KEY|TOKEN)$")]
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HOW = {"weight", "normalize", "name", "concurrency", "timeout_s", "retries", "key_env"}   # no other scorer by them
NO_SCORES = "a preference between two responses is no score: write mode: score"


def scorers_of(recipe: Any) -> dict[str, "RewardEntry"]:
    """Every entry of a recipe that scores or prefers responses, by its key."""
    entries = {f"reward.{place}": entry for place, entry in enumerate(getattr(recipe, "reward", ()))}
    held_out = {f"eval.{name}": getattr(recipe.eval, name) for name in ("gold", "judge")}
    return entries | {key: entry for key, entry in held_out.items() if entry is not None}


def judges(recipe: Any) -> Iterator[Clash]:
    """Every judge can be reached without giving its key away, and is asked for what the stage can use."""
    for key, entry in scorers_of(recipe).items():
        if not isinstance(entry, JudgeReward):
            continue
        yield from address(key, entry)
        if entry.mode == "score" and entry.lowest >= entry.highest:
            yield ((f"{key}.lowest", f"{key}.highest"),
                   f"found {entry.lowest:g}, wanted less than highest, {entry.highest:g}")
        if asks_for_pairs(entry) and key != "eval.judge":
            yield from preference(recipe, key, entry)


PromptInput = Annotated[Literal["text", "messages"], Field(
    description="how prompts reach it: as text, or as the messages that the policy was asked by, with their roles "
    "(a plain prompt is one of the user)",
)]


class JudgeReward(Section):
    """A language model behind an OpenAI-compatible chat endpoint, asked for a number, or which of two is better."""

    kind: Literal["judge"] = Field(description="a language model that is asked")
    url: Text = Field(
        description="address of the endpoint without /chat/completions, such as http://127.0.0.1:8000/v1",
        examples=["http://127.0.0.1:8000/v1"],
    )
    model: Text = Field(description="the model's name there", examples=["Qwen/Qwen2.5-7B-Instruct"])
    mode: Literal["score", "pair"] = Field(
        "score", description="score asks for a number; pair which of two is better, in both orders (online dpo and "
        "eval.judge)"
    )
    rubric: Lines = Field(
        "Judge how well a response does what its prompt asks for: right, helpful and clearly written. A longer "
        "response is not a better one.",
        description="what is good, in words; the form of the answer is asked for by kltune",
    )
    lowest: float = Field(0.0, description="number of the worst response; it becomes a score of 0 (mode: score)")
    highest: float = Field(10.0, description="number of the best response; it becomes a score of 1 (mode: score)")
    temperature: NotNegative | None = Field(
        0.0, description="temperature of the judge's answers; null leaves it to the endpoint"
    )
    max_tokens: Count | None = Field(
        256, description="tokens of an answer; a judge that thinks aloud needs more; null leaves it to the endpoint"
    )
    concurrency: Annotated[int, Field(ge=1, le=256)] = Field(8, description="questions under way at once")
    timeout_s: Positive = Field(60.0, description="seconds until a question counts as not answered")
    retries: Annotated[int, Field(ge=0, le=100)] = Field(
        6, description="times that a question is asked again, waiting 1, 2, 4, ... 60 s; then the run saves and stops"
    )
    key_env: KeyName | None = Field(
        None, description="name of the environment variable with the endpoint's key, ending in KEY or TOKEN; null "
        "sends none", examples=["JUDGE_API_KEY"]
    )
    input: PromptInput = "text"
    weight: float = Field(1.0, description="factor in the sum of scores")
    normalize: bool = Field(False, description="standardise on responses of the reference")
    name: Text | None = Field(None, description="its name in the metrics", examples=["helpful"])


def templates(recipe: Any) -> Iterator[Clash]:
    """A chat template is for a prompt and its response."""
    for key, entry in scorers_of(recipe).items():
        if getattr(entry, "template", None) == "chat" and entry.input == "response":
            yield ((f"{key}.template", f"{key}.input"),
                   "found chat, but it reads the response alone; write input: prompt_response, or template: none")


def address(key: str, entry: JudgeReward) -> Iterator[Clash]:
    """A plain web address; with a key, one on which nobody can listen."""
    try:
        url = urlsplit(entry.url)
        sound = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        url, sound = urlsplit(""), False
    if "@" in url.netloc or url.query or url.fragment:
        yield ((f"{key}.url",), "has a user, a query or a fragment in it, wanted a plain address; a key goes into an "
               "environment variable: write key_env: its name")
    elif not sound or " " in entry.url or not entry.url.isascii():
        yield (f"{key}.url",), f"found {entry.url}, wanted an address such as http://127.0.0.1:8000/v1"
    elif url.path.rstrip("/").endswith("/chat/completions"):
        yield (f"{key}.url",), f"found {entry.url}, wanted it without /chat/completions, which kltune adds"
    elif entry.key_env is not None and url.scheme == "http" and url.hostname not in LOOPBACK:
        yield ((f"{key}.key_env", f"{key}.url"), f"found a key for {entry.url}: over http it can be read on its way; "
               "write https://, or null for no key")


def preference(recipe: Any, key: str, entry: JudgeReward) -> Iterator[Clash]:
    """A preference makes pairs of dpo, alone, or the win rate of eval.judge; nothing else reads one."""
    if key == "eval.gold":
        yield (f"{key}.mode",), f"found pair, wanted score: {NO_SCORES}, or eval.judge in the place of eval.gold"
    elif recipe.stage != "dpo":
        yield ((f"{key}.mode",), "found pair, wanted score: among the answers to one prompt the mean of all "
               f"preferences is a half whatever the policy does, and {recipe.stage} wants a score that can rise; "
               "write mode: score, or stage: dpo with dpo.source: online")
    elif len(recipe.reward) > 1:
        yield (f"{key}.mode",), f"found pair beside other entries, wanted it alone: {NO_SCORES} to sum them"
    for name in ("lowest", "highest", "weight", "normalize"):
        if is_changed(entry, name):
            yield (f"{key}.{name}", f"{key}.mode"), "read only by mode: score; remove it"


class FunctionReward(Section):
    """A Python function ``score(prompts, responses) -> list[float]`` beside the recipe.

    With a third parameter ``rows`` it also gets the data row of each prompt, its other fields and messages included;
    with ``input: messages`` prompts are lists of messages.
    """

    kind: Literal["function"] = Field(description="a Python function")
    path: Text = Field(
        description="file.py:function, the file in the recipe's own folder", examples=["rewards.py:score"]
    )
    input: PromptInput = "text"
    weight: float = Field(1.0, description="factor in the sum of scores")
    normalize: bool = Field(False, description="standardise on responses of the reference")
    name: Text | None = Field(None, description="its name in the metrics", examples=["helpful"])


ReadTemplate = Annotated[Literal["auto", "chat", "none"], Field(
    description="how a sequence classifier reads prompt and response: in its own chat template (chat), as plain text "
    "(none), or auto: rows of messages in its template if it has one",
)]


class ModelReward(Section):
    """A reward model: a kltune reward adapter, or a sequence classifier with one output."""

    kind: Literal["model"] = Field(description="a reward model")
    path: Text = Field(
        description="folder of a kltune reward adapter or a model, or a hub name", examples=["runs/reward/final"]
    )
    weight: float = Field(1.0, description="factor in the sum of scores")
    normalize: bool = Field(False, description="standardise on responses of the reference")
    name: Text | None = Field(None, description="its name in the metrics", examples=["helpful"])
    input: Literal["prompt_response", "response"] = Field("prompt_response", description="what the model reads")
    template: ReadTemplate = "auto"


class ClassifierReward(Section):
    """A text classifier, scored by how sure it is of one label."""

    kind: Literal["classifier"] = Field(description="a text classifier")
    path: Text = Field(description="folder of a model, or a hub name", examples=["path/to/classifier"])
    label: Text | None = Field(
        None, description="the label to raise; null only for a model with a single output", examples=["POSITIVE"]
    )
    output: Literal["logit", "probability"] = Field("logit", description="the label's log-odds, or its probability")
    weight: float = Field(1.0, description="factor in the sum of scores")
    normalize: bool = Field(False, description="standardise on responses of the reference")
    name: Text | None = Field(None, description="its name in the metrics", examples=["helpful"])
    input: Literal["prompt_response", "response"] = Field("response", description="what the classifier reads")
    template: ReadTemplate = "auto"


def asks_for_pairs(entry: Section) -> bool:
    """Whether a reward entry prefers one response to another, and gives no score."""
    return isinstance(entry, JudgeReward) and entry.mode == "pair"


RewardEntry = Annotated[FunctionReward | ModelReward | ClassifierReward | JudgeReward, Field(discriminator="kind")]
RewardList = Annotated[tuple[RewardEntry, ...], Field(strict=False)]
