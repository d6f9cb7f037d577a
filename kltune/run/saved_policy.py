"""What ``eval-kl``, ``project`` and ``sample`` measure: a checkpoint over its reference, and how it is measured."""

import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from kltune.errors import CheckpointError, DataError, KltuneError, ModelError, RecipeError
from kltune.lm.data.chat import parsed_day, read_template, template_of, today
from kltune.lm.data.documents import SavedModel
from kltune.lm.data.examples import Example, Prompt, RowRules, counts_line, load_examples, load_prompts
from kltune.lm.data.rows import looks_like_a_path
from kltune.lm.measure.server import is_address
from kltune.lm.measure.transcripts import Transcript, read_transcripts
from kltune.lm.model.adapters.weights import load_weights, read_adapter_config
from kltune.lm.model.files import quantisation_of, refuse_code
from kltune.lm.model.fingerprint import section_of
from kltune.lm.model.loading import own_tokenizer, pick_device
from kltune.lm.model.opening import hold_adapter, hold_model, load_reference, load_saved_policy
from kltune.lm.model.policy import Policy, Reference
from kltune.lm.model.sampler import Draw
from kltune.recipe import DataSection, ModelSection, load_recipe
from kltune.recipe.stages import prompts_source
from kltune.run.checkpoint import READ_BY, read_info, resolve_checkpoint
from kltune.run.files import readable, refuse_place
from kltune.run.screen import doing

WHOLE = 1 << 20     # tokens of a prompt or response that nothing limits
BY_ROWS = "tokenizer_sha256", "template_sha256"     # held against each other over every row


@dataclass(frozen=True)
class MeasureOptions:
    """What these commands can be asked; None takes the checkpoint's own settings, then the defaults of ``Settings``.

    base: what adapters lie on, in the place of the model that they name. date: the day that a chat template is told, as
    2026-01-31. device: auto, cpu, cuda or cuda:1. dtype: of computing; None: that of the training.
    """

    recipe: str | None = None
    reference: str | None = None
    base: str | None = None
    prompts: str | None = None
    responses: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int = 0
    max_kl: float | None = None
    unit: str = "nats_per_response"
    confidence: float = 0.95
    trust_remote_code: bool = False
    date: str | None = None
    device: str = "auto"
    dtype: str | None = None


@dataclass(frozen=True)
class Subject:
    """A checkpoint that was found: as it was named, where it is, and its kltune.json if kltune made it."""

    path: str
    folder: Path
    info: dict[str, Any] | None


@dataclass(frozen=True)
class Settings:
    """How checkpoints are measured, all resolved."""

    prompts: str | None
    data: DataSection
    responses: int = 256
    max_new_tokens: int = 128
    temperature: float = 1.0
    texts: str | None = None
    day: date = field(default_factory=today, compare=False)     # that a chat template is told

    def draw(self, seed: int) -> Draw:
        """How responses are drawn."""
        return Draw(self.max_new_tokens, self.temperature, seed)


def check_budget(options: MeasureOptions) -> None:
    """Raise RecipeError for a ``--max-kl`` that is no budget."""
    if options.max_kl is not None and not (math.isfinite(options.max_kl) and options.max_kl > 0.0):
        raise RecipeError(f"--max-kl: found {options.max_kl}, wanted a number of nats above 0.")


def refuse_filled(folder: Path) -> None:
    """Raise RecipeError for an output folder that holds something, or can be none: nothing there is overwritten."""
    refuse_place(folder, folder=True)
    if folder.absolute() == Path.cwd():
        raise RecipeError(f"--output: {folder} is the folder that you are in, which cannot be made anew; name another.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"--output: {folder} is not empty; choose another folder.")


def find_checkpoint(path: str, options: MeasureOptions) -> Subject:
    """Find what a path means, and refuse it if its files would have code run.

    Raises:
        CheckpointError: there is nothing to load, it is damaged, or a reward model. ModelError: it names code, or
            pickled weights. RecipeError: it is a server's address, or ``--reference`` is.
    """
    for named in (str(path), options.reference or ""):
        if is_address(named):
            raise RecipeError(f"{named}: a served model has a KL (kltune eval-kl) and no more; give a folder here.")
    folder = resolve_checkpoint(path)
    with readable(path):
        refuse_code(folder, str(path), trusted=options.trust_remote_code)
    info = read_info(folder, SavedModel) if (folder / "kltune.json").exists() else None
    if info is not None and info.get("stage") == "reward":
        raise CheckpointError(
            f"{path} is a reward model, which says nothing and so has no KL; wanted a policy. It scores responses as "
            f"reward: [{{kind: model, path: {folder}}}] in a recipe."
        )
    return Subject(str(path), folder, info)


def open_subject(subject: Subject, options: MeasureOptions) -> Policy:
    """A checkpoint over its own reference, or held against ``--reference``.

    Raises:
        CheckpointError: its own reference is not the one that it was trained against, or none is known.
        ModelError: one of the two cannot be loaded, or they do not fit together.
    """
    doing(f"loading {subject.path}")
    try:
        with readable(options.reference or subject.path):
            policy = _opened(subject, options)
    except (KltuneError, OSError):
        if subject.folder.exists():
            raise
        # The run that it belongs to goes on, and has taken it away for a newer one.
        subject = find_checkpoint(subject.path, options)
        policy = _opened(subject, options)
    print(f"{subject.path}: {policy.fingerprint.describe(own=policy.held.own)}", *filter(None, [policy.ends.note]),
          sep="\n", file=sys.stderr)
    for warning in other_dtype(subject, policy):
        print(f"warning: {subject.path}: {warning}", file=sys.stderr)
    return policy


def _opened(subject: Subject, options: MeasureOptions) -> Policy:
    if options.reference is None:
        return _over(subject, own_base(subject, options), options)
    base = _section(subject, options.reference, options)
    if _is_base(subject, options.reference, options.base):
        return _over(subject, base, options)
    if subject.info is not None and not _lies_on_another(options.reference):
        with suppress(CheckpointError, ModelError):     # another model: it is looked at again, as a reference
            return _over(subject, base, options)        # the base that was recorded, wherever it lies now
    policy = open_alone(subject, options)
    policy.hold(open_reference(policy, subject, options.reference, options))
    return policy


def open_reference(policy: Policy, subject: Subject, path: str, options: MeasureOptions) -> Reference:
    """What another reference than its own is for a policy that is open: whatever a checkpoint may be.

    An adapter on the same base lies on the policy's weights, the same model is the policy's own base; any other model
    is loaded beside it.

    Raises:
        CheckpointError, ModelError: it cannot be loaded, or does not speak in the same tokens.
    """
    if not Path(path).exists():
        other = load_reference(
            ModelSection(path=path, dtype=_name_of(policy.dtype), trust_remote_code=options.trust_remote_code),
            device=policy.device, where="--reference",
        )
        return hold_model(policy, other, other.fingerprint)
    named = find_checkpoint(path, options)
    is_adapter = (named.folder / "adapter_config.json").exists()
    if is_adapter and _same_base(policy, subject, named, options):
        reference = hold_adapter(policy, named.folder, path)
        if reference is not None:
            policy.hold_against(named.folder, "--reference", options.trust_remote_code)
            return reference
    other = open_alone(named, options, dtype=_name_of(policy.dtype))
    policy.hold_against(named.folder, "--reference", options.trust_remote_code)
    if is_adapter:
        fingerprint = other.fingerprint.of_adapter(path, load_weights(named.folder))
    else:
        fingerprint = replace(other.fingerprint, path=path)
        own = policy.held
        if own.own and not policy.full and fingerprint.same_model(own.fingerprint):
            return replace(own, fingerprint=replace(own.fingerprint, path=path))
    return hold_model(policy, other, fingerprint)


def _is_base(subject: Subject, path: str, base: str | None) -> bool:
    """Whether ``--reference`` can only be the base that an adapter lies on, which it names otherwise or not at all.

    A model, where what the adapter names is not here; or the very folder that it names.
    """
    if _lies_on_another(path):
        return False
    if not (subject.folder / "adapter_config.json").exists():
        return subject.info is None
    if subject.info is None:
        named = base or read_adapter_config(subject.folder).get("base_model_name_or_path")
    else:
        named = base or subject.info["reference"]["path"]
    return named is None or not Path(named).exists() or os.path.realpath(named) == os.path.realpath(path)


def _lies_on_another(path: str) -> bool:
    """Whether it is an adapter or a run, rather than a model."""
    return any((Path(path) / name).exists() for name in ("adapter_config.json", "run.json"))


def _same_base(policy: Policy, subject: Subject, other: Subject, options: MeasureOptions) -> bool:
    """Whether another adapter lies on the policy's own base: the same folder, or the same weights as recorded."""
    if policy.full or not policy.held.own or not (subject.folder / "adapter_config.json").exists():
        return False
    if other.info is not None:
        return not policy.fingerprint.differences(other.info["reference"], but=BY_ROWS)
    mine, theirs = (own_base(one, options) for one in (subject, other))
    return mine.sft_adapter is None and os.path.realpath(mine.path) == os.path.realpath(theirs.path)


def own_base(subject: Subject, options: MeasureOptions) -> ModelSection:
    """The model that a checkpoint lies on, or was trained from; RecipeError for a ``--base`` of a full model."""
    is_adapter = (subject.folder / "adapter_config.json").exists()
    if options.base is not None and not is_adapter:
        raise RecipeError(f"--base: {subject.path} is a full model, which lies on no other; leave it out.")
    recorded = None if subject.info is None else subject.info["reference"]["path"]
    return _section(subject, options.base or recorded or _named_base(subject.folder, is_adapter), options)


def _section(subject: Subject, path: str, options: MeasureOptions) -> ModelSection:
    if subject.info is not None:
        facts = section_of(subject.info["reference"])
    else:       # float16 is none to load a reference in: it is computed in
        facts = {} if options.dtype in (None, "float16") else {"dtype": options.dtype}
    return ModelSection(**(facts | {"path": path}), trust_remote_code=options.trust_remote_code)


def open_alone(subject: Subject, options: MeasureOptions, dtype: str = "auto", empty: bool = False) -> Policy:
    """A checkpoint whatever it is held against: an adapter on its own base, a model by itself, or its shapes alone."""
    if (subject.folder / "adapter_config.json").exists():
        return _over(subject, own_base(subject, options), options)
    dtype = dtype if subject.info is None else subject.info["reference"]["dtype"]
    section = ModelSection(path=str(subject.folder), dtype=dtype, trust_remote_code=options.trust_remote_code)
    policy = load_reference(
        section, device=pick_device(options.device, "--device"), where=subject.path,
        chat_template=template_made_with(subject, options), computed_in=options.dtype, empty=empty,
    )
    _tell_day(policy, subject, options)
    return policy


def _over(subject: Subject, section: ModelSection, options: MeasureOptions) -> Policy:
    """A checkpoint over a reference, which has to be the recorded one if kltune made the checkpoint."""
    folder, info = subject.folder, subject.info
    policy = load_saved_policy(
        folder, section, device=pick_device(options.device, "--device"),
        is_adapter=(folder / "adapter_config.json").exists(), chat_template=template_made_with(subject, options),
        computed_in=options.dtype,
    )
    if info is not None and (differences := policy.fingerprint.differences(info["reference"], but=BY_ROWS)):
        raise CheckpointError(
            f"{folder}: this is not the reference it was trained against.\n  " + "\n  ".join(differences)
            + "\nPut the model's files back, or give the folder of those as --reference."
        )
    _tell_day(policy, subject, options)
    return policy


def _tell_day(policy: Policy, subject: Subject, options: MeasureOptions) -> None:
    if day := options.date or (subject.info and subject.info["measure"].get("template_date")):
        policy.day = parsed_day(day)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def computed_on(policy: Policy) -> dict[str, str | None]:
    """What moves the last digits of a measurement beside the policy's numbers, for a document."""
    rounded = quantisation_of(policy.network.causal.config)
    return {"dtype": _name_of(policy.dtype), "device": policy.device.type, "quantization": rounded}


def other_dtype(subject: Subject, policy: Policy) -> list[str]:
    """What there is to say of a checkpoint that was trained in another dtype than it is measured in, or []."""
    trained = None if subject.info is None else subject.info["reference"]["dtype"]
    measured = computed_on(policy)["dtype"]
    if trained in (None, measured):
        return []
    return [f"trained in {trained} and measured in {measured}, where logits are rounded in another way: the KL is not "
            "quite that of the training, nor to be held against a gate that was passed in the other"]


def template_made_with(subject: Subject, options: MeasureOptions) -> str | None:
    """A chat template other than the reference's own: of ``--recipe``, or what the checkpoint was made with."""
    if options.recipe is not None and (template := read_template(load_recipe(options.recipe).data.chat_template)):
        return template
    if subject.info is None or not subject.info["measure"].get("chat_template"):
        return None
    own = own_tokenizer(subject.folder, options.trust_remote_code)
    return None if own is None else template_of(own)


def _named_base(folder: Path, is_adapter: bool) -> str:
    config = read_adapter_config(folder) if is_adapter else {}
    path = config.get("base_model_name_or_path")
    if path is None:
        raise CheckpointError(f"{folder}: which model is the reference? Give it as --reference MODEL.")
    if Path(path).is_absolute() and not Path(path).exists():
        raise CheckpointError(f"{folder}: its base is {path}, which is no folder here; give it as --reference MODEL.")
    if config.get("revision") and not Path(path).exists():
        raise CheckpointError(
            f"{folder}: its base is revision {config['revision']} of {path}; download that one and give its folder as "
            "--reference."
        )
    return path


def resolve_settings(subjects: Sequence[Subject], options: MeasureOptions, *, needs_prompts: bool = True) -> Settings:
    """Options first, then ``--recipe``, then what the first checkpoint that kltune made was made with, then defaults.

    All checkpoints are measured alike, or their differences would mean nothing; where one was made with other settings,
    that is said on stderr.

    Raises:
        RecipeError: no prompts are known, and ``needs_prompts``.
    """
    own = [(subject.path, _recorded(subject.info)) for subject in subjects if subject.info is not None]
    if options.recipe is not None:
        known = _of_recipe(options.recipe)
    else:
        known = dict(own[0][1]) if own else {"data": DataSection(), "prompts": None}
    for name in ("prompts", "responses", "max_new_tokens", "temperature", "texts"):
        if (asked := getattr(options, name, None)) is not None:
            known[name] = asked
    if options.date is not None:
        known["day"] = parsed_day(options.date)
    if known["prompts"] is None and needs_prompts:
        where = ", ".join(str(subject.folder) for subject in subjects)
        raise RecipeError(f"{where}: no prompts to measure on; give --prompts FILE or --recipe R.yaml.")
    kept = options.prompts is None and options.recipe is None and known["prompts"]
    if needs_prompts and kept and looks_like_a_path(kept) and not Path(kept).exists():
        raise DataError(f"{kept}, on which {own[0][0]} was measured when it was made, is not here (was the folder "
                        "moved?); give the file as --prompts FILE, or a recipe as --recipe R.yaml.")
    settings = Settings(**known)
    for path, recorded in own if len(subjects) > 1 else ():
        others = Settings(**(recorded | {"responses": settings.responses, "texts": settings.texts}))
        if options.prompts is not None:
            others = replace(others, prompts=settings.prompts)
        if others != settings:
            print(
                f"note: {path} was made with other settings; all are measured on prompts {settings.prompts}, at most "
                f"{settings.max_new_tokens} new tokens, temperature {settings.temperature:g}, template "
                f"{settings.data.template}.", file=sys.stderr,
            )
    return settings


def _recorded(info: dict[str, Any]) -> dict[str, Any]:
    own = info["measure"]
    data = DataSection(**{"transcripts": "text"} | {name: own[name] for name in READ_BY if name in own})
    day = {"day": parsed_day(own["template_date"])} if own.get("template_date") else {}
    return {"data": data} | day | {name: own[name] for name in ("prompts", "max_new_tokens", "temperature")}


def _of_recipe(path: str) -> dict[str, Any]:
    recipe = load_recipe(path)
    known: dict[str, Any] = {
        "prompts": prompts_source(recipe),
        "data": recipe.data,
        "responses": recipe.eval.responses,
        "texts": recipe.eval.texts,
    }
    if recipe.data.date is not None:
        known["day"] = parsed_day(recipe.data.date)
    if hasattr(recipe, "sampling"):
        known |= {"max_new_tokens": recipe.sampling.max_new_tokens, "temperature": recipe.sampling.temperature}
    return known


def measured_prompts(policy: Policy, settings: Settings) -> list[Prompt]:
    """The prompts to respond to, as this policy's tokens."""
    prompts, counts = load_prompts(settings.prompts, policy.tokenizer, row_rules(policy, settings))
    print(counts_line(settings.prompts, counts), file=sys.stderr)
    return prompts


def measured_transcripts(policy: Policy, settings: Settings, source: str) -> list[Transcript]:
    """Recorded responses, with their whole prompts, as this policy's tokens; raises as ``read_transcripts``.

    Whoever answered has read all of a prompt, whatever the prompts of the checkpoint's own run were cut to.
    """
    whole = settings.data.model_copy(update={"max_prompt_tokens": None if policy.max_context else WHOLE})
    rules = replace(row_rules(policy, replace(settings, data=whole)), turns="last", max_response_tokens=WHOLE,
                    max_tokens=None, on_overlong="truncate", on_bad_row="error")
    found = read_transcripts(source, policy, rules, settings.max_new_tokens)
    print(f"{source}: {len(found)} recorded responses", file=sys.stderr)
    return found


def row_rules(policy: Policy, settings: Settings) -> RowRules:
    """What rows may be, by settings and limits that fit the policy, whose templates are told the settings' day."""
    limit = policy.prompt_limit(settings.data.max_prompt_tokens, settings.max_new_tokens, "--max-new-tokens")
    policy.day = settings.day
    return policy.row_rules(settings.data, limit)


def measured_texts(policy: Policy, settings: Settings) -> list[Example]:
    """The held-out texts of ``--texts``, as this policy's tokens; [] without."""
    if settings.texts is None:
        return []
    texts, counts = load_examples(settings.texts, policy.tokenizer, row_rules(policy, settings))
    print(counts_line(settings.texts, counts), file=sys.stderr)
    return texts
