"""What is minimised in distillation on the policy's own responses: a cost at each token, and what a token leads to.

    KL(policy ‖ teacher) + c · KL(policy ‖ reference) = E_{y ~ π} Σ_t cost_t,
    cost_t = D_t(teacher) + c D_t(reference)

each D exact over the vocabulary. Its minimum over all policies is the geometric mixture of the two,
π ∝ teacher^{1/(1 + c)} · reference^{c/(1 + c)}, over whole responses.
"""

import torch
from torch import Tensor

from kltune.core.kl.divergence import log_ratios
from kltune.core.objectives.advantages import strictly_future
from kltune.core.objectives.losses import exact_kl_loss
from kltune.core.tensors import expect_same_shape, per_response


def whole_response_loss(
    cost: Tensor, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, responses: int, expected: Tensor
) -> Tensor:
    """The cost of whole responses, with its unbiased gradient: a token answers for those that come after it, too.

        (1/responses) Σ_b Σ_t [ W_t cost_t − sg(W_t) (w_t − sg w_t) expected_t ],
        w_t = π_t / π_old,t,    W_t = Π_{s<t} w_s

    The first part is ``exact_kl_loss`` of the cost. Its noise is that of all the cost that follows a token, most of
    which follows any token; what may be ``expected`` to follow, which must not depend on the token itself, is taken
    off. That changes no expectation and no value.

    Source: docs/maths.md 9; the second part is a baseline as in Williams 1992.

    Args:
        cost: at every response token, carrying the gradient. [B, T], nats.
        logprobs: log π of the sampled tokens, carrying the gradient. [B, T], nats.
        old_logprobs: the same under the policy that sampled them. [B, T], nats.
        mask: True on response tokens. [B, T], bool.
        responses: responses in the whole minibatch, at least 1.
        expected: cost expected after each token, from ``expected_after``; 0 for none. [B, T], nats.

    Returns:
        A scalar, nats per response.

    Raises:
        ValueError: the shapes differ, or ``responses`` is below 1.
    """
    loss = exact_kl_loss(cost, logprobs, old_logprobs, mask, responses)
    change = log_ratios(logprobs, old_logprobs.detach(), mask)
    so_far = change.detach().cumsum(dim=1).exp()        # W_t w_t
    return loss - per_response(so_far * (change - change.detach()) * expected, mask).sum() / responses


def token_loss(cost: Tensor, mask: Tensor, responses: int) -> Tensor:
    """The cost at the tokens that were sampled, each on its own: another objective, which most distillation minimises.

        (1/responses) Σ_b Σ_t cost_t

    Its gradient lacks that a token leads to the tokens after it. It is not the gradient of a KL between policies (of
    that of KL(policy ‖ reference) it is off by 18 % on the enumerated model of docs/maths.md 9), and its fixed point
    is the mixture of the next-token distributions at each prefix, not of the responses.

    Args:
        cost: at every response token, carrying the gradient. [B, T], nats.
        mask: True on response tokens. [B, T], bool.
        responses: responses in the whole minibatch, at least 1.

    Returns:
        A scalar, nats per response.

    Raises:
        ValueError: the shapes differ, or ``responses`` is below 1.
    """
    expect_same_shape(cost=cost, mask=mask)
    if not responses >= 1:
        raise ValueError(f"responses is {responses}, must be at least 1: it is what the sum is divided by")
    return per_response(cost, mask).sum() / responses


def head_and_tail(
    head: Tensor, logprobs: Tensor, old_logprobs: Tensor, teacher_logprobs: Tensor, outside: Tensor, usual: Tensor
) -> Tensor:
    """Cost at each token where a teacher says how likely a few tokens S are, and the one that was sampled.

        D_t ≈ Σ_{v∈S} π(v) log(π(v)/teacher(v)) + 1[y_t ∉ S] w_t log(π(y_t)/teacher(y_t)),    w_t = π_t / π_old,t

    For y_t from π_old and an S that does not depend on it, the mean is KL(π ‖ teacher) at that prefix for *every* π;
    so the mean of its gradient is that KL's, and whole_response_loss and token_loss of it are what they are of the
    exact one. Nothing is taken for granted of the tokens that the teacher does not speak of.

    The probabilities of S and of the others add up to 1, so any (1 + u) times both sums may be taken off the gradient.
    Where u is what log π/teacher usually is, hardly any noise is left near the teacher, and none at it.

    Args:
        head: the sum over S, carrying the gradient less (1 + u) π(S), as of ``read_logprobs_and_head``. [B, T], nats.
        logprobs: log π of the sampled tokens, carrying the gradient. [B, T], nats.
        old_logprobs: the same under the policy that sampled them. [B, T], nats.
        teacher_logprobs: the teacher's. [B, T], nats.
        outside: True where the sampled token is not in S, False outside of responses. [B, T], bool.
        usual: u; must not depend on the sampled token. [B, T], nats.

    Returns:
        [B, T], nats, of either sign.

    Raises:
        ValueError: the shapes differ.
    """
    expect_same_shape(head=head, outside=outside, usual=usual)
    weight = log_ratios(logprobs, old_logprobs.detach(), outside).exp()
    return head + weight * log_ratios(logprobs, teacher_logprobs, outside) - (1.0 + usual) * (weight - weight.detach())


def expected_after(cost: Tensor, mask: Tensor) -> Tensor:
    """What usually follows a token: the mean, over the *other* responses that are as long, of the cost after it.

        expected_{b,t} = mean_{a ≠ b} Σ_{s>t} cost_{a,s}

    Leaving the response itself out is what keeps a gradient that this is taken off unbiased.

    Args:
        cost: measured under the policy that sampled. [B, T], nats.
        mask: True on response tokens. [B, T], bool.

    Returns:
        [B, T], nats, no gradient; 0 outside the mask, and where no other response is as long.
    """
    after = strictly_future(cost.detach(), mask)
    others = mask.sum(dim=0) - 1
    mean = (after.sum(dim=0) - after) / others.clamp(min=1)
    return torch.where(mask & (others > 0), mean, 0.0)
