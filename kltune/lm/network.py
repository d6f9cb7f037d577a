"""Any transformers causal LM, seen as a trunk that gives hidden states and a head that turns them into logits.

Cutting there lets the head run on response positions only, a chunk at a time. Whether a model can be cut (its logits
are just head(trunk), with no scaling or soft cap behind it) is found out by trying; where not, the logits themselves
take the place of the hidden states, and everything else works the same with less of it at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from kltune.core.head import Reader, through_head
from kltune.lm.captured import CapturedDecoder, can_capture
from kltune.lm.decoding import Decoder, can_decode, one_more
from kltune.lm.merging import MergedTrunk
from kltune.lm.shared_prefix import can_share, shared_prefixes, states_before

# float32 logits that may exist at once, per model. On a CPU more are slower: what is made of them is fresh memory each
# time; 64 MB took 1.6 times as long as 8 to measure KL at V = 8,192, 1.7 at 32,000. A GPU wants large launches.
CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}
PASS_BYTES = 64 * 2**20  # of logits in one pass of a model that cannot be cut, prompts and all
TOKENS_PER_PASS = 16_384  # tokens through the trunk at once when nothing is trained


class Network:
    """Trunk and head of a causal LM, with whatever adapters are switched on in it."""

    def __init__(self, causal: nn.Module):
        self.causal = causal
        self._home: dict[int, Tensor] = {}
        self.refresh()
        self.vocabulary = self.causal.config.get_text_config().vocab_size
        probe = torch.tensor([[0, 1, 0]], device=next(causal.parameters()).device)
        with torch.no_grad():
            hidden = self.trunk(probe)
            whole = causal(input_ids=probe, use_cache=False).logits
            cut = self.head(hidden) if self.head is not None and self.head is not causal else None
        self.hidden_size = hidden.shape[-1]
        # Equal, not close: a soft cap that small logits do not feel would be felt after training.
        self.split = cut is not None and cut.shape == whole.shape and torch.equal(cut.float(), whole.float())
        self.shares_prefixes = self.split and can_share(causal, self._trunk, self.trunk)
        self.decodes = self.split and can_decode(causal, self._trunk)
        self.captures = self.decodes and can_capture(self.step, probe.device)

    def refresh(self) -> None:
        """Find trunk and head again, after an adapter may have wrapped them."""
        self._trunk = self.causal.base_model
        self.head = self.causal.get_output_embeddings()
        self.merged = MergedTrunk(self._trunk)

    def move_head(self, device: torch.device) -> None:
        """Put the head (and embeddings that are tied to it) on a device."""
        if self.split:
            self.head.to(device)

    def move_trunk(self, device: torch.device | None) -> None:
        """Copy all but the head to a device, or drop the copy and go back to what it was made of (None)."""
        head = {id(tensor) for tensor in self.head.parameters()} if self.split else set()
        for tensor in (*self.causal.parameters(), *self.causal.buffers()):
            if id(tensor) not in head:
                home = self._home.setdefault(id(tensor), tensor.data)
                tensor.data = home if device is None else home.to(device)

    def trunk(self, ids: Tensor) -> Tensor:
        """Last hidden states. [B, S] -> [B, S, H]. No mask: rows are right-padded and the model is causal."""
        output = self._trunk(input_ids=ids, use_cache=False)
        return output.last_hidden_state

    def hidden(self, ids: Tensor) -> Tensor:
        """What ``logits`` takes: hidden states, or the logits themselves where the model cannot be cut."""
        return self.trunk(ids) if self.split else self.causal(input_ids=ids, use_cache=False).logits

    def before(self, ids: Tensor, scored: Tensor) -> Tensor:
        """What ``logits`` takes, where it predicts the scored tokens: position i − 1 for token i. [B, S] ×2 -> [N, H].

        Prompts that neighbouring rows share are read once where that pays (``shared_prefix.py``).
        """
        rows = shared_prefixes(ids, scored) if self.shares_prefixes else None
        return self.hidden(ids)[:, :-1][scored[:, 1:]] if rows is None else states_before(self._trunk, rows)

    def trunk_before(self, ids: Tensor, scored: Tensor) -> Tensor:
        """Last hidden states at the same positions, also of a model that cannot be cut. [B, S] ×2 -> [N, H]."""
        return self.before(ids, scored) if self.split else self.trunk(ids)[:, :-1][scored[:, 1:]]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits in the model's own dtype. [N, H] -> [N, V]."""
        return self.head(hidden) if self.split else hidden

    def read(
        self, hidden: Tensor, reader: Reader, *others: Tensor | Callable[[slice], Tensor]
    ) -> tuple[Tensor, ...]:
        """Read numbers off the logits of N positions, a chunk at a time; differentiable, once.

        Args:
            hidden: what ``hidden`` gave at the positions. [N, H].
            reader: what to read.
            others: what it takes besides the logits: tensors of N positions, or functions that give those of a slice.

        Returns:
            One tensor for each reading. [N] float32.
        """
        head, rows = self.head, self.chunk_rows
        if self.split and type(head) is nn.Linear and not any(tensor.requires_grad for tensor in head.parameters()):
            return through_head(hidden, head.weight, head.bias, reader, others, rows)

        def some(states: Tensor, part: slice) -> tuple[Tensor, ...]:
            beside = [other[part] if isinstance(other, Tensor) else other(part) for other in others]
            return tuple(reading.value for reading in reader(self.logits(states), *beside, slopes=False))

        # An adapter on the head, or no head at all: the backward pass makes a chunk's logits again.
        save = torch.is_grad_enabled() and len(hidden) > rows
        parts = [slice(start, start + rows) for start in range(0, max(1, len(hidden)), rows)]
        found = [
            checkpoint(some, hidden[part], part, use_reentrant=False) if save else some(hidden[part], part)
            for part in parts
        ]
        return tuple(torch.cat(column) for column in zip(*found, strict=True))

    def step(
        self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Cache]:
        """Feed left-padded prompts, or one more token each: the logits after the last [B, V], and the cache."""
        if self.decodes and cache is not None:
            return self.head(one_more(self._trunk, ids, attention_mask, position_ids, cache)), cache
        inputs = {
            "input_ids": ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": cache,
            "use_cache": True,
        }
        if self.split:
            output = self._trunk(**inputs)
            return self.head(output.last_hidden_state[:, -1]), output.past_key_values
        output = self.causal(**inputs)
        return output.logits[:, -1], output.past_key_values

    def decoder(self, cache: Cache, mask: Tensor, limit: int) -> Decoder | CapturedDecoder:
        """What feeds the rows of a cache one token at a time. See ``Decoder``."""
        return (CapturedDecoder if self.captures else Decoder)(self.step, cache, mask, limit)

    @property
    def chunk_rows(self) -> int:
        """Positions whose float32 logits may exist at once."""
        kind = next(self.causal.parameters()).device.type
        return max(64, CHUNK_BYTES.get(kind, CHUNK_BYTES["cpu"]) // (4 * self.vocabulary))

    @property
    def tokens_per_pass(self) -> int:
        """Tokens that may go through ``hidden`` at once without gradients."""
        return TOKENS_PER_PASS if self.split else max(64, PASS_BYTES // (4 * self.vocabulary))
