"""What leaves the process: results on stdout, troubles on stderr, each kind of trouble with its exit code."""

import errno
import json
import os
import sys
from typing import Any, TextIO

from kltune.errors import Interrupted, KltuneError, StorageError
from kltune.recipe import RecipeFaults
from kltune.report.ci import escaped

CANNOT_WRITE = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
OUT_OF_MEMORY = "out of memory; lower optim.micro_batch_size (results stay the same), or sampling.max_new_tokens"


def emit(text: str) -> None:
    """Print a result; a reader that has gone away is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        drop_stdout()
    except OSError:
        drop_stdout()
        raise


def drop_stdout() -> None:
    """Send what is still buffered nowhere, so that the interpreter does not stumble over it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def to_json(document: dict[str, Any]) -> str:
    """One JSON document; a nan in it is a bug, not a number."""
    return json.dumps(document, indent=2, allow_nan=False)


def show_result(result: dict[str, Any], as_json: bool) -> None:
    """Print what a stage returns: the object of result.json, or a few lines for people."""
    emit(to_json(result) if as_json else summary(result))


def summary(result: dict[str, Any]) -> str:
    """The result of a run in a few lines."""
    kl, lines = result.get("kl") or {}, [f"{result.get('status')}: {result.get('output')}"]
    if result.get("final"):
        lines.append(f"  final   {result['final']}")
    if kl.get("nats_per_response") is not None:
        text = f"  KL      {kl['nats_per_response']:.3g}"
        text += f" ± {kl['stderr']:.2g}" if kl.get("stderr") is not None else ""
        text += " nats per response, KL(policy‖reference)"
        lines.append(text + (f", target {result['target']:g}" if result.get("target") is not None else ""))
    elif result.get("stage") != "reward":      # which says nothing, and so has no KL
        lines.append("  KL      not measured")
    evaluated = result.get("eval") or {}
    if evaluated.get("eval/accuracy") is not None:
        low, high = evaluated["eval/accuracy_low"], evaluated["eval/accuracy_high"]
        lines.append(f"  right   {evaluated['eval/accuracy']:.3f} of the held-out rows (95 %: {low:.3f} to {high:.3f})")
    if result.get("score") is not None:
        lines.append(f"  score   {result['score']:.4g}")
    if result.get("steps") is not None and result.get("seconds") is not None:
        lines.append(f"  steps   {result['steps']} in {result['seconds']:.0f} s")
    return "\n".join(lines)


def complain(error: KltuneError) -> int:
    """Say on stderr what is wrong, and give the exit code of its kind."""
    label = "kltune: stopped:" if isinstance(error, Interrupted) else "kltune: error:"
    if wants_colour(sys.stderr):
        label = f"\033[31m{label}\033[0m"
    print(f"{label} {error}", file=sys.stderr)
    if on_github():
        annotate(error)
    return error.exit_code


def annotate(error: KltuneError) -> None:
    """The same as annotations that GitHub shows on the page of a job: a recipe's faults at their lines."""
    if not isinstance(error, RecipeFaults):
        print(f"::error title=kltune::{escaped(str(error))}", file=sys.stderr)
        return
    for fault in error.faults:
        where = f"file={escaped(fault.place.file, ':,')},line={fault.place.line},col={fault.place.column}"
        print(f"::error {where}::{escaped(f'{fault.key}: {fault.text}')}", file=sys.stderr)


def on_github() -> bool:
    """Whether this runs in a GitHub workflow, which reads annotations from what is printed."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def wants_colour(stream: TextIO) -> bool:
    """Whether colour may be used there: a terminal, and nothing in the environment asks for plain text."""
    plain = any(os.environ.get(name) for name in ("NO_COLOR", "CI")) or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def as_user_error(error: Exception) -> KltuneError | None:
    """What a user can put right although a library raised it: no room on disk or in memory; else None."""
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        name = f" {error.filename}" if error.filename else ""
        return StorageError(f"cannot read or write{name}: {error.strerror}")
    # by name: torch has its own class, and importing torch to compare classes would slow every other error
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    ):
        return StorageError(OUT_OF_MEMORY)
    return None
