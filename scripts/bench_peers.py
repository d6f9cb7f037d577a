"""kltune beside TRL, and beside plain scripts, on the same work: the same numbers first, then whose are sooner.

    python scripts/bench_peers.py [WORK ...] [--dtypes float32 bfloat16] [--repeat 5] [--threads 2] [--json]

WORK is a name or a pattern of names: 'ppo*', '*-wide', dpo-smol; --list says which there are. One command: it makes
an environment for TRL 1.16.0 (DPO, SFT, rewards, GRPO, RLOO) and one for TRL 1.12.0 (the last with PPO) under
build/peers, on the very torch, transformers and peft that kltune runs on. Then the gates, on the same base weights,
adapter and token ids: log-probabilities and a gradient on every model in every type that is asked for; on the smallest
also twelve losses, and those of steps of DPO, SFT and a reward model. If one fails, the command ends with the numbers
and exit code 1. Then the timings, each run in a process of its own, the two sides in turns. A run counts the median of
its steps but for the first two and the last; a row of the table the median of its runs.

stories260K, SmolLM2 and the data of hh-harmless and stories are looked for in ../shared, or where --stories, --smol,
--pairs and --prompts say; SmolLM2 is made under build/ where it is missing.
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
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bench_parts import stamped
from peers_gates import compared, compared_traces, gap, gate_line, gate_row, same_numbers
from peers_watch import SETTINGS

SCRIPTS = Path(__file__).resolve().parent
BUILD = SCRIPTS.parent / "build" / "peers"
SHARED = SCRIPTS.parents[1] / "shared"
TRL, TRL_WITH_PPO = "trl==1.16.0", "trl==1.12.0"
KL_CLOSE = {"float32": 1e-3, "bfloat16": 0.1}   # nats, or a share of them: of one response's whole KL
GATE_PAIRS, FEW_PAIRS, TRACE_STEPS = 16, 4, 8
MORE_STEPS = 3  # two to warm up, and the last
DTYPES = ("float32", "bfloat16")
LOSS_SETTINGS = {"beta": 0.1, "lr": 1e-4, "label_smoothing": 0.1, "alpha": 0.5, "simpo_beta": 2.0, "simpo_gap": 1.0}
DPO = {"stage": "dpo", "peer": "dpo", "batch": 16, "prompt_tokens": 256, "new_tokens": 128} | LOSS_SETTINGS
PPO = {"stage": "ppo", "peer": "ppo", "epochs": 4, "new_tokens": 64, "prompt_tokens": 64, "lr": 1e-4, "beta": 0.05}
GROUPS = PPO | {"peer": "grpo", "epochs": 1, "group": 8, "section": {"baseline": "grpo"}}
PART = PPO | {"peer": "plain"}
ROWS = {  # what is done; on which model, and in which sizes, is below
    "sample": PART | {"part": "sample"},
    "ragged": PART | {"part": "ragged"},
    "score": PART | {"part": "score"},
    "eval-kl": PART | {"part": "eval-kl"},
    "ppo": PPO,
    "ppo-upper": PPO | {"section": {"value_function": "upper"}},
    "ppo-head": PPO | {"section": {"value_function": "head"}},
    "ppo-rloo": PPO | {"section": {"baseline": "rloo"}, "group": 4},
    "rloo": GROUPS | {"peer": "rloo", "section": {"baseline": "rloo"}, "group": 4},
    "grpo": GROUPS,
    "trpo": PPO | {"stage": "trpo", "peer": None},
    "dpo": DPO,
    "reward": DPO | {"stage": "reward", "peer": "reward"},
    "sft": DPO | {"stage": "sft", "peer": "sft"},
}
SIZES = {"batch": 16, "epochs": 2, "minibatches": 2, "prompt_tokens": 64, "new_tokens": 48, "ragged": True}
SHAPES = {  # what people run; random weights get logits of a trained model's size, rows the lengths of hh-harmless
    "wide": SIZES | {"random": {"hidden": 512, "layers": 8, "vocabulary": 32000, "logits": 3.0}},
    "smol": SIZES | {"model": "smol"},
    "qwen": SIZES | {"batch": 8, "epochs": 1, "minibatches": 1, "new_tokens": 16, "steps": 1, "random": {
        "hidden": 896, "layers": 24, "vocabulary": 151936, "logits": 3.0, "intermediate_size": 4864,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    }},
}
TOY = {"hidden": 256, "layers": 6}
COMMON = {
    "random": None, "model": "stories", "epochs": 1, "minibatches": 1, "group": 1, "section": {}, "part": None,
    "ragged": False, "dtypes": DTYPES, "steps": None,
}
TOYS = {
    "dpo": DPO,
    "dpo-v32000": DPO | {
        "batch": 8, "prompt_tokens": 192, "new_tokens": 64, "random": TOY | {"vocabulary": 32000},
    },
    "ppo": PPO | {"batch": 128, "minibatches": 4},
    "grpo": GROUPS | {"batch": 32, "random": TOY | {"vocabulary": 8192}},
    "sft": ROWS["sft"],
    "reward": ROWS["reward"],
}
ONCE = {key: {"epochs": 1, "minibatches": 1} for key in ("grpo", "rloo")}      # TRL's peers take one update per batch
WORKS = {name: COMMON | work | {"dtypes": DTYPES[:1]} for name, work in TOYS.items()} | {
    f"{row}-{shape}": COMMON | work | sizes | ONCE.get(work["peer"], {})
    for shape, sizes in SHAPES.items() for row, work in ROWS.items()
}
NOTES = {
    "plain": (
        "The other side is transformers and peft as people write it: generate, two models, all logits of both. "
        "ragged: responses end where a chosen set of tokens comes, a quarter of the length on average; each side draws "
        "its own, so seconds are to be divided by the tokens of --json.",
    ),
    None: ("No other tool is known that takes this step; its share of the floor says what it costs.",),
    "sft": ("Prompts and responses are the same tokens on both sides.",),
    "reward": ("Both heads start at 0; TRL's is saved and trained as kltune's is.",),
    "rloo": ("As GRPO, with the mean of the other responses as baseline.",),
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
    "matched and defaults hold the frozen weights in the type that is named, on both sides. TRL's own default is "
    "bfloat16 autocast, made for GPUs and slow on many CPUs: --settings untouched."
)
NOT_SHOWN = (
    "Not shown: GPUs, larger models, many processes, quality of what is learnt (both sides take the same steps "
    "where the gates say so; what samples draws other random numbers)."
)


# --- environments and processes -------------------------------------------------------------------------------------


def environment(requirement: str) -> Path:
    """The interpreter of an environment that adds one package to those of this one; made where it is missing."""
    folder = BUILD / requirement.replace("==", "-")
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    if not ready.exists():
        print(f"making {folder.name} ...", file=sys.stderr)
        venv.create(folder, clear=True, symlinks=True)
        packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        (packages / "shared.pth").write_text(sysconfig.get_path("purelib"))
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", requirement]
        subprocess.run(pip, check=True)
        ready.touch()
    return python


def smol_model(folder: Path) -> Path:
    """SmolLM2's folder, made by the script beside the shared models where it is not there."""
    if not (folder / "config.json").exists():
        subprocess.run([environment("gguf"), SHARED / "models/smollm2/make.py", folder], check=True)
    return folder


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


def sized(name: str, arguments: argparse.Namespace, steps: int, dtype: str = "float32") -> dict[str, Any]:
    """A work with its sizes, model and data filled in; ``steps`` in all, or the work's own and those not counted."""
    work = WORKS[name]
    batch = arguments.batch or work["batch"] if arguments.works else work["batch"]
    group = arguments.group or work["group"] if work["group"] > 1 else 1
    steps = steps if work["steps"] is None else min(steps, work["steps"] + MORE_STEPS)
    model = "" if work["random"] else str(getattr(arguments, work["model"]).resolve())
    pairs, real = work["stage"] in ("dpo", "reward", "sft"), work["model"] == "smol" or work["ragged"]
    return work | {
        "batch": batch, "group": group, "steps": steps, "model": model, "dtype": dtype, "losses": False,
        "data": str(arguments.pairs if pairs else arguments.prompts),
        "transcripts": str(arguments.pairs) if real or (work["stage"] == "sft" and not work["random"]) else None,
        "rows": min(max(batch * steps // group, 400), 1000),
    }


# --- gates ----------------------------------------------------------------------------------------------------------


def gates(arguments: argparse.Namespace, trl: Path, trl_with_ppo: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All of them, and what the two tools define differently."""
    threads = arguments.threads
    work = sized("dpo", arguments, TRACE_STEPS) | {"rows": GATE_PAIRS, "losses": True}
    folder = prepare("gate", work, gate=True, threads=threads)
    ours, theirs, in_ppo = (folder / f"{name}.json" for name in ("kltune", "trl", "trl-ppo"))
    call(sys.executable, "peers_kltune.py", "gate", folder, ours, threads=threads)
    call(trl, "peers_trl_gates.py", "gate", folder, theirs, threads=threads)
    call(trl_with_ppo, "peers_trl_gates.py", "gate-ppo", folder, in_ppo, threads=threads)
    rows, differences = compared(ours, theirs, in_ppo)
    for shape, dtype in dict.fromkeys((name.rpartition("-")[2], dtype) for name, dtype in arguments.chosen):
        rows += model_gates(shape, dtype, arguments, trl) if shape in SHAPES else []
    for name in ("dpo", "sft", "reward"):
        work = sized(name, arguments, TRACE_STEPS)
        folder = prepare("trace", work, gate=False, threads=threads)
        traces = (timed_run(side, folder, work, "matched", trl, threads, [])["losses"] for side in ("kltune", "trl"))
        rows.append(compared_traces(name, *traces))
    return rows, differences


def model_gates(shape: str, dtype: str, arguments: argparse.Namespace, trl: Path) -> list[dict[str, Any]]:
    """Log-probabilities and a gradient on a few pairs, on one of the models in one type."""
    work = sized(f"dpo-{shape}", arguments, 1, dtype) | {"rows": FEW_PAIRS}
    folder = prepare(f"gate-{shape}-{dtype}", work, gate=True, threads=arguments.threads)
    ours, theirs = (folder / f"{name}.json" for name in ("kltune", "trl"))
    call(sys.executable, "peers_kltune.py", "gate", folder, ours, threads=arguments.threads)
    call(trl, "peers_trl_gates.py", "gate", folder, theirs, threads=arguments.threads)
    return same_numbers(ours, theirs, dtype, f" {shape} {dtype}")


# --- timings --------------------------------------------------------------------------------------------------------


def timed_run(
    side: str, folder: Path, work: dict[str, Any], settings: str, peer: Path, threads: int, changes: list[str]
) -> dict[str, Any]:
    """One process of one side."""
    output = folder / f"{side}.json"
    if side == "kltune":
        more = [part for change in changes for part in ("--set", change)]
        call(sys.executable, "peers_kltune.py", "run", folder, output, "--settings", settings, *more, threads=threads)
    elif work["part"]:
        call(sys.executable, "peers_plain.py", work["part"], folder, output, threads=threads)
    else:
        call(peer, "peers_trl.py", work["peer"], folder, output, "--settings", settings, threads=threads)
    return json.loads(output.read_text())


def figures(run: dict[str, Any], steps: int) -> dict[str, float]:
    """What one process says: medians of its counted steps, with their share of what was done once before the first.

    The seconds and the peak memory of each phase are among them; one that took no time is left out.
    """
    once, once_cpu = (run["before_seconds"].get(name, 0.0) / steps for name in ("once", "once_cpu"))
    found = {
        "seconds": statistics.median(run["seconds"]) + once,
        "cpu_seconds": statistics.median(run["cpu_seconds"]) + once_cpu,
        "peak_mb": run["peak_mb"], "peak_mb_above_model": run["peak_mb"] - run["held_mb"],
    }
    for name, seconds in run["inside"].items():
        if any(seconds) and not name.endswith("_cpu"):
            found[f"{name}_seconds"] = statistics.median(seconds)
            found[f"{name}_mb_above_model"] = run["peak_mb_inside"][name] - run["held_mb"]
    return found | run["values"] | ({"floor_seconds": run["floor_seconds"]} if run["floor_seconds"] else {})


def summary(name: str, settings: str, rows: int, runs: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row for each tool: medians over its runs, ranges of seconds, the other's ÷ kltune's, share of the floor.

    Args:
        name: of the work.
        settings: matched or defaults, and the type of the weights.
        rows: pairs or responses of one step.
        runs: ``figures`` of each run, by tool; kltune's first.
    """
    medians = {
        tool: {key: statistics.median(one[key] for one in found) for key in found[0]} for tool, found in runs.items()
    }
    ours, other = medians["kltune"], list(medians)[-1]
    ratios = {key: medians[other][key] / ours[key] for key in medians[other] if ours.get(key)}
    floor = ours.get("floor_seconds")
    return [
        {
            "work": name, "settings": settings, "tool": tool, "rows_per_step": rows, **medians[tool],
            "range": [pick(one["seconds"] for one in found) for pick in (min, max)], "runs": len(found),
            "per_second": rows / medians[tool]["seconds"],
            **({"share_of_floor": floor / medians[tool]["seconds"]} if floor else {}),
            **({"over_kltune": ratios} if tool != "kltune" else {}),
        }
        for tool, found in runs.items()
    ]


def timings(name: str, dtype: str, arguments: argparse.Namespace, peer: Path) -> list[dict[str, Any]]:
    """A work under each of the settings, the two tools in turns; SystemExit where they computed other numbers."""
    work = sized(name, arguments, arguments.steps + MORE_STEPS, dtype)
    folder = prepare(f"{name}-{dtype}", work, gate=False, threads=arguments.threads)
    rows = []
    for settings in ("matched",) if work["part"] else arguments.settings:
        sides = ["kltune", *([] if work["peer"] is None else ["plain" if work["part"] else "trl"])]
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for repeat in range(arguments.repeat):
            values = []
            for side, found in runs.items():
                one = timed_run(side, folder, work, settings, peer, arguments.threads, arguments.set)
                found.append(figures(one, work["steps"]))
                values.append(one["values"])
                said = f"{name}, {dtype}, {settings}, {side}, {repeat + 1}"
                print(f"{said}: {found[-1]['seconds']:.2f} s", file=sys.stderr)
            check_part(name, dtype, values)
        rows += summary(name, f"{settings}, {dtype}", work["batch"], runs)
    return rows


def check_part(name: str, dtype: str, values: list[dict[str, float]]) -> None:
    """SystemExit unless both sides found one KL on the same responses; nothing where each samples its own."""
    known = [each["kl"] for each in values if "kl" in each]
    if len(known) > 1 and not (row := gate_row(f"KL, {name}", gap(*known), KL_CLOSE[dtype], tuple(known)))["passed"]:
        raise SystemExit(f"{gate_line(row)}\nno timings of {name}")


def printed(rows: list[dict[str, Any]], checks: list[dict[str, Any]], differences: list[str]) -> None:
    """Gates, differences and timings as tables for people."""
    print(*map(gate_line, checks), "\nDefined differently:", *differences, sep="\n")
    for name in dict.fromkeys(row["work"] for row in rows):
        print(f"\n{name}: {described(name)}")
        heads = {"seconds": 9, "range": 16, "CPU s": 8, "rows/s": 9, "floor": 7, "MB above": 10, "MB": 7}
        print(f"{'':32}" + "".join(f"{head:>{width}}" for head, width in heads.items()) + "  seconds (MB) by phase")
        for row in (row for row in rows if row["work"] == name):
            low, high = row["range"]
            floor = f"{row['share_of_floor']:.2f}" if "share_of_floor" in row else "-"
            print(
                f"{row['settings'] + ', ' + row['tool']:32}{row['seconds']:9.3f}{f'{low:.3f}-{high:.3f}':>16}"
                f"{row['cpu_seconds']:8.2f}{row['per_second']:9.2f}{floor:>7}{row['peak_mb_above_model']:10.0f}"
                f"{row['peak_mb']:7.0f}  {phases(row)}"
            )
            if ratios := row.get("over_kltune"):
                print(
                    f"{'  divided by kltune':32}{ratios['seconds']:8.2f}x{'':16}{ratios['cpu_seconds']:7.2f}x{'':16}"
                    f"{ratios['peak_mb_above_model']:9.2f}x{ratios['peak_mb']:6.2f}x"
                )
        print(*NOTES[WORKS[name]["peer"]], sep="\n")
    print(f"\n{PRECISION}\n{NOT_SHOWN}")


def phases(row: dict[str, Any]) -> str:
    """Seconds of each phase and, in brackets, its peak memory above the model, MB."""
    names = (key.removesuffix("_mb_above_model") for key in row if key.endswith("_mb_above_model"))
    return ", ".join(
        f"{name} {row[f'{name}_seconds']:.2f} ({row[f'{name}_mb_above_model']:.0f})" for name in names if name != "peak"
    )


def described(name: str) -> str:
    """The sizes of a work in one line."""
    work = WORKS[name]
    shape, names = work["random"], {"stories": "stories260K", "smol": "SmolLM2-135M"}
    model = "random Llama H{hidden} L{layers} V{vocabulary}".format(**shape) if shape else names[work["model"]]
    rows = "pairs" if work["stage"] in ("dpo", "reward") else "texts" if work["stage"] == "sft" else "responses"
    groups = f", groups of {work['group']}" if work["group"] > 1 else ""
    epochs = f", {work['epochs']} × {work['minibatches']} minibatches" if work["peer"] == "ppo" else ""
    lengths = ", lengths of hh-harmless" if work["ragged"] or work["model"] == "smol" else ""
    return (f"{model}; {work['batch']} {rows}, prompts of up to {work['prompt_tokens']} tokens, responses of up to "
            f"{work['new_tokens']}{lengths}{groups}{epochs}")


def parsed() -> argparse.Namespace:
    """What was asked for; ``chosen`` are pairs of a work's name and the type of its weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK", help="names or patterns; default: all")
    parser.add_argument("--list", action="store_true", help="name the works and their sizes")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="toys are float32 alone")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["matched", "defaults"])
    parser.add_argument("--repeat", type=int, default=5, help="processes of each tool")
    parser.add_argument("--steps", type=int, default=5, help="steps that count in each process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, help="pairs or responses of a step, in place of the work's own")
    parser.add_argument("--group", type=int, help="responses to a prompt, where a work has several")
    parser.add_argument("--set", action="append", default=[], help="a recipe's key=value, for kltune's side")
    parser.add_argument("--stories", type=Path, default=SHARED / "models/stories260K", help="model folder")
    parser.add_argument("--smol", type=Path, default=BUILD.parent / "smollm2", help="SmolLM2's folder")
    parser.add_argument("--pairs", type=Path, default=SHARED / "data/hh-harmless/raw.jsonl")
    parser.add_argument("--prompts", type=Path, default=SHARED / "data/stories/prompts.jsonl")
    parser.add_argument("--gates-only", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    names = {asked: [name for name in WORKS if fnmatch(name, asked)] for asked in arguments.works or ["*"]}
    if unknown := [asked for asked, found in names.items() if not found]:
        parser.error(f"no such work: {', '.join(unknown)}; there are {', '.join(WORKS)}")
    arguments.chosen = [(name, dtype) for name in dict.fromkeys(name for found in names.values() for name in found)
                        for dtype in arguments.dtypes if dtype in WORKS[name]["dtypes"]]
    for path in (arguments.stories, arguments.pairs, arguments.prompts):
        if not path.exists():
            parser.error(f"{path} is not there; say where with --stories, --pairs, --prompts")
    return arguments


def main() -> None:
    """Gates, then timings."""
    arguments = parsed()
    if arguments.list:
        print(*(f"{name:16}{described(name)}" for name in WORKS), sep="\n")
        return
    peers = {version: environment(version) for version in (TRL, TRL_WITH_PPO)}
    if any(WORKS[name]["model"] == "smol" for name, _ in arguments.chosen):
        smol_model(arguments.smol)
    checks, differences = gates(arguments, *peers.values())
    if failed := [row["gate"] for row in checks if not row["passed"]]:
        print(*map(gate_line, checks), "\nDefined differently:", *differences, sep="\n")
        raise SystemExit(f"no timings: {', '.join(failed)} not equal")
    rows = []
    for name, dtype in () if arguments.gates_only else arguments.chosen:
        rows += timings(name, dtype, arguments, peers[TRL_WITH_PPO if WORKS[name]["peer"] == "ppo" else TRL])
    if arguments.json:
        document = {"schema": "kltune.peers/2", "gates": checks, "defined_differently": differences, "rows": rows}
        print(json.dumps(document | stamped(arguments.threads) | {"steps": arguments.steps}, indent=2))
        return
    printed(rows, checks, differences)


if __name__ == "__main__":
    main()
