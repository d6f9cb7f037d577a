"""What a run is: frozen sections read from YAML, checked all at once, and written back with every default.

    fields.py     what a section is made of
    rewards.py    the kinds of an entry of ``reward``
    sections.py   all other keys, their units, ranges and defaults
    stages.py     which sections each stage reads
    nodes.py      YAML text to a tree that remembers lines
    reading.py    tree and ``--set`` to a recipe
    checks.py     keys that do not fit together
    wording.py    how faults are said; names that other tools use
    writing.py    YAML, digest, differences, JSON schema
    packaged.py   the recipes that come with kltune
    copying.py    one of them as the start of your own
    grid.py       the points of a sweep
    scorer.py     one scorer named on a command line

Nothing here imports torch: a wrong recipe is answered before the first model is thought of.
"""

from kltune.recipe.faults import Fault, Place, RecipeFaults
from kltune.recipe.grid import Axis, GridPoint, load_grid
from kltune.recipe.reading import (
    find_recipe,
    load_recipe,
    overlap,
    packaged_recipes,
    read_scorer,
    recipe_text,
    recipes_folder,
)
from kltune.recipe.rewards import (
    ClassifierReward,
    FunctionReward,
    JudgeReward,
    ModelReward,
    RewardEntry,
    asks_for_pairs,
)
from kltune.recipe.sections import (
    BradleyTerrySection,
    DataSection,
    DPOKLSection,
    DPOSection,
    EvalSection,
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
    copy_recipe,
    differing_keys,
    dump_recipe,
    flat,
    flat_settings,
    recipe_digest,
    recipe_schema,
)

__all__ = [
    "STAGES", "Axis", "BradleyTerrySection", "ClassifierReward", "DPOKLSection", "DPORecipe", "DPOSection",
    "DataSection", "EvalSection", "Fault", "FunctionReward", "GridPoint", "JudgeReward", "KLSection", "LoraSection",
    "ModelReward", "ModelSection", "OptimSection", "PPORecipe", "PPOSection", "Place", "Recipe", "RecipeFaults",
    "RewardEntry", "RewardRecipe", "RunSection", "SFTRecipe", "SamplingSection", "TRPORecipe", "TRPOSection",
    "asks_for_pairs", "copy_recipe", "differing_keys", "dump_recipe", "find_recipe", "flat", "flat_settings",
    "load_grid", "load_recipe", "overlap", "packaged_recipes", "read_scorer", "recipe_digest", "recipe_schema",
    "recipe_text", "recipes_folder",
]
