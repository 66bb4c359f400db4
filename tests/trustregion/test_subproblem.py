import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

import oracles
from counting import Counting
from strategies import DTYPES, System, systems
from trustregion import Status, cg, kl_ball_step
from trustregion.solvers.constrained import constrained_kl_ball_step


def solve(system, damping=0.0, rtol=1e-6):
    n = len(system.b)
    A = system.A + damping * torch.eye(n, dtype=system.A.dtype)
    return cg(A, -system.b, rtol=rtol)


@given(systems(), st.floats(-6, 2))
def test_without_damping_the_step_ends_on_the_ball(system, log_delta):
    delta, solution = 10**log_delta, solve(system)
    step = kl_ball_step(solution.x, system.b, delta, damped_curvature=solution.curvature, damping=0)
    s = step.s.double()
    assert step.status is Status.CONVERGED
    # x'Ax from the recurrence is good to a few eps times the condition
    rel = 50 * system.eps * max(system.condition, 1.0)
    assert (0.5 * s @ system.exact @ s).item() == pytest.approx(delta, rel=rel)


@given(systems(dtypes=[torch.float64], max_log_condition=2), st.floats(-3, 3))
def test_damping_does_not_shrink_the_ball(system, log_ratio):
    damping = system.scale * 10**log_ratio
    solution = solve(system, damping)
    step = kl_ball_step(
        solution.x, system.b, 0.01, damped_curvature=solution.curvature, damping=damping
    )
    assert step.status is Status.CONVERGED
    assert (0.5 * step.s @ system.exact @ step.s).item() == pytest.approx(0.01, rel=1e-6)


@given(systems(dtypes=[torch.float64], max_log_condition=3, max_n=10))
def test_the_step_is_the_minimiser_over_the_ball(system):
    """Against the dense solution of min g's, s'Fs/2 <= delta, whose value is -sqrt(2 delta g'x)."""
    delta, g = 0.01, system.b
    solution = solve(system, rtol=1e-12)
    step = kl_ball_step(solution.x, g, delta, damped_curvature=solution.curvature, damping=0)
    best = (2 * delta * (g @ torch.linalg.solve(system.exact, g))).sqrt().item()
    assert step.predicted_reduction == pytest.approx(best, rel=1e-6)
    assert step.predicted_reduction == pytest.approx(-(g @ step.s).item(), rel=1e-12)


@given(systems(max_n=10), st.integers(-10, 10))
def test_the_step_is_invariant_under_scaling_to_the_bit(system, power):
    """s ignores the scale of g; F -> 4^k F divides it by 2^k; delta -> 4 delta doubles it."""

    def step(A_factor=1.0, g_factor=1.0, delta=0.01):
        solution = cg(A_factor * system.A, -g_factor * system.b, max_iter=5)
        curvature = solution.curvature
        return kl_ball_step(
            solution.x, g_factor * system.b, delta, damped_curvature=curvature, damping=0
        ).s

    s = step()
    assert torch.equal(step(g_factor=2.0**power), s)
    assert torch.equal(step(A_factor=4.0**power), s * 2.0**-power)
    assert torch.equal(step(delta=0.04), 2 * s)


g = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("curvature", "damping"),
    [(0.0, 0.0), (-1.0, 0.0), (5.0, 1.0), (5.0 + 1e-7, 1.0), (float("nan"), 0.0)],
)
def test_curvature_lost_in_rounding_gives_no_step(curvature, damping):
    step = kl_ball_step(-g, g, 0.01, damped_curvature=curvature, damping=damping)
    assert step.status is Status.ZERO_CURVATURE
    assert torch.equal(step.s, torch.zeros(2))


def test_a_step_that_overflows_is_no_step():
    step = kl_ball_step(-g * 1e30, g, 1e30, damped_curvature=1e-30, damping=0.0)
    assert step.status is Status.ZERO_CURVATURE
    assert torch.equal(step.s, torch.zeros(2))


def test_an_ascent_direction_is_refused():
    step = kl_ball_step(g, g, 0.01, damped_curvature=1.0, damping=0.0)
    assert step.status is Status.NOT_A_DESCENT
    assert torch.equal(step.s, torch.zeros(2))


# Linear constraints


@dataclass(frozen=True)
class Constrained:
    """A system with constraints, whose values are given in units of the radius of the ball."""

    system: System
    delta: float
    a: Tensor
    b: Tensor

    @property
    def H(self):
        return self.system.exact

    @property
    def g(self):
        return self.system.b

    def step(self, **options):
        options = {"rtol": 1e-11, "max_iter": 1000, "A": self.system.A, "g": self.g, **options}
        options = {"delta": self.delta, "a": self.a, "b": self.b, **options}
        given = [options.pop(name) for name in ("A", "g", "delta", "a", "b")]
        return constrained_kl_ball_step(*given, **options)

    def value(self):
        return oracles.constrained_minimum(self.H, self.g.double(), self.delta, self.a, self.b)

    def extents(self, step):
        """|a_i| |s|, the scale of a constraint's rounding."""
        return self.a.double().norm(dim=1) * step.s.double().norm()

    def reaches(self):
        """How far each constraint's value can change in the ball."""
        a, inverse = self.a.double(), torch.linalg.inv(self.H)
        return (2 * self.delta * ((a @ inverse) * a).sum(dim=1).clamp(min=0)).sqrt()


KINDS = ["random", "like g", "against g", "like another", "against another", "zero"]


@st.composite
def problems(
    draw, max_m=4, kinds=tuple(KINDS), offsets=(-1.5, 1.2), max_log_condition=3, **options
):
    options = {"dtypes": [torch.float64], "max_n": 12, **options}
    system = draw(systems(max_log_condition=max_log_condition, **options))
    m = draw(st.integers(1, max_m))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    delta = 10 ** draw(st.floats(-4, 1))
    g = system.b.double()
    rows = []
    for _ in range(m):
        kind = draw(st.sampled_from(kinds))
        factor = 10 ** draw(st.floats(-3, 3))
        sign = -1.0 if kind.startswith("against") else 1.0
        row = torch.randn(len(g), generator=generator, dtype=torch.float64)
        if kind.endswith(" g"):
            row = sign * g
        elif kind.endswith("another") and rows:
            row = sign * rows[0]
        elif kind == "zero":
            row = torch.zeros_like(row)
        rows.append(factor * row)
    a = torch.stack(rows).to(system.b.dtype)
    inverse = torch.linalg.inv(system.exact)
    reach = (2 * delta * ((a.double() @ inverse) * a.double()).sum(dim=1)).clamp(min=0).sqrt()
    # a grid, so that two parallel constraints contradict each other by much or not at all
    low, high = (round(64 * offset) for offset in offsets)
    parts = [draw(st.one_of(st.just(0), st.integers(low, high))) / 64 for _ in range(m)]
    return Constrained(system, delta, a, reach * torch.tensor(parts, dtype=torch.float64))


@given(problems())
def test_the_constrained_step_is_the_minimiser(problem):
    """Against every active set of the dense problem."""
    step, best = problem.step(), problem.value()
    scale = (2 * problem.delta * problem.g @ torch.linalg.solve(problem.H, problem.g)).sqrt().item()
    assert (best is None) == (step.status is Status.INFEASIBLE)
    if best is not None:
        assert step.status is Status.CONVERGED
        assert step.feasible
        assert abs(-step.predicted_reduction - best) <= 1e-6 * scale


@given(problems(offsets=(-1.5, 0.9), kinds=["random"], max_m=3, max_log_condition=2))
def test_the_constrained_step_is_as_good_as_that_of_a_general_solver(problem):
    step = problem.step()
    assume(step.status is Status.CONVERGED)
    L = torch.linalg.cholesky(problem.H)
    radius = (2 * problem.delta) ** 0.5
    B = torch.linalg.solve_triangular(L, problem.a.T, upper=False).T
    c = torch.linalg.solve_triangular(L, problem.g.unsqueeze(1), upper=False).squeeze(1)
    sizes = B.norm(dim=1)
    B, h, c = B / sizes.unsqueeze(1), problem.b / sizes / radius, c / c.norm()
    start = torch.linalg.pinv(B) @ -h
    found = minimize(
        lambda y: c.numpy() @ y,
        start.numpy(),
        jac=lambda _: c.numpy(),
        method="SLSQP",
        constraints=[
            {"type": "ineq", "fun": lambda y: (1 - y @ y) / 2, "jac": lambda y: -y},
            {
                "type": "ineq",
                "fun": lambda y: -(h.numpy() + B.numpy() @ y),
                "jac": lambda _: -B.numpy(),
            },
        ],
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assume(found.success)
    ours = (c @ (L.T @ step.s) / radius).item()
    # its own point may be outside by about 1e-7
    assert ours <= found.fun + 1e-6


@given(problems())
def test_the_conditions_of_optimality_hold(problem):
    step = problem.step()
    assume(step.status is Status.CONVERGED and math.isfinite(step.ball_multiplier))
    nu, mu, s = step.ball_multiplier, step.multipliers, step.s
    radius = (2 * problem.delta) ** 0.5
    g_size = (problem.g @ torch.linalg.solve(problem.H, problem.g)).sqrt()
    pull = problem.g + nu * (problem.H @ s) + problem.a.T @ mu
    a_sizes = ((problem.a @ torch.linalg.inv(problem.H)) * problem.a).sum(dim=1).clamp(min=0).sqrt()
    weight = g_size + nu * radius + (mu * a_sizes).sum()
    assert (pull @ torch.linalg.solve(problem.H, pull)).clamp(min=0).sqrt() <= 1e-7 * weight
    assert nu >= 0
    assert (mu >= 0).all()
    gap = (s @ problem.H @ s / radius**2 - 1).item()
    assert gap <= 1e-9
    assert abs(nu * radius * gap) <= 1e-6 * weight
    # a constraint that pulls is met exactly, to rounding of the larger of its terms
    assert (mu * step.constraint_values).abs().sum() <= 1e-6 * weight * radius
    assert step.kl_model == pytest.approx((s @ problem.H @ s / 2).item(), rel=1e-8, abs=1e-300)


@given(problems(max_log_condition=4, dtypes=DTYPES), st.integers(0, 6), st.floats(-3, 1))
def test_the_ball_and_the_account_hold_however_inexact_the_solves(problem, max_iter, log_damping):
    """Also in float32, after no iteration at all, and with damping."""
    damping = problem.system.scale * 10**log_damping
    step = problem.step(max_iter=max_iter, rtol=1e-3, damping=damping)
    s, eps = step.s.double(), problem.system.eps
    kl = (0.5 * s @ problem.H @ s).item()
    slack = 1e3 * eps * problem.system.condition + 1e-9  # the metric is known to its products
    assert kl <= problem.delta * (1 + slack)
    assert step.kl_model <= problem.delta
    # s'Hs - damping s's cancels where the damping is large
    total = kl + 0.5 * damping * (s @ s).item()
    assert abs(step.kl_model - kl) <= slack * total + 1e-300
    values = problem.b + problem.a.double() @ s
    room = 1e-12 * (problem.b.abs() + problem.extents(step))
    assert ((step.constraint_values - values).abs() <= room).all()
    assert step.feasible or (step.constraint_values > 0).any()
    if step.feasible:
        room = 8 * eps * (problem.b.abs() + problem.extents(step))
        assert (values <= room + 1e-13 * problem.reaches()).all()  # below that, no offset counts
    assert step.predicted_reduction == pytest.approx(
        -(problem.g.double() @ s).item(), rel=1e-9, abs=1e-9 * (problem.g.norm() * s.norm()).item()
    )
    if step.status is Status.CONVERGED:
        assert step.feasible


@given(problems(max_m=1, kinds=["random"], max_log_condition=3))
def test_for_one_constraint_it_is_the_dual_of_constrained_policy_optimisation(problem):
    assume(len(problem.g) > 1)
    part = problem.b[0] ** 2 / (
        2 * problem.delta * problem.a[0] @ torch.linalg.solve(problem.H, problem.a[0])
    )
    assume(abs(part - 1) > 1e-6)  # at one, a single point is feasible and the dual has no solution
    s, nu, mu = oracles.cpo_dual(
        problem.H, problem.g, problem.a[0], problem.b[0].item(), problem.delta
    )
    step = problem.step()
    radius = (2 * problem.delta) ** 0.5
    gap = step.s - s
    assert (gap @ problem.H @ gap).sqrt() <= 1e-6 * radius
    if step.status is Status.INFEASIBLE:
        assert problem.b[0] > 0
        assert step.kl_model == pytest.approx(problem.delta)
    else:
        assert step.ball_multiplier == pytest.approx(nu, rel=1e-5)
        size = (problem.g @ torch.linalg.solve(problem.H, problem.g)).sqrt().item()
        unit = (problem.a[0] @ torch.linalg.solve(problem.H, problem.a[0])).sqrt().item()
        assert abs(step.multipliers.item() - mu) * unit <= 1e-5 * size


@given(problems(dtypes=DTYPES))
def test_without_an_active_constraint_it_is_the_step_to_the_edge(problem):
    step = problem.step(b=problem.b - 3 * problem.reaches())
    solution = cg(problem.system.A, -problem.g, rtol=1e-11, max_iter=1000)
    plain = kl_ball_step(
        solution.x, problem.g, problem.delta, damped_curvature=solution.curvature, damping=0.0
    )
    # the metric is known to its products; at the optimum the step is off by the root of the value
    slack = 100 * problem.system.eps * problem.system.condition + 1e-10
    assert step.predicted_reduction == pytest.approx(plain.predicted_reduction, rel=slack)
    gap = step.s.double() - plain.s.double()
    assert (gap @ problem.H @ gap).sqrt() <= (2 * problem.delta * slack) ** 0.5
    assert (step.multipliers == 0).all()
    assert step.kl_model == pytest.approx(problem.delta)


@given(problems(), st.integers(-30, 30), st.integers(-30, 30))
def test_the_scale_of_objective_and_constraints_does_not_matter(problem, g_power, a_power):
    """Exactly, for powers of two."""
    step = problem.step()
    scaled = problem.step(g=2.0**g_power * problem.g)
    assert torch.equal(scaled.s, step.s)
    assert scaled.ball_multiplier == 2.0**g_power * step.ball_multiplier
    assert torch.equal(scaled.multipliers, 2.0**g_power * step.multipliers)
    scaled = problem.step(a=2.0**a_power * problem.a, b=2.0**a_power * problem.b)
    assert torch.equal(scaled.s, step.s)
    assert torch.equal(scaled.multipliers * 2.0**a_power, step.multipliers)


@given(problems(), st.integers(-30, 30))
def test_the_scale_of_metric_and_radius_does_not_matter(problem, power):
    factor = 4.0**power
    step = problem.step()
    scaled = problem.step(A=problem.system.A * factor, delta=problem.delta * factor)
    assert torch.equal(scaled.s, step.s)
    assert scaled.ball_multiplier * factor == step.ball_multiplier


@given(problems(kinds=["random"], max_log_condition=2), st.randoms())
def test_the_order_of_the_constraints_does_not_matter(problem, random):
    order = list(range(len(problem.b)))
    random.shuffle(order)
    step, other = problem.step(), problem.step(a=problem.a[order], b=problem.b[order])
    assert step.status is other.status
    gap = step.s - other.s
    # the recovery of contradictory constraints is good to the root of eps
    assert (gap @ problem.H @ gap).sqrt() <= 1e-6 * (2 * problem.delta) ** 0.5


@given(problems(kinds=["random"], max_log_condition=2), st.integers(0, 2**31))
def test_a_change_of_variables_does_not_matter(problem, seed):
    """s = T u has the metric T'HT and the gradients T'g, T'a."""
    n = len(problem.g)
    T = torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).double()
    T = torch.linalg.qr(T).Q * torch.logspace(-1, 1, n, dtype=torch.float64)
    H = T.T @ problem.H @ T
    other = problem.step(A=(H + H.T) / 2, g=T.T @ problem.g, a=problem.a @ T)
    step = problem.step()
    assume(Status.MAX_ITER not in (step.status, other.status))
    gap = step.s - T @ other.s
    assert (gap @ problem.H @ gap).sqrt() <= 1e-6 * (2 * problem.delta) ** 0.5


@given(problems(offsets=(0.2, 3.0)))
def test_an_infeasible_step_reduces_the_violation(problem):
    step = problem.step()
    assume(step.status is Status.INFEASIBLE)
    assert not step.feasible
    sizes = ((problem.a @ torch.linalg.inv(problem.H)) * problem.a).sum(dim=1).clamp(min=0).sqrt()
    live = sizes > 0
    before = (problem.b[live] / sizes[live]).clamp(min=0)
    after = (step.constraint_values[live] / sizes[live]).clamp(min=0)
    radius = (2 * problem.delta) ** 0.5
    assert (after**2).sum().sqrt() <= (before**2).sum().sqrt() + 1e-7 * radius
    assert (step.multipliers == 0).all()
    assert step.ball_multiplier == 0


F, e1, e2 = torch.eye(2, dtype=torch.float64), *torch.eye(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("g", "delta", "a", "b", "s", "nu", "mu", "status"),
    [
        # inactive; active at a corner of the half-plane and the circle; the half-plane alone
        (e1, 0.5, e2, -0.5, -e1, 1.0, [0.0], Status.CONVERGED),
        (e1 + e2, 0.5, -e1, -0.6, -0.6 * e1 - 0.8 * e2, 1.25, [0.25], Status.CONVERGED),
        (e1, 0.5, -e1, -0.5, -0.5 * e1, 0.0, [1.0], Status.CONVERGED),
        # violated at zero, and the objective against its repair
        (e1, 0.5, -e1, 0.5, 0.5 * e1, 0.0, [1.0], Status.CONVERGED),
        (e1, 0.5, -3 * e1, 1.5, 0.5 * e1, 0.0, [1 / 3], Status.CONVERGED),
        # too far for the ball: to its edge
        (e1, 0.5, -e2, 2.0, e2, 0.0, [0.0], Status.INFEASIBLE),
        # a single feasible point
        (e1, 0.5, -e2, 1.0, e2, math.inf, [math.inf], Status.CONVERGED),
        # contradictions: in the middle; what can be met is met, with what is left of the ball
        (e1, 0.5, torch.stack([e2, -e2]), [0.5, 0.25], -0.125 * e2, 0.0, [0, 0], Status.INFEASIBLE),
        (e1, 0.5, torch.stack([e2, -e2]), [9.0, 3.0], -e2, 0.0, [0, 0], Status.INFEASIBLE),
        # no objective: stay, or the shortest repair
        (0 * e1, 0.5, e1, -0.5, 0 * e1, 0.0, [0.0], Status.CONVERGED),
        (0 * e1, 0.5, e1, 0.5, -0.5 * e1, 0.0, [0.0], Status.CONVERGED),
        # no gradient of the constraint
        (e1, 0.5, 0 * e1, -0.5, -e1, 1.0, [0.0], Status.CONVERGED),
        (e1, 0.5, 0 * e1, 0.0, -e1, 1.0, [0.0], Status.CONVERGED),
        (e1, 0.5, 0 * e1, 0.5, 0 * e1, 0.0, [0.0], Status.INFEASIBLE),
        (e1, 0.5, 0 * e1, 1e-30, 0 * e1, 0.0, [0.0], Status.INFEASIBLE),
        (e1, 0.5, torch.stack([0 * e1, e2]), [1.0, 0.5], -0.5 * e2, 0.0, [0, 0], Status.INFEASIBLE),
    ],
)
def test_cases_by_hand(g, delta, a, b, s, nu, mu, status):
    b = torch.tensor(b) if isinstance(b, list) else b
    step = constrained_kl_ball_step(F, g, delta, a, b)
    assert step.status is status
    torch.testing.assert_close(step.s, s, rtol=1e-7, atol=1e-7)  # contradictions: to root eps
    assert step.ball_multiplier == pytest.approx(nu)
    assert step.multipliers.tolist() == pytest.approx(mu)
    assert step.feasible is (status is Status.CONVERGED)


@given(problems(max_m=3), st.integers(1, 5))
def test_products_are_counted(problem, max_iter):
    A = Counting(problem.system.A)
    step = problem.step(A=A, max_iter=max_iter)
    assert step.products == A.products
    V = torch.cat([problem.g.unsqueeze(0), problem.a])
    units = torch.stack([v / 2.0 ** math.frexp(v.abs().max().item())[1] for v in V])
    solution = cg(problem.system.A, units.T, rtol=1e-11, max_iter=max_iter)
    assert step.products == solution.products + int(V.any(dim=1).sum())
    assert step.iterations == solution.iterations


def test_a_preconditioner_is_used():
    A = torch.diag(torch.logspace(0, 6, 30, dtype=torch.float64))
    g, a = torch.ones(30, dtype=torch.float64), torch.linspace(-1, 1, 30, dtype=torch.float64)
    plain = constrained_kl_ball_step(A, g, 0.1, a, 0.01, rtol=1e-10)
    quick = constrained_kl_ball_step(A, g, 0.1, a, 0.01, rtol=1e-10, M=torch.diag(1 / A.diagonal()))
    assert quick.iterations <= 2 < plain.iterations
    torch.testing.assert_close(quick.s, plain.s, rtol=1e-6, atol=1e-9)


def test_the_rounding_of_a_basis_of_long_vectors_is_corrected():
    """At condition 1e6 it is 280 eps of |a| |s| without a correction."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        Q, a, g = (torch.randn(k, 5, generator=generator).double() for k in (5, 3, 1))
        Q = torch.linalg.qr(Q).Q
        H = Q @ torch.diag(torch.logspace(-6, 0, 5, dtype=torch.float64)) @ Q.T
        step = constrained_kl_ball_step((H + H.T) / 2, g[0], 0.1, a, torch.zeros(3), rtol=1e-8)
        assert step.status is Status.CONVERGED
        rounding = torch.finfo(torch.float64).eps * a.norm(dim=1) * step.s.norm()
        assert (step.constraint_values <= rounding).all()


def test_directions_of_very_different_curvature_are_all_seen():
    A = torch.diag(torch.tensor([1e-12, 1.0]).double())
    step = constrained_kl_ball_step(A, e2, 0.5, e1, 5e5)  # the ball reaches 1e6 along e1
    assert step.status is Status.CONVERGED
    assert step.s.tolist() == pytest.approx([-5e5, -(0.75**0.5)])


def test_a_wedge_that_rounding_cannot_resolve_is_named():
    """The minimiser is the tip of a wedge of 1e-9, here at zero."""
    a = torch.tensor([[-1.0, -1e-9], [1.0, -1e-9]]).double()
    step = constrained_kl_ball_step(F, e2, 0.5, a, torch.zeros(2))
    assert step.status is Status.STAGNATED
    assert step.feasible


def test_solves_that_did_not_converge_are_named_and_the_step_is_still_feasible():
    A = torch.diag(torch.logspace(0, 3, 20, dtype=torch.float64))
    g, a = torch.ones(20, dtype=torch.float64), torch.linspace(-1, 1, 20, dtype=torch.float64)
    step = constrained_kl_ball_step(A, g, 0.1, a, 0.1, max_iter=3)
    assert step.status is Status.MAX_ITER
    assert step.feasible
    assert step.constraint_values.item() == pytest.approx(0.1 + (a @ step.s).item(), abs=1e-12)
    assert (0.5 * step.s @ A @ step.s).item() == pytest.approx(0.1, rel=1e-9)
    assert (
        0
        < step.predicted_reduction
        < constrained_kl_ball_step(A, g, 0.1, a, 0.1, rtol=1e-10).predicted_reduction
    )


def test_without_an_iteration_there_is_no_step():
    step = constrained_kl_ball_step(F, e1, 0.5, e2, -0.5, max_iter=0)
    assert (step.status, step.feasible, step.products) == (Status.MAX_ITER, True, 0)
    assert torch.equal(step.s, 0 * e1)


def test_a_direction_that_the_metric_does_not_see_is_named():
    step = constrained_kl_ball_step(
        torch.diag(torch.tensor([1.0, 0.0])),
        torch.ones(2),
        0.1,
        torch.eye(2),
        torch.tensor([-1.0, -1.0]),
    )
    assert step.status is Status.ZERO_CURVATURE
    assert step.s.isfinite().all()


@pytest.mark.parametrize("seed", range(8))
def test_a_constraint_that_no_step_in_the_span_changes_does_not_hold_it_back(seed):
    """What is left of a'x is rounding, and has no sign."""
    Q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))).Q
    g, a = torch.linalg.qr(Q.double()).Q.T[:2]
    step = constrained_kl_ball_step(torch.outer(g, g), g, 0.5, a, 0.0, max_iter=1)
    assert step.kl_model == pytest.approx(0.5)
    torch.testing.assert_close(step.s, -g)


def test_an_operator_that_is_another_one_later_is_not_trusted():
    calls = 0

    def fickle(v):
        nonlocal calls
        calls += 1
        return v if calls <= 2 else -v

    step = constrained_kl_ball_step(fickle, e1, 0.1, e2, -1.0)
    assert step.status is Status.ZERO_CURVATURE
    assert torch.equal(step.s, 0 * e1)


def test_steps_beyond_the_range_of_the_dtype_are_named():
    g, a = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    large = constrained_kl_ball_step(torch.eye(2) * 1e-30, g, 1e60, a, -1.0)
    assert large.status is Status.NONFINITE_OPERATOR
    assert torch.equal(large.s, torch.zeros(2))
    small = constrained_kl_ball_step(torch.eye(2) * 1e30, g, 1e-70, a, 1e-51)
    assert small.status is Status.STAGNATED  # the repair that there is underflows
    assert torch.equal(small.s, torch.zeros(2))
    assert not small.feasible


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["g", "a", "b"])
def test_input_that_is_not_finite_gives_no_step(where, bad):
    given = {"g": e1 + e2, "a": e1 - e2, "b": torch.zeros(1, dtype=torch.float64)}
    given[where] = given[where].clone()
    given[where][0] = bad
    step = constrained_kl_ball_step(F, given["g"], 0.1, given["a"], given["b"])
    assert step.status is Status.NONFINITE_INPUT
    assert torch.equal(step.s, 0 * e1)
    assert not step.constraint_values.isnan().any()
    assert (step.predicted_reduction, step.kl_model, step.products) == (0.0, 0.0, 0)


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6])  # the last two make the metric of the span
def test_products_that_are_not_finite_give_no_step(at):
    calls = 0

    def poisoned(v):
        nonlocal calls
        calls += 1
        return v * torch.tensor([1.0, math.nan if calls == at else 2.0], dtype=v.dtype)

    step = constrained_kl_ball_step(poisoned, e1 + e2, 0.1, e1 - 2 * e2, 0.0)
    assert calls >= at
    assert step.status is Status.NONFINITE_OPERATOR
    assert torch.equal(step.s, 0 * e1)


extremes = st.sampled_from([0.0, 1.0, -1.0, 1e-300, 1e300, -1e-160, 1e160, 1e-38, 3.0, math.nan])


@given(
    st.lists(extremes, min_size=9, max_size=9),
    st.lists(extremes, min_size=9, max_size=9),
    st.lists(extremes, min_size=2, max_size=2),
    st.sampled_from([1e-300, 1e-10, 1.0, 1e10, 1e300]),
    st.sampled_from([0.0, 1e-3, 1e300]),
    st.sampled_from(DTYPES),
)
def test_no_input_whatever_gives_a_nan_or_raises(entries, vectors, b, delta, damping, dtype):
    A = torch.tensor(entries, dtype=dtype).view(3, 3)
    g, *a = torch.tensor(vectors, dtype=dtype).view(3, 3)
    b = torch.tensor(b, dtype=torch.float64)
    step = constrained_kl_ball_step((A + A.T) / 2, g, delta, torch.stack(a), b, damping=damping)
    assert step.s.isfinite().all()
    assert not step.constraint_values.isnan().any()
    assert not step.multipliers.isnan().any()
    assert (step.multipliers >= 0).all()
    assert step.ball_multiplier >= 0
    assert 0 <= step.kl_model <= delta
    assert not math.isnan(step.predicted_reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [-100, -40, 40, 100])
def test_any_scale_of_the_parameters_will_do(power, dtype):
    """In units of 1 / u the gradients are u times and the metric u^2 times as large."""
    F, g = torch.diag(torch.tensor([1.0, 4.0, 16.0], dtype=dtype)), torch.ones(3, dtype=dtype)
    a, b = torch.tensor([1.0, -1.0, 0.5], dtype=dtype), 0.05
    plain = constrained_kl_ball_step(F, g, 0.1, a, b)
    unit = 2.0 ** (power // 2)
    scaled = constrained_kl_ball_step(F * unit**2, g * unit, 0.1, a * unit, b)
    assert torch.equal(scaled.s * unit, plain.s)
    assert scaled.status is plain.status is Status.CONVERGED


def test_the_inputs_are_not_written_to_and_the_step_has_their_dtype():
    g, a, b = torch.ones(2), torch.tensor([[1.0, -1.0]]), torch.tensor([0.01])
    step = constrained_kl_ball_step(torch.eye(2), g, 0.1, a, b)
    assert step.s.dtype is torch.float32
    assert torch.equal(g, torch.ones(2))
    assert torch.equal(a, torch.tensor([[1.0, -1.0]]))
    assert torch.equal(b, torch.tensor([0.01]))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"g": [1.0, 2.0]}, TypeError, "g must be a float32 or float64 tensor, got list"),
        ({"g": torch.ones(2, 2)}, ValueError, "g must be a vector"),
        ({"a": [1.0, 2.0]}, TypeError, "a must be a float32 or float64 tensor, got list"),
        ({"a": torch.ones(2, dtype=torch.int64)}, TypeError, "int64"),
        ({"a": torch.ones(3)}, ValueError, r"shape \(m, 2\) and dtype torch.float32"),
        ({"a": torch.ones(2).double()}, ValueError, "dtype torch.float64"),
        ({"a": torch.ones(1, 1, 2)}, ValueError, r"got shape \(1, 1, 2\)"),
        ({"a": torch.ones(0, 2), "b": torch.ones(0)}, ValueError, "no constraint"),
        ({"b": torch.ones(2)}, ValueError, "each of 1 rows of a, got 2"),
        ({"a": torch.ones(2, 2)}, ValueError, "each of 2 rows of a, got 1"),
        ({"delta": 0.0}, ValueError, "delta must be a positive finite number, got 0.0"),
        ({"delta": -1.0}, ValueError, "delta must"),
        ({"delta": math.nan}, ValueError, "delta must"),
        ({"damping": -1.0}, ValueError, "damping must be finite and not negative, got -1.0"),
        ({"damping": math.nan}, ValueError, "damping must"),
        ({"rtol": -1.0}, ValueError, "rtol"),
        ({"A": torch.eye(3)}, ValueError, "does not fit"),
        ({"A": "F"}, TypeError, "got str"),
        ({"M": torch.eye(3)}, ValueError, "does not fit"),
    ],
)
def test_wrong_constrained_arguments_are_refused_in_words(changes, error, words):
    given = {"A": torch.eye(2), "g": torch.ones(2), "delta": 0.1, "a": torch.ones(2), "b": 0.0}
    given |= changes
    positional = [given.pop(name) for name in ("A", "g", "delta", "a", "b")]
    with pytest.raises(error, match=words):
        constrained_kl_ball_step(*positional, **given)
