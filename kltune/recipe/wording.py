"""How a fault is put into words: what was found, what was wanted, and the nearest thing that would have been right."""

import re
from difflib import get_close_matches
from functools import cache
from typing import Any

from kltune.recipe.stages import STAGES
from kltune.recipe.yaml_tree import KeyPath, Node

NUMBER_LIKE = re.compile(r"[-+]?[0-9.][0-9_.:eE+xXobOBa-fA-F-]*")
RENORMALISED = (
    "kltune samples from the whole distribution: with a renormalised one the logprobs, and so the KL, would be of "
    "another policy; remove it (sampling.temperature is scored as it is sampled)"
)
REFERENCE_CHANGED = (
    "it would change weights outside the adapter, so the policy with its adapter off would no longer be the reference; "
    "remove it"
)
# names that other tools use for a key of ours
CALLED = {
    "trpo.cg_iterations": "cg_iters cg_max_steps", "trpo.line_search_steps": "backtrack_iters line_search_max_iter",
    "kl.target": "kl_target", "kl.horizon": "kl_horizon", "kl.estimator": "kl_estimator",
    "optim.lr": "learning_rate actor_learning_rate", "ppo.value_lr": "critic_learning_rate",
    "lora.rank": "r lora_r lora_rank", "lora.alpha": "lora_alpha", "lora.dropout": "lora_dropout",
    "lora.targets": "target_modules lora_target_modules lora_target", "lora.layers": "layers_to_transform",
    "run.epochs": "num_train_epochs num_epochs total_epochs", "ppo.epochs": "num_ppo_epochs ppo_epochs noptepochs",
    "run.steps": "max_steps total_steps num_steps", "sampling.prompts_per_step": "rollout_batch_size",
    "ppo.clip_range": "cliprange clip_eps eps_clip clip_ratio", "ppo.value_clip_range": "cliprange_value value_clip",
    "ppo.value_coef": "vf_coef", "ppo.gae_lambda": "lam lambd",
    "sampling.responses_per_prompt": "num_generations rloo_k n_samples_per_prompt num_return_sequences",
    "data.max_prompt_tokens": "max_prompt_length prompt_max_len",
    "sampling.missing_end_penalty": "missing_eos_penalty",
    "model.path": "model_name_or_path model_name pretrain base_model model.name", "run.output": "output_dir save_path",
    "run.save_every": "save_steps save_freq", "run.eval_every": "eval_steps test_freq", "run.keep": "save_total_limit",
    "model.dtype": "torch_dtype", "optim.schedule": "lr_scheduler_type lr_scheduler",
    "optim.max_grad_norm": "max_gradient_norm", "dpo.loss": "loss_type", "dpo.divergence": "f_divergence_type",
    "dpo.alpha": "f_alpha_divergence_coef", "dpo.gap": "simpo_gamma", "dpo.wanted_weight": "desirable_weight",
    "dpo.unwanted_weight": "undesirable_weight",
}
# what there is to say of other names, by bare key or by dotted key; the dotted one wins
FOREIGN = {name: f"called {key} here" for key, names in CALLED.items() for name in names.split()} | {
    **dict.fromkeys(("init_kl_coef", "kl_coef", "kl_coeff", "kl_penalty_coef", "kl_loss_coef", "kl_ctl_value"),
                    "called kl.beta here (score per nat)"),
    "target_kl": "KL to the reference is kl.target here; KL(old‖new) of one update is ppo.stop_step_kl or "
                 "trpo.max_step_kl",
    **dict.fromkeys(("cg_damping", "damping_coeff"), "called trpo.damping here, in multiples of the mean curvature"),
    "adap_kl_ctrl": "write kl.control: target (steered) or fixed",
    "kl_penalty": "write kl.placement and kl.estimator",
    "use_kl_loss": "write kl.placement: loss",
    **dict.fromkeys(("top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size"),
                    RENORMALISED),
    "do_sample": "kltune always samples; remove it",
    **dict.fromkeys(("bias", "lora_bias", "modules_to_save", "init_lora_weights"), REFERENCE_CHANGED),
    **dict.fromkeys(("per_device_train_batch_size", "train_batch_size"),
                    "write optim.batch_size (sft, reward, dpo) or sampling.prompts_per_step (ppo, trpo); "
                    "optim.micro_batch_size is what fits in memory"),
    **dict.fromkeys(("gradient_accumulation_steps", "micro_train_batch_size"),
                    "write optim.micro_batch_size, the sequences in memory at once"),
    **dict.fromkeys(("mini_batch_size", "num_mini_batches"), "called ppo.minibatch_size here (responses per update)"),
    **dict.fromkeys(("response_length", "max_length", "max_completion_length", "generate_max_len"),
                    "write sampling.max_new_tokens (responses sampled) or data.max_response_tokens (responses read)"),
    **dict.fromkeys(("ref_model", "reference", "ref_model_path"),
                    "the reference is model.path (and model.sft_adapter) with the policy's adapter off; remove it"),
    **dict.fromkeys(("reward_model", "reward_model_path", "reward_pretrain"),
                    "write reward: [{kind: model, path: ...}]"),
    "bf16": "write model.dtype: bfloat16",
    "fp16": "float16 loses small probabilities; write model.dtype: bfloat16 or float32",
    "warmup_ratio": "write optim.warmup_steps, a number of steps",
    "precompute_ref_log_probs": "kltune always measures the reference once, before the first step; remove it",
    **dict.fromkeys(("dataset", "dataset_name", "train_file"), "write data.prompts, data.texts or data.pairs"),
    **dict.fromkeys(("trainer", "algorithm", "algo"), "called stage here: sft, reward, ppo, trpo or dpo"),
    "env": "a recipe sets no environment variables; set them in the shell",
    "<<": "write the values out",
}
# what text programs make of the signs of a keyboard
KEYBOARD = str.maketrans({**dict.fromkeys("‐‑‒–—−", "-"), **dict.fromkeys("“”„«»", '"'), **dict.fromkeys("‘’", "'")})
SHORTHAND = {       # sections of which only the most needed value was written
    "model": "{{path: {}}}", "data": "{{prompts: {}}}", "reward": '[{{kind: function, path: "{}"}}]',
}
# values that deserve a reason rather than a list of the right ones
REFUSED_VALUES = {
    ("kl.estimator", "k3"): "as a loss k3 has the gradient of the forward KL(reference‖policy), and in the reward it "
                            "can point uphill; k3 is only measured, by eval-kl",
    ("model.dtype", "float16"): "in float16 gradients below 6e-8 become 0 and activations above 65,504 infinite; a GPU "
                                "without bfloat16 (T4, V100) computes float32, and measures with --dtype float16",
    ("sampling.temperature", 0): "greedy decoding has no distribution to measure a KL on",
}


def dotted(path: KeyPath) -> str:
    """('reward', 0, 'path') is written reward.0.path."""
    return ".".join(map(str, path))


@cache
def schema_of(stage: str) -> dict[str, Any]:
    """JSON schema of one stage."""
    return STAGES[stage].model_json_schema()


def schema_at(stage: str, path: KeyPath, root: Node) -> dict[str, Any]:
    """The schema of the value under a path, following the options that the recipe took; {} where nothing may be."""
    whole = here = schema_of(stage)
    for depth, step in enumerate(path):
        here = section_schema(whole, here, root.at(path[:depth]))
        named = here.get("additionalProperties") or {}      # of a mapping; a section allows no more keys
        here = here.get("items", {}) if isinstance(step, int) else here.get("properties", {}).get(step, named)
    node = root.at(path)
    target = section_schema(whole, here, node) if node and isinstance(node.value, dict) else here
    return {**target, "description": here.get("description", "")}


def section_schema(whole: dict[str, Any], schema: dict[str, Any], node: Node | None) -> dict[str, Any]:
    """Follow a reference, the mapping among several options, or the kind of a reward entry."""
    if "$ref" in schema:
        return section_schema(whole, whole["$defs"][schema["$ref"].rsplit("/", 1)[1]], node)
    if "discriminator" in schema:
        kind = node.at(("kind",)) if node else None
        reference = schema["discriminator"]["mapping"].get(kind.value if kind else None) if kind else None
        return section_schema(whole, {"$ref": reference}, node) if reference else schema
    inner = ("$ref", "discriminator", "items")
    structured = [option for option in schema.get("anyOf", []) if any(name in option for name in inner)]
    return section_schema(whole, structured[0], node) if structured else schema


def value_wanted(schema: dict[str, Any], found_number: float = 0) -> str:
    """A schema in words: "a number above 0", "linear, cosine or constant".

    An upper limit that only guards against nonsense is named to those who passed it, given as ``found_number``.
    """
    if "anyOf" in schema:
        return " or ".join(value_wanted(option, found_number) for option in schema["anyOf"])
    if "enum" in schema:
        return listed(schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if "$ref" in schema:
        return "a section of keys"
    if "oneOf" in schema:
        return "a section with a kind: " + listed(sorted(schema["discriminator"]["mapping"]))
    names = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null",
             "string": "text", "array": "a list", "object": "a section of keys"}
    limits = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
    words = [
        f"{word} {schema[limit]:,.12g}" for limit, word in limits.items()
        if limit in schema and (schema[limit] < 1e9 or found_number > schema[limit])
    ]
    return " ".join([names.get(schema.get("type", ""), "another value"), " and ".join(words)]).strip()


def listed(words: list[str]) -> str:
    """a, b or c."""
    return ", ".join(words[:-1]) + " or " + words[-1] if len(words) > 1 else "".join(words)


def value_found(node: Node | None) -> str:
    """A value as the reader wrote it, with its type where that is the trouble."""
    match node.value if node else None:
        case None:
            return "nothing (null)"
        case bool() as value:
            return str(value).lower()
        case dict():
            return "a section"
        case list() as entries:
            return f"a list of {len(entries)}"
        case str() as text:
            short = text if len(text) <= 60 else text[:57] + "..."
            return f'"{short}" (text in quotes)' if node.quoted else f'"{short}"'
        case number:
            short = str(number)
            return short if len(short) <= 30 else short[:27] + "..."


def wrong_value(path: KeyPath, node: Node, schema: dict[str, Any]) -> str:
    """found ..., wanted ...: the meaning of the key, and a way out where one is plain."""
    if path[-1] == "key_env":                    # which may be the key itself, and is not shown then
        return f"found something else, wanted {schema['description']}"
    number = node.value if isinstance(node.value, int | float) else 0
    text = f"found {value_found(node)}, wanted {value_wanted(schema, number)}"
    if schema.get("description"):
        text += f" ({schema['description']})"
    if len(path) == 1 and path[0] in SHORTHAND and isinstance(node.value, str):
        written = f"{text}; write {path[0]}: {SHORTHAND[path[0]].format(node.value)}"
        return f"{written}, or --set model.path={node.value}" if path == ("model",) else written
    reason = None if isinstance(node.value, dict | list | bool) else REFUSED_VALUES.get((dotted(path), node.value))
    way_out = reason or advice(node, schema)
    return f"{text}; {way_out}" if way_out else text


def advice(node: Node, schema: dict[str, Any]) -> str:
    """What to write instead, if the value shows what was meant."""
    options = schema.get("anyOf", [schema])
    types = {option.get("type") for option in options}
    if isinstance(node.value, str) and "cuda" in schema.get("pattern", ""):
        meant = re.sub("(?i)^(gpu|nvidia)", "cuda", node.value)
        return f"did you mean {meant}?" if re.fullmatch(schema["pattern"], meant) else ""
    choices = [str(c) for option in options for c in option.get("enum", [option["const"]] if "const" in option else [])]
    match node.value:
        case str() as text:
            if (typed := text.translate(KEYBOARD)) != text:
                return f"its signs are not those of a keyboard: write {typed}"
            if near := get_close_matches(text.lower(), choices, 1):
                return f"did you mean {near[0]}?"
            if text == "None" and "null" in types:
                return "write null"
            if "boolean" in types and text.lower() in {"yes", "on", "y", "no", "off", "n", "true", "false"}:
                return f"write {'true' if text.lower() in {'yes', 'on', 'y', 'true'} else 'false'}, without quotes"
            if types & {"integer", "number"} and NUMBER_LIKE.fullmatch(text):
                return "remove the quotes" if node.quoted else "write plain decimal digits, without leading zeros"
        case bool():
            return ""
        case int() | float() as number:
            if "integer" in types and isinstance(number, float) and number.is_integer():
                return f"write {int(number)}"
            if "string" in types and not types & {"integer", "number"}:
                return "put it in quotes"
        case None:
            return "write a value or remove the line"
        case dict():
            if "array" in types:
                return "start each entry with a dash"
    return ""


def key_called(name: str) -> str | None:
    """The dotted key that a bare name means, one of ours or another tool's for it; None if there are many, or none."""
    bare = name.replace("-", "_")
    for key, names in CALLED.items():
        if bare in names.split():
            return key
    homes = {
        f"{section}.{bare}" for stage in STAGES for section, schema in schema_of(stage)["properties"].items()
        if bare in section_schema(schema_of(stage), schema, None).get("properties", {})
    }
    return homes.pop() if len(homes) == 1 else None


def unknown_name(key: str, names: list[str]) -> str:
    """Why a mapping cannot have a key, where its keys are some names."""
    near = get_close_matches(key, names, 1)
    return f"unknown name; wanted {listed(names)}" + (f"; did you mean {near[0]}?" if near else "")


def unknown_key(stage: str, path: KeyPath, root: Node) -> str:
    """Why a key is not known here: the name it has in kltune, the section it belongs to, or the nearest name."""
    key, whole = str(path[-1]), schema_of(stage)
    siblings = list(schema_at(stage, path[:-1], root).get("properties", {}))
    readers = [name for name, cls in STAGES.items() if key in cls.model_fields]
    if len(path) == 1 and readers:
        return f"the {stage} stage does not read this section ({listed(readers)} does); remove it"
    if sentence := FOREIGN.get(dotted(path)) or FOREIGN.get(key):
        return f"unknown key; {sentence}"
    if ":" in key:
        return f"unknown key; write a space behind the colon: {key.replace(':', ': ', 1)}"
    homes = [
        f"{name}.{key}" for name, schema in whole["properties"].items()
        if key in section_schema(whole, schema, None).get("properties", {})
    ]
    if homes:
        return f"unknown key here; it belongs to another section: write {listed(homes)}"
    if near := get_close_matches(key, siblings, 1):
        return f"unknown key; did you mean {near[0]}?"
    if key in STAGES:
        return f"unknown key; did you mean stage: {key}?"
    return f"unknown key; known here: {', '.join(siblings)}"
