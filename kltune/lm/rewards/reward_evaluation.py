"""What a reward model is worth on rows it has not learnt from: accuracy, calibration, and whether it goes by length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kltune.core.kl.intervals import cluster_numbers, clustered_share
from kltune.core.objectives.bradley_terry import (
    Bin,
    bradley_terry_loss,
    calibration_error,
    label_loss,
    pair_reliability,
    rank_correlation,
    reliability,
    win_share,
    wins,
)
from kltune.errors import DivergedError
from kltune.lm.data.pairs import Comparison, Pair, answers, sequences
from kltune.lm.rewards.judge import Judge
from kltune.lm.rewards.reward_model import RewardModel

LABEL_BINS = 10     # from 0 to 1; the pairs' five from ½ to 1 are as wide


@dataclass(frozen=True)
class RewardEvaluation:
    """Rows as a reward model scores them.

    scores: of every response, for pairs the chosen ones' and then the rejected ones'. lengths: their tokens. [R].
    gaps: for pairs r_chosen − r_rejected; for labelled responses the score, its sign turned where the response is not
    wanted: above 0 the model is right. loss: without margin and smoothing, nats. wanted: the labels; None for pairs.
    prompts: which rows have the same. All [N].
    """

    scores: Tensor
    lengths: Tensor
    gaps: Tensor
    loss: Tensor
    wanted: Tensor | None
    prompts: Tensor

    @property
    def table(self) -> list[Bin]:
        """Predicted against observed."""
        if self.wanted is None:
            return pair_reliability(self.gaps)
        return reliability(torch.sigmoid(self.scores.double()), self.wanted, LABEL_BINS)

    def metrics(self) -> dict[str, float | None]:
        """The numbers of an evaluation."""
        share, low, high = clustered_share(wins(self.gaps), self.prompts)
        return {
            "eval/loss": self.loss.double().mean().item(),
            "eval/accuracy": share,
            "eval/accuracy_low": low,
            "eval/accuracy_high": high,
            "eval/calibration_error": calibration_error(self.table),
            "eval/score_mean": self.scores.double().mean().item(),
            "eval/score_sd": self.scores.double().std().item() if len(self.scores) > 1 else None,
            **self.by_length(),
        }

    def by_length(self) -> dict[str, float | None]:
        """Whether the longer response is chosen, by the labels and by the model, and how the two go together.

        ``eval/length_correlation`` is Spearman's: of the differences between the two sides, for labelled responses of
        score and length. Pairs of equal length are left out of the shares.
        """
        if self.wanted is not None:
            return {"eval/length_correlation": rank_correlation(self.scores, self.lengths)}
        chosen, rejected = self.lengths.chunk(2)
        longer = (chosen - rejected).double()
        apart = longer != 0
        shares = (None, None)
        if apart.any():
            shares = win_share(longer[apart]), win_share(self.gaps[apart] * longer[apart].sign())
        return {
            "eval/length_correlation": rank_correlation(self.gaps, longer),
            "eval/longer_is_chosen": shares[0],
            "eval/longer_scores_higher": shares[1],
        }


def evaluate_rewards(model: RewardModel, rows: Sequence[Comparison]) -> RewardEvaluation:
    """Score rows, at least one; DivergedError if a score is not finite."""
    scores = model.measure_rows(sequences(rows))
    if not torch.isfinite(scores).all():
        raise DivergedError("the score of a held-out response is not finite; lower optim.lr.")
    prompts = cluster_numbers([row.prompt.ids for row in rows])
    lengths = torch.tensor([len(answer.ids) for side in zip(*map(answers, rows), strict=True) for answer in side])
    if isinstance(rows[0], Pair):
        chosen, rejected = scores.chunk(2)
        loss = bradley_terry_loss(chosen, rejected, torch.zeros_like(chosen))
        return RewardEvaluation(scores, lengths, chosen - rejected, loss, None, prompts)
    wanted = torch.tensor([row.wanted for row in rows])
    right = torch.where(wanted, scores, -scores)
    return RewardEvaluation(scores, lengths, right, label_loss(scores, wanted), wanted, prompts)


@dataclass(frozen=True)
class HeldOutRows:
    """Rows to measure a reward model on, maybe none. notes: one line on each file that was read.

    apart: it has not learnt from them, from some at least.
    """

    rows: Sequence[Comparison]
    notes: Sequence[str] = ()
    judges: Sequence[Judge] = ()
    scored: bool = False
    apart: bool = True

    def measured(
        self, model: RewardModel, scorer: None = None, times: int = 1
    ) -> tuple[dict[str, float | None], RewardEvaluation | None]:
        """Metrics of the model on the rows, and what they come from; neither where there are no rows."""
        if not self.rows:
            return {}, None
        evaluation = evaluate_rewards(model, self.rows)
        return evaluation.metrics(), evaluation


def reward_result(evaluation: RewardEvaluation | None) -> dict[str, Any]:
    """What result.json says of the held-out rows; null where there were none."""
    if evaluation is None:
        return dict.fromkeys(("accuracy", "accuracy_ci95", "loss", "held_out_rows", "calibration", "length"))
    metrics = evaluation.metrics()
    return {
        "accuracy": metrics["eval/accuracy"],
        "accuracy_ci95": [metrics["eval/accuracy_low"], metrics["eval/accuracy_high"]],
        "loss": metrics["eval/loss"],
        "held_out_rows": len(evaluation.gaps),
        "calibration": {
            "error": metrics["eval/calibration_error"],
            "table": [row._asdict() for row in evaluation.table],
        },
        "length": {name.removeprefix("eval/"): value for name, value in evaluation.by_length().items()},
    }


def sample_pairs(evaluation: RewardEvaluation, rows: Sequence[Comparison], count: int = 4) -> list[dict[str, Any]]:
    """The responses of the first few rows with their scores, for people to read."""
    names = ("chosen", "rejected") if evaluation.wanted is None else ("labelled",)
    sides = evaluation.scores.chunk(len(names))
    return [
        {"prompt": row.prompt.text, "response": answer.text, "side": name, "score": side[index].item()}
        for index, row in enumerate(rows[:count])
        for name, answer, side in zip(names, answers(row), sides, strict=True)
    ]
