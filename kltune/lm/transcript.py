"""Responses as people read them: token by token with the KL at each, and what the reference says to the same prompt."""

from collections.abc import Sequence
from typing import Any

from kltune.lm.batches import Rollout
from kltune.lm.data import Prompt
from kltune.lm.measurement import Draw, Measurement, measure_kl
from kltune.lm.policy import Policy
from kltune.lm.scorers import Scorer
from kltune.lm.watching import judged
from kltune.recipe import SamplingSection

SHOWN = 8      # held-out prompts that a run's page shows before and after


def transcript(rollout: Rollout, row: int, tokenizer) -> dict[str, list[Any] | None]:
    """One response token by token.

    Returns:
        "tokens": the text that each adds. "token_kl": exact KL(policy ‖ reference) at each, nats, the divergence of the
        two distributions that the token was drawn from; None where it was not measured.
    """
    ids, mask = rollout.ids[row][rollout.scored[row]].tolist(), rollout.response_mask[row]
    nats = None if rollout.ref_kl is None else rollout.ref_kl[row][mask].tolist()
    return {"tokens": pieces(ids, tokenizer), "token_kl": nats}


def pieces(ids: Sequence[int], tokenizer) -> list[str]:
    """The text that each token adds; a character of several tokens is shown at its last."""
    found, text = [], ""
    for end in range(1, len(ids) + 1):
        longer = tokenizer.decode(ids[:end])
        whole = not longer.endswith("\N{REPLACEMENT CHARACTER}") or end == len(ids)
        found.append(longer[len(text) :] if whole else "")
        text = longer if whole else text
    return found


def answer_both(policy: Policy, draw: Draw, **drawn: Any) -> tuple[Measurement, Measurement]:
    """Responses of the policy and of the reference to the same prompts, with the same random numbers.

    Args:
        policy: adapter on.
        draw: which prompts, how often.
        drawn: the keywords of ``measure_kl`` that say how.

    Returns:
        (the policy's with KL(policy ‖ reference), the reference's with KL(reference ‖ policy)).
    """
    return measure_kl(policy, draw, **drawn), measure_kl(policy, draw, from_reference=True, **drawn)


def before_and_after(
    policy: Policy, prompts: Sequence[Prompt], sampling: SamplingSection, scorer: Scorer | None, *, seed: int
) -> list[dict[str, Any]]:
    """Rows of samples.jsonl on the first held-out prompts, each with what the reference says to it; [] without prompts.

    With one response to a prompt they are the first of the evaluation with the same seed.
    """
    if not prompts:
        return []
    draw = Draw(prompts, 0, min(SHOWN, len(prompts)), per_prompt=1)
    settings = {"max_new_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "seed": seed}
    sides = answer_both(policy, draw, **settings)
    after, before = sides
    scores = [scores_of(scorer, side, sampling.missing_end_penalty) for side in sides]
    rollout = after.rollouts[0]
    return [
        {
            "held_out": True,
            "prompt": rollout.prompts[row],
            "response": rollout.responses[row],
            "score": scores[0][row],
            "ref_kl": after.exact[row].item(),
            **transcript(rollout, row, policy.tokenizer),
            "reference_response": before.rollouts[0].responses[row],
            "reference_score": scores[1][row],
        }
        for row in range(draw.count)
    ]


def scores_of(scorer: Scorer | None, measured: Measurement, missing_end_penalty: float) -> list[float | None]:
    """The score of each response; None of each where nothing scores."""
    if scorer is None:
        return [None] * len(measured.exact)
    return judged({"score": scorer}, measured, missing_end_penalty)["score"].tolist()
