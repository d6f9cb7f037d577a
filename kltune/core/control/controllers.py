"""The price of a nat, steered so that KL(policy ‖ reference) reaches a target and stays there.

Every controller is frozen and small: ``updated`` returns the next one, ``asdict`` is its whole state, and β is always
within [beta_min, beta_max]. All see the same two numbers once per step, *before* the batch is priced, so that the price
answers the very samples it is put on: the measured KL and the target, both in nats per response.

A batch below the target that nothing drives away says nothing, neither of what a nat is worth nor of how fast the KL
comes: no controller hears of it. (Of a reward that hardly one of the first 15 batches earned they left a thirtieth of
the price: the KL went to 1.4 of its target.)
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

NEAR = 0.7     # of the target: on the way up the price is steeper below
CLIMB = 3.0         # times as steep, in addition
FAR_ABOVE = 1.3     # times the target: no noise, so that the integral may answer at once
ARRIVED = 0.9   # of the target: from here on the integral corrects what is left
FIRST_STEPS = 4     # before as many, the course of the KL says nothing
NEAR_GAIN = 1.4     # by the steps that the KL took to come near: the most that the integral's gain may be
PLAN_GAIN = 10.0    # by the steps that the KL may take to arrive: the same before it has
INTEGRAL_LIMIT = 3.0    # either way: 20 times the feed-forward, or a twentieth


class Controller(Protocol):
    """What a stage needs of a controller; a price that is fixed cannot be raised."""

    beta: float

    def updated(self, ref_kl: float, target: float, *, pull: float, responses: int) -> Self:
        """The controller, and its price, for a batch.

        Args:
            ref_kl: measured KL(policy ‖ reference) of the batch, nats per response.
            target: where it should be, nats per response.
            pull: what drives the policy away, score per √nat: an ideal policy stays at the KL where a nat costs
                pull / √(2·KL). Of scores it is their standard deviation among responses to one prompt, under the
                policy as it is; of anything else see ``pull_at``.
            responses: responses in the batch.

        Raises:
            ValueError: ``ref_kl`` or ``pull`` is not finite, or ``target`` is not above 0.
        """
        ...

    def at_bottom(self) -> bool:
        """Whether the price cannot come down any further."""
        ...

    def raised(self, factor: float, least: float) -> Self:
        """The controller once a cap on the KL has been met: the price times ``factor``, and at least ``least``.

        ``least`` (score per nat) is for a price so low, or 0, that no factor would bring it up in time.
        """
        ...


@dataclass(frozen=True)
class FixedBeta:
    """The price stays; the KL goes where it goes."""

    beta: float

    def updated(self, ref_kl: float, target: float, *, pull: float, responses: int) -> "FixedBeta":
        """See ``Controller.updated``; the price stays."""
        return self

    def at_bottom(self) -> bool:
        """See ``Controller.at_bottom``."""
        return True


@dataclass(frozen=True)
class Ziegler:
    """The published adaptive penalty: integral action on log β, slow and calm.

        e = clip(KL / target − 1, −0.2, 0.2),    β ← β (1 + e · responses / horizon)

    With ``beta`` None the first batch whose scores differ sets it to the feed-forward σ/√(2·target); until then it is
    ``beta_min``. The multiplier is kept above 0.1: at more than five horizons per batch the published formula turns
    negative.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2, and its code.
    """

    beta: float | None
    horizon: int
    beta_min: float
    beta_max: float
    waiting: bool = False

    def updated(self, ref_kl: float, target: float, *, pull: float, responses: int) -> "Ziegler":
        """See ``Controller.updated``."""
        _check(ref_kl, target, pull)
        if self.beta is None or self.waiting:
            return _started(self, pull, target)
        if _says_nothing(ref_kl, target, pull):
            return self
        error = min(max(ref_kl / target - 1.0, -0.2), 0.2)
        return replace(self, beta=_bounded(self.beta * max(0.1, 1.0 + error * responses / self.horizon), self))

    def at_bottom(self) -> bool:
        """See ``Controller.at_bottom``."""
        return self.beta is not None and self.beta <= self.beta_min

    def raised(self, factor: float, least: float) -> "Ziegler":
        """See ``Controller.raised``."""
        return replace(self, beta=_bounded(max(factor * (self.beta or 0.0), least), self), waiting=False)


@dataclass(frozen=True)
class Dual:
    """Dual ascent on log β, as if KL ≤ target were a constraint with a Lagrange multiplier.

        log β ← log β + lr · clip(KL / target − 1, −1, 1)

    Source: the log form of Rezende & Viola 2018, arXiv 1810.00597 (GECO); Haarnoja et al. 2018, arXiv 1812.05905.
    """

    beta: float | None
    lr: float
    beta_min: float
    beta_max: float
    waiting: bool = False

    def updated(self, ref_kl: float, target: float, *, pull: float, responses: int) -> "Dual":
        """See ``Controller.updated``."""
        _check(ref_kl, target, pull)
        if self.beta is None or self.waiting:
            return _started(self, pull, target)
        if _says_nothing(ref_kl, target, pull):
            return self
        error = min(max(ref_kl / target - 1.0, -1.0), 1.0)
        return replace(self, beta=_bounded(self.beta * math.exp(self.lr * error), self))

    def at_bottom(self) -> bool:
        """See ``Controller.at_bottom``."""
        return self.beta is not None and self.beta <= self.beta_min

    def raised(self, factor: float, least: float) -> "Dual":
        """See ``Controller.raised``."""
        return replace(self, beta=_bounded(max(factor * (self.beta or 0.0), least), self), waiting=False)


@dataclass(frozen=True)
class LogPI:
    """Proportional-integral control of log β around a running feed-forward, with look-ahead.

        β = σ / √(2·target) · exp(kp · e + I),     e = log(ahead / target), −3 … 1.5; on the way up steeper
        ahead = KL + look_ahead · slope,           I ← I + gain · min(KL / target − 1, 1.5)

    σ, the spread of the score among answers to one prompt, is measured under the policy *as it is* and smoothed: when
    the rewarded thing is rare under the reference, its spread there says nothing of the spread the policy will meet.
    The feed-forward is the price at which exp(score/β) tilts a Gaussian by ``target`` nats.

    kp is low on purpose. Near the target the score's gradient and the price's nearly cancel, and an optimizer
    that normalises its step (Adam, whitened advantages) makes a full-sized step of whatever is left: one step with a
    wrong price moves the KL as far as any. A gain of 1 then makes the KL swing by ± 20-40 % with a period of 2 to 4
    steps, 0.5 by ± 10 %. Look-ahead is for momentum, which keeps moving the KL for some optimizer updates whatever the
    price: it matters with one update per step and is nothing with sixteen, so it is given in updates.

    The integral removes what offset the feed-forward leaves. On the way up there is none to remove, only a distance:
    until the KL has arrived (0.9 of the target) the integral moves only where the KL would come too late, after
    ``plan`` steps, if it went on as it has so far, with a gain of ki, or 10 by the plan where that is less. What it
    gathers until the KL is near (0.7) is hurry: a price that makes a KL hurry is not the one that holds it, so hurry
    counts for no more than is left of the last 0.3. (Kept whole, it took a small model from 4 nats to 6 before the
    price was back.) Once arrived, the gain is ki, or 1.4 by the steps that it took to come near where that is less:
    what took long to come up takes long to answer. But no more than half of ``plan`` counts: a run of which little is
    left would end before its price had moved. (A heavy tail's last third lay at .8 of its target.) Far above the target
    it is twice that.
    With ``fixed_feed_forward`` the recipe's own β takes the place of σ / √(2·target). A β to begin with is kept: the
    first batch makes an integral of what lies between it and the feed-forward.

    State: pull (smoothed σ), level (last KL), slope (smoothed, nats per step), recent and before (means of the KL over
    about the last eighth and the last half of the steps), near (after so many steps; 0: not yet), arrived, left (of the
    last 0.3 of the way, the least so far), hurry, integral, steps seen.

    Source: derived and measured for this project; see docs/kl-control.md.
    """

    beta: float | None
    kp: float
    ki: float
    look_ahead: float  # steps
    plan: float  # steps
    beta_min: float
    beta_max: float
    fixed_feed_forward: float | None = None
    limit: float = INTEGRAL_LIMIT
    pull: float = 0.0
    level: float = 0.0
    slope: float = 0.0
    recent: float = 0.0
    before: float = 0.0
    near: int = 0
    arrived: bool = False
    left: float = 1.0
    hurry: float = 0.0
    integral: float = 0.0
    steps: int = 0

    def updated(self, ref_kl: float, target: float, *, pull: float, responses: int) -> "LogPI":
        """See ``Controller.updated``."""
        _check(ref_kl, target, pull)
        if _says_nothing(ref_kl, target, pull):
            return self if self.beta is not None else replace(self, beta=self.beta_min)
        steps = self.steps + 1
        smoothed = 0.9 * self.pull + 0.1 * pull
        slope = 0.7 * self.slope + 0.3 * (ref_kl - self.level)  # before step 1 the KL is 0: the policy is the reference
        ahead = max(ref_kl + self.look_ahead * slope, 1e-6 * target)
        error = math.log(ahead / target)
        if not self.arrived:
            error += CLIMB * min(error - math.log(NEAR), 0.0)
        error = min(max(error, -3.0), 1.5)
        # Of the KL itself, and no logarithm: that of a noisy number is too low on average, and it would add up.
        distance = min(ref_kl / target - 1.0, 1.5)
        recent = self.recent + (ref_kl - self.recent) * min(1.0, 8.0 / steps)
        before = self.before + (ref_kl - self.before) * min(1.0, 2.0 / steps)
        arrived = self.arrived or bool(recent > ARRIVED * target)
        near = self.near or (steps if recent > NEAR * target else 0)
        hurry, left, integral = self.hurry, self.left, self.integral
        base = self.fixed_feed_forward or feed_forward(smoothed / (1.0 - 0.9**steps), target)
        if steps == 1 and self.beta is not None and self.beta > self.beta_min:     # which is what waiting leaves
            integral = self._within(math.log(self.beta / base)) if base > 0.0 else 0.0
        late = steps > FIRST_STEPS and _arrival(recent, before, steps, target) > max(self.plan, steps + FIRST_STEPS)
        if arrived:
            slow = min(max(near, 1), 0.5 * self.plan)
            gain = min(self.ki, NEAR_GAIN / slow) * (2.0 if ref_kl > FAR_ABOVE * target else 1.0)
            integral = self._within(integral + gain * distance)
        else:
            left = min(left, max(1.0 - recent / target, 0.0) / (1.0 - NEAR))
            more = min(self.ki, PLAN_GAIN / self.plan) * distance if late else 0.0
            hurry, integral = (hurry, self._within(integral + more)) if near else (self._within(hurry + more), integral)
        after = replace(
            self, pull=smoothed, level=ref_kl, slope=slope, recent=recent, before=before, near=near, arrived=arrived,
            left=left, hurry=hurry, integral=integral, steps=steps,
        )
        return replace(after, beta=_bounded(base * math.exp(self.kp * error + after.offset), self))

    @property
    def offset(self) -> float:
        """Of log β from the feed-forward at the target, as the integral has it."""
        return self._within(self.integral + self.hurry * self.left)

    def at_bottom(self) -> bool:
        """See ``Controller.at_bottom``."""
        return self.offset <= -self.limit or (self.beta is not None and self.beta <= self.beta_min)

    def raised(self, factor: float, least: float) -> "LogPI":
        """See ``Controller.raised``; it is the integral that goes up, so that the next batches keep the height."""
        before = max(self.beta or 0.0, self.beta_min)
        beta = _bounded(max(factor * before, least), self)
        if not self.steps:      # a price to begin with: the first batch makes an integral of it
            return replace(self, beta=beta)
        return replace(self, beta=beta, integral=self._within(self.integral + math.log(beta / before)))

    def _within(self, integral: float) -> float:
        return min(max(integral, -self.limit), self.limit)


def feed_forward(pull: float, target: float) -> float:
    """The price at which an exponential tilt of Gaussian scores of spread ``pull`` costs ``target`` nats.

        pull / √(2·target)
    """
    return pull / math.sqrt(2.0 * target)


def pull_at(price: float, ref_kl: float) -> float:
    """The pull that a price is known to balance at a KL, so that ``feed_forward`` gives the price at any other.

        price · √(2·KL)
    """
    return price * math.sqrt(2.0 * ref_kl)


def _arrival(recent: float, before: float, steps: int, target: float) -> float:
    """The step at which a KL comes to its target if each step goes on multiplying it as now; ∞ if it does not grow.

    The factor is that of a KL ∝ n^p, p/n in its logarithm: the mean of n^p with weights 8/n is 8/(8 + p) of the last
    and that with weights 2/n is 2/(2 + p), so that to first order p = 4.5 (recent − before) / recent.
    """
    power = 4.5 * (recent - before) / recent if recent > 0.0 else 0.0
    return steps * (1.0 + math.log(target / recent) / power) if power > 0.0 else math.inf


def _started(controller: Any, pull: float, target: float) -> Any:
    """The controller with its first price; it waits for one where nothing pulls yet, as a rare reward at first."""
    return replace(controller, beta=_bounded(feed_forward(pull, target), controller), waiting=not pull > 0.0)


def _says_nothing(ref_kl: float, target: float, pull: float) -> bool:
    return pull == 0.0 and ref_kl < target


def _bounded(beta: float, controller: Any) -> float:
    return min(max(beta, controller.beta_min), controller.beta_max)


def _check(ref_kl: float, target: float, pull: float) -> None:
    if not (math.isfinite(ref_kl) and math.isfinite(pull)):
        raise ValueError(f"KL is {ref_kl} nats per response and what pulls against it {pull}; both must be finite.")
    if not target > 0.0:
        raise ValueError(f"target is {target} nats per response; must be above 0.")
