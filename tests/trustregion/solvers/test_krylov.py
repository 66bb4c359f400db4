"""Laws of a stored Krylov space: it gives what the kernels give, and spends nothing twice."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from counting import Counting
from strategies import DTYPES, POSITIVE, systems
from trustregion import Status, cg, lanczos, multishift_cg

ALL = [*POSITIVE, "rank-deficient", "sign-mixed"]


def metric(n, dtype, seed=0, log_condition=2):
    """A random positive definite preconditioner of the given condition."""
    g = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    M = (Q * torch.logspace(0, -log_condition, n, dtype=torch.float64)) @ Q.T
    return ((M + M.T) / 2).to(dtype)


@given(systems(kinds=ALL, max_n=20), st.integers(1, 25), st.booleans())
def test_the_basis_is_orthonormal_and_tridiagonalises(system, k, preconditioned):
    n = len(system.b)
    M = metric(n, system.b.dtype) if preconditioned else None
    space = lanczos(system.A, system.b, M=M, max_iter=k)
    Q, W = space._process.Q.rows[: space.size], space._process.W.rows[: space.size]
    identity = torch.eye(space.size, dtype=torch.float64)
    # W stands for M^-1 Q by recurrence: rounding of the products with M enters once
    torch.testing.assert_close(Q @ W.T, identity, rtol=0, atol=100 * system.eps)
    T = Q @ system.exact @ Q.T
    size = (Q.norm() ** 2).item() * system.scale
    torch.testing.assert_close(T, space.tridiagonal, rtol=0, atol=200 * system.eps * size)


@given(systems(max_log_condition=4), st.integers(1, 12))
def test_a_solve_is_the_iterate_of_cg(system, k):
    space = lanczos(system.A, system.b, max_iter=k)
    mine = space.solve()
    theirs = cg(system.A, system.b, rtol=0.0, max_iter=space.size, reorthogonalize=True)
    x, y = mine.x.double(), theirs.x.double()

    def energy(v):
        return (0.5 * v @ system.exact @ v - system.b.double() @ v).item()

    # of the products, and of x as it is returned
    rounding = 50 * system.eps * (system.scale * x.norm() + system.b.double().norm()) * x.norm()
    assert abs(energy(x) - energy(y)) <= rounding
    assert mine.products == 0
    assert abs(mine.model_value - energy(x)) <= rounding
    assert abs(mine.curvature - x @ system.exact @ x) <= rounding
    assert mine.norm == pytest.approx(x.norm().item(), rel=10 * system.eps)


@given(systems(max_log_condition=4, dtypes=[torch.float64], max_n=15), st.booleans())
def test_other_dampings_and_sizes_cost_nothing_and_are_exact(system, preconditioned):
    n = len(system.b)
    M = metric(n, system.b.dtype) if preconditioned else None
    A = Counting(system.A)
    space = lanczos(A, system.b, M=M, max_iter=n)
    spent = A.products
    assert spent == space.products == space.size
    inverse = torch.eye(n).double() if M is None else torch.linalg.inv(M)
    for factor in (0.0, 1e-3, 1.0, 1e3):
        damping = factor * system.scale
        solution = space.solve(damping, rtol=1e-6)
        exact = torch.linalg.solve(system.exact + damping * inverse, system.b)
        assert solution.status is Status.CONVERGED
        # condition of the preconditioned system, of M, and a margin
        assert (solution.x - exact).norm() <= 1e-11 * 1e2 * system.condition * exact.norm()
        curvature = (exact @ system.b).item()
        assert solution.curvature == pytest.approx(curvature, rel=1e-6)
        assert solution.model_value == pytest.approx(-0.5 * curvature, rel=1e-6)
        step = space.minimize(0.5 * solution.norm, damping=damping, rtol=1e-6)
        s = step.s
        value = 0.5 * (s @ system.exact @ s + damping * (s @ inverse @ s)) - system.b @ s
        assert step.predicted_reduction == pytest.approx(-value.item(), rel=1e-6)
    for k in range(space.size + 1):
        short = space.solve(size=k)
        assert short.iterations == k
        again = lanczos(system.A, system.b, M=M, max_iter=k).solve()
        torch.testing.assert_close(short.x, again.x, rtol=1e-12, atol=0)
    assert A.products == spent


@given(systems(kinds=ALL, max_n=20), st.integers(0, 25), st.sampled_from([0.0, 1e-2, 1.0]))
def test_a_claim_of_convergence_is_true(system, k, factor):
    space = lanczos(system.A, system.b, max_iter=k)
    damping = factor * system.scale
    for verify in (False, True):
        solution = space.solve(damping, rtol=1e-4, verify=verify)
        assert solution.x.isfinite().all()
        x = solution.x.double()
        true = (system.b.double() - system.exact @ x - damping * x).norm().item()
        size = system.b.double().norm() + (system.scale + damping) * x.norm()
        if solution.status is Status.CONVERGED:
            assert true <= 1e-4 * system.b.double().norm() + system.eps * size
        if solution.direction is not None:
            p = solution.direction.double()
            curvature = p @ system.exact @ p + damping * (p @ p)
            assert curvature <= 50 * system.eps * (system.scale + damping) * (p @ p)
        if not verify:
            assert solution.products == 0


@given(systems(kinds=["sign-mixed"], max_n=20, dtypes=[torch.float64]))
def test_an_indefinite_space_gives_the_iterates_before_and_the_direction(system):
    space = lanczos(system.A, system.b, max_iter=len(system.b))
    solution = space.solve()
    direct = cg(system.A, system.b, rtol=0.0)
    if direct.status is Status.NEGATIVE_CURVATURE and direct.iterations < 4:
        assert solution.status is Status.NEGATIVE_CURVATURE
        assert solution.iterations == direct.iterations
        gap = (solution.x - direct.x).norm()
        assert gap <= 1e-6 * direct.x.norm()  # a pivot near zero before it amplifies rounding


@given(systems(kinds=ALL, max_n=15, max_log_condition=3), st.sampled_from([0.0, 1e-2, 1.0]))
def test_asking_whether_it_is_too_small_is_asking_for_the_status(system, factor):
    space = lanczos(system.A, system.b, max_iter=0)
    damping = factor * system.scale
    radius = 0.5 * system.b.double().norm().item() / system.scale
    while True:
        asked = space.is_too_small(damping=damping, rtol=1e-3)
        assert asked == (space.solve(damping, rtol=1e-3).status is Status.MAX_ITER)
        if radius > 0:
            asked = space.is_too_small(damping=damping, radius=radius, rtol=1e-3)
            status = space.minimize(radius, damping=damping, rtol=1e-3).status
            assert asked == (status is Status.MAX_ITER)
        if not space.extend(1):
            break


def test_a_whole_space_in_float32_does_not_claim_what_its_rounding_hides():
    g = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(30, 30, generator=g, dtype=torch.float64))
    A = ((Q * torch.logspace(0, -5, 30, dtype=torch.float64)) @ Q.T).float()
    b = torch.randn(30, generator=g)
    space = lanczos(A, b, max_iter=30)
    for solution in (space.solve(rtol=1e-6), space.solve(rtol=1e-6, verify=True)):
        assert solution.status is Status.STAGNATED
        true = (b.double() - A.double() @ solution.x.double()).norm().item()
        assert true > 1e-6 * b.norm()
        assert 0.05 * true < solution.residual_norm < 20 * true
    damped = space.solve(1e-5, rtol=1e-6, verify=True)
    residual = b.double() - A.double() @ damped.x.double() - 1e-5 * damped.x.double()
    assert damped.true_residual_norm == pytest.approx(residual.norm().item(), rel=0.9)
    assert space.solve(rtol=1e-6, verify=True).products == 1
    assert space.solve(rtol=0.5, verify=True).products == 0  # beyond doubt


def test_an_extended_space_is_the_longer_space():
    A = torch.diag(torch.logspace(0, 3, 30, dtype=torch.float64))
    b = torch.ones(30, dtype=torch.float64)
    grown, whole = lanczos(A, b, max_iter=4), lanczos(A, b, max_iter=11)
    assert grown.extend(7) == 7
    assert torch.equal(grown.tridiagonal, whole.tridiagonal)
    assert torch.equal(grown.solve().x, whole.solve().x)
    assert grown.extend(50) == 19
    assert grown.exhausted
    assert grown.extend(1) == 0
    with pytest.raises(ValueError, match="extend it first"):
        grown.solve(size=31)


def test_float32_converges_as_float64_does():
    """What the stored basis is for: no delay by rounding at a condition of 1e5."""
    g = torch.Generator().manual_seed(3)
    Q, _ = torch.linalg.qr(torch.randn(200, 200, generator=g, dtype=torch.float64))
    exact = (Q * torch.logspace(0, -5, 200, dtype=torch.float64)) @ Q.T
    b = exact @ torch.randn(200, generator=g, dtype=torch.float64)
    A = exact.float()
    sizes = {}
    for name, matrix, rhs in [("float32", A, b.float()), ("float64", A.double(), b)]:
        space = lanczos(matrix, rhs, max_iter=150)
        norms = [space.solve(size=k).residual_norm for k in range(151)]
        sizes[name] = next(k for k in range(151) if norms[k] <= 1e-3 * rhs.norm())
    assert sizes["float32"] <= sizes["float64"] + 1
    plain = cg(A, b.float(), rtol=1e-3)
    assert plain.iterations > 1.1 * sizes["float32"]


@pytest.mark.parametrize("power", [-40, -7, 3, 40])
@given(system=systems(max_n=12))
def test_scaling_by_powers_of_two_is_exact(system, power):
    factor, k = 2.0**power, len(system.b)
    x = lanczos(system.A, system.b, max_iter=k).solve().x
    assert torch.equal(lanczos(system.A, system.b * factor, max_iter=k).solve().x, x * factor)
    assert torch.equal(lanczos(system.A * factor, system.b, max_iter=k).solve().x, x / factor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_and_nonfinite_right_hand_sides(dtype):
    A = Counting(torch.eye(3, dtype=dtype))
    space = lanczos(A, torch.zeros(3, dtype=dtype), max_iter=5)
    assert (space.size, space.exhausted, A.products) == (0, True, 0)
    assert space.solve(1.0).status is Status.CONVERGED
    assert torch.equal(space.solve().x, torch.zeros(3, dtype=dtype))
    space = lanczos(A, torch.tensor([1.0, math.nan, 0.0], dtype=dtype), max_iter=5)
    assert space.solve().status is space.status is Status.NONFINITE_INPUT
    assert space.minimize(1.0).status is Status.NONFINITE_INPUT
    assert A.products == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("where", ["A", "M"])
def test_a_nonfinite_product_keeps_the_space_before_it(bad, at, where):
    matrix, calls = torch.diag(torch.arange(1.0, 6.0)), 0

    def poisoned(v):
        nonlocal calls
        calls += 1
        out = matrix @ v if where == "A" else v.clone()
        if calls == at:
            out[0] = bad
        return out

    A, M = (poisoned, None) if where == "A" else (matrix, poisoned)
    space = lanczos(A, torch.ones(5), M=M, max_iter=5)
    assert space.status is Status.NONFINITE_OPERATOR
    solution = space.solve()
    assert solution.status is Status.NONFINITE_OPERATOR
    assert solution.x.isfinite().all()
    assert space.minimize(1.0).s.isfinite().all()
    assert solution.iterations == (at - 1 if where == "A" else max(at - 2, 0))


@pytest.mark.parametrize(
    ("M", "status"),
    [(-torch.eye(3), "INDEFINITE_PRECONDITIONER"), (torch.zeros(3, 3), "BREAKDOWN")],
)
def test_wrong_preconditioners_are_named(M, status):
    space = lanczos(torch.eye(3), torch.ones(3), M=M, max_iter=3)
    assert space.status is Status[status]
    assert space.solve().status is Status[status]


@given(systems(max_log_condition=4, max_n=20), st.booleans())
def test_many_shifts_for_the_products_of_the_hardest(system, preconditioned):
    n = len(system.b)
    M = metric(n, system.b.dtype) if preconditioned else None
    inverse = torch.eye(n).double() if M is None else torch.linalg.inv(M.double())
    shifts = [factor * system.scale for factor in (1e-2, 1.0, 30.0)]
    A = Counting(system.A)
    solution = multishift_cg(A, system.b, shifts, M=M, rtol=1e-3)
    assert A.products == solution.products
    hardest = max(solution.columns, key=lambda c: c.iterations)
    assert solution.products <= hardest.iterations + len(shifts)
    for column, shift, x in zip(solution.columns, shifts, solution.x.T, strict=True):
        assert torch.equal(column.x, x)
        true = system.b.double() - (system.exact + shift * inverse) @ x.double()
        if column.status is Status.CONVERGED:
            size = system.b.double().norm() + (system.scale + shift * 1e2) * x.double().norm()
            assert true.norm() <= 1e-3 * system.b.double().norm() + 10 * system.eps * size
        elif system.eps * system.condition * 1e4 < 1e-3:
            raise AssertionError(column.status)


def test_shifts_in_doubt_are_measured_and_the_measuring_counted():
    g = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(40, 40, generator=g, dtype=torch.float64))
    A = Counting(((Q * torch.logspace(0, -3, 40, dtype=torch.float64)) @ Q.T).float())
    b = torch.randn(40, generator=g)
    solution = multishift_cg(A, b, [1e-2, 1.0], rtol=2e-5)
    assert solution.status is Status.CONVERGED
    assert A.products == solution.products
    near, far = solution.columns
    assert near.true_residual_norm is not None  # in doubt
    assert solution.products == near.iterations + near.products + far.products


def test_a_shift_that_is_not_definite_does_not_hold_up_the_others():
    A = torch.diag(torch.tensor([1.0, 2.0, 5.0, -1.0], dtype=torch.float64))
    solution = multishift_cg(A, torch.ones(4, dtype=torch.float64), [0.0, 2.0, -1.5])
    statuses = [c.status for c in solution.columns]
    assert statuses == [Status.NEGATIVE_CURVATURE, Status.CONVERGED, Status.NEGATIVE_CURVATURE]
    assert solution.status is Status.NEGATIVE_CURVATURE
    exact = torch.linalg.solve(A + 2 * torch.eye(4), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(solution.x[:, 1], exact)


def test_multishift_agrees_with_the_textbook():
    g = torch.Generator().manual_seed(0)
    R = torch.randn(12, 12, generator=g, dtype=torch.float64)
    A, b = R @ R.T, torch.randn(12, generator=g, dtype=torch.float64)
    solution = multishift_cg(A, b, [0.1, 3.0], max_iter=5, rtol=0.0)
    for x, shift in zip(solution.x.T, (0.1, 3.0), strict=True):
        expected = oracles.textbook_cg(A + shift * torch.eye(12), b, 5)[-1]
        assert (x - expected).norm() <= 1e-8 * expected.norm()  # condition 1e4 of R R'


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: multishift_cg(torch.eye(2), torch.ones(2), []), "shifts is empty"),
        (lambda: multishift_cg(torch.eye(2), torch.ones(2), [math.nan]), "finite number"),
        (lambda: lanczos(torch.eye(2), torch.ones(2), max_iter=-1), "max_iter"),
        (lambda: lanczos(torch.eye(3), torch.ones(2), max_iter=1), "does not fit"),
        (lambda: lanczos(torch.eye(2), torch.ones(2), max_iter=1).solve(math.inf), "damping"),
        (lambda: lanczos(torch.eye(2), torch.ones(2), max_iter=1).minimize(0.0), "radius"),
        (lambda: lanczos(torch.eye(2), torch.ones(2), max_iter=1).solve(rtol=-1.0), "rtol"),
        (lambda: lanczos(torch.eye(2), torch.ones(2), max_iter=1).extend(-1), "count"),
    ],
)
def test_wrong_arguments_are_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()
