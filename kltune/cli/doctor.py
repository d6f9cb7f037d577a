"""``kltune doctor``: whether this machine can run kltune, what it would run on, and what is missing for what."""

import importlib.metadata
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kltune import __version__
from kltune.cli.options import JSONOption
from kltune.cli.output import emit_document
from kltune.errors import InputError, KltuneError
from kltune.run.screen import GB

EXTRAS = {
    "tensorboard": "curves while training", "trackio": "curves while training, kept here",
    "wandb": "curves while training, by Weights & Biases",
}
SETTINGS = ("HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)\s*(?P<range>[^;]*)(?P<extra>;.*extra.*)?")
FREE_GB = 2.0           # of memory, below which only the smallest models are trained


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. state: ok, note (works without it), or bad (kltune does not run so)."""

    what: str
    state: str
    found: str
    to_do: str = ""


def doctor_command(
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="M", help="Also open this model, and take a step with it.")
    ] = None,
    as_json: JSONOption = False,
) -> None:
    """See whether this machine can run kltune: versions, device, memory, and one training step on a tiny model.

    Exit code 0: all that is needed is here; 5: something is missing, or not as it has to be.

    kltune doctor --model path/to/model
    """
    findings = [*version_findings(), *device_findings(), *setting_findings()]
    if all(finding.state != "bad" for finding in findings):     # an unfit library would only fail in its own words
        findings.append(step_finding(None))
        findings += model_findings(model) if model is not None else []
    fit = all(finding.state != "bad" for finding in findings)
    document = {"schema": "kltune.doctor/1", "kltune_version": __version__, "ok": fit,
                "findings": [asdict(finding) for finding in findings]}
    emit_document(document, as_json, doctor_text)
    raise typer.Exit(0 if fit else InputError.exit_code)


def doctor_text(document: dict[str, Any]) -> str:
    """What was found, a line each, and the way on."""
    width = max(len(finding["what"]) for finding in document["findings"])
    lines = []
    for finding in document["findings"]:
        lines.append(f"{finding['state']:<4}  {finding['what']:<{width}}  {finding['found']}".rstrip())
        lines += [f"{'':<{width + 8}}{finding['to_do']}"] if finding["to_do"] else []
    end = "All that kltune needs is here. Next: kltune demo, or kltune init" if document["ok"] else (
        "kltune does not run like this; put right what is marked bad")
    return "\n".join([f"kltune {document['kltune_version']}", *lines, "", end])


def version_findings() -> Iterator[Finding]:
    """Python and every library that kltune names, against the ranges that it names; then the extras."""
    python = ".".join(map(str, sys.version_info[:3]))
    fits = sys.version_info >= (3, 11)
    yield Finding("python", "ok" if fits else "bad", python, "" if fits else "wanted 3.11 or later")
    try:
        needed = importlib.metadata.requires("kltune") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("kltune", "note", f"{__version__}, run from a folder and not installed",
                      "pip install . in that folder, so that its libraries are known")
        return
    for line in needed:
        match = REQUIREMENT.match(line)
        if match and not match["extra"]:
            yield library_finding(match["name"], match["range"].strip())
    for name, purpose in EXTRAS.items():
        version = installed(name)
        yield Finding(name, "ok" if version else "note", version or f"not installed ({purpose})",
                      "" if version else f"pip install {name}, if you want it")


def library_finding(name: str, wanted: str) -> Finding:
    """A library that is needed, against the range of versions that is wanted."""
    version = installed(name)
    if version is None:
        return Finding(name, "bad", "not installed", f"pip install '{name}{wanted}'")
    fits = within(version, wanted)
    return Finding(name, "ok" if fits else "bad", f"{version} (wanted {wanted})", "" if fits else (
        f"pip install '{name}{wanted}'"))


def installed(name: str) -> str | None:
    """The version of a library; None if it is not here."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def within(version: str, wanted: str) -> bool:
    """Whether a version lies in a range such as ``>=2.11,<2.16``; of what is behind its numbers nothing is read."""
    mine = numbers(version)
    for part in filter(None, wanted.split(",")):
        sign, bound = re.fullmatch(r"\s*(>=|<=|==|!=|<|>|~=)\s*([\w.*+!-]+)\s*", part).groups()
        other = numbers(bound)
        size = max(len(mine), len(other))
        a, b = (list(one) + [0] * (size - len(one)) for one in (mine, other))
        held = {">=": a >= b, "<=": a <= b, "==": a == b, "!=": a != b, "<": a < b, ">": a > b, "~=": a >= b}[sign]
        if not held:
            return False
    return True


def numbers(version: str) -> tuple[int, ...]:
    """2.11.0+cu128 is (2, 11, 0)."""
    return tuple(map(int, re.match(r"\d+(\.\d+)*", version)[0].split(".")))


def device_findings() -> Iterator[Finding]:
    """What it would run on, and how much memory is free there and on the disk."""
    if installed("torch") is None:
        return
    import torch

    from kltune.lm.machine.device_memory import available_bytes
    from kltune.lm.machine.threads import choose_threads

    if torch.cuda.is_available():
        for place in range(torch.cuda.device_count()):
            free, whole = torch.cuda.mem_get_info(place)
            yield Finding(f"cuda:{place}", "ok", f"{torch.cuda.get_device_name(place)}, {free / 1e9:.1f} of "
                          f"{whole / 1e9:.1f} GB free")
    else:
        built = torch.version.cuda
        yield Finding("cuda", "note", "no GPU that torch can use", (
            "" if built is None else f"torch was built for CUDA {built}; is the driver there (nvidia-smi)?"))
    free = available_bytes() / 1e9
    little = "" if free > FREE_GB else "little: lower optim.micro_batch_size and sampling.max_new_tokens"
    yield Finding("memory", "note" if little else "ok", f"{free:.1f} GB free", little)
    yield Finding("threads", "ok", choose_threads("auto", None, os.environ)[1].removeprefix("threads: "))
    disk = os.statvfs(tempfile.gettempdir())
    yield Finding("disk", "ok", f"{disk.f_bavail * disk.f_frsize / 1e9:.1f} GB free in {tempfile.gettempdir()}")


def setting_findings() -> Iterator[Finding]:
    """Whether the hub is asked, where its files are kept, and what the environment says of threads and devices."""
    for name in SETTINGS:
        if os.environ.get(name):
            yield Finding(name, "ok", os.environ[name])
    if installed("huggingface_hub") is None:
        return
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    models = len(list(Path(HF_HUB_CACHE).glob("models--*")))
    asked = "not asked (HF_HUB_OFFLINE)" if HF_HUB_OFFLINE else "asked for names that are no folder here"
    yield Finding("hub", "ok", f"{asked}; {models} models in {HF_HUB_CACHE}")


def model_findings(model: str) -> list[Finding]:
    """What each stage would take on a model, against what is there; then a step with it, where that fits."""
    print(f"looking at {model}: its configuration, then a step with it", file=sys.stderr)
    from kltune.train.plan import ANSWERED, ASKED, plans_for

    found: list[Finding] = []
    try:
        plans = dict(plans_for(str(Path(model).absolute()) if Path(model).is_dir() else model))
    except KltuneError as error:
        return [Finding(f"memory of {model}", "bad", str(error), "correct what it names")]
    for stage, memory in plans.items():
        what = f"memory of {stage}"
        told = f"{memory['peak'] / GB:.2f} GB at the peak of {memory['planned'] / GB:.2f} GB planned with"
        if "largest_micro_batch" in memory:
            told += f"; up to {memory['largest_micro_batch']} rows of {ASKED} + {ANSWERED} tokens trained on at once"
        to_do = "" if memory["fits"] else "lower optim.micro_batch_size or the rows' lengths, or take a smaller model"
        found.append(Finding(what, "ok" if memory["fits"] else "note", told, to_do))
    if plans["sft"]["held"] > plans["sft"]["planned"]:
        return [*found, Finding(f"a step on {model}", "note", "not tried: the weights alone do not fit")]
    return [*found, step_finding(model)]


def step_finding(model: str | None) -> Finding:
    """One step of supervised fine-tuning, measured: on a tiny model with random weights, or on one that is named."""
    what = f"a step on {model or 'a tiny model'}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            from kltune.demo.smoke import smoke_test

            seconds, kl = smoke_test(Path(folder), model)
        except KltuneError as error:
            return Finding(what, "bad", str(error), "correct what it names" if model else "report this")
    return Finding(what, "ok", f"{seconds:.1f} s; KL to its reference {kl:.2g} nats per response")
