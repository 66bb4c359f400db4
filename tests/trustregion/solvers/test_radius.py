"""Policies of the radius and the damping."""

import math
import sys

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from trustregion.solvers.radius import (
    classic_radius,
    gould_radius,
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


# -- the ratio of the reductions
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


# -- the policies
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
def test_the_damping_stays_within_its_limits(rho):
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
