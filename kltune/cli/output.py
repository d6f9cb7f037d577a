"""What leaves the process: results on stdout, troubles on stderr, each kind of trouble with its exit code."""

import os
import sys
from collections.abc import Callable
from typing import Any

from kltune.errors import Interrupted, KltuneError, StorageError
from kltune.recipe import RecipeFaults
from kltune.recipe.faults import redact, visible
from kltune.report.ci import escaped
from kltune.run.files import CANNOT_WRITE, to_json
from kltune.run.screen import duration, interval, number, undressed, wants_colour, with_error

OUT_OF_MEMORY = "out of memory; lower optim.micro_batch_size (results stay the same), or sampling.max_new_tokens"


def emit(text: str, *, styled: bool = False) -> None:
    """Print a result without secrets; a reader that has gone away is no error.

    styled: it has colours, and what strangers wrote in it is ``visible`` already; all else is made so here.
    """
    text = redact(text)
    try:
        print(text if styled else visible(text), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)      # lest the interpreter stumble over what is still buffered
        if not isinstance(error, BrokenPipeError):
            raise


def emit_json(document: dict[str, Any]) -> None:
    """Print a result as one JSON document; a nan in it is a bug, not a number."""
    # In JSON a # may be escaped, in GitHub's commands not.
    emit(to_json(document, indent=2, ascii_only=True).replace("##[", "#\\u0023["), styled=True)


def emit_document(
    document: dict[str, Any], as_json: bool, as_text: Callable[[dict[str, Any]], str], *, styled: bool = False
) -> None:
    """Print a result as one JSON document, or as text for people; ``styled`` as for `emit`."""
    if as_json:
        emit_json(document)
    else:
        emit(as_text(document), styled=styled)


def result_text(result: dict[str, Any]) -> str:
    """What a stage returns, in a few lines."""
    kl, lines = result.get("kl") or {}, [f"{result.get('status')}: {result.get('output')}"]
    if result.get("final"):
        lines.append(f"  final   {result['final']}")
    if kl.get("nats_per_response") is not None:
        goal = f", target {result['target']:g}" if result.get("target") is not None else ""
        measured = with_error(kl["nats_per_response"], kl.get("stderr"))
        lines.append(f"  KL      {measured} nats per response, KL(policy‖reference){goal}")
    elif result.get("stage") != "reward":      # a reward model says nothing, and so has no KL
        lines.append("  KL      not measured")
    evaluated = result.get("eval") or {}
    if evaluated.get("eval/accuracy") is not None:
        bounds = interval((evaluated["eval/accuracy_low"], evaluated["eval/accuracy_high"]))
        lines.append(f"  right   {number(evaluated['eval/accuracy'])} of the held-out rows (95 %: {bounds})")
    if result.get("score") is not None:
        lines.append(f"  score   {with_error(result['score'], evaluated.get('eval/score_stderr'))}")
    if result.get("steps") is not None and result.get("seconds") is not None:
        lines.append(f"  steps   {result['steps']} in {duration(result['seconds'])}")
    return "\n".join(lines)


def complain(error: KltuneError) -> int:
    """Say on stderr what is wrong, on GitHub as annotations too; return the exit code of its kind."""
    label = "kltune: stopped:" if isinstance(error, Interrupted) else "kltune: error:"
    if wants_colour(sys.stderr):
        label = f"\033[31m{label}\033[0m"
    print(f"{label} ", end="", file=undressed(sys.stderr))
    print(visible(redact(str(error))), file=undressed(sys.stderr))
    if on_github() and isinstance(error, RecipeFaults):
        for fault in error.faults:
            where = f"file={escaped(fault.place.file, ':,')},line={fault.place.line},col={fault.place.column}"
            print(f"::error {where}::{escaped(f'{fault.key}: {fault.text}')}", file=undressed(sys.stderr))
    elif on_github():
        print(f"::error title=kltune::{escaped(str(error))}", file=undressed(sys.stderr))
    return error.exit_code


def on_github() -> bool:
    """Whether this runs in a GitHub workflow, which reads annotations from what is printed."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


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
