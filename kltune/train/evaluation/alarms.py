"""Say what an evaluation shows of a reward being exploited, and end a run there if its recipe says so."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from kltune.core.hacking.detector import Detector
from kltune.run.screen import apart, out_of

ADVICE = {
    "gold": "The reward is being exploited: what it asks for is no longer what is meant. {nearer}; mend the reward; or "
    "write eval.stop_at_gold_peak: true, which ends the run and keeps the peak.",
    "diversity": "The policy is collapsing onto a few answers. {nearer}, and look at samples.jsonl.",
    "length": "A reward that grows with length invites this. {nearer}; score per token, or use "
    "sampling.missing_end_penalty.",
}


@dataclass(frozen=True)
class Alarms:
    """What evaluations have said so far, and whether the run ends for it.

    peak: the policy of the highest gold score; None unless the run may end at it. stopped: why it did, once it did.
    """

    detector: Detector = field(default_factory=Detector)
    peak: Mapping[str, Tensor] | None = None
    stopped: Mapping[str, Any] | None = None
    moves: ClassVar[bool] = False

    def observed(
        self, step: int, metrics: Mapping[str, float | None], looks: int, *, nearer: str, warn: Callable[[str], None],
        copied: Callable[[], Mapping[str, Tensor]],
    ) -> Self:
        """After one more evaluation; what it is the first to show is said.

        Args:
            step: steps done.
            metrics: of the evaluation.
            looks: evaluations of the whole run.
            nearer: what to change so that the policy stays nearer to its reference.
            warn: takes a sentence or two.
            copied: gives the policy's tensors, which are kept where they are those of the highest gold score.
        """
        before = self.detector.peak
        detector, alarms = self.detector.observed(step, metrics, looks)
        for alarm in alarms:
            warn(f"step {step}: {alarm.found}. {ADVICE[alarm.kind].format(nearer=nearer)}")
        now, peak = replace(self, detector=detector), detector.peak
        if self.peak is None or peak is None:
            return now
        if peak != before and peak.step == step:
            now = replace(now, peak=copied())
        if not any(alarm.kind == "gold" for alarm in alarms):
            return now
        return replace(now, stopped={
            "step": step,
            "reason": "the gold score fell while the score that is trained on rose",
            "gold_peak_step": peak.step,
            "gold_at_peak": peak.gold,
            "gold_at_stop": metrics["eval/gold_mean"],
            "score_at_peak": peak.score,
            "score_at_stop": metrics.get("eval/score_mean"),
        })

    def farewell(self, steps: int) -> str:
        """Why a run of so many steps was stopped early, and which of its policies is final."""
        told = self.stopped
        where = f"step {told['gold_peak_step']}" if told["gold_peak_step"] else "the start, which is the reference"
        now, best = apart(told["gold_at_stop"], told["gold_at_peak"])
        return (
            f"stopped after step {told['step']}{out_of(told['step'], steps)}: gold is {now}, and was {best} at its "
            f"peak. final is the policy of {where}."
        )

    def state(self) -> dict[str, Any]:
        """See ``Part.state``."""
        return {"detector": asdict(self.detector), "stopped": None if self.stopped is None else dict(self.stopped)}

    def tensors(self) -> Mapping[str, Tensor]:
        """See ``Part.tensors``."""
        return self.peak or {}

    def restored(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See ``Part.restored``."""
        peak = None if self.peak is None else tensors
        return replace(self, detector=Detector.of(state["detector"]), peak=peak, stopped=state["stopped"])
