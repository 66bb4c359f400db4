"""The first radius is measured along a line."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustregion.solvers.radius import (
    initial_radius,
)


class Line:
    """A function along a line that counts how often and where it is asked."""

    def __init__(self, fn):
        self.fn, self.asked = fn, []

    def __call__(self, t):
        self.asked.append(t)
        return self.fn(t)


def quadratic(value, slope, curvature):
    return Line(lambda t: value + slope * t + 0.5 * curvature * t * t)


scales = st.floats(-3, 3).map(lambda e: 10.0**e)


@given(st.floats(-2, 2), scales, scales, st.floats(-6, 6).map(lambda e: 10.0**e))
def test_on_a_convex_quadratic_the_radius_reaches_the_minimiser(value, slope, curvature, ratio):
    """From any start: or as far as the trials can double."""
    line, minimiser = quadratic(value, -slope, curvature), slope / curvature
    start = ratio * minimiser
    found = initial_radius(value, -slope, curvature, line, start=start)
    assert found.agreed
    assert found.radius >= min(minimiser, start * 2**4) * (1 - 1e-12)
    assert found.radius in line.asked
    assert found.evaluations == len(line.asked) == 5


@given(st.floats(-2, 2), scales, scales)
def test_without_a_start_the_first_trial_is_the_minimiser_of_the_model(value, slope, curvature):
    line = quadratic(value, -slope, curvature)
    found = initial_radius(value, -slope, curvature, line)
    assert line.asked[0] == found.best == slope / curvature
    assert found.best_value == line.fn(found.best)


@given(st.floats(-2, 2), scales, scales)
def test_on_a_concave_quadratic_the_radius_grows(value, slope, curvature):
    line = quadratic(value, -slope, -curvature)
    found = initial_radius(value, -slope, -curvature, line)
    assert found.agreed
    assert found.radius == line.asked[-1] == found.best
    assert found.radius >= 2**4 * line.asked[0]


def test_a_model_without_curvature_starts_at_one():
    line = quadratic(0.0, -1.0, 0.0)
    initial_radius(0.0, -1.0, 0.0, line)
    assert line.asked[0] == 1.0


@given(st.floats(1e-6, 1e6), st.integers(1, 8))
def test_no_trial_goes_beyond_the_limit(largest, trials):
    line = quadratic(0.0, -1.0, 0.0)
    found = initial_radius(0.0, -1.0, 0.0, line, trials=trials, largest=largest)
    assert max(line.asked) <= largest
    assert found.radius <= largest
    assert len(line.asked) == found.evaluations <= trials
    if largest <= 1.0:  # the first trial is there already, and agrees
        assert found.evaluations == 1
        assert found.radius == largest


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_shrink_by_sixteen(bad):
    line = Line(lambda t: bad if t > 0.01 else -t)
    found = initial_radius(0.0, -1.0, 0.0, line, start=1.0)
    assert line.asked[:3] == [1.0, 1 / 16, 1 / 256]
    assert found.agreed
    assert 1 / 256 <= found.radius <= 0.01
    assert math.isfinite(found.best_value)


def test_where_no_trial_is_finite_the_radius_is_what_the_last_asked_for():
    found = initial_radius(0.0, -1.0, 0.0, lambda _: math.nan, start=1.0)
    assert not found.agreed
    assert found.radius == 16.0**-5
    assert (found.best, found.best_value, found.evaluations) == (0.0, 0.0, 5)


@given(st.floats(2, 30))
def test_a_steep_wall_shrinks_the_radius_to_where_the_model_is_good(power):
    """f = -t + t^p has the model -t, good to 0.35 for t^(p-1) up to 0.35."""
    line = Line(lambda t: -t + t**power)
    found = initial_radius(0.0, -1.0, 0.0, line, start=3.0)
    assert found.agreed
    assert found.radius ** (power - 1) <= 0.35 * (1 + 1e-12)


def test_an_interpolated_trial_meets_its_target():
    """Of a cubic the parabola is near enough: f = -t + t^2 with the model -t, from t = 0.8.

    The ratio is 1 - t, poor at 0.8; the parabola is f itself, so that the next trial has exactly
    the ratio 3/4, t = 1/4.
    """
    line = Line(lambda t: -t + t * t)
    initial_radius(0.0, -1.0, 0.0, line, start=0.8, trials=2)
    assert line.asked[1] == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize(
    ("start", "second"),
    [
        (0.10, 0.25),  # good, the parabola asks for 2.5 times
        (0.04, 0.20),  # good, 6.25 times is cut to 5
        (0.30, 0.25),  # good, but the ratio is below its target: wait for it
        (0.40, 0.25),  # fair, 0.625 times
        (0.48, 0.25),  # fair, 0.52 times
        (5.00, 5 / 16),  # poor, 1/20 is cut to 1/16
    ],
)
def test_each_grade_of_agreement_keeps_to_its_factors(start, second):
    line = Line(lambda t: -t + t * t)  # the ratio is 1 - t, its target 3/4
    initial_radius(0.0, -1.0, 0.0, line, start=start, trials=2)
    expected = 2 * start if start == 0.30 else second
    assert line.asked[1] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("curvature", "factor"), [(1.4, 2.0), (-4.0, 0.5), (1.0, 0.25 / 0.35)])
def test_fair_agreement_at_least_halves_and_at_most_doubles(curvature, factor):
    """At t = 1 the model falls by 1 - curvature / 2, the function by 45% less.

    The ratios 3/4 and 5/4 are at 1/4 over 1/4 + 0.2 p and over 1/4 - 0.7 p, the larger of the two
    is 6.25, 0.29 and, where the second is negative, 1/4 over 0.35.
    """
    predicted = 1 - curvature / 2
    line = Line(lambda _: -0.55 * predicted)
    initial_radius(0.0, -1.0, curvature, line, start=1.0, trials=2)
    assert line.asked[1] == pytest.approx(factor, rel=1e-12)


@given(st.integers(-60, 60), st.integers(-60, 60), st.floats(0.1, 10))
def test_the_units_of_loss_and_parameters_do_not_matter(f_power, t_power, start):
    f_unit, t_unit = 2.0**f_power, 2.0**t_power

    def f(t):
        return 1 - t + t * t / 3 + t**3

    plain = initial_radius(1.0, -1.0, 2 / 3, f, start=start)
    scaled = initial_radius(
        f_unit,
        -f_unit / t_unit,
        2 / 3 * f_unit / t_unit / t_unit,
        lambda t: f_unit * f(t / t_unit),
        start=start * t_unit,
    )
    assert scaled.radius == plain.radius * t_unit
    assert scaled.best_value == plain.best_value * f_unit


def test_agreement_at_rounding_level_is_agreement():
    """At a start so small that the loss does not move, both reductions are rounding."""
    line = Line(lambda _: 1.0 + 1e-16)
    found = initial_radius(1.0, -1.0, 1.0, line, start=1e-17, trials=1)
    assert found.agreed
    assert found.radius == 1e-17


values = st.floats(-1e300, 1e300)


@given(
    values,
    st.floats(5e-324, 1e300),
    values,
    st.lists(st.floats(), min_size=5, max_size=5),
    st.one_of(st.none(), st.floats(5e-324, 1e300)),
)
def test_the_first_radius_is_positive_and_finite_whatever_the_function(
    value, descent, curvature, trials, start
):
    answers = iter(trials)
    found = initial_radius(value, -descent, curvature, lambda _: next(answers), start=start)
    assert 0 < found.radius < math.inf
    assert found.best_value <= value
    assert (found.best == 0) == (found.best_value == value)


@pytest.mark.parametrize(
    ("line", "options", "words"),
    [
        ((math.nan, -1.0, 1.0), {}, "value and curvature must be finite, got value=nan"),
        ((0.0, -1.0, math.inf), {}, "curvature=inf"),
        ((0.0, 0.0, 1.0), {}, "slope must be finite and negative"),
        ((0.0, 1.0, 1.0), {}, "slope must"),
        ((0.0, -math.inf, 1.0), {}, "slope must"),
        ((0.0, math.nan, 1.0), {}, "slope must"),
        ((0.0, -1.0, 1.0), {"start": 0.0}, "start must be a positive finite number, got 0.0"),
        ((0.0, -1.0, 1.0), {"start": math.inf}, "start must"),
        ((0.0, -1.0, 1.0), {"start": math.nan}, "start must"),
        ((0.0, -1.0, 1.0), {"trials": 0}, "trials must"),
        ((0.0, -1.0, 1.0), {"trials": 2.5}, "trials must"),
        ((0.0, -1.0, 1.0), {"largest": -1.0}, "largest must"),
    ],
)
def test_a_line_that_makes_no_sense_is_refused_in_words(line, options, words):
    with pytest.raises(ValueError, match=words):
        initial_radius(*line, lambda t: -t, **options)
