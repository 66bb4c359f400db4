"""The trust-region subproblem in an eigenbasis, at its corners."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trustregion.solvers.secular import minimize_in_eigenbasis


def solve(theta, c, radius):
    tensors = [torch.tensor(values, dtype=torch.float64) for values in (theta, c)]
    return minimize_in_eigenbasis(*tensors, radius)


numbers = st.floats(-100, 100).map(lambda value: round(value, 3))


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8), st.floats(-6, 6))
def test_the_conditions_of_a_global_minimum(pairs, log_radius):
    radius = 10.0**log_radius
    theta = torch.tensor(sorted(t for t, _ in pairs), dtype=torch.float64)
    c = torch.tensor([value for _, value in pairs], dtype=torch.float64)
    found = minimize_in_eigenbasis(theta, c, radius)
    h, multiplier = found.h, found.multiplier
    size = c.norm() + (theta.abs().max() + multiplier) * h.norm()
    assert ((theta + multiplier) * h - c).norm() <= 1e-12 * size
    assert multiplier >= max(0.0, -theta[0].item()) * (1 - 1e-12)
    assert h.norm() <= radius * (1 + 1e-14)
    if found.on_boundary:
        assert h.norm().item() == pytest.approx(radius, rel=1e-14)
    else:
        assert multiplier == 0


def test_a_singular_consistent_system_is_solved_inside_by_the_shortest():
    found = solve([0.0, 2.0], [0.0, 4.0], 10.0)
    assert found.h.tolist() == [0.0, 2.0]
    assert (found.multiplier, found.on_boundary, found.hard_case) == (0.0, False, False)
    noise = solve([-1e-17, 2.0], [1e-17, 4.0], 10.0)  # the same, in rounding
    assert noise.h.tolist() == [0.0, 2.0]
    assert not noise.on_boundary


def test_what_counts_as_unseen_is_relative():
    for scale in (1e-200, 1.0, 1e200):
        found = solve([-2.0, 1.0], [0.0, 3.0 * scale], 2.0 * scale)
        assert found.hard_case
        assert found.h[1].item() == pytest.approx(scale)
        seen = solve([-2.0, 1.0], [1e-6 * scale, 3.0 * scale], 2.0 * scale)
        assert not seen.hard_case


@pytest.mark.parametrize("part", [1e-9, 1e-13, 1e-100, 1e-300])
def test_near_the_hard_case_no_digit_is_lost(part):
    found = solve([-3.0, 1.0], [part, 2.0], 5.0)
    assert found.multiplier == pytest.approx(3.0, rel=1e-9)
    assert found.h[1].item() == pytest.approx(0.5, rel=1e-8)
    assert found.h[0].item() == pytest.approx(math.sqrt(25 - 0.25), rel=1e-8)


def test_a_part_just_above_rounding_beside_nearly_equal_eigenvalues():
    """Three leftmost eigenvalues that differ by rounding, seen at the level of rounding."""
    theta = [-8.9e-17, -2e-20, 1.7e-16, 1.0, 1.0]
    c = [0.0, 0.0, 6e-14, -1.3, -3.2]
    found = solve(theta, c, 12.0)
    assert found.h[3:].tolist() == pytest.approx([-1.3, -3.2], rel=1e-12)


def test_what_a_twin_of_the_leftmost_sees_does_not_fill_the_ball():
    """The part is on a neighbour a rounding unit away: the rest is along the leftmost itself."""
    found = solve([-1.0, -0.9999999999999998, 1.0], [0.0, 1e-13, 1.0], 1e6)
    assert found.h.norm().item() == pytest.approx(1e6)
    assert found.multiplier == pytest.approx(1.0)
    assert found.h[2].item() == pytest.approx(0.5)
