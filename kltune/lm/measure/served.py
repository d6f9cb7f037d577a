"""KL of a served model from one that is here, or from a served one, by log-probs of a few tokens (``core/kl/topk.py``).

A served policy answers, and its answers are read by the reference; or the policy here answers, and a served reference
says what it makes of that. Of two servers those tokens are summed that both speak of. Temperature 1, and no filters.
What a server applied is found out: by the answers themselves (what they say is as likely as their own log-probs have
it, on average), and by scoring some of them again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kltune.core.kl.intervals import KLSummary, agreement_z, summarize
from kltune.core.kl.topk import TopKDivergence, topk_divergence
from kltune.core.tensors import log_distribution
from kltune.errors import ModelError
from kltune.lm.data.examples import Prompt
from kltune.lm.measure.kl_document import DIRECTIONS, ESTIMATORS, kl_figures
from kltune.lm.measure.measurement import WORST_Z, Progress, Round
from kltune.lm.measure.server import Answer, CannotScore, Server
from kltune.lm.model.batches import pad_right
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import Draw, sample

WANTS_LOGITS = ("noise_floor", "distribution", "forward", "js", "js_stderr", "tv", "tv_stderr", "deployed", "end_token",
                "alignment_tax")       # of both models, at every token of the vocabulary
ROWS = 16           # read by the local model at once
PROBED = 4          # responses that are scored again
PROBE_GAP = 0.05    # mean nats per token by which two scores of one token may differ: bfloat16 gives 0.01
WRONG_WORDS = 0.1   # share of ids whose text may be spelled in another way than here


@dataclass(frozen=True)
class ServedMeasurement:
    """KL(policy ‖ reference) on fresh responses, one of the two served.

    by_token: what ``TopKDivergence`` says of a token, summed over each response; kl: of it, nats per response. tokens,
    prompt_index, truncated: of the responses. [B] each.
    """

    by_token: TopKDivergence
    tokens: Tensor
    prompt_index: Tensor
    truncated: Tensor

    def __add__(self, other: "ServedMeasurement") -> "ServedMeasurement":
        """Both together; their prompts are numbered alike."""
        sums = TopKDivergence(*(torch.cat(pair) for pair in zip(self.by_token, other.by_token, strict=True)))
        rest = ((getattr(self, name), getattr(other, name)) for name in ("tokens", "prompt_index", "truncated"))
        return ServedMeasurement(sums, *(torch.cat(pair) for pair in rest))

    def summary(self, estimator: str = "topk", confidence: float = 0.95) -> KLSummary:
        """Mean with clustered standard error and interval, per response and per token; estimator: topk or k1."""
        nats = self.by_token.k1 if estimator == "k1" else self.by_token.kl
        return summarize(estimator, nats, self.tokens, self.prompt_index, confidence)

    @property
    def mass(self) -> float:
        """Mean probability of the head."""
        return (self.by_token.mass.sum() / self.tokens.sum()).item()

    def checks(self) -> dict[str, float]:
        """Standard errors by which what was sampled is off what the log-probs say; beyond ±4 they are no sample."""
        sums, zero = self.by_token, torch.zeros_like(self.by_token.kl)
        return {
            name: agreement_z(found, wanted, self.prompt_index, variance.clamp(min=0.0))
            for name, found, wanted, variance in (
                ("agreement_z", sums.k1, sums.kl, sums.gap_variance),
                ("surprise_z", sums.surprise, zero, sums.surprise_variance),
                ("tail_z", sums.missed, zero, sums.missed_variance),
            )
        }


def fit_together(servers: Sequence[Server], local: Policy) -> None:
    """Ask for no more tokens than there are, and cut rows so that they leave room for the one that scoring draws."""
    for server in servers:
        server.top = min(server.top, local.network.vocabulary)
    if local.max_context is not None:
        local.max_context -= 1


def measure_served(
    served: Server, local: Policy, answered: Round, draw: Draw, *, policy_is_served: bool,
    reference: Server | None = None, progress: Progress = lambda done: None,
) -> ServedMeasurement:
    """Let the policy answer, served or here, and hold it against the other of the two.

    reference: it is served too, and of ``local`` the tokenizer alone is used.

    Raises:
        ModelError: the server does not give what it takes, or other numbers than those that it samples by.
    """
    parts = []
    for prompts, uniforms, done in answered.parts(draw):
        rows = [list(prompt.ids) for prompt in prompts for _ in range(answered.per_prompt)]
        if policy_is_served:
            seed = draw.seed + 7919 * len(parts) + answered.number
            so_far = partial(_counted, progress, done - len(rows))
            answers = served.sample(rows, draw.max_new_tokens, seed, so_far)
            answers = [_to_first_end(answer, local.end_ids) for answer in answers]
        else:
            answers = _scored(served, local, prompts, uniforms, answered.per_prompt)
        if not parts:
            probe(served, local, rows, answers)
        if reference is None:
            found = _divergences(served, local, rows, answers, policy_is_served)
        else:
            found = _between_servers(reference, local, rows, answers)
        counts = torch.tensor([len(answer.places) for answer in answers])
        parts.append((*_per_response(found, counts), counts, torch.tensor([answer.truncated for answer in answers])))
        progress(done)
    *sums, counts, cuts = (torch.cat(column) for column in zip(*parts, strict=True))
    return ServedMeasurement(TopKDivergence(*sums), counts, answered.prompt_index(), cuts)


def _counted(progress: Progress, before: int, done: int) -> None:
    progress(before + done)


def _scored(
    served: Server, local: Policy, prompts: Sequence[Prompt], uniforms: Tensor, per_prompt: int
) -> list[Answer]:
    """Responses of the policy here as the server sees them."""
    drawn = sample(local, prompts, uniforms, temperature=1.0)
    responses = [ids[marks].tolist() for ids, marks in zip(drawn.ids, drawn.scored, strict=True)]
    rows = [prompt.ids for prompt in prompts for _ in range(per_prompt)]
    answers = served.score(list(zip(rows, responses, strict=True)))
    return [Answer(answer.places, cut) for answer, cut in zip(answers, drawn.truncated.tolist(), strict=True)]


def _to_first_end(answer: Answer, ends: Sequence[int]) -> Answer:
    """A response up to the first token that ends one here: a server may know fewer of them."""
    for number, place in enumerate(answer.places, start=1):
        if place.token in ends:
            return Answer(answer.places[:number], False)
    return answer


def _divergences(
    served: Server, local: Policy, rows: Sequence[list[int]], answers: Sequence[Answer], policy_is_served: bool
) -> TopKDivergence:
    """Of each token of responses, between a server and the model here."""
    places = [place for answer in answers for place in answer.places]
    heads = torch.tensor([sorted(place.head) for place in places])
    if int(heads.max()) >= local.network.vocabulary:
        raise ModelError(f"{served.path}: it gives log-probs of token {int(heads.max())}, and the model here has "
                         f"{local.network.vocabulary} tokens: they cannot be compared.")
    theirs = torch.tensor([[place.head[token] for token in sorted(place.head)] for place in places]).double()
    said = torch.tensor([place.token for place in places])
    spoken = torch.tensor([place.logprob for place in places]).double()
    mine = logprobs_of(local, rows, [answer.ids for answer in answers], torch.cat([said[:, None], heads], dim=1))
    sides = [(theirs, spoken), (mine[:, 1:], mine[:, 0])]
    policy, reference = sides if policy_is_served else reversed(sides)
    return topk_divergence(policy[0], reference[0], policy[1], reference[1], (heads == said[:, None]).any(dim=1))


def _between_servers(
    reference: Server, local: Policy, rows: Sequence[list[int]], answers: Sequence[Answer]
) -> TopKDivergence:
    """Of each token of a served policy's responses, by the tokens that both servers speak of there."""
    others = reference.score([(row, answer.ids) for row, answer in zip(rows, answers, strict=True)])
    expect_same_words(reference, local, others)
    mine, theirs = ([place for answer in side for place in answer.places] for side in (answers, others))
    heads: list[list[Any]] = [sorted(a.head.keys() & b.head.keys()) for a, b in zip(mine, theirs, strict=True)]
    width = max(len(head) for head in heads)
    heads = [head + [None] * (width - len(head)) for head in heads]
    policy, ref = (
        torch.tensor([[place.head.get(token, there_is_none) for token in head]
                      for head, place in zip(heads, side, strict=True)], dtype=torch.float64)
        for side, there_is_none in ((mine, -math.inf), (theirs, 0.0))
    )
    said, ref_said = (torch.tensor([place.logprob for place in side]).double() for side in (mine, theirs))
    inside = torch.tensor([place.token in head for head, place in zip(heads, mine, strict=True)])
    return topk_divergence(policy, ref, said, ref_said, inside)


def _per_response(found: TopKDivergence, counts: Tensor) -> list[Tensor]:
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    return [torch.zeros(len(counts), dtype=torch.float64).index_add_(0, owner, column) for column in found]


@torch.no_grad()
def logprobs_of(
    policy: Policy, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], tokens: Tensor
) -> Tensor:
    """Log-probabilities that a model here gives some tokens at each place of responses. [N, K] ids -> [N, K] float64.

    N: all tokens of the responses, one after the other.
    """
    found, start = [], 0
    for first in range(0, len(prompts), ROWS):
        both = list(zip(prompts[first : first + ROWS], responses[first : first + ROWS], strict=True))
        ids = policy.padded([[*prompt, *response] for prompt, response in both])
        marks = [[False] * len(prompt) + [True] * len(response) for prompt, response in both]
        scored = pad_right(marks, False, torch.bool).to(policy.device)
        hidden = policy.network.before(ids, scored)
        for states in hidden.split(policy.network.chunk_rows):
            asked = tokens[start : start + len(states)].to(policy.device)
            found.append(log_distribution(policy.network.logits(states), 1.0).gather(-1, asked).double().cpu())
            start += len(states)
    return torch.cat(found)


def probe(served: Server, local: Policy, rows: Sequence[list[int]], answers: Sequence[Answer]) -> None:
    """Score a few responses again: the numbers must be the same, and the ids mean the same tokens as here.

    Raises:
        ModelError: they are not, and why that may be.
    """
    few = [(row, answer.ids) for row, answer in zip(rows[:PROBED], answers[:PROBED], strict=True)]
    try:
        again = served.score(few)
    except CannotScore:
        served.notes.append("it does not score given tokens, so what it samples by could not be scored again")
        again = []
    gaps = torch.tensor([
        one.logprob - other.logprob
        for answer, second in zip(answers, again, strict=False)
        for one, other in zip(answer.places, second.places, strict=True)
    ])
    if again and not (gap := gaps.abs().mean().item()) <= PROBE_GAP:
        raise ModelError(
            f"{served.path}: the same tokens scored twice differ by {gap:.3g} nats each on average (allowed: "
            f"{PROBE_GAP}). It may sample at another temperature or with filters, answer from several replicas, or "
            "have changed its weights or adapter meanwhile."
        )
    expect_same_words(served, local, (*again, *answers[:PROBED]))


def expect_same_words(served: Server, local: Policy, answers: Sequence[Answer]) -> None:
    """Raise ModelError unless the ids that a server speaks of are the same tokens here."""
    words = {token: text for answer in answers for place in answer.places for token, text in place.words.items()}
    most = max((token for answer in answers for place in answer.places for token in place.head), default=0)
    here = local.fingerprint.path
    if most >= local.network.vocabulary:
        raise ModelError(f"{served.path}: it gives log-probs of token {most}, and {here} has "
                         f"{local.network.vocabulary} tokens: the two cannot be compared.")
    wrong = [token for token, text in words.items() if not _means(local.tokenizer, token, text)]
    if words and len(wrong) > WRONG_WORDS * len(words):
        token = wrong[0]
        raise ModelError(
            f"{served.path}: {len(wrong)} of {len(words)} ids mean other tokens there; {token} is {words[token]!r}, "
            f"and in {here} {local.tokenizer.decode([token])!r}. The two cannot be compared."
        )


def _means(tokenizer: Any, token: int, text: str) -> bool:
    """Whether a token is spelled so, but for spaces around it, or is no text by itself."""
    here = [tokenizer.decode([token]), str(tokenizer.convert_ids_to_tokens(token))]
    return "\ufffd" in text + here[0] or text.strip(" ▁Ġ") in {one.strip(" ▁Ġ") for one in here}


def check_sampled(path: str, checks: dict[str, float]) -> None:
    """Raise ModelError unless responses are as likely as their own log-probs have it, to chance."""
    for name, z in checks.items():
        if not abs(z) <= WORST_Z:
            raise ModelError(
                f"{path}: its responses are not a sample of the distribution whose log-probs it gives: {name} is "
                f"{z:.1f} standard errors. It may sample at another temperature or with filters (top-p, top-k, "
                "penalties; generation_config.json of a served model sets some), or give log-probs of another stage "
                "(vllm serve --logprobs-mode)."
            )


def described_served(measured: ServedMeasurement, served: Server, confidence: float) -> dict[str, Any]:
    """The measured part of the document; null is what no server lets one know, and what is not asked.

    Raises:
        ModelError: the responses are no sample.
    """
    checks = measured.checks()
    check_sampled(served.path, checks)
    topk = measured.summary("topk", confidence)
    return {
        "direction": DIRECTIONS["reverse"],
        "temperature": 1.0,
        "prompts": topk.prompts,
        "responses": topk.responses,
        "tokens": topk.tokens,
        "truncated_fraction": measured.truncated.double().mean().item(),
        **dict.fromkeys(WANTS_LOGITS),
        **{name: [] for name in ("top_tokens", "top_prompts", "by_position", "examples")},
        "entropy": {"policy": None, "reference": None},
        "kl": dict.fromkeys(ESTIMATORS)
        | {name: kl_figures(measured.summary(name, confidence)) for name in ("topk", "k1")},
        **checks,
        "server": {"path": served.path, "top_logprobs": served.top, "mass": measured.mass},
        "warnings": list(served.notes),
    }
