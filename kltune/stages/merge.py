"""Add an adapter into its base's weights and save that as a full model, with its own KL to the policy it was made of.

In float32 the two differ by rounding alone. In a narrower dtype the sum is rounded to fewer bits, and part of a small
update is lost: how far that moved the policy is measured on its prompts, and can be held to a budget.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kltune.errors import ModelError, RecipeError
from kltune.lm.measure.kl_document import Gate, kl_figures
from kltune.lm.measure.measurement import Measurement, Round, check_agreement, measure_kl
from kltune.lm.model.adapters.weights import load_weights, merge_adapter
from kltune.lm.model.files import refuse_quantised
from kltune.lm.model.loading import published_dtype
from kltune.lm.model.opening import load_reference
from kltune.lm.model.policy import Policy, Reference
from kltune.recipe import ModelSection
from kltune.report.text import budget_of, verdict_line
from kltune.run.checkpoint import measure_settings, save_adapter
from kltune.run.files import storing
from kltune.run.recorder import counting
from kltune.run.saved_policy import (
    MeasureOptions,
    Settings,
    Subject,
    check_budget,
    find_checkpoint,
    measured_prompts,
    open_subject,
    refuse_filled,
    resolve_settings,
)
from kltune.run.screen import interval, percent, with_error

CODES = {"pass": 0, "fail": 3, "inconclusive": 4}
DIRECTION = "KL(merged||policy)"


@dataclass(frozen=True)
class MergeOptions(MeasureOptions):
    """The command's options. output: folder of the model. saved_as: dtype of its weights; auto: as the base's files."""

    output: str = ""
    saved_as: str = "auto"


class NotSaved(Exception):
    """The merged model was not shown to be within its budget, so there is to be no folder of it."""


def merge(checkpoint: str, options: MergeOptions) -> tuple[dict[str, Any], int]:
    """``kltune merge``: a checkpoint's adapter in its base's weights, as a model that plain transformers loads.

    Returns:
        (the JSON document, the exit code: 3 or 4 where ``--max-kl`` is not held; then nothing is saved).

    Raises:
        RecipeError: options that make no sense, or an output folder that is not empty. CheckpointError, ModelError,
            DataError: what cannot be merged or measured.
    """
    check_budget(options)
    refuse_filled(Path(options.output))
    subject = find_checkpoint(checkpoint, options)
    if not (subject.folder / "adapter_config.json").exists():
        raise ModelError(f"{checkpoint}: it holds a full model, in which there is no adapter to merge.")
    settings = resolve_settings([subject], options, needs_prompts=options.max_kl is not None)
    policy = open_subject(subject, options)
    refuse_quantised(policy.network.causal.config, policy.fingerprint.path, checkpoint)
    if not policy.held.own:
        raise RecipeError(f"--reference: {options.reference} is not the base of this adapter; leave --reference out.")
    dtype = published_dtype(
        policy.fingerprint.path, options.trust_remote_code
    ) if options.saved_as == "auto" else getattr(torch, options.saved_as)
    document: dict[str, Any] = {
        "schema": "kltune.merge/1",
        "checkpoint": subject.path,
        "reference": policy.fingerprint.as_dict(),
        "direction": DIRECTION,
        "dtype": str(dtype).removeprefix("torch."),
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "seed": options.seed,
        "survived": None,
        "responses": None,
        "kl": None,
        "gate": None,
        "output": options.output,
    }
    info: dict[str, Any] = {
        "stage": "merge",
        "kind": "full",
        "reference": policy.fingerprint.as_dict(),
        "measure": measure_settings(
            settings.prompts, settings.data, settings.max_new_tokens, settings.temperature, policy.template_day
        ),
    }

    def write(hidden: Path) -> None:
        document["survived"] = write_merged(hidden, policy, subject, dtype)
        if settings.prompts is not None:
            measured = measured_against(policy, subject, hidden, settings, options)
            document.update(figures(measured, subject.path, options))
        (hidden / "README.md").write_text(readme(document), encoding="utf-8")
        info["merged"] = {name: document[name] for name in ("checkpoint", "dtype", "survived", "kl")}
        if document["gate"] is not None and document["gate"]["verdict"] != "pass":
            raise NotSaved

    folder = Path(options.output)
    with storing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_adapter(folder, write, info=info)
    except NotSaved:
        document["output"] = None
    return document, 0 if document["gate"] is None else CODES[document["gate"]["verdict"]]


def write_merged(folder: Path, policy: Policy, subject: Subject, dtype: torch.dtype) -> float:
    """Write model and tokenizer; the share of the adapter's update that rounding to ``dtype`` left."""
    known = policy.fingerprint
    # In float32, where the result can be held against the two unmerged; an SFT adapter that was kept joins in.
    base = ModelSection(path=known.path, sft_adapter=known.sft_adapter, dtype=known.dtype if known.merge else "float32")
    model, merged = merge_adapter(
        load_reference(base, device=policy.device).model.float(), subject.folder, where=subject.path,
        whole=policy.full, rounded=dtype,
    )
    for tensor in model.parameters():       # parameters only: buffers, as angles of positions, stay float32
        tensor.data = tensor.data.to(dtype)
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return merged.survived


def measured_against(
    policy: Policy, subject: Subject, folder: Path, settings: Settings, options: MergeOptions
) -> Measurement:
    """KL(merged ‖ unmerged) on responses of the merged model, both computed in the unmerged policy's dtype."""
    section = ModelSection(
        path=str(folder), dtype=policy.fingerprint.dtype, trust_remote_code=options.trust_remote_code
    )
    merged = load_reference(section, device=policy.device, where="the merged model")
    unmerged = policy.fingerprint.of_adapter(subject.path, load_weights(subject.folder))
    merged.hold(Reference(policy.network, unmerged, own=False))
    answered = Round.of(measured_prompts(merged, settings), settings.responses, options.seed)
    if note := answered.drawn_note(options.seed):
        print(f"{options.output}: {note}", file=sys.stderr)
    with counting("sampling the merged model", answered.responses) as progress:
        measured = measure_kl(merged, answered, settings.draw(options.seed), progress=progress)
    check_agreement(options.output, "the merged model", measured.z)
    return measured


def figures(measured: Measurement, unmerged: str, options: MergeOptions) -> dict[str, Any]:
    """What was measured, and what the budget says of it, for the document."""
    kl = measured.summary("exact", options.confidence)
    document = {"responses": kl.responses, "kl": kl_figures(kl), "gate": None}
    if options.max_kl is not None:
        gate = Gate(options.max_kl, options.unit, options.confidence, 1, DIRECTION, unmerged)
        gate.look(kl)
        document["gate"] = gate.document()
    return document


def readme(document: dict[str, Any]) -> str:
    """README.md of the merged folder."""
    return (
        f"# Model merged by kltune\n\n{document['checkpoint']} in the weights of {document['reference']['path']}, "
        f"{document['dtype']}.\n\n{measured_line(document)}\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("this/folder", dtype="{document["dtype"]}")\n'
        'tokenizer = AutoTokenizer.from_pretrained("this/folder")\n```\n'
    )


def measured_line(document: dict[str, Any]) -> str:
    """The merged model's own KL, in a sentence."""
    kl, lost = document["kl"], 1.0 - (document["survived"] or 0.0)
    rounding = f"; rounding took {percent(lost, 1)}% of its update" if lost > 0.001 else ""
    if kl is None:
        return f"KL(merged ‖ policy): not measured, as no prompts are known (--prompts){rounding}."
    ends = "" if kl["ci"] is None else f", {interval(kl['ci'], against=budget_of(document['gate']))}"
    return (
        f"KL(merged ‖ policy): {with_error(kl['nats_per_response'], kl['stderr'])} nats per response{ends}, on "
        f"{document['responses']} responses of at most {document['max_new_tokens']} tokens at temperature "
        f"{document['temperature']:g}{rounding}."
    )


def merge_text(document: dict[str, Any]) -> str:
    """The document as lines of text."""
    lines = [] if document["gate"] is None else [verdict_line(document["gate"])]
    lines.append(measured_line(document))
    saved = "not saved" if document["output"] is None else f"saved: {document['output']} ({document['dtype']})"
    return "\n".join([*lines, saved])
