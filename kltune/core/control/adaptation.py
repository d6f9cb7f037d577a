"""How long a trust-region step should be when most of a batch's gradient is noise.

A natural-gradient step follows the noise of its batch as gladly as the score, so that the next batch finds only a
small part of what the surrogate promised (a language model of 260,000 parameters, 128 responses, at 3.4 nats: 0.06
against 0.9 score per √nat). The KL is paid for in full all the same: a step of KL(old ‖ new) = δ in a direction that
means nothing takes the policy δ further from its reference. With a true gain of ``rate`` along the step

    gain(δ) = rate · √(2δ) − β · δ      is largest at      δ* = ½ (rate / β)²

so a step should be long while the reward is far from exhausted and a nat is cheap, and short near the optimum.

The observed gain is skewed where few responses are paid: those of the next batch seldom look like those of the last, so
that most observations are a little below 0 and the few others far above. A mean of five of them then says "no gain" at
nearly every step. (1 in 100 paid: steps of 0.004 nats where 0.2 were allowed, and a target of 3 ended at 1.9.) So far
below a target, where no price has to be held yet, nobody asks this.

Source: derived and measured for this project; docs/trpo.md.
"""

import math
from dataclasses import dataclass, replace

from kltune.core.control.trust_region import SearchResult

RATE_MEMORY = 0.8  # share of the running mean that a new observation leaves
FIRST_SEEN = 3  # observations before the mean is believed: one has an error as large as itself
LEAST_SHARE = 0.02  # of the largest radius: a step has to be made for the next batch to say anything
FIRST_DAMPING = 100.0  # of the mean curvature; the literature's 0.1 crawls on a language model (docs/maths.md 14)
LEAST_DAMPING = 1e-4  # of the mean curvature: below it, directions without any take the step over (docs/maths.md 16)


@dataclass(frozen=True)
class AdaptiveRadius:
    """How long the next trust-region step may be, by what fresh batches said of the steps before.

    total, seen: the mean's sum, weights falling by ``RATE_MEMORY``, score per √nat; and how many observations it has.
    step_kl: KL(old ‖ new) of the last step, nats per response; 0 where there was none.
    """

    total: float = 0.0
    seen: int = 0
    step_kl: float = 0.0

    @property
    def rate(self) -> float | None:
        """True gain per unit of √(2δ), score per √nat; None before the first observation."""
        return self.total / (1.0 - RATE_MEMORY**self.seen) if self.seen else None

    def allowed(self, most: float, beta: float) -> float:
        """The KL(old ‖ new) to allow the next step, nats per response.

        Args:
            most: never more than this.
            beta: price of a nat, 0 or above.
        """
        if self.seen < FIRST_SEEN or beta <= 0.0:
            return most
        best = 0.5 * (max(self.rate, 0.0) / beta) ** 2
        return min(most, max(best, LEAST_SHARE * most))

    def stepped(self, step_kl: float) -> "AdaptiveRadius":
        """After a step of this size; 0 says that none was made."""
        return replace(self, step_kl=step_kl)

    def observed(self, slope: float, beta: float) -> "AdaptiveRadius":
        """What responses of the new policy say of the last step.

        Their gradient along it knows nothing of the noise that the step followed. At its end the step has paid for
        itself, which is added back:  rate = slope / √(2δ) + β √(2δ).

        Args:
            slope: gradient of the objective at the new policy, times the step. Unit of score.
            beta: price of a nat in that objective.
        """
        if self.step_kl <= 0.0:
            return self
        length = math.sqrt(2.0 * self.step_kl)
        rate = slope / length + beta * length
        return replace(self, total=RATE_MEMORY * self.total + (1.0 - RATE_MEMORY) * rate, seen=self.seen + 1)

    def fresh_gain(self, slope: float, beta: float) -> float:
        """The last step's gain in the objective as new responses see it, rate · √(2δ) − β · δ; unit of score."""
        return slope + beta * self.step_kl


@dataclass(frozen=True)
class Damping:
    """λ, what is added to the curvature: a multiple of the mean curvature tr F / P, so that it has no unit.

    It follows how well the quadratic model foretells a step (Levenberg-Marquardt):

        the step was refused, or cut below half:   relative ← 2 · relative
        the first try was accepted:                relative ← relative / 1.3

    There is no ceiling: most of an adapter's P directions have no curvature at all, which makes tr F / P small, and
    hundreds of it are what works on a real model. With ``adapts`` False it stays as it is.

    Source: docs/maths.md 14.
    """

    relative: float
    adapts: bool

    def updated(self, result: SearchResult, first_scale: float) -> "Damping":
        """The damping for the next step.

        Args:
            result: of this step's line search; a step that only the cap cut short says nothing of the curvature.
            first_scale: the length that was tried first, above 0.
        """
        of_curvature = all(trial.within_cap for trial in result.trials)
        if not (self.adapts and of_curvature):
            return self
        if result.scale < 0.5 * first_scale:
            return replace(self, relative=2.0 * self.relative)
        if len(result.trials) == 1:
            return replace(self, relative=max(self.relative / 1.3, LEAST_DAMPING))
        return self
