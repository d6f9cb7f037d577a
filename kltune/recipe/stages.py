"""Which sections each stage reads, and what of a recipe decides the numbers of a run."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from kltune.recipe.faults import Place
from kltune.recipe.rewards import KeyName, RewardList
from kltune.recipe.sections.fields import Count, Lines, NotNegative, Section, Text
from kltune.recipe.sections.methods import (
    BradleyTerrySection,
    DPOKLSection,
    DPOSection,
    KLSection,
    PPOSection,
    TRPOKLSection,
    TRPOSection,
)
from kltune.recipe.sections.shared import (
    DataSection,
    EvalSection,
    LoraSection,
    ModelSection,
    OptimSection,
    RunSection,
    SamplingSection,
)
from kltune.recipe.yaml_tree import Node


class Recipe(Section):
    """What all stages share, and where the file was."""

    stage: str = Field(description="what this recipe runs")
    model: ModelSection = Field(description="the frozen weights")
    lora: LoraSection = Field(default_factory=LoraSection, description="the adapter")
    data: DataSection = Field(default_factory=DataSection, description="rows")
    _folder: Path = PrivateAttr(default=Path("."))
    _name: str = PrivateAttr(default="recipe")
    _tree: Node | None = PrivateAttr(default=None)

    @property
    def folder(self) -> Path:
        """Folder of the recipe file; relative paths in the file start there."""
        return self._folder

    @property
    def name(self) -> str:
        """The recipe as it was named by who asked for it."""
        return self._name

    def place(self, key: str) -> Place:
        """Where a dotted key stands in the file, or the section around it."""
        if self._tree is None:
            return Place(self._name)
        return self._tree.place_of(tuple(int(step) if step.isdecimal() else step for step in key.split(".")))

    def __eq__(self, other: object) -> bool:
        """Recipes are equal if they say the same, wherever their files are."""
        return type(self) is type(other) and self.model_dump() == other.model_dump()

    __hash__ = None


def prompts_source(recipe: Recipe) -> str | None:
    """The file whose prompts a stage's KL is measured on; held-out ones where the recipe has any."""
    held_out, data = recipe.eval, recipe.data
    return held_out.prompts or held_out.pairs or data.prompts or data.pairs


class SFTRecipe(Recipe):
    """Imitate texts; ``lora: null`` trains every weight."""

    stage: Literal["sft"] = Field(description="what this recipe runs")
    lora: LoraSection | None = Field(default_factory=LoraSection, description="the adapter; null trains every weight")
    sampling: SamplingSection = Field(default_factory=SamplingSection, description="responses on which KL is measured")
    optim: OptimSection = Field(default_factory=OptimSection, description="optimizer")
    run: RunSection = Field(default_factory=RunSection, description="length, seed, output")
    eval: EvalSection = Field(default_factory=EvalSection, description="held-out measurements")


class RewardRecipe(Recipe):
    """Fit a Bradley-Terry reward model to preference pairs."""

    stage: Literal["reward"] = Field(description="what this recipe runs")
    bradley_terry: BradleyTerrySection = Field(default_factory=BradleyTerrySection, description="the loss")
    optim: OptimSection = Field(default_factory=OptimSection, description="optimizer")
    run: RunSection = Field(default_factory=RunSection, description="length, seed, output")
    eval: EvalSection = Field(default_factory=EvalSection, description="held-out measurements")


class RLRecipe(Recipe):
    """The sections that ppo, trpo and dpo have in common."""

    sampling: SamplingSection = Field(default_factory=SamplingSection, description="how the policy responds")
    reward: RewardList = Field((), description="scorers; the score is their weighted sum")
    kl: KLSection = Field(default_factory=KLSection, description="the budget")
    optim: OptimSection = Field(default_factory=OptimSection, description="optimizer")
    run: RunSection = Field(default_factory=RunSection, description="length, seed, output")
    eval: EvalSection = Field(default_factory=EvalSection, description="held-out measurements")


class PPORecipe(RLRecipe):
    """Raise the score with clipped policy steps while KL to the reference is held."""

    stage: Literal["ppo"] = Field(description="what this recipe runs")
    ppo: PPOSection = Field(default_factory=PPOSection, description="clipped policy steps")


class TRPORecipe(RLRecipe):
    """The same with natural-gradient steps inside a KL ball."""

    stage: Literal["trpo"] = Field(description="what this recipe runs")
    kl: TRPOKLSection = Field(default_factory=TRPOKLSection, description="the budget")
    trpo: TRPOSection = Field(default_factory=TRPOSection, description="natural-gradient steps")


class DPORecipe(RLRecipe):
    """Learn from preference pairs while KL to the reference is measured."""

    stage: Literal["dpo"] = Field(description="what this recipe runs")
    kl: DPOKLSection = Field(default_factory=DPOKLSection, description="the budget")
    dpo: DPOSection = Field(default_factory=DPOSection, description="preference pairs")


class DistillKLSection(KLSection):
    """The budget of a distillation, its price paid in the loss: beside a nat of KL to the teacher."""

    beta: Literal["auto"] | NotNegative = Field(
        "auto",
        description="what a nat of KL(policy‖reference) costs beside a nat of KL(policy‖teacher); 0 distils without a "
        "price; auto follows how far the two models are apart (control: target)",
        examples=[0.5],
    )
    placement: Literal["loss"] = Field("loss", description="where the price is paid")
    estimator: Literal["exact"] = Field("exact", description="what is priced")


class DistillSection(Section):
    """Who is imitated, and how."""

    teacher: Text = Field(
        description="whom the policy learns from: a run, a checkpoint, an adapter or a model with the same vocabulary, "
        "or reference, the policy's own frozen weights (with teacher_prompt or teacher_system). An adapter on the "
        "same base needs no second model. Or a server of one, http(s)://HOST/v1#MODEL", examples=["runs/ppo/final"],
    )
    teacher_prompt: Lines | None = Field(
        None, description="what the teacher reads in place of the prompt (of messages: of the last one), with {prompt} "
        "and {fields} of the row; braces that mean themselves are {{ and }}; null: the prompt",
        examples=["Answer in one short sentence. {prompt}"],
    )
    teacher_system: Lines | None = Field(
        None, description="the system message that the teacher reads, with the same fields; for prompts that go "
        "through a chat template; null: the prompt's own", examples=["Answer in one short sentence."],
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="type of a teacher's own weights"
    )
    teacher_device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$")] = Field(
        "auto", description="where a teacher's own weights are; auto: where the policy is"
    )
    teacher_logprobs: Count = Field(
        20, description="likeliest tokens at each place whose log-probs a served teacher is asked for; the rest is "
        "estimated from the sampled token, without bias"
    )
    teacher_key_env: KeyName | None = Field(
        None, description="name of the environment variable with a served teacher's key, ending in KEY or TOKEN",
        examples=["TEACHER_API_KEY"]
    )
    horizon: Literal["full", "token"] = Field(
        "full", description="full: a token answers for the KL of those that it leads to, as the KL of whole responses "
        "wants; token: for its own alone, which is another objective"
    )
    epochs: Count = Field(1, description="passes over one step's responses")
    minibatch_size: Count = Field(
        64, description="responses per update; must divide a step's responses; default: as many of them as fit in 64"
    )

    @property
    def served(self) -> bool:
        """Whether the teacher is a server's."""
        return self.teacher.startswith(("http://", "https://"))


class DistillRecipe(Recipe):
    """Imitate a teacher on the policy's own responses while KL to the reference is held."""

    stage: Literal["distill"] = Field(description="what this recipe runs")
    distill: DistillSection = Field(description="who is imitated, and how")
    sampling: SamplingSection = Field(default_factory=SamplingSection, description="how the policy responds")
    kl: DistillKLSection = Field(default_factory=DistillKLSection, description="the budget")
    optim: OptimSection = Field(default_factory=OptimSection, description="optimizer")
    run: RunSection = Field(default_factory=RunSection, description="length, seed, output")
    eval: EvalSection = Field(default_factory=EvalSection, description="held-out measurements")


STAGES: dict[str, type[Recipe]] = {
    "sft": SFTRecipe, "reward": RewardRecipe, "ppo": PPORecipe, "trpo": TRPORecipe, "dpo": DPORecipe,
    "distill": DistillRecipe,
}
REFERENCE = "reference"     # as distill.teacher: no path, but the policy's own frozen weights
# dotted keys whose value may be a path; "*" stands for each entry of a list
PATH_KEYS = (
    "model.path", "model.sft_adapter", "data.prompts", "data.texts", "data.pairs", "data.chat_template",
    "reward.*.path", "sampling.publish", "run.output", "eval.prompts", "eval.texts", "eval.pairs", "eval.gold.path",
    "eval.judge.path", "distill.teacher",
)
# Keys that change where results are, when, or how much is computed at once, and not what comes out but for rounding.
NOT_PART_OF_THE_RUN = {
    "run": ("output", "keep", "loggers", "memory_fraction", "threads", "processes", "shard", "timeout_s"),
    "optim": ("micro_batch_size", "checkpoint_layers"),
}
HOW_A_SERVER_IS_REACHED = ("url", "publish", "timeout_s")        # that samples, and not what it draws
HOW_A_JUDGE_IS_REACHED = ("concurrency", "timeout_s", "retries", "key_env")     # and not what it answers


def comparable(recipe: Recipe) -> dict[str, Any]:
    """What decides the numbers of a run, up to rounding: not where it is kept, in which parts it is computed, and how
    patiently a judge is asked.
    """
    whole = recipe.model_dump(mode="json")
    for section, keys in NOT_PART_OF_THE_RUN.items():
        for key in keys:
            del whole[section][key]
    for key in HOW_A_SERVER_IS_REACHED:
        whole.get("sampling", {}).pop(key, None)
    whole.get("distill", {}).pop("teacher_key_env", None)
    held_out = (whole.get("eval", {}).get(name) or {} for name in ("gold", "judge"))
    for entry in (*whole.get("reward", ()), *held_out):
        if entry.get("kind") == "judge":
            for key in HOW_A_JUDGE_IS_REACHED:
                del entry[key]
    return whole


def recipe_digest(recipe: Recipe) -> str:
    """sha256 of the recipe's canonical JSON, of what ``comparable`` leaves of it."""
    text = json.dumps(comparable(recipe), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
