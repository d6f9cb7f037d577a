"""How every stage that trains begins: it takes its folder and puts policy and reference on one set of weights."""

from collections.abc import Callable
from typing import Any

import torch

from kltune.lm.loading import pick_device
from kltune.lm.opening import load_policy
from kltune.lm.policy import Policy
from kltune.recipe import Recipe
from kltune.run.loggers import wanted_loggers
from kltune.run.session import Run, finished_result, open_run

Train = Callable[[Any, Policy, Run], dict[str, Any]]


def run_stage(recipe: Recipe, resume: bool, train: Train) -> dict[str, Any]:
    """Run a stage in the folder that its recipe names, unless it is finished there already.

    Args:
        recipe: what to do.
        resume: go on from the newest checkpoint in the output folder.
        train: takes the recipe, a policy with a fresh adapter and the open run, and gives the object of
            ``result.json``.

    Returns:
        That object, of this run or of the one that is finished.
    """
    done = finished_result(recipe)
    if done is not None:
        return done
    wanted_loggers(recipe.run.loggers)      # what is not installed is said before anything slow
    with open_run(recipe, resume=resume) as run:
        torch.manual_seed(recipe.run.seed)  # the adapter's initial weights; everything later has its own numbers
        policy = load_policy(recipe.model, recipe.lora, device=pick_device(recipe.run.device))
        run.set_reference(policy.fingerprint.as_dict())
        return train(recipe, policy, run)
