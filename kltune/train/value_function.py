"""The value function as a part of a learner: on the policy's frozen trunk, with tensors and an optimizer of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor
from torch.optim import Optimizer

from kltune.core.objectives.losses import clipped_value_loss
from kltune.lm.model.batches import response_scatter
from kltune.lm.model.policy import Policy
from kltune.recipe import OptimSection
from kltune.run.optimizer import guarded_step
from kltune.train.experience import Experience

VALUES = "value"     # the name of the part, and of its optimizer


@dataclass(frozen=True)
class ValueFunction:
    """It shares frozen weights with the policy and no trainable ones, so fitting it cannot move the policy."""

    policy: Policy
    moves: ClassVar[bool] = True

    def step(
        self, optimizer: Optimizer, part: Experience, optim: OptimSection, *, clip_range: float, coef: float
    ) -> tuple[float, float]:
        """One step towards the returns of a minibatch.

        A head alone is fitted to the hidden states that its values were read off, so that it takes no pass of its own.

        Args:
            optimizer: of the value function.
            part: the minibatch.
            optim: limit on the gradient's norm, and rows in memory at once.
            clip_range: how far a value may gain from moving, unit of score; ∞ for no limit.
            coef: factor of the loss.

        Returns:
            (loss, unit of score squared; norm of the gradient before clipping).
        """
        tokens = int(part.rollout.response_mask.sum())
        total = 0.0
        for micro in self.policy.micro_batches(part.rollout, optim.micro_batch_size):
            piece = part.select(micro)
            old, mask = piece.rollout, piece.rollout.response_mask
            states = old.value_states
            flat = self.policy.values(old.ids, old.scored) if states is None else self.policy.value_head(states[mask])
            values = response_scatter(flat, mask)
            loss = clipped_value_loss(values, old.values, piece.returns, mask, clip_range, tokens)
            (coef * loss).backward()
            total += loss.item()
        return total, guarded_step(optimizer, optim.max_grad_norm, "value function")

    def state(self) -> Mapping[str, Any]:
        """See ``Part.state``."""
        return {}

    def tensors(self) -> Mapping[str, Tensor]:
        """See ``Part.tensors``."""
        return self.policy.value_parameters()

    def restored(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See ``Part.restored``."""
        self.policy.load_value_parameters(dict(tensors))
        return self
