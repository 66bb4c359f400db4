"""Laws of the policies that turn a ratio of reductions into the next radius or damping."""

import math
import sys

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from trustregion.solvers.radius import (
    classic_radius,
    gould_radius,
    initial_radius,
    levenberg_marquardt_damping,
    reduction_ratio,
)

radii = st.floats(-300, 300).map(lambda e: 10.0**e)
ratios = st.floats(allow_nan=False)
any_ratio = st.floats()


def classic(radius, rho, **options):
    return classic_radius(radius, rho, on_boundary=True, **options)


def gould(radius, rho, **options):
    return gould_radius(radius, rho, length=radius, **options)


def damped(radius, rho, **options):
    """The damping seen as a radius: its reciprocal."""
    return 1 / levenberg_marquardt_damping(1 / radius, rho, **options)


POLICIES = [classic, gould, damped]


# The ratio


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_two_numbers_give_their_quotient(actual, predicted):
    assert reduction_ratio(actual, predicted) == actual / predicted


@given(st.floats(-100, 100), st.floats(-100, 100), st.floats(0.01, 100))
def test_losses_give_the_quotient_of_their_difference(old, new, predicted):
    expected = pytest.approx((old - new) / predicted)
    assert reduction_ratio(old, new, predicted) == expected
    samples = torch.full((3, 2), old, dtype=torch.float64), torch.full((3, 2), new).double()
    assert reduction_ratio(*samples, predicted) == pytest.approx(
        (old - torch.tensor(new).item()) / predicted
    )


def test_the_difference_of_nearly_equal_means_does_not_cancel():
    """Large and equal losses of other samples would swamp one small true improvement."""
    old = torch.full((1000,), 1e8 / 3, dtype=torch.float64)
    old[0] = 1e-3
    new = old.clone()
    new[0] = 0.0
    assert reduction_ratio(old, new, 1e-6) == pytest.approx(1.0, rel=1e-12)
    assert (old.mean() - new.mean()).item() != pytest.approx(1e-6, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [2.0**-100, 1.0, 2.0**100])
def test_reductions_at_rounding_level_agree(dtype, factor):
    eps = torch.finfo(dtype).eps
    old = torch.full((4,), factor, dtype=dtype)
    new = old * (1 + 4 * eps)  # the loss rose, by rounding
    assert reduction_ratio(old, new, 5 * eps * factor) == 1.0
    assert reduction_ratio(old, new, 12 * eps * factor) < 0  # the prediction is above rounding
    assert reduction_ratio(old, old * (1 + 40 * eps), 5 * eps * factor) < 0


def test_the_rounding_of_floats_is_that_of_float64():
    assert reduction_ratio(1.0, 1.0 + 1e-15, 1e-15) == 1.0
    assert reduction_ratio(1.0, 1.0 + 1e-8, 1e-8) == pytest.approx(-1.0)
    assert reduction_ratio(torch.tensor(1.0), 1.0 + 1e-7, 1e-7) == 1.0
    assert reduction_ratio(1.0 + 1e-7, torch.tensor(1.0), 1e-7) == 1.0
    assert reduction_ratio(torch.ones(1), torch.ones(1).double() + 1e-7, 1e-7) == 1.0


def test_there_is_no_rounding_at_a_loss_of_zero():
    assert reduction_ratio(0.0, 1e-300, 1e-300) == -1.0
    assert reduction_ratio(1e-17, 1e-16) == pytest.approx(0.1)  # nothing is known of the loss


@given(st.floats(), st.floats(), st.floats())
@example(math.inf, math.inf, 1.0)
@example(1.0, -math.inf, 1.0)
@example(1.0, 0.5, math.inf)
@example(1.0, 1.0, 0.0)
@example(1.0, 0.5, -1.0)
@example(sys.float_info.max, -sys.float_info.max, 1.0)
def test_a_ratio_is_never_nan_and_says_shrink_where_it_means_nothing(old, new, predicted):
    ratio = reduction_ratio(old, new, predicted)
    assert not math.isnan(ratio)
    sound = 0 < predicted < math.inf and math.isfinite(old - new)
    assert sound or ratio == -math.inf
    assert reduction_ratio(torch.tensor([old]).double(), torch.tensor([new]).double(), -1.0) < 0
    assert not math.isnan(reduction_ratio(old, predicted))


def test_one_bad_sample_says_shrink():
    old = torch.ones(3)
    assert reduction_ratio(old, torch.tensor([0.0, math.nan, 0.0]), 1.0) == -math.inf


@pytest.mark.parametrize(
    ("old", "new"), [(torch.ones(2), torch.ones(3)), (torch.ones(2), 1.0), (torch.ones(0),) * 2]
)
def test_losses_that_do_not_fit_are_refused_in_words(old, new):
    with pytest.raises(ValueError, match="one shape and not empty"):
        reduction_ratio(old, new, 1.0)


def test_losses_keep_their_graph_and_their_values():
    old = torch.ones(2, requires_grad=True)
    assert reduction_ratio(old, old * 0.5, 0.5) == 1.0
    assert torch.equal(old.detach(), torch.ones(2))


# The policies


@pytest.mark.parametrize("policy", POLICIES)
@given(radius=radii, rhos=st.tuples(ratios, ratios))
def test_a_better_ratio_never_gives_a_smaller_radius(policy, radius, rhos):
    low, high = sorted(rhos)
    assert policy(radius, low) <= policy(radius, high)


@pytest.mark.parametrize("policy", POLICIES)
@given(radius=radii)
def test_a_ratio_that_means_nothing_shrinks(policy, radius):
    assert policy(radius, math.nan) == policy(radius, -math.inf) < radius


@pytest.mark.parametrize("rho", [math.nan, -math.inf, 1.0, math.inf])
@pytest.mark.parametrize("policy", [classic, gould])
@given(radius=st.floats(5e-324, sys.float_info.max))
@example(radius=5e-324)
@example(radius=sys.float_info.max)
def test_the_radius_stays_positive_and_finite(policy, radius, rho):
    for _ in range(3):
        radius = policy(radius, rho)
        assert 0 < radius < math.inf


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_the_damping_stays_positive_and_finite(rho):
    for damping in (5e-324, 1e-300, 1.0, 1e300, sys.float_info.max):
        for _ in range(10):
            damping = levenberg_marquardt_damping(damping, rho)
        assert 0 < damping < math.inf


@pytest.mark.parametrize("policy", POLICIES)
@given(
    radius=st.floats(-200, 200).map(lambda e: 10.0**e), rho=any_ratio, power=st.integers(-90, 90)
)
def test_the_unit_of_the_radius_does_not_matter(policy, radius, rho, power):
    factor = 2.0**power
    assert policy(radius * factor, rho) == pytest.approx(policy(radius, rho) * factor, rel=1e-14)


@given(radii, any_ratio, st.booleans(), radii)
def test_the_classic_rule(radius, rho, on_boundary, largest):
    expected = radius
    if rho < 0.25 or math.isnan(rho):
        expected = radius / 4
    elif rho > 0.75 and on_boundary:
        expected = 2 * radius
    assert classic_radius(radius, rho, on_boundary=on_boundary) == expected
    bounded = classic_radius(radius, rho, on_boundary=on_boundary, largest=largest)
    assert bounded == min(expected, largest)


@pytest.mark.parametrize(("rho", "factor"), [(0.25, 1), (0.2499, 0.25), (0.75, 1), (0.7501, 2)])
def test_the_thresholds_of_the_classic_rule_belong_to_the_middle(rho, factor):
    assert classic(3.0, rho) == 3.0 * factor


@given(radii, any_ratio, st.floats(0, 1), radii)
def test_the_rule_of_gould_and_others(radius, rho, fraction, largest):
    length = fraction * radius
    assume(length > 0)
    expected = radius
    if rho < 0.01 or math.isnan(rho):
        expected = length / 4 or 5e-324
    elif rho > 0.99:
        expected = max(3.5 * length, radius)
    assert gould_radius(radius, rho, length=length) == expected
    assert gould_radius(radius, rho, length=length, largest=largest) == min(expected, largest)


@pytest.mark.parametrize(("rho", "factor"), [(0.01, 1), (0.0099, 0.25), (0.99, 1), (0.991, 3.5)])
def test_the_thresholds_of_gould_and_others(rho, factor):
    assert gould(2.0, rho) == 2.0 * factor


@pytest.mark.parametrize("length", [0.0, 1.5])
def test_a_length_that_says_nothing_is_not_used_to_shrink(length):
    assert gould_radius(1.0, 0.0, length=length) == 0.25


@pytest.mark.parametrize(
    ("rho", "factor"),
    [(math.nan, 1.5), (0.2, 1.5), (0.25, 1.0), (0.75, 1.0), (0.8, 2 / 3), (math.inf, 2 / 3)],
)
def test_the_rule_of_levenberg_and_marquardt(rho, factor):
    assert levenberg_marquardt_damping(6.0, rho) == pytest.approx(6.0 * factor, rel=1e-15)
    assert levenberg_marquardt_damping(6.0, rho, smallest=5.0, largest=7.0) == pytest.approx(
        min(max(6.0 * factor, 5.0), 7.0), rel=1e-15
    )


@pytest.mark.parametrize("rho", [0.1, 0.5, 0.9])
def test_the_damping_keeps_to_its_limits_whatever_it_was(rho):
    assert levenberg_marquardt_damping(60.0, rho, largest=7.0) == 7.0
    assert levenberg_marquardt_damping(0.6, rho, smallest=5.0) == 5.0


@given(any_ratio)
def test_no_damping_stays_none_unless_a_limit_is_set(rho):
    assert levenberg_marquardt_damping(0.0, rho) == 0.0
    assert levenberg_marquardt_damping(0.0, rho, smallest=0.1) == 0.1


@pytest.mark.parametrize("policy", [classic, gould])
@pytest.mark.parametrize(
    ("radius", "options", "words"),
    [
        (0.0, {}, "radius must be a positive finite number, got 0.0"),
        (-1.0, {}, "radius must"),
        (math.inf, {}, "radius must"),
        (math.nan, {}, "radius must"),
        (1.0, {"shrink": 1.0}, "shrink=1.0"),
        (1.0, {"shrink": 0.0}, "shrink=0.0"),
        (1.0, {"grow": 1.0}, "grow=1.0"),
        (1.0, {"grow": math.inf}, "grow=inf"),
        (1.0, {"shrink_below": 0.995, "grow_above": 0.5}, "0.995 and 0.5"),
        (1.0, {"grow_above": math.nan}, "shrink_below must be less"),
        (1.0, {"largest": 0.0}, "largest must be positive"),
        (1.0, {"largest": math.nan}, "largest must be positive"),
    ],
)
def test_policies_refuse_wrong_arguments_in_words(policy, radius, options, words):
    with pytest.raises(ValueError, match=words):
        policy(radius, 0.5, **options)


@pytest.mark.parametrize("length", [-1.0, math.nan, math.inf])
def test_a_length_out_of_range_is_refused_in_words(length):
    with pytest.raises(ValueError, match="length must be finite and not negative"):
        gould_radius(1.0, 0.5, length=length)


@pytest.mark.parametrize(
    ("damping", "options", "words"),
    [
        (-1.0, {}, "damping must be finite and not negative, got -1.0"),
        (math.nan, {}, "damping must"),
        (math.inf, {}, "damping must"),
        (1.0, {"factor": 1.0}, "factor must"),
        (1.0, {"factor": math.inf}, "factor must"),
        (1.0, {"raise_below": 0.9}, "0.9 and 0.75"),
        (1.0, {"smallest": 2.0, "largest": 1.0}, "2.0 and 1.0"),
        (1.0, {"smallest": -1.0}, "-1.0 and inf"),
        (1.0, {"smallest": math.inf}, "inf and inf"),
    ],
)
def test_damping_refuses_wrong_arguments_in_words(damping, options, words):
    with pytest.raises(ValueError, match=words):
        levenberg_marquardt_damping(damping, 0.5, **options)


# The first radius


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
