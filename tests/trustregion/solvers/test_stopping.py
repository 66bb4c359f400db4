"""Stopping rules against their papers' definitions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustregion.solvers import eisenstat_walker, forcing_sequence
from trustregion.solvers.stopping import Progress


def test_martens_rule_on_a_known_sequence():
    """phi_i = -(1 - 0.9^i): the progress over the last k falls below k eps at a known i."""
    rule, values = Progress(5e-3), [0.0]
    for i in range(1, 200):
        values.append(-(1 - 0.9**i))
        k = max(10, math.ceil(i / 10))
        expected = i > k and (values[i] - values[i - k]) / values[i] < k * 5e-3
        assert rule.satisfied(values[i]) == expected
        if expected:
            break
    # 0.9^(i - 10) - 0.9^i < 0.05 (1 - 0.9^i) first at i = 35
    assert i == 35


def test_martens_rule_applies_from_the_eleventh_iterate():
    """i > k with k = 10, also where nothing moves."""
    rule = Progress(5e-4, start=-1.0)
    assert [rule.satisfied(-1.0) for _ in range(11)] == [False] * 10 + [True]


def test_martens_rule_needs_a_model_below_zero():
    rule = Progress(0.5, start=10.0)
    assert not any(rule.satisfied(10.0) for _ in range(50))


@given(st.floats(1e-12, 1e6), st.floats(1e-12, 1e6), st.floats(0.01, 0.99), st.floats(0.01, 1))
def test_a_forcing_sequence_is_monotone_and_below_kappa(small, large, kappa, theta):
    rule = forcing_sequence(kappa, theta)
    small, large = sorted((small, large))
    assert 0 < rule(small) <= rule(large) <= kappa
    assert rule(1.0) == kappa


@given(st.floats(1e-6, 10), st.floats(1e-6, 10), st.floats(0, 0.9))
def test_eisenstat_walker_is_in_range_and_scale_free(size, previous, rtol):
    eta = eisenstat_walker(size, previous, rtol)
    assert 0 <= eta <= 0.9
    assert eisenstat_walker(4 * size, 4 * previous, rtol) == eta
    assert eisenstat_walker(size / 2, previous, rtol) <= eta


def test_eisenstat_walker_does_not_fall_faster_than_its_safeguard():
    assert eisenstat_walker(1e-6, 1.0, 0.8, alpha=2.0) == pytest.approx(0.9 * 0.64)
    assert eisenstat_walker(1e-6, 1.0, 0.1, alpha=2.0) == pytest.approx(0.9e-12)  # below 0.1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: forcing_sequence(0.0), "kappa"),
        (lambda: forcing_sequence(1.0), "kappa"),
        (lambda: forcing_sequence(0.5, 0.0), "theta"),
        (lambda: forcing_sequence(0.5, 1.5), "theta"),
        (lambda: eisenstat_walker(1.0, 0.0, 0.1), "previous"),
        (lambda: eisenstat_walker(math.nan, 1.0, 0.1), "nan"),
    ],
)
def test_wrong_arguments_are_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()
