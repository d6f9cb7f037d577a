"""The value function as a part of a learner: on the policy's frozen trunk, with tensors and an optimizer of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor
from torch.optim import Optimizer

from kltune.core.objectives.advantages import spread
from kltune.core.objectives.losses import clipped_value_loss
from kltune.lm.model.batches import response_scatter
from kltune.lm.model.policy import Policy
from kltune.recipe import OptimSection
from kltune.run.optimizer import accumulate, guarded_step
from kltune.train.experience import Experience
from kltune.train.learner import VALUES, Learner


@dataclass(frozen=True)
class ValueFunction:
    """It shares frozen weights with the policy and no trainable ones, so fitting it cannot move the policy.

    It counts in standard deviations of the run's first scores, from their mean. A head that starts at 0 says then what
    was to be expected, and no constant on all scores, nor their unit, changes anything. (With a head at 0 and a mean
    score of 5, λ < 1 makes every late token look good and every early one bad; half of the gain was lost.)

    mean, sd: of the first scores; None until there are some that differ.
    """

    policy: Policy
    mean: float = 0.0
    sd: float | None = None
    moves: ClassVar[bool] = True

    def started(self, scores: Tensor) -> Self:
        """With the unit that the first scores give it; itself once it has one."""
        if self.sd is not None:
            return self
        return replace(self, mean=scores.double().mean().item(), sd=spread(scores) or None)

    @property
    def unit(self) -> tuple[float, float]:
        """(mean, sd) of the scores that it counts in, unit of score."""
        return self.mean, self.sd or 1.0

    def step(
        self, optimizer: Optimizer, part: Experience, optim: OptimSection, *, clip_range: float, coef: float
    ) -> tuple[float, float]:
        """One step towards the returns of a minibatch.

        A head alone is fitted to the hidden states that its values were read off, so that it takes no pass of its own.

        Args:
            optimizer: of the value function.
            part: the minibatch.
            optim: limit on the gradient's norm, and rows in memory at once.
            clip_range: how far a value may gain from moving, in standard deviations of the first scores; ∞: any.
            coef: factor of the loss.

        Returns:
            (loss, in squared standard deviations of the first scores; norm of the gradient before clipping).
        """
        tokens = int(part.rollout.response_mask.sum())

        def one(micro: Tensor) -> tuple[Tensor, ...]:
            piece = part.select(micro)
            old, mask = piece.rollout, piece.rollout.response_mask
            states = old.value_states
            alone = states is not None
            flat = (
                self.policy.value_head(states[mask]) if alone
                else self.policy.values(old.ids, old.scored, old.value_lower)
            )
            values = response_scatter(flat, mask)
            loss = clipped_value_loss(values, old.values, piece.returns, mask, clip_range, tokens)
            return coef * loss, loss

        micros = self.policy.micro_batches(part.rollout, optim.micro_batch_size)
        told = accumulate(self.policy.network, self.policy.value_parameters().values(), micros, one, "value function")
        total = sum(loss.item() for _, loss in told)
        return total, guarded_step(optimizer, optim.max_grad_norm, "value function")

    def state(self) -> Mapping[str, Any]:
        """See ``Part.state``."""
        return {"mean": self.mean, "sd": self.sd}

    def tensors(self) -> Mapping[str, Tensor]:
        """See ``Part.tensors``."""
        return self.policy.value_parameters()

    def restored(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See ``Part.restored``."""
        self.policy.load_value_parameters(dict(tensors))
        return replace(self, **state)


def unit_of_values(learner: Learner) -> tuple[float, float]:
    """(mean, sd) of the scores that a learner's value function counts in; (0, 1) where it has none."""
    return learner.parts[VALUES].unit if VALUES in learner.parts else (0.0, 1.0)
