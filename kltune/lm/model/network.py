"""Any transformers causal LM, seen as a trunk that gives hidden states and a head that turns them into logits.

Cutting there lets the head run on response positions only, a chunk at a time. Whether a model can be cut (its logits
are just head(trunk), and what its configuration says of a scale or a soft cap) is found out by trying; where not, the
logits themselves take the place of the hidden states, and everything else works the same with less of it at once. So
is what its cache can do: where it cannot be repeated, or does not give what the whole sequence gives, every token is
sampled by reading all before it again.

Gradient checkpointing (a layer keeps its input alone, and its backward pass computes the layer again) is for sequences
whose backward pass would not fit otherwise: six layers of 256 took 1.37 times as long and kept 16 MB instead of 336.
transformers' own switch works only in training mode, which would turn every dropout on. The trap is that the layer is
computed again later: by then another adapter may be on, and the gradient would silently be that of another function.
So a layer remembers how its adapters were switched.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from kltune.core.kl.fused_head import AS_THEY_ARE, AfterHead, Reader, through_head
from kltune.core.products import linear_of
from kltune.core.tensors import close
from kltune.errors import ModelError
from kltune.lm.fast import ways
from kltune.lm.fast.shared_prefix import NO_CACHE
from kltune.lm.machine.sharding import ShardedLayers, trunk_of
from kltune.lm.model.adapters.weights import AdapterSwitch
from kltune.lm.model.batches import FixedRows, Parts
from kltune.lm.model.files import quantisation_of, reading

# float32 logits that may exist at once, per model. On a CPU more are slower: what is made of them is fresh memory each
# time; 64 MB took 1.6 times as long as 8 to measure KL at V = 8,192, 1.7 at 32,000. A GPU wants large launches.
CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}
# What configurations call numbers that a model's logits are scaled by, and capped at, after its head.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


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
        self.stands_for: str | None = None      # the type of device, of a model of shapes
        self.halved = False         # what is trained on at once, since memory ran out
        self._recomputes = True     # layers, where a backward pass would not fit otherwise
        self.sharded: ShardedLayers | None = None
        self._in_step = False       # with other processes, pass by pass
        self.refresh()
        self.vocabulary = self.causal.config.get_text_config().vocab_size
        self.try_ways()

    def refresh(self) -> None:
        """Find trunk and head again, after an adapter may have wrapped them."""
        self._trunk = trunk_of(self.causal)
        self.head = self.causal.get_output_embeddings()
        self._layers = CheckpointedLayers(self.causal if self._trunk is None else self._trunk)
        if self.fast is not None:
            self.fast.refresh()

    @torch.no_grad()
    def try_ways(self) -> None:
        """Find out by trying what the model can do, with its adapters as they are on now.

        Raises:
            ModelError: it gives no logits for token ids alone.
        """
        if self.device.type == "meta":
            return self._assume_ways()
        probe = torch.tensor([[0, 1, 0]], device=self.device)
        with reading(self.causal.name_or_path, "model", failed="cannot read token ids alone"):
            whole = self._whole(self.causal, probe).logits
        states = None if self._trunk is None else self.trunk(probe)
        cut = None if states is None else self._cut(states)
        self.after = AS_THEY_ARE if cut is None else self._after(cut, whole)
        self._width = None if states is None else states.shape[-1]
        # Equal, not close: a soft cap that small logits do not feel would be felt after training.
        self.split = cut is not None and _same(self.after(cut), whole)
        self.caches = self._can_cache()
        step = self.step if self.caches else None
        self.fast = ways.FastWays(self.causal, step, split=self.split) if ways.wanted else None
        self.batching = FixedRows() if self.fast is None else self.fast.batching

    def _assume_ways(self) -> None:
        """What most models can do, of one that has shapes and no weights to try it with."""
        self.after, self._width = AS_THEY_ARE, self.causal.config.get_text_config().hidden_size
        self.split = self._trunk is not None and self.head is not None
        self.caches, self.batching = True, FixedRows()

    def _cut(self, states: Tensor) -> Tensor | None:
        """What the head alone makes of hidden states; None where there is no such head, or one of another width."""
        try:
            return None if self.head in (None, self.causal) else self.head(states)
        except (RuntimeError, TypeError):
            return None

    def _after(self, cut: Tensor, whole: Tensor) -> AfterHead:
        """What the model does to its head's logits, of what its configuration speaks of; nothing if that is it."""
        config = self.causal.config.get_text_config()
        caps = (*_numbers(config, CAPS), None)
        scales = (*((scale, divides) for scale in _numbers(config, SCALES) for divides in (False, True)), (1.0, False))
        kinds = [AfterHead(scale, divides, cap) for cap in caps for scale, divides in scales]
        return next((after for after in kinds if _same(after(cut), whole)), AS_THEY_ARE)

    def _can_cache(self) -> bool:
        """Whether padded prompts, repeated and with rows dropped, decode from a cache to what whole sequences give."""
        ids = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 1, 1, 0]], device=self.device)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        rows = torch.tensor([0, 0, 1, 1], device=self.device)
        try:
            _, cache = self.step(ids[:, :3], mask[:, :3], (mask.cumsum(1) - 1).clamp(min=0)[:, :3], None)
            cache.reorder_cache(rows)
            decoder = Decoder(self.step, cache, mask[rows, :3])
            decoder.feed(ids[rows, 3])
            decoder.keep(rows.new_tensor([1, 2]))
            last = decoder.feed(ids[:, 4])
        except NO_CACHE:
            return False
        return close(last, torch.cat([self._last(ids[:1, 1:]), self._last(ids[1:])]))

    def _last(self, ids: Tensor) -> Tensor:
        """Logits after whole sequences. [B, S] -> [B, V]."""
        return self.logits(self.hidden(ids)[:, -1])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.causal.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, adapters aside."""
        return self.causal.get_input_embeddings().weight.dtype

    @property
    def rounds_as(self) -> torch.dtype:
        """The dtype by whose rounding its numbers may move; some backends of quantised models round inputs too."""
        quantised = self.dtype == torch.float32 and quantisation_of(self.causal.config) is not None
        return torch.float16 if quantised else self.dtype

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states; ModelError where a model gives none."""
        if self._width is None:
            raise ModelError(
                f"{self.causal.name_or_path}: a {type(self.causal).__name__} gives no hidden states that a value "
                "function or a reward model could read; choose baseline rloo or grpo, or another model."
            )
        return self._width

    def trunk(self, ids: Tensor) -> Tensor:
        """Last hidden states. [B, S] -> [B, S, H]. No mask: rows are right-padded and the model is causal."""
        return self._whole(self._trunk, ids).last_hidden_state

    def hidden(self, ids: Tensor) -> Tensor:
        """What ``logits`` takes: hidden states, or the logits themselves where the model cannot be cut."""
        return self.trunk(ids) if self.split else self._whole(self.causal, ids).logits

    def _whole(self, model: nn.Module, ids: Tensor) -> ModelOutput:
        with self._layers.active() if self._too_large(ids) else nullcontext():
            return model(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def lower_states(self, ids: Tensor, scored: Tensor, adapter: str | None = None) -> Tensor | None:
        """What the layers below the first adapted one make of rows, for ``before``; None where there are none or it
        does not pay. adapter: below this one, which alone is on.

        [B, S] ×2 -> [B, S, H], rows in parts; 0 behind their last scored token.
        """
        plain = self.fast is None or self.sharded is not None
        states = None if plain else self.fast.lower_states(ids, scored, adapter)
        if states is None:
            return None
        parts = self.parts(ids, scored)
        found = parts.spread(lambda place: (states(parts[place][0]),))
        return parts.rows_joined([states for (states,) in found])

    def before(
        self, ids: Tensor, scored: Tensor, lower: Tensor | None = None, adapter: str | None = None
    ) -> Tensor:
        """What ``logits`` takes, where it predicts the scored tokens: position i − 1 for token i. [B, S] ×2 -> [N, H].

        Prompts that neighbouring rows share are read once where that pays (``fast/shared_prefix.py``).

        lower, adapter: ``lower_states`` of these rows, from which the pass goes on, [B, S, H]; and below which.
        """
        if lower is not None:
            with self.fast.lower_layers(adapter).given(lower):
                return self.hidden(ids)[:, :-1][scored[:, 1:]]
        plain = self.fast is None or self._in_step or self._too_large(ids)
        states = None if plain else self.fast.states_before(ids, scored)
        return self.hidden(ids)[:, :-1][scored[:, 1:]] if states is None else states

    def trunk_before(
        self, ids: Tensor, scored: Tensor, lower: Tensor | None = None, adapter: str | None = None
    ) -> Tensor:
        """Last hidden states at the same positions, also of a model that cannot be cut. [B, S] ×2 -> [N, H]."""
        return self.before(ids, scored, lower, adapter) if self.split else self.trunk(ids)[:, :-1][scored[:, 1:]]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits in the model's own dtype. [N, H] -> [N, V]."""
        return self.after(linear_of(self.head)(hidden)) if self.split else hidden

    def read(
        self, hidden: Tensor, reader: Reader, *others: Tensor | Callable[[slice], Tensor]
    ) -> tuple[Tensor, ...]:
        """Read numbers off the logits of N positions, a chunk at a time; differentiable, once. [N] float32 each.

        hidden: what ``before`` gave. [N, H]. others: what the reader takes besides the logits: tensors of N positions,
        or functions that give those of a slice.
        """
        head, rows = self.head, self.chunk_rows
        plain = self.split and type(head) is nn.Linear and type(head.weight) is nn.Parameter      # not a packed one
        if plain and not any(tensor.requires_grad for tensor in head.parameters()):
            return through_head(hidden, head.weight, head.bias, reader, others, rows, self.after)

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
        self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache | None = None
    ) -> tuple[Tensor, Cache]:
        """Feed left-padded prompts, or one more token each: the logits after the last [B, V], and the cache."""
        model = self._trunk if self.split else self.causal
        output = model(
            input_ids=ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True,
        )
        last = output.last_hidden_state if self.split else output.logits
        return self.logits(last[:, -1]), output.past_key_values

    def start(self, ids: Tensor, mask: Tensor, repeats: int, limit: int) -> tuple[Tensor, Any]:
        """Read left-padded prompts, each for so many rows: logits after the last [R, V], and a decoder of the rows.

        mask: 0 on padding. [P, S] each. limit: tokens that each row may be fed. See ``Decoder``.
        """
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(repeats)
        if not self.caches:
            decoder = Rereader(self, ids[rows], mask[rows], limit)
            return decoder.logits(), decoder
        places = (mask.cumsum(1) - 1).clamp(min=0)
        read = self.step if self.fast is None else self.fast.read_prompts
        logits, cache = read(ids, mask, places)
        if repeats > 1:     # not batch_repeat_interleave: caches of states have none
            cache.reorder_cache(rows)
            logits, mask = logits[rows], mask[rows]
        return logits, Decoder(self.step, cache, mask) if self.fast is None else self.fast.decoder(cache, mask, limit)

    def merged(self) -> AbstractContextManager[None]:
        """Within: the adapter may be added into the weights that are read; for sampling, it must not be switched."""
        self.open()
        return nullcontext() if self.fast is None else self.fast.merged_trunk.active()

    def parts(self, ids: Tensor, scored: Tensor) -> Parts:
        """Rows in parts that go through the trunk at once, without gradients. [B, S] each."""
        self.open()
        return Parts(ids, scored, self.batching.to_read(ids, scored))

    def micro_batches(
        self, lengths: Sequence[int], sequences: int | None, *, group: int = 1, most: int | None = None
    ) -> list[list[int]]:
        """Cut a batch into parts that are trained on one after the other; arguments as ``Batching.micro_batches``."""
        dtype = str(self.causal.dtype).removeprefix("torch.")
        with reading(self.causal.name_or_path, "model", failed=f"cannot be trained in {dtype}"):    # first pass for it
            parts = self.batching.micro_batches(lengths, sequences, group, most)
        if not self.halved:
            return parts
        halves = [(part[: -(-len(part) // 2)], part[-(-len(part) // 2) :]) for part in parts]
        return [half for both in halves for half in both if half]

    def shard(self, trained: Set[nn.Parameter]) -> None:
        """Spread the frozen layers over the processes of the run; all but ``trained``."""
        self.sharded = ShardedLayers(self.causal, trained)

    def open(self) -> None:
        """Let each process make passes of its own. Where layers are spread, all have to call it."""
        if self.sharded is not None:
            self.sharded.open()

    def close(self) -> None:
        """Keep this process's piece of spread layers alone, and nothing that was made of them."""
        if self.sharded is not None:
            self.sharded.close()
            if self.fast is not None:
                self.fast.merged_trunk.forget()

    @contextmanager
    def in_step(self) -> Iterator[bool]:
        """Within: a pass of one process is a pass of all, and true, where layers are spread; of one kind then."""
        self.close()
        self._in_step = self.sharded is not None
        try:
            yield self._in_step
        finally:
            self._in_step = False

    @contextmanager
    def whole_graphs(self) -> Iterator[None]:
        """Within: no layer is computed twice. A graph that is differentiated twice would keep all of it anyway."""
        self._recomputes = False
        try:
            yield
        finally:
            self._recomputes = True

    def _too_large(self, ids: Tensor) -> bool:
        if self._in_step or not self._recomputes or not torch.is_grad_enabled():
            return False
        if self.batching.checkpoint_layers == "never":
            return False
        return self.batching.checkpoint_layers == "always" or self.batching.too_large(ids)

    @property
    def chunk_rows(self) -> int:
        """Positions whose float32 logits may exist at once."""
        most = CHUNK_BYTES.get(self.stands_for or self.device.type, CHUNK_BYTES["cpu"])
        return max(64, most // (4 * self.vocabulary))


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

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self._cache.reorder_cache(rows)
        self._mask = self._mask[rows]


class Rereader:
    """Decoder of the same interface for models without a cache that serves: every token reads the whole row again."""

    compact_below = 1.0

    def __init__(self, network: Network, ids: Tensor, mask: Tensor, limit: int):
        """Take left-padded prompts, and their mask: 0 on padding. [R, width] each. Rows get at most ``limit`` more."""
        self._network, self._lengths = network, mask.sum(dim=1)
        self._longest = int(self._lengths.max())    # known here, so that no token waits for the device to say it
        places = torch.arange(ids.shape[1] + limit, device=ids.device) + (ids.shape[1] - self._lengths)[:, None]
        self._ids = nn.functional.pad(ids, (0, limit)).gather(1, places % (ids.shape[1] + limit))  # padded right

    def logits(self) -> Tensor:
        """After each row so far. [R, V]."""
        states = self._network.hidden(self._ids[:, : self._longest])
        return self._network.logits(states[torch.arange(len(states), device=states.device), self._lengths - 1])

    def feed(self, ids: Tensor) -> Tensor:
        """One more token for each row: the logits after it. [R] -> [R, V]."""
        self._ids[torch.arange(len(ids), device=ids.device), self._lengths] = ids
        self._lengths, self._longest = self._lengths + 1, self._longest + 1
        return self.logits()

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self._ids, self._lengths = self._ids[rows], self._lengths[rows]
        self._longest = int(self._lengths.max())


def _same(mine: Tensor, theirs: Tensor) -> bool:
    return mine.shape == theirs.shape and torch.equal(mine.float(), theirs.float())


def _numbers(config: Any, names: Sequence[str]) -> list[float]:
    """What a configuration has under some names, where it is a number other than 0."""
    held = (getattr(config, name, None) for name in names)
    return [float(value) for value in held if isinstance(value, int | float) and value]


class CheckpointedLayers:
    """Gradient checkpointing of the layers of a trunk that their author marked for it."""

    def __init__(self, trunk: nn.Module):
        layers = (module for module in trunk.modules() if isinstance(module, GradientCheckpointingLayer))
        self._layers = [(layer, AdapterSwitch(layer)) for layer in layers]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within: forward passes keep each layer's input alone. Their backward passes may come later."""
        for layer, switch in self._layers:
            layer.forward = partial(_checkpointed, layer.forward, switch)
        try:
            yield
        finally:
            for layer, _ in self._layers:
                del layer.forward   # back to that of its class


def _checkpointed(forward: Callable[..., Any], switch: AdapterSwitch, *args, **kwargs) -> Any:
    state = switch.state()

    def again(*args, **kwargs) -> Any:
        with switch.as_in(state):
            return forward(*args, **kwargs)

    return checkpoint(again, *args, use_reentrant=False, **kwargs)
