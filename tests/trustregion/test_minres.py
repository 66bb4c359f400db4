"""Laws of minimal residuals."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.sparse.linalg import minres as scipy_minres

import oracles
from counting import Counting
from strategies import DTYPES, POSITIVE, systems
from trustregion import Status, cg, minres
from trustregion.operators import DenseOperator, FunctionOperator
from trustregion.vector import ldexp

REGULAR = [*POSITIVE, "sign-mixed"]
KINDS = [*REGULAR, "rank-deficient"]


def preconditioner(n, dtype, log_condition=2.0, seed=0):
    """A positive definite matrix with nothing to do with the system."""
    g = torch.Generator().manual_seed(seed)
    P, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    M = (P * torch.logspace(0, -log_condition, n, dtype=torch.float64)) @ P.T
    return ((M + M.T) / 2).to(dtype)


def residual(system, x):
    return system.b.double() - system.exact @ x.double()


def iterates(system, k=12, **options):
    """The iterates until the residual nears rounding, where laws of exact arithmetic end."""
    seen = []
    rtol = max(system.eps**0.5, system.eps * system.condition)
    minres(system.A, system.b, rtol=rtol, max_iter=k, callback=seen.append, **options)
    return [x.double() for x in seen][:k]


def attainable(system, x):
    """The rounding of the products that make up a residual."""
    return system.eps * (system.b.double().norm() + system.scale * x.double().norm()).item()


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


@pytest.mark.parametrize("which", ["b", "A", "M"])
@pytest.mark.parametrize(
    ("power", "dtype"),
    [(p, d) for p in (-140, -60, 60, 120) for d in DTYPES]
    + [(p, torch.float64) for p in (-1060, -700, 700, 1018)],
)
def test_no_scale_is_out_of_reach(power, dtype, which):
    subnormal = 2.0**power < torch.finfo(dtype).tiny
    if subnormal and which == "M":
        return  # products with it underflow
    A = torch.diag(torch.tensor([1.0, -2.0, 4.0], dtype=dtype))
    b, M = torch.ones(3, dtype=dtype), torch.diag(torch.tensor([1.0, 0.5, 0.25], dtype=dtype))
    plain = minres(A, b, M=M).x
    scaled = {"b": b, "A": A, "M": M}
    scaled[which] = ldexp(scaled[which], power)
    solution = minres(**scaled)
    expected = ldexp(plain, {"b": power, "A": -power, "M": 0}[which])
    if expected.isfinite().all():
        assert solution.status is Status.CONVERGED
        # subnormal entries have few digits
        loss = 1e-2 if subnormal else 1e-5
        torch.testing.assert_close(solution.x, expected, rtol=loss, atol=0)
    else:
        seen = []
        solution = minres(**scaled, callback=seen.append)
        assert solution.status is Status.NONFINITE_OPERATOR
        assert torch.equal(solution.x, torch.zeros(3, dtype=dtype))
        assert math.isfinite(solution.curvature)
        assert math.isfinite(solution.norm)
        assert not seen


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_right_hand_side_has_the_zero_solution(dtype):
    A = Counting(torch.eye(3, dtype=dtype))
    solution = minres(A, torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype))
    assert torch.equal(solution.x, torch.zeros(3, dtype=dtype))
    assert (solution.status, A.products) == (Status.CONVERGED, 0)


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


def test_the_callback_sees_each_iterate():
    A = torch.diag(torch.tensor([1.0, -2.0, 4.0]))
    seen = []
    solution = minres(A, torch.ones(3), torch.full((3,), 0.5), callback=seen.append)
    assert len(seen) == solution.iterations
    assert torch.equal(seen[-1], solution.x)
    assert not torch.equal(seen[0], seen[1])


bad_numbers = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


@bad_numbers
def test_nonfinite_input_is_named(bad):
    b = torch.tensor([1.0, bad])
    assert minres(torch.eye(2), b).status is Status.NONFINITE_INPUT
    solution = minres(torch.eye(2), torch.ones(2), b)
    assert solution.status is Status.NONFINITE_INPUT
    assert solution.x.isfinite().all()


@bad_numbers
@given(
    system=systems(kinds=KINDS, max_n=12),
    at=st.integers(1, 8),
    warm=st.booleans(),
    where=st.booleans(),
    watch=st.booleans(),
)
def test_a_nonfinite_product_keeps_the_last_finite_iterate(bad, system, at, warm, where, watch):
    calls = 0

    def poisoned(v):
        nonlocal calls
        calls += 1
        out = v.clone() if where else system.A @ v
        if calls == at:
            out[0] = bad
        return out

    x0 = torch.zeros_like(system.b) if warm else None
    seen = []
    solution = minres(
        system.A if where else poisoned,
        system.b,
        x0,
        M=poisoned if where else None,
        rtol=0.0,
        stop_at_negative_curvature=watch,
        callback=seen.append,
    )
    assert solution.x.isfinite().all()
    assert math.isfinite(solution.curvature)
    assert solution.direction is None or solution.direction.isfinite().all()
    if calls >= at:
        assert solution.status is Status.NONFINITE_OPERATOR
        assert calls == at
    assert all(x.isfinite().all() for x in seen)


@bad_numbers
@pytest.mark.parametrize(("low", "watch"), [(-1.0, True), (0.0, False)])
def test_the_last_product_with_the_preconditioner_is_checked(bad, low, watch):
    A, b = torch.diag(torch.tensor([1.0, low, 1.0])), torch.tensor([1.0, 2.0, 1.0])

    def counted(stop):
        calls = 0

        def M(v):
            nonlocal calls
            calls += 1
            return v * bad if calls == stop else v.clone()

        return minres(A, b, M=M, stop_at_negative_curvature=watch), calls

    solution, calls = counted(None)
    assert solution.status is (Status.NEGATIVE_CURVATURE if watch else Status.LEAST_SQUARES)
    solution, _ = counted(calls)
    assert solution.status is Status.NONFINITE_OPERATOR
    assert solution.direction is None
    assert solution.x.isfinite().all()


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e-160, 1e160, 1e300])
@pytest.mark.parametrize("last", [0.0, 1.0])
def test_preconditioners_of_any_scale_and_range(scale, last):
    A = torch.diag(torch.tensor([2.0, -1.0, last], dtype=torch.float64))
    b = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    for entries in ([1.0, 1.0, 1.0], [1.0, 1e-160, 1.0], [1.0, 1e160, 1.0]):
        M = torch.diag(scale * torch.tensor(entries, dtype=torch.float64))
        solution = minres(A, b, M=M)
        assert solution.x.isfinite().all()
        assert not math.isnan(solution.residual_norm)
        if solution.status is Status.CONVERGED:
            assert (A @ solution.x - b).norm() <= 1.1e-5 * b.norm()


def test_a_direction_that_underflows_is_left_alone():
    A, b = torch.diag(torch.tensor([1.0, 0.0])).double(), torch.tensor([1.0, 0.3]).double()
    calls = 0

    def M(v):  # its last product, with the residual of the least-squares solution, underflows
        nonlocal calls
        calls += 1
        return v * (1.0 if calls < 3 else 0.0)

    solution = minres(A, b, M=M)
    assert (solution.status, calls) == (Status.LEAST_SQUARES, 3)
    assert solution.x[0].item() == pytest.approx(1.0, rel=1e-6)
    assert solution.x.isfinite().all()


@bad_numbers
def test_the_preconditioner_is_not_asked_about_what_is_not_finite(bad):
    def M(v):
        assert v.isfinite().all()
        return v

    assert minres(lambda v: v * bad, torch.ones(2), M=M).status is Status.NONFINITE_OPERATOR


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


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e20, 1e38])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_operators_of_extreme_scale_never_give_a_nan(scale, sign):
    A = torch.diag(torch.tensor([1.0, sign, 1.0])) * scale
    solution = minres(A, torch.ones(3))
    assert solution.x.isfinite().all()
    if solution.status is Status.CONVERGED:
        torch.testing.assert_close(A @ solution.x, torch.ones(3), rtol=1e-4, atol=0)


def test_a_start_beyond_all_scales_is_survived():
    x0 = torch.tensor([1e300, -1e300], dtype=torch.float64)
    solution = minres(torch.eye(2).double(), torch.ones(2).double(), x0)
    assert solution.x.isfinite().all()
    assert solution.status is not Status.LEAST_SQUARES
    if solution.status is Status.CONVERGED:
        torch.testing.assert_close(solution.x, torch.ones(2).double())


@given(
    st.lists(st.floats(width=32), min_size=9, max_size=9),
    st.lists(st.floats(width=32), min_size=3, max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from([None, "M"]),
    st.booleans(),
)
@example([0.0] * 9, [1.0] * 3, torch.float32, None, False)
@example([1e30] * 9, [1e-30] * 3, torch.float32, "M", True)
def test_no_input_whatever_gives_a_nan_or_a_false_success(entries, b, dtype, M, watch):
    A, b = torch.tensor(entries, dtype=dtype).view(3, 3), torch.tensor(b, dtype=dtype)
    P = A.T @ A if M else None
    solution = minres(A, b, M=P, stop_at_negative_curvature=watch)
    assert solution.x.isfinite().all()
    assert not math.isnan(solution.residual_norm)
    assert not math.isnan(solution.model_value)
    if solution.status is Status.CONVERGED:
        x = solution.x.double()
        size = (A.double().abs() @ x.abs() + b.double().abs()).norm()
        true = (b.double() - A.double() @ x).norm()
        tiny = torch.finfo(dtype).tiny * (1 + x.abs().sum() + A.double().abs().sum())
        eps = torch.finfo(dtype).eps
        assert not true > 1e-5 * b.double().norm() * (1 + 1e-6) + 8 * eps * size + tiny


def test_operator_tensor_and_callable_are_the_same():
    A, b = torch.diag(torch.tensor([1.0, -2.0, 3.0])), torch.ones(3)
    x = minres(A, b).x
    assert torch.equal(minres(DenseOperator(A), b).x, x)
    assert torch.equal(minres(lambda v: A @ v, b).x, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_inputs_are_not_written_to_and_no_graph_is_built(dtype):
    A = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=dtype)).requires_grad_()
    b, x0 = torch.ones(3, dtype=dtype), torch.full((3,), 0.1, dtype=dtype)
    solution = minres(A, b, x0, M=lambda v: v)
    assert torch.equal(b, torch.ones(3, dtype=dtype))
    assert torch.equal(x0, torch.full((3,), 0.1, dtype=dtype))
    assert not solution.x.requires_grad
    assert solution.x.dtype == dtype


eye = torch.eye(2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((eye, [1.0, 2.0]), {}, TypeError, "got list"),
        ((eye, torch.ones(2, dtype=torch.complex64)), {}, TypeError, "complex64"),
        ((eye, torch.ones(2, 2)), {}, ValueError, "vector of shape"),
        ((eye, torch.ones(3)), {}, ValueError, "does not fit"),
        ((torch.ones(2, 3), torch.ones(2)), {}, ValueError, "square"),
        (("A", torch.ones(2)), {}, TypeError, "got str"),
        ((eye, torch.ones(2), torch.ones(3)), {}, ValueError, "x0 must"),
        ((eye, torch.ones(2)), {"rtol": -1.0}, ValueError, "rtol"),
        ((eye, torch.ones(2)), {"atol": math.nan}, ValueError, "atol"),
        ((eye, torch.ones(2)), {"max_iter": -1}, ValueError, "max_iter"),
        ((eye, torch.ones(2)), {"M": torch.eye(3)}, ValueError, "does not fit"),
        ((lambda v: v[:1], torch.ones(2)), {}, ValueError, "must map"),
    ],
)
def test_wrong_arguments_are_refused_in_words(arguments, options, error, words):
    with pytest.raises(error, match=words):
        minres(*arguments, **options)
