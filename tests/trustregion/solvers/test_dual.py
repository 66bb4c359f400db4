"""Laws of the dual and the primal solve."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td

import oracles
from cases import cases
from counting import Counting
from dual_cases import METHODS, Damped, counting, damped, each_method
from strategies import DTYPES
from trustregion import FisherOperator, Status
from trustregion.solvers import dual_is_cheaper, dual_solve


def attainable(system, x):
    """The residual that rounding of ``x``, of ``H`` and of the kept rows leaves."""
    size = torch.linalg.matrix_norm(system.A, 2) * x.double().norm()
    wide = torch.finfo(torch.float64).eps
    # a rank decided in float64: singular values below sqrt(m eps) of the largest are dropped
    lost = math.sqrt(len(system.u) * wide) * torch.linalg.matrix_norm(system.J.double(), 2)
    return (20 * system.eps * size + 2 * lost * system.u.double().norm()).item()


@given(damped())
def test_the_dual_residual_is_at_rounding(system):
    solution = system.solve(rtol=0.0)
    assert solution.method == "dual"
    assert system.residual(solution.x) <= attainable(system, solution.x)


@given(damped(dtypes=[torch.float64], dampings=(-6.0, 0.0)))
def test_the_dual_solution_equals_a_dense_solve(system):
    solution = system.solve(rtol=1e-6)
    assert solution.status is Status.CONVERGED or system.g.norm() <= 1e-6 * system.u.norm()
    exact = torch.linalg.solve(system.A, system.g)
    # error <= residual / damping
    bound = attainable(system, solution.x) + 100 * system.eps * system.kappa * system.g.norm()
    assert (solution.x - exact).norm() * system.damping <= bound


@given(damped(ranks=[1.0], max_log_condition=2.0, dampings=(-3.0, 0.0)))
def test_dual_and_primal_agree(system):
    # float32 products of the primal method leave about eps times the condition
    rtol = max(1e-10, 100 * system.eps * system.kappa)
    dual, primal = system.solve(rtol=rtol), system.solve("primal", rtol=rtol)
    assert (dual.method, primal.method) == ("dual", "primal")
    gap = (dual.x.double() - primal.x.double()).norm()
    # the one residual is below the tolerance, and the other at most ten times it by float32 noise
    assert gap * system.damping <= 11 * rtol * system.g.norm() + attainable(system, dual.x)


@given(damped(), st.sampled_from(METHODS), st.sampled_from([1e-2, 1e-5, 1e-9]))
def test_converged_is_a_statement_on_the_true_residual(system, method, rtol):
    solution = system.solve(method, rtol=rtol)
    assert solution.x.isfinite().all()
    if solution.status is Status.CONVERGED:
        true = system.residual(solution.x)
        # the primal residual is measured by products in the dtype, the dual one in float64
        size = torch.linalg.matrix_norm(system.A, 2) * solution.x.double().norm()
        eps = system.eps if method == "primal" else torch.finfo(torch.float64).eps
        noise = 50 * eps * (size + torch.linalg.matrix_norm(system.J.double(), 2) * system.u.norm())
        assert true <= rtol * system.g.norm() * (1 + 1e-6) + noise


@given(damped())
def test_the_numbers_reported_are_those_of_the_returned_x(system):
    solution = system.solve(rtol=0.0)
    x, g, A = solution.x.double(), system.g, system.A
    wide = torch.finfo(torch.float64).eps
    size = (
        torch.linalg.matrix_norm(A, 2) * x.norm()
        + torch.linalg.matrix_norm(system.J.double(), 2) * system.u.double().norm()
    )
    noise = 100 * wide * size.item()
    assert abs(solution.residual_norm - system.residual(x)) <= noise
    assert solution.true_residual_norm == solution.residual_norm
    assert abs(solution.curvature - x @ A @ x) <= noise * x.norm()
    assert abs(solution.model_value - (0.5 * x @ A @ x - g @ x)) <= noise * x.norm()
    assert solution.norm == pytest.approx(x.norm().item(), rel=1e-14)


@given(damped(ranks=[0.5], dtypes=[torch.float32], max_log_condition=1.0))
def test_null_vectors_of_the_jacobian_are_not_amplified(system):
    """The case against LU of ``H K + damping I``, which divides them by the damping."""
    solution = system.solve()
    # a matrix of half the rank in exact arithmetic has rounding in the other half in float32;
    # from 1e-8 on the right-hand side it takes 1e-7 / sqrt(damping) of the answer with it
    assert system.residual(solution.x) <= 1e-4 * system.J.double().norm() * system.u.norm()


def test_lu_would_be_wrong_where_the_jacobian_is_rank_deficient():
    worst_lu = worst_ours = 0.0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        J = torch.randn(4, 60, generator=generator).repeat_interleave(2, 0)  # each row twice
        u = torch.randn(8, generator=generator)
        system = Damped(J, None, u, 1.0, 1e-8 * J.norm().item() ** 2)
        K = J.double() @ J.double().T
        z = torch.linalg.solve(K + system.damping * torch.eye(8).double(), u.double())
        size = system.g.norm().item()
        worst_lu = max(worst_lu, system.residual(J.T @ z.float()) / size)
        worst_ours = max(worst_ours, system.residual(system.solve().x) / size)
    assert worst_ours < 1e-5 < 1e-2 < worst_lu


@each_method
@pytest.mark.parametrize("power", [-60, -7, 3, 60])
@given(system=damped(dtypes=[torch.float64]))
def test_scaling_by_powers_of_two_is_exact(method, power, system):
    factor, plain = 2.0**power, system.solve(method)
    scaled = system.solve(method, u=system.u * factor)
    assert torch.equal(scaled.x, plain.x * factor)
    assert scaled.status is plain.status
    assert scaled.residual_norm == plain.residual_norm * factor
    assert scaled.curvature == plain.curvature * factor**2
    J = Damped(system.J * factor, system.H, system.u, system.scale, system.damping * factor**2)
    assert torch.equal(J.solve(method).x, plain.x / factor)
    both = system.solve(method, scale=system.scale * factor, damping=system.damping * factor)
    assert torch.equal(both.x, plain.x / factor)
    if system.H is not None:
        metric = system.solve(method, metric=system.H * factor, damping=system.damping * factor)
        assert torch.equal(metric.x, plain.x / factor)


@given(damped(metrics=["full"]))
def test_products_of_the_dual_method(system):
    J, calls = counting(system.J)
    H = Counting(system.H)
    arguments = {"metric": H, "damping": system.damping, "scale": system.scale}
    solution = dual_solve(J, system.u, method="dual", **arguments)
    m = len(system.u)
    assert calls == ["J'"] * m
    assert solution.products == H.products == m
    assert solution.iterations == 0
    dense = system.solve()
    assert dense.products == 0
    assert torch.equal(dense.x, solution.x) or dense.status is not Status.CONVERGED


@given(damped(metrics=["full"]), st.integers(0, 6))
def test_products_of_the_primal_method(system, k):
    J, calls = counting(system.J)
    H = Counting(system.H)
    arguments = {"metric": H, "damping": system.damping, "scale": system.scale}
    solution = dual_solve(J, system.u, method="primal", max_iter=k, rtol=0.0, **arguments)
    assert solution.products == len(calls) == 2 * calls.count("J") + 1
    assert H.products == calls.count("J")
    assert solution.iterations <= k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [case.name for case in cases()])
def test_a_natural_gradient_of_a_model(name, dtype):
    case = next(c for c in cases(dtype) if c.name == name)
    F = FisherOperator(case.predict(case.params), case.params)
    J = F.jacobian
    u = torch.randn(J.shape[0], generator=torch.Generator().manual_seed(3)).to(dtype)
    solution = dual_solve(J, u, metric=F.metric, damping=0.1, scale=1 / F.batch_size, method="dual")
    wide = next(c for c in cases() if c.name == name)
    dense = oracles.kl_hessian(wide.predict, wide.params)
    g = oracles.output_jacobian(wide.predict, wide.params).T @ u.double()
    exact = torch.linalg.solve(dense + 0.1 * torch.eye(len(g)).double(), g)
    assert solution.status is Status.CONVERGED
    # in float32 the Jacobian and the metric are rounded, and divided by the damping
    rtol = 1e-9 if dtype is torch.float64 else 1e-3
    assert (solution.x.double() - exact).norm() <= rtol * exact.norm()


def test_the_derivative_of_a_loss_gives_its_natural_gradient():
    W = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(8, 20, dtype=torch.float64), torch.arange(8) % 3
    d = td.Categorical(logits=x @ W)
    F = FisherOperator(d, [W])
    loss = -d.log_prob(y).mean()
    (u,) = torch.autograd.grad(loss, d.logits, retain_graph=True)
    solution = dual_solve(
        F.jacobian, u.flatten(), metric=F.metric, damping=0.01, scale=1 / F.batch_size, rtol=1e-12
    )
    (g,) = torch.autograd.grad(loss, W, retain_graph=True)
    residual = F @ solution.x + 0.01 * solution.x - g.flatten()
    assert solution.status is Status.CONVERGED
    assert residual.norm() <= 1e-9 * g.norm()


def test_auto_takes_the_method_with_fewer_operations():
    J = torch.randn(8, 2000)
    few = dual_solve(J, torch.ones(8), damping=0.1, max_iter=2)
    many = dual_solve(J, torch.ones(8), damping=0.1)
    assert (few.method, many.method) == ("primal", "dual")
    assert many.primal_flops == 2 * (2 * 8 * 2000) * 9  # rank 8: done after 9 iterations
    assert many.dual_flops == 8 * 8 * 2000 + 13 * 8**3 + 2 * 2 * 8 * 2000
    products_only, _ = counting(J)
    mapped = dual_solve(products_only, torch.ones(8), damping=0.1)
    assert mapped.dual_flops == many.dual_flops + 8 * (2 * 8 * 2000)
    tall = dual_solve(torch.randn(300, 4), torch.ones(300), damping=0.1)
    assert tall.method == "primal"
    assert tall.primal_flops == 2 * (2 * 300 * 4) * 4  # n = 4 iterations
    wide = dual_solve(torch.randn(90, 200), torch.ones(90), damping=0.1)
    assert wide.primal_flops == 2 * (2 * 90 * 200) * 50


@given(st.integers(1, 5000), st.integers(1, 10**6), st.integers(1, 300))
def test_the_count_is_the_documented_one(m, n, iterations):
    p = 2 * m * n
    expected = m * m * n + 13 * m**3 + 2 * p < 2 * p * iterations
    assert dual_is_cheaper(m, n, iterations) == expected
    p = 7 * m * n
    options = {"product_flops": p, "gram_flops": m * p + m * m * n}
    expected = m * p + m * m * n + 13 * m**3 + 2 * p < 2 * p * iterations
    assert dual_is_cheaper(m, n, iterations, **options) == expected


@each_method
def test_a_rule_as_tolerance_sees_the_norm_of_the_gradient(method):
    J, u, seen = torch.diag(torch.tensor([4.0, 3.0])), torch.tensor([3.0, 3.0]) * 2**40, []

    def rule(size):
        seen.append(size)
        return 0.5

    assert dual_solve(J, u, damping=1.0, method=method, rtol=rule).status is Status.CONVERGED
    assert seen == [15.0 * 2**40]
