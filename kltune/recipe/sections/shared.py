"""What stages share: one frozen section per concern; ``stages.py`` puts them together.

Every field carries its meaning, unit and range, because the same words serve the error messages, the JSON schema for
editors and the reader of this page. A section has the same keys in every stage that reads it; what a stage does not
read is refused by name (``checks.py``), so no key is ever ignored in silence.
"""

from typing import Annotated, Literal

from pydantic import Field

from kltune.recipe.rewards import RewardEntry
from kltune.recipe.sections.fields import Count, NotNegative, Positive, Section, Text


class ModelSection(Section):
    """The frozen weights; with the policy's adapter off they are the reference."""

    path: Text = Field(description="folder of a model, or its name on the hub", examples=["HuggingFaceTB/SmolLM2-135M"])
    sft_adapter: Text | None = Field(
        None, description="a LoRA from kltune sft, merged into the base: base + SFT is then the reference",
        examples=["runs/sft/final"],
    )
    merge: bool = Field(
        True, description="add sft_adapter into the weights, which rounds it in bfloat16; false keeps it beside them, "
        "exact and slower"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="type of the frozen weights; adapters are always trained in float32. auto: bfloat16 for a "
        "model published in half precision, on a GPU, and in training on a CPU that multiplies it natively"
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="how attention is computed; auto is what transformers takes for the model, "
        "flash_attention_2 needs that package and a GPU"
    )
    trust_remote_code: bool = Field(False, description="run Python that ships with the model; off unless you read it")


class LoraSection(Section):
    """The adapter that is trained; sft alone also takes ``lora: null``, which trains every weight."""

    rank: int = Field(16, ge=1, le=4096, description="rank of each update matrix")
    alpha: Positive = Field(32.0, description="the update is scaled by alpha / rank")
    targets: Literal["all-linear"] | Annotated[tuple[Text, ...], Field(strict=False, min_length=1)] = Field(
        "all-linear", description="which linear layers get an adapter: all-linear, or a list of layer names",
        examples=[("q_proj", "v_proj")],
    )
    layers: (
        Literal["all"] | Annotated[float, Field(gt=0, lt=1)]
        | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)]
    ) = Field(
        "all", description="which layers of the model get an adapter: all, a list of their numbers from 0, or an upper "
        "share of them, as 0.25; what lies below the first is computed once for policy, reference and value function",
        examples=[0.25],
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="must be 0 in ppo, trpo and dpo, where logprobs are compared")


class DataSection(Section):
    """Where rows come from, and what happens to rows that do not fit."""

    prompts: Text | None = Field(
        None, description="prompts to respond to (ppo, trpo, online dpo): file or hub name", examples=["prompts.jsonl"]
    )
    texts: Text | None = Field(
        None, description="texts to imitate (sft): file or hub name", examples=["texts.jsonl"]
    )
    pairs: Text | None = Field(
        None, description="chosen and rejected responses (dpo, reward): file or hub name", examples=["pairs.jsonl"]
    )
    columns: dict[Literal["prompt", "response", "text", "messages", "chosen", "rejected", "label", "margin"], Text] = (
        Field(default_factory=dict, description="what the fields of a row are called in the files, by the names they "
              "have here; a file that has our name needs none", examples=[{"prompt": "question", "response": "answer"}])
    )
    template: Literal["auto", "none", "chat"] = Field(
        "auto", description="auto uses the chat template if the rows are messages"
    )
    chat_template: Text | None = Field(
        None, description="a file with a chat template (Jinja), in the place of the tokenizer's own or of none",
        examples=["chat.jinja"],
    )
    transcripts: Literal["auto", "messages", "text"] = Field(
        "auto", description="what a text is that says Human: and Assistant: itself, as in hh-rlhf: messages for the "
        "chat template, or text as it stands; auto: messages where there is a chat template to write them"
    )
    turns: Literal["all", "last"] = Field(
        "all", description="which answers of a conversation are learnt from (sft); each with what was asked before it"
    )
    control_tokens: Literal["auto", "text", "tokens"] = Field(
        "auto", description="what spells a control token, as </s>, is text in messages and the token in plain rows; "
        "text or tokens: everywhere"
    )
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = Field(
        None, description="the day that a chat template is told if it asks for one; null: the day the run began",
        examples=["2026-01-31"],
    )
    max_prompt_tokens: Count | None = Field(
        None, description="tokens of a prompt; null leaves what the model's context has beside the response",
        examples=[512],
    )
    max_response_tokens: Count = Field(512, description="tokens of a response that is read from data")
    on_overlong: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="truncate cuts prompts from the left and responses from the right, and counts them"
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="skip is counted, and at most 1 % of the rows")


class SamplingSection(Section):
    """How the policy responds: plain sampling from its own distribution, never cut off or renormalised."""

    prompts_per_step: Count = Field(64, description="prompts drawn for one step")
    responses_per_prompt: Count = Field(
        1, description="responses to each prompt; rloo, grpo and online dpo need at least 2"
    )
    max_new_tokens: Count = Field(128, description="tokens of a response, which is cut there")
    temperature: float = Field(
        1.0, ge=0.1, le=10, description="divides the logits; KL is measured at this same temperature"
    )
    missing_end_penalty: NotNegative = Field(
        0.0, description="subtracted from the score of a response that never ended"
    )
    engine: Literal["torch", "vllm"] = Field(
        "torch", description="who draws a step's responses: the trainer, or a vLLM server (ppo, trpo, online dpo); "
        "with eval-kl --recipe: who draws the policy's"
    )
    url: Text | None = Field(
        None, description="address of the server, without /v1 (engine: vllm)", examples=["http://127.0.0.1:8000"]
    )
    publish: Text | None = Field(
        None, description="folder that the server sees too, for each step's adapter (engine: vllm)",
        examples=["/shared/adapters"],
    )
    timeout_s: Positive = Field(600.0, description="seconds until a request counts as not answered (engine: vllm)")


class OptimSection(Section):
    """AdamW and its schedule."""

    lr: Positive = Field(1e-4, description="learning rate of the adapter; in trpo, of the value function")
    batch_size: Count = Field(32, description="rows or pairs per step (sft, reward, dpo from a file)")
    micro_batch_size: Count | None = Field(
        None, description="sequences in memory at once; changes memory and speed, not the result; null chooses",
        examples=[8],
    )
    checkpoint_layers: Literal["auto", "always", "never"] = Field(
        "auto", description="layers are computed again in the backward pass, and only their inputs kept: less memory, "
        "about a third more time; auto: where a sequence does not fit otherwise"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="course of lr after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, le=10**9, description="steps over which lr rises from 0")
    max_grad_norm: Positive = Field(1.0, description="a larger gradient is scaled down to this norm")
    weight_decay: NotNegative = Field(0.0, description="decoupled, per unit of lr")


class RunSection(Section):
    """How long, how often, where."""

    epochs: Positive | None = Field(None, description="passes over the data, instead of steps", examples=[1.0])
    steps: Count | None = Field(
        default_factory=lambda section: 100 if section.get("epochs") is None else None,
        description="turns of the loop; default 100, or null when epochs is given",
    )
    until: Literal["steps", "target"] = Field(
        "steps", description="target: go on after the steps, five times as many at most, at a constant lr, until the "
        "KL has held its target for a third of them, or the reward pulls no further (ppo, trpo, dpo)"
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="same seed, same machine and number of threads: same run")
    save_every: Count = Field(20, description="steps between checkpoints")
    eval_every: Count = Field(20, description="steps between evaluations")
    keep: Count = Field(3, description="checkpoints kept")
    loggers: Literal["auto"] | Annotated[
        tuple[Literal["tensorboard", "trackio", "wandb"], ...], Field(strict=False)
    ] = Field(
        "auto", description="who draws curves beside metrics.jsonl: a list of tensorboard, trackio and wandb; auto: "
        "TensorBoard if installed; []: nobody", examples=[("tensorboard", "wandb")],
    )
    output: Text = Field("runs/name", description="folder of the run; default runs/ and the recipe file's name")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$")] = Field(
        "auto", description="auto (the first GPU, or the CPU), cpu, cuda or cuda:1"
    )
    memory_fraction: float = Field(
        0.8, gt=0, le=1, description="share of the device's memory that batches are planned for"
    )
    tf32: bool = Field(
        False, description="a GPU multiplies float32 in TF32: several times as fast, with 10 bits of 23 (3 digits)"
    )
    deterministic: bool = Field(
        False, description="only kernels that give the same bits each time, which on a GPU are slower and on a CPU all "
        "there are; without it two runs on one GPU agree to rounding"
    )
    processes: Count | Literal["auto"] = Field(
        1, description="that share the work, with the same result; auto: one for each GPU, or each core, four at most")
    shard: Literal["none", "full", "auto"] = Field(
        "none", description="full: each process keeps a piece of every layer of the base, whole ones while it samples; "
        "auto: where the estimate of --dry-run says that a device does not hold the whole and that pieces take less")
    timeout_s: Positive = Field(1800.0, description="seconds that one process waits for the others before the run ends")
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = Field(
        "auto", description="of a CPU; auto: as many as there are cores that the process may use and others leave idle "
        "as the run begins. Sums may differ in their last digits with it; a resumed run keeps its number; "
        "OMP_NUM_THREADS goes before this key", examples=[2],
    )


class EvalSection(Section):
    """Held-out measurements."""

    prompts: Text | None = Field(
        None, description="held-out prompts for KL and score; null measures on data.prompts",
        examples=["held_out.jsonl"],
    )
    responses: int = Field(128, ge=2, le=10**9, description="responses per measurement; one alone gives no error")
    texts: Text | None = Field(
        None, description="held-out human texts for the alignment tax", examples=["held_out_texts.jsonl"]
    )
    pairs: Text | None = Field(
        None, description="held-out pairs for accuracy and margin (dpo, reward)", examples=["held_out_pairs.jsonl"]
    )
    pairs_share: float = Field(
        0.1, ge=0, lt=1, description="share of the prompts of data.pairs that is held out where pairs is null (reward)"
    )
    gold: RewardEntry | None = Field(
        None, description="a scorer that is measured and never trained on",
        examples=[{"kind": "function", "path": "rewards.py:gold"}],
    )
    judge: RewardEntry | None = Field(
        None, description="who prefers the policy's answers or the reference's, which gives the win rate: an AI judge "
        "(mode: pair), asked in both orders, or any scorer, by the higher score",
        examples=[{"kind": "judge", "url": "http://127.0.0.1:8000/v1", "model": "judge", "mode": "pair"}],
    )
    stop_at_gold_peak: bool = Field(
        False, description="end the run where gold falls while the score rises; final is the policy of gold's peak"
    )
