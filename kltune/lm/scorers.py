"""Who gives the score: Python functions, reward models and sequence classifiers, alone or as a weighted sum.

Scorers read text, so a reward model may bring a tokenizer of its own; only one of kltune's that shares the policy's
weights, and so its tokenizer, reads the tokens that were sampled. Whatever they return must be one
finite number per response; anything else names the row and stops the run.
"""

import hashlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kltune.errors import KltuneError, ScorerError
from kltune.lm.batches import Samples
from kltune.lm.policy import Policy
from kltune.lm.reward_reader import is_reward_model, open_reward_model
from kltune.recipe import ClassifierReward, FunctionReward, ModelReward

ScoreFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
TokenFunction = Callable[[Samples], Sequence[float]]
RewardSource = FunctionReward | ModelReward | ClassifierReward

LARGEST = torch.finfo(torch.float32).max  # of a score: what is larger would become infinite


@dataclass(frozen=True)
class Source:
    """One source of scores. identity: what run.json records; shift, scale: standardisation on reference samples.

    tokens: scores the same responses as they were sampled, where more is known of them than their text. note: a line
    for the start of a run.
    """

    name: str
    function: ScoreFunction
    weight: float
    normalize: bool
    identity: dict[str, str]
    shift: float = 0.0
    scale: float = 1.0
    tokens: TokenFunction | None = None
    note: str = ""


@dataclass(frozen=True)
class Scores:
    """total: the weighted sum. parts: each source by name, as it came. [B] float32 each, on the CPU."""

    total: Tensor
    parts: dict[str, Tensor]


class Scorer:
    """The weighted sum of one or more sources."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = tuple(sources)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], samples: Sequence[Samples] = ()
    ) -> Scores:
        """Score each response.

        Args:
            prompts: text.
            responses: text, one for each prompt.
            samples: the same responses in the same order, as they were sampled, in parts.

        Raises:
            ScorerError: a source raised, returned another number of scores, or one that is not finite.
        """
        parts = {source.name: run_source(source, prompts, responses, samples) for source in self.sources}
        total = sum((s.weight * (parts[s.name] - s.shift) / s.scale for s in self.sources), torch.zeros(len(responses)))
        return Scores(total=total, parts=parts)

    @property
    def wants_reference_samples(self) -> bool:
        """True if a source is to be standardised and has not been yet."""
        return any(source.normalize and source.scale == 1.0 and source.shift == 0.0 for source in self.sources)

    def standardized(
        self, prompts: Sequence[str], responses: Sequence[str], samples: Sequence[Samples] = ()
    ) -> "Scorer":
        """The same sources, those marked ``normalize`` shifted and scaled to mean 0 and sd 1 on reference samples.

        Source: lm-human-preferences, reward model normalised on samples of the initial policy.

        Raises:
            ScorerError: a source gives every reference sample the same score: there is no scale to divide by.
        """
        return Scorer([self._standardize(source, prompts, responses, samples) for source in self.sources])

    def _standardize(
        self, source: Source, prompts: Sequence[str], responses: Sequence[str], samples: Sequence[Samples]
    ) -> Source:
        if not source.normalize:
            return source
        scores = run_source(source, prompts, responses, samples).double()
        shift, scale = scores.mean().item(), scores.std().item()
        if not scale > 1e-6:
            raise ScorerError(
                f"reward {source.name}: all {len(scores)} reference samples score {shift:.4g}, so normalize: true has "
                "no spread to divide by; set normalize: false."
            )
        return replace(source, shift=shift, scale=scale)

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say of the sources at the start of a run."""
        return tuple(source.note for source in self.sources if source.note)

    @property
    def identity(self) -> list[dict[str, Any]]:
        """Where the scores come from: each source's kind, path and weight, and the sha256 of a Python file."""
        return [{"name": source.name, "weight": source.weight, **source.identity} for source in self.sources]

    def state(self) -> list[dict[str, Any]]:
        """The standardisation and identity of each source, for a checkpoint."""
        return [
            {"shift": source.shift, "scale": source.scale, "identity": source.identity} for source in self.sources
        ]

    def restored(self, state: Sequence[dict[str, Any]]) -> "Scorer":
        """The same sources with the standardisation a checkpoint holds.

        Raises:
            ScorerError: a reward function is not the one that the checkpoint was trained on.
        """
        for source, saved in zip(self.sources, state, strict=True):
            if source.identity != saved["identity"]:
                raise ScorerError(
                    f"reward {source.name}: found {source.identity}, but the run was started with {saved['identity']}; "
                    "put the file back, or start a new run."
                )
        scales = [{"shift": saved["shift"], "scale": saved["scale"]} for saved in state]
        return Scorer([replace(source, **scale) for source, scale in zip(self.sources, scales, strict=True)])


def run_source(
    source: Source, prompts: Sequence[str], responses: Sequence[str], samples: Sequence[Samples] = ()
) -> Tensor:
    """The scores of one source, checked; arguments as for ``Scorer``. [B] float32."""
    if source.tokens is not None and samples:
        scores = [score for part in samples for score in source.tokens(part)]
        return _checked(source.name, scores, prompts, responses)
    try:
        scores = source.function(list(prompts), list(responses))
    except KltuneError:
        raise
    except Exception as error:  # noqa: BLE001  a user's function may raise anything; the row is found and named
        row, cause = _failing_row(source, prompts, responses, error)
        raise ScorerError(f"reward {source.name}: {row} raised {type(cause).__name__}: {cause}") from cause
    return _checked(source.name, scores, prompts, responses)


def _failing_row(
    source: Source, prompts: Sequence[str], responses: Sequence[str], error: Exception
) -> tuple[str, Exception]:
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        try:
            source.function([prompt], [response])
        except Exception as cause:  # noqa: BLE001  as above
            return _row(index, prompt, response), cause
    return f"the batch of {len(responses)} (each row alone is fine)", error


def _checked(name: str, scores: Sequence[float], prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    values = scores.tolist() if hasattr(scores, "tolist") else scores
    if not isinstance(values, list | tuple):
        raise ScorerError(
            f"reward {name}: returned {type(scores).__name__}, wanted a list of {len(responses)} numbers."
        )
    if len(values) != len(responses):
        raise ScorerError(
            f"reward {name}: returned {len(values)} scores for {len(responses)} responses; wanted one each."
        )
    values = [value.item() if getattr(value, "ndim", None) == 0 else value for value in values]  # NumPy, torch
    for index, value in enumerate(values):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) <= LARGEST:  # NaN is not <= anything
            where = _row(index, prompts[index], responses[index])
            raise ScorerError(f"reward {name}: {where} got {value!r}, wanted a finite number.")
    return torch.tensor(values, dtype=torch.float32)


def _row(index: int, prompt: str, response: str) -> str:
    return f"row {index} (prompt {prompt[-60:]!r}, response {response[:60]!r})"


def load_scorer(
    section: Sequence[RewardSource], folder: Path, device: torch.device, policy: Policy | None = None
) -> Scorer:
    """Build the scorer of a recipe's ``reward`` list.

    Args:
        section: the sources, at least one.
        folder: the recipe's folder; functions may live nowhere else.
        device: where reward models run.
        policy: whose frozen weights a reward model of kltune's may share, if it was trained on the same.

    Raises:
        ScorerError: a file, function or model cannot be loaded.
        ModelError: a reward model of kltune's is damaged, or on another base than it was trained on.
    """
    sources: list[Source] = []
    for number, entry in enumerate(section):
        name = entry.name or (entry.path.rpartition(":")[2] if entry.kind == "function" else Path(entry.path).name)
        if name in {source.name for source in sources}:
            name = f"{name}-{number}"
        more: dict[str, Any] = {}
        if entry.kind == "function":
            function, identity = _load_function(entry, folder)
        elif entry.kind == "model" and is_reward_model(Path(entry.path)):
            function, identity, more = _load_reward_model(entry, device, policy)
        else:
            function, identity = _load_model(entry, device)
        sources.append(Source(name, function, entry.weight, entry.normalize, {"kind": entry.kind, **identity}, **more))
    return Scorer(sources)


def _load_reward_model(
    entry: ModelReward, device: torch.device, policy: Policy | None
) -> tuple[ScoreFunction, dict[str, str], dict[str, Any]]:
    if entry.input != "prompt_response":
        raise ScorerError(
            f"reward {entry.path}: found input: {entry.input}, wanted prompt_response, what it was trained to read."
        )
    reader, digest, note = open_reward_model(Path(entry.path), policy, device)
    return reader, {"path": entry.path, "sha256": digest}, {"tokens": reader.read, "note": note}


def _load_function(entry: FunctionReward, folder: Path) -> tuple[ScoreFunction, dict[str, str]]:
    file, _, attribute = entry.path.rpartition(":")
    path = folder / file
    try:
        code = path.read_bytes()
    except OSError as error:
        raise ScorerError(f"reward {entry.path}: {path} cannot be read ({error.strerror}).") from None
    digest = hashlib.sha256(code).hexdigest()
    module = ModuleType(f"{path.stem}_{digest[:12]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look a class's module up by name
    try:
        exec(compile(code, str(path), "exec"), module.__dict__)  # what was hashed is what runs
    except Exception as error:
        raise ScorerError(f"reward {entry.path}: importing {path} raised {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ScorerError(f"reward {entry.path}: {path} has no function {attribute!r}.")
    return function, {"path": entry.path, "sha256": digest}


def _load_model(entry: ModelReward | ClassifierReward, device: torch.device) -> tuple[ScoreFunction, dict[str, str]]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = Path(entry.path)
    if is_reward_model(folder / "final"):
        raise ScorerError(f"reward {entry.path}: is the folder of a run; did you mean {folder / 'final'}?")
    if (folder / "adapter_config.json").exists():  # transformers would put a random head on its base
        wanted = "write kind: model" if is_reward_model(folder) else "merge it into its base, and give that"
        raise ScorerError(f"reward {entry.path}: is an adapter, and no classifier by itself; {wanted}.")
    local = {"local_files_only": True} if folder.exists() else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(entry.path, **local)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            entry.path, use_safetensors=True, output_loading_info=True, **local
        )
    except (OSError, ValueError, KeyError) as error:
        raise ScorerError(f"reward {entry.path}: could not be loaded as a sequence classifier: {error}") from error
    if report["missing_keys"]:
        raise ScorerError(
            f"reward {entry.path}: its files hold no {', '.join(sorted(report['missing_keys']))}, and random numbers "
            "in their place would make every score noise; is it a trained classifier?"
        )
    model = model.to(device).eval().requires_grad_(False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # decoder classifiers read the last token before padding
    choose = _chosen_logit(entry, model)
    limit = _longest(model)
    tokenizer.truncation_side = "left"  # of a long prompt and its response, the response is what is judged
    accepted = inspect.signature(model.forward).parameters  # some tokenizers give token_type_ids to models without

    @torch.no_grad()
    def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        texts = [p + r if entry.input == "prompt_response" else r for p, r in zip(prompts, responses, strict=True)]
        scores: list[float] = []
        for start in range(0, len(texts), 32):
            encoded = tokenizer(
                texts[start : start + 32],
                padding=True,
                truncation=limit is not None,
                max_length=limit,
                return_tensors="pt",
            ).to(device)
            inputs = {name: tensor for name, tensor in encoded.items() if name in accepted}
            scores += choose(model(**inputs).logits.float()).tolist()
        return scores

    return score, {"path": entry.path}


def _longest(model: torch.nn.Module) -> int | None:
    """How many tokens a classifier reads; None: no limit is known."""
    limit = getattr(model.config, "max_position_embeddings", None)
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padding = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
    return limit - (padding[0] + 1) if limit and padding else limit  # RoBERTa's positions start behind the padding id


def _chosen_logit(entry: ModelReward | ClassifierReward, model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """From a classifier's logits [B, K] to one score per row [B]."""
    if entry.kind == "model":
        if model.config.num_labels != 1:
            raise ScorerError(
                f"reward {entry.path}: kind: model wants one output, found {model.config.num_labels} labels "
                f"({', '.join(model.config.label2id)}); use kind: classifier and name a label."
            )
        return lambda logits: logits[:, 0]
    single = model.config.num_labels == 1
    if entry.label not in model.config.label2id and not (single and entry.label is None):
        raise ScorerError(f"reward {entry.path}: no label {entry.label!r}; it has {', '.join(model.config.label2id)}.")
    if single:  # there is no other label to hold it against: the output is the log-odds itself
        return lambda logits: logits[:, 0].sigmoid() if entry.output == "probability" else logits[:, 0]
    index = model.config.label2id[entry.label]
    if entry.output == "probability":
        return lambda logits: logits.softmax(-1)[:, index]

    def log_odds(logits: Tensor) -> Tensor:
        rest = torch.cat([logits[:, :index], logits[:, index + 1 :]], dim=1)
        return logits[:, index] - rest.logsumexp(dim=1)

    return log_odds
