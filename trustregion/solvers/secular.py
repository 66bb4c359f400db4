"""The trust-region subproblem in an eigenbasis, where it is one equation in one unknown."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, kw_only=True, eq=False)
class Minimizer:
    """The solution ``h`` of shape ``(k,)`` in the eigenbasis, with its multiplier."""

    h: Tensor
    multiplier: float
    on_boundary: bool
    hard_case: bool = False


def minimize_in_eigenbasis(theta: Tensor, c: Tensor, radius: float) -> Minimizer:
    r"""Minimize :math:`\frac12 \sum \theta_i h_i^2 - c'h` over :math:`|h| \le \Delta`, globally.

    The solution is :math:`h_i = c_i / (\theta_i + \lambda)` with the smallest
    :math:`\lambda \ge \max(0, -\theta_1)` that brings it into the ball. In the hard case ``c`` is
    orthogonal to the leftmost eigenvector and that :math:`h` is too short; the eigenvector then
    completes it. The unknown is :math:`\mu = \lambda + \theta_1`, so that no digit is lost if
    :math:`\lambda` is close to :math:`-\theta_1`.

    Args:
        theta: eigenvalues in ascending order, shape ``(k,)``, float64.
        c: coefficients of the linear term, shape ``(k,)``, float64.
        radius: positive.

    References:
        More and Sorensen, Computing a Trust Region Step, 1983; Conn, Gould and Toint, Trust-Region
        Methods, 2000, section 7.3.

    """
    lowest, largest = theta[0].item(), theta.abs().max().item()
    rounding = len(theta) * EPS * largest
    if lowest > 0:
        h = c / theta
        if _size(h) <= radius:
            return Minimizer(h=h, multiplier=0.0, on_boundary=False)
    gaps = theta - lowest
    unseen = c.abs() <= 16 * len(theta) * EPS * _size(c)
    if lowest <= rounding and bool(unseen[gaps <= rounding].all()):
        h = torch.where(gaps <= rounding, 0.0, c / gaps.clamp(min=rounding))
        size = _size(h)
        if size <= radius:
            return _complete(h, size, lowest, rounding, radius, c)
    # No entry of h may exceed the radius; at this mu one of them equals it.
    low = max(lowest, (c.abs() / radius - gaps).max().item(), math.ulp(0.0))
    mu = _root(gaps, c, radius, low)
    h = c / (gaps + mu)
    size = _size(h)
    if size < radius * (1 - 1e-8):  # even at the smallest mu: the eigenvector completes h
        return _complete(h, size, lowest, rounding, radius, c)
    return Minimizer(h=h * (radius / size), multiplier=max(mu - lowest, 0.0), on_boundary=True)


def _complete(
    h: Tensor, size: float, lowest: float, rounding: float, radius: float, c: Tensor
) -> Minimizer:
    """Return the solution if ``c`` is orthogonal to the leftmost eigenvector."""
    if lowest >= -rounding:  # a singular, consistent system: the shortest solution is inside
        return Minimizer(h=h, multiplier=0.0, on_boundary=size == radius)
    h[0] = math.copysign(radius * math.sqrt(1 - (size / radius) ** 2), c[0].item())
    return Minimizer(h=h, multiplier=-lowest, on_boundary=True, hard_case=True)


def _root(gaps: Tensor, c: Tensor, radius: float, low: float) -> float:
    """Solve ``|c / (gaps + mu)| = radius`` for ``mu >= low``, by Newton on ``1/|h|``, guarded.

    ``1/|h|`` is nearly linear in ``mu``: three or four iterations are usual.
    """
    high = max(_size(c) / radius, low)
    mu = low
    for _ in range(100):
        h = c / (gaps + mu)
        size = _size(h)
        if abs(size - radius) <= 4 * EPS * radius:
            break
        if size > radius:
            low = mu
        else:
            high = mu
        weights = (h / size).square()
        mean = (weights / (gaps + mu)).sum().item()  # -|h|' / |h|
        mu += (size / radius - 1) / mean
        if not low < mu < high:
            mu = low * math.sqrt(min(high / low, 1e300))  # exact under powers of two
        if not low < mu < high:  # neighbors in float64
            mu = high
            break
    return mu


def _size(h: Tensor) -> float:
    """Return ``|h|`` without overflow."""
    largest = h.abs().max().item() if h.numel() else 0.0
    if not 0 < largest < math.inf:
        return largest
    return largest * torch.linalg.vector_norm(h / largest).item()
