"""Preference data as a loss sees them: how much more likely the policy makes each response than its reference does.

The reference does not change, so its log-probabilities are measured once, and known from then on. The order in which
they are measured depends on the recipe alone: a run that has lost them measures them again to the same bit. Online
pairs are made of a batch of responses: of those to one prompt, the best against the worst.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kltune.core import ranks
from kltune.core.kl.intervals import cluster_numbers, clustered_mean, clustered_share
from kltune.core.objectives import preferences as losses
from kltune.core.objectives.bradley_terry import wins
from kltune.core.tensors import expect_finite, per_response
from kltune.lm.data.examples import Example, Prompt, counts_line, prompt_ids
from kltune.lm.data.forms import Asked
from kltune.lm.data.pairs import Answer, load_labelled, load_pairs
from kltune.lm.measure.likelihood import document_nats, example_batch, text_rules
from kltune.lm.model.batches import Rollout, response_scatter
from kltune.lm.model.opening import expect_rounding
from kltune.lm.model.policy import Policy
from kltune.lm.rewards.judge import Judge
from kltune.recipe import DataSection, DPOSection
from kltune.run.caches import StoredLogprobs

MEASURE = 2  # to be raised when the same pairs and reference would give other numbers


@dataclass(frozen=True)
class Preferences:
    """Responses in groups that stay together: pairs, the chosen one first, or responses labelled one by one.

    examples: R prompts with a response, whose tokens are scored. wanted: True where it was chosen, or labelled as
    wanted. [R] bool. ref_logprobs: log ρ(y|x) of each, NaN until it is measured. [R] float64, nats. group: responses
    in each group, 2 or 1. temperature: of ρ and of what is held against it; responses that were sampled have their own.
    """

    examples: tuple[Example, ...]
    wanted: Tensor
    ref_logprobs: Tensor
    group: int
    temperature: float = 1.0

    def __len__(self) -> int:
        return len(self.examples) // self.group

    def sha256(self) -> str:
        """Of all the tokens, in order, and what was wanted."""
        rows = [[example.ids, example.scored.index(True)] for example in self.examples]
        return hashlib.sha256(repr((rows, self.wanted.tolist())).encode()).hexdigest()

    def select(self, groups: Sequence[int]) -> "Preferences":
        """Some of the groups, in this order."""
        rows = torch.tensor([self.group * at + side for at in groups for side in range(self.group)], dtype=torch.long)
        examples = tuple(self.examples[row] for row in rows.tolist())
        return replace(self, examples=examples, wanted=self.wanted[rows], ref_logprobs=self.ref_logprobs[rows])

    def measured(
        self, policy: Policy, groups: Sequence[int], known: StoredLogprobs | None = None
    ) -> "Preferences":
        """With the reference's log-probabilities of these groups: what is ``known``, or is from then on."""
        chosen = sorted(set(groups))
        if known is None:
            return self._under(policy.reference(), policy, chosen)
        key = self._key(policy, chosen)
        if not ranks.from_first(lambda: known.get(key) is not None):
            measured = self._under(policy.reference(), policy, chosen).ref_logprobs
            if ranks.is_first():
                known.record(key, measured)
        ((ref_logprobs,),) = ranks.spread([key], lambda one: (known.get(one),))
        return replace(self, ref_logprobs=ref_logprobs)

    def against(self, reference: AbstractContextManager[None], policy: Policy) -> "Preferences":
        """With the log-probabilities of another reference: the policy as it is within ``reference``."""
        return self._under(reference, policy, range(len(self)))

    def _under(
        self, reference: AbstractContextManager[None], policy: Policy, groups: Sequence[int]
    ) -> "Preferences":
        alike = sorted(groups, key=self._length)     # little padding, and the sides of a pair read their prompt once
        rows = [self.group * at + side for at in alike for side in range(self.group)]
        with reference:
            nats, _ = document_nats(policy, [self.examples[row] for row in rows], self.temperature)
        ref_logprobs = self.ref_logprobs.clone()
        ref_logprobs[rows] = -nats
        return replace(self, ref_logprobs=ref_logprobs)

    def _key(self, policy: Policy, groups: Sequence[int]) -> str:
        """All that the reference's log-probabilities of these groups depend on, in words."""
        found = {
            "reference": policy.fingerprint.sha256,
            "config": policy.fingerprint.config,
            "dtype": policy.fingerprint.dtype,
            "data": self.sha256(),
            "groups": hashlib.sha256(repr(list(groups)).encode()).hexdigest(),
            "temperature": self.temperature,
            "measure": MEASURE,
        }
        return json.dumps(found)

    @property
    def lengths(self) -> list[int]:
        """Tokens of the longest sequence of each group."""
        return [self._length(at) for at in range(len(self))]

    def _length(self, at: int) -> int:
        return max(len(example.ids) for example in self.examples[self.group * at : self.group * (at + 1)])

    def mismatched(self) -> tuple[Example, ...]:
        """Each prompt with the response of the next example that has another prompt, or at least another place."""
        found = []
        for at, mine in enumerate(self.examples):
            after = (*self.examples[at + 1 :], *self.examples[:at])
            other = next((theirs for theirs in after if prompt_ids(theirs) != prompt_ids(mine)), after[0])
            found.append(_with_response(mine, other))
        return tuple(found)


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
        if max(group) > min(group) and _rollout_example(rollout, best).ids != _rollout_example(rollout, worst).ids:
            rows += [best, worst]
    if not rows:
        return None
    wanted = torch.tensor([True, False]).repeat(len(rows) // 2)
    return Preferences(tuple(_rollout_example(rollout, row) for row in rows), wanted, nats[rows], 2, temperature)


def win_rates(judge: Judge, prompts: Sequence[Asked], responses: Sequence[str], per_prompt: int) -> Tensor:
    """How much a judge prefers each response to the others of its prompt: the mean over them, both orders asked.

    Args:
        judge: mode pair; it is asked per_prompt · (per_prompt − 1) questions a prompt.
        prompts: texts or messages, one for each response.
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
    texts = [prompts[row] for row in firsts], [responses[row] for row in firsts], [responses[row] for row in seconds]
    found = ranks.from_first(lambda: judge.preferences(*texts))
    wins = torch.zeros(len(responses), dtype=torch.float64)
    for first, second, preferred in zip(firsts, seconds, found, strict=True):
        wins[first] += preferred
        wins[second] += 1.0 - preferred
    return wins / (per_prompt - 1)


def _rollout_example(rollout: Rollout, row: int) -> Example:
    length = int(rollout.scored[row].nonzero()[-1]) + 1
    ids, scored = rollout.ids[row, :length].tolist(), rollout.scored[row, :length].tolist()
    return Example(tuple(ids), tuple(scored), "sampled")


def preference_losses(
    dpo: DPOSection, ratio: Tensor, mean: Tensor, wanted: Tensor, *, beta: float, point: float
) -> Tensor:
    """The loss of each pair, or of each response that was judged on its own.

    Args:
        dpo: which one.
        ratio: log π(y|x) − log ρ(y|x) of each response; with average_logprobs per token. [R], nats.
        mean: log π(y|x) per token. [R], nats per token.
        wanted: True where a response was chosen. [R], bool.
        beta: of the loss; a batch may have one of its own.
        point: what responses judged one by one are held against: kto's z₀, in nats, or bco's δ, in reward.
    """
    smoothing = dpo.label_smoothing
    if dpo.loss == "kto":
        return losses.kto_loss(ratio, wanted, point, beta, dpo.wanted_weight, dpo.unwanted_weight)
    if dpo.loss == "bco":
        return losses.bco_loss(ratio, wanted, point, beta)
    chosen, rejected = ratio[0::2], ratio[1::2]
    if dpo.loss == "f_dpo":
        return losses.divergence_loss(chosen, rejected, beta, dpo.divergence, dpo.alpha)
    if dpo.loss == "chi_po":
        return losses.chi_po_loss(chosen, rejected, beta, dpo.reward_limit)
    if dpo.loss == "orpo":
        return losses.orpo_loss(mean[0::2], mean[1::2], beta)
    if dpo.loss == "simpo":
        return losses.simpo_loss(mean[0::2], mean[1::2], beta, dpo.gap)
    margin = chosen - rejected
    if dpo.loss == "robust":
        return losses.robust_loss(margin, beta, smoothing)
    if dpo.loss == "ipo":
        return losses.ipo_loss(margin, beta)
    return losses.hinge_loss(margin, beta) if dpo.loss == "hinge" else losses.sigmoid_loss(margin, beta, smoothing)


def scale_of(loss: str, beta: float) -> float:
    """What the loss is divided by before its price is set, so that at h = 0 a nat of margin is worth about one."""
    return {"ipo": 1.0 / beta, "orpo": 1.0}.get(loss, beta)


def load_preferences(
    source: str, policy: Policy, data: DataSection, *, labelled: bool = False
) -> tuple[Preferences, str]:
    """Read pairs, or with ``labelled`` responses that were judged one by one; and one line on the file.

    Raises:
        DataError: as the loaders of pairs.py. RecipeError: the model's context cannot hold what the recipe wants.
    """
    load = load_labelled if labelled else load_pairs
    rows, counts = load(source, policy.tokenizer, text_rules(policy, data))
    if labelled:
        examples = tuple(_example(row.prompt, row.response) for row in rows)
        wanted = torch.tensor([row.wanted for row in rows])
    else:
        examples = tuple(_example(pair.prompt, side) for pair in rows for side in (pair.chosen, pair.rejected))
        wanted = torch.tensor([True, False]).repeat(len(rows))
    unmeasured = torch.full((len(examples),), torch.nan, dtype=torch.float64)
    return Preferences(examples, wanted, unmeasured, 1 if labelled else 2), counts_line(source, counts)


def _example(prompt: Prompt, answer: Answer) -> Example:
    ids = prompt.ids + answer.ids
    return Example(ids, (False,) * len(prompt.ids) + (True,) * len(answer.ids), prompt.where)


def _with_response(mine: Example, theirs: Example) -> Example:
    start, other = mine.scored.index(True), theirs.scored.index(True)
    return Example(mine.ids[:start] + theirs.ids[other:], mine.scored[:start] + theirs.scored[other:], mine.where)


def response_logprobs(policy: Policy, part: Preferences) -> tuple[Tensor, Tensor]:
    """log π(y|x) of each response, differentiable, and its tokens. [R] float64 nats, [R] int64; on the CPU.

    Raises:
        DivergedError: one is not finite.
    """
    ids, scored = example_batch(part.examples, policy)
    flat = policy.logprobs(ids, scored, part.temperature)
    expect_finite("the log-probabilities of pairs", flat)
    return response_scatter(flat, scored).cpu().double().sum(dim=1), scored.sum(dim=1).cpu()


def log_ratios_against(policy: Policy, examples: Sequence[Example], reference: AbstractContextManager[None]) -> Tensor:
    """log π(y|x) − log ρ(y|x) of each response, both measured now and without gradients. [R] float64, nats.

    Within ``reference``, the policy is ρ.
    """
    nats, _ = document_nats(policy, examples)
    with reference:
        ref_nats, _ = document_nats(policy, examples)
    return ref_nats - nats


def response_log_ratios(policy: Policy, part: Preferences) -> Tensor:
    """log π(y|x) − log ρ(y|x) of each response, π measured now and without gradients. [R] float64, nats."""
    nats, _ = document_nats(policy, part.examples, part.temperature)
    return -nats - part.ref_logprobs


def margins(log_ratio: Tensor) -> Tensor:
    """h of each pair, by the log-ratios of its two sides. [2 P] -> [P], nats."""
    return log_ratio[0::2] - log_ratio[1::2]


def pair_metrics(policy: Policy, pairs: Preferences) -> dict[str, float | None]:
    """How the policy, against its reference, tells held-out pairs apart; intervals at 95 %.

        accuracy = share of pairs with h > 0, a half where h = 0;    margin = mean h
    """
    log_ratio = response_log_ratios(policy, pairs)
    margin = margins(log_ratio)
    prompts = cluster_numbers([prompt_ids(example) for example in pairs.examples[0::2]])
    share, low, high = clustered_share(wins(margin), prompts)
    return {
        "eval/accuracy": share,
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/margin_nats": margin.mean().item(),
        "eval/margin_stderr": clustered_mean(margin, prompts)[1],
        "eval/chosen_log_ratio_nats": log_ratio[0::2].mean().item(),
        "eval/rejected_log_ratio_nats": log_ratio[1::2].mean().item(),
    }


def check_first_log_ratios(log_ratio: Tensor, tokens: Tensor, policy: Policy) -> None:
    """Before the first update the policy is its reference, and every log-ratio is 0.

    Raises:
        ModelError: one is not.
    """
    expect_rounding((log_ratio.detach() / tokens).abs(), policy.dtype, "the reference's")
