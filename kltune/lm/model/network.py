"""Any transformers causal LM, seen as a trunk that gives hidden states and a head that turns them into logits.

Cutting there lets the head run on response positions only, a chunk at a time. Whether a model can be cut (its logits
are just head(trunk), with no scaling or soft cap behind it) is found out by trying; where not, the logits themselves
take the place of the hidden states, and everything else works the same with less of it at once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.utils import ModelOutput

from kltune.core.kl.fused_head import Reader, through_head
from kltune.lm.fast import ways
from kltune.lm.model.adapters import CheckpointedLayers
from kltune.lm.model.batches import FixedRows, Parts

# float32 logits that may exist at once, per model. On a CPU more are slower: what is made of them is fresh memory each
# time; 64 MB took 1.6 times as long as 8 to measure KL at V = 8,192, 1.7 at 32,000. A GPU wants large launches.
CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}


class ScalarHead(nn.Module):
    """Linear head that reads one number off a hidden state: a value, or the score of a response.

    Starts at exactly 0 (Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO"), so that the first
    advantages are the rewards themselves and not the noise of a random head, and the first pairs are all undecided.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, H] hidden states -> [N] numbers."""
        return self.linear(hidden.float()).squeeze(-1)


class Network:
    """A causal LM as trunk and head, with whatever adapters are switched on in it."""

    def __init__(self, causal: nn.Module):
        self.causal = causal
        self.fast: ways.FastWays | None = None
        self._recomputes = True     # layers, where a backward pass would not fit otherwise
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
        self.fast = ways.FastWays(causal, self.step, split=self.split) if ways.wanted else None
        self.batching = FixedRows() if self.fast is None else self.fast.batching

    def refresh(self) -> None:
        """Find trunk and head again, after an adapter may have wrapped them."""
        self._trunk = self.causal.base_model
        self.head = self.causal.get_output_embeddings()
        self._layers = CheckpointedLayers(self._trunk)
        if self.fast is not None:
            self.fast.refresh()

    def trunk(self, ids: Tensor) -> Tensor:
        """Last hidden states. [B, S] -> [B, S, H]. No mask: rows are right-padded and the model is causal."""
        return self._whole(self._trunk, ids).last_hidden_state

    def hidden(self, ids: Tensor) -> Tensor:
        """What ``logits`` takes: hidden states, or the logits themselves where the model cannot be cut."""
        return self.trunk(ids) if self.split else self._whole(self.causal, ids).logits

    def _whole(self, model: nn.Module, ids: Tensor) -> ModelOutput:
        with self._layers.active() if self._too_large(ids) else nullcontext():
            return model(input_ids=ids, use_cache=False)

    def before(self, ids: Tensor, scored: Tensor) -> Tensor:
        """What ``logits`` takes, where it predicts the scored tokens: position i − 1 for token i. [B, S] ×2 -> [N, H].

        Prompts that neighbouring rows share are read once where that pays (``fast/shared_prefix.py``).
        """
        states = None if self.fast is None or self._too_large(ids) else self.fast.states_before(ids, scored)
        return self.hidden(ids)[:, :-1][scored[:, 1:]] if states is None else states

    def trunk_before(self, ids: Tensor, scored: Tensor) -> Tensor:
        """Last hidden states at the same positions, also of a model that cannot be cut. [B, S] ×2 -> [N, H]."""
        return self.before(ids, scored) if self.split else self.trunk(ids)[:, :-1][scored[:, 1:]]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits in the model's own dtype. [N, H] -> [N, V]."""
        return self.head(hidden) if self.split else hidden

    def read(
        self, hidden: Tensor, reader: Reader, *others: Tensor | Callable[[slice], Tensor]
    ) -> tuple[Tensor, ...]:
        """Read numbers off the logits of N positions, a chunk at a time; differentiable, once. [N] float32 each.

        hidden: what ``before`` gave. [N, H]. others: what the reader takes besides the logits: tensors of N positions,
        or functions that give those of a slice.
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
        readings = [
            checkpoint(some, hidden[part], part, use_reentrant=False) if save else some(hidden[part], part)
            for part in parts
        ]
        return tuple(torch.cat(column) for column in zip(*readings, strict=True))

    def step(
        self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Cache]:
        """Feed left-padded prompts, or one more token each: the logits after the last [B, V], and the cache."""
        model = self._trunk if self.split else self.causal
        output = model(
            input_ids=ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True,
        )
        logits = self.head(output.last_hidden_state[:, -1]) if self.split else output.logits[:, -1]
        return logits, output.past_key_values

    def read_prompts(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Cache]:
        """Feed left-padded prompts, with a mask that is 0 on their padding: logits after the last [B, V], and cache."""
        places = (mask.cumsum(1) - 1).clamp(min=0)
        return self.step(ids, mask, places, None) if self.fast is None else self.fast.read_prompts(ids, mask, places)

    def decoder(self, cache: Cache, mask: Tensor, limit: int) -> Any:
        """A decoder that feeds the rows of a cache one token at a time, at most ``limit`` each. See ``Decoder``."""
        return Decoder(self.step, cache, mask) if self.fast is None else self.fast.decoder(cache, mask, limit)

    def merged(self) -> AbstractContextManager[None]:
        """Within: the adapter may be added into the weights that are read; for sampling, it must not be switched."""
        return nullcontext() if self.fast is None else self.fast.merged_trunk.active()

    def parts(self, ids: Tensor, scored: Tensor) -> Parts:
        """Rows in parts that go through the trunk at once, without gradients. [B, S] each."""
        return Parts(ids, scored, self.batching.to_read(ids, scored))

    def micro_batches(self, lengths: Sequence[int], sequences: int | None, *, group: int = 1) -> list[list[int]]:
        """Cut a batch into parts that are trained on one after the other; arguments as ``Batching.micro_batches``."""
        return self.batching.micro_batches(lengths, sequences, group)

    @contextmanager
    def whole_graphs(self) -> Iterator[None]:
        """Within: no layer is computed twice. A graph that is differentiated twice would keep all of it anyway."""
        self._recomputes = False
        try:
            yield
        finally:
            self._recomputes = True

    def _too_large(self, ids: Tensor) -> bool:
        return self._recomputes and torch.is_grad_enabled() and self.batching.too_large(ids)

    @property
    def chunk_rows(self) -> int:
        """Positions whose float32 logits may exist at once."""
        device = next(self.causal.parameters()).device.type
        return max(64, CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) // (4 * self.vocabulary))


class Decoder:
    """Feeds rows that have read their prompts one token at a time: the model's own forward pass, on its own cache."""

    compact_below = 0.0     # rows that have ended are fed on; the fast ways drop them

    def __init__(self, step: Callable, cache: Cache, mask: Tensor):
        """Take ``Network.step``, the cache of left-padded prompts, and their mask: 0 on padding. [R, width]."""
        self._step, self._cache, self._mask = step, cache, mask

    def feed(self, ids: Tensor) -> Tensor:
        """One more token for each row: the logits after it. [R] -> [R, V]."""
        places = self._mask.sum(dim=1, keepdim=True)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids), 1)], dim=1)
        logits, self._cache = self._step(ids[:, None], self._mask, places, self._cache)
        return logits
