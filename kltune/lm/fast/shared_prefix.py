"""Responses to one prompt read it once: its keys and values are computed for the prompt and repeated for its responses.

A pair of DPO, or a group of responses, is [prompt, response] several times over with the same prompt. A causal trunk
computes the same there each time, so it runs on the prompts first, and then on the responses alone, which attend to
their prompt's keys and values. Both passes are differentiable: the gradients of a prompt's keys are sums over its
responses. It is the same function, in float32 to 1e-6 and its gradient to 1e-6 of its norm.

Prompts are right-padded, so that the pass over them, which has most of the tokens, is plainly causal and needs no mask.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from kltune.core.tensors import close

# The pass over the responses needs a mask and copies keys: at 1.3 times fewer tokens, 64 after prompts of 20, it was no
# faster; at 1.5 times, hh-harmless on stories260K, 1.25 times; at 1.6 to 1.8, six layers of 256, 1.6 to 1.8 times.
WORTH_IT = 1.4
# What models raise whose cache is missing, of another kind, or cannot be repeated, or whose layers hand on more.
NO_CACHE = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Names of numbers of tokens beyond which a layer does not read, or reads otherwise.
WINDOW = re.compile(r"window(_size|_len)?$|chunk_(size|length)$|^index_(topk|local_blocks)$")


@dataclass(frozen=True)
class SharedPrefixes:
    """Rows cut at their first scored token, equal prompts once.

    prompts: right-padded. [P, S₁] int64. prompt_lengths: [P] int64. owner: which prompt a row begins with. [B] int64.
    responses: without the last token, which predicts nothing. [B, T − 1] int64.
    scored: True on the scored ones of a row's tokens from its first on. [B, T] bool.
    """

    prompts: Tensor
    prompt_lengths: Tensor
    owner: Tensor
    responses: Tensor
    scored: Tensor


def shared_prefixes(ids: Tensor, scored: Tensor) -> SharedPrefixes | None:
    """Cut rows where it saves enough tokens; None where it does not, or a row has nothing scored.

    Rows with the same prompt lie side by side. ids, scored: as ``Policy.measure``. [B, S].
    """
    columns = torch.arange(ids.shape[1], device=ids.device)
    starts, ends = scored_spans(scored)
    first = begins_another(ids, starts)
    if first.all() or not scored.any(dim=1).all():
        return None
    heads = first.nonzero().squeeze(1)
    before, after = int(starts.max()), int((ends - starts).max())
    if WORTH_IT * (len(heads) * before + len(ids) * after) > ids.numel():
        return None
    at = (starts[:, None] + columns[:after]).clamp(max=ids.shape[1] - 1)
    return SharedPrefixes(
        prompts=ids[heads, :before],
        prompt_lengths=starts[heads],
        owner=first.cumsum(0) - 1,
        responses=ids.gather(1, at)[:, :-1],
        scored=scored.gather(1, at) & (columns[:after] < (ends - starts)[:, None]),
    )


def scored_spans(scored: Tensor) -> tuple[Tensor, Tensor]:
    """The first scored column of each row, and the one after its last. [B, S] -> [B] each."""
    return scored.int().argmax(dim=1), scored.shape[1] - scored.flip(1).int().argmax(dim=1)


def begins_another(ids: Tensor, starts: Tensor) -> Tensor:
    """True where a row has another prompt, of so many tokens, than the row above. [B, S], [B] -> [B] bool."""
    within = torch.arange(ids.shape[1], device=ids.device) < starts[1:, None]
    same = (starts[1:] == starts[:-1]) & ((ids[1:] == ids[:-1]) | ~within).all(dim=1)
    return torch.cat([same.new_ones(1), ~same])


def states_before(trunk: Callable, rows: SharedPrefixes) -> Tensor:
    """Hidden states that predict the scored tokens, row by row. [N, H]."""
    cache = DynamicCache()
    states = trunk(input_ids=rows.prompts, past_key_values=cache, use_cache=True).last_hidden_state
    last = states[torch.arange(len(states), device=states.device), rows.prompt_lengths - 1]
    states = last.index_select(0, rows.owner)[:, None]
    if rows.responses.shape[1]:
        for layer in cache.layers:
            layer.keys, layer.values = (held.index_select(0, rows.owner) for held in (layer.keys, layer.values))
        starts = rows.prompt_lengths[rows.owner][:, None]
        places = starts + torch.arange(rows.responses.shape[1], device=starts.device)
        further = trunk(
            input_ids=rows.responses, position_ids=places, past_key_values=cache, use_cache=True,
            attention_mask=_visible(starts, rows.prompts.shape[1], rows.responses.shape[1], states.dtype),
        ).last_hidden_state
        states = torch.cat([states, further], dim=1)
    return states[rows.scored]


def _visible(prompt_lengths: Tensor, prompts: int, responses: int, dtype: torch.dtype) -> Tensor:
    """The additive attention mask: 0 on a row's own prompt and its response so far. [B, 1, T, S₁ + T]."""
    asked = torch.arange(prompts, device=prompt_lengths.device) < prompt_lengths
    said = torch.ones(responses, responses, dtype=torch.bool, device=asked.device).tril()
    seen = torch.cat([asked[:, None].expand(-1, responses, -1), said.expand(len(asked), -1, -1)], dim=2)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def attends_to_all(config: PreTrainedConfig) -> bool:
    """Whether every layer of a model reads all tokens before: no windows, no chunks, no states.

    A few tokens that are tried cannot tell, where a window is longer: a configuration that names one has one.
    """
    named = {name: value for name, value in vars(config).items() if WINDOW.search(name) and type(value) is int}
    if not getattr(config, "use_sliding_window", True):
        named.pop("sliding_window", None)
    kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "attention_layers", None) or ())}
    return kinds <= {"full_attention", "global"} and not any(value > 0 for value in named.values())


@torch.no_grad()
def can_share(causal: nn.Module) -> bool:
    """Whether a model gives the same this way: plain attention everywhere, over what it is told to see; it is tried."""
    trunk, config = causal.base_model, causal.config.get_text_config()
    if not attends_to_all(config) or getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    device = next(causal.parameters()).device
    ids = torch.tensor([[0, 1, 0, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0, 1], [1, 0, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 0, 0]])
    starts, ends = torch.tensor([[5], [5], [3], [3]]), torch.tensor([[7], [7], [5], [4]])
    scored = (torch.arange(7) >= starts) & (torch.arange(7) < ends)
    ids, scored = ids.to(device), scored.to(device)
    rows = shared_prefixes(ids, scored)
    try:
        states = states_before(trunk, rows)
    except NO_CACHE:    # no such cache, mask or positions
        return False
    return close(states, trunk(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][scored[:, 1:]])
