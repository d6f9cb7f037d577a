"""What each phase of a stage takes of a device's memory, told on a model of shapes before a weight is loaded.

The functions that a run calls are called on the meta device (``lm/machine/live_bytes.py``), on a batch of the longest
rows cut as a run cuts it; only the growth of a cache while tokens are drawn is a sum. Measured on a CPU the same
operations hold the same bytes; a device adds its context, kernels' scratch space and fragments, which
``run.memory_fraction`` leaves room for.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kltune.core.kl.divergence import measure_tokens
from kltune.lm.fast.decoding import GROWTH, bytes_held
from kltune.lm.fast.lora import LoraLinear, speed_up
from kltune.lm.fast.lower_layers import LowerLayers
from kltune.lm.fast.memory import (
    CACHE,
    PASSES_PER_PIECE,
    PASSES_PER_SAMPLE,
    PIECES,
    ROWS_PER_PASS,
    TOKENS_PER_PASS,
    TRAINED_SHARE,
    TrainingRoom,
    pass_tokens,
    piece_of,
    training_room,
)
from kltune.lm.fast.shared_prefix import WORTH_IT, SharedPrefixes, attends_to_all, states_before
from kltune.lm.machine.device_memory import TRAINED_BYTES
from kltune.lm.machine.live_bytes import LiveBytes, traced
from kltune.lm.machine.sharding import layers_of, trunk_of
from kltune.lm.model.adapters.weights import POLICY
from kltune.lm.model.curvature import Fisher
from kltune.lm.model.network import ScalarHead
from kltune.lm.model.policy import Policy

ADAM = 8                # bytes a trained number of the optimizer's memory
DRAWN = 6 * 2**20       # what drawing tokens makes of a few rows of logits at a time


@dataclass(frozen=True)
class Rows:
    """So many rows of one shape, a prompt and a response of so many tokens; ``group`` neighbours share a prompt."""

    count: int
    prompt: int
    response: int
    group: int = 1

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.response

    def of(self, count: int) -> "Rows":
        """As many of the same shape."""
        return Rows(count, self.prompt, self.response, min(self.group, count))


@dataclass(frozen=True)
class Spread:
    """Bytes of the frozen layers where processes keep a piece of each (``lm/machine/sharding.py``).

    whole: of all layers. pieces: of a process's own. gathered: of one layer as it came, and cut into its tensors.
    """

    whole: int
    pieces: int
    gathered: int


class Footprint:
    """The memory of a policy on a device of so many bytes, by phase; phases in bytes above what is ``held``."""

    def __init__(self, policy: Policy, there: float, *, fraction: float, checkpoint_layers: str, device: str):
        """Take an ``empty_policy`` with all its adapters, for a type of device, as cpu.

        fraction, checkpoint_layers: as ``Policy.plan_memory``.
        """
        self.policy, self.there, self.planned, self.on_cpu = policy, there, fraction * there, device == "cpu"
        self.checkpoint_layers = checkpoint_layers
        speed_up(policy.model)
        self.trained = [*policy.trainable_parameters().values(), *policy.value_parameters().values()]
        network = policy.network
        trunk = trunk_of(network.causal)
        self._lower = {name: LowerLayers(trunk, name) for name in {None, policy.values_above}}
        network.stands_for = device
        with traced(1):
            found = training_room(network.causal, trunk if network.split else network.causal)
        numbers = sum(tensor.numel() for tensor in self.trained)
        room = self.planned - self.weights - TRAINED_BYTES * numbers
        self.room = TrainingRoom(room, found.per_token, found.per_square)

    @property
    def weights(self) -> int:
        """Bytes of all tensors of the model or models, adapters included; shared ones once."""
        return counted(*self._models())

    @property
    def merged(self) -> int:
        """Bytes of the layers with their adapter added in that a CPU samples with in float32."""
        layers = [module for module in self.policy.network.causal.modules() if isinstance(module, LoraLinear)]
        wanted = self.on_cpu and self.policy.dtype == torch.float32
        return sum(4 * layer.in_features * layer.out_features for layer in layers) if wanted else 0

    def held(self, *, optimizer: bool = True, copies: float = 0.0) -> int:
        """Bytes that are there all the time: weights and Adam's memory; copies: more bytes a trained number."""
        numbers = sum(tensor.numel() for tensor in self.trained)
        start = counted(self.policy.untrained)
        return self.weights + start + int(numbers * ((ADAM if optimizer else 0) + copies))

    def spread_over(self, processes: int) -> Spread:
        """The layers where they are spread over so many processes."""
        own = {id(tensor) for tensor in self.trained}
        layers = layers_of(self.policy.model)
        sizes = [counted([tensor for tensor in layer.parameters() if id(tensor) not in own]) for layer in layers]
        return Spread(sum(sizes), sum(math.ceil(size / processes) for size in sizes), 2 * max(sizes, default=0))

    def micro_rows(self, rows: Rows, sequences: int | None) -> tuple[int, bool]:
        """How many rows are trained on at once, as ``Batching.micro_batches`` has it, and whether layers are kept."""
        kept = self.checkpoint_layers
        fits = self.room.rows(rows.length)
        if sequences is None:
            tokens = min(TOKENS_PER_PASS // TRAINED_SHARE, self._piece(rows.count * rows.length, PASSES_PER_PIECE))
            most = min(tokens // rows.length, fits if kept != "always" else rows.count)
        else:
            most = sequences
        size = min(rows.count, max(1, most // rows.group) * rows.group)
        return size, kept == "always" or (kept == "auto" and size > fits)

    def training(
        self, rows: Rows, *, checkpointed: bool = False, scalar: bool = False, accumulates: bool = False,
        beside: int = 0, shares: bool = True,
    ) -> int:
        """A forward and backward pass over rows; ``scalar``: of one number a row, as a reward model's.

        accumulates: gradients of other rows are there, and these are added to them. beside: exact KLs that are read off
        with it, to the reference and to a teacher. shares: rows of one prompt may read it once.
        """
        network = self.policy.network
        for tensor in self.trained:
            tensor.grad = torch.empty_like(tensor) if accumulates else None
        there = counted([tensor.grad for tensor in self.trained])
        selected = rows.count if scalar else rows.count * rows.response
        way = network._layers.active() if checkpointed else self._shared(rows) if shares else nullcontext()
        with self._traced(selected) as live, way:
            ids, scored = shapes(rows)
            if scalar:
                values = self.policy.read(POLICY, ScalarHead(network.hidden_size).to("meta"), ids, scored)
            elif beside:
                with torch.no_grad():
                    states = network.before(ids, scored)
                others = [lambda part: network.logits(states[part])] * (beside - 1)
                values = torch.stack(
                    self.policy.logprobs_and_ref_kl(ids, scored, 1.0, *others, ref_states=torch.empty_like(states))
                )
            else:
                values = self.policy.logprobs(ids, scored)
            values.sum().backward()
        return live.peak - live.before + there

    def kept(self, rows: Rows, states: int) -> int:
        """What a rollout of rows keeps: so many hidden states at each token said, and what unadapted layers gave."""
        network = self.policy.network
        if not network.split:
            return 0
        lower = sum(self._goes_on(rows, adapter) for adapter in self._lower)
        cells = states * rows.count * rows.response + lower * rows.count * rows.length
        return cells * network.hidden_size * self.policy.dtype.itemsize

    def measuring(self, rows: Rows, *, by_token: bool = False) -> int:
        """Policy and reference over as many rows as go through at once, and exact KL a chunk of positions at a time.

        by_token: also what each token of the vocabulary adds, as ``eval-kl`` sums it.
        """
        network, policy = self.policy.network, self.policy
        tokens = min(TOKENS_PER_PASS, self._piece(rows.count * rows.length, PASSES_PER_PIECE))
        some = rows.of(min(rows.count, max(1, tokens // rows.length)))
        with self._traced(some.count * some.response) as live, torch.no_grad():
            ids, scored = shapes(some)
            with self._shared(some):
                mine = network.before(ids, scored)
                with policy.reference():
                    other = network.before(ids, scored)
            tokens = ids[scored][: network.chunk_rows]
            logits = [network.logits(states[: network.chunk_rows]) for states in (mine, other)]
            measure_tokens(*logits, tokens, 1.0, _Forgotten() if by_token else None)
        return live.peak - live.before + self.kept(rows, 0)

    def sampling(self, rows: Rows) -> int:
        """Reading prompts, and drawing all of their responses' tokens, as many side by side as there is room for."""
        _, logits, cache = self._reading(1, rows.prompt)
        each = bytes_held(cache) / rows.prompt      # a token's keys and values
        fit = int((self.planned - self.held()) / (CACHE * each * rows.length))
        most = min(ROWS_PER_PASS, fit, rows.count, self._piece(rows.count, PASSES_PER_SAMPLE))
        side_by_side = max(1, most // rows.group) * rows.group
        prompts = min(side_by_side // rows.group, max(1, TOKENS_PER_PASS // rows.prompt))
        reading, *_ = self._reading(prompts, rows.prompt)
        width = rows.prompt + math.ceil(rows.response / GROWTH) * GROWTH
        layers = max(1, len(cache.layers))
        cached = each * side_by_side * width * (1 + 1 / layers)
        said = 2 * side_by_side * self.policy.network.vocabulary * logits.element_size()
        begun = each * rows.prompt * side_by_side / rows.group * (1 + (prompts * rows.group < side_by_side) / layers)
        return int(max(reading + begun, cached + said + DRAWN))

    def _reading(self, prompts: int, tokens: int) -> tuple[int, Tensor, Cache]:
        """Bytes that reading so many prompts takes, logits after them, and the cache."""
        with self._traced(1) as live, torch.no_grad():
            logits, cache = self.policy.network.step(*shapes(Rows(prompts, tokens, 0), masks=False), None)
        return live.peak - live.before, logits, cache

    def curvature(self, rows: Rows, sequences: int | None) -> int:
        """Products with the Fisher matrix of rows, ``sequences`` at once, or as many as fit."""
        if sequences is None:
            one, two = (self._products(rows.of(count)) for count in (1, 2))
            sequences = 1 + max(0, int((self.room.bytes - one) / max(1, two - one)))
        return self._products(rows.of(min(rows.count, sequences)))

    def _products(self, rows: Rows) -> int:
        with self._traced(rows.count * rows.response, fused=False) as live:     # differentiated twice, it keeps squares
            fisher = Fisher(self.policy, *shapes(rows), 1.0, rows.count)
            own = list(self.policy.trainable_parameters().values())
            fisher(torch.empty(sum(tensor.numel() for tensor in own), device="meta"))
        return live.peak - live.before

    def _piece(self, size: int, passes: float) -> int:
        causal, device = self.policy.network.causal, "cpu" if self.on_cpu else "cuda"
        return piece_of(size, passes * pass_tokens(causal, device), PIECES if self.on_cpu else 1)

    def largest(self, rows: Rows, held: int, **kind: Any) -> int:
        """How many rows of this shape could be trained on at once in what is planned; 0: not one."""
        one, two = (self.training(rows.of(count * rows.group), **kind) for count in (1, 2))
        free = self.planned - held - one
        return 0 if free < 0 else rows.group * (1 + int(free / max(1, two - one)))

    def _models(self) -> list[Any]:
        networks = {id(one): one for one in (self.policy.network, self.policy.base_network)}
        models = [self.policy.model, *(network.causal for network in networks.values()), self.policy.value_head]
        return [[*model.parameters(), *model.buffers()] for model in models if model is not None]

    def _traced(self, selected: int, **ways: bool):
        known = self._models(), self.policy.untrained, [tensor.grad for tensor in self.trained]
        return traced(selected, *known, **ways)

    @contextmanager
    def _shared(self, rows: Rows) -> Iterator[None]:
        """Within: rows of one prompt read it once, where a run would do so."""
        network = self.policy.network
        if self._read_share(rows) < 1.0 and not self._goes_on(rows):
            network.fast = _OnePrompt(network.causal.base_model, rows, rows.count // rows.group)
        try:
            yield
        finally:
            network.fast = None

    def _goes_on(self, rows: Rows, adapter: str | None = None) -> bool:
        """Whether passes over rows go on from what unadapted layers gave, as ``FastWays.lower_states`` decides."""
        lower = self._lower[adapter]
        return self.policy.network.split and lower.there and lower.share_above < self._read_share(rows)

    def _read_share(self, rows: Rows) -> float:
        """Share of the tokens of rows that is read where rows of one prompt read it once; 1 where that does not pay."""
        network = self.policy.network
        share = (rows.count // rows.group * rows.prompt + rows.count * rows.response) / (rows.count * rows.length)
        shared = network.split and attends_to_all(network.causal.config.get_text_config())
        return share if rows.group > 1 and shared and WORTH_IT * share <= 1.0 else 1.0


@dataclass(frozen=True)
class _OnePrompt:
    """Stands for the fast ways of a network whose rows share their prompts."""

    trunk: Callable
    rows: Rows
    prompts: int

    def states_before(self, ids: Tensor, scored: Tensor) -> Tensor:
        """As ``FastWays.states_before``, of shapes."""
        rows = self.rows
        return states_before(self.trunk, SharedPrefixes(
            prompts=ids[: self.prompts, : rows.prompt],
            prompt_lengths=ids.new_empty(self.prompts), owner=ids.new_empty(rows.count),
            responses=ids[:, : rows.response - 1], scored=scored[:, : rows.response],
        ))


class _Forgotten:
    """Stands for sums over the vocabulary, which are on the CPU."""

    def add(self, by_token: tuple[Tensor, ...]) -> None:
        """Nothing."""


def shapes(rows: Rows, *, masks: bool = True) -> tuple[Tensor, ...]:
    """Token ids and which of them are scored, or for reading prompts also mask and places; of shapes alone. [B, S]."""
    ids = torch.empty(rows.count, rows.length, dtype=torch.long, device="meta")
    if masks:
        return ids, torch.empty_like(ids, dtype=torch.bool)
    return ids, torch.ones_like(ids), torch.empty_like(ids)


def counted(*what: Any) -> int:
    """Bytes of the tensors in nested containers, shared memory once."""
    live = LiveBytes()
    live.count(*what)
    return live.now
