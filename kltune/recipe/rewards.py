"""Where scores come from: the kinds of an entry of ``reward``."""

from typing import Annotated, Literal

from pydantic import Field

from kltune.recipe.fields import Count, Lines, NotNegative, Positive, Section, Text


class FunctionReward(Section):
    """A Python function ``score(prompts, responses) -> list[float]`` beside the recipe."""

    kind: Literal["function"] = Field(description="a Python function")
    path: Text = Field(description="file.py:function, the file in the recipe's own folder")
    weight: float = Field(1.0, description="factor in the sum of scores")
    normalize: bool = Field(False, description="standardise on responses of the reference")
    name: Text | None = Field(None, description="its name in the metrics")


class ModelReward(Section):
    """A reward model: a kltune reward adapter, or a sequence classifier with one output."""

    kind: Literal["model"] = Field(description="a reward model")
    path: Text = Field(description="folder of a kltune reward adapter or a model, or a hub name")
    weight: float = Field(1.0, description="factor in the sum of scores")
    normalize: bool = Field(False, description="standardise on responses of the reference")
    name: Text | None = Field(None, description="its name in the metrics")
    input: Literal["prompt_response", "response"] = Field("prompt_response", description="what the model reads")


class ClassifierReward(Section):
    """A text classifier, scored by how sure it is of one label."""

    kind: Literal["classifier"] = Field(description="a text classifier")
    path: Text = Field(description="folder of a model, or a hub name")
    label: Text | None = Field(None, description="the label to raise; null only for a model with a single output")
    output: Literal["logit", "probability"] = Field("logit", description="the label's log-odds, or its probability")
    weight: float = Field(1.0, description="factor in the sum of scores")
    normalize: bool = Field(False, description="standardise on responses of the reference")
    name: Text | None = Field(None, description="its name in the metrics")
    input: Literal["prompt_response", "response"] = Field("response", description="what the classifier reads")


class JudgeReward(Section):
    """A language model behind an OpenAI-compatible chat endpoint, asked for a number, or which of two is better."""

    kind: Literal["judge"] = Field(description="a language model that is asked")
    url: Text = Field(description="address of the endpoint without /chat/completions, such as http://127.0.0.1:8000/v1")
    model: Text = Field(description="the model's name there")
    mode: Literal["score", "pair"] = Field(
        "score", description="score asks for a number; pair which of two is better, in both orders (online dpo)"
    )
    rubric: Lines = Field(
        "Judge how well a response does what its prompt asks for: right, helpful and clearly written. A longer "
        "response is not a better one.",
        description="what is good, in words; the form of the answer is asked for by kltune",
    )
    lowest: float = Field(0.0, description="number of the worst response; it becomes a score of 0 (mode: score)")
    highest: float = Field(10.0, description="number of the best response; it becomes a score of 1 (mode: score)")
    temperature: NotNegative | None = Field(0.0, description="of the judge's answers; null leaves it to the endpoint")
    max_tokens: Count | None = Field(
        256, description="of an answer; a judge that thinks aloud needs more; null leaves it to the endpoint"
    )
    concurrency: Annotated[int, Field(ge=1, le=256)] = Field(8, description="questions under way at once")
    timeout_s: Positive = Field(60.0, description="seconds until a question counts as not answered")
    retries: Annotated[int, Field(ge=0, le=100)] = Field(
        6, description="times that a question is asked again, waiting 1, 2, 4, ... 60 s; then the run saves and stops"
    )
    key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(KEY|TOKEN)$")] | None = Field(
        None, description="name of the environment variable with the endpoint's key, ending in KEY or TOKEN; null "
        "sends none"
    )
    weight: float = Field(1.0, description="factor in the sum of scores")
    normalize: bool = Field(False, description="standardise on responses of the reference")
    name: Text | None = Field(None, description="its name in the metrics")


def asks_for_pairs(entry: Section) -> bool:
    """Whether a reward entry prefers one response to another, and gives no score."""
    return isinstance(entry, JudgeReward) and entry.mode == "pair"


RewardEntry = Annotated[FunctionReward | ModelReward | ClassifierReward | JudgeReward, Field(discriminator="kind")]
RewardList = Annotated[tuple[RewardEntry, ...], Field(strict=False)]
