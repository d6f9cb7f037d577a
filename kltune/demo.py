"""``kltune demo``: the whole walk on a tiny model, from nothing to a measured budget, in a few minutes.

It makes a small world (``lm/tiny.py``), copies the packaged tiny recipes beside it, and runs the same stages that the
commands run, saying each command as it goes, so that everything can be run again and changed by hand.
"""

from pathlib import Path
from typing import Any

from kltune.lm.tiny import make_tiny_world
from kltune.recipe import load_recipe
from kltune.stages.eval_kl import EvalKLOptions, eval_kl
from kltune.stages.ppo import run_ppo
from kltune.stages.sft import run_sft

RECIPES = ("sft", "ppo_fixed", "ppo_target")


def run_demo(output: Path) -> dict[str, Any]:
    """Make the tiny world, fine-tune, raise a score within a KL budget, and measure what came out.

    What is there already is used: a second call after an interruption goes on where the first one stopped.

    Args:
        output: folder for everything.

    Returns:
        The result of the PPO stage, and under "eval_kl" the document of ``kltune eval-kl`` on it.
    """
    say(f"1/4  a tiny world: corpus, tokenizer and a Llama of a million parameters, in {output}")
    make_tiny_world(output, say=say)
    copy_recipes(output)

    say(f"\n2/4  kltune sft --recipe {output / 'sft.yaml'}")
    sft = run_sft(load_recipe(output / "sft.yaml", stage="sft"), resume=True)

    say(f"\n3/4  kltune ppo --recipe {output / 'ppo_target.yaml'}")
    recipe = load_recipe(output / "ppo_target.yaml", stage="ppo")
    ppo = run_ppo(recipe, resume=True)

    budget = round(BUDGET * recipe.kl.target, 1)
    run = Path(ppo["output"])
    say(f"\n4/4  kltune eval-kl {run} --responses 512 --max-kl {budget}")
    document, code = eval_kl([str(run)], EvalKLOptions(responses=512, max_kl=budget, seed=1))
    say("")
    return {**ppo, "sft": sft, "eval_kl": document, "eval_kl_exit_code": code, "table": table(sft, ppo, document)}
