import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustregion.solvers import BallTrial, backtracking, ball_search


@given(st.floats(0.05, 0.95), st.integers(0, 20), st.integers(0, 25))
def test_the_first_acceptable_scale_is_taken(factor, limit, first_good):
    tried = []

    def evaluate(scale):
        tried.append(scale)
        return len(tried) - 1

    search = backtracking(
        evaluate, lambda trial: trial >= first_good, factor=factor, max_backtracks=limit
    )
    stopped = min(first_good, limit)
    assert tried == [factor**j for j in range(stopped + 1)]
    assert search.accepted == (first_good <= limit)
    assert (search.trial, search.backtracks) == (stopped, stopped)
    assert search.scale == pytest.approx(factor**stopped)


# -- the search for the edge of a ball


class Valley:
    """A KL ``(a / edge)^power`` and a value ``-slope a + curve a^2``, counted."""

    def __init__(self, edge=1.0, power=2.0, slope=1.0, curve=0.0):
        self.edge, self.power, self.slope, self.curve = edge, power, slope, curve
        self.tried = []

    def __call__(self, scale):
        self.tried.append(scale)
        value = -self.slope * scale + self.curve * scale**2
        return BallTrial(value=value, size=(scale / self.edge) ** self.power)


@given(st.floats(0.3, 3.5), st.floats(1.2, 5), st.floats(1e-3, 1e3))
def test_the_edge_is_reached_within_three_trials_where_the_loss_allows_it(edge, power, slope):
    valley = Valley(edge, power, slope)
    search = ball_search(valley, 0.0, slope, factor=0.7, max_backtracks=30)
    assert search.accepted
    assert search.evaluations == len(valley.tried) <= 3
    assert 0.9 <= search.trial.size <= 1


@given(
    st.floats(1e-3, 20),
    st.floats(0.5, 6),
    st.floats(0, 300),
    st.floats(0.1, 0.9),
    st.integers(0, 12),
    st.floats(0, 1),
)
def test_the_best_acceptable_trial_is_returned(edge, power, curve, factor, limit, goal):
    valley, trials = Valley(edge, power, curve=curve), {}

    def evaluate(scale):
        trials[scale] = valley(scale)
        return trials[scale]

    search = ball_search(evaluate, 0.0, 1.0, factor=factor, max_backtracks=limit, goal=goal)
    assert len(trials) == len(valley.tried) == search.evaluations <= limit + 1  # none twice
    good = [t for t in trials.values() if t.size <= 1 and t.value < 0]
    assert search.accepted == bool(good)
    assert trials[search.scale] is search.trial
    if good:
        assert search.trial.value == min(t.value for t in good)
        first = next(i for i, t in enumerate(trials.values()) if t in good)
        assert search.backtracks == first
    else:
        assert search.scale == valley.tried[-1]
        assert search.backtracks == search.evaluations


@given(st.floats(2, 1e4), st.floats(0.2, 0.9))
def test_the_minimum_of_a_parabola_is_found_by_interpolation(curve, factor):
    valley = Valley(
        edge=100.0, curve=curve
    )  # lowest at 1 / (2 curve), lower than 0 below 1 / curve
    search = ball_search(valley, 0.0, 1.0, factor=factor, max_backtracks=30, goal=0.0)
    assert search.accepted
    assert search.evaluations <= 2 + math.log(2 * curve) / math.log(10)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_trials_that_are_not_finite_are_followed_by_shorter_ones(bad):
    def evaluate(scale):
        return BallTrial(value=bad if scale > 0.4 else -scale, size=scale**2)

    search = ball_search(evaluate, 0.0, 1.0, factor=0.5, max_backtracks=30, goal=0.0)
    assert (search.accepted, search.scale, search.backtracks) == (True, 0.25, 2)


def test_an_infinite_kl_is_outside_and_never_taken():
    def evaluate(scale):
        return BallTrial(value=-scale, size=math.inf if scale > 0.3 else scale)

    search = ball_search(evaluate, 0.0, 1.0, factor=0.5, max_backtracks=30)
    assert search.accepted
    assert search.trial.size <= 1


def test_a_longer_trial_is_not_made_where_the_parabola_says_that_it_is_higher():
    valley = Valley(
        edge=4.0, curve=0.45
    )  # lowest at 1.11, at the edge of the ball higher than at 1
    search = ball_search(valley, 0.0, 1.0, factor=0.5, max_backtracks=30)
    assert valley.tried == [1.0]
    assert search.scale == 1.0
