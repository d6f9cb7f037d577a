"""A recipe as YAML, as a digest, as a schema, and next to another recipe."""

import hashlib
import json
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter

from kltune.errors import RecipeError
from kltune.recipe.nodes import resolve
from kltune.recipe.stages import STAGES, DPORecipe, PPORecipe, Recipe, RewardRecipe, SFTRecipe, TRPORecipe

NOT_PART_OF_THE_RUN = ("output", "keep", "loggers")     # keys of run that change where results are, not what they are
HOW_A_JUDGE_IS_REACHED = ("concurrency", "timeout_s", "retries", "key_env")     # and not what it answers


class _Dumper(yaml.SafeDumper):
    """Writes text so that our own reader takes it for text, and repeats values instead of pointing at them."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(resolve(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; it loads again to an equal recipe."""
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def comparable(recipe: Recipe) -> dict[str, Any]:
    """What decides the numbers of a run: everything but where it is kept, and how patiently a judge is asked."""
    whole = recipe.model_dump(mode="json")
    for key in NOT_PART_OF_THE_RUN:
        del whole["run"][key]
    for entry in (*whole.get("reward", ()), whole.get("eval", {}).get("gold") or {}):
        if entry.get("kind") == "judge":
            for key in HOW_A_JUDGE_IS_REACHED:
                del entry[key]
    return whole


def recipe_digest(recipe: Recipe) -> str:
    """sha256 of the recipe's canonical JSON, of what ``comparable`` leaves of it."""
    text = json.dumps(comparable(recipe), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differing_keys(old: Recipe, new: Recipe) -> list[str]:
    """Every key in which two recipes differ, as ``kl.target: was 6.0, now 4.0``."""
    before, after = flat_settings(old), flat_settings(new)
    absent = object()
    lines = []
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key, absent), after.get(key, absent)
        if was != now:
            lines.append(f"{key}: was {shown(was, absent)}, now {shown(now, absent)}")
    return lines


def flat_settings(recipe: Recipe) -> dict[str, Any]:
    """What decides the numbers of a run, by dotted key."""
    return flat(comparable(recipe))


def shown(value: object, absent: object) -> str:
    """A value in a comparison."""
    return "absent" if value is absent else json.dumps(value, ensure_ascii=False)


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested sections and lists as one dict of dotted keys."""
    if isinstance(value, dict) and value:
        entries = value.items()
    elif isinstance(value, list) and value:
        entries = enumerate(value)
    else:
        return {key: value}
    return {name: leaf for step, child in entries for name, leaf in flat(child, f"{key}.{step}".strip(".")).items()}


def recipe_schema(stage: str | None = None) -> dict[str, Any]:
    """JSON schema of one stage, or of all of them told apart by ``stage``; for editors.

    Raises:
        RecipeError: no such stage.
    """
    if stage is not None and stage not in STAGES:
        raise RecipeError(f"no stage {stage}; the stages are {', '.join(STAGES)}")
    anyone = SFTRecipe | RewardRecipe | PPORecipe | TRPORecipe | DPORecipe
    schema = (
        STAGES[stage].model_json_schema() if stage
        else TypeAdapter(Annotated[anyone, Field(discriminator="stage")]).json_schema()
    )
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "kltune recipe", **schema}
