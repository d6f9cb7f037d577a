"""Any transformers causal LM, seen as a trunk that gives hidden states and a head that turns them into logits.

Cutting there lets the head run on response positions only, a chunk at a time. Whether a model can be cut (its logits
are just head(trunk), with no scaling or soft cap behind it) is found out by trying; where not, the logits themselves
take the place of the hidden states, and everything else works the same with less of it at once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.utils import ModelOutput

from kltune.core.kl.fused_head import Reader, through_head
from kltune.lm.fast.cuda_graph import CapturedDecoder, can_capture
from kltune.lm.fast.decoding import Decoder, OneMore, Step, bytes_held, can_decode, is_plain, joined
from kltune.lm.fast.lora import MergedTrunk
from kltune.lm.fast.memory import Parts, TrainingRoom, cached_rows, micro_batches, training_room
from kltune.lm.fast.shared_prefix import begins_another, can_share, shared_prefixes, spans, states_before
from kltune.lm.model.adapters import CheckpointedLayers

# float32 logits that may exist at once, per model. On a CPU more are slower: what is made of them is fresh memory each
# time; 64 MB took 1.6 times as long as 8 to measure KL at V = 8,192, 1.7 at 32,000. A GPU wants large launches.
CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}
PASS_BYTES = 64 * 2**20  # of logits in one pass of a model that cannot be cut, prompts and all
TOKENS_PER_PASS = 16_384  # tokens through the trunk at once when nothing is trained
TRAINED_SHARE = 4  # of these, a fraction is trained on at once: more take memory and are no faster
ROWS_PER_PASS = 512  # responses sampled side by side; 1,024: stories260K 9 % faster, six layers of 256 4 % slower
# What a pass costs whatever is in it: for each layer so many products of a number with a weight, and what reading the
# weights takes, in tokens. Batches of unequal rows are cut where padding costs more. Measured on a CPU, where a pass is
# worth 170 to 340 tokens of stories260K and 85 to 120 of six layers of 256; guessed on a GPU. 128 responses of 16 to 18
# tokens on average and 64 at most took 0.73 to 0.78 of the time to train on, 0.64 to 0.88 to measure.
PASS_PRODUCTS = {"cpu": 12e6, "cuda": 30e9}
PASS_READS = 64


class ScalarHead(nn.Module):
    """One number read off a hidden state: what is expected of the rest of a response, or the score of all of it.

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
    """Trunk and head of a causal LM, with whatever adapters are switched on in it."""

    def __init__(self, causal: nn.Module):
        self.causal = causal
        self._home: dict[int, Tensor] = {}
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
        self.shares_prefixes = self.split and can_share(causal, self._trunk, self.trunk)
        self.decodes = self.split and can_decode(causal, self._trunk)
        self.captures = self.decodes and can_capture(self.step, self.next_step, probe.device)

    def refresh(self) -> None:
        """Find trunk and head again, after an adapter may have wrapped them."""
        self._trunk = self.causal.base_model
        self.head = self.causal.get_output_embeddings()
        self.merged = MergedTrunk(self._trunk)
        self._layers = CheckpointedLayers(self._trunk)
        self._room: TrainingRoom | None = None

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
        return self._whole(self._trunk, ids).last_hidden_state

    def hidden(self, ids: Tensor) -> Tensor:
        """What ``logits`` takes: hidden states, or the logits themselves where the model cannot be cut."""
        return self.trunk(ids) if self.split else self._whole(self.causal, ids).logits

    def _whole(self, model: nn.Module, ids: Tensor) -> ModelOutput:
        with self._layers.active() if self._too_large(ids) else nullcontext():
            return model(input_ids=ids, use_cache=False)

    def before(self, ids: Tensor, scored: Tensor) -> Tensor:
        """What ``logits`` takes, where it predicts the scored tokens: position i − 1 for token i. [B, S] ×2 -> [N, H].

        Prompts that neighbouring rows share are read once where that pays (``shared_prefix.py``).
        """
        rows = shared_prefixes(ids, scored) if self.shares_prefixes and not self._too_large(ids) else None
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

    def read_prompts(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Cache]:
        """Feed left-padded prompts, as many at once as go through the trunk: logits after the last [B, V], and cache.

        Args:
            ids: [B, S] int64.
            mask: 0 on their padding. [B, S].
        """
        rows = max(1, self.tokens_per_pass // ids.shape[1]) if is_plain(self._probe_cache) else len(ids)
        parts = zip(ids.split(rows), mask.split(rows), strict=True)
        logits, caches = zip(
            *(self.step(some, seen, (seen.cumsum(1) - 1).clamp(min=0), None) for some, seen in parts), strict=True
        )
        return torch.cat(logits), joined(caches)

    def decoder(self, cache: Cache, mask: Tensor, limit: int) -> Decoder | CapturedDecoder:
        """What feeds the rows of a cache one token at a time. See ``Decoder``."""
        kind = CapturedDecoder if self.captures else Decoder
        return kind(self.next_step(mask.shape[1] + limit), cache, mask, limit)

    def next_step(self, positions: int) -> Step:
        """``step`` for one more token of each row, with the weights as they are now; rows have so many positions."""
        if not self.decodes:
            return self.step
        short, head = OneMore(self._trunk, positions), self.head
        return lambda ids, mask, places, cache: (head(short(ids, mask, places, cache)), cache)

    def lengths(self, ids: Tensor, scored: Tensor) -> list[int]:
        """Tokens of each row up to its last scored one. [B, S] each.

        Neighbours that share their prompt count as the longest of them, so that sorting leaves them side by side.
        """
        starts, ends = spans(scored)
        if self.shares_prefixes:
            owner = begins_another(ids, starts).cumsum(0) - 1
            ends = ends.new_zeros(len(ends)).scatter_reduce(0, owner, ends, "amax")[owner]
        return ends.tolist()

    def parts(self, ids: Tensor, scored: Tensor) -> Parts:
        """Rows in parts that go through the trunk at once, without gradients. [B, S] each."""
        rows = micro_batches(
            self.lengths(ids, scored), lambda length: self.tokens_per_pass // length, self._pass_tokens
        )
        return Parts(ids, scored, rows)

    def micro_batches(self, lengths: Sequence[int], sequences: int | None, *, group: int = 1) -> list[list[int]]:
        """Cut a batch into parts that are trained on one after the other, so that little of them is padding.

        Args:
            lengths: tokens of each row, or of the longest row of each group.
            sequences: how many go into a part at most; None: what memory holds, and no more than is any use.
            group: rows that stay together.

        Returns:
            Places in ``lengths``, for each part.
        """
        tokens = self.tokens_per_pass // TRAINED_SHARE

        def most(length: int) -> int:
            if sequences is None:
                return min(self.trained_rows(length), tokens // length) // group
            return sequences // group

        return micro_batches(lengths, most, self._pass_tokens / group)

    def trained_rows(self, length: int) -> int:
        """How many sequences of a length fit in memory with all that their backward pass needs.

        Measured when first asked, with the adapter that is on then; from then on larger passes checkpoint their layers.
        """
        if self._room is None:
            self._room = training_room(self.causal, self._trunk if self.split else self.causal)
        return self._room.rows(length)

    @contextmanager
    def whole_graphs(self) -> Iterator[None]:
        """Within: no layer is computed twice. A graph that is differentiated twice would keep all of it anyway."""
        self._recomputes = False
        try:
            yield
        finally:
            self._recomputes = True

    def _too_large(self, ids: Tensor) -> bool:
        known = self._room is not None and self._recomputes and torch.is_grad_enabled()
        return known and len(ids) > self.trained_rows(ids.shape[1])

    def sampled_rows(self, tokens: int) -> int:
        """How many responses may be sampled side by side, by the memory that keys and values of their tokens take.

        Args:
            tokens: of a prompt and the longest response to it.
        """
        fit = cached_rows(self.causal, bytes_held(self._probe_cache), tokens)
        return max(1, min(ROWS_PER_PASS, fit))

    @cached_property
    def _probe_cache(self) -> Cache:
        """The cache of one token."""
        probe = torch.zeros(1, 1, dtype=torch.long, device=next(self.causal.parameters()).device)
        with torch.no_grad():
            return self.step(probe, torch.ones_like(probe), probe, None)[1]

    @property
    def chunk_rows(self) -> int:
        """Positions whose float32 logits may exist at once."""
        return max(64, self._for_device(CHUNK_BYTES) // (4 * self.vocabulary))

    @cached_property
    def _pass_tokens(self) -> float:
        """How many tokens of padding cost what one more pass costs."""
        words = self.causal.get_input_embeddings().weight.numel()
        layers = getattr(self.causal.config.get_text_config(), "num_hidden_layers", 1)
        weights = sum(tensor.numel() for tensor in self.causal.base_model.parameters()) - words
        return PASS_READS + self._for_device(PASS_PRODUCTS) * layers / max(1, weights)

    def _for_device(self, table: dict[str, int]) -> int:
        return table.get(next(self.causal.parameters()).device.type, table["cpu"])

    @property
    def tokens_per_pass(self) -> int:
        """Tokens that may go through ``hidden`` at once without gradients."""
        return TOKENS_PER_PASS if self.split else max(64, PASS_BYTES // (4 * self.vocabulary))
