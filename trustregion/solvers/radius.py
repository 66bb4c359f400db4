"""Ratios of reductions, and the policies for radius and damping that follow them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from ..arguments import as_count, as_not_negative, as_positive, check_radius, require

LARGEST = sys.float_info.max
SMALLEST = math.ulp(0.0)
GOOD, FAIR, TARGET = 0.35, 0.5, 0.25  # distances of a ratio from 1; TARGET is interpolated to


@overload
def reduction_ratio(actual: float, predicted: float, /) -> float: ...
@overload
def reduction_ratio(old: float | Tensor, new: float | Tensor, predicted: float, /) -> float: ...
def reduction_ratio(
    first: float | Tensor, second: float | Tensor, third: float | None = None, /
) -> float:
    r"""Return :math:`\rho`, the actual reduction of the loss over the predicted one.

    Call ``reduction_ratio(actual, predicted)`` or, better, ``reduction_ratio(old, new, predicted)``
    with the losses themselves: floats, or tensors of per-sample losses of one shape. The actual
    reduction is then the mean of the per-sample differences in float64, so that the difference of
    two nearly equal means does not cancel. If both reductions are within 10 eps of the mean
    absolute loss, in the precision of the losses, they are rounding and the ratio is 1. A float32
    loss should therefore be passed as a tensor, not by ``.item()``.

    The ratio is never NaN. It is ``-inf``, for which every policy below shrinks, if the prediction
    is not positive, or a loss or a reduction is not finite.

    Raises:
        ValueError: ``old`` and ``new`` differ in shape or are empty.

    Example:
        >>> reduction_ratio(0.5, 1.0)
        0.5
        >>> reduction_ratio(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]), 2.0)
        0.5
        >>> reduction_ratio(1.0, 1.0 - 2e-16, 1e-16)
        1.0

    References:
        Conn, Gould and Toint, Trust-Region Methods, 2000, section 17.4.2.

    """
    if third is None:
        actual, predicted, rounding = float(first), float(second), 0.0
    else:
        actual, rounding = _mean_reduction(first, second)
        predicted = float(third)
    if not (0 < predicted < math.inf and math.isfinite(actual)):
        return -math.inf
    if abs(actual) <= rounding and predicted <= rounding:
        return 1.0
    return actual / predicted


@torch.no_grad()
def _mean_reduction(old: float | Tensor, new: float | Tensor) -> tuple[float, float]:
    """Return the mean of ``old - new``, and a bound on its rounding."""
    before, after = (
        x.double() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64, device="cpu")
        for x in (old, new)
    )
    if before.shape != after.shape or not before.numel():
        words = f"of one shape and not empty, got {tuple(before.shape)} and {tuple(after.shape)}"
        raise ValueError(f"old and new must be {words}")
    precisions = [torch.finfo(x.dtype).eps for x in (old, new) if isinstance(x, Tensor)]
    eps = max(precisions, default=sys.float_info.epsilon)
    return (before - after).mean().item(), 10 * eps * before.abs().mean().item()


def classic_radius(
    radius: float,
    rho: float,
    *,
    on_boundary: bool,
    shrink_below: float = 0.25,
    grow_above: float = 0.75,
    shrink: float = 0.25,
    grow: float = 2.0,
    largest: float = math.inf,
) -> float:
    r"""Return the next radius: smaller for a poor ratio, larger for a good one at the edge.

    .. math:: \Delta_+ = \begin{cases} \Delta / 4 & \rho < 1/4 \\
        2 \Delta & \rho > 3/4 \text{ and } \|s\| = \Delta \\ \Delta & \text{otherwise} \end{cases}

    at most ``largest``. A NaN ratio shrinks it. The result is always positive and finite.

    Args:
        radius: the radius of the step, positive.
        rho: the ratio of reductions.
        on_boundary: whether the step ended at the edge. Inside, the radius had no effect.
        shrink_below: ratio below which the radius shrinks.
        grow_above: ratio above which the radius grows.
        shrink: factor for shrinking, in (0, 1).
        grow: factor for growing, above 1.
        largest: upper limit of the radius.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> classic_radius(1.0, 0.9, on_boundary=True), classic_radius(1.0, 0.1, on_boundary=True)
        (2.0, 0.25)

    References:
        Nocedal and Wright, Numerical Optimization, 2006, Alg. 4.1.

    """
    _check_rule(radius, shrink_below, grow_above, shrink, grow, largest)
    if not rho >= shrink_below:
        return _within(shrink * radius, largest)
    return _within(grow * radius if rho > grow_above and on_boundary else radius, largest)


def gould_radius(
    radius: float,
    rho: float,
    *,
    length: float,
    shrink_below: float = 0.01,
    grow_above: float = 0.99,
    shrink: float = 0.25,
    grow: float = 3.5,
    largest: float = math.inf,
) -> float:
    r"""Return the next radius, by factors tuned on a large set of test problems.

    .. math:: \Delta_+ = \begin{cases} \|s\| / 4 & \rho < 0.01 \\
        \max(3.5 \|s\|, \Delta) & \rho > 0.99 \\ \Delta & \text{otherwise} \end{cases}

    at most ``largest``. The radius grows only for nearly perfect agreement, but then by much. A NaN
    ratio shrinks it. The result is always positive and finite.

    Args:
        radius: the radius of the step, positive.
        rho: the ratio of reductions.
        length: the length of the step in the norm of the radius. If it is zero, or rounding makes
            it exceed the radius, the radius is used for shrinking instead.
        shrink_below: ratio below which the radius shrinks.
        grow_above: ratio above which the radius grows.
        shrink: factor for shrinking, in (0, 1).
        grow: factor for growing, above 1.
        largest: upper limit of the radius.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> gould_radius(1.0, 1.0, length=1.0), gould_radius(1.0, -2.0, length=0.5)
        (3.5, 0.125)

    References:
        Gould, Orban, Sartenaer and Toint, Sensitivity of trust-region algorithms to their
        parameters, 2005.

    """
    _check_rule(radius, shrink_below, grow_above, shrink, grow, largest)
    as_not_negative("length", length)
    if not rho >= shrink_below:
        return _within(shrink * (min(length, radius) or radius), largest)
    return _within(max(grow * length, radius) if rho > grow_above else radius, largest)


def levenberg_marquardt_damping(
    damping: float,
    rho: float,
    *,
    raise_below: float = 0.25,
    lower_above: float = 0.75,
    factor: float = 1.5,
    smallest: float = 0.0,
    largest: float = math.inf,
) -> float:
    r"""Return the next damping :math:`\lambda`: larger for a poor ratio, smaller for a good one.

    .. math:: \lambda_+ = \begin{cases} \frac32 \lambda & \rho < 1/4 \\
        \frac23 \lambda & \rho > 3/4 \\ \lambda & \text{otherwise} \end{cases}

    within ``[smallest, largest]``. A NaN ratio raises it. A damping of zero stays zero unless
    ``smallest`` is above zero; any other stays positive and finite.

    Args:
        damping: :math:`\lambda`, not negative.
        rho: the ratio of reductions.
        raise_below: ratio below which the damping is raised.
        lower_above: ratio above which the damping is lowered.
        factor: factor for raising; the reciprocal lowers.
        smallest: lower limit.
        largest: upper limit.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> levenberg_marquardt_damping(3.0, 0.1), levenberg_marquardt_damping(3.0, 0.9)
        (4.5, 2.0)

    References:
        Martens, Deep Learning via Hessian-free Optimization, 2010, section 4.1.

    """
    as_not_negative("damping", damping)
    if not raise_below < lower_above:
        limits = f"{raise_below} and {lower_above}"
        raise ValueError(f"raise_below must be less than lower_above, got {limits}")
    require(1 < factor < math.inf, "factor", "be finite and above 1", factor)
    if not (0 <= smallest <= largest and smallest < math.inf):
        raise ValueError(f"0 <= smallest <= largest must hold, got {smallest} and {largest}")
    if not rho >= raise_below:
        damping = damping and _within(factor * damping, largest)
    elif rho > lower_above:
        damping = damping and _within(damping / factor, largest)
    return min(max(damping, smallest), largest)


@dataclass(frozen=True, kw_only=True)
class InitialRadius:
    """The result of a search for a first radius.

    Attributes:
        radius: the radius, positive and finite.
        agreed: whether the model was good there. If not, it was good at no trial, and ``radius`` is
            the next ``t`` after the last trial.
        best: the trial ``t`` of least value; zero if none was below ``f(theta)``.
        best_value: the value at ``best``.
        evaluations: the number of trials.

    """

    radius: float
    agreed: bool
    best: float
    best_value: float
    evaluations: int


def initial_radius(
    value: float,
    slope: float,
    curvature: float,
    evaluate: Callable[[float], float],
    *,
    start: float | None = None,
    trials: int = 5,
    largest: float = math.inf,
) -> InitialRadius:
    r"""Return the largest tried radius at which the quadratic model along a direction is good.

    For :math:`\phi(t) = f(\theta + t d)` with a unit descent direction ``d``, the model
    :math:`f + t g'd + \frac12 t^2 d'Hd` is compared with :math:`\phi` at a few ``t``. Where the
    ratio of reductions is off 1 by 0.35 at most, the radius ``t`` is a candidate. The next ``t`` is
    where the parabola through :math:`f`, :math:`g'd` and :math:`\phi(t)` would put the ratio at
    :math:`1 \pm 1/4`, kept within factors that depend on the agreement: 2 to 5 for a good one,
    1/2 to 2 for a fair one (off by 0.5 at most), 1/16 to 1 for a poor one, 1/16 for a value that is
    not finite. Cost: ``trials`` evaluations, or fewer where ``largest`` is reached with agreement.

    Args:
        value: :math:`f(\theta)`.
        slope: :math:`g'd`, negative; ``-|g|`` for steepest descent.
        curvature: :math:`d'Hd`, of either sign.
        evaluate: ``t`` -> :math:`f(\theta + t d)`.
        start: the first ``t``; if None ``|slope / curvature|``, which minimizes a convex model,
            or 1 where that is not positive and finite.
        trials: number of ``t`` to try, at least 1.
        largest: upper limit of the radius.

    Raises:
        ValueError: a number is not finite, the slope is not negative, or a limit is out of range.

    Example:
        >>> found = initial_radius(0.0, -1.0, 1.0, lambda t: -t + t * t / 2)
        >>> found.radius, found.best
        (2.0, 1.0)

    References:
        Sartenaer, Automatic determination of an initial trust region in nonlinear programming,
        1997, algorithm ITRR. The factors are the defaults of the solver NTR of TAO.

    """
    if not (math.isfinite(value) and math.isfinite(curvature)):
        given = f"value={value}, curvature={curvature}"
        raise ValueError(f"value and curvature must be finite, got {given}")
    require(-math.inf < slope < 0, "slope", "be finite and negative (d descends)", slope)
    as_count("trials", trials, 1)
    as_positive("largest", largest, infinite=True)
    if start is None:
        natural = abs(slope / curvature) if curvature else 0.0
        start = natural if 0 < natural < math.inf else 1.0
    check_radius("start", start)
    t, good, best, best_value, count = _within(start, largest), 0.0, 0.0, value, 0
    while count < trials and good < largest:
        trial = float(evaluate(t))
        count += 1
        if math.isfinite(trial) and trial < best_value:
            best, best_value = t, trial
        error, factor = _compare(value, -slope, curvature, t, trial)
        if error <= GOOD:
            good = max(good, t)
        t = _within(factor * t, largest)
    return InitialRadius(
        radius=good or t, agreed=good > 0, best=best, best_value=best_value, evaluations=count
    )


def _compare(
    value: float, descent: float, curvature: float, t: float, trial: float
) -> tuple[float, float]:
    """Return the distance of the ratio of reductions from 1, and the factor for the next ``t``."""
    actual = (value - trial) / descent / t  # both in units of t |g'd|
    predicted = 1 - 0.5 * t * (curvature / descent)
    if not (math.isfinite(actual) and math.isfinite(predicted)):
        return math.inf, 1 / 16
    rounding = 10 * sys.float_info.epsilon * max(1.0, abs(predicted - 1), abs(value) / descent / t)
    gap = abs(actual - predicted)
    error = 0.0 if gap <= rounding else gap / abs(predicted) if predicted else math.inf
    low, high = sorted(_reach(actual, predicted, kappa) for kappa in (1 - TARGET, 1 + TARGET))
    if error <= GOOD:
        return error, 2.0 if high < 1 else min(high, 5.0)
    if error <= FAIR:
        return error, min(max(high, 0.5), 2.0)
    # At most one of the two is in this range, as the error is at least 1/4.
    return error, next((tau for tau in (low, high) if 1 / 16 <= tau < 1), 1 / 16)


def _reach(actual: float, predicted: float, kappa: float) -> float:
    r"""Return the ``tau`` at which the ratio is ``kappa``, or a negative number or infinity.

    It solves :math:`1 - \tau (1 - a) = \kappa (1 - \tau (1 - p))`.
    """
    below = (1 - actual) - kappa * (1 - predicted)
    return (1 - kappa) / below if below else math.inf


def _within(radius: float, largest: float) -> float:
    """Return a radius that is positive, finite and at most ``largest``."""
    return min(max(radius, SMALLEST), LARGEST, largest)


def _check_rule(
    radius: float, low: float, high: float, shrink: float, grow: float, largest: float
) -> None:
    check_radius("radius", radius)
    if not low < high:
        raise ValueError(f"shrink_below must be less than grow_above, got {low} and {high}")
    if not 0 < shrink < 1 < grow < math.inf:
        given = f"shrink={shrink} and grow={grow}"
        raise ValueError(f"factors must satisfy 0 < shrink < 1 < grow, got {given}")
    as_positive("largest", largest, infinite=True)
