"""What a device holds, and so how many sequences may be trained on or sampled side by side.

Planned from the device's whole memory, never from what happens to be free: two runs of one recipe on one machine must
cut their batches alike, or they differ in the last bits and a resumed run is no longer the one that was stopped.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

SHARE = 0.8             # of the memory is planned with; the rest is for kernels, fragments and other processes
TRAINED_BYTES = 16      # float32 gradient and Adam's moments per trained number; in full fine-tuning the frozen copy
BACKWARD = 1.7          # times what a forward pass saves: the peak of the backward pass over it
CACHE = 1.5             # times the keys and values: room to grow, and a layer's copy while rows are dropped
PROBE = 32              # tokens
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container: v2, v1


def micro_batches(lengths: Sequence[int], most: Callable[[int], int], cost: float) -> list[list[int]]:
    """Cut a batch into parts of similar lengths, so that padding and the number of parts cost least together.

    Args:
        lengths: tokens of each row.
        most: how many rows of a length may be in one part; a part holds at least one.
        cost: of a part, in tokens.

    Returns:
        Places in ``lengths``, for each part; the longest first, so that what does not fit in memory fails at once.
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


class Parts:
    """A batch in parts of similar lengths, each trimmed to its longest row: iterates over (ids, scored)."""

    def __init__(self, ids: Tensor, scored: Tensor, rows: Sequence[Sequence[int]]):
        """Take a batch, [B, S] each, and the rows of each part."""
        self._scored = scored
        self._rows = [torch.tensor(part, device=ids.device) for part in rows]
        self._parts = []
        for part in self._rows:
            end = _width(scored[part])
            self._parts.append((ids[part, :end], scored[part, :end]))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def in_order(self, found: Tensor) -> Tensor:
        """Numbers (or vectors) of the scored tokens, one part after the other -> row by row of the batch. [N, ...]."""
        number = self._scored.flatten().cumsum(0).view_as(self._scored) - 1  # of each scored token in the batch
        places = torch.cat([number[part][self._scored[part]] for part in self._rows])
        return torch.empty_like(found).index_copy_(0, places, found)


def _width(scored: Tensor) -> int:
    return int(scored.nonzero()[:, 1].max()) + 1


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


def training_room(model: nn.Module, trained: nn.Module) -> TrainingRoom:
    """Measure what a model keeps for its backward pass, on three small batches.

    Args:
        model: with what is trained of it.
        trained: the part of it that training runs.
    """
    device = next(model.parameters()).device
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def saved(rows: int, length: int) -> int:
        ids = torch.zeros(rows, length, dtype=torch.long, device=device)
        return saved_bytes(lambda: trained(input_ids=ids, use_cache=False)[0], own)

    with torch.random.fork_rng():  # an adapter's dropout draws
        one = saved(1, PROBE)
        per_row = saved(2, PROBE) - one     # what does not grow with the rows, as weights with an adapter added, is out
        long = saved(1, 2 * PROBE)
    per_square = max(0.0, (long - one - per_row) / (2 * PROBE**2))
    per_token = per_row / PROBE - per_square * PROBE
    return TrainingRoom(free_bytes(model, device), BACKWARD * per_token, BACKWARD * per_square)


def cached_rows(model: nn.Module, per_token: float, tokens: int) -> int:
    """How many sequences' keys and values fit beside a model: so many bytes a token, so many tokens each."""
    device = next(model.parameters()).device
    return int(free_bytes(model, device) / (CACHE * max(1.0, per_token) * tokens))


def free_bytes(model: nn.Module, device: torch.device) -> float:
    """What is planned to be left of a device beside a model and its optimizer; may be negative.

    Other models on the device, as a reward model with weights of its own, are not known here.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    trained = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    return SHARE * device_bytes(device) - weights - TRAINED_BYTES * trained


def device_bytes(device: torch.device) -> int:
    """All the memory of a device; on the CPU what the machine or its container has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    limits = [Path(path).read_text().strip() for path in CGROUPS if os.path.exists(path)]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(int(limit) for limit in limits if limit != "max")])


def saved_bytes(work: Callable[[], Tensor], without: set[int] = frozenset()) -> int:
    """What autograd keeps of some work for a backward pass, memory that several tensors share counted once.

    Args:
        work: builds a graph.
        without: addresses of memory that is there anyway, as the weights'.
    """
    kept: dict[int, Tensor] = {}  # the tensors themselves, or their memory would be used again and counted as theirs

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in without:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = work()
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del graph
    return found
