"""Laws of the constrained step."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize

import oracles
from constrained_cases import F, e1, e2, problems
from counting import Counting
from strategies import DTYPES
from trustregion import Status, cg, kl_ball_step
from trustregion.solvers.constrained import constrained_kl_ball_step


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
