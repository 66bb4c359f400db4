"""Laws of conjugate gradients."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from strategies import systems
from trustregion import Status, cg
from trustregion.operators import DenseOperator


def iterates(system, k=12, **options):
    """The iterates until the residual nears rounding, where laws of exact arithmetic end."""
    seen = []
    rtol = max(system.eps**0.5, system.eps * system.condition)
    cg(system.A, system.b, rtol=rtol, max_iter=k, callback=seen.append, **options)
    return [x.double() for x in seen]


def energy(system, x):
    return (0.5 * x @ system.exact @ x - system.b.double() @ x).item()


@given(systems(max_log_condition=4, dtypes=[torch.float64]))
def test_solution_matches_a_dense_solve(system):
    rtol = max(1e-12, 100 * system.eps * system.condition)  # above the rounding of a product
    solution = cg(system.A, system.b, rtol=rtol)
    exact = torch.linalg.solve(system.exact, system.b)
    assert solution.status is Status.CONVERGED
    residual = (system.b - system.A @ solution.x).norm()
    assert residual <= (rtol + system.eps * system.condition) * system.b.norm()
    # error <= condition * relative residual
    assert (solution.x - exact).norm() <= 2 * rtol * system.condition * exact.norm()


@given(systems(max_log_condition=3, dtypes=[torch.float64], max_n=12))
def test_iterates_minimise_over_krylov_spaces(system):
    k = min(4, len(system.b))
    found = iterates(system, k)
    expected = oracles.textbook_cg(system.exact / system.scale, system.b / system.scale, len(found))
    for x, y in zip(found, expected, strict=True):
        if not y.isfinite().all():  # the Krylov space is exhausted
            break
        gap = energy(system, x) - energy(system, y)
        assert gap <= 1e-9 * abs(energy(system, y))


@given(systems())
def test_the_quadratic_decreases(system):
    before = 0.0
    for x in iterates(system):
        after = energy(system, x)
        # attainable accuracy of an iterate without reorthogonalisation, seen through q
        size = system.condition * system.b.double().norm() * x.norm()
        assert after <= before + 16 * system.eps * size.item()
        before = after


@given(systems())
def test_the_error_in_the_energy_norm_does_not_grow(system):
    exact = torch.linalg.solve(system.exact, system.b.double())
    errors = [(x - exact) @ system.exact @ (x - exact) for x in iterates(system)]
    start = exact @ system.exact @ exact
    for before, after in zip([start, *errors], errors, strict=False):
        assert after <= before + 8 * system.eps * start


@given(systems())
def test_the_norm_of_the_iterates_grows(system):
    norms = [0.0] + [x.norm().item() for x in iterates(system, k=3)]
    for before, after in pairwise(norms):
        # while orthogonality lasts: a few iterations
        assert after >= before * (1 - 16 * system.eps * system.condition)


@given(systems())
def test_the_recurred_residual_is_the_true_one(system):
    solution = cg(system.A, system.b, rtol=0.0, max_iter=12)
    true = (system.b.double() - system.exact @ solution.x.double()).norm().item()
    b, x = system.b.double().norm(), solution.x.double().norm()
    gap = abs(true - solution.residual_norm)
    assert gap <= 10 * 12 * system.eps * (b + system.scale * x)


@pytest.mark.parametrize("power", [-40, -7, 3, 40])
@given(system=systems(max_n=20))
def test_scaling_by_powers_of_two_is_exact(system, power):
    factor = 2.0**power
    x = cg(system.A, system.b).x
    assert torch.equal(cg(system.A, system.b * factor).x, x * factor)
    smaller = cg(system.A * factor, system.b)
    assert torch.equal(smaller.x, x / factor)


@given(systems(max_log_condition=3, dtypes=[torch.float64], kinds=["clustered"]))
def test_there_are_as_many_iterations_as_distinct_eigenvalues(system):
    # three clusters; rounding may ask for one or two more at condition 1e3
    assert cg(system.A, system.b, rtol=1e-7).iterations <= 5


@given(systems(dtypes=[torch.float64], kinds=["log-uniform"], max_log_condition=4))
def test_the_chebyshev_bound_holds(system):
    exact = torch.linalg.solve(system.exact, system.b)
    start = (exact @ system.exact @ exact).sqrt()
    rate = (math.sqrt(system.condition) - 1) / (math.sqrt(system.condition) + 1)
    for k, x in enumerate(iterates(system), 1):
        error = ((x - exact) @ system.exact @ (x - exact)).clamp(min=0).sqrt()
        assert error <= 2 * rate**k * start * (1 + 1e-8) + 1e-10 * start


@given(systems())
def test_every_iterate_is_a_descent_direction(system):
    for x in iterates(system):
        assert x @ system.b.double() > 0
        assert x @ system.exact @ x > 0


@given(systems(), st.integers(1, 12))
def test_the_curvature_is_that_of_the_returned_x(system, k):
    solution = cg(system.A, system.b, rtol=0.0, max_iter=k)
    x = solution.x.double()
    bound = 50 * system.eps * (system.b.double().norm() + system.scale * x.norm()) * x.norm()
    assert abs(solution.curvature - x @ system.exact @ x) <= bound


def test_the_curvature_taken_from_the_right_hand_side_would_be_wrong():
    """The case for computing x'Ax: float32 at condition 1e5, where x'b is off by 1e-4 and more."""
    worst_shortcut = worst_ours = 0.0
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        Q, _ = torch.linalg.qr(torch.randn(30, 30, generator=g, dtype=torch.float64))
        exact = (Q * torch.logspace(0, -5, 30, dtype=torch.float64)) @ Q.T
        A, b = exact.float(), torch.randn(30, generator=g)
        solution = cg(A, b, rtol=0.0, max_iter=12)
        x = solution.x.double()
        true = (x @ A.double() @ x).item()
        worst_shortcut = max(worst_shortcut, abs((x @ b.double()).item() / true - 1))
        worst_ours = max(worst_ours, abs(solution.curvature / true - 1))
    assert worst_ours < 1e-4 < 1e-3 < worst_shortcut


@given(systems(max_log_condition=3))
def test_an_exact_preconditioner_needs_one_iteration(system):
    inverse = torch.linalg.inv(system.exact).to(system.A.dtype)
    # the inverse is exact to eps * condition
    rtol = max(1e-6, 50 * system.eps * system.condition)
    assert cg(system.A, system.b, M=inverse, rtol=rtol).iterations <= 1


@given(systems(dtypes=[torch.float64]))
def test_the_identity_as_preconditioner_changes_nothing(system):
    plain = cg(system.A, system.b, max_iter=10)
    preconditioned = cg(system.A, system.b, M=lambda v: v, max_iter=10)
    assert torch.equal(plain.x, preconditioned.x)


@given(systems(dtypes=[torch.float32], max_log_condition=2))
def test_the_identity_as_preconditioner_changes_a_float32_solve_by_its_rounding_only(system):
    plain = cg(system.A, system.b, rtol=1e-3)
    preconditioned = cg(system.A, system.b, M=lambda v: v, rtol=1e-3)
    # both solve to 1e-3: each error is at most condition * 1e-3
    gap = (plain.x - preconditioned.x).norm()
    assert gap <= 2e-3 * system.condition * plain.x.norm()


@given(systems(), st.integers(-20, 20))
def test_the_scale_of_the_preconditioner_changes_nothing(system, power):
    plain = cg(system.A, system.b, M=lambda v: v, max_iter=10)
    scaled = cg(system.A, system.b, M=lambda v: 2.0**power * v, max_iter=10)
    assert torch.equal(plain.x, scaled.x)


@given(systems(max_log_condition=4, dtypes=[torch.float64]))
def test_jacobi_preconditioning_solves_the_same_system(system):
    M = torch.diag(1 / system.A.diagonal())
    solution = cg(system.A, system.b, M=M, rtol=1e-10)
    residual = (system.b - system.A @ solution.x).norm()
    assert residual <= (1e-10 + 100 * system.eps * system.condition) * system.b.norm()


class Recording(DenseOperator):
    def __init__(self, matrix):
        super().__init__(matrix)
        self.seen = []

    def mv(self, v):
        self.seen.append(v.clone())
        return super().mv(v)


@given(systems(max_log_condition=5))
def test_consecutive_residuals_and_directions_are_orthogonal_and_conjugate(system):
    A, points = Recording(system.A), []
    rtol = max(system.eps**0.5, system.eps * system.condition)
    solution = cg(A, system.b, rtol=rtol, max_iter=12, callback=points.append)
    bound = 500 * system.eps * math.sqrt(system.condition)
    measured = solution.products > solution.iterations  # then some products are not directions
    directions = [] if measured else [p.double() for p in A.seen]
    for p, q in pairwise(directions):
        Aq = system.exact @ q
        # of p and q to the dtype, and of the residual, which began with the size of the first p
        rounding = 4 * system.eps * system.scale * p.norm() * (q.norm() + directions[0].norm())
        assert abs(p @ Aq) <= bound * p.norm() * Aq.norm() + rounding
    b = system.b.double()
    residuals = [b] + [b - system.exact @ x.double() for x in points]
    for r, s in pairwise(residuals):
        # of the products, and of x as it is shown, which the recurrence does not round
        rounding = 20 * system.eps * (system.scale * points[-1].double().norm() + b.norm())
        assert abs(r @ s) <= bound * r.norm() * s.norm() + rounding * (r.norm() + s.norm())


@given(systems(max_log_condition=2, max_n=20), st.integers(0, 2**31))
def test_a_permutation_permutes_the_solution(system, seed):
    order = torch.randperm(len(system.b), generator=torch.Generator().manual_seed(seed))
    plain = cg(system.A, system.b, max_iter=3).x
    moved = cg(system.A[order][:, order], system.b[order], max_iter=3).x
    # three iterations amplify rounding by the condition at most
    assert (moved - plain[order]).norm() <= 20 * system.eps * system.condition * plain.norm()


@given(systems(max_log_condition=2, dtypes=[torch.float64], max_n=12), st.integers(0, 2**31))
def test_a_reparametrised_system_has_the_reparametrised_solution(system, seed):
    n = len(system.b)
    R = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    T = torch.eye(n, dtype=torch.float64) + 0.3 * R / n
    direct = cg(system.A, system.b, rtol=1e-12).x
    through = T @ cg(T.T @ system.A @ T, T.T @ system.b, rtol=1e-12).x
    assert (through - direct).norm() <= 1e-6 * direct.norm()
