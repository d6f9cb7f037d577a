"""What a run is: frozen sections read from YAML, checked all at once, and written back with every default.

    fields.py     what a section is made of
    rewards.py    the kinds of an entry of ``reward``
    sections.py   all other keys, their units, ranges and defaults
    stages.py     which sections each stage reads
    yaml_tree.py  YAML text to a tree that remembers lines
    faults.py     what is wrong, and where
    reading.py    tree and ``--set`` to a recipe; the recipes that come with kltune
    checks.py     keys that do not fit together
    wording.py    how faults are said; names that other tools use
    writing.py    YAML, digest, differences, JSON schema, copies; what there is to say of a key
    grid.py       the points of a sweep

Nothing here imports torch: a wrong recipe is answered before the first model is thought of.
"""

from kltune.recipe.checks import by_dotted_key
from kltune.recipe.faults import RecipeFaults
from kltune.recipe.grid import Axis, GridPoint, load_grid
from kltune.recipe.reading import load_recipe, overlap, packaged_recipes, read_scorer, recipe_text, recipes_folder
from kltune.recipe.rewards import (
    ClassifierReward,
    FunctionReward,
    JudgeReward,
    ModelReward,
    RewardEntry,
    asks_for_pairs,
)
from kltune.recipe.sections import (
    DataSection,
    DPOSection,
    KLSection,
    LoraSection,
    ModelSection,
    OptimSection,
    PPOSection,
    RunSection,
    SamplingSection,
    TRPOSection,
)
from kltune.recipe.stages import STAGES, DPORecipe, PPORecipe, Recipe, RewardRecipe, SFTRecipe, TRPORecipe
from kltune.recipe.writing import (
    as_written,
    copy_recipe,
    differing_keys,
    differing_settings,
    dump_recipe,
    flat_settings,
    recipe_digest,
    recipe_schema,
)

__all__ = [
    "STAGES", "Axis", "ClassifierReward", "DPORecipe", "DPOSection", "DataSection", "FunctionReward", "GridPoint",
    "JudgeReward", "KLSection", "LoraSection", "ModelReward", "ModelSection", "OptimSection", "PPORecipe",
    "PPOSection", "Recipe", "RecipeFaults", "RewardEntry", "RewardRecipe", "RunSection", "SFTRecipe",
    "SamplingSection", "TRPORecipe", "TRPOSection", "as_written", "asks_for_pairs", "by_dotted_key", "copy_recipe",
    "differing_keys", "differing_settings", "dump_recipe", "flat_settings", "load_grid", "load_recipe", "overlap",
    "packaged_recipes", "read_scorer", "recipe_digest", "recipe_schema", "recipe_text", "recipes_folder",
]
