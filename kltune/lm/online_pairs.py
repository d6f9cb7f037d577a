"""Preference pairs out of a batch of responses: of those to one prompt, the best against the worst."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kltune.core.masking import per_response
from kltune.lm.batches import Rollout
from kltune.lm.data import Example
from kltune.lm.judge import Judge
from kltune.lm.preferences import Preferences


def best_against_worst(rollout: Rollout, scores: Tensor, per_prompt: int, temperature: float) -> Preferences | None:
    """One pair from the responses to each prompt, chosen the highest score and rejected the lowest.

    A prompt whose responses all score alike, or whose two are the same tokens, is a tie and gives no pair. Among equal
    ones the first is taken. The reference's log-probabilities are those of the rollout.

    Args:
        rollout: the responses to one prompt side by side.
        scores: of each response, any unit. [B].
        per_prompt: responses to each prompt, at least 2.
        temperature: that the rollout was sampled and measured at.

    Returns:
        At most B / per_prompt pairs, in the order of the prompts; None where all are ties.
    """
    nats = per_response(rollout.ref_logprobs.double(), rollout.response_mask).cpu()
    rows: list[int] = []
    for start in range(0, len(scores), per_prompt):
        group = scores[start : start + per_prompt].tolist()
        best, worst = start + group.index(max(group)), start + group.index(min(group))
        if max(group) > min(group) and _example(rollout, best).ids != _example(rollout, worst).ids:
            rows += [best, worst]
    if not rows:
        return None
    wanted = torch.tensor([True, False]).repeat(len(rows) // 2)
    return Preferences(tuple(_example(rollout, row) for row in rows), wanted, nats[rows], 2, temperature)


def win_rates(judge: Judge, prompts: Sequence[str], responses: Sequence[str], per_prompt: int) -> Tensor:
    """How much a judge prefers each response to the others of its prompt: the mean over them, both orders asked.

    Args:
        judge: mode pair; it is asked per_prompt · (per_prompt − 1) questions a prompt.
        prompts: text, one for each response.
        responses: text, those to one prompt side by side.
        per_prompt: responses to each prompt, at least 2.

    Returns:
        From 0 to 1, their mean over each prompt ½. [B] float64.

    Raises:
        JudgeError: the judge does not answer. ScorerError: it refuses, or what it says cannot be read.
    """
    starts = range(0, len(responses), per_prompt)
    matches = [(s + i, s + j) for s in starts for i in range(per_prompt) for j in range(i + 1, per_prompt)]
    firsts, seconds = zip(*matches, strict=True)
    found = judge.preferences(
        [prompts[row] for row in firsts], [responses[row] for row in firsts], [responses[row] for row in seconds]
    )
    wins = torch.zeros(len(responses), dtype=torch.float64)
    for first, second, preferred in zip(firsts, seconds, found, strict=True):
        wins[first] += preferred
        wins[second] += 1.0 - preferred
    return wins / (per_prompt - 1)


def _example(rollout: Rollout, row: int) -> Example:
    length = int(rollout.scored[row].nonzero()[-1]) + 1
    ids, scored = rollout.ids[row, :length].tolist(), rollout.scored[row, :length].tolist()
    return Example(tuple(ids), tuple(scored), "sampled")
