"""What MINRES claims: convergence, curvature, inconsistent and singular systems."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import minres as scipy_minres

from counting import Counting
from minres_cases import KINDS, REGULAR, attainable, preconditioner, residual
from strategies import DTYPES, systems
from trustregion import Status, minres
from trustregion.operators import FunctionOperator


@given(systems(kinds=KINDS, max_log_condition=5), st.sampled_from([None, 0, 1]), st.booleans())
def test_converged_is_a_statement_on_the_true_residual(system, seed, tight):
    n = len(system.b)
    M = None if seed is None else preconditioner(n, system.b.dtype, 3.0, seed)
    rtol = 1e-12 if tight else 1e-5
    solution = minres(system.A, system.b, M=M, rtol=rtol)
    assert solution.x.isfinite().all()
    true = residual(system, solution.x).norm().item()
    if solution.status is Status.CONVERGED:
        # measured by a product, which rounds itself
        assert true <= rtol * system.b.double().norm() + 4 * attainable(system, solution.x)
    if solution.true_residual_norm is not None:
        slack = 8 * attainable(system, solution.x)
        assert abs(solution.true_residual_norm - true) <= slack
        assert solution.residual_norm == solution.true_residual_norm
        if solution.status is Status.CONVERGED:
            assert solution.residual_norm <= rtol * system.b.double().norm() * (1 + 1e-6)


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_in_float64_the_square_of_the_condition_is_seen(seed):
    """Without that in the account these three claim success at 14 to 77 times the tolerance."""
    g = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(30, 30, generator=g, dtype=torch.float64))
    A = (Q * torch.logspace(0, -7, 30, dtype=torch.float64)) @ Q.T
    A, b = (A + A.T) / 2, torch.randn(30, generator=g, dtype=torch.float64)
    solution = minres(A, b, rtol=3e-8, max_iter=1200)
    assert solution.status is Status.CONVERGED
    assert (b - A @ solution.x).norm() <= 3e-8 * b.norm() * (1 + 1e-6)


@given(systems(kinds=["rank-deficient"], max_log_condition=3))
def test_of_consistent_singular_systems_the_shortest_solution(system):
    rtol = 1e-10 if system.b.dtype == torch.float64 else 1e-4
    solution = minres(system.A, system.b, rtol=rtol)
    assert solution.status is Status.CONVERGED
    rank = max(len(system.b) // 2, 0)
    values, Q = torch.linalg.eigh(system.exact)
    keep = values.abs().argsort(descending=True)[:rank]
    expected = (Q[:, keep] / values[keep]) @ (Q[:, keep].T @ system.b.double())
    # the residual, which may lie in the smallest eigenspace kept, and in float32 the null space
    # that rounding the matrix has tilted
    loss = 2 * rtol * system.condition + 1e3 * system.eps * system.condition
    assert (solution.x.double() - expected).norm() <= loss * expected.norm()


def inconsistent(system, seed=0):
    """``b`` with a part in the null space as large as the rest."""
    n = len(system.b)
    values, Q = torch.linalg.eigh(system.exact)
    order = values.abs().argsort(descending=True)
    null, rest = Q[:, order[n // 2 :]], Q[:, order[: n // 2]]
    g = torch.Generator().manual_seed(seed)
    c = torch.randn(n, generator=g, dtype=torch.float64)
    b = rest @ c[: n // 2] + null @ c[n // 2 :]
    x = rest @ (c[: n // 2] / values[order[: n // 2]])
    return b.to(system.b.dtype), x, (null @ c[n // 2 :]).norm().item()


@given(systems(kinds=["rank-deficient"], max_log_condition=3), st.integers(0, 1000))
def test_of_inconsistent_systems_the_shortest_least_squares_solution(system, seed):
    b, expected, least = inconsistent(system, seed)
    solution = minres(system.A, b)
    assert solution.status is Status.LEAST_SQUARES
    true = (b.double() - system.exact @ solution.x.double()).norm()
    size = b.double().norm().item()
    root = math.sqrt(system.eps)
    # |Ar| is resolved to sqrt(eps), so x to that times the condition, |r| to its square
    assert true <= least + 100 * system.eps * system.condition**2 * size
    assert abs(solution.residual_norm - true) <= 100 * system.eps * system.condition**2 * size
    loss = 30 * root * system.condition * size / system.scale * min(system.condition, 1 / root)
    assert (solution.x.double() - expected).norm() <= loss
    if len(b) >= 10:
        assert solution.iterations <= 4 * len(b)


def test_least_squares_by_hand():
    A = torch.diag(torch.tensor([2.0, -1.0, 0.0, 0.0]))
    solution = minres(A, torch.tensor([2.0, 1.0, 3.0, 4.0]))
    assert solution.status is Status.LEAST_SQUARES
    torch.testing.assert_close(solution.x, torch.tensor([1.0, -1.0, 0.0, 0.0]))
    assert solution.residual_norm == pytest.approx(5.0, rel=1e-6)
    M = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    solution = minres(A, torch.tensor([2.0, 1.0, 3.0, 4.0]), M=M)
    assert solution.status is Status.LEAST_SQUARES
    torch.testing.assert_close(solution.x, torch.tensor([1.0, -1.0, 0.0, 0.0]))
    assert solution.preconditioned_residual_norm == pytest.approx(math.sqrt(27 + 64), rel=1e-6)


@given(systems(max_log_condition=6))
def test_ill_conditioned_is_not_called_inconsistent(system):
    """|Ar| is as small on the way to a solution along the smallest eigenvector."""
    limit = 0.1 / system.eps  # beyond it the two cannot be told apart
    solution = minres(system.A, system.b, rtol=1e-5)
    if system.condition <= limit / 10:
        assert solution.status is not Status.LEAST_SQUARES


@given(systems(kinds=["rank-deficient"], max_log_condition=2, dtypes=[torch.float64]))
def test_the_part_of_the_start_in_the_null_space_stays(system):
    start = torch.ones_like(system.b)
    if len(start) > 1:
        solution = minres(system.A, system.A @ start, start, rtol=1e-8)
        assert torch.equal(solution.x, start)
    b, expected, _ = inconsistent(system)
    values, Q = torch.linalg.eigh(system.exact)
    null = Q[:, values.abs().argsort(descending=True)[len(b) // 2 :]]
    solution = minres(system.A, b, start / system.scale)
    assert solution.status is Status.LEAST_SQUARES
    kept = null @ (null.T @ start) / system.scale
    gap = (solution.x - expected - kept).norm()
    # r shares with the null space the direction that b adds, which is taken off
    assert gap <= 1e-5 * system.condition**2 * (expected.norm() + start.norm() / system.scale)


def test_no_success_is_claimed_where_scipy_claims_one():
    """Its test is relative to |A||x| in the norm of M: the true residual is 1e3 times the claim."""
    n = 60
    g = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    A = (Q * torch.logspace(0, -6, n, dtype=torch.float64)) @ Q.T
    A, b = (A + A.T) / 2, torch.randn(n, generator=g, dtype=torch.float64)
    M = preconditioner(n, torch.float64, 6.0)
    y, info = scipy_minres(A.numpy(), b.numpy(), M=M.numpy(), rtol=1e-6)
    assert info == 0
    assert (b - A @ torch.from_numpy(y)).norm() > 1e3 * 1e-6 * b.norm()
    for max_iter in (60, 600, 20000):
        solution = minres(A, b, M=M, rtol=1e-6, max_iter=max_iter)
        true = (b - A @ solution.x).norm()
        assert (solution.status is Status.CONVERGED) == bool(true <= 1e-6 * b.norm())
        assert solution.residual_norm == pytest.approx(true.item(), rel=1e-6)


@given(systems(kinds=[*REGULAR, "rank-deficient"], max_log_condition=3), st.booleans())
def test_curvature_is_found_at_the_first_residual_that_has_it(system, preconditioned):
    dtype, n = system.b.dtype, len(system.b)
    M = preconditioner(n, dtype, 1.0) if preconditioned else None
    A = Counting(system.A)
    options = {"M": M, "rtol": 1e-3, "max_iter": 40}
    solution = minres(A, system.b, stop_at_negative_curvature=True, **options)
    assert A.products == solution.products
    curvature = []
    for k in range(solution.iterations + 1):
        x = minres(system.A, system.b, **{**options, "max_iter": k, "rtol": 0.0}).x
        p = residual(system, x) if M is None else M.double() @ residual(system, x)
        curvature.append((p @ system.exact @ p / (p @ p)).item() / system.scale)
    noise = 100 * system.eps * system.condition + (1e-5 if dtype == torch.float32 else 1e-9)
    assert all(c > -noise for c in curvature[:-1])
    if solution.status in (Status.NEGATIVE_CURVATURE, Status.ZERO_CURVATURE):
        assert solution.products == solution.iterations + 1
        assert curvature[-1] <= noise
        p = solution.direction.double()
        assert p @ system.exact @ p <= 8 * system.eps * system.scale * (p @ p)
        if solution.status is Status.NEGATIVE_CURVATURE:
            assert p @ system.exact @ p < 0
        r = residual(system, solution.x)
        r = r if M is None else M.double() @ r
        angle = (p / p.norm() - r / r.norm()).norm()
        assert angle <= 1e-6 + 100 * attainable(system, solution.x) / r.norm()
        assert p @ system.b.double() > 0  # a descent direction of the model
    else:
        assert solution.direction is None
        assert solution.status in (Status.CONVERGED, Status.MAX_ITER, Status.STAGNATED)


@given(systems(max_log_condition=3))
def test_a_positive_definite_operator_has_no_such_curvature(system):
    plain = minres(system.A, system.b, max_iter=30)
    watched = minres(system.A, system.b, max_iter=30, stop_at_negative_curvature=True)
    if plain.true_residual_norm is None:  # no run on rounding alone
        assert watched.direction is None
        assert torch.equal(plain.x, watched.x)


def test_kinds_of_curvature():
    flat = torch.diag(torch.tensor([1.0, 0.0]))
    solution = minres(flat, torch.tensor([0.0, 3.0]), stop_at_negative_curvature=True)
    assert solution.status is Status.ZERO_CURVATURE
    assert solution.direction[1] > 0
    down = torch.diag(torch.tensor([1.0, -1.0]))
    solution = minres(down, torch.tensor([1.0, 2.0]), stop_at_negative_curvature=True)
    assert (solution.status, solution.iterations) == (Status.NEGATIVE_CURVATURE, 0)
    assert torch.equal(solution.x, torch.zeros(2))
    assert minres(down, torch.tensor([1.0, 2.0])).status is Status.CONVERGED


def test_the_zero_operator_has_no_solution():
    A = Counting(torch.zeros(3, 3))
    solution = minres(A, torch.ones(3))
    assert solution.status is Status.LEAST_SQUARES
    assert torch.equal(solution.x, torch.zeros(3))
    assert A.products == solution.products == 1
    assert minres(A, torch.ones(3), rtol=1.0).status is Status.CONVERGED


def test_the_last_residual_of_a_finite_space_is_zero():
    solution = minres(torch.tensor([[-4.0]]), torch.tensor([2.0]), rtol=0.0)
    assert (solution.x.item(), solution.residual_norm) == (-0.5, 0.0)
    # a zero measured in float32 shows no zero: 2 - 4 * 0.5 is rounded too
    assert (solution.status, solution.iterations) == (Status.STAGNATED, 1)
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # the first residual has zero curvature
    solution = minres(swap, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(solution.x, torch.tensor([0.0, 1.0]))


def test_absolute_tolerance_is_in_the_units_of_b():
    A, b = torch.diag(torch.tensor([1.0, -10.0, 100.0])), torch.full((3,), 1e-6)
    assert minres(A, b, rtol=0.0, atol=1e-5).iterations == 0
    assert minres(A, b, rtol=0.0, atol=1e-12).iterations > 0
    assert minres(A, b, rtol=lambda size: size * 1e9).iterations == 0


def test_max_iter_is_named_and_defaults_to_ten_n():
    A, b = torch.diag(torch.logspace(0, 3, 50, dtype=torch.float64)), torch.ones(50).double()
    assert minres(A, b, rtol=1e-12, max_iter=3).status is Status.MAX_ITER
    g = torch.Generator().manual_seed(0)
    noise = FunctionOperator(lambda _: torch.randn(50, generator=g).double(), 50, torch.float64)
    assert minres(noise, b, rtol=0.0).iterations == 500


def test_an_unreachable_tolerance_ends_at_rounding():
    A = torch.diag(torch.linspace(1, 2, 100, dtype=torch.float64))
    solution = minres(A, torch.ones(100).double(), rtol=1e-30)
    assert solution.status is Status.STAGNATED
    assert solution.iterations < 90  # the recurred residual would go on falling
    assert solution.residual_norm < 1e-14


def test_an_indefinite_preconditioner_is_named():
    solution = minres(torch.eye(2), torch.ones(2), M=-torch.eye(2))
    assert solution.status is Status.INDEFINITE_PRECONDITIONER
    assert torch.equal(solution.x, torch.zeros(2))
    A, M = torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([3.0, -1.0]))
    solution = minres(A, torch.ones(2), M=M)
    assert solution.status is Status.INDEFINITE_PRECONDITIONER
    assert solution.x.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_singular_preconditioner_is_named(dtype):
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=dtype))
    b = torch.ones(3, dtype=dtype)
    M = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=dtype))
    assert minres(A, torch.tensor([0.0, 0.0, 1.0], dtype=dtype), M=M).status is Status.BREAKDOWN
    assert minres(A, b, M=0 * M).status is Status.BREAKDOWN
    solution = minres(A, b, M=M)
    assert solution.status is not Status.CONVERGED
    assert solution.x.isfinite().all()
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=dtype)
    solution = minres(swap, torch.tensor([1.0, 0.0], dtype=dtype), M=M[1:, 1:])
    assert solution.status is Status.BREAKDOWN
