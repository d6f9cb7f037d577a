"""Models so small that every answer can be listed: what a sampled or trained number *should* be.

One is a bandit with four arms. The other, TinyLM, says at most three words from {a, b, end}: fifteen responses in
all. Here are its numbers as plain float64 tables, and the same table as a transformers model with a KV cache, padding,
a tokenizer and a place for LoRA. Nothing here uses kltune: these are the other side of the comparison.
"""

from itertools import product
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

# The bandit: ρ and r, with E_ρ[r] = Var_ρ(r) = 1.
BANDIT_REFERENCE = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
BANDIT_REWARDS = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)

# TinyLM: words and prefix states. BOS starts every prompt and is never said.
A, B, EOS, BOS = 0, 1, 2, 3
STATES = ("", "a", "b", "aa", "ab", "ba", "bb")
LONGEST = 3
# [id + 1, state] → state. Row 0 is a masked place, which says nothing; EOS and BOS start afresh.
NEXT_STATE = torch.tensor(
    [[0, 1, 2, 3, 4, 5, 6], [1, 3, 5, 3, 5, 3, 5], [2, 4, 6, 4, 6, 4, 6], [0] * 7, [0] * 7], dtype=torch.int64
)


def tilt(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """π* = ρ e^{r/β} / Z, the maximiser of E[r] − β KL(π ‖ ρ). [arms]"""
    return torch.softmax(reference.log() + rewards / beta, dim=-1)


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p ‖ q) = Σ p log(p/q) of two listed distributions, nats."""
    return (p * (p.log() - q.log())).sum().item()


def variance(p: Tensor, x: Tensor) -> float:
    """Var_p(x)."""
    mean = (p * x).sum()
    return (p * (x - mean).square()).sum().item()


def tiny_reference_logits() -> Tensor:
    """ρ of TinyLM: z[s, v] = sin(1 + 3s + v). [7 states, 3 words], float64."""
    state, word = torch.arange(7, dtype=torch.float64)[:, None], torch.arange(3, dtype=torch.float64)
    return torch.sin(1 + 3 * state + word)


def tiny_policy_logits() -> Tensor:
    """A policy .11253952 nats from ρ: ρ's logits + 0.7 cos(2s + v). [7 states, 3 words], float64."""
    state, word = torch.arange(7, dtype=torch.float64)[:, None], torch.arange(3, dtype=torch.float64)
    return tiny_reference_logits() + 0.7 * torch.cos(2 * state + word)


class Responses:
    """All responses of TinyLM up to a length, as the padded tensors a rollout would hold.

    tokens [R, T] int64 (0 outside the mask), mask [R, T] bool, states [R, T] int64: where each token was chosen,
    rewards [R]: #a + 1 if "ab" occurs − ½ if it never ended.
    """

    def __init__(self, longest: int = LONGEST):
        spoken = [word for n in range(longest) for word in product((A, B), repeat=n)]
        self.listed = [(*word, EOS) for word in spoken] + list(product((A, B), repeat=longest))
        shape = len(self.listed), longest
        self.tokens = torch.zeros(shape, dtype=torch.int64)
        self.states = torch.zeros(shape, dtype=torch.int64)
        self.mask = torch.zeros(shape, dtype=torch.bool)
        for row, response in enumerate(self.listed):
            for t, token in enumerate(response):
                prefix = "".join("ab"[i] for i in response[:t])
                self.tokens[row, t], self.states[row, t], self.mask[row, t] = token, STATES.index(prefix), True
        names = ["".join("abE"[i] for i in response) for response in self.listed]
        self.rewards = torch.tensor(
            [name.count("a") + ("ab" in name) - 0.5 * ("E" not in name) for name in names], dtype=torch.float64
        )
        self.lengths = self.mask.sum(-1)

    def logprobs(self, logits: Tensor) -> Tensor:
        """log π of each token of each response, 0 outside the mask. [R, T]; gradient flows to ``logits`` [7, 3]."""
        chosen = torch.log_softmax(logits, dim=-1)[self.states].gather(-1, self.tokens[..., None])[..., 0]
        return torch.where(self.mask, chosen, 0.0)

    def probabilities(self, logits: Tensor) -> Tensor:
        """P(y) of each response. [R], sums to 1."""
        return self.logprobs(logits).sum(-1).exp()

    def kl(self, logits: Tensor, ref_logits: Tensor) -> Tensor:
        """KL(π ‖ ρ) over whole responses by listing them, with its gradient; nats, scalar."""
        logprobs, ref_logprobs = self.logprobs(logits).sum(-1), self.logprobs(ref_logits).sum(-1)
        return (logprobs.exp() * (logprobs - ref_logprobs)).sum()

    def logits_of(self, probabilities: Tensor) -> Tensor:
        """The [7, 3] table whose responses have these probabilities (which must factorise over its states)."""
        mass = torch.zeros(7, 3, dtype=probabilities.dtype)
        for row, response in enumerate(self.listed):
            for t, token in enumerate(response):
                mass[self.states[row, t], token] += probabilities[row]
        return mass.log()


class TinyConfig(PreTrainedConfig):
    """Sizes under the names that transformers and PEFT look for."""

    model_type = "kltune_tiny"

    def __init__(self, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 4, 7, 1, 1
        self.max_position_embeddings = 64
        super().__init__(**{"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS, **kwargs})


class TinyBackbone(nn.Module):
    """Hidden state = one-hot of the prefix state: the last two words since the last BOS.

    The cache holds the tokens themselves, id + 1, as keys [rows, 1, S, 1]; 0 is a masked or empty place. So whatever
    reorders, selects or crops the rows of a real cache does the right thing to this one. ``dense`` is the identity:
    a linear layer in the trunk for LoRA to hold on to.
    """

    def __init__(self, config: TinyConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        width = input_ids.shape[1]
        said = torch.where(attention_mask[:, -width:] > 0, input_ids + 1, 0)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        seen = 0
        if past_key_values is not None:
            seen = past_key_values.get_seq_length()
            keys = said[:, None, :, None].to(self.dense.weight.dtype)
            said = past_key_values.update(keys, keys, 0)[0][:, 0, :, 0].round().long()
        state, states = torch.zeros_like(said[:, 0]), []
        table = NEXT_STATE.to(said.device)
        for token in said.unbind(-1):
            state = table[token, state]
            states.append(state)
        hidden = nn.functional.one_hot(torch.stack(states, -1)[:, seen : seen + width], 7).to(self.dense.weight.dtype)
        return BaseModelOutputWithPast(last_hidden_state=self.dense(hidden), past_key_values=past_key_values)


class TinyPreTrained(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "model"
    _supports_sdpa = _supports_flash_attn = True

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing random: the numbers of ρ, and the identity."""
        with torch.no_grad():
            if getattr(module, "out_features", None) == 4:      # BOS gets −10,000: a probability of exactly 0
                module.weight.copy_(torch.cat([tiny_reference_logits().T, torch.full((1, 7), -1e4)]))
            elif isinstance(module, nn.Linear | nn.Embedding):
                nn.init.eye_(module.weight)


class TinyLM(TinyPreTrained, GenerationMixin):
    """TinyLM as a transformers causal model: ``lm_head`` is the lookup table."""

    def __init__(self, config: TinyConfig):
        super().__init__(config)
        self.model = TinyBackbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)


AutoConfig.register("kltune_tiny", TinyConfig, exist_ok=True)
AutoModelForCausalLM.register(TinyConfig, TinyLM, exist_ok=True)


def tiny_adapter(model: TinyLM, logits: Tensor) -> PeftModel:
    """``model`` with a LoRA on ``lm_head`` that turns ρ's table into these [7, 3] logits exactly."""
    wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=3, target_modules=["lm_head"])).eval()
    lora = wrapped.base_model.model.lm_head
    with torch.no_grad():
        lora.lora_A["default"].weight.copy_((logits - tiny_reference_logits()).T)
        lora.lora_B["default"].weight.zero_()[:3].copy_(torch.eye(3))
    return wrapped


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words "a", "b", "</s>" (end and padding) and "<s>" (start a prompt with it), split at spaces."""
    tokenizer = Tokenizer(WordLevel({"a": A, "b": B, "</s>": EOS, "<s>": BOS}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=64
    )


def save_tiny_lm(folder: Path) -> Path:
    """TinyLM and its tokenizer as a folder that ``from_pretrained`` opens (in a process that imported this file)."""
    TinyLM(TinyConfig()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
