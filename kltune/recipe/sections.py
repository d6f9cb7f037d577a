"""What a recipe may say: one frozen section per concern; ``stages.py`` puts them together.

Every field carries its meaning, unit and range, because the same words serve the error messages, the JSON schema for
editors and the reader of this page. A section has the same keys in every stage that reads it; what a stage does not
read is refused by name (``checks.py``), so no key is ever ignored in silence.
"""

from typing import Annotated, Literal

from pydantic import Field

from kltune.recipe.fields import Count, Fraction, NotNegative, Positive, Section, Text
from kltune.recipe.rewards import RewardEntry


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
        "auto", description="type of the frozen weights; adapters are always trained in float32"
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
        "torch", description="who draws a step's responses: the trainer, or a vLLM server (ppo, trpo, online dpo)"
    )
    url: Text | None = Field(
        None, description="address of the server, without /v1 (engine: vllm)", examples=["http://127.0.0.1:8000"]
    )
    publish: Text | None = Field(
        None, description="folder that the server sees too, for each step's adapter (engine: vllm)",
        examples=["/shared/adapters"],
    )
    timeout_s: Positive = Field(600.0, description="seconds until a request counts as not answered (engine: vllm)")


class KLSection(Section):
    """The budget: how far from the reference, in which unit, priced where, steered how."""

    control: Literal["fixed", "target"] = Field("target", description="keep beta, or steer it until the KL is target")
    beta: Literal["auto"] | NotNegative = Field(
        "auto", description="score per nat; auto follows the spread of the scores; 0 measures without a price",
        examples=[0.1],
    )
    target: Positive | None = Field(6.0, description="KL(policy‖reference) to hold, in kl.unit; 6 nats is a start")
    unit: Literal["nats_per_response", "nats_per_token"] = Field(
        "nats_per_response", description="unit of target and hard_cap"
    )
    placement: Literal["reward", "loss"] = Field("reward", description="where the price is paid; loss in ppo alone")
    estimator: Literal["k1", "k2", "exact"] = Field(
        default_factory=lambda section: "exact" if section.get("placement") == "loss" else "k1",
        description="what is priced; default k1 with placement reward, exact with placement loss",
    )
    controller: Literal["log_pi", "ziegler", "dual"] = Field("log_pi", description="how target steers beta")
    hard_cap: Positive | None = Field(
        None, description="in kl.unit; what is not within it at 95 % confidence is never called final", examples=[8.0]
    )
    land: bool = Field(
        default_factory=lambda section: section.get("control") == "target" or section.get("hard_cap") is not None,
        description="dial final back to its target or hard_cap if it is beyond; default where there is one",
    )
    on_cap: Literal["rollback", "stop"] = Field(
        "rollback", description="beyond hard_cap: go back and raise the price, or stop with what was within it"
    )
    exact: bool = Field(True, description="measure the KL over the full vocabulary at every step")
    beta_min: Positive = Field(1e-4, description="score per nat; beta is steered within beta_min and beta_max")
    beta_max: Positive = Field(1e3, description="score per nat; beta is steered within beta_min and beta_max")
    horizon: Positive = Field(10000.0, description="responses (ziegler); larger is calmer")
    kp: NotNegative = Field(0.35, description="gain on the error now (log_pi)")
    ki: NotNegative = Field(0.2, description="gain on the error summed over steps (log_pi)")
    look_ahead: NotNegative = Field(4.0, description="optimizer updates ahead that the KL is extrapolated (log_pi)")
    dual_lr: Positive = Field(0.02, description="step size of the multiplier (dual)")


class TRPOKLSection(KLSection):
    """The same; one update per batch, whose length has a limit of its own, takes twice the gain and more."""

    kp: NotNegative = Field(0.7, description="gain on the error now (log_pi)")
    ki: NotNegative = Field(0.15, description="gain on the error summed over steps (log_pi)")


class DPOKLSection(KLSection):
    """The same budget, its price paid in the loss: on responses to fresh prompts, beside the pairs.

    The gain is higher than where rewards are priced: the target is an upper set-point, far below which nothing needs to
    be paid, and there is one update in a step.
    """

    beta: Literal["auto"] | NotNegative = Field(
        "auto",
        description="what a nat of KL(policy‖reference) costs beside the loss ÷ dpo.beta; 0 is plain DPO; auto "
        "follows the gradients' sizes (control: target)",
        examples=[0.1],
    )
    placement: Literal["loss"] = Field("loss", description="where the price is paid")
    estimator: Literal["exact"] = Field("exact", description="what is priced")
    kp: NotNegative = Field(3.0, description="gain on the error now (log_pi)")
    ki: NotNegative = Field(0.3, description="gain on the error summed over steps (log_pi)")


ValueFunctionKind = Annotated[Literal["lora", "head"], Field(
    description="baseline: value reads the trunk through an adapter of its own, or with a head alone what the "
    "policy's trunk holds: about half the work of an update, and far coarser",
)]


class PPOSection(Section):
    """Clipped policy steps."""

    baseline: Literal["value", "rloo", "grpo", "dr_grpo", "reinforce_pp"] = Field(
        "value", description="what a response is compared with; default: rloo where a prompt has several responses. "
        "dr_grpo is grpo without dividing by the spread of a prompt's scores; reinforce_pp divides by that of the "
        "whole batch"
    )
    loss: Literal["clip", "sequence", "cispo"] = Field(
        "clip", description="clip: PPO's, of each token's ratio; sequence: GSPO's, of the whole response's, which "
        "wants a far smaller clip_range, such as 4.0e-4; cispo: weights that are clipped, and no gradient that is"
    )
    average: Literal["tokens", "responses", "limit"] = Field(
        default_factory=lambda section: "responses" if section.get("loss") == "sequence"
        else "limit" if section.get("baseline") == "dr_grpo" else "tokens",
        description="how tokens count in the loss: tokens: all alike, by the batch's number of them; responses: a "
        "response's by its own, which favours short right answers and long wrong ones; limit: all alike, by "
        "max_new_tokens, which has no bias. Default tokens; limit with dr_grpo, responses with loss: sequence",
    )
    value_function: ValueFunctionKind = "lora"
    epochs: Count = Field(4, description="passes over one step's responses")
    minibatch_size: Count = Field(
        64, description="responses per update; must divide a step's responses; default: as many of them as fit in 64"
    )
    clip_range: Positive = Field(0.2, description="a token's probability ratio counts within 1 ± clip_range")
    clip_range_high: Positive | None = Field(
        None, description="the ratio counts up to 1 + clip_range_high, as in DAPO; null: clip_range", examples=[0.28]
    )
    value_clip_range: Positive = Field(0.2, description="a value may move so far, in sd of first scores")
    value_coef: NotNegative = Field(0.1, description="weight of the value loss")
    gamma: Fraction = Field(1.0, description="discount per token")
    gae_lambda: Fraction = Field(0.95, description="1 is unbiased, lower is calmer")
    stop_step_kl: Positive | None = Field(
        None, description="nats per response; leaves the epochs once KL(old‖new) passes it; null never does",
        examples=[0.5],
    )
    entropy_floor: Positive | None = Field(
        None, description="nats per token; where the policy's entropy comes down to it, entropy gets a price that a "
        "controller raises until it is held", examples=[1.0],
    )
    value_lr: Positive | None = Field(
        None, description="learning rate of the value function; null is optim.lr", examples=[3e-4]
    )


class TRPOSection(Section):
    """Natural-gradient steps inside a KL ball."""

    max_step_kl: Positive = Field(0.2, description="nats per response; KL(old‖new) of no step passes it")
    cg_iterations: Count = Field(10, description="conjugate-gradient iterations")
    damping: Literal["auto"] | NotNegative = Field(
        "auto", description="added to the curvature, in multiples of its mean; auto starts at 100 and adapts"
    )
    line_search_steps: Count = Field(10, description="tries before a step is given up")
    fisher_fraction: float = Field(
        0.25, gt=0, le=1, description="share of a step's responses that the curvature is measured on"
    )
    baseline: Literal["value", "rloo", "grpo"] = Field("value", description="what a response is compared with")
    value_function: ValueFunctionKind = "lora"
    gamma: Fraction = Field(1.0, description="discount per token (baseline: value)")
    gae_lambda: Fraction = Field(0.95, description="1 is unbiased, lower is calmer (baseline: value)")
    value_epochs: Count = Field(2, description="passes of the value function over one step's responses")
    value_minibatch_size: Count = Field(64, description="responses per update of the value function")


class DPOSection(Section):
    """Preference pairs."""

    loss: Literal["sigmoid", "robust", "ipo", "hinge", "kto", "bco", "f_dpo", "chi_po", "orpo", "simpo"] = Field(
        "sigmoid",
        description="which preference loss; kto and bco also take rows of prompt, response and label; orpo and simpo "
        "know no reference, whose KL is measured all the same; ipo sums log-probabilities over tokens as its paper "
        "does, where TRL averages them (average_logprobs)",
    )
    beta: Positive = Field(
        default_factory=lambda section: 2.0 if section.get("loss") == "simpo" else 0.1,
        description="scale of the loss's own reward, per nat (ipo: tau; orpo: weight of the odds); it bounds no KL, "
        "and the price of KL is kl.beta",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of pairs assumed to be the wrong way round (sigmoid, robust)"
    )
    average_logprobs: bool = Field(
        False, description="log-probabilities of a response are averaged over its tokens, as in TRL, and not summed as "
        "in the paper: the margin and 1/(2 x beta) are then nats per token (ipo)"
    )
    source: Literal["file", "online"] = Field("file", description="pairs from data.pairs, or sampled and scored")
    divergence: Literal["forward_kl", "js", "alpha"] = Field(
        "forward_kl", description="which f-divergence (f_dpo); reverse KL is loss: sigmoid"
    )
    alpha: float = Field(0.5, description="of divergence: alpha, in which 0 is forward_kl (f_dpo)")
    reward_limit: Positive = Field(
        5.0, description="rewards of a pair that differ by twice as much pull no further (chi_po)"
    )
    gap: NotNegative = Field(1.0, description="by which the chosen response's reward should be ahead (simpo)")
    wanted_weight: Positive = Field(1.0, description="weight of wanted responses in the loss (kto)")
    unwanted_weight: Positive = Field(1.0, description="weight of unwanted responses in the loss (kto)")
    dynamic_beta: NotNegative = Field(
        0.0, description="a batch's beta is beta x (1 + this x (its mean margin - the running mean of them, nats)); 0 "
        "keeps beta, 0.6 is beta-DPO's (sigmoid)", examples=[0.6]
    )
    reference_alpha: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="how far towards the policy the loss's reference goes every reference_every steps (TR-DPO: "
        "0.6, or 1); null leaves it; the KL is to the model's frozen weights all the same", examples=[0.6]
    )
    reference_every: Count = Field(1, description="steps between moves of the loss's reference (reference_alpha)")
    from_reference: bool = Field(
        False, description="the responses were sampled from the reference: KL(reference‖policy) is estimated on them"
    )


class BradleyTerrySection(Section):
    """What a reward model makes of its pairs; a row's own "margin" says how much better the chosen one is."""

    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of rows assumed to be judged wrongly")
    centring: NotNegative = Field(
        0.01, description="price of the squared sum of a pair's two scores, which keeps them around 0 (pairs only)"
    )


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
    warmup_steps: int = Field(0, ge=0, description="steps over which lr rises from 0")
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
    shard: Literal["none", "full"] = Field(
        "none", description="full: each process keeps a piece of every layer of the base, whole ones while it samples")
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
    responses: Count = Field(128, description="responses per measurement")
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
    stop_at_gold_peak: bool = Field(
        False, description="end the run where gold falls while the score rises; final is the policy of gold's peak"
    )
