"""Laws of MINRES."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import minres as scipy_minres

import oracles
from counting import Counting
from minres_cases import KINDS, REGULAR, attainable, preconditioner, residual
from strategies import systems
from trustregion import Status, cg, minres


def iterates(system, k=12, **options):
    """The iterates until the residual nears rounding, where laws of exact arithmetic end."""
    seen = []
    rtol = max(system.eps**0.5, system.eps * system.condition)
    minres(system.A, system.b, rtol=rtol, max_iter=k, callback=seen.append, **options)
    return [x.double() for x in seen][:k]


@given(systems(kinds=REGULAR, max_log_condition=4, dtypes=[torch.float64]))
def test_solution_matches_a_dense_solve(system):
    solution = minres(system.A, system.b, rtol=1e-10)
    exact = torch.linalg.solve(system.exact, system.b)
    assert solution.status is Status.CONVERGED
    assert residual(system, solution.x).norm() <= 1e-10 * system.b.norm() * (1 + 1e-6)
    # error <= condition * relative residual
    assert (solution.x - exact).norm() <= 1.1e-10 * system.condition * exact.norm()


@given(systems(kinds=REGULAR, max_log_condition=3, dtypes=[torch.float64], max_n=12), st.booleans())
def test_iterates_minimise_over_krylov_spaces(system, preconditioned):
    n = len(system.b)
    M = preconditioner(n, torch.float64) if preconditioned else torch.eye(n).double()
    found = iterates(system, min(4, n), M=M if preconditioned else None)
    A, b = system.exact / system.scale, system.b / system.scale
    expected = oracles.textbook_minres(A, b, M, len(found))
    for x, y in zip(found, expected, strict=True):
        r, best = (b - A @ x), (b - A @ (y))
        # squares of norms; the last iterate is at rounding, times the square of the condition
        assert r @ M @ r <= (1 + 1e-8) * (best @ M @ best) + 1e-12 * (b @ b)


@given(systems(kinds=KINDS))
def test_the_residual_does_not_grow(system):
    before = system.b.double().norm()
    for x in iterates(system):
        after = residual(system, x).norm()
        assert after <= before + 20 * attainable(system, x)
        before = after


@given(systems(kinds=KINDS), st.integers(0, 100))
def test_with_a_preconditioner_its_own_norm_does_not_grow(system, seed):
    M = preconditioner(len(system.b), system.b.dtype, seed=seed)
    size = lambda r: (r @ M.double() @ r).clamp(min=0).sqrt()  # noqa: E731
    before = size(system.b.double())
    for x in iterates(system, M=M):
        after = size(residual(system, x))
        # M is of norm one; in float32 its products round too, by eps times its condition
        slack = 2000 if system.b.dtype == torch.float32 else 100
        assert after <= before * (1 + slack * system.eps) + slack * attainable(system, x)
        before = after


@given(systems(max_log_condition=2, dtypes=[torch.float64]))
def test_no_residual_is_larger_than_that_of_conjugate_gradients(system):
    theirs = []
    k = min(len(system.b) - 1, 6)  # later both have lost orthogonality, each in its own way
    cg(system.A, system.b, rtol=1e-8, max_iter=k, callback=theirs.append)
    for x, y in zip(iterates(system, k), theirs, strict=False):
        slack = 1e-8 * system.b.norm()  # where both end
        assert residual(system, x).norm() <= residual(system, y).norm() * (1 + 1e-9) + slack


@given(systems(max_log_condition=3, dtypes=[torch.float64]))
def test_conjugate_gradients_find_the_same_solution(system):
    x, y = (solve(system.A, system.b, rtol=1e-11).x for solve in (minres, cg))
    assert (x - y).norm() <= 3e-11 * system.condition * y.norm()


@given(systems(kinds=KINDS), st.integers(0, 12), st.booleans())
def test_the_carried_residual_is_the_true_one(system, k, preconditioned):
    M = preconditioner(len(system.b), system.b.dtype) if preconditioned else None
    solution = minres(system.A, system.b, M=M, rtol=0.0, max_iter=k)
    if solution.status is not Status.MAX_ITER:
        return
    # the factor is the square of the condition that rounding sees; in float32 it is in float64
    growth = 1 if system.b.dtype == torch.float32 else system.condition
    slack = 50 * growth * attainable(system, solution.x)
    true = residual(system, solution.x)
    assert abs(true.norm().item() - solution.residual_norm) <= slack
    if preconditioned and k > 0:
        assert solution.preconditioned_residual_norm is not None
        size = math.sqrt(max((true @ M.double() @ true).item(), 0.0))
        loss = 1e-3 if system.b.dtype == torch.float32 else 1e-6  # of orthogonality
        carried = solution.preconditioned_residual_norm
        assert abs(size - carried) <= slack + loss * size
    x = solution.x.double()
    b = system.b.double()
    assert abs(solution.curvature - x @ system.exact @ x) <= slack * x.norm() + 1e-300
    assert abs(solution.model_value - (0.5 * x @ system.exact @ x - b @ x)) <= slack * x.norm()


@pytest.mark.parametrize("power", [-40, -7, 3, 40])
@given(system=systems(kinds=KINDS, max_n=20), preconditioned=st.booleans())
def test_scaling_by_powers_of_two_is_exact(system, power, preconditioned):
    factor = 2.0**power
    M = preconditioner(len(system.b), system.b.dtype) if preconditioned else None
    x = minres(system.A, system.b, M=M).x
    assert torch.equal(minres(system.A, system.b * factor, M=M).x, x * factor)
    assert torch.equal(minres(system.A * factor, system.b, M=M).x, x / factor)
    if M is not None:
        assert torch.equal(minres(system.A, system.b, M=M * factor).x, x)


@given(systems(kinds=KINDS, dtypes=[torch.float64]), st.integers(-9, 9))
def test_a_multiple_of_the_identity_changes_nothing(system, power):
    plain = minres(system.A, system.b, max_iter=8, verify=True)
    same = minres(system.A, system.b, M=lambda v: 2.0**power * v, max_iter=8)
    assert torch.equal(plain.x, same.x)
    assert (plain.status, plain.iterations) == (same.status, same.iterations)


@given(systems(max_log_condition=3))
def test_an_exact_preconditioner_needs_one_iteration(system):
    inverse = torch.linalg.inv(system.exact).to(system.A.dtype)
    rtol = max(1e-6, 50 * system.eps * system.condition)  # the inverse is exact to eps * condition
    assert minres(system.A, system.b, M=inverse, rtol=rtol).iterations <= 1


@given(systems(kinds=REGULAR, max_log_condition=2, dtypes=[torch.float64]), st.booleans())
def test_scipy_agrees(system, preconditioned):
    n = len(system.b)
    M = preconditioner(n, torch.float64, 1.0) if preconditioned else None
    x = minres(system.A, system.b, M=M, rtol=1e-10, max_iter=100 * n).x
    theirs = None if M is None else M.numpy()
    A, b = system.A / system.scale, system.b / system.b.norm()
    y, info = scipy_minres(A.numpy(), b.numpy(), M=theirs, rtol=1e-14, maxiter=100 * n)
    y = torch.from_numpy(y) * system.b.norm() / system.scale
    assert info == 0
    assert (x - y).norm() <= 1e-6 * x.norm()


@given(systems(kinds=KINDS), st.integers(0, 15), st.booleans(), st.booleans(), st.booleans())
def test_products_are_counted(system, k, preconditioned, warm, verify):
    A = Counting(system.A)
    M = Counting(preconditioner(len(system.b), system.b.dtype)) if preconditioned else None
    x0 = torch.ones_like(system.b) / system.scale if warm else None
    solution = minres(A, system.b, x0, M=M, rtol=0.0, max_iter=k, verify=verify)
    assert A.products == solution.products
    assert solution.iterations <= k
    ended_early = solution.status not in (Status.MAX_ITER, Status.CONVERGED, Status.STAGNATED)
    if system.b.norm() > 0 and not ended_early:
        measured = solution.products - solution.iterations - warm
        known = solution.true_residual_norm is not None
        if solution.iterations == 0:
            assert measured == 0
        else:
            assert measured >= known  # a run from a measured residual may end unmeasured
            assert known or not verify
            assert M is None or solution.iterations <= M.products


def test_one_product_an_iteration():
    n = 50
    A = Counting(torch.diag(torch.linspace(-1, 2, n, dtype=torch.float64)))
    M = Counting(torch.diag(torch.linspace(1, 2, n, dtype=torch.float64)))
    b = torch.ones(n).double()
    assert minres(A, b, rtol=0.0, max_iter=20).products == A.products == 20
    solution = minres(A, b, M=M, rtol=0.0, max_iter=20)
    assert (solution.products, A.products - 20, M.products) == (20, 20, 21)
    A.products = M.products = 0
    solution = minres(A, b, torch.ones(n).double(), M=M, rtol=1e-4)
    assert solution.status is Status.CONVERGED
    # one for the start, one that measures at the end
    assert A.products == solution.products == solution.iterations + 2
    assert M.products == solution.iterations + 1
    A.products = 0
    solution = minres(A, b, rtol=1e-4)
    assert solution.status is Status.CONVERGED
    assert A.products == solution.products == solution.iterations
    assert solution.true_residual_norm is None


@given(systems(kinds=REGULAR, max_log_condition=3, dtypes=[torch.float64]))
def test_a_warm_start_costs_one_product_and_helps(system):
    exact = torch.linalg.solve(system.exact, system.b)
    A, start = Counting(system.A), exact.clone()
    solution = minres(A, system.b, start, rtol=1e-6)
    assert (solution.status, solution.iterations) == (Status.CONVERGED, 0)
    assert A.products == solution.products == 1
    assert torch.equal(start, exact)  # not written to
    far = minres(system.A, system.b, start + exact.roll(1), rtol=1e-10)
    assert far.status is Status.CONVERGED
    assert (far.x - exact).norm() <= 1.1e-10 * system.condition * exact.norm()


@given(systems(kinds=REGULAR, max_log_condition=2), st.booleans())
def test_norm_is_the_length_of_the_step(system, preconditioned):
    M = preconditioner(len(system.b), system.b.dtype, 1.0) if preconditioned else None
    start = torch.ones_like(system.b) / system.scale
    solution = minres(system.A, system.b, start, M=M, max_iter=6)
    d = (solution.x - start).double()
    expected = (d @ d if M is None else d @ torch.linalg.solve(M.double(), d)).sqrt().item()
    size = (solution.x.double().norm() + start.double().norm()).item()
    assert abs(solution.norm - expected) <= 1e3 * system.eps * size


def test_the_callback_sees_each_iterate():
    A = torch.diag(torch.tensor([1.0, -2.0, 4.0]))
    seen = []
    solution = minres(A, torch.ones(3), torch.full((3,), 0.5), callback=seen.append)
    assert len(seen) == solution.iterations
    assert torch.equal(seen[-1], solution.x)
    assert not torch.equal(seen[0], seen[1])
