"""The learning rate that moves a policy no further in one step than its KL budget leaves room for.

An optimizer that normalises its step (Adam, whitened advantages) moves as far after a batch of noise as after one of
gradient. A language model of 260,000 parameters, 128 responses a step and a learning rate of 1e-3, went 1.7 to 3.5 nats
in its first step, nearly all of them noise, and what followed never made up for them: at 2.4 nats its score was 0.17
where smaller steps reach 1.05 at 3.0.

Source: derived and measured for this project; docs/kl-control.md.
"""

import math
from dataclasses import dataclass, replace

FAR = 0.06          # of the KL aimed at: the most that a step may move, KL(old ‖ new), of a run that is not late
MOST_HASTE = 2.0    # of a run that is late: times as long, in √KL
NEAR = 0.005        # of the KL aimed at: what a step may move even where the policy is there already
LEAST_SHARE = 0.2   # of that: shorter steps could not bring a KL back that is beyond it
USED = 0.7          # of what a step may move, on average: a batch's own KL(old ‖ new) scatters
FIRST_SHARE = 0.3   # of the learning rate, in a first step of which nothing is known
PLAIN = 3.0         # times what rounding makes of no step: what was seen is no chance
MEMORY = 0.5        # share of the running mean of log KL that a new observation leaves


def step_limit(ref_kl: float, aim: float, share: float, late: float = 0.0) -> float:
    """How far one step may move a policy, KL(old ‖ new) in nats per response.

        haste² (√aim − √KL)² / 4 below the aim, but at least 0.005 share and at most 0.06 haste² of the aim
        haste = late √aim / √KL, from 1 to 2

    Of a tilted Gaussian √KL is the tilt, and a step that goes along it moves √KL by √KL(old ‖ new). So a step covers
    half of the distance at most, and once there none moves √KL by more than 7 % of the aim's, however wrong its price
    is; less towards the end, so that what the noise of batches did averages out. Beyond the aim no step is longer
    than there: at a price that is still too low it goes further out. (Steps as long as the way back took a rare reward
    from 1.3 to 1.9 times its target in three.)

    Args:
        ref_kl: KL(policy ‖ reference), nats per response.
        aim: where it should be.
        share: of the learning rate that its schedule leaves.
        late: share of the way, in √KL, that should have been made by now; 0 where nothing is planned. With few
            responses most of a step is noise, and a short run that took no longer steps would not arrive.
    """
    haste = min(max(late * math.sqrt(aim / max(ref_kl, 1e-9 * aim)), 1.0), MOST_HASTE)
    room = 0.25 * (haste * max(math.sqrt(aim) - math.sqrt(max(ref_kl, 0.0)), 0.0)) ** 2
    return min(max(room, NEAR * max(share, LEAST_SHARE) * aim), FAR * haste**2 * aim)


@dataclass(frozen=True)
class StepSize:
    """How far a step of a learning rate moves the policy, as the steps so far have shown.

    log_reach: mean of log(KL(old ‖ new) / lr²), weights falling by ``MEMORY``; None before the first step.
    """

    log_reach: float | None = None

    def learning_rate(self, most: float, limit: float) -> float:
        """The learning rate of the next step.

        Args:
            most: never more than this.
            limit: nats per response that the step may move the policy.
        """
        if self.log_reach is None:
            return FIRST_SHARE * most
        return min(most, math.sqrt(USED * limit) * math.exp(-0.5 * self.log_reach))

    def observed(self, lr: float, step_kl: float, share: float, rounding: float = 0.0) -> "StepSize":
        """After a step.

        In a narrow dtype a policy that did not move is some way from itself, and near its target a step is shorter than
        that: what it seems to have moved is chance, and does not count. (Where it did, each such step made the next
        learning rate smaller, from 1e-4 to 1e-8, and the policy stayed below its target.)

        Args:
            lr: its learning rate.
            step_kl: KL(old ‖ new) that was measured, nats per response, less ``rounding``.
            share: of its updates that had been made by then; KL grows with their square.
            rounding: KL between two roundings of one policy.
        """
        if not (lr > 0.0 and step_kl > 0.0 and share > 0.0):
            return self
        known, squared = self.log_reach, (lr * share) ** 2
        if known is not None and math.exp(known) * squared <= rounding and step_kl <= PLAIN * rounding:
            return self
        reach = math.log(max(step_kl, rounding) / squared)
        return replace(self, log_reach=reach if known is None else MEMORY * known + (1.0 - MEMORY) * reach)
