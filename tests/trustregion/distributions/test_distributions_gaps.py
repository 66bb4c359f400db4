"""Gaps of convex functions above their tangents, to all digits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from trustregion.distributions import gaps

signs = st.sampled_from([-1.0, 1.0])


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


@given(st.floats(-12, 1), signs)
def test_the_gap_of_the_logarithm_has_all_its_digits(log_size, sign):
    t = max(sign * 10**log_size, -0.9)
    got = gaps.log_gap(tensor(t), 1 + tensor(t)).item()
    # 1e-13: the rounding of the ratio far from 1, relative to t^2/2 at 1/8
    assert got == pytest.approx(oracles.exact_log_gap(t), rel=1e-13, abs=0)


@given(st.floats(-12, 1.5), signs)
def test_the_gap_of_the_exponential_has_all_its_digits(log_size, sign):
    x = sign * 10**log_size
    got = gaps.exp_gap(tensor(x)).item()
    # 1e-13: the difference at 1/64
    assert got == pytest.approx(oracles.exact_exp_gap(x), rel=1e-13, abs=0)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_gaps_where_their_series_end(sign):
    for t in (0.1, 0.12, 0.1249):
        got = gaps.log_gap(tensor(sign * t), 1 + tensor(sign * t)).item()
        assert got == pytest.approx(oracles.exact_log_gap(sign * t), rel=2e-15, abs=0)
    for x in (0.015, 0.0155, 0.0156):
        got = gaps.exp_gap(tensor(sign * x)).item()
        assert got == pytest.approx(oracles.exact_exp_gap(sign * x), rel=1e-15, abs=0)
    for x in (0.0157, 0.016, 0.017, 0.018, 0.019):  # eps / x of the difference
        got = gaps.exp_gap(tensor(sign * x)).item()
        assert got == pytest.approx(oracles.exact_exp_gap(sign * x), rel=3e-14, abs=0)


@given(st.floats(-3, 6), st.floats(-10, 0), signs)
def test_the_gap_of_lgamma_has_all_its_digits(log_x, log_size, sign):
    x0 = 10**log_x
    x1 = x0 * (1 + sign * 0.9 * 10**log_size)
    got = gaps.stirling_gap(tensor(x0), tensor(x1), tensor(x1 - x0)).item()
    # 1e-13: ten terms of the recurrence that cancel to a tenth
    assert got == pytest.approx(oracles.exact_stirling_gap(x0, x1), rel=1e-13, abs=0)


@pytest.mark.parametrize("x0", [10.0, 10.5, 12.0])
@pytest.mark.parametrize("size", [1e-6, 0.01, 0.5])
def test_stirlings_series_where_it_is_worst(x0, size):
    x1 = x0 * (1 + size)
    got = gaps.stirling_gap(tensor(x0), tensor(x1), tensor(x1 - x0)).item()
    assert got == pytest.approx(oracles.exact_stirling_gap(x0, x1), rel=5e-15, abs=0)


@given(st.floats(-3, 8))
def test_the_curvature_of_lgamma_is_that_of_the_gap(log_x):
    x, size = 10**log_x, 2.0**-20
    low, high = x * (1 - size), x * (1 + size)
    # Gaps both ways cancel the third derivative.
    both = oracles.exact_stirling_gap(low, high) + oracles.exact_stirling_gap(high, low)
    got = gaps.stirling_curvature(tensor(x)).item()
    # of the size squared, and of the rounding of the ends relative to it
    assert got * (high - low) ** 2 == pytest.approx(both, rel=5e-9)


@pytest.mark.parametrize("x", [0.001, 0.5, 1.0, 9.999, 10.0, 30.0, 1e4, 1e9])
def test_the_curvature_of_lgamma_obeys_its_recurrence(x):
    def trigamma(y):
        return gaps.stirling_curvature(tensor(y)).item() + 1 / y

    assert trigamma(x) - trigamma(x + 1) == pytest.approx(x**-2, rel=1e-14, abs=4e-16 / x)


def test_the_curvature_of_lgamma_at_known_points():
    for x, trigamma in [(1.0, math.pi**2 / 6), (0.5, math.pi**2 / 2)]:
        got = gaps.stirling_curvature(tensor(x)).item()
        assert got == pytest.approx(trigamma - 1 / x, rel=1e-14)
    shifted = math.pi**2 / 6 - math.fsum(k**-2 for k in range(1, 10)) - 0.1
    assert gaps.stirling_curvature(tensor(10.0)).item() == pytest.approx(shifted, rel=1e-13)


def test_infinities_are_infinite_and_not_nan():
    assert gaps.log_gap(tensor(math.inf), tensor(math.inf)).item() == math.inf
    assert gaps.log_gap(tensor(-1.0), tensor(0.0)).item() == math.inf
    assert gaps.exp_gap(tensor([math.inf, -math.inf, 1e3])).tolist() == [math.inf] * 3
