"""What is in the JSON files of a model, a checkpoint and a run, as far as kltune goes by it; there may be other keys.

Each is a shape for ``foreign.read_json``. A whole number does where a float is wanted; nothing else stands for another.
"""

from datetime import date
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

Ids = int | list[int] | None
Token = str | dict[str, Any] | None
Finite = Annotated[float, Field(allow_inf_nan=False)]
Number = Finite | None
Nats = Annotated[float, Field(ge=-1e-3, allow_inf_nan=False)]      # of a KL, which rounding may leave below 0
Error = Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
Counts = Annotated[int, Field(ge=1)] | None
Text = str | None
Day = Annotated[str, AfterValidator(lambda text: date.fromisoformat(text) and text)] | None
Bounds = Annotated[list[Number], Field(min_length=2, max_length=2)] | None
Length = Annotated[int, Field(ge=1, le=1 << 20)]


class ModelConfig(TypedDict, total=False):
    """config.json of a model."""

    model_type: Text
    architectures: list[str] | None
    vocab_size: Counts
    hidden_size: int | list[int] | None
    num_hidden_layers: Counts
    max_position_embeddings: int | None
    dtype: str | dict[str, Any] | None
    torch_dtype: str | dict[str, Any] | None
    eos_token_id: Ids
    bos_token_id: Ids
    pad_token_id: Ids
    tie_word_embeddings: bool | None
    num_labels: Counts
    id2label: dict[str, Any] | None
    label2id: dict[str, int] | None
    problem_type: Text
    quantization_config: dict[str, Any] | None
    text_config: dict[str, Any] | None
    rope_scaling: dict[str, Any] | None
    rope_parameters: dict[str, Any] | None


class GenerationSettings(TypedDict, total=False):
    """generation_config.json of a model."""

    eos_token_id: Ids
    bos_token_id: Ids
    pad_token_id: Ids


class NamedTemplate(TypedDict):
    """One of several chat templates."""

    name: str
    template: str


class TokenizerConfig(TypedDict, total=False):
    """tokenizer_config.json."""

    tokenizer_class: Text
    chat_template: str | dict[str, str] | list[NamedTemplate] | None
    added_tokens_decoder: dict[str, dict[str, Any]] | None
    bos_token: Token
    eos_token: Token
    pad_token: Token
    unk_token: Token
    model_max_length: float | None


class AdapterSettings(TypedDict, total=False):
    """adapter_config.json of PEFT."""

    peft_type: Text
    task_type: Text
    base_model_name_or_path: Text
    revision: Text
    r: int | None
    lora_alpha: float | None
    lora_dropout: float | None
    target_modules: str | list[str] | None
    exclude_modules: str | list[str] | None
    layers_to_transform: Ids
    layers_pattern: str | list[str] | None
    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, float] | None
    modules_to_save: list[str] | None
    bias: str | bool | None
    fan_in_fan_out: bool | None
    alora_invocation_tokens: list[int] | None
    init_lora_weights: Any


SHAPES = {
    "config.json": ModelConfig, "generation_config.json": GenerationSettings,
    "tokenizer_config.json": TokenizerConfig, "adapter_config.json": AdapterSettings,
    "special_tokens_map.json": dict[str, Any], "tokenizer.json": dict[str, Any],
}


class Beside(TypedDict, total=False):
    """What is known of a reference besides its hashes; versions before recorded none of it."""

    config: dict[str, Any]
    ends: dict[str, Any]
    probe: list[float]
    merge_survived: float
    merge_kl: float | None
    merge: bool
    untied: bool


class ReferenceFacts(Beside):
    """Which reference a run or checkpoint has; see ``Fingerprint``."""

    path: Annotated[str, Field(min_length=1)]
    sft_adapter: Annotated[str, Field(min_length=1)] | None
    dtype: Literal["float32", "bfloat16"]
    sha256: str
    tokenizer_sha256: str
    template_sha256: str


class ComparedFacts(Beside, total=False):
    """What of them is compared between runs, as far as a run has come."""

    path: Text
    sha256: Text
    tokenizer_sha256: Text
    template_sha256: Text


class MeasureFacts(TypedDict):
    """How the KL of a checkpoint is measured unless asked otherwise."""

    prompts: Text
    template: Literal["auto", "none", "chat"]
    max_prompt_tokens: Length | None
    max_new_tokens: Length
    temperature: Annotated[float, Field(ge=0.1, le=10)]
    template_date: NotRequired[Day]
    columns: NotRequired[dict[str, str]]
    transcripts: NotRequired[Literal["auto", "messages", "text"]]
    control_tokens: NotRequired[Literal["auto", "text", "tokens"]]
    on_overlong: NotRequired[Literal["truncate", "drop", "error"]]
    on_bad_row: NotRequired[Literal["error", "skip"]]


class ProbeFacts(TypedDict):
    """A few tokens and their score."""

    ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    score: float


class RewardFacts(TypedDict):
    """What a reward model was trained to read, and what it gave its probe."""

    probe: ProbeFacts
    reads_text: bool
    templated: NotRequired[bool]


class CheckpointRecord(TypedDict):
    """kltune.json of a checkpoint or of final/."""

    schema: Literal["kltune.checkpoint/1"]
    step: NotRequired[Annotated[int, Field(ge=0)]]
    stage: NotRequired[str]


class SavedModel(TypedDict):
    """The same of one that is to be opened, over its reference."""

    stage: NotRequired[str]
    reference: ReferenceFacts
    measure: NotRequired[MeasureFacts]
    reward: NotRequired[RewardFacts]


class FileFacts(TypedDict):
    """A file in manifest.json."""

    sha256: str
    bytes: int


class Manifest(TypedDict):
    """manifest.json of a checkpoint."""

    schema: Literal["kltune.manifest/1"]
    files: dict[str, FileFacts]


class InputFacts(TypedDict):
    """Something that a run reads."""

    path: str
    sha256: str


class RunRecord(TypedDict):
    """run.json."""

    schema: Literal["kltune.run/1"]
    stage: NotRequired[Text]
    status: NotRequired[str]
    kltune_version: NotRequired[Text]
    seed: NotRequired[int | None]
    reference: NotRequired[ComparedFacts | None]
    inputs: NotRequired[dict[str, InputFacts] | None]
    rewards: NotRequired[list[dict[str, Any]]]
    template_date: NotRequired[Day]
    machine: NotRequired[dict[str, Any] | None]
    versions: NotRequired[dict[str, Text] | None]
    threads: NotRequired[Annotated[int, Field(ge=1, le=1024)] | None]
    seconds: NotRequired[Number]
    started: NotRequired[Text]
    ended: NotRequired[Text]
    recipe_sha256: NotRequired[Text]
    command: NotRequired[Text]
    resumed_at: NotRequired[list[int] | None]
    error: NotRequired[Text]


class Labelled(TypedDict, total=False):
    """config.json, as far as it says what a classifier tells apart."""

    id2label: dict[Annotated[str, Field(pattern=r"^[0-9]+$")], str] | None


class Stepped(TypedDict, total=False):
    """A line of metrics.jsonl or samples.jsonl, as far as a run that goes on reads it."""

    step: int


class Answered(TypedDict, total=False):
    """A line of judge.jsonl."""

    question: str
    answer: Finite


class KLFacts(TypedDict, total=False):
    """A measured KL."""

    nats_per_response: Nats | None
    nats_per_token: Nats | None
    stderr: Error
    ci95: Bounds
    noise_floor: dict[str, Number] | None


class FinalFacts(TypedDict, total=False):
    """kltune.json of final/, for a page about the run."""

    kl: KLFacts | None


class Result(TypedDict, total=False):
    """result.json of a run."""

    status: Text
    output: Text
    final: Text
    kl: KLFacts | None
    target: Number
    unit: Text
    score: Number
    score_stderr: Error
    reference_score: Number
    gold: Number
    gold_stderr: Error
    reference_gold: Number
    win_rate: Number
    win_rate_ci95: Bounds
    accuracy: Number
    accuracy_ci95: Bounds
    held_out_rows: int | None
    calibration: dict[str, Any] | None
    alpha: Number
    steps: int | None
    final_step: int | None
    seconds: Number
    stopped_early: dict[str, Any] | bool | None
    eval: dict[str, Number] | None


class SampleRow(TypedDict, total=False):
    """A line of samples.jsonl."""

    step: int
    prompt: str
    response: str
    reference_response: Text
    score: Number
    ref_kl: Number
    tokens: list[str] | None
    token_kl: list[Number] | None


class RecipeFacts(TypedDict, total=False):
    """What a report goes by of a run's recipe."""

    run: dict[str, int | float | str | bool | list[Any] | None] | None
    kl: dict[str, int | float | str | bool | None] | None
    trpo: dict[str, Any] | None


class Look(TypedDict):
    """A measurement of ``kltune project``."""

    alpha: float
    purpose: str
    nats_per_response: Nats
    stderr: Error
    ci: Bounds
    score: Number
    score_stderr: Error


class Projection(TypedDict):
    """What ``kltune project`` writes."""

    schema: Literal["kltune.project/1"]
    checkpoint: str
    reference: ComparedFacts
    looks: list[Look]
    rewards: NotRequired[list[dict[str, Any]] | None]


class Point(TypedDict):
    """A point of a sweep."""

    name: Annotated[str, Field(pattern=r"^[^/.][^/]*$")]       # of a folder and a file within the sweep's
    folder: NotRequired[str]
    status: NotRequired[str]


class Sweep(TypedDict):
    """sweep.json."""

    schema: Literal["kltune.sweep/1"]
    points: list[Point]
    settings: NotRequired[dict[str, Any]]
    varied: NotRequired[list[str]]
