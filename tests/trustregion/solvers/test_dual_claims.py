"""What dual and primal solves claim: rank, curvature, extremes, and what is refused."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dual_cases import METHODS, Damped, counting, damped, each_method, metric_matrix
from strategies import DTYPES
from trustregion import Status
from trustregion.solvers import dual_solve


def singular(draw_u_in_range, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    J = torch.randn(6, 15, generator=generator).to(dtype)
    H = metric_matrix("softmax", 6, generator).to(dtype)
    u = torch.randn(6, generator=generator).to(dtype)
    u = H @ u if draw_u_in_range else u
    return Damped(J, H, u, 0.5, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_damping_the_shortest_solution_is_found(dtype):
    system = singular(True, dtype)
    solution = system.solve()
    # float32 decides the rank at m eps of the metric, and rounds it by eps
    rtol = 1e-10 if dtype is torch.float64 else 1e-4
    expected = torch.linalg.pinv(system.A, rtol=1e-6, hermitian=True) @ system.g
    assert solution.status is Status.CONVERGED
    assert (solution.x.double() - expected).norm() <= rtol * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_damping_an_inconsistent_system_is_solved_in_least_squares(dtype):
    system = singular(False, dtype)
    solution = system.solve()
    expected = torch.linalg.pinv(system.A, rtol=1e-6, hermitian=True) @ system.g
    rtol = 1e-10 if dtype is torch.float64 else 1e-4
    assert solution.status is Status.LEAST_SQUARES
    assert (solution.x.double() - expected).norm() <= rtol * expected.norm()
    assert solution.residual_norm == pytest.approx(system.residual(expected), rel=1e-5)


@given(damped(metrics=["none"], max_log_condition=2.0, dtypes=[torch.float64]))
def test_without_damping_or_metric_it_is_the_pseudo_inverse(system):
    solution = system.solve(damping=0.0)
    expected = torch.linalg.pinv(system.J, rtol=1e-6) @ system.u / system.scale
    assert solution.status is Status.CONVERGED
    assert (solution.x - expected).norm() <= 1e-9 * expected.norm()


def test_without_damping_or_metric_the_rank_is_decided_in_float64():
    J = torch.diag(torch.tensor([1.0, 1e-4]))  # 1e-8 in J'J, below the eps of float32
    solution = dual_solve(J, torch.ones(2), damping=0.0, method="dual")
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(solution.x, torch.tensor([1.0, 1e4]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_an_indefinite_metric_is_named_with_its_direction(dtype, damping):
    J = torch.randn(3, 8, dtype=dtype)
    H = torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=dtype))
    system = Damped(J, H, torch.ones(3, dtype=dtype), 1.0, damping)
    solution = system.solve()
    p = solution.direction.double()
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert torch.equal(solution.x, torch.zeros_like(solution.x))
    lowest = torch.linalg.eigvalsh(system.A)[0]
    assert p @ system.A @ p / (p @ p) == pytest.approx(lowest.item(), rel=1e-4)
    assert solution.residual_norm == pytest.approx(system.g.norm().item())


def test_curvature_that_the_damping_just_cancels_is_zero():
    H = torch.diag(torch.tensor([1.0, -0.5]))
    solution = dual_solve(torch.eye(2), torch.ones(2), metric=H, damping=0.5, method="dual")
    assert solution.status is Status.ZERO_CURVATURE
    assert torch.equal(solution.direction.abs(), torch.tensor([0.0, 1.0]))


def test_damping_that_outweighs_negative_curvature_is_enough():
    H = torch.diag(torch.tensor([1.0, -0.5]))
    solution = dual_solve(torch.eye(2), torch.ones(2), metric=H, damping=1.0, method="dual")
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(solution.x, torch.tensor([0.5, 2.0]))


def test_rounding_below_zero_in_a_float32_metric_is_no_curvature():
    """A singular metric has eigenvalues of -eps in float32, below a damping of 1e-9."""
    H = torch.tensor([[1.0, 1.0 + 2**-23], [1.0 + 2**-23, 1.0]])
    solution = dual_solve(torch.eye(2), torch.ones(2), metric=H, damping=1e-9, method="dual")
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(solution.x, torch.tensor([0.5, 0.5]))


def test_a_metric_that_is_not_symmetric_is_not_converged():
    H = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    solution = dual_solve(
        torch.eye(2), torch.tensor([1.0, 2.0]), metric=H, damping=0.1, method="dual"
    )
    assert solution.status is Status.STAGNATED
    residual = torch.tensor([1.0, 2.0]) - H @ solution.x - 0.1 * solution.x
    assert solution.residual_norm == pytest.approx(residual.norm().item(), rel=1e-5)


def test_a_small_singular_value_is_kept():
    """1e-7 is 1e-14 in the Gram matrix: within its precision, though far from its largest."""
    J = torch.diag(torch.tensor([1.0, 1e-7], dtype=torch.float64))
    u = torch.tensor([0.0, 1.0], dtype=torch.float64)
    solution = dual_solve(J, u, damping=1e-3, method="dual")
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(solution.x, 1e-4 * u, rtol=1e-8, atol=0)


def test_a_float32_metric_below_zero_does_not_turn_the_step_around():
    H = torch.tensor([[1.0, 1.0 + 2**-23], [1.0 + 2**-23, 1.0]])
    u = torch.tensor([1.0, -1.0])  # along the eigenvalue of -eps
    solution = dual_solve(torch.eye(2), u, metric=H, damping=1e-9, method="dual")
    assert (solution.status, solution.x.any().item()) == (Status.STAGNATED, False)
    assert solution.residual_norm == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("tiny", [1e-10, 1e-200])
def test_what_the_rank_decision_loses_shows_in_the_residual(tiny):
    """A singular value that alone carries the right-hand side, and that the rank leaves out."""
    J = torch.diag(torch.tensor([1.0, tiny], dtype=torch.float64))
    u = torch.tensor([0.0, 1.0], dtype=torch.float64)
    solution = dual_solve(J, u, damping=1e-3, method="dual")
    assert solution.status is Status.STAGNATED
    assert torch.equal(solution.x, torch.zeros(2, dtype=torch.float64))
    assert solution.residual_norm == pytest.approx(tiny, abs=0)


@each_method
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_output(method, dtype):
    a = torch.tensor([[3.0, 4.0]], dtype=dtype)
    solution = dual_solve(a, torch.tensor([2.0], dtype=dtype), damping=1.0, method=method)
    torch.testing.assert_close(solution.x, 2 * a[0] / 26)


@each_method
def test_zeros_have_the_zero_solution(method):
    J, calls = counting(torch.randn(3, 5))
    solution = dual_solve(J, torch.zeros(3), damping=0.1, method=method)
    assert (solution.status, solution.residual_norm) == (Status.CONVERGED, 0.0)
    assert torch.equal(solution.x, torch.zeros(5))
    assert solution.products == len(calls)
    null = dual_solve(torch.zeros(3, 5), torch.ones(3), damping=0.1, method=method)
    assert (null.status, null.x.any().item()) == (Status.CONVERGED, False)
    J = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    cancelled = dual_solve(J, torch.tensor([1.0, -1.0]), damping=0.1, method=method)
    assert (cancelled.status, cancelled.x.any().item()) == (Status.CONVERGED, False)


@each_method
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty_shapes(method, shape):
    solution = dual_solve(torch.ones(shape), torch.ones(shape[0]), damping=0.1, method=method)
    assert (solution.status, solution.x.shape) == (Status.CONVERGED, (shape[1],))


@each_method
def test_a_metric_of_zero_leaves_the_damping(method):
    J, u, H = torch.randn(2, 4), torch.randn(2), torch.zeros(2, 2)
    solution = dual_solve(J, u, metric=H, damping=0.5, method=method)
    torch.testing.assert_close(solution.x, 2 * J.T @ u)
    if method == "dual":
        nothing = dual_solve(J, u, metric=H, damping=0.0, method=method)
        assert (nothing.status, nothing.x.any().item()) == (Status.LEAST_SQUARES, False)


@each_method
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_numbers_are_named(method, bad):
    J, u = torch.randn(2, 3), torch.randn(2)
    poison = torch.tensor([1.0, bad])
    solution = dual_solve(J, poison, damping=0.1, method=method)
    assert (solution.status, solution.x.any().item()) == (Status.NONFINITE_INPUT, False)
    assert solution.products == 0
    broken = J.clone()
    broken[1, 2] = bad
    solution = dual_solve(broken, u, damping=0.1, method=method)
    assert (solution.status, solution.x.any().item()) == (Status.NONFINITE_OPERATOR, False)
    metric = torch.diag(poison)
    solution = dual_solve(J, u, metric=metric, damping=0.1, method=method)
    assert (solution.status, solution.x.any().item()) == (Status.NONFINITE_OPERATOR, False)


def truly_converged(J, H, u, damping, x, eps=2**-52):
    """Whether the residual is below 1.1e-5 of the right-hand side, in exact arithmetic."""

    def exact(tensor):
        return np.array([Fraction(v) for v in tensor.double().flatten().tolist()], dtype=object)

    J, H, u, x = exact(J).reshape(J.shape), exact(H).reshape(H.shape), exact(u), exact(x)
    g = J.T @ u
    r = g - J.T @ (H @ (J @ x)) - Fraction(damping) * x
    # what rounding of J'HJx and of damping x may hide
    noise = abs(J.T) @ (abs(H) @ (abs(J) @ abs(x)) + abs(u)) + Fraction(damping) * abs(x)
    bound = [Fraction(1.1e-5) ** 2 * (g @ g), Fraction(20 * eps) ** 2 * (noise @ noise)]
    return r @ r <= 2 * sum(bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("J", [1e-300, 1e-160, 1e-30, 1.0, 1e30, 1e160, 1e300])
@pytest.mark.parametrize("u", [1e-300, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("damping", [1e-300, 1.0, 1e300])
def test_no_scale_gives_a_nan_or_a_false_success(dtype, J, u, damping):
    a = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]], dtype=torch.float64)
    given = [(J * a).to(dtype), (u * torch.tensor([1.0, -3.0], dtype=torch.float64)).to(dtype)]
    for method in METHODS:
        solution = dual_solve(*given, damping=damping, method=method)
        assert solution.x.isfinite().all()
        assert not math.isnan(solution.residual_norm)
        # below 1e-150 the norms inside cg underflow
        within = method == "dual" or solution.x.abs().max() > 1e-150
        if solution.status is Status.CONVERGED and within and given[1].any():
            eps = torch.finfo(torch.float64 if method == "dual" else dtype).eps
            assert truly_converged(given[0], torch.eye(2), given[1], damping, solution.x, eps)


@pytest.mark.parametrize("J", [1e-160, 1e-30, 1e30, 1e160])
def test_the_dual_answer_is_right_at_any_scale(J):
    a = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]], dtype=torch.float64)
    u = torch.tensor([1.0, -3.0], dtype=torch.float64)
    plain = dual_solve(a, u, damping=0.0, method="dual")
    scaled = dual_solve(J * a, u, damping=0.0, method="dual")
    assert scaled.status is Status.CONVERGED
    torch.testing.assert_close(scaled.x, plain.x / J, rtol=1e-12, atol=0)
    damped = dual_solve(J * a, u, damping=1e-3, method="dual")
    assert damped.status is Status.CONVERGED
    small = J < 1
    expected = J * a.T @ u / 1e-3 if small else plain.x / J
    torch.testing.assert_close(damped.x, expected, rtol=1e-12, atol=0)


def test_a_right_hand_side_below_the_dtype_is_not_called_converged():
    J = torch.full((1, 2), 1e-30)
    primal = dual_solve(J, torch.full((1,), 1e-30), damping=1e-30, method="primal")
    assert (primal.status, primal.x.any().item()) == (Status.STAGNATED, False)
    dual = dual_solve(J, torch.full((1,), 1e-30), damping=1e-30, method="dual")
    assert dual.status is Status.CONVERGED
    torch.testing.assert_close(dual.x, torch.full((2,), 1e-30), rtol=1e-6, atol=0)


@pytest.mark.parametrize("J", [1e30, 1e300])
def test_a_right_hand_side_beyond_the_dtype_is_named(J):
    dtype = torch.float32 if J < 1e38 else torch.float64
    matrix, u = torch.full((1, 2), J, dtype=dtype), torch.full((1,), J, dtype=dtype)
    primal = dual_solve(matrix, u, damping=1.0, method="primal")
    assert (primal.status, primal.x.any().item()) == (Status.NONFINITE_OPERATOR, False)
    dual = dual_solve(matrix, u, damping=1.0, method="dual")
    assert dual.status is Status.CONVERGED
    torch.testing.assert_close(dual.x, torch.full((2,), 0.5, dtype=dtype))


def test_a_solution_beyond_the_dtype_is_named():
    J, u = torch.ones(1, 2), torch.full((1,), 1e30)
    solution = dual_solve(J, u, damping=1e-20, scale=1e-30, method="dual")
    assert (solution.status, solution.x.any().item()) == (Status.NONFINITE_OPERATOR, False)
    assert solution.residual_norm == pytest.approx(math.sqrt(2) * 1e30, rel=1e-6)


entries = st.floats(width=32)


@given(
    st.lists(entries, min_size=6, max_size=6),
    st.lists(entries, min_size=4, max_size=4),
    st.lists(entries, min_size=2, max_size=2),
    st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
    st.sampled_from(DTYPES),
    st.sampled_from(METHODS),
)
@example([0.0] * 6, [0.0] * 4, [1.0] * 2, 0.0, torch.float32, "dual")
@example([1.0, 0, 0, 0, 1e-30, 0], [1.0, 0, 0, 1.0], [0, 1.0], 1.0, torch.float64, "dual")
def test_no_input_gives_a_nan_or_a_false_success(J, H, u, damping, dtype, method):
    J, H = torch.tensor(J, dtype=dtype).view(2, 3), torch.tensor(H, dtype=dtype).view(2, 2)
    system = Damped(J, H, torch.tensor(u, dtype=dtype), 1.0, damping)
    solution = system.solve(method)
    assert solution.x.isfinite().all()
    assert not math.isnan(solution.residual_norm)
    if solution.status is Status.CONVERGED and system.u.any():
        assert method == "primal" or truly_converged(J, H, system.u, damping, solution.x)


def test_a_failed_eigendecomposition_is_a_status(monkeypatch):
    def fails(_):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    solution = dual_solve(torch.eye(2), torch.ones(2), damping=0.1, method="dual")
    assert (solution.status, solution.x.any().item()) == (Status.STAGNATED, False)


@each_method
def test_the_inputs_are_not_written_to_and_no_graph_is_built(method):
    J, u = torch.randn(2, 3, requires_grad=True), torch.randn(2)
    H = torch.eye(2)
    kept = [J.detach().clone(), u.clone(), H.clone()]
    solution = dual_solve(J, u, metric=H, damping=0.1, method=method)
    assert all(torch.equal(a, b) for a, b in zip([J, u, H], kept, strict=True))
    assert not solution.x.requires_grad


eye, ones = torch.eye(2), torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((eye, [1.0]), {}, TypeError, "u must be a float32 or float64 tensor, got list"),
        ((eye, torch.ones(2, 2)), {}, ValueError, "u must be a vector"),
        ((eye, torch.ones(3)), {}, ValueError, r"u must have the shape \(2,\)"),
        ((eye.double(), ones), {}, ValueError, "dtype torch.float64 of the outputs"),
        ((lambda v: v, ones), {}, TypeError, "J must be a LinearMap or a matrix"),
        ((ones, ones), {}, ValueError, "a matrix"),
        ((eye, ones), {"damping": -0.1}, ValueError, "damping must be a finite number and not"),
        ((eye, ones), {"damping": math.nan}, ValueError, "damping must be"),
        ((eye, ones), {"damping": math.inf}, ValueError, "damping must be"),
        ((eye, ones), {"scale": 0.0}, ValueError, "scale must be a positive finite"),
        ((eye, ones), {"method": "fast"}, ValueError, "method must be .* got 'fast'"),
        ((eye, ones), {"rtol": -1.0}, ValueError, "rtol"),
        ((eye, ones), {"max_iter": -1}, ValueError, "max_iter"),
        ((eye, ones), {"metric": torch.eye(3)}, ValueError, "does not fit"),
        ((eye, ones), {"metric": 3.0}, TypeError, "an operator must be"),
    ],
)
def test_wrong_arguments_are_refused_in_words(arguments, options, error, words):
    with pytest.raises(error, match=words):
        dual_solve(*arguments, **{"damping": 0.1, **options})
