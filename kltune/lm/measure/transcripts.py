"""Responses that were sampled elsewhere: whether they are a sample of the policy at all, and the KL on them if so.

Three tests, in standard errors. Two do not ask how policy and reference differ: how likely the responses are against
how likely the policy's own would be (surprise), and how often each token is said against how often the policy expects
to say it (counts). The third is the sampled against the exact KL (agreement), as for fresh responses.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kltune.core.kl.intervals import agreement_z, cluster_numbers
from kltune.core.tensors import log_distribution, per_response
from kltune.errors import DataError, ModelError
from kltune.lm.data.examples import Prompt, RowRules, load_examples, load_prompts
from kltune.lm.data.forms import BEFORE, NOT_GIVEN
from kltune.lm.data.rows import Row, read_rows
from kltune.lm.measure.measurement import RESPONSES_PER_PASS, WORST_Z, Measurement, measurement_of
from kltune.lm.model.batches import Samples, response_scatter
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import assemble, measured_rollout

FEWEST = 5.0        # times that a token is expected, to be counted by itself
Transcript = tuple[Prompt, list[int]]


def read_transcripts(source: str, policy: Policy, rules: RowRules, limit: int) -> list[Transcript]:
    """Rows of a prompt (or messages) and ``ids``, the response's tokens; or of prompt and response as text.

    Cut at ``limit`` tokens, as the policy's own would be. A text is taken to have ended where it is shorter.

    Raises:
        DataError: a row has none of these, tokens that end neither with an end token nor at the limit, or a prompt that
            the rules would cut.
    """
    rows = list(read_rows(source))
    if not any("ids" in row.fields for row in rows):
        examples, counts = load_examples(source, policy.tokenizer, rules)
        found = [(_prompt_of(policy, example), _scored_of(example)) for example in examples]
    else:
        asked = ("prompt", "messages", *BEFORE, *NOT_GIVEN)
        told = [Row(row.where, {name: value for name, value in row.fields.items() if name in asked}, row.fault)
                for row in rows]
        prompts, counts = load_prompts(source, policy.tokenizer, rules, told)
        if len(prompts) != len(rows):
            raise DataError(f"{source}: {len(rows) - len(prompts)} of {len(rows)} prompts are too long for the model.")
        found = [(prompt, _ids_of(row, policy)) for prompt, row in zip(prompts, rows, strict=True)]
    if counts.truncated:
        raise DataError(
            f"{source}: the prompts of {counts.truncated} of {counts.read} rows have more than "
            f"{rules.max_prompt_tokens} tokens, and with up to {limit} of a response (--max-new-tokens) no room in the "
            "model's context: it never answered the whole of them. Take these rows out, or give the limit that they "
            "were sampled with."
        )
    return [(prompt, _fitted(prompt.where, ids, policy, limit)) for prompt, ids in found]


def _prompt_of(policy: Policy, example) -> Prompt:
    ids = example.ids[: example.scored.index(True)]
    return Prompt(tuple(ids), policy.tokenizer.decode(ids, skip_special_tokens=True), example.where)


def _scored_of(example) -> list[int]:
    return list(example.ids[example.scored.index(True) :])


def _ids_of(row: Row, policy: Policy) -> list[int]:
    ids = row.fields.get("ids")
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise DataError(f"{row.where}: found ids {str(ids)[:40]}, wanted the tokens of a response, one at least.")
    if not all(0 <= token < policy.network.vocabulary for token in ids):
        raise DataError(f"{row.where}: token {max(ids)} is none of the model's {policy.network.vocabulary}.")
    return ids


def _fitted(where: str, ids: list[int], policy: Policy, limit: int) -> list[int]:
    ends = next((number for number, token in enumerate(ids, start=1) if token in policy.end_ids), None)
    ids = ids[: ends or len(ids)][:limit]
    if len(ids) < limit and ids[-1] not in policy.end_ids:
        raise DataError(
            f"{where}: a response of {len(ids)} tokens that does not end with an end token {list(policy.end_ids)}, nor "
            f"at the length limit of {limit}; give the limit that it was sampled with as --max-new-tokens."
        )
    return ids


def recorded(policy: Policy, transcripts: Sequence[Transcript], temperature: float, path: str) -> Measurement:
    """The KL on responses that are there.

    Raises:
        ModelError: they were not sampled from the policy at this temperature, or not all of what it said is there.
        DivergedError: a number is not finite.
    """
    prompts = [prompt for prompt, _ in transcripts]
    rollouts, surprises = [], []
    for start in range(0, len(transcripts), RESPONSES_PER_PASS):
        part = transcripts[start : start + RESPONSES_PER_PASS]
        tokens = [ids for _, ids in part]
        limit = max(len(ids) for ids in tokens)
        samples = assemble(policy, [prompt for prompt, _ in part], tokens, [[0.0] * len(ids) for ids in tokens], limit)
        surprises.append(_surprise(policy, samples, temperature))
        rollouts.append(measured_rollout(policy, samples, temperature, by_token=True))
    measured = measurement_of(rollouts, cluster_numbers([prompt.ids for prompt in prompts]))
    found, wanted, variance = (torch.cat(column) for column in zip(*surprises, strict=True))
    z = agreement_z(found, wanted, measured.prompt_index, variance)
    counts = counts_z(torch.cat([rollout.ids[rollout.scored].cpu() for rollout in rollouts]), measured.sums.policy)
    off = f"{abs(z):.1f} standard errors {'less' if z > 0 else 'more'} likely than its own"
    if abs(z) <= WORST_Z:
        off = f"{counts:.1f} standard errors further from its own in how often they say each token than chance has it"
    if not (abs(z) <= WORST_Z and counts <= WORST_Z):
        raise ModelError(
            f"{path}: these responses are not a sample of the policy at temperature {temperature:g}: they are {off}. "
            "Were they sampled with other weights, another temperature (--temperature), top-p or top-k, or chosen "
            "among several?"
        )
    return measured


def counts_z(said: Tensor, expected: Tensor) -> float:
    """How far the counts of tokens are from what was expected of them, in standard errors of chance.

        X² = Σ_v (O_v − E_v)² / E_v,    z = ((X²/n)^⅓ − (1 − 2/9n)) / √(2/9n)    over n tokens of 5 expected or more

    The others count as one. Given what came before, O − E of a token has mean 0 and a variance of at most E, so X² is
    at most as large as a χ² of n degrees.

    Source: Pearson 1900; Wilson and Hilferty 1931 for z.

    Args:
        said: the tokens. [N] int64.
        expected: how often the policy expected to say each. [V].
    """
    observed = torch.bincount(said, minlength=len(expected)).double()
    often = expected >= FEWEST
    pairs = [(observed[often], expected[often])]
    if (rest := expected[~often].sum()) >= FEWEST:
        pairs.append((observed[~often].sum()[None], rest[None]))
    counts, means = (torch.cat(column) for column in zip(*pairs, strict=True))
    bins = len(means)
    if not bins:
        return 0.0
    square, spread = ((counts - means).square() / means).sum().item(), 2.0 / (9.0 * bins)
    return ((square / bins) ** (1.0 / 3.0) - (1.0 - spread)) / math.sqrt(spread)


def _surprise(policy: Policy, samples: Samples, temperature: float) -> list[Tensor]:
    """Of each response: −log π of its tokens, its expectation, and its variance. [B] float64 each."""

    def read(logits: Tensor, _: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = log_distribution(logits, temperature)
        p, own = a.exp(), torch.where(a == -torch.inf, 0.0, a)
        entropy = -(p * own).sum(-1)
        said = -a.gather(-1, tokens[:, None]).squeeze(-1)
        return said, entropy, (p * own.square()).sum(-1) - entropy.square()

    columns = policy.over_vocabulary(samples.ids, samples.scored, read)
    mask = samples.response_mask
    return [per_response(response_scatter(column, mask), mask).double().cpu() for column in columns]
