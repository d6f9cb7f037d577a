"""What the policy makes of texts that were written and not sampled: log-likelihood of their scored tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kltune.core.kl.intervals import KLSummary, cluster_numbers, summarize
from kltune.errors import DivergedError
from kltune.lm.data.examples import Example, RowRules
from kltune.lm.model.batches import pad_right, response_scatter
from kltune.lm.model.policy import Policy
from kltune.recipe import DataSection

TEXTS_PER_PASS = 256


def document_nats(
    policy: Policy, examples: Sequence[Example], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each text's scored tokens, and how many they are. [D] float64 nats, [D] int64.

    Raises:
        DivergedError: a log-probability is not finite.
    """
    nats, tokens = [], []
    for start in range(0, len(examples), TEXTS_PER_PASS):
        ids, scored = example_batch(examples[start : start + TEXTS_PER_PASS], policy)
        logprobs = policy.measure_logprobs(ids, scored, temperature)
        if not torch.isfinite(logprobs).all():
            raise DivergedError("the log-probability of a held-out token is not finite; lower optim.lr.")
        nats.append(-response_scatter(logprobs.double(), scored).sum(dim=1).cpu())
        tokens.append(scored.sum(dim=1).cpu())
    return torch.cat(nats), torch.cat(tokens)


def reference_nats(policy: Policy, examples: Sequence[Example]) -> Tensor:
    """The first of ``document_nats`` under the reference."""
    with policy.reference():
        return document_nats(policy, examples)[0]


def alignment_tax(
    nats: Tensor, ref_nats: Tensor, tokens: Tensor, examples: Sequence[Example], confidence: float = 0.95
) -> KLSummary:
    """How much worse the policy predicts held-out human text than its reference does, paired by document.

    nats, ref_nats: of each document under the two. tokens: how many of each are scored. examples: the documents; one on
    several lines is one. [D]. The tax is a summary of that many nats per token and per document.
    """
    documents = cluster_numbers([example.ids for example in examples])
    return summarize("tax", nats - ref_nats, tokens, documents, confidence)


def example_batch(examples: Sequence[Example], policy: Policy) -> tuple[Tensor, Tensor]:
    """Examples as right-padded ids and scored marks, [B, S] each, on the policy's device."""
    scored = pad_right([example.scored for example in examples], False, torch.bool)
    return policy.padded([example.ids for example in examples]), scored.to(policy.device)


def text_rules(policy: Policy, data: DataSection) -> RowRules:
    """What rows of texts or pairs may be, as a policy can read them: of its context, a prompt takes half at most."""
    context = policy.max_context
    half = (context or 1024) // 2
    key = "data.max_response_tokens" + ", half of the context" * (data.max_response_tokens > half)
    limit = policy.prompt_limit(data.max_prompt_tokens, min(data.max_response_tokens, half), key)
    room = data.max_response_tokens if context is None else min(data.max_response_tokens, context - limit)
    return policy.row_rules(data, limit, room)
