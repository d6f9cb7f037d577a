"""Whether the keys of a method fit together: how its KL is held, its updates, pairs and teacher; as ``checks.py``."""

import re
from collections.abc import Iterator
from string import Formatter
from typing import Any
from urllib.parse import urlsplit

from kltune.recipe.faults import Clash
from kltune.recipe.rewards import LOOPBACK, asks_for_pairs
from kltune.recipe.sections.fields import is_changed
from kltune.recipe.sections.methods import DPOKLSection, KLSection
from kltune.recipe.stages import REFERENCE

BAD_PRICES = {
    ("loss", "k1"): "k1 as a loss has an expected gradient of exactly zero: the price would be noise; write exact",
    ("reward", "k2"): "k2 in the reward does not have the gradient of the KL; write k1",
    ("reward", "exact"): "the exact KL at a position does not depend on the token sampled there, so in the reward it "
                         "prices nothing at its own step; write k1, or kl.placement: loss",
}
CONTROLLER_KEYS = {
    "horizon": "ziegler", "kp": "log_pi", "ki": "log_pi", "look_ahead": "log_pi", "dual_lr": "dual",
}
# keys that nothing but a value function reads; in trpo it alone has an optimizer
VALUE_KEYS = {
    "ppo": ("value_function", "value_layers", "gamma", "gae_lambda", "value_clip_range", "value_coef", "value_lr"),
    "trpo": ("value_function", "value_layers", "gamma", "gae_lambda", "value_epochs", "value_minibatch_size"),
}
VALUE_OPTIM_KEYS = ("lr", "schedule", "warmup_steps", "max_grad_norm", "weight_decay")
ADDRESS = re.compile(r"https?://[^\s/@#?]+(/[^\s@#?]*)?#\S+")
SERVED = ("teacher_logprobs", "teacher_key_env")       # keys that distill reads with a served teacher
# keys of the dpo section, and which losses read them
LOSS_KEYS = {
    "label_smoothing": ("sigmoid", "robust"), "divergence": ("f_dpo",), "alpha": ("f_dpo",),
    "reward_limit": ("chi_po",), "gap": ("simpo",), "wanted_weight": ("kto",), "unwanted_weight": ("kto",),
    "dynamic_beta": ("sigmoid",), "average_logprobs": ("ipo",),
}


def natural_gradient_clashes(recipe: Any) -> Iterator[Clash]:
    """What trpo shares with ppo but cannot do: a price in the loss, and attention that is differentiated once."""
    if recipe.model.attention == "flash_attention_2":
        yield (("model.attention",), "found flash_attention_2, wanted auto, sdpa or eager: attention is differentiated "
               "twice for the curvature, and its backward pass cannot be")
    if recipe.kl.placement == "loss":
        yield ("kl.placement",), "found loss, wanted reward: the trust-region step prices KL in the reward only"


def unread_of_values(recipe: Any) -> Iterator[Clash]:
    """What only a value function reads, beside a baseline that has none."""
    stage, baseline = recipe.stage, baseline_of(recipe)
    keys = [f"{stage}.{name}" for name in VALUE_KEYS[stage]]
    if baseline == "value":
        return
    alone = f"nothing reads it: baseline {baseline} has no value function"
    if stage == "trpo":
        keys = [f"optim.{name}" for name in VALUE_OPTIM_KEYS] + keys
        alone += ", and the policy's step takes no learning rate"
    for key in keys:
        section, name = key.split(".")
        if is_changed(getattr(recipe, section), name):
            yield (key, f"{stage}.baseline"), f"{alone}; remove it, or write baseline: value"


def preference_clashes(recipe: Any) -> Iterator[Clash]:
    """A loss reads its own keys only, and what prices KL in dpo needs a number or a target."""
    dpo, kl = recipe.dpo, recipe.kl
    yield from pair_sources(recipe)
    for name, losses in LOSS_KEYS.items():
        if dpo.loss not in losses and is_changed(dpo, name):
            yield ((f"dpo.{name}", "dpo.loss"),
                   f"read only by loss {' or '.join(losses)}, and dpo.loss is {dpo.loss}; remove it")
    if dpo.loss == "robust" and dpo.label_smoothing == 0.0:
        yield (("dpo.label_smoothing", "dpo.loss"), "found 0 with loss: robust, wanted the share of pairs that are the "
               "wrong way round; at 0 it is loss: sigmoid")
    if dpo.loss == "f_dpo" and dpo.divergence != "alpha" and is_changed(dpo, "alpha"):
        yield ("dpo.alpha", "dpo.divergence"), f"read only with divergence: alpha, found {dpo.divergence}; remove it"
    if dpo.loss == "f_dpo" and dpo.divergence == "alpha" and dpo.alpha == 1.0:
        yield ("dpo.alpha",), "found 1, where it is loss: sigmoid and the formula is 0/0"
    if dpo.reference_alpha is not None and dpo.loss in ("orpo", "simpo"):
        yield ("dpo.reference_alpha", "dpo.loss"), f"found {dpo.reference_alpha:g}, but {dpo.loss} knows no reference"
    if dpo.reference_alpha is None and is_changed(dpo, "reference_every"):
        yield (("dpo.reference_every", "dpo.reference_alpha"),
               f"found {dpo.reference_every}, read only with dpo.reference_alpha: write one, or remove it")
    if dpo.loss == "kto" and recipe.optim.batch_size < 2:
        yield (("optim.batch_size", "dpo.loss"), f"found {recipe.optim.batch_size}, wanted at least 2: kto holds "
               "responses against those of other prompts")
    if not kl.exact:
        yield ("kl.exact",), "found false, wanted true: dpo prices and measures the exact KL only"


def pair_sources(recipe: Any) -> Iterator[Clash]:
    """What is read only of pairs from a file, or only of pairs that are sampled and scored."""
    dpo, sampling, optim = recipe.dpo, recipe.sampling, recipe.optim
    penalty = sampling.missing_end_penalty != 0.0
    if dpo.source == "file":
        if penalty:
            yield ("sampling.missing_end_penalty", "dpo.source"), "read only with source: online; remove it"
        return
    if is_changed(optim, "batch_size"):
        yield (("optim.batch_size", "dpo.source"),
               "read only with source: file; online, each of sampling.prompts_per_step prompts gives a pair, or a tie")
    if dpo.from_reference:
        yield ("dpo.from_reference", "dpo.source"), "found true with source: online, whose responses are the policy's"
    if dpo.loss in ("kto", "bco"):
        yield (("dpo.loss", "dpo.source"), f"found {dpo.loss} with source: online, wanted a loss of pairs, such as "
               "sigmoid: the best and the worst response to a prompt are a pair, not two labels")
    if penalty and any(asks_for_pairs(entry) for entry in recipe.reward):
        yield ("sampling.missing_end_penalty", "reward"), "a judge of mode: pair gives no score to subtract it from"


def teacher_clashes(recipe: Any) -> Iterator[Clash]:
    """There is something to learn from the teacher, and what it reads can be written."""
    distill = recipe.distill
    texts = {name: getattr(distill, name) for name in ("teacher_prompt", "teacher_system")}
    if distill.teacher == REFERENCE and not any(texts.values()):
        yield (("distill.teacher", "distill.teacher_prompt"),
               "found reference, from which nothing is to be learnt but what it says to another prompt: write "
               "distill.teacher_prompt or distill.teacher_system, or another teacher")
    for name, text in texts.items():
        if text is not None and (fault := template_fault(text)):
            yield (f"distill.{name}",), fault
    yield from _served(distill, recipe.sampling.temperature)
    if not recipe.kl.exact:
        yield ("kl.exact",), "found false, wanted true: distill prices and measures the exact KL only"


def _served(distill: Any, temperature: float) -> Iterator[Clash]:
    """A server's address that nobody else can answer at, and what only it reads."""
    whose = "weights that are here" if distill.served else "a served teacher, http(s)://HOST/v1#MODEL"
    for name in ("teacher_dtype", "teacher_device") if distill.served else SERVED:
        if is_changed(distill, name):
            yield (f"distill.{name}", "distill.teacher"), f"read only with {whose}; remove it"
    if not distill.served:
        return
    if not ADDRESS.fullmatch(distill.teacher):
        yield (("distill.teacher",), "wanted a server's address and model, as http://127.0.0.1:8000/v1#MODEL; a key "
               "goes into an environment variable: distill.teacher_key_env")
    elif distill.teacher.startswith("http:") and urlsplit(distill.teacher).hostname not in LOOPBACK:
        yield (("distill.teacher",), f"found {distill.teacher}: over http whoever listens can read and change what is "
               "learnt; wanted https://, or an address of this machine")
    if temperature != 1.0:
        yield (("sampling.temperature", "distill.teacher"), f"found {temperature:g}, wanted 1: a server gives "
               "log-probs of a few tokens, from which those at another temperature do not follow")


def template_fault(text: str) -> str | None:
    """Why a text is no template of plain {names}; None if it is one."""
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        return f"found braces that do not pair ({error}); braces that mean themselves are {{{{ and }}}}"
    for _, name, spec, conversion in parts:
        if name is not None and (spec or conversion or not re.fullmatch(r"[^\W\d]\w*", name)):
            return f"found {{{name}}}, wanted the name of a field of the rows in braces, such as {{prompt}}"
    return None


def budget_clashes(kl: KLSection) -> Iterator[Clash]:
    """The price is paid in a way whose gradient is the KL's, and the cap leaves room for the target."""
    reason = BAD_PRICES.get((kl.placement, kl.estimator))
    if reason:
        yield ("kl.estimator", "kl.placement"), f"found {kl.estimator} with placement {kl.placement}: {reason}"
    if kl.control == "target" and kl.target is not None and kl.hard_cap is not None and kl.target >= kl.hard_cap:
        yield ("kl.hard_cap", "kl.target"), f"found {kl.hard_cap:g}, wanted more than kl.target, {kl.target:g}"
    if kl.land and kl.control != "target" and kl.hard_cap is None:
        yield ("kl.land", "kl.control"), "found true with control: fixed and no hard_cap: there is nothing to land on"
    if kl.hard_cap is None and kl.on_cap != "rollback":
        yield ("kl.on_cap", "kl.hard_cap"), f"found {kl.on_cap}, read only with kl.hard_cap: write one, or remove it"
    if kl.hard_cap is not None and not kl.exact:
        yield ("kl.hard_cap", "kl.exact"), "found exact: false, wanted true: a cap is held against the exact KL"
    if kl.unit == "nats_per_token" and kl.control == "target" and "target" not in kl.model_fields_set:
        yield ("kl.target", "kl.unit"), "missing; with unit nats_per_token write the target, 0.05 is a start"


def control(kl: KLSection) -> Iterator[Clash]:
    """A fixed beta is a number; a steered one starts within its bounds; no gain is given to another controller."""
    if kl.control == "fixed" and kl.beta == "auto":
        number = "0 for plain DPO, or what a nat costs beside the loss ÷ dpo.beta, such as 0.01" if (
            isinstance(kl, DPOKLSection)) else "such as 0.1 (score per nat)"
        yield ("kl.beta", "kl.control"), f"found auto with control: fixed, wanted a number, {number}"
    if kl.control == "target" and kl.target is None:
        yield ("kl.target", "kl.control"), "found nothing (null) with control: target, wanted a number above 0"
    if kl.beta_min >= kl.beta_max:
        yield ("kl.beta_min", "kl.beta_max"), f"found {kl.beta_min:g}, wanted less than kl.beta_max, {kl.beta_max:g}"
    elif kl.control == "target" and kl.beta != "auto" and not kl.beta_min <= kl.beta <= kl.beta_max:
        yield (("kl.beta", "kl.beta_min", "kl.beta_max", "kl.control"),
               f"found {kl.beta:g}, wanted between kl.beta_min, {kl.beta_min:g}, and kl.beta_max, {kl.beta_max:g}")
    for name, controller in CONTROLLER_KEYS.items():
        if controller != kl.controller and is_changed(kl, name):
            yield ((f"kl.{name}", "kl.controller"),
                   f"read only by controller {controller}, and kl.controller is {kl.controller}; remove it")


def policy_update(recipe: Any) -> Iterator[Clash]:
    """Dropout, baselines and minibatches of stages that hold a budget."""
    if recipe.lora.dropout != 0:
        yield (("lora.dropout",), f"found {recipe.lora.dropout:g}, wanted 0: with dropout the same policy gives "
               "different logprobs each time, so ratios and KL would be noise")
    sampling, stage = recipe.sampling, recipe.stage
    section = getattr(recipe, stage)
    baseline = baseline_of(recipe)
    if stage == "ppo":
        yield from group_losses(recipe)
    if stage in VALUE_KEYS:
        yield from unread_of_values(recipe)
    if baseline == "value" and section.value_function != "upper" and is_changed(section, "value_layers"):
        yield ((f"{stage}.value_layers", f"{stage}.value_function"),
               f"read only with value_function: upper, found {section.value_function}; remove it")
    if baseline not in (None, "value") and sampling.responses_per_prompt < 2:
        yield (("sampling.responses_per_prompt", f"{stage}.baseline"),
               f"found {sampling.responses_per_prompt}, wanted at least 2: {baseline} compares a response with the "
               "others to the same prompt")
    if stage == "dpo" and section.source == "online" and sampling.responses_per_prompt < 2:
        yield (("sampling.responses_per_prompt", "dpo.source"),
               f"found {sampling.responses_per_prompt}, wanted at least 2: a pair needs two responses")
    size = getattr(section, "minibatch_size", None)
    responses = responses_per_step(recipe)
    if size is not None and "minibatch_size" in section.model_fields_set and responses % size:
        yield ((f"{stage}.minibatch_size", "sampling.prompts_per_step", "sampling.responses_per_prompt"),
               f"found {size}, wanted a divisor of the {responses} responses of a step "
               f"(prompts_per_step {sampling.prompts_per_step} x responses_per_prompt {sampling.responses_per_prompt})")


def group_losses(recipe: Any) -> Iterator[Clash]:
    """A loss of whole responses has one advantage for each, and is a mean over them."""
    ppo = recipe.ppo
    if ppo.entropy_floor is not None and not recipe.kl.exact:
        yield (("ppo.entropy_floor", "kl.exact"), "found exact: false, wanted true: the entropy is measured with the "
               "exact KL")
    if ppo.loss == "sequence" and baseline_of(recipe) == "value":
        yield (("ppo.loss", "ppo.baseline"), "found sequence with baseline: value, whose advantages differ from token "
               "to token; wanted rloo, grpo, dr_grpo or reinforce_pp")
    if ppo.loss == "sequence" and ppo.average != "responses":
        yield ("ppo.average", "ppo.loss"), f"found {ppo.average} with loss: sequence, wanted responses"
    if ppo.average == "responses" and recipe.kl.placement == "loss":
        yield (("kl.placement", "ppo.average"), "found loss, wanted reward: a mean over each response's own tokens has "
               "no scale on which the KL of whole responses could stand beside it")


def baseline_of(recipe: Any) -> str | None:
    """What a response is compared with: as written, or ppo's default, which goes by the responses to a prompt."""
    section = getattr(recipe, recipe.stage)
    if recipe.stage == "ppo" and "baseline" not in section.model_fields_set:
        return "rloo" if recipe.sampling.responses_per_prompt > 1 else "value"
    return getattr(section, "baseline", None)


def responses_per_step(recipe: Any) -> int:
    """Responses sampled in one step."""
    return recipe.sampling.prompts_per_step * recipe.sampling.responses_per_prompt
