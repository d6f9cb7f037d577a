"""How many rows go through a model at once: what its device holds, and what padding and one more pass cost.

Planned from the device's whole memory, never from what happens to be free: two runs of one recipe on one machine must
cut their batches alike, or they differ in the last bits and a resumed run is no longer the one that was stopped.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from kltune.core import ranks
from kltune.lm.fast.decoding import Step, bytes_held, is_plain
from kltune.lm.fast.shared_prefix import begins_another, scored_spans
from kltune.lm.machine.device_memory import SHARE, free_bytes
from kltune.lm.machine.sharding import trunk_of

BACKWARD = 1.7          # times what a forward pass saves: the peak of the backward pass over it
CACHE = 1.5             # times the keys and values: room to grow, and a layer's copy while rows are dropped
PROBED = 32              # tokens
PASS_BYTES = 64 * 2**20 # of logits in one pass of a model that cannot be cut, prompts and all
TOKENS_PER_PASS = 16_384    # through the trunk at once when nothing is trained
TRAINED_SHARE = 4       # of these, a fraction is trained on at once: more take memory and are no faster
ROWS_PER_PASS = 512     # responses sampled side by side; 1,024: stories260K 9 % faster, six layers of 256 4 % slower
# What a pass costs whatever is in it: for each layer so many products of a number with a weight, and what reading the
# weights takes, in tokens. Batches of unequal rows are cut where padding costs more. Measured on a CPU, where a pass is
# worth 170 to 340 tokens of stories260K and 85 to 120 of six layers of 256; guessed on a GPU. 128 responses of 16 to 18
# tokens on average and 64 at most took 0.73 to 0.78 of the time to train on, 0.64 to 0.88 to measure.
PASS_PRODUCTS = {"cpu": 12e6, "cuda": 30e9}
PASS_READS = 64
# Into how many pieces a batch is cut that would go through at once, for processes to share: on a CPU as many whatever
# their number, so that one computes what several do; and none that costs less than so many passes, which one would pay.
# One core, stories260K: 128 responses of 48 tokens sampled in pieces of 64 took 0.98 of the time in one, of 32 1.3;
# measured in pieces of 2,048 tokens 0.7; 64 of them trained on in pieces of 2,048 or 1,024 0.8.
PIECES = 4
PASSES_PER_PIECE = 6
PASSES_PER_SAMPLE = 0.25    # a pass of sampling takes one token of each response



def micro_batches(lengths: Sequence[int], most: Callable[[int], int], cost: float) -> list[list[int]]:
    """Cut a batch into parts of similar lengths, so that padding and the number of parts cost least together.

    lengths: tokens of each row. most: how many rows of a length may be in one part; a part holds at least one. cost: of
    a part, in tokens. Returned are places in ``lengths``, for each part; the longest first, so that what does not fit
    in memory fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    cheapest, ends = [0] * (len(order) + 1), [0] * len(order)   # from a place in the order on; where its part ends
    for start in reversed(range(len(order))):
        width = lengths[order[start]]
        last = min(len(order), start + max(1, most(width)))
        costs = {end: cost + (end - start) * width + cheapest[end] for end in range(start + 1, last + 1)}
        ends[start] = min(costs, key=costs.get)
        cheapest[start] = costs[ends[start]]
    parts, start = [], 0
    while start < len(order):
        parts.append(order[start : ends[start]])
        start = ends[start]
    return parts


class Batching:
    """Cuts batches into parts that fit in memory and hold little padding."""

    def __init__(self, causal: nn.Module, step: Step | None, *, split: bool, shares_prefixes: bool):
        """Take a model, with its adapters as they are on whenever this is asked.

        step: None for a model without a cache, which reads all of a row again for each token.
        split: its trunk runs alone, without making logits of all positions. shares_prefixes: neighbouring rows read the
        prompt they share once.
        """
        self._causal, self._step, self._split, self.shares_prefixes = causal, step, split, shares_prefixes
        self._room: TrainingRoom | None = None
        self._other_room: TrainingRoom | None = None
        self.fraction, self.checkpoint_layers = SHARE, "auto"

    def refresh(self) -> None:
        """Measure again, after an adapter may have come."""
        self._room = self._other_room = None

    def lengths(self, ids: Tensor, scored: Tensor) -> list[int]:
        """Tokens of each row up to its last scored one. [B, S] each.

        Neighbours that share their prompt count as the longest of them, so that sorting leaves them side by side.
        """
        starts, ends = scored_spans(scored)
        if self.shares_prefixes:
            owner = begins_another(ids, starts).cumsum(0) - 1
            ends = ends.new_zeros(len(ends)).scatter_reduce(0, owner, ends, "amax")[owner]
        return ends.tolist()

    def to_read(self, ids: Tensor, scored: Tensor) -> list[list[int]]:
        """Rows in parts that go through the trunk at once, without gradients. [B, S] each."""
        lengths = self.lengths(ids, scored)
        tokens = min(self.tokens_per_pass, self._piece(sum(lengths), PASSES_PER_PIECE))
        return micro_batches(lengths, lambda length: tokens // length, self._pass_tokens)

    def micro_batches(
        self, lengths: Sequence[int], sequences: int | None, group: int = 1, most: int | None = None
    ) -> list[list[int]]:
        """Cut a batch into parts that are trained on one after the other, so that little of them is padding.

        lengths: tokens of each row, or of the longest of each ``group`` that stays together. sequences: how many a part
        has at most; None: what memory holds, and no more than is any use. most: sequences that memory holds of other
        work than training. Returned are places in ``lengths``.
        """
        piece = self._piece(group * sum(lengths), PASSES_PER_PIECE)
        tokens = min(self.tokens_per_pass // TRAINED_SHARE, max(piece, group * max(lengths)))

        def fit(length: int) -> int:
            if sequences is not None:
                return sequences // group
            checkpoints = self.checkpoint_layers == "always" and most is None
            held = sys.maxsize if checkpoints else self.trained_rows(length) if most is None else most
            return min(held, tokens // length) // group

        return micro_batches(lengths, fit, self._pass_tokens / group)

    def trained_rows(self, length: int) -> int:
        """How many sequences of a length fit in memory with all that their backward pass needs.

        Measured when first asked, with the adapter that is on then; from then on larger passes checkpoint their layers.
        """
        if self._room is None:
            trained = trunk_of(self._causal) if self._split else self._causal
            self._room = training_room(self._causal, trained, self.fraction)
        return self._room.rows(length)

    def rows_of(self, work: Callable[[Tensor], Any], peak: float, length: int) -> int:
        """How many sequences of a length fit, at least 1, in memory with the graph of other work; see ``room_for``.

        Measured when first asked, on the work that is asked for then.
        """
        if self._other_room is None:
            self._other_room = room_for(self._causal, work, peak, self.fraction)
        return max(1, self._other_room.rows(length))

    def too_large(self, ids: Tensor) -> bool:
        """Whether a backward pass over these rows is known not to fit. [B, S]."""
        return self._room is not None and len(ids) > self.trained_rows(ids.shape[1])

    def sampled_rows(self, tokens: int, rows: int) -> int:
        """How many of so many responses may be sampled side by side, of so many tokens each, the prompt's included."""
        if self._step is None:
            return max(1, self.tokens_per_pass // tokens)
        free = free_bytes(self._causal, _device(self._causal), self.fraction)
        fit = int(free / (CACHE * max(1.0, bytes_held(self._token_cache)) * tokens))
        return max(1, min(ROWS_PER_PASS, fit, self._piece(rows, PASSES_PER_SAMPLE)))

    def _piece(self, size: int, passes: float) -> int:
        """How much of a batch of a size may go through at once, for processes to share it; each costs some passes."""
        return piece_of(size, passes * self._pass_tokens, self._pieces)

    @property
    def _pieces(self) -> int:
        return PIECES if _device(self._causal).type == "cpu" else ranks.size()

    def prompt_rows(self, ids: Tensor) -> int:
        """How many of these prompts are read at once. [P, S]."""
        return max(1, self.tokens_per_pass // ids.shape[1]) if is_plain(self._token_cache) else len(ids)

    @cached_property
    def _token_cache(self) -> Cache:
        """The cache of one token."""
        probe = torch.zeros(1, 1, dtype=torch.long, device=_device(self._causal))
        with torch.no_grad():
            return self._step(probe, torch.ones_like(probe), probe, None)[1]

    @cached_property
    def _pass_tokens(self) -> float:
        """How many tokens of padding cost what one more pass costs."""
        return pass_tokens(self._causal, _device(self._causal).type)

    @property
    def tokens_per_pass(self) -> int:
        """Tokens that may go through a model at once without gradients."""
        vocabulary = self._causal.config.get_text_config().vocab_size
        return TOKENS_PER_PASS if self._split else max(64, PASS_BYTES // (4 * vocabulary))


def piece_of(size: int, cost: float, pieces: int) -> int:
    """How much of a batch of a size may go through at once, cut into so many pieces where one is worth its cost."""
    pieces = min(pieces, int(size // max(1.0, cost)))
    return math.ceil(size / pieces) if pieces > 1 else sys.maxsize


def pass_tokens(causal: nn.Module, device: str) -> float:
    """How many tokens of padding cost what one more pass costs, on a type of device."""
    words = causal.get_input_embeddings().weight.numel()
    layers = getattr(causal.config.get_text_config(), "num_hidden_layers", 1)
    weights = sum(tensor.numel() for tensor in (trunk_of(causal) or causal).parameters()) - words
    return PASS_READS + PASS_PRODUCTS.get(device, PASS_PRODUCTS["cpu"]) * layers / max(1, weights)


@dataclass(frozen=True)
class TrainingRoom:
    """The memory beside weights and optimizer, and what a backward pass takes of it.

    bytes: there are. per_token: of a sequence. per_square: of its length squared, where attention keeps its weights.
    """

    bytes: float
    per_token: float
    per_square: float

    def rows(self, length: int) -> int:
        """How many sequences of a length fit; 0 where not even one does."""
        each = self.per_token * length + self.per_square * length**2
        return max(0, int(self.bytes / each)) if each else sys.maxsize


def training_room(model: nn.Module, trained: nn.Module, fraction: float = SHARE) -> TrainingRoom:
    """Measure what a model keeps for its backward pass, on three small batches through the part that training runs.

    fraction: of the device's memory that is planned with.
    """
    return room_for(model, lambda ids: trained(input_ids=ids, use_cache=False)[0], BACKWARD, fraction)


def room_for(model: nn.Module, work: Callable[[Tensor], Any], peak: float, fraction: float = SHARE) -> TrainingRoom:
    """Measure what some work on rows of tokens keeps for its backward pass, on three small batches.

    work: takes token ids, [B, S], and gives what holds its graph. peak: of memory, in multiples of what is kept.
    """
    device = _device(model)
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def saved(rows: int, length: int) -> int:
        ids = torch.zeros(rows, length, dtype=torch.long, device=device)
        return saved_bytes(lambda: work(ids), own)

    # An adapter's dropout draws; other devices than the model's are not asked for their generators.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        one = saved(1, PROBED)
        per_row = saved(2, PROBED) - one  # what does not grow with the rows, as weights with an adapter added, is out
        long = saved(1, 2 * PROBED)
    per_square = max(0.0, (long - one - per_row) / (2 * PROBED**2))
    per_token = per_row / PROBED - per_square * PROBED
    return TrainingRoom(free_bytes(model, device, fraction), peak * per_token, peak * per_square)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def saved_bytes(work: Callable[[], Any], without: set[int] = frozenset()) -> int:
    """The bytes that autograd keeps for the backward pass of some work, shared memory counted once.

    without: storages that are there anyway, as the weights'.
    """
    # The memory itself, or it would be used again and counted as another's. No tensors: one that has a gradient leads
    # back to this hook, and such a ring is not freed before Python looks for rings.
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage()._cdata       # not data_ptr, which is 0 for all that is shapes alone
        if address not in without:
            kept[address] = tensor.untyped_storage()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = work()
    total = sum(storage.nbytes() for storage in kept.values())
    del graph
    return total
