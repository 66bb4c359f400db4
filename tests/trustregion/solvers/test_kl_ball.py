"""Laws of the step to the edge of a KL ball."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies import systems
from trustregion import Status, cg, kl_ball_step


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
