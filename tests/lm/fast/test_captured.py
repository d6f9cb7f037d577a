"""The buffers of a captured step hold what a growing cache holds. The capture itself is tried where there is a GPU."""

import pytest
import torch

from kltune.lm.fast.cuda_graph import CapturedDecoder, FixedLayer, can_capture, captured_agrees
from kltune.lm.model.network import Network
from tests.lm.fast.test_decoding import DECODED, NOT_DECODED, network_of
from tests.lm.model.test_sampler import LIMIT, UNIFORMS, draw, tokens_of

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph needs a GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", DECODED)
def test_logits_are_those_of_the_growing_cache(name, device):
    network = network_of(DECODED[name])
    network.causal.to(device)
    assert captured_agrees(network.step, network.fast.next_step, torch.device(device))


def test_a_step_that_reads_the_wrong_place_is_found_out(monkeypatch):
    def shifted(self, keys, values, *args, **kwargs):
        self.keys.index_copy_(2, self._place - 1, keys)
        return self.keys, self.values

    network = network_of(DECODED["llama"])
    monkeypatch.setattr(FixedLayer, "update", shifted)
    assert not captured_agrees(network.step, network.fast.next_step, torch.device("cpu"))


@pytest.mark.parametrize("device", DEVICES)
def test_only_a_gpu_captures(device):
    network: Network = network_of(DECODED["llama"])
    network.causal.to(device)
    assert can_capture(network.step, network.fast.next_step, torch.device(device)) == (device == "cuda")
    assert not network.fast.captures  # it was built on the CPU


def test_a_model_that_does_not_decode_the_short_way_is_not_captured():
    assert not network_of(NOT_DECODED["granite"]).fast.captures


def test_a_policy_draws_the_same_responses_and_drops_rows_at_half(ending_policy, monkeypatch):
    wanted = tokens_of(draw(ending_policy))
    lengths = sorted({len(row) for row in wanted})
    assert len(lengths) > 3
    assert lengths[-1] == LIMIT
    kept, keep = [], CapturedDecoder.keep
    monkeypatch.setattr(CapturedDecoder, "keep", lambda self, rows: kept.append(len(rows)) or keep(self, rows))
    monkeypatch.setattr(ending_policy.network.fast, "captures", True)
    assert tokens_of(draw(ending_policy)) == wanted
    sizes = [len(UNIFORMS), *kept]
    assert kept
    assert all(after < before / 2 for before, after in zip(sizes, kept, strict=False))
