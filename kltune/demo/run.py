"""``kltune demo``: the whole walk on a tiny model, from nothing to a measured budget, in a few minutes.

It makes a small world (``world.py``), copies the packaged tiny recipes beside it, and runs the same stages that the
commands run, saying each command as it goes, so that everything can be run again and changed by hand.
"""

import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kltune.demo.world import ENTRIES, make_tiny_world
from kltune.errors import StorageError
from kltune.recipe import copy_recipe, load_recipe
from kltune.report.outcome import FELL, ROSE, STAYED, best_gold, move_of, read_files
from kltune.report.text import aligned
from kltune.run.files import refuse_place
from kltune.run.screen import apart, doing, duration, number, percent, with_error
from kltune.stages.eval_kl import EvalKLOptions, eval_kl
from kltune.stages.ppo import run_ppo
from kltune.stages.sft import run_sft

RECIPES = "sft", "ppo_fixed", "ppo_target", "dpo", "dpo_target", "reward", "ppo_reward_model"
NO_PENALTY = ("kl.control=fixed", "kl.beta=0", "run.steps=25", "run.eval_every=5")
BUDGET = 1.25       # times the target: what the gate at the end allows
OURS = {*ENTRIES, "rewards.py", "runs", *(f"{name}.yaml" for name in RECIPES)}     # in the demo's folder


def run_demo(output: Path, *, seed: int = 0, hacking: bool = True) -> dict[str, Any]:
    """Make the tiny world, fine-tune, raise a score within a KL budget, and measure what came out.

    What is there already is used: a second call after an interruption goes on where the first one stopped.

    Args:
        output: made if missing.
        seed: of the runs; the world is always the same.
        hacking: whether to run the same recipe without a price on KL as well.

    Returns:
        The result of the PPO stage; under "eval_kl" the document of ``kltune eval-kl`` on it, and under "free" the
        result of the run without a price, None where there was none.

    Raises:
        StorageError: the folder holds what no demo made; nothing was changed.
    """
    refuse_place(output, folder=True)
    foreign = sorted(entry.name for entry in output.iterdir() if entry.name not in OURS) if output.is_dir() else []
    if foreign:
        raise StorageError(
            f"{output} already holds {', '.join(foreign[:5])}{', ...' if foreign[5:] else ''}, which no demo made. "
            "Nothing was changed; choose another folder: kltune demo --output DIR"
        )
    say, runs = headings(4 + hacking), output / "runs"
    say(f"a tiny world: corpus, tokenizer and a Llama of a million parameters, in {output}")
    doing("making the tiny world")
    make_tiny_world(output, say=print_now)
    for name in RECIPES:
        if not (output / f"{name}.yaml").exists():
            copy_recipe(f"tiny/{name}", output)

    def stage(run: Callable[..., dict[str, Any]], name: str, *more: str, **into: str) -> dict[str, Any]:
        file, changes = output / f"{name}.yaml", (*more, *([f"run.seed={seed}"] if seed else []))
        command = ["kltune", name.partition("_")[0], "--recipe", str(file)]
        command += [word for change in changes for word in ("--set", change)]
        say(shlex.join(command + [word for key, folder in into.items() for word in (f"--{key}", folder)]))
        return run(load_recipe(file, changes, stage=name.partition("_")[0], **into), resume=True)

    sft = stage(run_sft, "sft")
    ppo = stage(run_ppo, "ppo_target")
    budget = BUDGET * ppo["target"]
    say(f"kltune eval-kl {ppo['output']} --responses 512 --max-kl {budget:g}")
    document, _ = eval_kl([ppo["output"]], EvalKLOptions(responses=512, max_kl=budget, seed=1))
    print_now(f"gate: {document['gate']['verdict']}, at most {budget:g} nats")
    free = stage(run_ppo, "ppo_target", *NO_PENALTY, output=str(runs / "no_penalty")) if hacking else None
    return {**ppo, "sft": sft, "eval_kl": document, "free": free}


def headings(count: int) -> Callable[[str], None]:
    """A function that prints what comes next, its number of so many, and the time that has passed."""
    started, numbers = time.monotonic(), iter(range(1, count + 1))

    def say(text: str) -> None:
        print_now(f"\n{next(numbers)}/{count}  {text}   [after {duration(round(time.monotonic() - started))}]")

    return say


def demo_text(result: dict[str, Any]) -> str:
    """The demo in a table a newcomer understands: score and KL before and after, against the budget."""
    kl, gate = result["eval_kl"]["kl"]["exact"], result["eval_kl"]["gate"]
    texts, error, output = result["sft"]["eval"], result["score_stderr"], Path(result["output"])
    before, after, kltune = result["reference_score"], result["score"], this_command()
    table = [
        ["", "before", "after", ""],
        ["score", number(before), with_error(after, error), "praise words less blame words"],
        ["KL", "0", with_error(kl["nats_per_response"], kl["stderr"]),
         f"nats per response, target {result['target']:g}"],
        ["gate", "", gate["verdict"], f"at most {gate['max_kl']:g} nats, {percent(gate['confidence'])}% confidence"],
    ]
    nats = texts["eval/texts_nats_per_token"], texts["eval/reference_texts_nats_per_token"]
    return "\n".join((
        score_and_gate(raised=after - before > 2.0 * error, verdict=gate["verdict"]),
        *(f"  {line}" for line in aligned(table)),
        "",
        "  before: the reference, base + SFT (held-out reviews: "
        f"{nats[0]:.2f} nats per token, {nats[1]:.2f} without SFT); after: the policy in {result['final']}",
        "",
        *([] if result["free"] is None else [hacking_text(result, result["free"]), ""]),
        f"  a page to look at       {output / 'report.html'}",
        f"  measure it again        {kltune} eval-kl {output} --max-kl {gate['max_kl']:g}",
        f"  change it and run again {output.parents[1] / 'ppo_target.yaml'}",
        f"  now with your model     {kltune} init ppo --model MODEL --prompts PROMPTS.jsonl --reward rewards.py",
    ))


def this_command() -> str:
    """What a shell needs to run kltune again: its name where that is found, else the path that was run."""
    if shutil.which("kltune"):
        return "kltune"
    called = Path(sys.argv[0])
    return str(called.absolute()) if called.name == "kltune" else f"{sys.executable} -m kltune"


def score_and_gate(*, raised: bool, verdict: str) -> str:
    """What happened, and no more than that: a score within two standard errors of where it was did not rise."""
    score = "PPO raised the score" if raised else "PPO did not raise the score"
    budget = {"pass": "within", "fail": "over", "inconclusive": "perhaps within, perhaps over"}[verdict]
    return f"{score} and is {budget} its KL budget:"


def hacking_text(held: dict[str, Any], free: dict[str, Any]) -> str:
    """What the same recipe came to without a price on KL, against the reference, and where to look at it."""
    columns = {
        "score": "score_mean", "gold": "gold_mean", "distinct-2": "distinct_2_adjusted",
        "KL": "kl_ref_nats_per_response", "tax": "tax_nats_per_token",
    }
    runs = (("reference", held, "eval/reference_"), (f"target {held['target']:g} nats", held, "eval/"),
            ("no price on KL", free, "eval/"))
    table = [["", *columns]]
    table += [[who, *(number(run["eval"].get(start + key, 0.0)) for key in columns.values())]
              for who, run, start in runs]
    return "\n".join((
        f"Reward hacking: held to its target the run {gold_moved(Path(held['output']))}; without a price on KL, the "
        f"same recipe {gold_moved(Path(free['output']))}:",
        *(f"  {line}" for line in aligned(table)),
        "",
        "  gold: praise that is enough, less what is said twice; no run is trained on it. tax: nats per token by which",
        f"  held-out reviews are predicted worse. See it happen: {Path(free['output']) / 'report.html'}",
    ))


def gold_moved(run: Path) -> str:
    """What a run did to gold, and no more than is beyond chance: against its own best, then against the reference."""
    files = read_files(run)
    if (peak := best_gold(files)) is not None:
        best, last = apart(peak[0], files.result["gold"])
        return f"let gold fall from {best} after step {peak[1]} to {last}"
    return {ROSE: "raised gold", FELL: "lowered gold", STAYED: "left gold where it was"}[move_of(files, "gold")[2]]


def print_now(text: str) -> None:
    """Print progress on stderr: stdout is for the result."""
    print(text, file=sys.stderr, flush=True)
