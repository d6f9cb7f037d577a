"""Who gives the score: functions, reward models, classifiers and AI judges, alone or as a weighted sum.

Scorers read text, so a reward model may bring a tokenizer of its own; only one of kltune's that shares the policy's
weights, and so its tokenizer, reads the tokens that were sampled. Whatever they return must be one
finite number per response; anything else names the row and stops the run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kltune.core import ranks
from kltune.core.tensors import expect_finite
from kltune.errors import KltuneError, ScoreOverflow, ScorerError
from kltune.lm.data.examples import Prompt
from kltune.lm.data.forms import Message
from kltune.lm.model.batches import Samples
from kltune.lm.model.policy import Policy
from kltune.lm.rewards.classifiers import ScoreFunction, load_classifier
from kltune.lm.rewards.functions import load_function, text_of, told, wants_rows
from kltune.lm.rewards.judge import Answers, Judge
from kltune.lm.rewards.reward_model import is_reward_model, open_reward_model
from kltune.recipe import ClassifierReward, FunctionReward, JudgeReward, ModelReward, asks_for_pairs

Rows = Sequence[Mapping[str, Any]]
TokenFunction = Callable[[Samples], Sequence[float]]
RewardSource = FunctionReward | ModelReward | ClassifierReward | JudgeReward
SHOWN_CHARACTERS = 60  # of what was returned instead of a number
LARGEST = torch.finfo(torch.float32).max  # of a score: what is larger would become infinite


@dataclass(frozen=True)
class ScoreSource:
    """One source of scores. identity: what run.json records; shift, scale: standardisation on reference samples.

    shared: all processes of a run have it, and divide what it reads among them; else it is there in the first alone.
    tokens: scores the same responses as they were sampled, where more is known of them than their text. note: a line
    for the start of a run. example: a line on what is read of a prompt, likewise. judge: who is asked, where that may
    take long or fail. rows: the function also takes the data row of each prompt. messages: it reads prompts as
    messages.
    """

    name: str
    function: ScoreFunction | None
    weight: float
    normalize: bool
    identity: dict[str, str]
    shift: float = 0.0
    scale: float = 1.0
    tokens: TokenFunction | None = None
    note: str = ""
    example: Callable[[Prompt], str] | None = None
    judge: Judge | None = None
    shared: bool = False
    rows: bool = False
    messages: bool = False


class Scorer:
    """The weighted sum of one or more sources."""

    moves = False       # no update writes into it; see ``Part`` of a learner

    def __init__(self, sources: Sequence[ScoreSource]):
        self.sources = tuple(sources)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], samples: Sequence[Samples] = ()
    ) -> Tensor:
        """The score of each response to its prompt. [B] float32, on the CPU.

        samples: the same responses in the same order, as sampled, in parts.

        Raises:
            ScorerError: a source raised, returned another number of scores, or one that is not finite.
            ScoreOverflow: their weighted sum is not.
        """
        total = torch.zeros(len(responses))
        for source in self.sources:
            scores = run_source(source, prompts, responses, samples)
            total = total + source.weight * (scores - source.shift) / source.scale
        weighted = " + ".join(f"{source.weight:g} · {source.name}" for source in self.sources)
        # Finite parts may have an infinite sum.
        advice = "Lower reward.N.weight, or scale the reward down."
        expect_finite(f"reward: the score {weighted}", total, advice=advice, error=ScoreOverflow)
        return total

    def total(
        self, prompts: Sequence[str], responses: Sequence[str], samples: Sequence[Samples], truncated: Tensor,
        missing_end_penalty: float,
    ) -> Tensor:
        """The score of each response, less the penalty where it never ended. [B], on the device of ``truncated``."""
        return self(prompts, responses, samples).to(truncated.device) - missing_end_penalty * truncated

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
        sources = list(self.sources)
        for place, source in enumerate(sources):
            if not source.normalize:
                continue
            scores = run_source(source, prompts, responses, samples).double()
            shift, scale = scores.mean().item(), scores.std().item()
            if not scale > 1e-6:
                raise ScorerError(
                    f"reward {source.name}: all {len(scores)} reference samples score {shift:.4g}, so normalize: true "
                    "has no spread to divide by; set normalize: false."
                )
            sources[place] = replace(source, shift=shift, scale=scale)
        return Scorer(sources)

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say of the sources at the start of a run."""
        return tuple(source.note for source in self.sources if source.note)

    def examples(self, prompts: Sequence[Prompt]) -> tuple[str, ...]:
        """What models among the sources read of the first of some prompts, to be said at the start of a run."""
        examples = [source.example for source in self.sources if source.example is not None]
        return tuple(example(prompt) for prompt in prompts[:1] for example in examples)

    @property
    def judges(self) -> tuple[Judge, ...]:
        """The AI judges among the sources."""
        return tuple(source.judge for source in self.sources if source.judge is not None)

    @property
    def identity(self) -> list[dict[str, Any]]:
        """Where the scores come from: each source's kind, path and weight, and the sha256 of a Python file."""
        return [{"name": source.name, "weight": source.weight, **source.identity} for source in self.sources]

    def state(self) -> dict[str, Any]:
        """The standardisation and identity of each source, for a checkpoint."""
        return {"sources": [
            {"shift": source.shift, "scale": source.scale, "identity": source.identity} for source in self.sources
        ]}

    def tensors(self) -> dict[str, Tensor]:
        """None: a learner's scorer is not trained."""
        return {}

    def restored(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Scorer":
        """The same sources with the standardisation a checkpoint holds; ScorerError if they are not the same."""
        restored = []
        for source, saved in zip(self.sources, state["sources"], strict=True):
            if source.identity != saved["identity"]:
                raise ScorerError(
                    f"reward {source.name}: found {source.identity}, but the run was started with {saved['identity']}; "
                    "put the file back, or start a new run."
                )
            restored.append(replace(source, shift=saved["shift"], scale=saved["scale"]))
        return Scorer(restored)


def run_source(
    source: ScoreSource, prompts: Sequence[str], responses: Sequence[str], samples: Sequence[Samples] = ()
) -> Tensor:
    """The scores of one source, checked. [B] float32.

    A user's code, a judge or a classifier is asked in the first process of a run alone; see ``ScoreSource``.
    """
    if source.shared:
        return _scores_of(source, prompts, responses, samples)
    ((scores,),) = ranks.spread([source], lambda one: (_scores_of(one, prompts, responses, samples),))
    return scores


def _scores_of(
    source: ScoreSource, prompts: Sequence[str], responses: Sequence[str], samples: Sequence[Samples]
) -> Tensor:
    if source.tokens is not None and samples:
        scores = [score for part in samples for score in source.tokens(part)]
        return _checked(source.name, scores, prompts, responses)
    rows = _rows_of(source, samples, len(responses))
    asked = conversations(prompts, samples) if source.messages else prompts
    try:
        return _checked(source.name, _called(source, asked, responses, rows), prompts, responses)
    except (KltuneError, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001  a user's function may raise anything, also SystemExit
        place, cause = _failing_row(source, asked, responses, rows, error)
        row = f"the batch of {len(responses)} (each row alone is fine)" if place is None else (
            _row(place, prompts[place], responses[place]))
        raise ScorerError(f"reward {source.name}: {row} raised {told(cause)}.") from cause


def _rows_of(source: ScoreSource, samples: Sequence[Samples], count: int) -> Rows:
    """The data row of each response's prompt, where a function takes them; [] where not."""
    if not source.rows:
        return []
    rows = [prompt.row for part in samples for prompt in part.asked]
    if len(rows) != count:
        raise ScorerError(f"reward {source.name}: wants the data row of each prompt, and these have none.")
    return rows


def conversations(prompts: Sequence[str], samples: Sequence[Samples]) -> list[list[Message]]:
    """What the policy was asked, as messages with their roles; a prompt that is text is one of the user.

    samples: the responses to the prompts, as sampled, in parts; () where only the text is known.
    """
    known = [messages for part in samples for messages in part.messages or [()] * len(part.prompts)]
    asked = zip(prompts, known or [()] * len(prompts), strict=True)
    return [[dict(one) for one in messages] or [{"role": "user", "content": text}] for text, messages in asked]


def _called(source: ScoreSource, prompts: Sequence[Any], responses: Sequence[str], rows: Rows) -> Any:
    more = {"rows": [dict(row) for row in rows]} if source.rows else {}      # whatever the function does to its own
    return source.function(list(prompts), list(responses), **more)


def _failing_row(
    source: ScoreSource, prompts: Sequence[Any], responses: Sequence[str], rows: Rows, error: BaseException
) -> tuple[int | None, BaseException]:
    """The first row that fails alone, None where none does, and what it raised."""
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        try:
            _called(source, [prompt], [response], rows[index : index + 1])
        except KeyboardInterrupt:
            raise
        except BaseException as cause:  # noqa: BLE001  as above
            return index, cause
    return None, error


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
            raise ScorerError(f"reward {name}: {where} got {_shown(value)}, wanted a finite number.")
    return torch.tensor(values, dtype=torch.float32)


def _shown(value: object) -> str:
    """What a user's function returned, in short."""
    text = text_of(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}… ({type(value).__name__})"


def _row(index: int, prompt: str, response: str) -> str:
    return f"row {index} (prompt {prompt[-60:]!r}, response {response[:60]!r})"


def load_scorer(
    section: Sequence[RewardSource],
    folder: Path,
    device: torch.device,
    policy: Policy | None = None,
    answers: Answers | None = None,
) -> Scorer:
    """Build the scorer of a recipe's ``reward`` list.

    Args:
        folder: the recipe's; functions may live nowhere else.
        policy: whose frozen weights a reward model of kltune's may share, if it was trained on the same.
        answers: what AI judges were asked before, and where their answers are kept.

    Raises:
        ScorerError: a file, function or model cannot be loaded.
        ModelError: a reward model of kltune's is damaged, or on another base than it was trained on.
    """
    sources: list[ScoreSource] = []
    for number, entry in enumerate(section):
        name = name_of(entry)
        if name in {source.name for source in sources}:
            name = f"{name}-{number}"
        if entry.kind == "model" and is_reward_model(Path(entry.path)):
            function, identity, more = _load_reward_model(entry, device, policy)
        elif entry.kind == "judge":
            judge = Judge(entry, name, answers)
            function, identity, more = judge.scores, judge.identity, {"judge": judge, "note": judge.note}
        else:
            function, identity, more = _load_in_first(entry, folder, device, policy)
        identity = {"kind": entry.kind, **identity}
        if reads_messages(entry):
            identity, more = {**identity, "input": "messages"}, {**more, "messages": True}
        sources.append(ScoreSource(name, function, entry.weight, entry.normalize, identity, **more))
    return Scorer(sources)


def _load_in_first(
    entry: FunctionReward | ModelReward | ClassifierReward, folder: Path, device: torch.device, policy: Policy | None
) -> tuple[ScoreFunction | None, dict[str, str], dict[str, Any]]:
    """A function or classifier where it is asked, and its identity everywhere."""
    loaded: list[Any] = []

    def load() -> dict[str, str]:
        if entry.kind == "function":
            function, identity = load_function(entry, folder)
        else:
            function = load_classifier(entry, device, None if policy is None else policy.day)
            identity = {"path": entry.path}
        loaded.append(function)
        return identity

    identity = ranks.from_first(load)
    if not loaded:
        return None, identity, {}
    (function,) = loaded
    if entry.kind == "function":
        return function, identity, {"rows": wants_rows(function)}
    return function, identity, {"tokens": function.read, "example": function.example}


def reads_messages(entry: RewardSource) -> bool:
    """Whether prompts reach a function or a judge as messages."""
    return entry.kind in ("function", "judge") and entry.input == "messages"


def name_of(entry: RewardSource) -> str:
    """What an entry is called in messages and metrics: its own name, or that of its function or model."""
    if entry.name is not None:
        return entry.name
    if entry.kind == "function":
        return entry.path.rpartition(":")[2]
    return Path(entry.model if entry.kind == "judge" else entry.path).name


def _load_reward_model(
    entry: ModelReward, device: torch.device, policy: Policy | None
) -> tuple[ScoreFunction, dict[str, str], dict[str, Any]]:
    if entry.input != "prompt_response":
        raise ScorerError(
            f"reward {entry.path}: found input: {entry.input}, wanted prompt_response, what it was trained to read."
        )
    reader, digest, note = open_reward_model(Path(entry.path), policy, device)
    more = {"tokens": reader.read, "note": note, "example": reader.example, "shared": True}
    return reader, {"path": entry.path, "sha256": digest}, more


@dataclass(frozen=True)
class Comparison:
    """Who says which of two answers to a prompt is better: an AI judge, or a scorer, by the higher score."""

    judge: Judge | None
    scorer: Scorer | None

    @property
    def note(self) -> str:
        """A line for the start of a run."""
        return " ".join(self.scorer.notes) if self.judge is None else self.judge.note

    def preferences(self, mine: Sequence[Samples], theirs: Sequence[Samples]) -> Tensor:
        """How much each of our answers is preferred to theirs, from 0 to 1; ½ where they are equal. [B] float64.

        A judge is asked in both orders, and contradicting itself is a tie; of equal answers nobody is asked.

        Args:
            mine, theirs: answers to the same prompts, in the same order, in parts.

        Raises:
            JudgeError, ScorerError: there is no answer, or no score.
        """
        prompts, ours = ([text for part in mine for text in getattr(part, name)] for name in ("prompts", "responses"))
        others = [text for part in theirs for text in part.responses]
        if self.judge is None:
            ahead = self.scorer(prompts, ours, mine) - self.scorer(prompts, others, theirs)
            return 0.5 + 0.5 * ahead.double().sign()
        apart = [row for row, (one, other) in enumerate(zip(ours, others, strict=True)) if one != other]
        found = torch.full((len(ours),), 0.5, dtype=torch.float64)
        asked = ([side[row] for row in apart] for side in (judged_prompts(self.judge, prompts, mine), ours, others))
        preferred = ranks.from_first(lambda: self.judge.preferences(*asked))
        found[apart] = torch.tensor(preferred, dtype=torch.float64)
        return found


def judged_prompts(judge: Judge, prompts: Sequence[str], samples: Sequence[Samples]) -> Sequence[Any]:
    """The prompts as a judge reads them, text or messages; arguments of ``conversations``."""
    return conversations(prompts, samples) if reads_messages(judge.entry) else prompts


def load_comparison(
    entry: RewardSource, folder: Path, device: torch.device, policy: Policy | None = None,
    answers: Answers | None = None,
) -> Comparison:
    """Who an entry says is to compare; arguments and errors are those of ``load_scorer``."""
    if asks_for_pairs(entry):
        return Comparison(Judge(entry, name_of(entry), answers), None)
    return Comparison(None, load_scorer([entry], folder, device, policy, answers))
