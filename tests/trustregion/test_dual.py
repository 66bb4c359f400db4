"""Laws of the dual solve: the push-through identity, and what it costs."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch import distributions as td

import oracles
from cases import cases
from counting import Counting
from strategies import DTYPES
from trustregion import FisherOperator, Status
from trustregion.operators import FunctionMap
from trustregion.solvers import dual_is_cheaper, dual_solve

METHODS = ["dual", "primal"]
each_method = pytest.mark.parametrize("method", METHODS)


@dataclass(frozen=True)
class Damped:
    """A system ``(scale J'HJ + damping I) x = J'u``; the matrix ``A`` and ``g`` in float64."""

    J: Tensor
    H: Tensor | None
    u: Tensor
    scale: float
    damping: float

    @property
    def A(self):
        J = self.J.double()
        H = torch.eye(len(J)).double() if self.H is None else self.H.double()
        return self.scale * J.T @ H @ J + self.damping * torch.eye(J.shape[1]).double()

    @property
    def g(self):
        return self.J.double().T @ self.u.double()

    @property
    def eps(self):
        return torch.finfo(self.u.dtype).eps

    @property
    def kappa(self):
        """The condition of the system."""
        return torch.linalg.matrix_norm(self.A, 2).item() / self.damping

    def solve(self, method="dual", u=None, **options):
        arguments = {"metric": self.H, "damping": self.damping, "scale": self.scale}
        u = self.u if u is None else u
        return dual_solve(self.J, u, method=method, **{**arguments, **options})

    def residual(self, x):
        return (self.g - self.A @ x.double()).norm().item()


def metric_matrix(kind, m, generator):
    """A positive semi-definite metric: softmax blocks are singular, as is one of half the rank."""
    if kind == "none":
        return None
    if kind == "softmax":
        p = torch.softmax(torch.randn(m // 3 + 1, 3, generator=generator).double(), -1)
        blocks = torch.block_diag(*(torch.diag(q) - q.outer(q) for q in p))
        return blocks[:m, :m].contiguous()  # BLAS rounds by the layout, and 2 H would have another
    root = torch.randn(m, m if kind == "full" else (m + 1) // 2, generator=generator).double()
    return root @ root.T / m


@st.composite
def damped(
    draw,
    metrics=("none", "softmax", "full", "half"),
    ranks=(1.0, 0.5),
    dtypes=tuple(DTYPES),
    max_log_condition=4.0,
    dampings=(-8.0, 0.0),
):
    """Draw ``J = U diag(s) V'`` with known singular values, and a damping relative to ``J'HJ``."""
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    k = min(m, n)
    U, _ = torch.linalg.qr(torch.randn(m, k, generator=generator).double())
    V, _ = torch.linalg.qr(torch.randn(n, k, generator=generator).double())
    s = torch.logspace(0, -draw(st.floats(0, max_log_condition)), k, dtype=torch.float64)
    rank = max(1, round(k * draw(st.sampled_from(ranks))))
    s[rank:] = 0.0
    dtype = draw(st.sampled_from(dtypes))
    J = ((U * s) @ V.T * 10 ** draw(st.floats(-5, 5))).to(dtype)
    H = metric_matrix(draw(st.sampled_from(metrics)), m, generator)
    H = None if H is None else H.to(dtype)
    scale = draw(st.sampled_from([1.0, 0.125, 1 / 7]))
    u = torch.randn(m, generator=generator).double()
    if draw(st.booleans()):  # as the derivative of a loss is
        u = u if H is None else H.double() @ u
    size = torch.linalg.matrix_norm(Damped(J, H, u.to(dtype), scale, 0.0).A, 2).item()
    damping = 10 ** draw(st.floats(*dampings)) * (size or 1.0)
    return Damped(J, H, u.to(dtype), scale, damping)


def attainable(system, x):
    """The residual that rounding of ``x``, of ``H`` and of the kept rows leaves."""
    size = torch.linalg.matrix_norm(system.A, 2) * x.double().norm()
    wide = torch.finfo(torch.float64).eps
    # a rank decided in float64: singular values below sqrt(m eps) of the largest are dropped
    lost = math.sqrt(len(system.u) * wide) * torch.linalg.matrix_norm(system.J.double(), 2)
    return (20 * system.eps * size + 2 * lost * system.u.double().norm()).item()


@given(damped())
def test_the_dual_residual_is_at_rounding(system):
    solution = system.solve(rtol=0.0)
    assert solution.method == "dual"
    assert system.residual(solution.x) <= attainable(system, solution.x)


@given(damped(dtypes=[torch.float64], dampings=(-6.0, 0.0)))
def test_the_dual_solution_equals_a_dense_solve(system):
    solution = system.solve(rtol=1e-6)
    assert solution.status is Status.CONVERGED or system.g.norm() <= 1e-6 * system.u.norm()
    exact = torch.linalg.solve(system.A, system.g)
    # error <= residual / damping
    bound = attainable(system, solution.x) + 100 * system.eps * system.kappa * system.g.norm()
    assert (solution.x - exact).norm() * system.damping <= bound


@given(damped(ranks=[1.0], max_log_condition=2.0, dampings=(-3.0, 0.0)))
def test_dual_and_primal_agree(system):
    # float32 products of the primal method leave about eps times the condition
    rtol = max(1e-10, 100 * system.eps * system.kappa)
    dual, primal = system.solve(rtol=rtol), system.solve("primal", rtol=rtol)
    assert (dual.method, primal.method) == ("dual", "primal")
    gap = (dual.x.double() - primal.x.double()).norm()
    # the one residual is below the tolerance, and the other at most ten times it by float32 noise
    assert gap * system.damping <= 11 * rtol * system.g.norm() + attainable(system, dual.x)


@given(damped(), st.sampled_from(METHODS), st.sampled_from([1e-2, 1e-5, 1e-9]))
def test_converged_is_a_statement_on_the_true_residual(system, method, rtol):
    solution = system.solve(method, rtol=rtol)
    assert solution.x.isfinite().all()
    if solution.status is Status.CONVERGED:
        true = system.residual(solution.x)
        # the primal residual is measured by products in the dtype, the dual one in float64
        size = torch.linalg.matrix_norm(system.A, 2) * solution.x.double().norm()
        eps = system.eps if method == "primal" else torch.finfo(torch.float64).eps
        noise = 50 * eps * (size + torch.linalg.matrix_norm(system.J.double(), 2) * system.u.norm())
        assert true <= rtol * system.g.norm() * (1 + 1e-6) + noise


@given(damped())
def test_the_numbers_reported_are_those_of_the_returned_x(system):
    solution = system.solve(rtol=0.0)
    x, g, A = solution.x.double(), system.g, system.A
    wide = torch.finfo(torch.float64).eps
    size = (
        torch.linalg.matrix_norm(A, 2) * x.norm()
        + torch.linalg.matrix_norm(system.J.double(), 2) * system.u.double().norm()
    )
    noise = 100 * wide * size.item()
    assert abs(solution.residual_norm - system.residual(x)) <= noise
    assert solution.true_residual_norm == solution.residual_norm
    assert abs(solution.curvature - x @ A @ x) <= noise * x.norm()
    assert abs(solution.model_value - (0.5 * x @ A @ x - g @ x)) <= noise * x.norm()
    assert solution.norm == pytest.approx(x.norm().item(), rel=1e-14)


@given(damped(ranks=[0.5], dtypes=[torch.float32], max_log_condition=1.0))
def test_null_vectors_of_the_jacobian_are_not_amplified(system):
    """The case against LU of ``H K + damping I``, which divides them by the damping."""
    solution = system.solve()
    # a matrix of half the rank in exact arithmetic has rounding in the other half in float32;
    # from 1e-8 on the right-hand side it takes 1e-7 / sqrt(damping) of the answer with it
    assert system.residual(solution.x) <= 1e-4 * system.J.double().norm() * system.u.norm()


def test_lu_would_be_wrong_where_the_jacobian_is_rank_deficient():
    worst_lu = worst_ours = 0.0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        J = torch.randn(4, 60, generator=generator).repeat_interleave(2, 0)  # each row twice
        u = torch.randn(8, generator=generator)
        system = Damped(J, None, u, 1.0, 1e-8 * J.norm().item() ** 2)
        K = J.double() @ J.double().T
        z = torch.linalg.solve(K + system.damping * torch.eye(8).double(), u.double())
        size = system.g.norm().item()
        worst_lu = max(worst_lu, system.residual(J.T @ z.float()) / size)
        worst_ours = max(worst_ours, system.residual(system.solve().x) / size)
    assert worst_ours < 1e-5 < 1e-2 < worst_lu


@each_method
@pytest.mark.parametrize("power", [-60, -7, 3, 60])
@given(system=damped(dtypes=[torch.float64]))
def test_scaling_by_powers_of_two_is_exact(method, power, system):
    factor, plain = 2.0**power, system.solve(method)
    scaled = system.solve(method, u=system.u * factor)
    assert torch.equal(scaled.x, plain.x * factor)
    assert scaled.status is plain.status
    assert scaled.residual_norm == plain.residual_norm * factor
    assert scaled.curvature == plain.curvature * factor**2
    J = Damped(system.J * factor, system.H, system.u, system.scale, system.damping * factor**2)
    assert torch.equal(J.solve(method).x, plain.x / factor)
    both = system.solve(method, scale=system.scale * factor, damping=system.damping * factor)
    assert torch.equal(both.x, plain.x / factor)
    if system.H is not None:
        metric = system.solve(method, metric=system.H * factor, damping=system.damping * factor)
        assert torch.equal(metric.x, plain.x / factor)


def counting(matrix):
    calls = []

    def forward(v):
        calls.append("J")
        return matrix @ v

    def adjoint(u):
        calls.append("J'")
        return matrix.T @ u

    return FunctionMap(forward, adjoint, tuple(matrix.shape), matrix.dtype), calls


@given(damped(metrics=["full"]))
def test_products_of_the_dual_method(system):
    J, calls = counting(system.J)
    H = Counting(system.H)
    arguments = {"metric": H, "damping": system.damping, "scale": system.scale}
    solution = dual_solve(J, system.u, method="dual", **arguments)
    m = len(system.u)
    assert calls == ["J'"] * m
    assert solution.products == H.products == m
    assert solution.iterations == 0
    dense = system.solve()
    assert dense.products == 0
    assert torch.equal(dense.x, solution.x) or dense.status is not Status.CONVERGED


@given(damped(metrics=["full"]), st.integers(0, 6))
def test_products_of_the_primal_method(system, k):
    J, calls = counting(system.J)
    H = Counting(system.H)
    arguments = {"metric": H, "damping": system.damping, "scale": system.scale}
    solution = dual_solve(J, system.u, method="primal", max_iter=k, rtol=0.0, **arguments)
    assert solution.products == len(calls) == 2 * calls.count("J") + 1
    assert H.products == calls.count("J")
    assert solution.iterations <= k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [case.name for case in cases()])
def test_a_natural_gradient_of_a_model(name, dtype):
    case = next(c for c in cases(dtype) if c.name == name)
    F = FisherOperator(case.predict(case.params), case.params)
    J = F.jacobian
    u = torch.randn(J.shape[0], generator=torch.Generator().manual_seed(3)).to(dtype)
    solution = dual_solve(J, u, metric=F.metric, damping=0.1, scale=1 / F.batch_size, method="dual")
    wide = next(c for c in cases() if c.name == name)
    dense = oracles.kl_hessian(wide.predict, wide.params)
    g = oracles.output_jacobian(wide.predict, wide.params).T @ u.double()
    exact = torch.linalg.solve(dense + 0.1 * torch.eye(len(g)).double(), g)
    assert solution.status is Status.CONVERGED
    # in float32 the Jacobian and the metric are rounded, and divided by the damping
    rtol = 1e-9 if dtype is torch.float64 else 1e-3
    assert (solution.x.double() - exact).norm() <= rtol * exact.norm()


def test_the_derivative_of_a_loss_gives_its_natural_gradient():
    W = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(8, 20, dtype=torch.float64), torch.arange(8) % 3
    d = td.Categorical(logits=x @ W)
    F = FisherOperator(d, [W])
    loss = -d.log_prob(y).mean()
    (u,) = torch.autograd.grad(loss, d.logits, retain_graph=True)
    solution = dual_solve(
        F.jacobian, u.flatten(), metric=F.metric, damping=0.01, scale=1 / F.batch_size, rtol=1e-12
    )
    (g,) = torch.autograd.grad(loss, W, retain_graph=True)
    residual = F @ solution.x + 0.01 * solution.x - g.flatten()
    assert solution.status is Status.CONVERGED
    assert residual.norm() <= 1e-9 * g.norm()


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
def test_no_input_whatever_gives_a_nan_or_a_false_success(J, H, u, damping, dtype, method):
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


def test_auto_takes_the_method_with_fewer_operations():
    J = torch.randn(8, 2000)
    few = dual_solve(J, torch.ones(8), damping=0.1, max_iter=2)
    many = dual_solve(J, torch.ones(8), damping=0.1)
    assert (few.method, many.method) == ("primal", "dual")
    assert many.primal_flops == 2 * (2 * 8 * 2000) * 9  # rank 8: done after 9 iterations
    assert many.dual_flops == 8 * 8 * 2000 + 13 * 8**3 + 2 * 2 * 8 * 2000
    products_only, _ = counting(J)
    mapped = dual_solve(products_only, torch.ones(8), damping=0.1)
    assert mapped.dual_flops == many.dual_flops + 8 * (2 * 8 * 2000)
    tall = dual_solve(torch.randn(300, 4), torch.ones(300), damping=0.1)
    assert tall.method == "primal"
    assert tall.primal_flops == 2 * (2 * 300 * 4) * 4  # n = 4 iterations
    wide = dual_solve(torch.randn(90, 200), torch.ones(90), damping=0.1)
    assert wide.primal_flops == 2 * (2 * 90 * 200) * 50


@given(st.integers(1, 5000), st.integers(1, 10**6), st.integers(1, 300))
def test_the_count_is_the_documented_one(m, n, iterations):
    p = 2 * m * n
    expected = m * m * n + 13 * m**3 + 2 * p < 2 * p * iterations
    assert dual_is_cheaper(m, n, iterations) == expected
    p = 7 * m * n
    options = {"product_flops": p, "gram_flops": m * p + m * m * n}
    expected = m * p + m * m * n + 13 * m**3 + 2 * p < 2 * p * iterations
    assert dual_is_cheaper(m, n, iterations, **options) == expected


@each_method
def test_a_rule_as_tolerance_sees_the_norm_of_the_gradient(method):
    J, u, seen = torch.diag(torch.tensor([4.0, 3.0])), torch.tensor([3.0, 3.0]) * 2**40, []

    def rule(size):
        seen.append(size)
        return 0.5

    assert dual_solve(J, u, damping=1.0, method=method, rtol=rule).status is Status.CONVERGED
    assert seen == [15.0 * 2**40]


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
