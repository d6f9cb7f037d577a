"""What a run is: frozen sections read from YAML, checked all at once, and written back with every default.

Nothing here imports torch: a wrong recipe is answered before the first model is thought of.
"""

from kltune.recipe.checks import by_dotted_key
from kltune.recipe.faults import Fault, InputFaults, RecipeFaults
from kltune.recipe.grid import Axis, GridPoint, load_grid
from kltune.recipe.reading import (
    find_recipe,
    load_recipe,
    overlap,
    packaged_recipes,
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
    scorers_of,
)
from kltune.recipe.sections.methods import DPOSection, KLSection, PPOSection, TRPOSection
from kltune.recipe.sections.shared import (
    DataSection,
    LoraSection,
    ModelSection,
    OptimSection,
    RunSection,
    SamplingSection,
)
from kltune.recipe.stages import (
    REFERENCE,
    STAGES,
    DistillRecipe,
    DistillSection,
    DPORecipe,
    PPORecipe,
    Recipe,
    RewardRecipe,
    SFTRecipe,
    TRPORecipe,
    recipe_digest,
)
from kltune.recipe.writing import (
    as_written,
    copy_recipe,
    differing_keys,
    differing_settings,
    dump_recipe,
    flat_settings,
    recipe_schema,
)
