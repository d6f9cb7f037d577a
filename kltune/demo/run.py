"""``kltune demo``: the whole walk on a tiny model, from nothing to a measured budget, in a few minutes.

It makes a small world (``world.py``), copies the packaged tiny recipes beside it, and runs the same stages that the
commands run, saying each command as it goes, so that everything can be run again and changed by hand.
"""

import math
import sys
from pathlib import Path
from typing import Any

from kltune.demo.world import make_tiny_world
from kltune.recipe import copy_recipe, load_recipe
from kltune.report.text import aligned
from kltune.run.screen import number, with_error
from kltune.stages.eval_kl import EvalKLOptions, eval_kl
from kltune.stages.ppo import run_ppo
from kltune.stages.reward import run_reward
from kltune.stages.sft import run_sft

RECIPES = (
    "sft", "ppo_fixed", "ppo_target", "dpo", "dpo_target", "reward", "ppo_reward_model", "hacking_reward", "hacking",
)
NO_PENALTY = ("kl.control=fixed", "kl.beta=0")
BUDGET = 1.25       # times the target: what the gate at the end allows


def run_demo(output: Path) -> dict[str, Any]:
    """Make the tiny world, fine-tune, raise a score within a KL budget, and measure what came out.

    What is there already is used: a second call after an interruption goes on where the first one stopped.

    Returns:
        The result of the PPO stage; under "eval_kl" the document of ``kltune eval-kl`` on it, and under "hacking" the
        results of two runs on a poor reward model, "free" and "held" to a KL target.
    """
    say(f"1/5  a tiny world: corpus, tokenizer and a Llama of a million parameters, in {output}")
    make_tiny_world(output, say=say)
    for name in RECIPES:
        if not (output / f"{name}.yaml").exists():
            copy_recipe(f"tiny/{name}", output)

    say(f"\n2/5  kltune sft --recipe {output / 'sft.yaml'}")
    sft = run_sft(load_recipe(output / "sft.yaml", stage="sft"), resume=True)

    say(f"\n3/5  kltune ppo --recipe {output / 'ppo_target.yaml'}")
    recipe = load_recipe(output / "ppo_target.yaml", stage="ppo")
    ppo = run_ppo(recipe, resume=True)

    budget = BUDGET * recipe.kl.target
    say(f"\n4/5  kltune eval-kl {ppo['output']} --responses 512 --max-kl {budget:g}")
    document, _ = eval_kl([ppo["output"]], EvalKLOptions(responses=512, max_kl=budget, seed=1))
    return {**ppo, "sft": sft, "eval_kl": document, "hacking": run_hacking(output)}


def run_hacking(output: Path) -> dict[str, Any]:
    """Train on a reward model of a few noisy labels, without a price on KL and held to a target; the two results."""
    say(f"\n5/5  kltune reward --recipe {output / 'hacking_reward.yaml'}   (40 labels, 8 of them wrong)")
    run_reward(load_recipe(output / "hacking_reward.yaml", stage="reward"), resume=True)
    file, free = output / "hacking.yaml", output / "runs" / "hacking_free"
    say(f"\n     kltune ppo --recipe {file} --set {' --set '.join(NO_PENALTY)} --output {free}")
    without = run_ppo(load_recipe(file, NO_PENALTY, output=str(free), stage="ppo"), resume=True)
    say(f"\n     kltune ppo --recipe {file}")
    return {"free": without, "held": run_ppo(load_recipe(file, stage="ppo"), resume=True)}


def demo_text(result: dict[str, Any]) -> str:
    """The demo in a table a newcomer understands: score and KL before and after, against the budget."""
    kl, gate = result["eval_kl"]["kl"]["exact"], result["eval_kl"]["gate"]
    texts, error = result["sft"]["eval"], result["score_stderr"]
    before, after = result["reference_score"], result["score"]
    table = [
        ["", "before", "after", ""],
        ["score", number(before), with_error(after, error), "praise words less blame words"],
        ["KL", "0", with_error(kl["nats_per_response"], kl["stderr"]),
         f"nats per response, target {result['target']:g}"],
        ["gate", "", gate["verdict"], f"at most {gate['max_kl']:g} nats, {gate['confidence']:.0%} confidence"],
    ]
    nats = texts["eval/texts_nats_per_token"], texts["eval/reference_texts_nats_per_token"]
    return "\n".join((
        score_and_gate(raised=after - before > 2.0 * error, verdict=gate["verdict"]),
        *(f"  {line}" for line in aligned(table)),
        "",
        "  before: the reference, base + SFT (held-out reviews: "
        f"{nats[0]:.2f} nats per token, {nats[1]:.2f} without SFT); after: the policy in {result['final']}",
        f"  a page to look at       {Path(result['output']) / 'report.html'}",
        f"  measure it again        kltune eval-kl {result['output']} --max-kl {gate['max_kl']:g}",
        f"  change it and run again {Path(result['output']).parents[1] / 'ppo_target.yaml'}",
        "",
        hacking_text(result["hacking"]),
    ))


def score_and_gate(*, raised: bool, verdict: str) -> str:
    """What happened, and no more than that: a score within two standard errors of where it was did not rise."""
    score = "PPO raised the score" if raised else "PPO did not raise the score"
    budget = {"pass": "within", "fail": "over", "inconclusive": "perhaps within, perhaps over"}[verdict]
    return f"{score} and is {budget} its KL budget:"


def hacking_text(hacking: dict[str, Any]) -> str:
    """What the two runs on a poor reward model came to, against the reference, and where to look at it."""
    free, held = hacking["free"], hacking["held"]
    columns = {
        "proxy": "score_mean", "gold": "gold_mean", "distinct-2": "distinct_2_adjusted",
        "KL": "kl_ref_nats_per_response", "tax": "tax_nats_per_token",
    }
    runs = (("reference", held, "eval/reference_"), ("no penalty", free, "eval/"),
            (f"target {held['target']:g} nats", held, "eval/"))
    table = [["", *columns]]
    table += [[who, *(f"{run['eval'].get(start + key, 0.0):.2f}" for key in columns.values())]
              for who, run, start in runs]
    return "\n".join((
        gold_in_both(free["eval"], held["eval"]),
        *(f"  {line}" for line in aligned(table)),
        "",
        "  proxy: a reward model from 40 labels, 8 of them wrong; gold: the grammar that wrote the reviews, which no",
        "  run is trained on; tax: nats per token by which held-out reviews are predicted worse",
        f"  see it happen           {Path(free['output']) / 'report.html'}",
    ))


def gold_in_both(free: dict[str, float], held: dict[str, float]) -> str:
    """What happened to gold in both runs, and no more than that, from their final evaluations."""
    words = {"rose": "raised gold too", "fell": "lowered gold", "stayed": "left gold where it was"}
    return (
        f"Reward hacking: the proxy alone {words[gold_moved(free)]}; held to a KL target, the same proxy "
        f"{words[gold_moved(held)]}:"
    )


def gold_moved(evaluation: dict[str, float]) -> str:
    """rose, fell or stayed, within two standard errors of the difference from the reference's."""
    gap = evaluation["eval/gold_mean"] - evaluation["eval/reference_gold_mean"]
    error = math.hypot(evaluation["eval/gold_stderr"], evaluation["eval/reference_gold_stderr"])
    return "rose" if gap > 2.0 * error else "fell" if gap < -2.0 * error else "stayed"


def say(text: str) -> None:
    """Print progress on stderr: stdout is for the result."""
    print(text, file=sys.stderr, flush=True)
