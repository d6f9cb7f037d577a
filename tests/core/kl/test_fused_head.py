"""The head whose gradient is computed in the forward pass: the numbers of plain autograd, without its memory."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kltune.core.kl.divergence import kl_exact
from kltune.core.kl.fused_head import (
    AfterHead,
    read_logprobs,
    read_logprobs_and_head,
    read_logprobs_and_kl,
    through_head,
)
from kltune.core.tensors import token_logprobs

POSITIONS, HIDDEN, VOCABULARY = 21, 6, 50


def numbers(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, tokens, and the reference's logits."""
    rng = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=rng, dtype=dtype)
    tokens = torch.randint(VOCABULARY, (POSITIONS,), generator=rng)
    hidden, weight = draw(POSITIONS, HIDDEN, requires_grad=True), draw(VOCABULARY, HIDDEN)
    return hidden, weight, draw(VOCABULARY), tokens, 2 * draw(POSITIONS, VOCABULARY)


@pytest.mark.parametrize("rows", [1, 8, 21, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients_are_those_of_autograd_over_all_logits(rows, temperature, biased):
    hidden, weight, bias, tokens, ref_logits = numbers(rows)
    bias = bias if biased else None
    upstream = torch.randn(2, POSITIONS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reader = partial(read_logprobs_and_kl, temperature=temperature)
    found = through_head(hidden, weight, bias, reader, (tokens, lambda part: ref_logits[part]), rows)
    (mine,) = torch.autograd.grad(found, hidden, tuple(upstream))

    logits = hidden @ weight.T + (0 if bias is None else bias)
    wanted = token_logprobs(logits, tokens, temperature), kl_exact(logits, ref_logits, temperature)
    (plain,) = torch.autograd.grad(wanted, hidden, tuple(upstream), retain_graph=True)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(mine, plain, atol=1e-12, rtol=1e-10)
    # a loss of one reading alone is enough
    (alone,) = through_head(hidden, weight, bias, partial(read_logprobs, temperature=temperature), (tokens,), rows)
    torch.testing.assert_close(alone, wanted[0], atol=1e-12, rtol=1e-12)
    (plain,) = torch.autograd.grad(wanted[0], hidden, upstream[0], retain_graph=True)
    (mine,) = torch.autograd.grad(alone, hidden, upstream[0])
    torch.testing.assert_close(mine, plain, atol=1e-12, rtol=1e-10)
    _, kl = through_head(hidden, weight, bias, reader, (tokens, ref_logits), rows)
    (mine,) = torch.autograd.grad(kl.sum(), hidden)
    torch.testing.assert_close(mine, torch.autograd.grad(wanted[1].sum(), hidden)[0], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("k", [1, 7, VOCABULARY])
def test_what_a_few_tokens_add_to_a_kl_is_differentiated_as_by_autograd(k):
    hidden, weight, bias, tokens, ref_logits = numbers(k)
    theirs = (ref_logits / 0.6).log_softmax(-1)
    heads = theirs.topk(k).indices
    said = theirs.gather(-1, heads)
    usual = torch.linspace(-2.0, 1.0, POSITIONS, dtype=torch.float64)
    reader = partial(read_logprobs_and_head, temperature=0.6)
    found = through_head(hidden, weight, bias, reader, (tokens, heads, said, usual, ref_logits), 8)
    logits = hidden @ weight.T + bias
    a = (logits / 0.6).log_softmax(-1).gather(-1, heads)
    wanted = token_logprobs(logits, tokens, 0.6), kl_exact(logits, ref_logits, 0.6), (a.exp() * (a - said)).sum(-1)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    wanted = (*wanted[:2], wanted[2] - (1.0 + usual) * a.exp().sum(-1))        # whose slope it has
    plain_reading = reader(logits, tokens, heads, said, usual, ref_logits, slopes=False)[-1].value
    torch.testing.assert_close(plain_reading, found[-1], atol=1e-12, rtol=1e-12)
    both = [torch.autograd.grad(value.sum(), hidden, retain_graph=True)[0] for value in (plain_reading, wanted[2])]
    torch.testing.assert_close(*both, atol=1e-12, rtol=1e-10)
    upstream = torch.randn(3, POSITIONS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (mine,) = torch.autograd.grad(found, hidden, tuple(upstream))
    torch.testing.assert_close(
        mine, torch.autograd.grad(wanted, hidden, tuple(upstream))[0], atol=1e-12, rtol=1e-10
    )


@pytest.mark.parametrize("after", [AfterHead(0.3), AfterHead(3.0, divides=True), AfterHead(0.7, cap=2.0)])
def test_what_a_model_does_behind_its_head_is_differentiated_too(after):
    hidden, weight, bias, tokens, ref_logits = numbers(5)
    reader = partial(read_logprobs_and_kl, temperature=0.6)
    found = through_head(hidden, weight, bias, reader, (tokens, ref_logits), 8, after)
    (mine,) = torch.autograd.grad(sum(reading.sum() for reading in found), hidden)
    x = (hidden @ weight.T + bias) * (1.0 / after.scale if after.divides else after.scale)
    z = x if after.cap is None else after.cap * torch.tanh(x / after.cap)
    wanted = token_logprobs(z, tokens, 0.6), kl_exact(z, ref_logits, 0.6)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    (plain,) = torch.autograd.grad(sum(reading.sum() for reading in wanted), hidden)
    torch.testing.assert_close(mine, plain, atol=1e-12, rtol=1e-10)


def test_a_token_that_neither_may_say_moves_nothing():
    hidden, weight, _, tokens, ref_logits = numbers(2)
    bias = torch.zeros(VOCABULARY, dtype=torch.float64)
    bias[7] = -math.inf
    ref_logits[:, 7] = -math.inf
    tokens = tokens.where(tokens != 7, 8)
    found = through_head(hidden, weight, bias, partial(read_logprobs_and_kl, temperature=1.0), (tokens, ref_logits), 8)
    (gradient,) = torch.autograd.grad(sum(reading.sum() for reading in found), hidden)
    keep = torch.arange(VOCABULARY) != 7
    again = numbers(2)[0]
    logits, positions = again @ weight[keep].T, tokens - (tokens > 7).long()
    wanted = token_logprobs(logits, positions, 1.0).sum() + kl_exact(logits, ref_logits[:, keep], 1.0).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, again)[0], atol=1e-12, rtol=1e-10)


def test_it_cannot_be_differentiated_twice_in_silence():
    hidden, weight, _, tokens, _ = numbers(3)
    (logprobs,) = through_head(hidden, weight, None, partial(read_logprobs, temperature=1.0), (tokens,), 8)
    (once,) = torch.autograd.grad(logprobs.square().sum(), hidden, create_graph=True)  # the square depends on hidden
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation and look at what it gave."""
        out = func(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        self.numel = max([self.numel, *(tensor.numel() for tensor in tensors)])
        return out


@pytest.mark.parametrize("positions", [64, 512])
def test_no_tensor_is_larger_than_a_chunk_of_logits(positions):
    rows, vocabulary = 16, 1000
    hidden = torch.randn(positions, HIDDEN, requires_grad=True)
    weight, tokens = torch.randn(vocabulary, HIDDEN), torch.randint(vocabulary, (positions,))
    with Largest() as seen:
        found = through_head(
            hidden, weight, None, partial(read_logprobs_and_kl, temperature=1.0),
            (tokens, lambda part: torch.zeros(len(tokens[part]), vocabulary)), rows,
        )
        sum(reading.sum() for reading in found).backward()
    assert seen.numel == rows * vocabulary
