"""How the KL is held, and what each method has of its own: sections as in ``shared.py``."""

from typing import Annotated, Literal

from pydantic import Field

from kltune.recipe.sections.fields import Count, Fraction, NotNegative, Positive, Section
from kltune.recipe.sections.shared import LoraSection


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


class ValuedSection(Section):
    """What a value function is, and how its values become advantages (baseline: value)."""

    value_function: Literal["lora", "upper", "head"] = Field(
        "lora", description="baseline: value reads the trunk through an adapter of its own (lora); through one on its "
        "upper layers, going on from what the reference's lower ones gave (upper); or with a head alone what the "
        "policy's trunk holds (head), which is far coarser",
    )
    value_layers: float = Field(
        0.25, gt=0, lt=1, description="share of the layers, from above, that value_function: upper has an adapter on",
        examples=[0.5],
    )
    gamma: Fraction = Field(1.0, description="discount per token (baseline: value)")
    gae_lambda: Fraction = Field(0.95, description="1 is unbiased, lower is calmer (baseline: value)")

    def value_adapter(self, lora: LoraSection) -> tuple[LoraSection | None, float | None]:
        """The value function's own adapter, None for a head alone, and the upper share of the layers that it is on."""
        upper = self.value_layers if self.value_function == "upper" else None
        return None if self.value_function == "head" else lora, upper


class PPOSection(ValuedSection):
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


class TRPOSection(ValuedSection):
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
