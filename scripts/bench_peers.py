"""kltune beside TRL on the same work: the same numbers first, then whose are sooner and in how much memory.

    python scripts/bench_peers.py [dpo dpo-wide ppo grpo] [--repeat 5] [--steps 5] [--threads 2] [--json]

One command: it makes an environment for TRL 1.16.0 (DPO, GRPO, losses) and one for TRL 1.12.0 (the last with PPO) under
build/peers, on the very torch, transformers and peft that kltune runs on. Then the gates, on the same base weights,
adapter and token ids: log-probabilities, a gradient, twelve losses, and those of DPO steps. If one fails, the command
ends with the numbers and exit code 1. Then the timings, each run in a process of its own, kltune and TRL in turns. A
run counts the median of its steps but for the first two and the last; a row of the table the median of its runs.

stories260K and the data of hh-harmless and stories are looked for in ../shared, or where --stories, --pairs and
--prompts say.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

from peers_gates import compared, compared_traces, gate_line
from peers_watch import SETTINGS

SCRIPTS = Path(__file__).resolve().parent
BUILD = SCRIPTS.parent / "build" / "peers"
SHARED = SCRIPTS.parents[1] / "shared"
TRL, TRL_WITH_PPO = "1.16.0", "1.12.0"
GATE_PAIRS, TRACE_STEPS = 16, 8
MORE_STEPS = 3  # two to warm up, and the last
LOSS_SETTINGS = {"beta": 0.1, "lr": 1e-4, "label_smoothing": 0.1, "alpha": 0.5, "simpo_beta": 2.0, "simpo_gap": 1.0}
DPO = {"stage": "dpo", "peer": "dpo", "batch": 16, "group": 1, "prompt_tokens": 256, "new_tokens": 128}
PPO = {"stage": "ppo", "epochs": 4, "group": 1, "new_tokens": 64, "lr": 1e-4, "beta": 0.05}
WORKS = {
    "dpo": DPO | LOSS_SETTINGS,
    "dpo-wide": DPO | LOSS_SETTINGS | {
        "batch": 8, "prompt_tokens": 192, "new_tokens": 64,
        "random": {"hidden": 256, "layers": 6, "vocabulary": 32000},
    },
    "ppo": PPO | {"peer": "ppo", "batch": 128, "minibatches": 4},
    "grpo": PPO | {
        "peer": "grpo", "batch": 32, "epochs": 1, "minibatches": 1, "group": 8, "prompt_tokens": 64,
        "random": {"hidden": 256, "layers": 6, "vocabulary": 8192},
    },
}
SAID = {
    "dpo": "pairs of hh-harmless, stories260K, prompts of up to 256 tokens and responses of up to 128",
    "dpo-wide": "random pairs, random Llama H256 L6 V32000, prompts of 192 tokens and responses of 64",
    "ppo": "stories260K, 64 new tokens, 4 epochs of 4 minibatches, LoRA r=16 on all linear layers",
    "grpo": "groups of 8, random Llama H256 L6 V8192, prompts of 64 tokens and 64 new ones, 1 epoch of 1 minibatch",
}
NOTES = {
    "dpo": (
        "kltune measures the reference once, before the first step; its seconds hold that share of it which one epoch "
        "has. TRL measures it in every step, its default.",
        "defaults: batch and LoRA are given. TRL checkpoints gradients. kltune: plain DPO, its KL neither sampled nor "
        "held, as by its own default it would be and TRL cannot.",
    ),
    "ppo": (
        "TRL has no reward function in PPO, only a model: it gets a module that decodes the response and calls the "
        "same Python function. Its critic has base weights of its own: matched a LoRA of the same size as kltune's "
        "value function, by default every weight. It never clips the gradient; kltune does, at 1.",
        "Beyond TRL, kltune sums the KL over the vocabulary at every token; both price the sampled one.",
        "No response ends before its 64 tokens. TRL shuffles the prompts anew, kltune goes by its seed.",
    ),
    "grpo": (
        "matched: a price of 0.05 on both sides, in the reward (kltune) or as k3 in the loss (TRL); kltune also sums "
        "the KL over the vocabulary. defaults: TRL's price is 0 and it measures no reference; kltune's is steered.",
        "TRL holds the end token back until 64 tokens are there; kltune takes it for any other token.",
    ),
}
PRECISION = (
    "matched and defaults are float32 on both sides. TRL's own default is bfloat16 autocast, made for GPUs and slow on "
    "many CPUs: --settings untouched."
)
NOT_SHOWN = (
    "Not shown: GPUs, larger models, real vocabularies with real weights, many processes, quality of what is learnt "
    "(both sides take the same steps where the gates say so; PPO and GRPO draw other random numbers)."
)


# --- environments and processes -------------------------------------------------------------------------------------


def environment(version: str) -> Path:
    """The interpreter of an environment that adds one TRL to the packages of this one; made where it is missing."""
    folder = BUILD / f"trl-{version}"
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    if not ready.exists():
        print(f"making {folder.name} ...", file=sys.stderr)
        venv.create(folder, clear=True, symlinks=True)
        packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        (packages / "shared.pth").write_text(sysconfig.get_path("purelib"))
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", f"trl=={version}"]
        subprocess.run(pip, check=True)
        ready.touch()
    return python


def call(python: Path | str, script: str, *arguments: Any, threads: int) -> None:
    """Run one side of something in a process of its own; if it fails, so does this, with what it said."""
    settings = {
        "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1",
        "HF_DATASETS_CACHE": str(BUILD / "cache"), "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [str(python), str(SCRIPTS / script), *(str(argument) for argument in arguments)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:])} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def prepare(name: str, work: dict[str, Any], *, gate: bool, threads: int) -> Path:
    """A fresh folder with what both sides start from."""
    folder = BUILD / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if work["random"]:
        work = work | {"model": str(folder / "model")}
    (folder / "work.json").write_text(json.dumps(work))
    call(sys.executable, "peers_kltune.py", "prepare-gate" if gate else "prepare", folder, threads=threads)
    return folder


def sized(name: str, arguments: argparse.Namespace, steps: int) -> dict[str, Any]:
    """A work with its sizes, model and data filled in."""
    work = {"random": None, "model": str(arguments.stories), "epochs": 1, "minibatches": 1} | WORKS[name]
    if arguments.batch and name in arguments.works:
        work["batch"] = arguments.batch
    data = arguments.pairs if work["stage"] == "dpo" else arguments.prompts
    rows = min(max(work["batch"] * steps // work["group"], 400), 1000)
    return work | {
        "steps": steps, "minibatch": work["batch"] // work["minibatches"], "data": str(data), "rows": rows,
    }


# --- gates ----------------------------------------------------------------------------------------------------------


def gates(arguments: argparse.Namespace, trl: Path, trl_with_ppo: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All of them, and what the two tools define differently."""
    threads = arguments.threads
    work = sized("dpo", arguments, TRACE_STEPS)
    folder = prepare("gate", work | {"rows": GATE_PAIRS}, gate=True, threads=threads)
    ours, theirs, in_ppo = (folder / f"{name}.json" for name in ("kltune", "trl", "trl-ppo"))
    call(sys.executable, "peers_kltune.py", "gate", folder, ours, threads=threads)
    call(trl, "peers_trl_gates.py", "gate", folder, theirs, threads=threads)
    call(trl_with_ppo, "peers_trl_gates.py", "gate-ppo", folder, in_ppo, threads=threads)
    rows, differences = compared(ours, theirs, in_ppo)
    folder = prepare("trace", work, gate=False, threads=threads)
    traces = (timed_run(side, folder, work, "matched", trl, threads, [])["losses"] for side in ("kltune", "trl"))
    return [*rows, compared_traces(*traces)], differences


# --- timings --------------------------------------------------------------------------------------------------------


def timed_run(
    side: str, folder: Path, work: dict[str, Any], settings: str, peer: Path, threads: int, changes: list[str]
) -> dict[str, Any]:
    """One process of one side."""
    output = folder / f"{side}.json"
    if side == "kltune":
        more = [part for change in changes for part in ("--set", change)]
        call(sys.executable, "peers_kltune.py", "run", folder, output, "--settings", settings, *more, threads=threads)
    else:
        call(peer, "peers_trl.py", work["peer"], folder, output, "--settings", settings, threads=threads)
    return json.loads(output.read_text())


def figures(run: dict[str, Any], steps: int) -> dict[str, float]:
    """What one process says: medians of its counted steps, with their share of what was done once before the first."""
    once, once_cpu = (run["before_seconds"].get(name, 0.0) / steps for name in ("once", "once_cpu"))
    found = {
        "seconds": statistics.median(run["seconds"]) + once,
        "cpu_seconds": statistics.median(run["cpu_seconds"]) + once_cpu,
        "peak_mb": run["peak_mb"], "peak_mb_above_model": run["peak_mb"] - run["held_mb"],
    }
    if any(run["inside"].get("generate", ())):
        found["generate_seconds"] = statistics.median(run["inside"]["generate"])
    return found


def summary(name: str, settings: str, rows: int, runs: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row for each tool: medians over its runs, ranges of seconds, and TRL's divided by kltune's.

    Args:
        name: of the work.
        settings: matched or defaults.
        rows: pairs or responses of one step.
        runs: ``figures`` of each run, by tool.
    """
    medians = {
        tool: {key: statistics.median(one[key] for one in found) for key in found[0]} for tool, found in runs.items()
    }
    ratios = {key: medians["trl"][key] / medians["kltune"][key] for key in medians["trl"] if key in medians["kltune"]}
    return [
        {
            "work": name, "settings": settings, "tool": tool, "rows_per_step": rows, **medians[tool],
            "range": [pick(one["seconds"] for one in found) for pick in (min, max)], "runs": len(found),
            "per_second": rows / medians[tool]["seconds"], "trl_over_kltune": ratios,
        }
        for tool, found in runs.items()
    ]


def timings(name: str, arguments: argparse.Namespace, peer: Path) -> list[dict[str, Any]]:
    """A work under each of the settings, the two tools in turns."""
    work = sized(name, arguments, arguments.steps + MORE_STEPS)
    folder = prepare(name, work, gate=False, threads=arguments.threads)
    rows = []
    for settings in arguments.settings:
        runs: dict[str, list[dict[str, float]]] = {"kltune": [], "trl": []}
        for repeat in range(arguments.repeat):
            for side, found in runs.items():
                one = timed_run(side, folder, work, settings, peer, arguments.threads, arguments.set)
                found.append(figures(one, work["steps"]))
                print(f"{name}, {settings}, {side}, {repeat + 1}: {found[-1]['seconds']:.2f} s", file=sys.stderr)
        rows += summary(name, settings, work["batch"], runs)
    return rows


def printed(rows: list[dict[str, Any]], checks: list[dict[str, Any]], differences: list[str]) -> None:
    """Gates, differences and timings as tables for people."""
    print(*map(gate_line, checks), "\nDefined differently:", *differences, sep="\n")
    for name in dict.fromkeys(row["work"] for row in rows):
        print(f"\n{name}: {SAID[name]}")
        print(f"{'':24}{'seconds':>9}{'range':>16}{'CPU s':>8}{'rows/s':>9}{'generate':>10}{'MB above':>10}{'MB':>7}")
        for row in (row for row in rows if row["work"] == name):
            generate = f"{row['generate_seconds']:.2f}" if "generate_seconds" in row else "-"
            low, high = row["range"]
            print(
                f"{row['settings'] + ', ' + row['tool']:24}{row['seconds']:9.3f}{f'{low:.3f}-{high:.3f}':>16}"
                f"{row['cpu_seconds']:8.2f}{row['per_second']:9.2f}{generate:>10}{row['peak_mb_above_model']:10.0f}"
                f"{row['peak_mb']:7.0f}"
            )
            if row["tool"] == "trl":
                ratios = row["trl_over_kltune"]
                generate = f"{ratios['generate_seconds']:.2f}x" if "generate_seconds" in ratios else ""
                print(
                    f"{'  TRL / kltune':24}{ratios['seconds']:8.2f}x{'':16}{ratios['cpu_seconds']:7.2f}x{generate:>19}"
                    f"{ratios['peak_mb_above_model']:9.2f}x{ratios['peak_mb']:6.2f}x"
                )
        print(*NOTES[WORKS[name]["peer"]], sep="\n")
    print(f"\n{PRECISION}\n{NOT_SHOWN}")


def main() -> None:
    """Gates, then timings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of {', '.join(WORKS)}; default: all")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["matched", "defaults"])
    parser.add_argument("--repeat", type=int, default=5, help="processes of each tool")
    parser.add_argument("--steps", type=int, default=5, help="steps that count in each process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, help="pairs or responses of a step, in place of the work's own")
    parser.add_argument("--set", action="append", default=[], help="a recipe's key=value, for kltune's side")
    parser.add_argument("--stories", type=Path, default=SHARED / "models/stories260K", help="model folder")
    parser.add_argument("--pairs", type=Path, default=SHARED / "data/hh-harmless/raw.jsonl")
    parser.add_argument("--prompts", type=Path, default=SHARED / "data/stories/prompts.jsonl")
    parser.add_argument("--gates-only", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.works = arguments.works or list(WORKS)
    if unknown := set(arguments.works) - set(WORKS):
        parser.error(f"no such work: {', '.join(sorted(unknown))}; there are {', '.join(WORKS)}")
    for path in (arguments.stories, arguments.pairs, arguments.prompts):
        if not path.exists():
            parser.error(f"{path} is not there; say where with --stories, --pairs, --prompts")
    peers = {version: environment(version) for version in (TRL, TRL_WITH_PPO)}
    checks, differences = gates(arguments, *peers.values())
    if failed := [row["gate"] for row in checks if not row["passed"]]:
        print(*map(gate_line, checks), "\nDefined differently:", *differences, sep="\n")
        raise SystemExit(f"no timings: {', '.join(failed)} not equal")
    rows = []
    for name in () if arguments.gates_only else arguments.works:
        rows += timings(name, arguments, peers[TRL_WITH_PPO if name == "ppo" else TRL])
    if arguments.json:
        document = {"schema": "kltune.peers/1", "gates": checks, "defined_differently": differences, "rows": rows}
        print(json.dumps(document | {"threads": arguments.threads, "steps": arguments.steps}, indent=2))
        return
    printed(rows, checks, differences)


if __name__ == "__main__":
    main()
