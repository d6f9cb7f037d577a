"""Where the drift went: which tokens, prompts and positions carry the KL of a measurement."""

from collections import defaultdict
from typing import Any

import torch

from kltune.lm.evaluate import Measurement
from kltune.lm.policy import Policy

POSITION_ROWS = 512  # by_position is no longer than this


def top_tokens(measured: Measurement, policy: Policy, top: int) -> list[dict[str, Any]]:
    """The tokens at whose positions most of the KL lies."""
    nats: dict[int, float] = defaultdict(float)
    count: dict[int, int] = defaultdict(int)
    for rollout in measured.rollouts:
        values = zip(rollout.ids[rollout.scored].tolist(), rollout.ref_kl[rollout.response_mask].tolist(), strict=True)
        for token, value in values:
            nats[token] += value
            count[token] += 1
    whole = max(sum(nats.values()), 1e-12)
    worst = sorted(nats, key=lambda token: (-nats[token], token))[:top]
    return [
        {
            "token": policy.tokenizer.decode([token]),
            "id": token,
            "share": nats[token] / whole,
            "count": count[token],
            "nats_per_occurrence": nats[token] / count[token],
        }
        for token in worst
    ]


def top_prompts(measured: Measurement, top: int) -> list[dict[str, Any]]:
    """The prompts whose responses are furthest from the reference."""
    prompts, _ = measured.texts()
    sums: dict[int, list[float]] = defaultdict(list)
    text: dict[int, str] = {}
    for index, prompt, value in zip(measured.prompt_index.tolist(), prompts, measured.exact.tolist(), strict=True):
        sums[index].append(value)
        text[index] = prompt
    means = {index: sum(values) / len(values) for index, values in sums.items()}
    worst = sorted(means, key=lambda index: (-means[index], index))[:top]
    return [
        {"prompt": text[index], "nats_per_response": means[index], "responses": len(sums[index])} for index in worst
    ]


def by_position(measured: Measurement) -> list[dict[str, Any]]:
    """Mean KL at each position of a response, over the responses that reach it."""
    width = min(POSITION_ROWS, max(rollout.response_mask.shape[1] for rollout in measured.rollouts))
    nats, count = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.long)
    for rollout in measured.rollouts:
        part = rollout.ref_kl[:, :width]
        nats[: part.shape[1]] += part.double().sum(0).cpu()
        count[: part.shape[1]] += rollout.response_mask[:, :width].sum(0).cpu()
    return [
        {"position": i + 1, "nats": (nats[i] / count[i]).item(), "responses": int(count[i])}
        for i in range(width)
        if count[i]
    ]
