"""The trust-region step where its answer is known: the bandit, TinyLM, and quadratics."""

import math

import pytest
import torch
from torch import Tensor
from torch.func import hessian

from kltune.core.control.trust_region import (
    Trial,
    carried_ref_kl,
    conjugate_gradient,
    fisher_cotangent,
    line_search,
    mean_curvature,
    step_scale,
    surrogate,
)
from kltune.core.kl.divergence import kl_exact
from kltune.errors import DivergedError
from tests.oracles import BANDIT_REFERENCE, BANDIT_REWARDS, Responses, kl, tilt, tiny_reference_logits

RESPONSES = Responses()
RHO = tiny_reference_logits()
OPTIMUM = RESPONSES.logits_of(tilt(RESPONSES.probabilities(RHO), RESPONSES.rewards, 1.0))


# direction


def test_conjugate_gradients_solve_a_system_in_as_many_iterations_as_it_has_unknowns():
    matrix = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    wanted = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    solution = conjugate_gradient(lambda v: matrix @ v, matrix @ wanted, 3, tolerance=1e-12)
    assert solution.x.tolist() == pytest.approx(wanted.tolist(), abs=1e-12)
    assert solution.residual < 1e-12


def test_conjugate_gradients_stop_early_and_tell_the_residual_of_their_answer():
    g = torch.tensor([3.0, 4.0])
    assert conjugate_gradient(lambda v: 2.0 * v, g, 10).iterations == 1  # one eigenvalue, one iteration
    assert conjugate_gradient(lambda v: v, torch.zeros(2), 10).iterations == 0
    flat = conjugate_gradient(lambda v: 0.0 * v, g, 10)  # no curvature along g
    assert (flat.iterations, flat.residual, flat.x.tolist()) == (0, 1.0, [0.0, 0.0])
    matrix, g = torch.diag(torch.tensor([1.0, 10.0, 100.0])), torch.ones(3)
    solution = conjugate_gradient(lambda v: matrix @ v, g, 2)
    by_hand = (matrix @ solution.x - g).norm() / g.norm()
    assert solution.residual == pytest.approx(by_hand.item(), rel=1e-4)
    assert 0.0 < solution.residual < 1.0


def test_the_fisher_matrix_of_one_token_is_diag_p_less_pp():
    logits = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    p = torch.softmax(logits / 0.5, -1)[0]
    whole = (torch.diag(p) - p[:, None] * p[None]) / 0.25
    for row in torch.eye(3, dtype=torch.float64):
        assert fisher_cotangent(logits, row[None], 0.5)[0].tolist() == pytest.approx((whole @ row).tolist(), abs=1e-12)
    direct = hessian(lambda z: kl_exact(logits, z, 0.5).sum())(logits)[0, :, 0]
    assert torch.allclose(whole, direct, atol=1e-12)


def test_sign_vectors_give_the_mean_of_a_diagonal_exactly():
    diagonal = torch.tensor([1.0, 2.0, 6.0])
    assert mean_curvature(lambda v: diagonal * v, torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]])) == 3.0


# length


def bandit_step(scale_of, damping: float = 0.0) -> Tensor:
    """The bandit after one step from ρ: probabilities. [4]"""
    logits = BANDIT_REFERENCE.log()
    advantages = BANDIT_REWARDS - (BANDIT_REFERENCE * BANDIT_REWARDS).sum()

    def fisher(v: Tensor) -> Tensor:
        return fisher_cotangent(logits[None], v[None], 1.0)[0]

    g = BANDIT_REFERENCE * advantages  # Σ p A ∇log p
    x = conjugate_gradient(lambda v: fisher(v) + damping * v, g, 20, tolerance=1e-12).x
    return torch.softmax(logits + scale_of(x, fisher) * x, -1)


def test_one_bandit_step_is_the_listed_one():
    # undamped F⁺g = r − mean(r) = (−1.5, −.5, .5, 1.5) and η = √(2δ / Var_ρ(r)) = √.02: π ∝ ρ e^{√.02 r}
    new = bandit_step(lambda x, fisher: step_scale(x.dot(fisher(x)).item(), 1.0, 0.01, beta=0.0))
    assert new.tolist() == pytest.approx([0.34370203, 0.29693533, 0.22802850, 0.13133414], abs=1e-7)
    assert kl(BANDIT_REFERENCE, new) == pytest.approx(0.01026811, abs=1e-7)
    assert kl(new, BANDIT_REFERENCE) == pytest.approx(0.01052009, abs=1e-7)
    assert (new * (BANDIT_REWARDS - 1.0)).sum().item() == pytest.approx(0.14699476, abs=1e-7)


@pytest.mark.parametrize(("delta", "damping", "reached"), [(0.05, 0.0, 0.052752), (0.1, 0.0, 0.107190),
                                                           (0.01, 0.1, 0.010106)])
def test_the_quadratic_step_overshoots_by_what_is_listed_and_damping_does_not_shorten_it(delta, damping, reached):
    # the scale is of the undamped curvature: of the damped one, the last step would reach .007
    new = bandit_step(lambda x, fisher: step_scale(x.dot(fisher(x)).item(), 1.0, delta, beta=0.0), damping)
    assert kl(BANDIT_REFERENCE, new) == pytest.approx(reached, abs=1e-6)


def test_the_step_is_never_longer_than_to_the_optimum_along_it():
    # Undamped, gᵀx = xᵀFx = 2, and the optimum is 1/β away; x twice as short has the same optimum twice as far.
    assert step_scale(2.0, 2.0, 0.01, beta=0.0) == pytest.approx(0.1)
    assert step_scale(2.0, 2.0, 0.01, beta=5.0) == pytest.approx(0.1)
    assert step_scale(2.0, 2.0, 0.01, beta=20.0) == pytest.approx(0.05)
    assert step_scale(0.5, 1.0, 0.01, beta=20.0) == pytest.approx(0.1)
    assert step_scale(0.0, 2.0, 0.01, beta=4.0) == 0.0  # the batch's share sees no curvature: nothing bounds a step


def test_a_damped_step_still_ends_at_the_optimum_along_it():
    # The same bandit with much damping: J(s) = E[score] − β KL(π ‖ ρ) is largest where the rule stops, in its model.
    curvature = BANDIT_REFERENCE.diag() - BANDIT_REFERENCE[:, None] * BANDIT_REFERENCE[None]
    g = BANDIT_REFERENCE * (BANDIT_REWARDS - (BANDIT_REFERENCE * BANDIT_REWARDS).sum())
    x = torch.linalg.solve(curvature + 3.0 * torch.eye(4, dtype=g.dtype), g)
    bent, beta = x.dot(curvature @ x).item(), 2.0
    scales = torch.linspace(0.0, 10.0, 100_001, dtype=g.dtype)
    model = scales * g.dot(x) - 0.5 * beta * scales**2 * bent
    assert step_scale(bent, g.dot(x).item(), 1e6, beta) == pytest.approx(scales[model.argmax()].item(), abs=1e-3)


# line search


def test_a_cut_aims_at_the_ball_and_halves_what_lies_within_it():
    seen = []

    def measure(scale: float) -> Trial:
        seen.append(scale)
        return Trial(step_kl=(0.04, 0.02, 0.005, 0.001)[len(seen) - 1], gain=0.0)

    result = line_search(measure, 1.0, max_step_kl=0.01, tries=4)
    assert seen == pytest.approx([1.0, 0.49, 0.33955, 0.169775], rel=1e-4)     # .98 √(.01 / .04), .98 √(.01 / .02), ½
    assert not result.accepted
    assert len(result.trials) == 4


def test_a_step_far_outside_whose_kl_grows_by_less_than_its_square_ends_near_the_edge():
    result = line_search(lambda scale: Trial(step_kl=2.4 * scale**1.5, gain=1.0), 1.0, max_step_kl=0.3, tries=10)
    assert 0.85 * 0.3 < result.trials[-1].step_kl <= 0.3
    assert len(result.trials) <= 4


NOT_FINITE = (
    Trial(step_kl=math.nan, gain=1.0), Trial(step_kl=0.001, gain=math.nan), Trial(step_kl=math.inf, gain=1.0),
    Trial(step_kl=-math.inf, gain=1.0), Trial(step_kl=0.001, gain=math.inf),
)


@pytest.mark.parametrize("bad", [
    Trial(step_kl=0.011, gain=1.0), Trial(step_kl=0.001, gain=0.0), Trial(step_kl=0.001, gain=-1.0),
    Trial(step_kl=0.001, gain=1.0, within_cap=False), *NOT_FINITE,
])
def test_a_step_that_leaves_the_ball_or_gains_nothing_or_passes_the_cap_is_never_accepted(bad):
    if bad in NOT_FINITE:      # at every length: nothing is wrong with the step
        with pytest.raises(DivergedError, match=r"the shortest step tried: found (nan|-?inf)"):
            line_search(lambda scale: bad, 1.0, max_step_kl=0.01, tries=3)
    else:
        result = line_search(lambda scale: bad, 1.0, max_step_kl=0.01, tries=3)
        assert (result.accepted, result.scale, len(result.trials)) == (False, 0.0, 3)
    good = Trial(step_kl=0.01, gain=1e-9)
    later = line_search(lambda scale: bad if scale == 1.0 else good, 1.0, max_step_kl=0.01, tries=3)
    assert later.accepted
    assert later.trials[-1] == good


# surrogate and the carried KL


def test_the_surrogate_is_the_expected_advantage_to_first_order():
    mask = torch.tensor([[True, True], [True, False]])
    old = torch.tensor([[-1.0, -2.0], [-0.5, 9.0]])
    advantages = torch.tensor([[1.0, -2.0], [3.0, 9.0]])
    new = (old + torch.tensor([[math.log(1.5), math.log(0.5)], [math.log(2.0), 5.0]])).requires_grad_()
    # (.5·1 + (−.5)·(−2) + 1·3) / 2 responses
    value = surrogate(new, old, advantages, mask, responses=2)
    assert value.item() == pytest.approx(2.25, abs=1e-6)
    (gradient,) = torch.autograd.grad(surrogate(new, new.detach(), advantages, mask, 2), new)
    assert gradient.tolist() == [[0.5, -1.0], [1.5, 0.0]]


def test_kl_to_the_reference_carried_over_to_the_old_policys_responses_is_the_kl():
    # By enumeration: Σ_y π_old(y) Σ_t W_t D_t = KL(π_new ‖ ρ), although no response was drawn from π_new.
    old, new = RHO, OPTIMUM
    d = torch.where(RESPONSES.mask, kl_exact(new, RHO, 1.0)[RESPONSES.states], 0.0)
    exact, p = RESPONSES.kl(new, RHO).item(), RESPONSES.probabilities(old)

    def carried(most: float) -> float:
        per_row = carried_ref_kl(d, RESPONSES.logprobs(new), RESPONSES.logprobs(old), RESPONSES.mask, most)
        return (p * per_row).sum().item()

    assert carried(math.inf) == pytest.approx(exact, abs=1e-9)
    assert abs((p * d.sum(-1)).sum().item() - exact) > 0.01  # without W it is another number
    assert carried(1.0) < carried(1.5) < carried(math.inf)
    assert carried(2.0) == pytest.approx(exact, rel=0.02)  # no prefix here is far more likely than before


# TinyLM: the step under a price finds π*


def trust_region_run(iterations: int, *, capped: bool) -> list[float]:
    """KL(π ‖ π*) after each exact step at δ = .01, β = 1, damping 1e-3; advantages r − U, baseline subtracted."""
    logits, distances = RHO.clone(), []
    for _ in range(iterations):
        probabilities = RESPONSES.probabilities(logits)
        log_ratio = (RESPONSES.logprobs(logits) - RESPONSES.logprobs(RHO)).sum(-1)
        returns = RESPONSES.rewards - log_ratio
        returns = returns - (probabilities * returns).sum()
        table = logits.clone().requires_grad_()
        (g,) = torch.autograd.grad((probabilities * returns * RESPONSES.logprobs(table).sum(-1)).sum(), table)
        visits = probabilities[:, None] * RESPONSES.mask        # how often each state is come to
        weights = torch.zeros(7, dtype=torch.float64).index_add_(0, RESPONSES.states.flatten(), visits.flatten())

        def product(v: Tensor, logits=logits, weights=weights) -> Tensor:
            """F v of whole responses for the table [7, 3]."""
            return (weights[:, None] * fisher_cotangent(logits, v.view(7, 3), 1.0)).flatten()

        x = conjugate_gradient(lambda v, f=product: f(v) + 1e-3 * v, g.flatten(), 20).x

        def measure(scale: float, logits=logits, x=x, p=probabilities, returns=returns) -> Trial:
            new = logits + scale * x.view(7, 3)
            excess = torch.expm1((RESPONSES.logprobs(new) - RESPONSES.logprobs(logits)).sum(-1))
            return Trial(RESPONSES.kl(logits, new).item(), (p * returns * excess).sum().item())

        scale = step_scale(x.dot(product(x)).item(), g.flatten().dot(x).item(), 0.01, beta=1.0 if capped else 0.0)
        result = line_search(measure, scale, 0.01, 10)
        if result.accepted:
            assert result.trials[-1].step_kl <= 0.01
            logits = logits + result.scale * x.view(7, 3)
        distances.append(RESPONSES.kl(logits, OPTIMUM).item())
    return distances


def test_capped_at_one_over_beta_the_steps_converge_to_the_optimum_and_without_that_cap_chatter_around_it():
    assert trust_region_run(30, capped=True)[-1] < 1e-4
    last = trust_region_run(60, capped=False)[-20:]
    assert sum(last) / len(last) > 5e-4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_curvature_that_is_not_finite_is_named_and_is_no_step_of_length_0(bad):
    ones = torch.ones(3)
    with pytest.raises(DivergedError, match=r"the mean curvature: found (nan|inf)"):
        mean_curvature(lambda v: v * bad, ones[None])
    with pytest.raises(DivergedError, match=r"curvature along a direction of conjugate gradients: found (nan|inf)"):
        conjugate_gradient(lambda v: v * bad, ones, iterations=2)
    for numbers, site in (((bad, 1.0), "curvature"), ((1.0, bad), "slope")):
        with pytest.raises(DivergedError, match=f"the {site} of a step: found {bad}"):
            step_scale(*numbers, max_step_kl=0.1, beta=0.0)
