"""The shape contract, and the frozen dataclasses that travel between rooms.

Letters: B responses, S length of the longest sequence, T length of the longest response, N scored tokens, V vocabulary.

Sequences are right-padded and contiguous: the prompt, then at once its response, then padding. A causal model never
looks ahead, so teacher forcing needs no attention mask and padding cannot change a number. ``scored`` [B, S] is True
where a token's log-probability is wanted; token i is predicted from position i − 1.

Per-token tensors of a rollout are [B, T], right-padded, float32 and exactly 0 outside ``response_mask``, which includes
the first end token and nothing after it and is built from lengths, never from ``ids != pad``. ``logprobs[b, t]`` is the
log-probability of response token t under the distribution it was sampled from: same temperature, nothing cut off.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kltune.core import ranks
from kltune.core.kl.divergence import VocabularySums
from kltune.lm.data.examples import Prompt
from kltune.lm.data.forms import Message

ROWS = 16       # that go through a model at once where nothing says how many fit


def pad_right(rows: Sequence[Sequence[int]], pad: int | bool, dtype: torch.dtype = torch.long) -> Tensor:
    """Stack rows of unequal length into [B, S], filled up on the right with ``pad``."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], dtype=dtype)


def response_scatter(flat: Tensor, response_mask: Tensor) -> Tensor:
    """Lay N per-token numbers (or vectors) out as [B, T], 0 outside the mask; row by row, as ``scored`` selects."""
    laid_out = torch.zeros(*response_mask.shape, *flat.shape[1:], dtype=flat.dtype, device=flat.device)
    return laid_out.masked_scatter(response_mask.view(*response_mask.shape, *[1] * (flat.dim() - 1)), flat)


@dataclass(frozen=True)
class Samples:
    """Responses as the sampler drew them.

    ids: prompt and response tokens. [B, S] int64.
    scored: True on response tokens. [B, S] bool.
    response_mask: the same tokens, counted from the start of the response. [B, T] bool.
    prompt_index: which prompt of the batch a response answers. [B] int64.
    truncated: True where the response reached the length limit before an end token. [B] bool.
    logprobs: as the sampler saw them, to hold against teacher forcing. [B, T].
    prompts, responses: what was said, as text. messages: of each prompt, () where it is plain text. asked: the prompt
    of each response with all that its row holds; () where that is not known.
    """

    ids: Tensor
    scored: Tensor
    response_mask: Tensor
    prompt_index: Tensor
    truncated: Tensor
    logprobs: Tensor
    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    messages: tuple[tuple[Message, ...], ...] = field(default=(), kw_only=True)
    asked: tuple[Prompt, ...] = field(default=(), kw_only=True, repr=False)

    @property
    def lengths(self) -> Tensor:
        """Tokens per response, the end token included. [B] int64."""
        return self.response_mask.sum(dim=1)


@dataclass(frozen=True)
class Rollout(Samples):
    """Responses and all that was measured on them by teacher forcing; every tensor below is [B, T].

    logprobs, ref_logprobs: of the sampled tokens under policy and reference.
    ref_kl: exact KL(policy ‖ reference) at each position, over the whole vocabulary; None where not measured.
    entropy, ref_entropy: of the next-token distributions; None where not measured.
    log_ratio_variance: of log π − log π_ref under π at each position, nats²; None where not measured.
    values: what the value function expected before each token; None without one.
    value_states: the hidden states that a value head alone reads it off, [B, T, H]; None without one.
    states, ref_states: those that policy and reference were measured by, where they are kept; [B, T, H] each.
    lower: ``Network.lower_states``, from which passes over these sequences go on; [B, S, H], None without.
    value_lower: the same for the value function's own, ``Policy.lower_of_values``.
    sums: what each token of the vocabulary adds to ref_kl; None where that was not asked for.
    rounding: KL of whoever responded, as it sampled, to itself as it was measured, by k3: what is no change of weights.
    """

    ref_logprobs: Tensor
    ref_kl: Tensor | None
    entropy: Tensor | None
    ref_entropy: Tensor | None
    log_ratio_variance: Tensor | None
    values: Tensor | None = None
    value_states: Tensor | None = None
    states: Tensor | None = None
    ref_states: Tensor | None = None
    lower: Tensor | None = None
    value_lower: Tensor | None = None
    sums: VocabularySums | None = None
    rounding: Tensor | None = None

    def kept(self, name: str) -> Tensor | None:
        """One of the hidden states at the scored tokens, row by row. [N, H]; None where they were not kept."""
        states = getattr(self, name)
        return None if states is None else states[self.response_mask]

    def minibatches(self, size: int, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """So many rows at a time, in random order; the responses to one prompt stay together, for they share it."""
        owner = self.prompt_index
        place = np.argsort(rng.permutation(int(owner.max()) + 1))
        return torch.from_numpy(place).to(owner.device)[owner].argsort(stable=True).split(size)

    def select(self, rows: Tensor) -> "Rollout":
        """The rollout of some rows only, cut to the longest sequence among them."""
        seq = _width(self.scored[rows])
        longest = int(self.lengths[rows].max())
        cut = {"ids": seq, "scored": seq, "lower": seq, "value_lower": seq}
        chosen = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor):
                value = value[rows]
                chosen[one.name] = value[:, : cut.get(one.name, longest)] if value.dim() > 1 else value
            elif isinstance(value, tuple):
                chosen[one.name] = tuple(value[i] for i in rows.tolist()) if value else value
        return replace(self, **chosen)


class Parts:
    """A batch in parts of similar lengths, each trimmed to its longest row: (ids, scored), by number."""

    def __init__(self, ids: Tensor, scored: Tensor, rows: Sequence[Sequence[int]]):
        """Take a batch, [B, S] each, and the rows of each part."""
        self._scored = scored
        self._rows = [torch.tensor(part, device=ids.device) for part in rows]
        self._parts = []
        for part in self._rows:
            end = _width(scored[part])
            self._parts.append((ids[part, :end], scored[part, :end]))

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        return self._parts[place]

    def over(self, work: Callable[[int], ranks.Row]) -> ranks.Row:
        """What ``work`` makes of each part's scored tokens, in the order of the batch; each process does its share.

        work: from the number of a part to numbers (or vectors) of its scored tokens, or None. [n, ...] each.
        """
        return self.joined(self.spread(work))

    def spread(self, work: Callable[[int], ranks.Row]) -> list[ranks.Row]:
        """What ``work`` makes of each part, by its number."""
        return ranks.spread(range(len(self)), work, [ids.numel() for ids, _ in self._parts])

    def rows_of(self, values: Tensor | None, place: int) -> Tensor | None:
        """What there is of each token of the batch, [B, S, ...], of a part's: trimmed as it is; None of None."""
        return None if values is None else values[self._rows[place], : self._parts[place][0].shape[1]]

    def rows_joined(self, values: Sequence[Tensor]) -> Tensor:
        """What ``rows_of`` would give of each part, as one in the order of the batch; 0 where none has any."""
        whole = values[0].new_zeros(*self._scored.shape, *values[0].shape[2:], device=self._scored.device)
        for rows, some in zip(self._rows, values, strict=True):
            whole[rows, : some.shape[1]] = some.to(whole.device)
        return whole

    def joined(self, rows: Sequence[ranks.Row]) -> ranks.Row:
        """Numbers of scored tokens by part, as one column each in the order of the batch."""
        device, columns = self._scored.device, zip(*rows, strict=True)
        return tuple(None if some[0] is None else self.in_order(torch.cat(some).to(device)) for some in columns)

    def in_order(self, values: Tensor) -> Tensor:
        """Numbers (or vectors) of scored tokens, part after part, put back in the order of the batch. [N, ...]."""
        return torch.empty_like(values).index_copy_(0, torch.cat(self._places()), values)

    def pieces(self, values: Tensor) -> list[Tensor]:
        """Numbers (or vectors) of scored tokens in the order of the batch, by part: what ``joined`` put there."""
        return [values[places] for places in self._places()]

    def _places(self) -> list[Tensor]:
        """Where the scored tokens of each part are among those of the batch."""
        number = self._scored.flatten().cumsum(0).view_as(self._scored) - 1  # of each scored token in the batch
        return [number[part][self._scored[part]] for part in self._rows]


def _width(scored: Tensor) -> int:
    return scored.shape[1] if scored.is_meta else int(scored.nonzero()[:, 1].max()) + 1


class FixedRows:
    """Cuts batches into parts of as many rows each, as they come: what ``fast.memory.Batching`` does better."""

    checkpoint_layers = "auto"

    def lengths(self, ids: Tensor, scored: Tensor) -> list[int]:
        """Tokens of each row, padding included."""
        return [ids.shape[1]] * len(ids)

    def to_read(self, ids: Tensor, scored: Tensor) -> list[list[int]]:
        """Rows in parts that go through the trunk at once."""
        return self.micro_batches(self.lengths(ids, scored), None)

    def micro_batches(
        self, lengths: Sequence[int], sequences: int | None, group: int = 1, most: int | None = None
    ) -> list[list[int]]:
        """Places in ``lengths``, for each part."""
        size = max(1, (sequences or ROWS) // group)
        return [list(range(len(lengths))[start : start + size]) for start in range(0, len(lengths), size)]

    def trained_rows(self, length: int) -> int:
        """Rows whose graphs may be in memory at once."""
        return ROWS

    def rows_of(self, work: Callable[[Tensor], Any], peak: float, length: int) -> int:
        """Rows whose graphs of other work may be in memory at once."""
        return max(1, ROWS // 4)

    def sampled_rows(self, tokens: int, rows: int) -> int:
        """Responses sampled side by side."""
        return ROWS

    def too_large(self, ids: Tensor) -> bool:
        """Whether a backward pass is known not to fit."""
        return False
