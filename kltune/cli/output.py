"""What leaves the process: results on stdout, troubles on stderr, each kind of trouble with its exit code."""

import errno
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kltune.cli.streams import drop_buffered, result_stream
from kltune.errors import Interrupted, KltuneError, OutOfMemory, StorageError, failed_process, is_out_of_memory
from kltune.recipe import RecipeFaults
from kltune.recipe.faults import redact, visible
from kltune.report.ci import escaped
from kltune.run.files import CANNOT_WRITE, refused, to_json
from kltune.run.screen import GB, apart, duration, interval, number, undressed, wants_colour, with_error
from kltune.run.subprocesses import is_extra_process

GATE = 1.25     # times the target: what the command that is suggested allows
MAY_BE_READING = {errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENAMETOOLONG}
OUT_OF_MEMORY = "out of memory; lower optim.micro_batch_size (results stay the same), or sampling.max_new_tokens"


def emit(text: str, *, styled: bool = False) -> None:
    """Print a result without secrets; a reader that has gone away is no error.

    styled: it has colours, and what strangers wrote in it is ``visible`` already; all else is made so here.
    """
    text, stream = redact(text), result_stream()
    if is_extra_process():
        return
    try:
        print(text if styled else visible(text), file=stream, flush=True)
    except OSError as error:
        drop_buffered(stream)
        if not isinstance(error, BrokenPipeError):
            raise StorageError(
                f"cannot write the result to stdout: {error.strerror}. What the command writes to files is there."
            ) from error


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
    """What a stage returns, in a few lines: how it ended, what it came to, and what to do next."""
    from kltune.report.outcome import in_words, kl_in, read_files, verdict_of

    kl, output, evaluated = result.get("kl") or {}, Path(str(result.get("output"))), result.get("eval") or {}
    word = f", {verdict_of(read_files(output)).word}" if (output / "run.json").is_file() else ""
    rows = {}
    unit = result.get("unit") or "nats_per_response"
    value, error, _ = kl_in(unit, kl)
    if value is not None:
        goal = f", target {result['target']:g}" if result.get("target") is not None else ""
        rows["KL"] = f"{with_error(value, error)} {in_words(unit)}, KL(policy‖reference){goal}"
    elif result.get("stage") != "reward":      # a reward model says nothing, and so has no KL
        rows["KL"] = "not measured"
    for name in ("score", "gold"):
        if result.get(name) is not None:
            before = result.get(f"reference_{name}")
            of_reference = with_error(before, evaluated.get(f"eval/reference_{name}_stderr"))
            start = "" if before is None else f"{of_reference} → "
            rows[name] = start + with_error(result[name], evaluated.get(f"eval/{name}_stderr"))
    if result.get("win_rate") is not None:
        bounds = interval(result.get("win_rate_ci95"), against=(0.0, 0.5, 1.0))
        rows["wins"] = f"{apart(result['win_rate'], 0.0, 0.5, 1.0)[0]} of pairs with the reference (95 %: {bounds})"
    if result.get("teacher_kl") is not None:
        measured = with_error(result["teacher_kl"], result.get("teacher_kl_stderr"))
        start = number(result.get("reference_teacher_kl"))
        rows["KL to"] = f"{start} → {measured} nats per response, KL(policy‖teacher)"
    if evaluated.get("eval/accuracy") is not None:
        bounds = interval((evaluated["eval/accuracy_low"], evaluated["eval/accuracy_high"]), against=(0.0, 0.5, 1.0))
        rows["right"] = f"{apart(evaluated['eval/accuracy'], 0.0, 1.0)[0]} of the held-out rows (95 %: {bounds})"
    if result.get("steps") is not None and result.get("seconds") is not None:
        rows["steps"] = f"{result['steps']} in {duration(result['seconds'])}"
    rows |= {"final": result["final"]} if result.get("final") else {}
    rows |= {"page": output / "report.html"} if (output / "report.html").is_file() else {}
    rows |= {"next": following(result)} if result.get("final") else {}
    first = f"{result.get('status')}{word}: {output}"
    return "\n".join([first, *(f"  {name:<6}  {text}" for name, text in rows.items())])


def following(result: dict[str, Any]) -> str:
    """The command, or the line of a recipe, that what a stage made is for."""
    if result.get("stage") == "reward":
        return f"reward: [{{kind: model, path: {result['final']}}}] in the recipe of ppo or trpo"
    if result.get("stage") == "sft":
        key = "sft_adapter" if (Path(result["final"]) / "adapter_config.json").is_file() else "path"
        return f"model: {{{key}: {result['final']}}} in the recipe of what comes after"
    most = result.get("hard_cap") or (GATE * result["target"] if result.get("target") else None)
    if result.get("unit") == "nats_per_token" or most is None:
        return f"kltune eval-kl {shlex.quote(str(result['output']))}"
    return f"kltune eval-kl {shlex.quote(str(result['output']))} --max-kl {most:g}"


def complain(error: KltuneError) -> int:
    """Say on stderr what is wrong, on GitHub as annotations too; return the exit code of its kind."""
    label = "kltune: stopped:" if isinstance(error, Interrupted) else "kltune: error:"
    text = visible(redact(f"{failed_process(error)}{error}"))
    if is_extra_process():
        if error.unheard or os.environ.get("LOCAL_RANK") == "0":      # of another machine, whose log is its own
            print(f"{label} process {os.environ['RANK']}: {text}", file=sys.__stderr__)
        return error.exit_code
    if wants_colour(sys.stderr):
        label = f"\033[31m{label}\033[0m"
    print(f"{label} ", end="", file=undressed(sys.stderr))
    print(text, file=undressed(sys.stderr))
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
    if isinstance(error, OSError) and error.filename and error.errno in CANNOT_WRITE - MAY_BE_READING:
        return StorageError(refused(str(error.filename), error.errno))
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        name = f" {error.filename}" if error.filename else ""
        return StorageError(f"cannot read or write{name}: {error.strerror}")
    if isinstance(error, FileNotFoundError) and not error.filename and _folder_is_gone():
        return StorageError("the current folder is not there any more; go to one that is (cd), and start again.")
    return OutOfMemory(OUT_OF_MEMORY) if is_out_of_memory(error) else None


def _folder_is_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def plan_text(document: dict[str, Any]) -> str:
    """The document of a dry run for people."""
    memory, disk, tokens = document["memory"], document["disk"], document["tokens"]
    lines = [f"{document['stage']} would run on {document['device']} in {document['dtype']}: "
             f"{number(document['parameters']['all'])} parameters, {number(document['parameters']['trained'])} trained"]
    for key, rows in document["rows"].items():
        lost = [f"{rows[name]:,} {name}" for name in ("truncated", "dropped", "skipped") if rows[name]]
        lines.append(f"  {key}: {rows['kept']:,} of {rows['read']:,} rows{f' ({chr(44).join(lost)})' if lost else ''}")
    lines.append(f"  {document['steps']:,} steps, {document['epochs']:.3g} times through the rows; at most "
                 f"{tokens['per_step']:,} tokens a step, {tokens['total']:,} in all")
    phases = {name: memory["held"] + more for name, more in ({"held all the time": 0} | memory["phases"]).items()}
    lines += [f"  memory, {name:<17} {value / GB:8.2f} GB" for name, value in phases.items()]
    if memory["processes"] > 1:
        base = "a piece of each layer of the base" if memory["shard"] == "full" else "the whole base"
        lines.append(f"  {memory['processes']} processes share the work, and each of them holds {base}")
    verdict, beside = "fits" if memory["fits"] else "DOES NOT FIT", memory["processes_on_a_device"]
    peak, planned = apart(memory["peak"] / GB, memory["planned"] / GB, places=2)
    shared = f"; {beside} processes share it" if beside > 1 else ""
    lines.append(f"  {verdict}: {peak} GB at the peak; {planned} GB are planned "
                 f"with, of {memory['there'] / GB:.2f} GB{shared}")
    lines.append(f"  trained on at once: {memory['trained_at_once']} rows of {memory['tokens_of_a_row']} tokens"
                 + (", their layers computed again" if memory["checkpointed"] else "")
                 + f"; up to {memory['largest_micro_batch']} would fit")
    lines.append(f"  disk: {disk['needed'] / GB:.2f} GB in {document['output']}, {disk['free'] / GB:.1f} GB free")
    lines.append("nothing was loaded and nothing written; the recipe as it would run: kltune recipe check")
    return "\n".join(lines)
