"""``kltune demo``: the whole walk on a tiny model, from nothing to a measured budget, in a few minutes.

It makes a small world (``lm/tiny.py``), copies the packaged tiny recipes beside it, and runs the same stages that the
commands run, saying each command as it goes, so that everything can be run again and changed by hand.
"""

import sys
from pathlib import Path
from typing import Any

from kltune.lm.tiny import make_tiny_world
from kltune.recipe import copy_recipe, load_recipe
from kltune.stages.eval_kl import EvalKLOptions, eval_kl
from kltune.stages.ppo import run_ppo
from kltune.stages.sft import run_sft

RECIPES = ("sft", "ppo_fixed", "ppo_target", "dpo", "dpo_target", "reward", "ppo_reward_model")
BUDGET = 1.25       # times the target: what the gate at the end allows


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
    for name in RECIPES:
        if not (output / f"{name}.yaml").exists():
            copy_recipe(f"tiny/{name}", output)

    say(f"\n2/4  kltune sft --recipe {output / 'sft.yaml'}")
    sft = run_sft(load_recipe(output / "sft.yaml", stage="sft"), resume=True)

    say(f"\n3/4  kltune ppo --recipe {output / 'ppo_target.yaml'}")
    recipe = load_recipe(output / "ppo_target.yaml", stage="ppo")
    ppo = run_ppo(recipe, resume=True)

    budget = BUDGET * recipe.kl.target
    say(f"\n4/4  kltune eval-kl {ppo['output']} --responses 512 --max-kl {budget:g}")
    document, _ = eval_kl([ppo["output"]], EvalKLOptions(responses=512, max_kl=budget, seed=1))
    return {**ppo, "sft": sft, "eval_kl": document}


def summary(result: dict[str, Any]) -> str:
    """The demo in a table a newcomer understands: score and KL before and after, against the budget."""
    kl, gate = result["eval_kl"]["kl"]["exact"], result["eval_kl"]["gate"]
    texts = result["sft"]["eval"]
    before, after = result["reference_score"], result["score"]
    rows = [
        ("", "before", "after", ""),
        ("score", f"{before:.2f}", f"{after:.2f} ± {result['score_stderr']:.2f}", "praise words less blame words"),
        ("KL", "0", f"{kl['nats_per_response']:.2f} ± {kl['stderr']:.2f}",
         f"nats per response, target {result['target']:g}"),
        ("gate", "", gate["verdict"], f"at most {gate['max_kl']:g} nats, {gate['confidence']:.0%} confidence"),
    ]
    table = "\n".join(f"  {name:<8}{old:<10}{new:<16}{note}".rstrip() for name, old, new, note in rows)
    nats = texts["eval/texts_nats_per_token"], texts["eval/reference_texts_nats_per_token"]
    return "\n".join((
        headline(raised=after - before > 2.0 * result["score_stderr"], verdict=gate["verdict"]),
        table,
        "",
        "  before: the reference, base + SFT (held-out reviews: "
        f"{nats[0]:.2f} nats per token, {nats[1]:.2f} without SFT); after: the policy in {result['final']}",
        f"  a page to look at       {Path(result['output']) / 'report.html'}",
        f"  measure it again        kltune eval-kl {result['output']} --max-kl {gate['max_kl']:g}",
        f"  change it and run again {Path(result['output']).parents[1] / 'ppo_target.yaml'}",
    ))


def headline(*, raised: bool, verdict: str) -> str:
    """What happened, and no more than that: a score within two standard errors of where it was did not rise."""
    score = "PPO raised the score" if raised else "PPO did not raise the score"
    place = {"pass": "within", "fail": "over", "inconclusive": "perhaps within, perhaps over"}[verdict]
    return f"{score} and is {place} its KL budget:"


def say(text: str) -> None:
    """Progress, on stderr: stdout is for the result."""
    print(text, file=sys.stderr, flush=True)
