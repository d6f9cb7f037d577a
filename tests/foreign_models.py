"""Small models of every causal architecture and adapters of every kind, as transformers and PEFT alone make them."""

from collections.abc import Callable
from pathlib import Path

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.tiny_policies import SIZES, SPECIAL, random_model, randomize, word_tokenizer

EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1,
}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
DECODER = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
# What each needs beside ``SIZES`` to be small; None takes a key away. Layers that PEFT can adapt: ``TARGETS``, or all.
MODELS: dict[str, dict] = {
    "afmoe": EXPERTS, "apertus": {}, "arcee": {}, "aria_text": {}, "bailing_hybrid": {}, "bart": DECODER, "beam": {},
    "bamba": MAMBA | {"attn_layer_indices": [1]}, "big_bird": {"attention_type": "original_full", "is_decoder": True},
    "biogpt": {}, "bitnet": {}, "blenderbot-small": DECODER, "bloom": {}, "codegen": GPT | {"rotary_dim": 8},
    "cohere": {}, "cohere2": {}, "cohere2_moe": {}, "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48},
    "cwm": {}, "deepseek_v2": EXPERTS | LATENT, "deepseek_v3": EXPERTS | LATENT | {"head_dim": None}, "diffllama": {},
    "doge": {}, "ernie4_5": {}, "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
    "exaone4": {}, "exaone_moe": EXPERTS, "falcon": {"head_dim": None}, "flex_olmo": {}, "flint": {}, "fuyu": {},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 4, "mamba_n_groups": 1},
    "falcon_mamba": {"state_size": 4}, "gemma": {}, "gemma2": {}, "gemma3_text": {}, "gemma4_unified_text": {},
    "glm": {}, "glm4": {}, "glm4_moe": EXPERTS | {"first_k_dense_replace": 1}, "gpt2": {}, "gpt_bigcode": {},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}, "gpt_neox": {},
    "gpt_neox_japanese": {}, "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": GPT | {"rotary_dim": 8}, "granite": {}, "granite_swa": {}, "granitemoe": {}, "granitemoe_swa": {},
    "granitemoehybrid": MAMBA | {
        "layer_types": ["mamba", "attention"], "num_local_experts": 2, "shared_intermediate_size": 24,
    },
    "granitemoeshared": {}, "helium": {}, "hrm_text": {}, "hunyuan_v1_dense": {}, "hunyuan_v1_moe": {},
    "hyperclovax": {}, "jais2": {}, "jetmoe": {},
    "jamba": {
        "num_experts": 2, "mamba_d_state": 4, "mamba_expand": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]}, "lfm3": {}, "llama": {},
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 64},
    "mamba": {"state_size": 4}, "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "minimax": {}, "minicpm3": LATENT, "minimax_m2": EXPERTS, "minimax_m3_vl_text": {}, "ministral": {},
    "ministral3": {}, "mistral": {}, "mixtral": {}, "modernbert-decoder": {}, "mpt": {}, "nanochat": {}, "nemotron": {},
    "olmo": {}, "olmo2": {}, "olmo3": {}, "olmo_hybrid": {}, "olmoe": EXPERTS, "openai-gpt": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "persimmon": {}, "phi": {}, "phi3": {}, "phimoe": {},
    "qwen2": {}, "qwen2_moe": EXPERTS, "qwen3": {}, "qwen3_5_text": LINEAR, "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | LINEAR, "recurrent_gemma": {"lru_width": 32, "num_hidden_layers": 3}, "rwkv": {},
    "seed_oss": {}, "smollm3": {}, "stablelm": {}, "starcoder2": {}, "trocr": {}, "vaultgemma": {}, "xlstm": {},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
}
TARGETS = {
    "falcon_h1": ["q_proj", "in_proj", "down_proj"], "falcon_mamba": ["in_proj", "x_proj"], "mamba2": ["in_proj"],
    "llama4_text": ["q_proj", "down_proj"], "mamba": ["in_proj", "x_proj"], "phimoe": ["q_proj", "v_proj"],
}
ENCODERS: dict[str, dict] = {
    "bert": {}, "bert-generation": {}, "camembert": {}, "data2vec-text": {}, "electra": {}, "ernie": {},
    "megatron-bert": {}, "rembert": {}, "roberta": {}, "roberta-prelayernorm": {}, "roformer": {}, "xlm": {},
    "xlm-roberta": {}, "xlm-roberta-xl": {}, "xlnet": {"max_position_embeddings": None, "d_head": 8},
}
SHARED = {"task_type": "CAUSAL_LM"}
SOME = {"target_modules": ["q_proj", "v_proj", "down_proj"], **SHARED}
ONE = {"target_modules": ["q_proj"], **SHARED}
LORA = {"r": 4, "lora_alpha": 8, **SOME}
ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(**LORA),
    "lora of any rank": lambda: LoraConfig(**LORA, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "lora on one layer": lambda: LoraConfig(**LORA, layers_to_transform=[1]),
    "lora on all layers": lambda: LoraConfig(**LORA | {"target_modules": "all-linear"}),
    "lora on the embedding": lambda: LoraConfig(**LORA | {"target_modules": ["embed_tokens", "q_proj"]}),
    "lora on the head": lambda: LoraConfig(**LORA | {"target_modules": ["lm_head", "q_proj"]}),
    "lora on a parameter": lambda: LoraConfig(**LORA, target_parameters=["self_attn.k_proj.weight"]),
    "lora with a bias": lambda: LoraConfig(**LORA, lora_bias=True),
    "lora and a layer": lambda: LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "lora and tokens": lambda: LoraConfig(**LORA, trainable_token_indices=[3, 5]),
    "lora: rslora": lambda: LoraConfig(**LORA, use_rslora=True),
    "lora: dora": lambda: LoraConfig(**LORA, use_dora=True),
    "lora: bdlora": lambda: LoraConfig(
        **LORA, use_bdlora=BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2, match_strict=False)
    ),
    "lora: velora": lambda: LoraConfig(**LORA, velora_config=VeloraConfig()),
    "lora: monteclora": lambda: LoraConfig(**LORA, monteclora_config=MontecloraConfig()),
    "lora from eva": lambda: LoraConfig(**LORA, init_lora_weights="eva"),
    "lora from gaussian": lambda: LoraConfig(**LORA, init_lora_weights="gaussian"),
    "lora from orthogonal": lambda: LoraConfig(**LORA, init_lora_weights="orthogonal"),
    "lora from mica": lambda: LoraConfig(**LORA, init_lora_weights="mica"),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **SOME),
    "beft": lambda: peft.BeftConfig(**SHARED),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, **ONE),
    "c3a": lambda: peft.C3AConfig(block_size=16, **ONE),
    "deft": lambda: peft.DeftConfig(**ONE),
    "delora": lambda: peft.DeloraConfig(r=4, **SOME),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=20, **ONE),
    "frod": lambda: peft.FrodConfig(**ONE),
    "glora": lambda: peft.GloraConfig(**ONE),
    "gralora": lambda: peft.GraloraConfig(r=4, **ONE),
    "hira": lambda: peft.HiraConfig(r=4, **SOME),
    "hra": lambda: peft.HRAConfig(r=4, **ONE),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **SHARED
    ),
    "ln_tuning": lambda: peft.LNTuningConfig(**SHARED),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=4, **SOME),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=4, **SOME),
    "miss": lambda: peft.MissConfig(r=4, **ONE),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, r=0, target_modules=["q_proj", "o_proj"], **SHARED),
    "osf": lambda: peft.OSFConfig(**ONE),
    "peanut": lambda: peft.PeanutConfig(**ONE),
    "psoft": lambda: peft.PsoftConfig(r=4, **ONE),
    "pvera": lambda: peft.PveraConfig(r=4, **ONE),
    "randlora": lambda: peft.RandLoraConfig(r=4, **ONE),
    "road": lambda: peft.RoadConfig(group_size=8, **ONE),
    "shira": lambda: peft.ShiraConfig(r=2, **ONE),
    "supertuning": lambda: peft.SupertuningConfig(**SHARED),
    "tinylora": lambda: peft.TinyLoraConfig(**ONE),
    "trainable_tokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 5], **SHARED),
    "unilora": lambda: peft.UniLoraConfig(r=4, **SOME | {"target_modules": ["q_proj", "v_proj"]}),
    "vblora": lambda: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=16, **ONE),
    "vera": lambda: peft.VeraConfig(r=4, **ONE),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=20, **ONE),
}
def arrow() -> ArrowConfig:
    """A router over an adapter that is here: the one that holds it."""
    config = ArrowConfig(top_k=1)
    config.task_adapter_names, config.gks_adapter_names = ["default"], []
    return config


# What kltune refuses, and a word by which it names it.
REFUSED: dict[str, tuple[Callable[[], PeftConfig], str]] = {
    "alora": (lambda: LoraConfig(**LORA, alora_invocation_tokens=[5, 9]), "LORA with alora_invocation_tokens acts thr"),
    "arrow": (lambda: LoraConfig(**LORA, arrow_config=arrow()), "LORA with arrow_config works with"),
    "cartridge": (lambda: peft.CartridgeConfig(num_virtual_tokens=4, **SHARED), "type CARTRIDGE"),
    "cpt": (
        lambda: peft.CPTConfig(cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1], **SHARED),
        "type CPT",
    ),
    "adaption_prompt": (
        lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, **SHARED), "type ADAPTION_PROMPT",
    ),
    "kasa": (lambda: LoraConfig(**LORA, kasa_config=KasaConfig()), "kasa_config"),
    "lily": (lambda: peft.LilyConfig(**ONE), "type LILY reads the tokens it is to predict"),     # averages over a batch
    "pissa": (lambda: LoraConfig(**LORA, init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "poly": (lambda: peft.PolyConfig(r=4, **ONE), "type POLY"),
    "prefix_tuning": (lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **SHARED), "type PREFIX_TUNING"),
    "prompt_tuning": (lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **SHARED), "type PROMPT_TUNING"),
    "shadow": (lambda: peft.ShadowConfig(**SHARED), "type SHADOW works with models or adapters of other folders"),
}


def save_model(kind: str, folder: Path) -> Path | None:
    """A random model of an architecture, with a tokenizer; None where this transformers does not have it."""
    if kind not in CONFIG_MAPPING:
        return None
    keys = SIZES | {"head_dim": 8} | SPECIAL | (MODELS | ENCODERS)[kind]
    config = AutoConfig.for_model(kind, **{key: value for key, value in keys.items() if value is not None})
    random_model(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(base: Path, config: PeftConfig, folder: Path, *, spread: float = 0.15) -> Path:
    """An adapter of random numbers around those it starts with."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    start = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    trained = {name: tensor for name, tensor in model.named_parameters() if name in start}
    randomize(trained, spread=spread)
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.add_(start[name])
    model.save_pretrained(folder)
    return folder


def plain_pair(base: Path, adapter: Path) -> tuple[nn.Module, nn.Module]:
    """The adapted model and its base, as PEFT and transformers load them."""
    alone, adapted = (AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval() for _ in range(2))
    return PeftModel.from_pretrained(adapted, adapter).eval(), alone
