"""Which tokens, prompts and positions carry the KL of a measurement, and responses with the KL at each token."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from kltune.core.kl.divergence import VocabularySums
from kltune.lm.measure.measurement import Measurement
from kltune.lm.model.batches import Rollout
from kltune.lm.model.policy import Policy

POSITION_ROWS = 512  # by_position is no longer than this


def top_tokens(sums: VocabularySums, responses: int, policy: Policy, top: int) -> list[dict[str, Any]]:
    """The tokens whose probabilities carry most of the KL, and how often each model expects to say them.

    Both expectations are over the policy's own responses, so that of the reference is how often it would have said the
    token at the same places.
    """
    ids = sums.nats.topk(min(top, len(sums.nats))).indices.tolist()
    return [
        {"token": token_text(policy.tokenizer, token), "id": token, **token_part(sums, [token], responses)}
        for token in ids if sums.nats[token] > 0.0
    ]


def token_text(tokenizer: Any, token: int) -> str:
    """What a token writes within a text; decoded alone, one of the SentencePiece kind would lose its space.

    Many models have more tokens than their tokenizer: such a one writes nothing, and is named by its number.
    """
    text, piece = tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return f"<{token}>"
    return f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text


def token_part(sums: VocabularySums, ids: list[int], responses: int) -> dict[str, float]:
    """What some tokens together add to the KL; of the end tokens, how much of it is about where to stop."""
    whole = max(sums.nats.sum().item(), 1e-12)
    nats, policy, reference = (part[ids].sum().item() for part in (sums.nats, sums.policy, sums.reference))
    return {
        "share": nats / whole,
        "nats_per_response": nats / responses,
        "policy_per_response": policy / responses,
        "reference_per_response": reference / responses,
    }


def top_prompts(measured: Measurement, top: int) -> list[dict[str, Any]]:
    """The prompts whose responses are furthest from the reference."""
    prompts, _ = measured.texts()
    indices = measured.prompt_index.tolist()
    text, sums = dict(zip(indices, prompts, strict=True)), defaultdict(list)
    for index, value in zip(indices, measured.exact.tolist(), strict=True):
        sums[index].append(value)
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


def examples(measured: Measurement, policy: Policy, count: int) -> list[dict[str, Any]]:
    """A few responses from the least to the most KL, each token with the KL at its position.

    One response shows the most, two the most and the least, three the middle one as well, and so on.
    """
    places = [(rollout, row) for rollout in measured.rollouts for row in range(len(rollout.ids))]
    order = measured.exact.argsort(descending=True).tolist()
    last, shown = len(order) - 1, min(count, len(order))
    chosen = [order[round(i * last / max(1, shown - 1))] for i in range(shown)]
    return [_example(*places[index], measured.exact[index].item(), policy) for index in chosen]


def _example(rollout: Rollout, row: int, nats: float, policy: Policy) -> dict[str, Any]:
    said = transcript(rollout, row, policy.tokenizer)
    return {
        "prompt": rollout.prompts[row],
        "response": rollout.responses[row],
        "nats": nats,
        "truncated": bool(rollout.truncated[row]),
        "tokens": [{"token": t, "nats": n} for t, n in zip(said["tokens"], said["token_kl"], strict=True)],
    }


def transcript(rollout: Rollout, row: int, tokenizer) -> dict[str, list[Any] | None]:
    """One response token by token: "tokens", the text that each adds, and "token_kl", the exact KL(policy ‖ reference)
    of the distributions that it was drawn from, nats; None where it was not measured.
    """
    ids, mask = rollout.ids[row][rollout.scored[row]].tolist(), rollout.response_mask[row]
    nats = None if rollout.ref_kl is None else rollout.ref_kl[row][mask].tolist()
    return {"tokens": pieces(ids, tokenizer), "token_kl": nats}


def pieces(ids: Sequence[int], tokenizer) -> list[str]:
    """The text that each token adds; a character of several tokens is shown at its last."""
    texts, text = [], ""
    for end in range(1, len(ids) + 1):
        longer = tokenizer.decode(ids[:end])
        whole = not longer.endswith("\N{REPLACEMENT CHARACTER}") or end == len(ids)
        texts.append(longer[len(text) :] if whole else "")
        text = longer if whole else text
    return texts
