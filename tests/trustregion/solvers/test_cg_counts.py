"""What conjugate gradients cost: products, warm starts, verification, many columns."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counting import Counting
from strategies import POSITIVE, systems
from trustregion import Identity, Status, cg
from trustregion.solvers import forcing_sequence


@given(systems(max_log_condition=4, dtypes=[torch.float64]), st.integers(1, 15))
def test_one_product_an_iteration(system, k):
    A = Counting(system.A)
    solution = cg(A, system.b, rtol=1e-8, max_iter=k)
    assert A.products == solution.products == solution.iterations
    assert solution.iterations <= k
    assert solution.true_residual_norm is None


@given(systems(kinds=[*POSITIVE, "sign-mixed", "rank-deficient"]), st.booleans(), st.booleans())
def test_every_product_is_counted(system, warm, verify):
    A, M = Counting(system.A), Counting(torch.eye(len(system.b), dtype=system.b.dtype))
    x0 = system.b / system.scale if warm else None
    solution = cg(A, system.b, x0, M=M, rtol=0.0, verify=verify)
    assert A.products == solution.products
    assert M.products <= A.products + 1


@given(systems(max_log_condition=2), st.integers(1, 4))
def test_verification_costs_one_product_and_measures(system, k):
    A = Counting(system.A)
    plain = cg(system.A, system.b, rtol=1e-3, max_iter=k)
    solution = cg(A, system.b, rtol=1e-3, max_iter=k, verify=True)
    assert A.products == solution.products == plain.iterations + 1
    true = (system.b.double() - system.exact @ solution.x.double()).norm().item()
    size = system.b.double().norm() + system.scale * solution.x.double().norm()
    assert abs(solution.true_residual_norm - true) <= 10 * system.eps * size  # of one product
    assert torch.equal(solution.x, plain.x)
    assert plain.true_residual_norm is None


@given(systems(max_log_condition=3, dtypes=[torch.float64]))
def test_a_warm_start_costs_one_product_and_helps(system):
    exact = torch.linalg.solve(system.exact, system.b)
    A = Counting(system.A)
    start = exact.clone()
    solution = cg(A, system.b, start, rtol=1e-6)
    assert (solution.status, solution.iterations) == (Status.CONVERGED, 0)
    assert A.products == solution.products == 1
    assert torch.equal(start, exact)  # not written to
    far = cg(system.A, system.b, start + exact.roll(1), rtol=1e-10)
    assert (far.x - exact).norm() <= 1e-6 * exact.norm() * (1 + system.condition * 1e-3)


def test_a_product_that_went_wrong_once_is_mended_by_verification():
    A, b, calls = torch.diag(torch.logspace(0, 2, 30, dtype=torch.float64)), torch.ones(30), 0
    b = b.double()

    def hit(v):
        nonlocal calls
        calls += 1
        return A @ v + (0.1 * v.norm() if calls == 2 else 0.0)

    solution = cg(hit, b, rtol=1e-8, verify=True)
    assert solution.status is Status.CONVERGED
    assert (b - A @ solution.x).norm() <= 1e-8 * b.norm()
    assert solution.products == calls > solution.iterations + 1  # measured, and gone on


@given(systems(max_log_condition=3, dtypes=[torch.float64]), st.integers(1, 6))
def test_the_norm_is_that_of_the_way_from_the_start(system, k):
    start = torch.ones_like(system.b) / system.scale
    solution = cg(system.A, system.b, start, rtol=0.0, max_iter=k)
    way = (solution.x - start).norm().item()
    assert solution.norm == pytest.approx(way, rel=1e-12, abs=1e-13 * start.norm().item())


@given(systems(max_log_condition=3, dtypes=[torch.float64]), st.integers(1, 6))
def test_curvature_with_a_warm_start(system, k):
    start = torch.ones_like(system.b) / system.scale
    solution = cg(system.A, system.b, start, rtol=0.0, max_iter=k)
    x = solution.x
    size = system.b.norm() + system.scale * (start.norm() + x.norm())
    bound = 1e3 * system.eps * size * (start.norm() + x.norm())
    assert abs(solution.curvature - x @ system.exact @ x) <= bound


@given(systems(max_n=20), st.integers(1, 8))
def test_the_model_value_and_the_norm_come_for_free(system, k):
    n = len(system.b)
    scale = torch.logspace(0, 1, n, dtype=torch.float64)
    M = torch.diag(scale).to(system.b.dtype)
    for preconditioner, weights in ((None, torch.ones(n).double()), (M, 1 / M.diagonal().double())):
        solution = cg(system.A, system.b, M=preconditioner, rtol=0.0, max_iter=k)
        x = solution.x.double()
        value = (0.5 * x @ system.exact @ x - system.b.double() @ x).item()
        size = (system.b.double().norm() + system.scale * x.norm()) * x.norm()
        assert abs(solution.model_value - value) <= 50 * system.eps * size
        norm_M = (x @ (weights * x)).sqrt().item()
        # the rounding of M's products moves the recurrence of M^-1 x
        assert solution.norm == pytest.approx(norm_M, rel=50 * system.eps)


@given(systems(max_log_condition=4))
def test_reorthogonalisation_spends_no_more_products(system):
    rtol = max(1e-6, 1e3 * system.eps * system.condition)
    plain = cg(system.A, system.b, rtol=rtol)
    full = cg(system.A, system.b, rtol=rtol, reorthogonalize=True)
    assert full.iterations <= len(system.b) + 1
    assert full.iterations <= plain.iterations + 1  # at the edge of the tolerance


def test_reorthogonalisation_undoes_the_delay_of_float32():
    g = torch.Generator().manual_seed(1)
    Q, _ = torch.linalg.qr(torch.randn(200, 200, generator=g, dtype=torch.float64))
    exact = (Q * torch.logspace(0, -5, 200, dtype=torch.float64)) @ Q.T
    A, b = exact.float(), (exact @ torch.randn(200, generator=g, dtype=torch.float64)).float()
    M = torch.diag(1 / A.diagonal())
    for preconditioner in (None, M):
        plain = cg(A, b, M=preconditioner, rtol=1e-4)
        full = cg(A, b, M=preconditioner, rtol=1e-4, reorthogonalize=True)
        assert plain.status is full.status is Status.CONVERGED
        assert full.products < 0.8 * plain.products


@given(systems(kinds=[*POSITIVE, "sign-mixed"], max_n=20), st.integers(1, 5), st.booleans())
def test_columns_are_solved_as_if_alone(system, k, warm):
    n, g = len(system.b), torch.Generator().manual_seed(k)
    B = torch.randn(n, k, generator=g, dtype=torch.float64) * torch.logspace(-6, 6, k).double()
    B = torch.cat([B.to(system.b.dtype), system.b[:, None], torch.zeros_like(system.b[:, None])], 1)
    X0 = torch.ones_like(B) if warm else None
    A = Counting(system.A)
    M = torch.diag(torch.logspace(0, 1, n).to(system.b.dtype))
    rtol = max(1e-5, 10 * system.eps * system.condition)
    solution = cg(A, B, X0, M=M, rtol=rtol)
    assert solution.x.shape == B.shape
    assert A.products == solution.products == sum(c.products for c in solution.columns)
    assert A.blocks == max(c.products for c in solution.columns)  # as many blocks as the longest
    for i, column in enumerate(solution.columns):
        # the same vectors one by one: a block product rounds differently, no more than that
        alone = cg(
            lambda v: (system.A @ v[:, None])[:, 0],
            B[:, i],
            None if X0 is None else X0[:, i],
            M=M,
            rtol=rtol,
        )
        assert torch.equal(column.x, solution.x[:, i])
        if column.status is Status.CONVERGED:
            assert column.residual_norm <= rtol * B[:, i].double().norm() * (1 + 1e-12)
            assert alone.status in (Status.CONVERGED, Status.STAGNATED)
    converged = all(c.status is Status.CONVERGED for c in solution.columns)
    assert (solution.status is Status.CONVERGED) == converged
    assert solution.iterations == max(c.iterations for c in solution.columns)


def test_a_hard_column_does_not_hide_behind_easy_ones():
    """One column of a hundred far from converged, which a mean over columns would let pass."""
    A = torch.diag(torch.logspace(0, 4, 60, dtype=torch.float64))
    B = torch.eye(60, dtype=torch.float64)[:, :1].repeat(1, 100)  # an eigenvector: one iteration
    B[:, 7] = 1.0
    solution = cg(A, B, rtol=1e-8, max_iter=10)
    assert solution.status is Status.MAX_ITER
    ended = [c.status for c in solution.columns]
    assert ended.count(Status.CONVERGED) == 99
    assert ended[7] is Status.MAX_ITER
    assert solution.products == 99 + 10
    assert cg(A, B, rtol=1e-8).status is Status.CONVERGED
    assert cg(A, B[:, :0]).x.shape == (60, 0)


def test_every_column_has_its_own_tolerance():
    A = torch.diag(torch.logspace(0, 3, 40, dtype=torch.float64))
    B = torch.ones(40, 2, dtype=torch.float64)
    B[:, 1] *= 2.0**-27  # a power of two: both columns round alike
    solution = cg(A, B, rtol=1e-6)
    first, second = solution.columns
    assert second.residual_norm <= 1e-6 * 2.0**-27 * math.sqrt(40)
    assert first.iterations == second.iterations
    rules = cg(A, B, rtol=forcing_sequence(0.5, 1.0))  # |b|: 0.5 for the large, 5e-8 for the small
    assert rules.columns[0].iterations < rules.columns[1].iterations


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_a_limit_on_products_holds_whatever_they_are_for(limit):
    A = Counting(torch.diag(torch.logspace(0, 4, 50)))
    b = torch.ones(50)
    for verify in (False, True):
        A.products = 0
        solution = cg(A, b, b, rtol=1e-6, max_products=limit, verify=verify)
        assert A.products == solution.products == limit
        assert solution.status is Status.MAX_ITER


def test_sums_and_multiples_of_operators_keep_their_block_products():
    A = Counting(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
    solution = cg(2.0 * A + 0.5 * Identity(3), torch.eye(3))
    assert A.blocks == max(c.products for c in solution.columns)
    torch.testing.assert_close(solution.x.diagonal(), 1 / torch.tensor([2.5, 4.5, 8.5]))
