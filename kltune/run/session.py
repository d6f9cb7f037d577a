"""A run and its folder: how every stage begins, who may write there, what asks it to stop, and how it ended."""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

import kltune
from kltune.core import ranks
from kltune.errors import GOES_ON_LATER, CheckpointError, Interrupted, RecipeError, StorageError
from kltune.lm.data.chat import read_template, today
from kltune.lm.data.documents import Result, RunRecord, Stepped
from kltune.lm.machine.out_of_memory import ANYTHING, phase
from kltune.lm.machine.threads import choose_threads, computing_with
from kltune.lm.model.files import size_of
from kltune.lm.model.fingerprint import Fingerprint
from kltune.lm.model.loading import prepare_device
from kltune.lm.model.opening import load_policy
from kltune.lm.model.policy import Policy
from kltune.lm.rewards.inputs import base_of, inputs_of, recipe_changes, refuse_changed, refuse_changed_base
from kltune.recipe import ModelSection, Recipe, dump_recipe, recipe_digest
from kltune.recipe.faults import redact
from kltune.run.caches import StoredAnswers, StoredLogprobs
from kltune.run.checkpoint import clear_leftovers, latest_checkpoint, saved_step, verify
from kltune.run.files import (
    RUN_SCHEMA,
    claim,
    is_finished,
    locked,
    read_json,
    read_jsonl,
    read_record,
    to_json,
    without_nonfinite,
    write_whole,
)
from kltune.run.loggers import wanted_loggers
from kltune.run.screen import doing
from kltune.run.subprocesses import end_at_once, on_stop_signals, signal_of_parents_death, tell_at_once

Train = Callable[[Any, Policy, "Run"], dict[str, Any]]
SAME_SIGNAL_SECONDS = 0.1      # `timeout` and wrappers that forward send one signal twice, within milliseconds


class Run:
    """One run while it is open; made by `open_run`.

    Attributes:
        start_step: steps already done: 0, or those of ``resume_from``.
        stop_signal: the number of the signal that asked the run to stop after this step, or None.
        answers: of AI judges, those of earlier sessions included.
        ref_logprobs: of the reference, likewise.
    """

    def __init__(self, recipe: Recipe, record: dict[str, Any], resume_from: Path | None):
        self.recipe = recipe
        self.folder = Path(recipe.run.output)
        self.resume_from = resume_from
        self.start_step = saved_step(resume_from) if resume_from else 0
        self.stop_signal: int | None = None
        self.answers = StoredAnswers(self.folder, stopped=lambda: self.stop_signal is not None)
        self.ref_logprobs = StoredLogprobs(self.folder)
        self._signalled_at = 0.0
        self._opened_at = time.monotonic() - (record.get("seconds") or 0.0)
        self._record = record

    def rng(self, stream: str, step: int) -> np.random.Generator:
        """Random numbers for one purpose ("sampling") in one step, the same whether the run was interrupted or not."""
        return np.random.default_rng([self.recipe.run.seed, zlib.crc32(stream.encode()), step])

    def seconds(self) -> float:
        """Seconds that the run was open, by wall clock; of sessions before a resumed one, until their last save."""
        return time.monotonic() - self._opened_at

    def set_reference(self, fingerprint: Fingerprint) -> None:
        """Record the reference of every KL of this run; CheckpointError if it was started against another one.

        The chat template is held against the checkpoint's own over every row: of one that no row needs nothing depends.
        """
        before = self._record["reference"] if self.resume_from else None
        if before and (differences := fingerprint.differences(before, but=("template_sha256",))):
            raise CheckpointError(
                f"{self.folder} was started against another reference:\n  " + "\n  ".join(differences)
                + "\nPut the model's files back, or choose another --output."
            )
        self.record(reference=fingerprint.as_dict())

    def set_inputs(self, inputs: dict[str, Any]) -> None:
        """Record what this run reads; raises as ``refuse_changed`` if it was started on other rows or scorers."""
        if self.resume_from:
            refuse_changed(self._record["inputs"] or {}, inputs, self.folder)
        self.record(inputs=inputs)

    def with_threads(self) -> contextlib.AbstractContextManager[None]:
        """Within: the number of threads that ``run.threads`` comes to, recorded and said; see ``choose_threads``."""
        wanted, recorded = self.recipe.run.threads, self._record["threads"]
        threads, line = ranks.from_first(lambda: choose_threads(wanted, recorded, os.environ, ranks.beside()))
        print(line, file=sys.stderr)
        self.record(threads=threads)
        return computing_with(threads)

    @property
    def day(self) -> date:
        """The day that chat templates are told, for as long as the run goes on."""
        return date.fromisoformat(self._record["template_date"])

    @property
    def model(self) -> ModelSection:
        """The recipe's, in the dtype that the run began with, which ``auto`` may not come to on another machine."""
        section, before = self.recipe.model, self._record["reference"] if self.resume_from else None
        began = before and section.dtype == "auto" and self.recipe.lora is not None
        return section.model_copy(update={"dtype": before["dtype"]}) if began else section

    @property
    def machine(self) -> dict[str, Any] | None:
        """What the run computes on, as it was recorded."""
        return self._record["machine"]

    def record(self, **facts: Any) -> None:
        """Put facts in run.json, as where the scores came from."""
        self._record = {**self._record, **facts}
        if ranks.is_first():
            write_whole(self.folder / "run.json", redact(to_json(self._record, indent=2)) + "\n")

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write result.json and call the run finished; the result as it was written, by ``without_nonfinite``."""
        result = without_nonfinite(result)
        if ranks.is_first():
            write_whole(self.folder / "result.json", redact(to_json(result, indent=2)) + "\n")
        self.record(status="finished", ended=_now())
        return result

    def agree_on_stop(self) -> int | None:
        """The signal that asked any of this run's processes to stop, from here on in all of them."""
        numbers = ranks.gathered(lambda: self.stop_signal)
        asked = next((rank for rank, number in enumerate(numbers) if number is not None), None)
        self.stop_signal = None if asked is None else numbers[asked]
        if asked and ranks.is_first():      # which has not heard of it, and not said so
            name = signal.Signals(self.stop_signal).name
            tell_at_once(f"{name} to process {asked} of {len(numbers)}: saving, then ending.\n")
        return self.stop_signal

    def close(self, error: BaseException | None) -> None:
        """Record how the run ended, unless that is recorded: by an error, None where it ended without a result."""
        if self._record["status"] != "running":
            return
        status = "interrupted" if isinstance(error, (Interrupted, *GOES_ON_LATER)) else "failed"
        with contextlib.suppress(StorageError):      # on a full disk the error that is on its way says more
            self.record(status=status, ended=_now(), error=_one_line(error))

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.stop_signal is None:
            self.stop_signal, self._signalled_at = number, time.monotonic()
            signal_of_parents_death(0)
            if ranks.is_first():
                name = signal.Signals(number).name
                tell_at_once(f"{name}: finishing this step, then saving; a second signal ends at once.\n")
        elif number != self.stop_signal or time.monotonic() - self._signalled_at > SAME_SIGNAL_SECONDS:
            end_at_once(number)


def run_stage(recipe: Recipe, resume: bool, train: Train) -> dict[str, Any]:
    """The object of ``result.json`` of a run in the folder that its recipe names: of one that is finished, or made now.

    ``train`` takes the recipe, a policy with a fresh adapter and the open run, and gives that object.
    """
    with ranks.joined(recipe.run.processes, recipe.run.timeout_s, recipe.run.device):
        if (done := ranks.from_first(partial(finished_result, recipe))) is not None:
            return done
        wanted_loggers(recipe.run.loggers)      # what is not installed is said before anything slow
        with open_run(recipe, resume=resume) as run, ranks.phase("loading the model"):
            return _opened(recipe, run, train)


def _opened(recipe: Recipe, run: Run, train: Train) -> dict[str, Any]:
    """Read what the recipe names, and train."""
    doing("reading what the recipe names")
    ranks.from_first(lambda: run.set_inputs(inputs_of(recipe)))
    with run.with_threads():
        torch.manual_seed(recipe.run.seed)  # the adapter's initial weights; everything later has its own numbers
        print(f"{recipe.stage}: reading {recipe.model.path}{size_of(recipe.model.path)}", file=sys.stderr, flush=True)
        doing(f"loading {recipe.model.path}")
        device, template = prepare_device(recipe.run), read_template(recipe.data.chat_template)
        policy = load_policy(run.model, recipe.lora, device=device, chat_template=template)
        policy.plan_memory(recipe.run.memory_fraction, recipe.optim.checkpoint_layers)
        run.set_reference(policy.fingerprint)
        run.record(base=base_of(recipe))
        if run.resume_from is not None:
            policy.hold_against(run.resume_from, "checkpoint", recipe.model.trust_remote_code)
        policy.day = run.day
        doing("reading rows and rewards")
        with phase(ANYTHING, device):
            return train(recipe, policy, run)


@contextlib.contextmanager
def open_run(recipe: Recipe, *, resume: bool) -> Iterator[Run]:
    """Take the run's folder, decide where to start, and record how it ended.

    Inside, the first of ``STOP_SIGNALS`` sets ``run.stop_signal`` and the second ends the process. Leaving by
    `Interrupted` or `JudgeError` records the status "interrupted", in any other way without `Run.finish` "failed".

    resume: continue an unfinished run of the same recipe from its newest checkpoint; in an empty folder, start.

    Raises:
        RecipeError: the folder holds something else, a finished run, an unfinished one without ``resume``, or one of
            another recipe. BusyError: another process has it. StorageError: it cannot be written.
    """
    with contextlib.ExitStack() as held:
        opened = ranks.from_first(lambda: _take(recipe, resume, held))
        resume_from = None if opened["resume_from"] is None else Path(opened["resume_from"])
        run = Run(recipe, opened["record"], resume_from)
        try:
            with on_stop_signals(run._on_signal):
                yield run
        except BaseException as error:
            if isinstance(error, GOES_ON_LATER) and run.stop_signal is not None:     # it was not waited for
                error = Interrupted(str(error), run.stop_signal)
            run.close(error)
            raise error
        run.close(None)


def _take(recipe: Recipe, resume: bool, held: contextlib.ExitStack) -> dict[str, Any]:
    """Take the folder, which is locked while ``held``, and ready it: its record, and the checkpoint to start from."""
    folder = Path(recipe.run.output)
    if (folder / "run.json").exists():
        _refuse_lost_record(folder, read_record(folder))
    claim(folder, "run", ours=read_record(folder) is not None)
    held.enter_context(locked(folder))
    clear_leftovers(folder)
    previous = read_record(folder)
    resume_from = _where_to_start(recipe, previous, resume=resume)
    record = _new_record(recipe, previous, resume_from)
    for name in ("metrics.jsonl", "samples.jsonl"):
        _cut_after(folder / name, -1 if resume_from is None else saved_step(resume_from))
    Run(recipe, record, resume_from).record()       # before recipe.yaml: it is what makes the folder a run's
    write_whole(folder / "recipe.yaml", redact(dump_recipe(recipe)))
    return {"record": record, "resume_from": None if resume_from is None else str(resume_from)}


def finished_result(recipe: Recipe) -> dict[str, Any] | None:
    """The result that this recipe's run has left in its folder, or None.

    Raises:
        RecipeError: it is of another recipe. DataError, ScorerError, ModelError: of other rows, scorers or model than
            are there now.
    """
    folder = Path(recipe.run.output)
    if not is_finished(folder) or _damage_of_final(folder) is not None:
        return None
    record = read_json(folder / "run.json", RunRecord)
    _refuse_another_recipe(recipe, record)
    refuse_changed(record.get("inputs") or {}, inputs_of(recipe, present=True), folder)
    refuse_changed_base(record, recipe, folder)
    print(f"{folder}: finished on {record['ended']}; nothing was run.", file=sys.stderr)
    result = read_json(folder / "result.json", Result)
    here = {"output": str(folder), "final": str(folder / "final")}      # it may have been moved
    return result | {key: path for key, path in here.items() if result.get(key)}


def _where_to_start(recipe: Recipe, previous: dict[str, Any] | None, *, resume: bool) -> Path | None:
    """The checkpoint to continue from, or None for the beginning.

    Raises:
        CheckpointError: there was more than can be found now; nothing was touched.
    """
    folder = Path(recipe.run.output)
    damage = _damage_of_final(folder) if is_finished(folder) else None
    if is_finished(folder) and damage is None:
        raise RecipeError(f"{folder} holds a finished run. Choose another --output.")
    _refuse_lost_record(folder, previous)
    steps, kept = _traces(folder)
    saved = (previous or {}).get("saved_step")
    if previous is None or not (steps or kept or saved):
        return None      # a run that failed before its first step has nothing to lose
    checkpoint = latest_checkpoint(folder)
    if not resume and damage is not None:
        raise CheckpointError(f"{damage} Add --resume to make final again from the run's newest checkpoint.")
    if not resume:
        step = saved_step(checkpoint) if checkpoint else 0
        raise RecipeError(
            f"{folder} holds an unfinished run (step {step}): add --resume to continue it, or choose another --output."
        )
    _refuse_another_recipe(recipe, previous)
    # Up to the first save a run has nothing but its metrics, and begins again.
    if checkpoint is None and (kept or saved or steps > recipe.run.save_every):
        raise CheckpointError(
            f"{folder} has taken {steps} steps and saved some, but none of its checkpoints is there and whole: put "
            "checkpoints/ back, or choose another --output to begin again. Nothing was touched."
        )
    return checkpoint


def _traces(folder: Path) -> tuple[int, bool]:
    """How many steps metrics.jsonl says were taken, and whether there are folders of checkpoints, whole or not."""
    steps = max((row.get("step", 0) for row in read_jsonl(folder / "metrics.jsonl", Stepped)), default=0)
    return steps, any((folder / "checkpoints").glob("step-*"))


def _refuse_lost_record(folder: Path, record: dict[str, Any] | None) -> None:
    """Raise CheckpointError where a run has left traces and its run.json does not say which run it was."""
    if record is None and any(_traces(folder)):
        raise CheckpointError(
            f"{folder / 'run.json'} is damaged, or cannot be read at the moment: put it back, or choose another "
            "--output. Nothing was touched."
        )


def _damage_of_final(folder: Path) -> str | None:
    """What is wrong with the final of a finished run; None if nothing, or if it was to have none."""
    result = read_json(folder / "result.json")
    if not isinstance(result, dict) or not result.get("final"):
        return None
    try:
        verify(folder / "final")
    except CheckpointError as error:
        return str(error)
    return None


def _refuse_another_recipe(recipe: Recipe, record: dict[str, Any]) -> None:
    """Refuse a recipe other than that of the folder; only where and how many checkpoints are kept may change."""
    folder = Path(recipe.run.output)
    try:
        changes = recipe_changes(folder, record, recipe)
    except RecipeError as error:
        changes = [f"recipe.yaml there cannot be compared: {error}"]
    if not changes:
        return
    lines = "".join(f"\n  {redact(change)}" for change in changes)
    raise RecipeError(
        f"{folder} holds a run of another recipe:{lines}\nSet the old values again, or choose another --output."
    )


def _new_record(recipe: Recipe, previous: dict[str, Any] | None, resume_from: Path | None) -> dict[str, Any]:
    continued = (previous or {}) if resume_from else {}
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    versions = {"python": platform.python_version(), "kltune": kltune.__version__, **libraries}
    if continued and continued.get("versions") != versions:
        print("warning: resuming with other library versions: numbers may differ in the last digits.", file=sys.stderr)
    return {
        "schema": RUN_SCHEMA,
        "kltune_version": kltune.__version__,
        "stage": recipe.stage,
        "status": "running",
        "seed": recipe.run.seed,
        "reference": continued.get("reference"),
        "inputs": continued.get("inputs"),
        "base": continued.get("base"),
        "machine": None,
        "template_date": continued.get("template_date") or recipe.data.date or today().isoformat(),
        "versions": versions,
        "threads": continued.get("threads"),
        "seconds": continued.get("seconds"),
        "started": continued.get("started", _now()),
        "ended": None,
        "saved_step": saved_step(resume_from) if resume_from else None,
        "recipe_sha256": recipe_digest(recipe),
        "command": redact(shlex.join(["kltune", *sys.argv[1:]]), arguments=True),
        "resumed_at": continued.get("resumed_at", []) + ([saved_step(resume_from)] if resume_from else []),
        "error": None,
    }


def _cut_after(path: Path, step: int) -> None:
    """Drop the lines of steps and of an end that will be done again, and a last line that a kill cut short."""
    if path.exists():
        rows = read_jsonl(path, Stepped)
        kept = [to_json(row) + "\n" for row in rows if row.get("step", 0) <= step and not row.get("final")]
        write_whole(path, "".join(kept))


def _one_line(error: BaseException | None) -> str:
    if error is None:
        return "the stage ended without a result"
    message = redact(str(error)).strip().partition("\n")[0][:500]      # before the cut: half a secret is none to find
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
