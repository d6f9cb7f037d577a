"""The cache that grows in place holds what the one that is copied at every token holds."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kltune.lm.fast import decoding as kv_cache
from kltune.lm.fast.decoding import GROWTH, GrowingLayer, bytes_held, give_room, joined
from kltune.lm.machine.live_bytes import LiveBytes

ROWS, HEADS, SIZE, PROMPT = 3, 2, 4, 5
TOKENS = 2 * GROWTH + 3


def states(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, HEADS, tokens, SIZE), torch.randn(rows, HEADS, tokens, SIZE)


def prompted() -> tuple[DynamicCache, DynamicCache]:
    """Two equal caches of one layer after a prompt, the second with room."""
    plain, growing = DynamicCache(), DynamicCache()
    new = states(ROWS, PROMPT)
    for cache in (plain, growing):
        cache.update(*new, 0)
    give_room(growing)
    return plain, growing


def test_keys_and_values_are_those_of_the_copied_cache_through_every_change():
    plain, growing = prompted()
    assert type(growing.layers[0]) is GrowingLayer
    rows = ROWS
    for token in range(TOKENS):
        if token == 3:
            rows *= 4
            plain.batch_repeat_interleave(4)
            growing.batch_repeat_interleave(4)
        if token == 5:
            swapped = torch.arange(rows).flip(0)
            plain.reorder_cache(swapped)
            growing.reorder_cache(swapped)
        if token in (7, 8, GROWTH + 5):
            keep = torch.arange(0, rows, 2)
            rows = len(keep)
            plain.batch_select_indices(keep)
            growing.batch_select_indices(keep)
        new = states(rows, 1)
        for mine, theirs in zip(growing.update(*new, 0), plain.update(*new, 0), strict=True):
            assert torch.equal(mine, theirs)
        assert growing.get_seq_length() == plain.get_seq_length() == PROMPT + token + 1
        assert growing.get_mask_sizes(1, 0) == plain.get_mask_sizes(1, 0)


def test_it_is_copied_once_in_room_tokens_and_not_at_each(monkeypatch):
    _, growing = prompted()
    copies, with_room = [], kv_cache._with_room
    monkeypatch.setattr(kv_cache, "_with_room", lambda held, total: copies.append(total) or with_room(held, total))
    places = {growing.update(*states(ROWS, 1), 0)[0].data_ptr() for _ in range(2 * GROWTH)}
    assert copies == [PROMPT + 1] * 2 + [PROMPT + GROWTH + 1] * 2  # keys and values
    assert len(places) == 2


@pytest.mark.parametrize("filled", [False, True])
def test_layers_of_another_kind_and_empty_ones_are_left_alone(filled):
    kinds = {"sliding_attention": DynamicSlidingWindowLayer, "full_attention": DynamicLayer}
    config = LlamaConfig(
        num_hidden_layers=2, sliding_window=4, layer_types=list(kinds), num_attention_heads=HEADS, hidden_size=8
    )
    cache = DynamicCache(config=config)
    assert [type(layer) for layer in cache.layers] == list(kinds.values())
    if filled:
        for index in range(2):
            cache.update(*states(ROWS, PROMPT), index)
    give_room(cache)
    full = GrowingLayer if filled else DynamicLayer
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, full]


def test_caches_of_parts_are_joined_with_a_layer_at_most_there_twice():
    layers, parts = 4, [DynamicCache() for _ in range(3)]
    for rows, part in enumerate(parts, start=1):
        for layer in range(layers):
            part.update(*states(rows, PROMPT), layer)
    wanted = [[torch.cat([getattr(part.layers[layer], name) for part in parts]) for name in ("keys", "values")]
              for layer in range(layers)]
    with LiveBytes() as live:
        live.count([[layer.keys, layer.values] for part in parts for layer in part.layers])
        before = live.now
        whole = joined(parts)
    for layer, tensors in zip(whole.layers, wanted, strict=True):
        assert all(map(torch.equal, (layer.keys, layer.values), tensors))
    assert bytes_held(whole) == before
    assert before < live.peak <= before * (1 + 1 / layers)
