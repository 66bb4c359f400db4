"""What a step of NaturalTrustRegion does."""

import math

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td

from optimizers import natural
from problems import bits, problem, unchanged
from strategies import costly
from trustregion import FisherOperator, Status, kl_ball_step, mean_kl, to_dense
from trustregion.operators import FunctionOperator


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@costly
@given(st.integers(0, 10_000), st.floats(-6, 1), st.floats(-6, 0))
def test_an_accepted_step_improves_within_delta_and_a_rejected_one_moves_nothing(
    dtype, seed, log_delta, log_damping
):
    model, closure = problem(dtype, seed, n=20)
    delta = 10**log_delta
    optimizer = natural(model.parameters(), delta, damping=10**log_damping)
    for _ in range(3):
        before, (loss, old) = bits(model), closure()
        assert optimizer.step(closure).item() == loss.item()
        new_loss, new = closure()
        info = optimizer.info
        if info.accepted:
            assert new_loss < loss
            assert mean_kl(old, new) <= delta
            assert info.kl == mean_kl(old, new).item()
            assert info.new_loss == new_loss.item()
            assert info.actual_reduction == pytest.approx((loss - new_loss).item(), rel=1e-4)
        else:
            assert unchanged(model, before)
            assert (info.kl, info.new_loss, info.actual_reduction) == (0.0, loss.item(), 0.0)


def test_the_step_is_the_natural_gradient_step_of_a_dense_solve():
    model, closure = problem(torch.float64)
    params = list(model.parameters())
    loss, distribution = closure()
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(loss, params, retain_graph=True)])
    F = to_dense(FisherOperator(distribution, params))
    x = -torch.linalg.solve(F + 0.01 * torch.eye(len(g), dtype=g.dtype), g)
    s = x * (2 * 1e-6 / (x @ F @ x)).sqrt()
    before = torch.cat([p.detach().reshape(-1) for p in params])
    optimizer = natural(params, 1e-6, damping=0.01, cg_max_iter=200, cg_rtol=1e-12)
    optimizer.step(closure)
    moved = torch.cat([p.detach().reshape(-1) for p in params]) - before
    torch.testing.assert_close(moved, optimizer.info.scale * s, rtol=1e-6, atol=1e-12)
    predicted = -optimizer.info.scale * (g @ s).item()
    assert optimizer.info.predicted_reduction == pytest.approx(predicted, rel=1e-6)
    assert optimizer.info.rho == pytest.approx(1, abs=0.01)  # the radius is tiny


def test_small_steps_reach_the_edge_of_the_ball():
    for delta in (1e-6, 1e-4, 1e-2):
        model, closure = problem(torch.float64)
        optimizer = natural(model.parameters(), delta, backtrack_factor=0.95)
        optimizer.step(closure)
        assert optimizer.info.kl >= 0.8 * delta


def test_the_scale_of_the_loss_changes_nothing():
    results = []
    for factor in (1.0, 2.0**-60, 2.0**20):
        model, closure = problem()

        def scaled(closure=closure, factor=factor):
            loss, distribution = closure()
            return factor * loss, distribution

        natural(model.parameters(), 0.01).step(scaled)
        results.append(bits(model))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_function_does_not_depend_on_the_parametrization():
    """theta = T phi, solved exactly without damping, moves the function the same way."""
    torch.manual_seed(0)
    x = torch.randn(40, 4, dtype=torch.float64)
    y = (x.sum(1) > 0).double()
    T = torch.randn(4, 4, dtype=torch.float64) + 2 * torch.eye(4, dtype=torch.float64)
    outputs = []
    for matrix in (torch.eye(4, dtype=torch.float64), T):
        phi = torch.linalg.solve(matrix, torch.full((4,), 0.1).double()).requires_grad_()

        def closure(phi=phi, matrix=matrix):
            distribution = td.Bernoulli(logits=x @ (matrix @ phi))
            return -distribution.log_prob(y).mean(), distribution

        options = {"damping": 0.0, "cg_max_iter": 50, "cg_rtol": 1e-12}
        natural([phi], 0.01, **options).step(closure)
        outputs.append((x @ (matrix @ phi)).detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("maximize", [False, True])
def test_maximize_is_the_negated_loss(maximize):
    model, closure = problem()

    def objective():
        loss, distribution = closure()
        return (-loss if maximize else loss), distribution

    optimizer = natural(model.parameters(), 0.01, maximize=maximize)
    start = optimizer.step(objective)
    info = optimizer.info
    assert info.accepted
    assert info.loss == start.item() == pytest.approx(objective()[0].item(), abs=0.5)
    assert (info.new_loss > info.loss) == maximize
    assert info.actual_reduction > 0
    reference, reference_closure = problem()
    natural(reference.parameters(), 0.01).step(reference_closure)
    assert unchanged(model, bits(reference))


def test_info_counts_products_and_evaluations():
    model, closure = problem()
    calls = 0

    def counted():
        nonlocal calls
        calls += 1
        return closure()

    optimizer = natural(model.parameters(), 0.5, cg_max_iter=7, cg_rtol=0.0)
    optimizer.step(counted)
    info = optimizer.info
    assert (info.products, info.cg_iterations, info.cg_status) == (7, 7, Status.MAX_ITER)
    assert calls == info.evaluations == info.backtracks + 3  # the first step checks the closure
    assert str(info).startswith("accepted: loss")


@pytest.mark.parametrize(
    ("power", "dtype"),
    [(-140, torch.float32), (120, torch.float32), (-1000, torch.float64), (1000, torch.float64)],
)
def test_gradients_of_every_size_give_the_same_step(power, dtype):
    steps = []
    for exponent in (0, power):
        p = torch.zeros(3, dtype=dtype, requires_grad=True)
        weights = (torch.tensor([1.0, -2.0, 3.0]).double() * 2.0**exponent).to(dtype)
        optimizer = natural([p], 0.01, damping=0.1)
        optimizer.step(lambda p=p, weights=weights: ((p * weights).sum(), td.Normal(p, 1.0)))
        assert optimizer.info.accepted
        assert 0 < optimizer.info.rho < 2
        steps.append(p.detach())
    assert torch.equal(*steps)


def test_a_preconditioner_is_used():
    """With the inverse itself, one product gives the step that otherwise takes many."""
    model, closure = problem(torch.float64)
    params = list(model.parameters())
    F = to_dense(FisherOperator(closure()[1], params))
    inverse = torch.linalg.inv(F + 0.01 * torch.eye(len(F), dtype=F.dtype))
    exact = natural(params, 0.01, damping=0.01, preconditioner=inverse)
    exact.step(closure)
    assert exact.info.products == 1


def test_exact_curvature_of_one_dimension():
    """Normal(p, s): F = 1/s^2, so the step to the ball's edge is s sqrt(2 delta)."""
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = natural([p], 0.02, damping=0.0)
    optimizer.step(lambda: (p.sum(), td.Normal(p, 3.0)))
    assert p.item() == pytest.approx(-3 * math.sqrt(0.04))
    assert optimizer.info.backtracks == 0


def test_callable_operators_are_usable_as_public_parts():
    """The pieces compose without the optimizer, as the documentation says."""
    F = FunctionOperator(lambda v: 4 * v, 2)
    step = kl_ball_step(-torch.ones(2), torch.ones(2), 0.5, damped_curvature=8.0, damping=0.0)
    assert 0.5 * (step.s @ (F @ step.s)).item() == pytest.approx(0.5)
