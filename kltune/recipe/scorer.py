"""One scorer as a command line names it."""

from pydantic import TypeAdapter, ValidationError

from kltune.errors import RecipeError
from kltune.recipe.checks import FUNCTION
from kltune.recipe.nodes import read_nodes
from kltune.recipe.rewards import FunctionReward, ModelReward, RewardEntry

FORMS = "wanted file.py:function, a reward model's folder, or an entry as in a recipe, such as {kind: model, path: x}"


def read_scorer(text: str) -> RewardEntry:
    """``rewards.py:gold`` is a function, ``{kind: ...}`` an entry of a recipe's ``reward``, anything else a model.

    Raises:
        RecipeError: it is none of these.
    """
    if FUNCTION.fullmatch(text):
        return FunctionReward(kind="function", path=text)
    if not text.startswith("{"):
        return ModelReward(kind="model", path=text)
    node, faults = read_nodes(text, "--gold")
    if faults or node is None:
        raise RecipeError(f"--gold: {faults[0].text if faults else 'empty'}; {FORMS}.")
    try:
        return TypeAdapter(RewardEntry).validate_python(node.plain())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RecipeError(f"--gold: {'.'.join(map(str, first['loc']))}: {first['msg']}; {FORMS}.") from error
