"""What conjugate gradients claim: convergence, curvature, stagnation, breakdown."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies import POSITIVE, systems
from trustregion import Status, cg
from trustregion.operators import FunctionOperator


@given(systems(kinds=["sign-mixed"]))
def test_indefinite_operators_are_detected(system):
    solution = cg(system.A, system.b)
    assert solution.x.isfinite().all()
    assert solution.status in (Status.NEGATIVE_CURVATURE, Status.ZERO_CURVATURE, Status.CONVERGED)
    if solution.status is Status.CONVERGED:
        residual = (system.b.double() - system.exact @ solution.x.double()).norm()
        x_norm = solution.x.double().norm()
        slack = 1e3 * system.eps * (system.b.norm() + system.scale * x_norm)
        assert residual <= 1e-5 * system.b.norm() + slack
    else:
        p = solution.direction.double()
        assert p @ system.exact @ p <= 4 * system.eps * system.scale * (p @ p)


@given(systems(kinds=["rank-deficient"], dtypes=[torch.float64], max_log_condition=3))
def test_consistent_singular_systems_give_the_minimum_norm_solution(system):
    solution = cg(system.A, system.b, rtol=1e-10)
    assert solution.x.isfinite().all()
    if solution.status is Status.CONVERGED:
        expected = torch.linalg.pinv(system.exact, rtol=1e-9, hermitian=True) @ system.b
        assert (solution.x - expected).norm() <= 1e-6 * expected.norm()


def test_inconsistent_systems_end_without_claiming_success():
    A = torch.diag(torch.tensor([1.0, 0.0]))
    solution = cg(A, torch.ones(2))
    assert solution.status is Status.ZERO_CURVATURE
    assert solution.x.isfinite().all()


def test_curvature_below_rounding_is_none():
    A = torch.diag(torch.tensor([1.0, 1e-9]))
    solution = cg(A, torch.ones(2))
    assert solution.status is Status.ZERO_CURVATURE
    assert solution.x.abs().max() < 3
    assert abs(solution.direction @ A @ solution.direction) < 1e-7 * solution.direction.norm() ** 2
    assert cg(A.double(), torch.ones(2).double()).status is Status.CONVERGED  # not below it there
    below = torch.diag(torch.tensor([1.0, -1e-9]))  # a sign that is rounding too
    assert cg(below, torch.ones(2)).status is Status.ZERO_CURVATURE
    assert cg(below.double(), torch.ones(2).double()).status is Status.NEGATIVE_CURVATURE


def test_negative_curvature_comes_with_its_direction():
    A = torch.diag(torch.tensor([1.0, -1.0]))
    solution = cg(A, torch.tensor([1.0, 2.0]))
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert solution.direction @ A @ solution.direction < 0


def test_absolute_tolerance_is_in_the_units_of_b():
    A, b = torch.diag(torch.tensor([1.0, 10.0, 100.0])), torch.full((3,), 1e-6)
    assert cg(A, b, rtol=0.0, atol=1e-5).iterations == 0
    assert cg(A, b, rtol=0.0, atol=1e-12).iterations > 0


@pytest.mark.parametrize(("b", "atol"), [(1e-310, 1.0), (1e-30, 1e305), (1e300, 1e-320)])
def test_absolute_tolerances_of_any_size(b, atol):
    solution = cg(
        torch.eye(3).double(), torch.full((3,), b, dtype=torch.float64), rtol=0.0, atol=atol
    )
    # the last is below the rounding of any product: met by a zero, but not shown
    assert solution.status is (Status.STAGNATED if atol < 1e-300 else Status.CONVERGED)


def test_max_iter_is_named_and_defaults_to_ten_n():
    A, b = torch.diag(torch.logspace(0, 3, 50, dtype=torch.float64)), torch.ones(50).double()
    assert cg(A, b, rtol=1e-12, max_iter=3).status is Status.MAX_ITER
    noisy = FunctionOperator(lambda v: A @ v + 1e-3 * v.roll(1), 50, torch.float64)
    assert cg(noisy, b, rtol=1e-15).iterations <= 500


def test_an_indefinite_preconditioner_is_named():
    solution = cg(torch.eye(2), torch.ones(2), M=-torch.eye(2))
    assert solution.status is Status.INDEFINITE_PRECONDITIONER
    assert solution.x.isfinite().all()


@given(systems(kinds=[*POSITIVE, "sign-mixed", "rank-deficient"]), st.floats(-8, -1), st.booleans())
def test_convergence_is_never_claimed_falsely(system, log_rtol, reorthogonalize):
    rtol = 10**log_rtol
    solution = cg(system.A, system.b, rtol=rtol, reorthogonalize=reorthogonalize)
    assert solution.x.isfinite().all()
    if solution.status is Status.CONVERGED:
        x, b = solution.x.double(), system.b.double()
        true = (b - system.exact @ x).norm()
        norm_A = torch.linalg.matrix_norm(system.exact, 2)
        # of the one product in the operator's dtype that the claim rests on
        assert true <= rtol * b.norm() + system.eps * (b.norm() + norm_A * x.norm())


def test_what_float32_cannot_reach_is_reported_and_the_best_is_returned():
    g = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(60, 60, generator=g, dtype=torch.float64))
    exact = (Q * torch.logspace(0, -6, 60, dtype=torch.float64)) @ Q.T
    A, b = exact.float(), torch.randn(60, generator=g)
    for reorthogonalize, limit in ((False, 6000), (True, 200)):  # rounding delays the plain one
        solution = cg(A, b, rtol=1e-6, max_iter=limit, reorthogonalize=reorthogonalize)
        assert solution.status is Status.STAGNATED
        true = (b.double() - A.double() @ solution.x.double()).norm().item()
        attainable = (
            torch.finfo(torch.float32).eps * solution.x.double().norm().item()
        )  # eps |A||x|
        assert abs(solution.true_residual_norm - true) <= attainable
        assert true <= 5 * attainable


@pytest.mark.parametrize("tol", [5e-4, 5e-3])
def test_martens_rule_stops_where_progress_has_faded(tol):
    """Replayed on the model values of the iterates, with the rule as the paper has it."""
    A = torch.diag(torch.logspace(0, -5, 200, dtype=torch.float64))
    b, seen = torch.ones(200, dtype=torch.float64), []
    solution = cg(A, b, rtol=0.0, progress_tol=tol, callback=seen.append)
    assert solution.status is Status.PROGRESS_BELOW_TOLERANCE
    values = [0.0] + [(0.5 * x @ A @ x - b @ x).item() for x in seen]

    def satisfied(i):
        k = max(10, math.ceil(0.1 * i))
        return i > k and values[i] < 0 and (values[i] - values[i - k]) / values[i] < k * tol

    assert satisfied(solution.iterations)
    assert not any(satisfied(i) for i in range(solution.iterations))


def test_a_callable_tolerance_is_checked_when_it_is_called():
    with pytest.raises(ValueError, match="rtol must return"):
        cg(torch.eye(2), torch.ones(2), rtol=lambda _: math.nan)


def test_a_singular_preconditioner_is_a_breakdown():
    M = torch.diag(torch.tensor([1.0, 0.0]))
    solution = cg(torch.eye(2), torch.tensor([0.0, 1.0]), M=M)
    assert solution.status is Status.BREAKDOWN
    assert solution.x.isfinite().all()


def test_results_below_the_normal_numbers_claim_nothing():
    """b is representable, b / 3 only to a digit: no claim is made on the residual of that."""
    solution = cg(3 * torch.eye(2), torch.full((2,), 1e-44))
    assert solution.status is not Status.CONVERGED
    assert solution.x.isfinite().all()


@given(systems(max_log_condition=3, max_n=20))
def test_a_tolerance_of_zero_ends_at_what_the_precision_allows(system):
    """Not at ten times n: below the rounding of the products the recurred residual says nothing."""
    n = len(system.b)
    solution = cg(system.A, system.b, rtol=0.0, max_iter=1000 * n)
    assert solution.status in (Status.STAGNATED, Status.CONVERGED)  # a residual of exactly zero
    assert solution.products <= 100 + 20 * n
    x = solution.x.double()
    true = (system.b.double() - system.exact @ x).norm()
    assert true <= 10 * system.eps * (system.b.double().norm() + system.scale * x.norm())


def test_a_product_of_overflowing_norm_is_not_curvature():
    def lopsided(v):
        return torch.stack([v[0], v[1] + 1e200 * v[0]])

    solution = cg(lopsided, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert solution.status is Status.NONFINITE_OPERATOR
    assert not solution.x.any()


def test_measuring_does_not_change_an_iterate_whose_residual_has_grown():
    """The residual of cg may rise above |b| while the model falls."""
    A, b = torch.diag(torch.tensor([1e-3, 1.0])), torch.tensor([1.0, 0.03])
    plain, verified = (cg(A, b, max_iter=1, verify=verify) for verify in (False, True))
    assert torch.equal(plain.x, verified.x)
    assert verified.true_residual_norm > b.norm()


def test_a_tolerance_below_the_rounding_of_a_product_is_never_met():
    solution = cg(torch.tensor([[3.0]]), torch.ones(1), rtol=1e-12)
    assert solution.status is Status.STAGNATED


def test_curvature_is_not_mistaken_for_rounding_behind_a_preconditioner():
    A = torch.diag(torch.tensor([1e-3, 1.0]))
    solution = cg(A, torch.tensor([1.0, 1e-4]), M=torch.diag(torch.tensor([1e-9, 1.0])), rtol=1e-3)
    assert solution.status is Status.CONVERGED


def test_martens_rule_with_a_warm_start_counts_from_the_model_there():
    A = torch.diag(torch.logspace(-4, 0, 200, dtype=torch.float64))
    b, seen = torch.ones(200, dtype=torch.float64), []
    x0 = cg(A, b, rtol=0.0, max_iter=60).x
    solution = cg(A, b, x0, rtol=0.0, progress_tol=5e-4, callback=seen.append)
    values = [(0.5 * x @ A @ x - b @ x).item() for x in [x0, *seen]]

    def satisfied(i):
        k = max(10, math.ceil(0.1 * i))
        return i > k and values[i] < 0 and (values[i] - values[i - k]) / values[i] < k * 5e-4

    assert solution.status is Status.PROGRESS_BELOW_TOLERANCE
    assert satisfied(solution.iterations)
    assert not any(satisfied(i) for i in range(solution.iterations))
