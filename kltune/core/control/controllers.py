"""The price of a nat, steered so that KL(policy ‖ reference) reaches a target and stays there.

Every controller is frozen and small: ``updated`` returns the next one, ``asdict`` is its whole state, and β is always
within [beta_min, beta_max]. All see the same two numbers once per step, *before* the batch is priced, so that the price
answers the very samples it is put on: the measured KL and the target, both in nats per response.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

REACH_STEPS = 100  # a KL that would reach its target within as many steps is on its way
TREND_STEPS = 20  # before as many steps the trend says little


class Controller(Protocol):
    """What a stage needs of a controller."""

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

    def raised(self, factor: float, least: float) -> "FixedBeta":
        """See ``Controller.raised``; the price is fixed again, at the new height."""
        return FixedBeta(max(factor * self.beta, least))


@dataclass(frozen=True)
class Ziegler:
    """The published adaptive penalty: integral action on log β, slow and calm.

        e = clip(KL / target − 1, −0.2, 0.2),    β ← β (1 + e · responses / horizon)

    With ``beta`` None the first batch sets it to the feed-forward σ/√(2·target). The multiplier is kept above 0.1:
    at more than five horizons per batch the published formula turns negative.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2, and its code.
    """

    beta: float | None
    horizon: int
    beta_min: float
    beta_max: float

    def updated(self, ref_kl: float, target: float, *, pull: float, responses: int) -> "Ziegler":
        """See ``Controller.updated``."""
        _check(ref_kl, target, pull)
        if self.beta is None:
            return replace(self, beta=_bounded(feed_forward(pull, target), self))
        error = min(max(ref_kl / target - 1.0, -0.2), 0.2)
        return replace(self, beta=_bounded(self.beta * max(0.1, 1.0 + error * responses / self.horizon), self))

    def raised(self, factor: float, least: float) -> "Ziegler":
        """See ``Controller.raised``."""
        return replace(self, beta=_bounded(max(factor * (self.beta or 0.0), least), self))


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

    def updated(self, ref_kl: float, target: float, *, pull: float, responses: int) -> "Dual":
        """See ``Controller.updated``."""
        _check(ref_kl, target, pull)
        if self.beta is None:
            return replace(self, beta=_bounded(feed_forward(pull, target), self))
        error = min(max(ref_kl / target - 1.0, -1.0), 1.0)
        return replace(self, beta=_bounded(self.beta * math.exp(self.lr * error), self))

    def raised(self, factor: float, least: float) -> "Dual":
        """See ``Controller.raised``."""
        return replace(self, beta=_bounded(max(factor * (self.beta or 0.0), least), self))


@dataclass(frozen=True)
class LogPI:
    """Proportional-integral control of log β around a running feed-forward, with look-ahead.

        β = σ / √(2·target) · exp(kp · e + I),     e = clip(log(ahead / target), −1, 1.5)
        ahead = KL + look_ahead · slope,           I ← I + ki · clip(log(KL / target), −1, 1.5)

    σ, the spread of the score among answers to one prompt, is measured under the policy *as it is* and smoothed: when
    the rewarded thing is rare under the reference, its spread there says nothing of the spread the policy will meet.
    The feed-forward is the price at which exp(score/β) tilts a Gaussian by ``target`` nats.

    The gain is low on purpose. Near the target the score's gradient and the price's nearly cancel, and an optimizer
    that normalises its step (Adam, whitened advantages) makes a full-sized step of whatever is left: one step with a
    wrong price moves the KL as far as any. A gain of 1 then makes the KL swing by ± 20-40 % with a period of 2 to 4
    steps, 0.5 by ± 10 %. Look-ahead is for momentum, which keeps moving the KL for some optimizer updates whatever the
    price: it matters with one update per step and is nothing with sixteen, so it is given in updates. The integral
    removes what offset the feed-forward leaves. It waits while the KL is far below and on its way (anti-windup), goes
    on where it is stuck, and is bounded.
    With ``fixed_feed_forward`` the recipe's own β takes the place of σ / √(2·target).

    State: pull (smoothed), level (last KL), slope (smoothed, nats per step),
    trend (smoothed longer, log KL per step), integral, steps seen.

    Source: derived and measured for this project; docs/kl-control.md.
    """

    beta: float | None
    kp: float
    ki: float
    look_ahead: float  # steps
    beta_min: float
    beta_max: float
    fixed_feed_forward: float | None = None
    pull: float = 0.0
    level: float = 0.0
    slope: float = 0.0
    trend: float = 0.0
    integral: float = 0.0
    steps: int = 0

    def updated(self, ref_kl: float, target: float, *, pull: float, responses: int) -> "LogPI":
        """See ``Controller.updated``."""
        _check(ref_kl, target, pull)
        steps = self.steps + 1
        smoothed = 0.9 * self.pull + 0.1 * pull
        slope = 0.7 * self.slope + 0.3 * (ref_kl - self.level)  # before step 1 the KL is 0: the policy is the reference
        ahead = max(ref_kl + self.look_ahead * slope, 1e-6 * target)
        error = min(max(math.log(ahead / target), -1.0), 1.5)
        floor = 1e-3 * target  # the logarithm of a KL of 0 would be a jump
        distance = math.log(max(ref_kl, floor) / target)
        trend = 0.9 * self.trend + 0.1 * math.log(max(ref_kl, floor) / max(self.level, floor))
        approaching = trend * distance < 0.0 and abs(distance) < REACH_STEPS * abs(trend)
        stuck = steps > TREND_STEPS and not approaching
        integral = self.integral
        if distance > -0.7 or stuck:
            # Of the KL itself: the logarithm of a noisy extrapolation is too low on average, and that would add up.
            integral = min(max(integral + self.ki * min(max(distance, -1.0), 1.5), -3.0), 3.0)
        base = self.fixed_feed_forward or feed_forward(smoothed / (1.0 - 0.9**steps), target)
        beta = _bounded(base * math.exp(self.kp * error + integral), self)
        return replace(
            self, beta=beta, pull=smoothed, level=ref_kl, slope=slope, trend=trend, integral=integral, steps=steps
        )

    def raised(self, factor: float, least: float) -> "LogPI":
        """See ``Controller.raised``; it is the integral that goes up, so that the next batches keep the height."""
        before = max(self.beta or 0.0, self.beta_min)
        beta = _bounded(max(factor * before, least), self)
        return replace(self, beta=beta, integral=min(self.integral + math.log(beta / before), 3.0))


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


def _bounded(beta: float, controller: Any) -> float:
    return min(max(beta, controller.beta_min), controller.beta_max)


def _check(ref_kl: float, target: float, pull: float) -> None:
    if not (math.isfinite(ref_kl) and math.isfinite(pull)):
        raise ValueError(f"KL is {ref_kl} nats per response and what pulls against it {pull}; both must be finite.")
    if not target > 0.0:
        raise ValueError(f"target is {target} nats per response; must be above 0.")
