"""Draw responses from the policy at one temperature, and measure them by teacher forcing.

Every response has its own row of uniform random numbers and a token is the inverse of the cumulative distribution at
one of them. So a response depends on its prompt, its numbers and the weights alone: not on the batch it was drawn in,
nor on which other responses had ended; and two policies that are given the same numbers answer alike as far as they
agree, which is what makes paired comparisons sharp.

The model's own generation_config is not consulted: a repetition penalty or a top-p hidden there would make the sampled
distribution another one than the distribution that is measured.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kltune.core import ranks
from kltune.core.kl.divergence import VocabularySums, kl_k3
from kltune.core.kl.truncation import Cut, renormalized
from kltune.core.tensors import log_distribution, per_response
from kltune.errors import DivergedError, ModelError
from kltune.lm.data.encoding import LINE_BREAK, encoded, readable
from kltune.lm.data.examples import Prompt
from kltune.lm.model.batches import Rollout, Samples, pad_right, response_scatter
from kltune.lm.model.policy import Policy

# Largest mean gap between the sampler's log-probabilities and teacher forcing's, nats per token. Rounding gives 1e-6 in
# float32 and about 1e-2 in bfloat16; a wrong temperature, mask or position gives far more.
MEAN_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
# Of float32 logits that are turned into tokens at once. On a CPU what lies between logits and token stays small and
# warm: six times faster at V = 8192 than all rows at once. A GPU wants few kernels.
DRAW_BYTES = {"cpu": 2**20, "gpu": 2**27}
# Tokens between two looks at who is still going. A look makes the CPU wait for a GPU, which then waits for the CPU.
LOOK_EVERY = {"cpu": 1, "gpu": 8}


@dataclass(frozen=True)
class Draw:
    """How responses are drawn: of at most so many tokens, at a temperature, by the random numbers of a seed."""

    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 0

    def uniforms(self, responses: int, *stream: int) -> Tensor:
        """The random numbers, a row per response: the same for every policy, others in every stream. [B, T]"""
        return uniform_numbers(np.random.default_rng([self.seed, *stream]), responses, self.max_new_tokens)


def sample_rollout(
    policy: Policy,
    prompts: Sequence[Prompt],
    uniforms: Tensor,
    *,
    temperature: float,
    exact: bool = True,
    from_reference: bool = False,
    by_token: bool = False,
    keep: Sequence[str] = (),
) -> Rollout:
    """Draw responses from the policy as ``sample`` does, and measure them: log-probabilities, KL(policy ‖ reference).

    The log-probabilities are computed afresh rather than taken from the sampler, by the same function that training
    uses, so that the first ratio is 1; the sampler's own are held against them.

    Args:
        temperature: of sampling and of everything measured.
        exact: sum over the vocabulary for exact KL and entropies; without it they are None.
        from_reference: let the two change places: the reference responds, and ``ref_kl`` is KL(reference ‖ policy).
        by_token: also add up by token of the vocabulary.
        keep: "states", "ref_states", "lower": the hidden states that are measured by, for passes that want them again.

    Raises:
        DivergedError: a log-probability or KL is not finite.
        ModelError: the sampler drew from another distribution than the one measured.
    """
    with policy.reference() if from_reference else nullcontext():
        samples = sample(policy, prompts, uniforms, temperature=temperature)
    rollout = measured_rollout(
        policy, samples, temperature, exact=exact, from_reference=from_reference, by_token=by_token, keep=keep
    )
    mask = samples.response_mask
    speaks = policy.held.network if from_reference else policy.network
    check_sampler(samples, rollout.logprobs, mask, speaks.rounds_as)
    # The sampler saw the tokens one at a time in other batches: in a narrow dtype as another policy would.
    return replace(rollout, rounding=kl_k3(samples.logprobs, rollout.logprobs, mask))


def measured_rollout(
    policy: Policy, samples: Samples, temperature: float, *, exact: bool = True, from_reference: bool = False,
    by_token: bool = False, keep: Sequence[str] = (),
) -> Rollout:
    """Responses that are there, measured by teacher forcing; arguments as ``sample_rollout``.

    samples: of a ``Rollout``, all that was measured of it is measured anew.

    Raises:
        DivergedError: a log-probability or KL is not finite.
    """
    sums = VocabularySums.zero(policy.network.vocabulary) if by_token else None
    # A model whose head cannot be cut off gives logits for hidden states: too large to keep.
    cut = policy.network.split and policy.held.network.split
    states: dict[str, Tensor | None] = dict.fromkeys(set(keep) - {"lower"} if cut else ())
    lower = policy.network.lower_states(samples.ids, samples.scored)
    measured = policy.measure(
        samples.ids, samples.scored, temperature, exact=exact, swap=from_reference, sums=sums, states=states,
        lower=lower,
    )
    flat = measured._asdict()
    for name, values in flat.items():
        if values is not None and not torch.isfinite(values).all():
            raise DivergedError(f"{name} of sampled tokens is not finite; lower optim.lr or raise kl.beta.")
    tensors = {
        name: None if values is None else response_scatter(values, samples.response_mask)
        for name, values in (flat | {"states": None, "ref_states": None} | states).items()
    }
    return Rollout(**(vars(samples) | tensors | {"sums": sums, "lower": lower if "lower" in keep else None}))


def check_sampler(samples: Samples, logprobs: Tensor, counted: Tensor, dtype: torch.dtype) -> None:
    """Raise ModelError unless the sampler's log-probabilities are those of teacher forcing, but for rounding.

    logprobs: of the same tokens by teacher forcing, nats. counted: True on the tokens to compare. [B, T] each.
    """
    gap = per_response((samples.logprobs - logprobs).abs(), counted).sum() / counted.sum()
    if not gap.item() <= MEAN_GAP[dtype]:      # NaN is not above it either
        raise ModelError(
            f"The sampler's log-probabilities differ from teacher forcing by {gap.item():.3g} nats per token on "
            f"average (allowed: {MEAN_GAP[dtype]}), so the text was not drawn from the distribution that is measured. "
            "Does the model need positions, a mask or a cache that kltune does not give it?"
        )


def uniform_numbers(rng: np.random.Generator, responses: int, max_new_tokens: int) -> Tensor:
    """The random numbers of a batch, one row per response. [B, T] float64 in [0, 1)."""
    return torch.from_numpy(rng.random((responses, max_new_tokens)))


@torch.no_grad()
def sample(
    policy: Policy, prompts: Sequence[Prompt], uniforms: Tensor, *, temperature: float, cut: Cut | None = None
) -> Samples:
    """Draw B / P responses to each of P prompts; those of one prompt lie side by side.

    Whoever is active draws: within ``policy.reference()``, the reference.

    Args:
        uniforms: the random numbers, a row per response; its width is the length limit. [B, T].
        cut: which tokens may be drawn; None: all of them, as training and every measurement of the policy itself want.

    Raises:
        ValueError: B is not a multiple of P.
        DivergedError: a logit is NaN or infinite.
    """
    per_prompt, rest = divmod(len(uniforms), len(prompts))
    if rest or per_prompt == 0:
        raise ValueError(f"{len(uniforms)} rows of random numbers do not divide among {len(prompts)} prompts.")
    longest = max(len(prompt.ids) for prompt in prompts) + uniforms.shape[1]
    step = max(1, policy.network.batching.sampled_rows(longest, len(uniforms)) // per_prompt)

    def some(start: int) -> tuple[Tensor, ...]:
        part = prompts[start : start + step]
        rows = slice(start * per_prompt, (start + len(part)) * per_prompt)
        return _decode(policy, part, uniforms[rows].to(policy.device), temperature, cut)

    with policy.network.merged():
        found = ranks.spread(range(0, len(prompts), step), some)
    lengths, tokens, logprobs = (torch.cat(column).cpu() for column in zip(*found, strict=True))
    rows = ([row.tolist() for row in flat.split(lengths.tolist())] for flat in (tokens, logprobs))
    return assemble(policy, prompts, *rows, limit=uniforms.shape[1])


def _decode(
    policy: Policy, prompts: Sequence[Prompt], uniforms: Tensor, temperature: float, cut: Cut | None
) -> tuple[Tensor, Tensor, Tensor]:
    """How long each response is [R], and the token ids and log-probabilities of all, one after the other. [N] each."""
    device, limit, per_prompt = policy.device, uniforms.shape[1], len(uniforms) // len(prompts)
    ends = torch.tensor(policy.end_ids, device=device)
    # Prompts end in the same column, as decoding wants them: right-padded backwards. [P, width] each.
    ids = policy.padded([prompt.ids[::-1] for prompt in prompts]).flip(1)
    mask = pad_right([[1] * len(prompt.ids) for prompt in prompts], 0).flip(1).to(device)
    logits, rows = policy.network.start(ids, mask, per_prompt, limit)

    count, every = len(uniforms), LOOK_EVERY[_kind(device)]
    tokens = torch.zeros(count, limit, dtype=torch.long, device=device)
    logprobs = torch.zeros(count, limit, device=device)
    lengths = torch.zeros(count, dtype=torch.long, device=device)
    alive = torch.arange(count, device=device)  # the response that each row belongs to
    going = torch.ones(count, dtype=torch.bool, device=device)  # per row
    for t in range(limit):
        drawn, seen = _draw(logits, uniforms[alive, t], temperature, cut)
        tokens[alive, t], logprobs[alive, t] = drawn, seen  # rows that have ended draw on; what they draw is cut off
        lengths.index_add_(0, alive, going.long())
        going = going & ~torch.isin(drawn, ends)
        if t == limit - 1:
            break
        if (t + 1) % every == 0:
            left = int(going.sum())
            if left == 0:
                break
            if left < rows.compact_below * len(alive):
                keep = going.nonzero().squeeze(1)
                rows.keep(keep)
                alive, drawn, going = alive[keep], drawn[keep], going[keep]
        logits = rows.feed(drawn)
    said = torch.arange(limit, device=device) < lengths[:, None]
    return lengths, tokens[said], logprobs[said]


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "gpu"


def _draw(logits: Tensor, uniforms: Tensor, temperature: float, cut: Cut | None) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution. [R, V], [R] -> tokens [R], their log-probabilities [R].

    Of logits that are not finite comes some token, and a log-probability that is not finite either.
    """
    rows = max(1, DRAW_BYTES[_kind(logits.device)] // (4 * logits.shape[1]))
    parts = zip(logits.split(rows), uniforms.split(rows), strict=True)
    tokens, logprobs = zip(*(_draw_part(*part, temperature, cut) for part in parts), strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _draw_part(logits: Tensor, uniforms: Tensor, temperature: float, cut: Cut | None) -> tuple[Tensor, Tensor]:
    logprobs = log_distribution(logits, temperature)
    if cut is not None:
        logprobs = renormalized(logprobs, cut.kept(logprobs))
    # float64: a float32 sum over 100,000 tokens is off by more than a rare token's probability. MPS has none.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = logprobs.exp().cumsum(dim=-1, dtype=wide)
    target = uniforms.to(wide)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


def assemble(
    policy: Policy,
    prompts: Sequence[Prompt],
    tokens: list[list[int]],
    logprobs: list[list[float]],
    limit: int,
) -> Samples:
    """Responses as ``Samples``, from the tokens and log-probabilities of each; ``limit``: of their lengths."""
    owner = [row * len(prompts) // len(tokens) for row in range(len(tokens))]
    asked = [list(prompts[index].ids) for index in owner]
    both = list(zip(asked, tokens, strict=True))
    ids = policy.padded([p + r for p, r in both])
    scored = pad_right([[False] * len(p) + [True] * len(r) for p, r in both], False, torch.bool)
    response_mask = pad_right([[True] * len(row) for row in tokens], False, torch.bool)
    truncated = torch.tensor([len(row) == limit and row[-1] not in policy.end_ids for row in tokens])
    flat = torch.tensor([value for row in logprobs for value in row])
    if not torch.isfinite(flat).all():
        raise DivergedError("sampling: the policy's logits are not finite; lower optim.lr or raise kl.beta.")
    device = policy.device
    return Samples(
        ids=ids,
        scored=scored.to(device),
        response_mask=response_mask.to(device),
        prompt_index=torch.tensor(owner, device=device),
        truncated=truncated.to(device),
        logprobs=response_scatter(flat, response_mask).to(device),
        prompts=tuple(prompts[index].text for index in owner),
        responses=tuple(response_text(policy, prompts[i], row) for i, row in zip(owner, tokens, strict=True)),
        messages=tuple(prompts[index].messages for index in owner),
        asked=tuple(prompts[index] for index in owner),
    )


def response_text(policy: Policy, prompt: Prompt, tokens: list[int]) -> str:
    """What a response says, without special tokens and what a chat template ends a turn with.

    Behind plain text the space that it begins with is part of it, also where a tokenizer drops that of every text.
    """
    said = tokens[:-1] if tokens[-1] == policy.ends.turn else tokens
    if prompt.messages:
        return readable(policy.tokenizer, said)
    before = encoded(policy.tokenizer, LINE_BREAK)
    alone, both = (readable(policy.tokenizer, ids) for ids in (before, [*before, *said]))
    return both.removeprefix(alone) if both.startswith(alone) else readable(policy.tokenizer, said)
