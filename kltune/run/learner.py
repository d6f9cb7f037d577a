"""All that training changes, and so all that a checkpoint holds."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from kltune.core.controllers import Controller
from kltune.lm.optim import set_learning_rate
from kltune.lm.policy import Policy
from kltune.lm.scorers import Scorer
from kltune.run.checkpoint import load_optimizer, optimizer_tensors, read_state


@dataclass
class Learner:
    """A policy in training. The optimizers hold exactly the policy's and the value function's own tensors."""

    policy: Policy
    optimizer: Optimizer
    value_optimizer: Optimizer | None
    controller: Controller
    scorer: Scorer

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What an exact resume needs besides the adapter itself."""
        named = {"optimizer": optimizer_tensors(self.optimizer, self.policy.trainable_parameters())}
        if self.value_optimizer is not None:
            values = self.policy.value_parameters()
            named |= {"value": dict(values), "value_optimizer": optimizer_tensors(self.value_optimizer, values)}
        return named

    def state(self) -> dict[str, Any]:
        """The rest, as plain values."""
        return {"controller": asdict(self.controller), "scorer": self.scorer.state()}

    def restore(self, checkpoint: Path) -> None:
        """Go on exactly from what ``tensors``, ``state`` and the adapter of a checkpoint say."""
        tensors, state = read_state(checkpoint)
        self.policy.load_adapter(checkpoint)
        load_optimizer(self.optimizer, self.policy.trainable_parameters(), tensors["optimizer"])
        if self.value_optimizer is not None:
            values = self.policy.value_parameters()
            self.policy.load_value_parameters(tensors["value"])
            load_optimizer(self.value_optimizer, values, tensors["value_optimizer"])
        self.controller = replace(self.controller, **state["controller"])
        self.scorer = self.scorer.restored(state["scorer"])

    def set_learning_rates(self, policy_lr: float, value_lr: float) -> None:
        """Use these from the next step on."""
        set_learning_rate(self.optimizer, policy_lr)
        if self.value_optimizer is not None:
            set_learning_rate(self.value_optimizer, value_lr)
