"""Laws of conjugate gradients."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import oracles
from counting import Counting
from strategies import DTYPES, POSITIVE, systems
from trustregion import Identity, Status, cg
from trustregion.operators import DenseOperator, FunctionOperator
from trustregion.solvers import forcing_sequence


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


@pytest.mark.parametrize(
    ("power", "dtype"),
    [(p, d) for p in (-140, -60, 60, 120) for d in DTYPES]
    + [(p, torch.float64) for p in (-1060, -700, 700, 1020)],
)
def test_no_scale_of_the_right_hand_side_is_out_of_reach(power, dtype):
    A = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=dtype))
    b = torch.ones(3, dtype=torch.float64)
    solution = cg(A, (b * 2.0**power).to(dtype))
    assert solution.status is Status.CONVERGED
    plain = (cg(A, b.to(dtype)).x.double() * 2.0**power).to(dtype)  # subnormal at the low end
    torch.testing.assert_close(solution.x, plain, rtol=1e-5, atol=0)


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_right_hand_side_has_the_zero_solution(dtype):
    A = Counting(torch.eye(3, dtype=dtype))
    solution = cg(A, torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype))
    assert torch.equal(solution.x, torch.zeros(3, dtype=dtype))
    assert (solution.status, A.products) == (Status.CONVERGED, 0)


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


bad_numbers = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


@bad_numbers
def test_nonfinite_input_is_named(bad):
    b = torch.tensor([1.0, bad])
    solution = cg(torch.eye(2), b)
    assert solution.status is Status.NONFINITE_INPUT
    assert torch.equal(solution.x, torch.zeros(2))
    solution = cg(torch.eye(2), torch.ones(2), b)
    assert solution.status is Status.NONFINITE_INPUT
    assert solution.x.isfinite().all()


@bad_numbers
@given(system=systems(max_n=12), at=st.integers(1, 8), warm=st.booleans(), where=st.booleans())
def test_a_nonfinite_product_keeps_the_last_finite_iterate(bad, system, at, warm, where):
    calls = 0

    def poisoned(v):
        nonlocal calls
        calls += 1
        out = v.clone() if where else system.A @ v
        if calls == at:
            out[0] = bad
        return out

    x0 = torch.zeros_like(system.b) if warm else None
    if where:
        solution = cg(system.A, system.b, x0, M=poisoned, rtol=0.0)
    else:
        solution = cg(poisoned, system.b, x0, rtol=0.0)
    assert solution.x.isfinite().all()
    assert math.isfinite(solution.curvature)
    if calls >= at:
        assert solution.status is Status.NONFINITE_OPERATOR


def test_an_indefinite_preconditioner_is_named():
    solution = cg(torch.eye(2), torch.ones(2), M=-torch.eye(2))
    assert solution.status is Status.INDEFINITE_PRECONDITIONER
    assert solution.x.isfinite().all()


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e20, 1e38])
def test_operators_of_extreme_scale_never_give_a_nan(scale):
    A = torch.eye(3) * scale
    solution = cg(A, torch.ones(3))
    assert solution.x.isfinite().all()
    if solution.status is Status.CONVERGED:
        torch.testing.assert_close(A @ solution.x, torch.ones(3), rtol=1e-4, atol=0)


@given(
    st.lists(st.floats(width=32), min_size=9, max_size=9),
    st.lists(st.floats(width=32), min_size=3, max_size=3),
    st.sampled_from(DTYPES),
)
@example([0.0] * 9, [1.0] * 3, torch.float32)
def test_no_input_whatever_gives_a_nan(entries, b, dtype):
    A = torch.tensor(entries, dtype=dtype).view(3, 3)
    solution = cg(A, torch.tensor(b, dtype=dtype))
    assert solution.x.isfinite().all()
    assert not math.isnan(solution.residual_norm)


def test_operator_tensor_and_callable_are_the_same():
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    b = torch.ones(3)
    x = cg(A, b).x
    assert torch.equal(cg(DenseOperator(A), b).x, x)
    assert torch.equal(cg(lambda v: A @ v, b).x, x)


def test_the_inputs_are_not_written_to_and_no_graph_is_built():
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0])).requires_grad_()
    b, x0 = torch.ones(3), torch.full((3,), 0.1)
    solution = cg(A, b, x0)
    assert torch.equal(b, torch.ones(3))
    assert torch.equal(x0, torch.full((3,), 0.1))
    assert not solution.x.requires_grad


eye = torch.eye(2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((eye, [1.0, 2.0]), {}, TypeError, "got list"),
        ((eye, torch.ones(2, dtype=torch.complex64)), {}, TypeError, "complex64"),
        ((eye, torch.ones(2, dtype=torch.int64)), {}, TypeError, "int64"),
        ((eye, torch.ones(2, 2, 2)), {}, ValueError, "vector of shape"),
        ((eye, torch.ones(3)), {}, ValueError, "does not fit"),
        ((torch.ones(2, 3), torch.ones(2)), {}, ValueError, "square"),
        ((eye.double(), torch.ones(2)), {}, ValueError, "does not fit"),
        (("A", torch.ones(2)), {}, TypeError, "got str"),
        ((eye, torch.ones(2), torch.ones(3)), {}, ValueError, "x0 must"),
        ((eye, torch.ones(2)), {"rtol": -1.0}, ValueError, "rtol"),
        ((eye, torch.ones(2)), {"rtol": math.nan}, ValueError, "rtol"),
        ((eye, torch.ones(2)), {"max_iter": -1}, ValueError, "max_iter"),
        ((eye, torch.ones(2)), {"max_iter": 2.5}, ValueError, "max_iter must be an integer"),
        ((eye, torch.ones(2)), {"M": torch.eye(3)}, ValueError, "does not fit"),
        ((lambda v: v[:1], torch.ones(2)), {}, ValueError, "must map"),
    ],
)
def test_wrong_arguments_are_refused_in_words(arguments, options, error, words):
    with pytest.raises(error, match=words):
        cg(*arguments, **options)


@given(systems(kinds=[*POSITIVE, "sign-mixed", "rank-deficient"]), st.floats(-8, -1), st.booleans())
def test_convergence_is_never_claimed_in_vain(system, log_rtol, reorthogonalize):
    rtol = 10**log_rtol
    solution = cg(system.A, system.b, rtol=rtol, reorthogonalize=reorthogonalize)
    assert solution.x.isfinite().all()
    if solution.status is Status.CONVERGED:
        x, b = solution.x.double(), system.b.double()
        true = (b - system.exact @ x).norm()
        norm_A = torch.linalg.matrix_norm(system.exact, 2)
        # of the one product in the operator's dtype that the claim rests on
        assert true <= rtol * b.norm() + system.eps * (b.norm() + norm_A * x.norm())


def test_what_float32_cannot_reach_is_said_and_the_best_is_returned():
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


def test_a_callable_tolerance_is_checked_when_it_speaks():
    with pytest.raises(ValueError, match="rtol must return"):
        cg(torch.eye(2), torch.ones(2), rtol=lambda _: math.nan)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"progress_tol": 0.0}, "progress_tol"),
        ({"b": torch.ones(2, 2), "callback": print}, "callback takes"),
        ({"b": torch.ones(2, 2), "x0": torch.ones(2)}, "x0 must"),
        ({"atol": math.nan}, "atol"),
    ],
)
def test_more_wrong_arguments_are_refused_in_words(options, words):
    arguments = {"A": torch.eye(2), "b": torch.ones(2), **options}
    with pytest.raises(ValueError, match=words):
        cg(arguments.pop("A"), arguments.pop("b"), arguments.pop("x0", None), **arguments)


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


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_a_limit_on_products_holds_whatever_they_are_for(limit):
    A = Counting(torch.diag(torch.logspace(0, 4, 50)))
    b = torch.ones(50)
    for verify in (False, True):
        A.products = 0
        solution = cg(A, b, b, rtol=1e-6, max_products=limit, verify=verify)
        assert A.products == solution.products == limit
        assert solution.status is Status.MAX_ITER


class Reusing(DenseOperator):
    """Returns the same buffer every time, as allocation-free code does."""

    def __init__(self, matrix):
        super().__init__(matrix)
        self.buffer = torch.empty(matrix.shape[0], dtype=matrix.dtype)

    def mv(self, v):
        return torch.mv(self.matrix, v, out=self.buffer)

    def mm(self, V):
        return super(DenseOperator, self).mm(V)  # the default


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_may_reuse_their_output(dtype):
    matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=dtype))
    B = torch.tensor([[1.0, 4.0], [1.0, 2.0], [1.0, 1.0]], dtype=dtype)
    torch.testing.assert_close(cg(Reusing(matrix), B).x, cg(matrix, B).x)
    torch.testing.assert_close(cg(Reusing(matrix), B[:, 0]).x, cg(matrix, B[:, 0]).x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_operator_that_writes_to_its_argument_is_refused(dtype):
    d, b = torch.tensor([1.0, 2.0], dtype=dtype), torch.ones(2, dtype=dtype)
    with pytest.raises(ValueError, match="writes to the vector"):
        cg(lambda v: v.mul_(d), b)
    with pytest.raises(ValueError, match="writes to the vector"):
        cg(torch.eye(2, dtype=dtype), b, M=lambda v: v.mul_(d))


def test_products_of_a_wrong_shape_are_refused_also_from_an_own_class():
    class Sum(DenseOperator):
        def mv(self, v):
            return (self.matrix @ v).sum()

    with pytest.raises(ValueError, match="must map a vector"):
        cg(Sum(torch.eye(2)), torch.ones(2))


def test_a_product_may_differentiate():
    """The commonest Hessian-vector product: a second backward pass through a kept gradient."""
    p = torch.tensor([1.0, 2.0], requires_grad=True)
    (g,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    solution = cg(lambda v: torch.autograd.grad(g @ v, p, retain_graph=True)[0], torch.ones(2))
    torch.testing.assert_close(solution.x, 1 / (6 * p.detach()))
    assert not solution.x.requires_grad


def test_sums_and_multiples_of_operators_keep_their_block_products():
    A = Counting(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
    solution = cg(2.0 * A + 0.5 * Identity(3), torch.eye(3))
    assert A.blocks == max(c.products for c in solution.columns)
    torch.testing.assert_close(solution.x.diagonal(), 1 / torch.tensor([2.5, 4.5, 8.5]))


def test_a_start_too_large_for_the_scale_is_given_back():
    x0 = torch.full((2,), 1e30)
    solution = cg(torch.eye(2), torch.full((2,), 1e-30), x0)
    assert torch.equal(solution.x, x0)
    assert solution.status is Status.NONFINITE_OPERATOR


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rtol": [1e-5]}, "rtol must be a number.*type list"),
        ({"atol": None}, "atol must be a number.*NoneType"),
        ({"rtol": torch.tensor(1e-5)}, "item"),
        ({"max_iter": True}, "max_iter must be an integer.*bool"),
        ({"max_products": -1}, "max_products"),
    ],
)
def test_numbers_of_a_wrong_type_are_refused_by_type(options, words):
    with pytest.raises(ValueError, match=words):
        cg(torch.eye(2), torch.ones(2), **options)


def test_numbers_of_numpy_are_numbers():
    np = pytest.importorskip("numpy")
    solution = cg(torch.eye(2), torch.ones(2), rtol=np.float32(1e-3), max_iter=np.int64(3))
    assert solution.status is Status.CONVERGED
