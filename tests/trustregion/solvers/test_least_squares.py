"""Laws of least squares by LSQR."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from counting import CountingMap
from strategies import DTYPES
from trustregion import Status, cg
from trustregion.operators.map import DenseMap, FunctionMap
from trustregion.solvers.least_squares import lsqr
from trustregion.vector import ldexp


@dataclass(frozen=True)
class Problem:
    J: Tensor
    b: Tensor
    damping: float
    scale: float
    condition: float

    @property
    def eps(self):
        return torch.finfo(self.b.dtype).eps

    def slope(self, x):
        """What is left of the normal equations, in float64."""
        J, x = self.J.double(), x.double()
        return J.T @ (self.b.double() - J @ x) - self.damping * x

    def exact(self):
        """The shortest minimiser, from the singular values that are not rounding."""
        U, s, Vh = torch.linalg.svd(self.J.double(), full_matrices=False)
        keep = s > 0.1 * self.scale / self.condition
        filtered = s[keep] / (s[keep] ** 2 + self.damping)
        return Vh[keep].T @ (filtered * (U[:, keep].T @ self.b.double()))

    def rounding(self, x):
        """Of the products that make up a slope."""
        x = x.double().norm()
        J = self.scale
        return self.eps * (J * (self.b.double().norm() + J * x) + self.damping * x).item()


@st.composite
def problems(draw, dtypes=tuple(DTYPES), max_log_condition=3.0, damped=(0.0, 1e-4, 1.0), ranks=2):
    m, n = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    k = min(m, n)
    condition = 10 ** draw(st.floats(0, max_log_condition))
    scale = 10 ** draw(st.floats(-6, 6))
    dtype = draw(st.sampled_from(dtypes))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    U, _ = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64))
    rank = -(-k // draw(st.integers(1, ranks)))
    values = torch.zeros(k, dtype=torch.float64)
    values[:rank] = torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)
    J = scale * (U * values) @ V.T
    b = J @ torch.randn(n, generator=g, dtype=torch.float64)
    if draw(st.booleans()):  # inconsistent
        noise = torch.randn(m, generator=g, dtype=torch.float64)
        b = b + noise * b.norm() / noise.norm()
    damping = draw(st.sampled_from(damped)) * scale**2
    return Problem(J.to(dtype), b.to(dtype), damping, scale, condition)


@given(problems(dtypes=[torch.float64]))
def test_solution_matches_a_dense_one(problem):
    # the slope of b itself is rounding where b is nearly orthogonal to the range; atol is for it
    atol = 1e-13 * problem.scale * problem.b.norm().item()
    solution = lsqr(problem.J, problem.b, damping=problem.damping, rtol=1e-10, atol=atol)
    exact = problem.exact()
    assert solution.status is Status.CONVERGED
    tolerance = max(1e-10 * problem.slope(torch.zeros_like(exact)).norm().item(), atol)
    assert problem.slope(solution.x).norm() <= tolerance * (1 + 1e-5)
    least = (problem.scale / problem.condition) ** 2 + problem.damping
    error = (solution.x - exact).norm()
    # in the null space that rounding has tilted, too
    assert error <= 1.1 * tolerance / least + 1e-8 * problem.condition * exact.norm()


@given(problems(max_log_condition=2))
def test_converged_is_a_statement_on_the_true_slope(problem):
    for rtol in (1e-3, 1e-5, 2e-7, 1e-15):  # the last two are rounding
        solution = lsqr(problem.J, problem.b, damping=problem.damping, rtol=rtol)
        assert solution.x.isfinite().all()
        true = problem.slope(solution.x).norm().item()
        tolerance = rtol * problem.slope(torch.zeros_like(solution.x)).norm().item()
        slack = 8 * problem.rounding(solution.x)  # measured by products, which round themselves
        if solution.status is Status.CONVERGED:
            assert true <= tolerance + slack
        if solution.true_residual_norm is not None:
            assert abs(solution.true_residual_norm - true) <= slack
            assert solution.residual_norm == solution.true_residual_norm
            if solution.status is Status.CONVERGED:
                # of the tolerance only the product J'b rounds
                loss = rtol * 8 * problem.eps * problem.scale * problem.b.double().norm()
                assert solution.residual_norm <= tolerance * (1 + 1e-6) + loss
        if rtol == 1e-3 and problem.b.dtype == torch.float64:
            assert solution.status is Status.CONVERGED


@given(problems(), st.integers(0, 8))
def test_the_carried_numbers_are_the_true_ones(problem, k):
    solution = lsqr(problem.J, problem.b, damping=problem.damping, rtol=1e-4, max_iter=k)
    x, b, J = solution.x.double(), problem.b.double(), problem.J.double()
    slack = 20 * problem.rounding(solution.x)
    assert abs(solution.residual_norm - problem.slope(x).norm()) <= slack
    curvature = (J @ x) @ (J @ x) + problem.damping * (x @ x)
    assert abs(solution.curvature - curvature) <= slack * x.norm()
    assert abs(solution.model_value - (0.5 * curvature - b @ (J @ x))) <= slack * x.norm()
    assert abs(solution.norm - x.norm()) <= 4 * problem.eps * x.norm()


@given(problems(dtypes=[torch.float64], max_log_condition=1.5), st.integers(1, 4))
def test_the_iterates_are_those_of_conjugate_gradients(problem, k):
    J, b = problem.J / problem.scale, problem.b
    damping = problem.damping / problem.scale**2
    A = J.T @ J + damping * torch.eye(J.shape[1], dtype=torch.float64)
    theirs, ours = [], []
    cg(A, J.T @ b, rtol=1e-4, max_iter=k, callback=theirs.append)
    lsqr(J, b, damping=damping, rtol=1e-4, max_iter=k, callback=ours.append)
    assert abs(len(ours) - len(theirs)) <= 1  # at the edge of the tolerance
    for x, y in zip(ours, theirs, strict=False):
        assert (x - y).norm() <= 1e-8 * y.norm()


@given(problems(max_log_condition=2))
def test_the_objective_does_not_grow(problem):
    seen = []
    lsqr(problem.J, problem.b, damping=problem.damping, callback=seen.append, max_iter=15)
    J, b = problem.J.double(), problem.b.double()
    before, length = b @ b, 0.0
    fewest = -(-min(J.shape) // 2)  # the least rank drawn, at which exact arithmetic ends
    for k, x in enumerate(seen, 1):
        x = x.double()
        after = (b - J @ x) @ (b - J @ x) + problem.damping * (x @ x)
        assert after <= before + 40 * problem.rounding(x) * x.norm() + 8 * problem.eps * b @ b
        if k <= min(fewest, 6):  # while orthogonality lasts
            assert x.norm() >= length * (1 - 1000 * problem.eps * problem.condition)
        before, length = after, x.norm()


@given(problems(max_log_condition=2, damped=(0.0,)))
def test_of_deficient_rank_the_shortest_solution(problem):
    f32 = problem.b.dtype == torch.float32
    rtol = 1e-5 if f32 else 1e-11
    solution = lsqr(problem.J, problem.b, rtol=rtol)
    exact = problem.exact()
    b = problem.b.double().norm()
    least = problem.scale / problem.condition
    # the tolerance through the smallest value, and the null space that rounding has tilted
    loss = rtol * problem.scale * b / least**2 + 100 * problem.eps * problem.scale * b / least**2
    assert (solution.x.double() - exact).norm() <= loss
    assert solution.status in (Status.CONVERGED, Status.STAGNATED)


@given(problems(max_log_condition=2, damped=(0.0,)))
def test_no_tolerance_makes_it_solve_for_rounding(problem):
    """Below the rounding of the products a deficient J has a tiny value and a huge solution."""
    solution = lsqr(problem.J, problem.b, rtol=0.0)
    bound = problem.b.double().norm() * problem.condition / problem.scale
    assert solution.x.double().norm() <= 1.1 * bound


@pytest.mark.parametrize("damping", [0.0, 1e-7])
def test_far_more_accurate_than_the_normal_equations_in_float32(damping):
    g = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(60, 20, generator=g, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(20, 20, generator=g, dtype=torch.float64))
    J = ((U * torch.logspace(0, -4, 20, dtype=torch.float64)) @ V.T).float()
    exact = torch.ones(20, dtype=torch.float64)
    b = (J.double() @ exact).float()
    A = J.double().T @ J.double() + damping * torch.eye(20, dtype=torch.float64)
    exact = torch.linalg.solve(A, J.double().T @ b.double())
    ours = lsqr(J, b, damping=damping, rtol=1e-9, max_iter=2000).x.double()
    normal = lambda v: J.T @ (J @ v) + damping * v  # noqa: E731
    theirs = cg(normal, J.T @ b, rtol=1e-9, max_iter=2000).x.double()
    assert 20 * (ours - exact).norm() < (theirs - exact).norm()


@pytest.mark.parametrize("power", [-40, -7, 3, 40])
@given(problem=problems())
def test_scaling_by_powers_of_two_is_exact(problem, power):
    J, b, damping = problem.J, problem.b, problem.damping
    factor = 2.0**power
    x = lsqr(J, b, damping=damping).x
    assert torch.equal(lsqr(J, b * factor, damping=damping).x, x * factor)
    assert torch.equal(lsqr(J * factor, b, damping=damping * factor**2).x, x / factor)


@pytest.mark.parametrize("which", ["b", "J"])
@pytest.mark.parametrize(
    ("power", "dtype"),
    [(p, d) for p in (-140, -60, 60, 120) for d in DTYPES]
    + [(p, torch.float64) for p in (-1060, -700, 700, 1018)],
)
def test_no_scale_is_out_of_reach(power, dtype, which):
    J = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], dtype=dtype)
    b = torch.tensor([6.0, 0.0, 1.0], dtype=dtype)
    x = lsqr(J, b).x
    scaled = {"J": J, "b": b}
    scaled[which] = ldexp(scaled[which], power)
    solution = lsqr(**scaled)
    expected = ldexp(x, power if which == "b" else -power)
    if expected.isfinite().all():
        subnormal = 2.0**power < torch.finfo(dtype).tiny
        # a subnormal x has few digits, and may leave too large a slope
        assert solution.status is Status.CONVERGED or (subnormal and which == "b")
        loss = 1e-2 if subnormal else 1e-5
        torch.testing.assert_close(solution.x, expected, rtol=loss, atol=0)
    else:
        seen = []
        solution = lsqr(**scaled, callback=seen.append)
        assert solution.status is Status.NONFINITE_OPERATOR
        assert torch.equal(solution.x, torch.zeros(2, dtype=dtype))
        assert math.isfinite(solution.curvature)
        assert not seen


@given(problems(), st.integers(0, 12), st.sampled_from([1e-2, 1e-5, 0.0]))
def test_products_are_counted(problem, k, rtol):
    J = CountingMap(problem.J)
    solution = lsqr(J, problem.b, damping=problem.damping, rtol=rtol, max_iter=k)
    assert J.forward + J.adjoint == solution.products
    assert solution.iterations <= k
    if solution.status is Status.MAX_ITER and solution.true_residual_norm is None and k < 2:
        assert (J.forward, J.adjoint) == (k, k + 1)


def test_two_products_an_iteration_and_one_at_the_start():
    J = CountingMap(torch.diag(torch.linspace(1, 2, 40, dtype=torch.float64)))
    b = torch.ones(40).double()
    solution = lsqr(J, b, rtol=1e-4)
    assert (solution.status, solution.true_residual_norm) == (Status.CONVERGED, None)
    assert (J.forward, J.adjoint) == (solution.iterations, solution.iterations + 1)
    assert solution.products == 2 * solution.iterations + 1
    J = CountingMap(J.matrix)
    solution = lsqr(J, b, rtol=1e-15)  # measured once, at the rounding
    assert solution.true_residual_norm is not None
    assert (J.forward, J.adjoint) == (solution.iterations + 1, solution.iterations + 2)


def test_the_callback_sees_each_iterate():
    J = torch.diag(torch.tensor([1.0, 2.0, 4.0])) / 8
    seen = []
    solution = lsqr(J, 3 * torch.ones(3), callback=seen.append)
    assert len(seen) == solution.iterations == 3
    assert torch.equal(seen[-1], solution.x)


def test_max_iter_is_named_and_defaults_to_ten_times_the_smaller_side():
    J, b = torch.diag(torch.logspace(0, 4, 30, dtype=torch.float64)), torch.ones(30).double()
    assert lsqr(J, b, max_iter=3).status is Status.MAX_ITER
    g = torch.Generator().manual_seed(0)
    noise = [lambda _, size=size: torch.randn(size, generator=g).double() for size in (30, 40)]
    assert lsqr(FunctionMap(*noise, (30, 40), torch.float64), b, rtol=0.0).iterations == 300
    solution = lsqr(J, b, max_iter=0)
    assert (solution.status, solution.products) == (Status.MAX_ITER, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_have_the_zero_solution(dtype):
    J = CountingMap(torch.eye(3, 2, dtype=dtype))
    solution = lsqr(J, torch.zeros(3, dtype=dtype))
    assert torch.equal(solution.x, torch.zeros(2, dtype=dtype))
    assert (solution.status, solution.products) == (Status.CONVERGED, 0)
    solution = lsqr(J, torch.tensor([0.0, 0.0, 2.0], dtype=dtype), rtol=0.0)  # J'b = 0
    assert torch.equal(solution.x, torch.zeros(2, dtype=dtype))
    assert (solution.status, solution.products, J.adjoint) == (Status.CONVERGED, 1, 1)
    assert lsqr(torch.zeros(3, 2, dtype=dtype), torch.ones(3, dtype=dtype)).status is (
        Status.CONVERGED
    )
    assert lsqr(torch.zeros(3, 0, dtype=dtype), torch.ones(3, dtype=dtype)).x.shape == (0,)


def test_the_end_of_the_space_is_met():
    solution = lsqr(torch.tensor([[4.0]]), torch.tensor([2.0]), rtol=0.0)
    assert (solution.x.item(), solution.status) == (0.5, Status.CONVERGED)
    solution = lsqr(torch.tensor([[3.0], [4.0]]), torch.tensor([5.0, 0.0]), damping=25.0)
    assert solution.x.item() == pytest.approx(0.3, rel=1e-6)
    assert (solution.status, solution.iterations) == (Status.CONVERGED, 1)


def test_tolerances_are_in_the_units_of_the_slope():
    J, b = torch.diag(torch.tensor([1.0, 10.0, 100.0])), torch.full((3,), 1e-6)
    assert lsqr(J, b, rtol=0.0, atol=1e-3).iterations == 0
    assert lsqr(J, b, rtol=0.0, atol=1e-5).iterations > 0
    sizes = []
    assert lsqr(J, b, rtol=lambda size: sizes.append(size) or 1.0).iterations == 0
    assert sizes == [pytest.approx((J.T @ b).norm().item(), rel=1e-6)]
    far = torch.eye(2, 1), torch.tensor([1e-3, 1.0])  # J'b is 1e-3 of b
    assert lsqr(*far, rtol=0.5).iterations == 1
    assert lsqr(J, b, rtol=1.0).iterations == 0


bad_numbers = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


@bad_numbers
@given(problem=problems(), at=st.integers(1, 12))
def test_what_is_not_finite_is_named(bad, problem, at):
    b = problem.b.clone()
    b[-1] = bad
    solution = lsqr(problem.J, b)
    assert solution.status is Status.NONFINITE_INPUT
    assert torch.equal(solution.x, torch.zeros_like(solution.x))
    calls, seen = 0, []

    def poisoned(out):
        nonlocal calls
        calls += 1
        if calls == at:
            out[0] = bad
        return out

    J = problem.J
    m = FunctionMap(lambda v: poisoned(J @ v), lambda u: poisoned(J.T @ u), J.shape, J.dtype)
    solution = lsqr(m, problem.b, rtol=0.0, callback=seen.append)
    assert solution.x.isfinite().all()
    assert all(x.isfinite().all() for x in seen)
    assert math.isfinite(solution.curvature)
    if calls >= at:
        assert solution.status is Status.NONFINITE_OPERATOR
        if seen:
            assert torch.equal(solution.x, seen[-1])


@given(
    st.lists(st.floats(width=32), min_size=6, max_size=6),
    st.lists(st.floats(width=32), min_size=3, max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 1.0, 1e-40, 1e200]),
)
@example([0.0] * 6, [1.0] * 3, torch.float32, 0.0)
@example([0.0, 1.0, 0.0, 0.0, 232.0, 2.0**-24], [1.0, 0.0, 0.0], torch.float32, 0.0)
@example([1e-30] * 6, [1e30] * 3, torch.float64, 1e200)
def test_no_input_gives_a_nan_or_a_false_success(entries, b, dtype, damping):
    J, b = torch.tensor(entries, dtype=dtype).view(3, 2), torch.tensor(b, dtype=dtype)
    solution = lsqr(J, b, damping=damping)
    assert solution.x.isfinite().all()
    assert not math.isnan(solution.residual_norm)
    assert not math.isnan(solution.model_value)
    if solution.status is Status.CONVERGED:
        Jd, x, bd = J.double(), solution.x.double(), b.double()
        true = (Jd.T @ (bd - Jd @ x) - damping * x).norm()
        size = (Jd.abs().T @ (bd.abs() + Jd.abs() @ x.abs()) + damping * x.abs()).norm()
        info = torch.finfo(dtype)
        # what is flushed to zero below the smallest number, times what meets it
        tiny = info.tiny * (1 + Jd.abs().sum() * (1 + Jd.abs().sum()) + damping + bd.abs().max())
        assert not true > 1e-5 * (Jd.T @ bd).norm() + 16 * info.eps * size + tiny


def test_a_tensor_and_a_map_are_the_same_and_nothing_is_written_to():
    J = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], requires_grad=True)
    b = torch.tensor([6.0, 0.0, 0.0])
    solution = lsqr(J, b)
    assert torch.equal(solution.x, lsqr(DenseMap(J), b).x)
    assert not solution.x.requires_grad
    assert torch.equal(b, torch.tensor([6.0, 0.0, 0.0]))
    same = FunctionMap(lambda v: v, lambda u: u, (3, 3))  # hands back what it is given
    assert torch.equal(lsqr(same, b).x, b)


tall = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((tall, [1.0]), {}, TypeError, "got list"),
        ((tall, torch.ones(3, 2)), {}, ValueError, "vector of shape"),
        ((tall, torch.ones(2)), {}, ValueError, r"b must be of shape \(3,\)"),
        ((tall.double(), torch.ones(3)), {}, ValueError, "float64"),
        ((lambda v: v, torch.ones(3)), {}, TypeError, "FunctionMap"),
        ((torch.ones(3), torch.ones(3)), {}, ValueError, "matrix"),
        ((tall, torch.ones(3)), {"damping": -1.0}, ValueError, "damping"),
        ((tall, torch.ones(3)), {"damping": math.nan}, ValueError, "damping"),
        ((tall, torch.ones(3)), {"damping": math.inf}, ValueError, "damping"),
        ((tall, torch.ones(3)), {"rtol": -1.0}, ValueError, "rtol"),
        ((tall, torch.ones(3)), {"atol": math.nan}, ValueError, "atol"),
        ((tall, torch.ones(3)), {"max_iter": -1}, ValueError, "max_iter"),
    ],
)
def test_wrong_arguments_are_refused_in_words(arguments, options, error, words):
    with pytest.raises(error, match=words):
        lsqr(*arguments, **options)
