r"""Gaps of convex functions above their tangents, :math:`f(x_1) - f(x_0) - f'(x_0)(x_1 - x_0)`.

The KL of an exponential family is such a gap. Evaluated as written, it loses all digits for close
points; here each gap is a sum of terms that are accurate to rounding error and do not cancel. All
are tensor operations in float64 and twice differentiable, also at equal points.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Up to these arguments the series are exact to rounding; beyond, a difference loses two digits.
_NEAR_LOG = 1 / 8
_NEAR_EXP = 1 / 64
_HUGE = 1e300  # infinity minus this is infinite and not a NaN
_SHIFT = 10  # the smallest argument of Stirling's series
# B_2j / (2j (2j - 1)), the coefficients of x^(1 - 2j) in Stirling's series (DLMF 5.11.1)
_STIRLING = (
    1 / 12,
    -1 / 360,
    1 / 1260,
    -1 / 1680,
    1 / 1188,
    -691 / 360360,
    1 / 156,
    -3617 / 122400,
)


def log_gap(t: Tensor, ratio: Tensor) -> Tensor:
    """Return ``t - log(ratio)`` for ``ratio = 1 + t``: about t^2/2 near 0, infinite at ratio 0."""
    u = t.clamp(-_NEAR_LOG, _NEAR_LOG)
    r = u / (2 + u)  # log(1 + u) = 2 artanh(r)
    s = r * r
    rest = 1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13)))))
    far = t - ratio.clamp(max=_HUGE).log()
    return torch.where(t.abs() < _NEAR_LOG, r * (u - 2 * s * rest), far)


def exp_gap(x: Tensor) -> Tensor:
    """Return ``exp(x) - 1 - x``: about x^2/2 near 0."""
    u = x.clamp(-_NEAR_EXP, _NEAR_EXP)
    rest = 1 / 24 + u * (1 / 120 + u * (1 / 720 + u * (1 / 5040 + u * (1 / 40320))))
    y = x.clamp(max=_HUGE)
    return torch.where(x.abs() < _NEAR_EXP, u * u * (0.5 + u * (1 / 6 + u * rest)), y.expm1() - y)


def entropy_gap(x0: Tensor, x1: Tensor, d: Tensor) -> Tensor:
    """Return the gap of ``x log x``, ``x1 log(x1 / x0) - d``, for positive points ``d`` apart."""
    return x1 * log_gap(-d / x1, x0 / x1)


def stirling_gap(x0: Tensor, x1: Tensor, d: Tensor) -> Tensor:
    """Return the gap of ``lgamma(x) - x log x`` for positive points ``d = x1 - x0`` apart.

    It is convex, since trigamma(x) > 1/x. Stirling's series is used from 10 on, and the recurrence
    for smaller points.
    """
    low = torch.minimum(x0, x1) < _SHIFT
    start = torch.where(low, float(_SHIFT), 0.0)
    series = _series_gap(x0 + start, x1 + start, d)
    # the gap of 1 and 1 is zero
    x0, x1, d = torch.where(low, x0, 1.0), torch.where(low, x1, 1.0), torch.where(low, d, 0.0)
    out = entropy_gap(x0 + _SHIFT, x1 + _SHIFT, d) - entropy_gap(x0, x1, d)
    for k in range(_SHIFT):
        out = out + log_gap(d / (x0 + k), (x1 + k) / (x0 + k))
    return series + out


def _series_gap(x0: Tensor, x1: Tensor, d: Tensor) -> Tensor:
    t, q = d / x0, x0 / x1
    # x^-m has the gap x0^-m t^2 q P_m(q) with P_m the sum of (m - j) q^j over j < m.
    power, inner, outer = torch.ones_like(q), torch.zeros_like(q), torch.zeros_like(q)
    y = x0.reciprocal()
    scale = y
    total = torch.zeros_like(q)
    for m in range(1, 2 * len(_STIRLING)):
        inner = inner + power
        outer = outer + inner
        power = power * q
        if m % 2:
            total = total + _STIRLING[m // 2] * scale * outer
            scale = scale * y * y
    return log_gap(t, x1 / x0) / 2 + t.square() * q * total


def stirling_curvature(x: Tensor) -> Tensor:
    """Return ``trigamma(x) - 1/x`` for ``x > 0``, the curvature of ``lgamma(x) - x log x``."""
    low = x < _SHIFT
    small, large = torch.where(low, x, 1.0), torch.where(low, float(_SHIFT), x)
    y = large.reciprocal()
    series, power = y.square() / 2, y * y * y
    for j, c in enumerate(_STIRLING, 1):
        series = series + c * (2 * j - 1) * (2 * j) * power
        power = power * y * y
    # torch's trigamma is accurate to 1e-9 only, its Hurwitz zeta function to rounding
    near = torch.special.zeta(2.0, small) - small.reciprocal()
    return torch.where(low, near, series)
