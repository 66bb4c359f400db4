"""The length of a natural-gradient step: to the edge of the KL ball, or by a penalty on the KL."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_radius, finite
from ..status import Status
from ..vector import dot, norm


@dataclass(frozen=True, kw_only=True, eq=False)  # == on tensors is elementwise
class Step:
    """A step ``s`` for the parameters.

    Attributes:
        s: the step, shape ``(n,)``; zero unless ``status`` is ``CONVERGED``.
        status: ``CONVERGED``, or the reason why there is no step.
        predicted_reduction: the decrease of the linear model along ``s``, ``-g's``.

    """

    s: Tensor
    status: Status
    predicted_reduction: float


@torch.no_grad()
def kl_ball_step(
    x: Tensor, g: Tensor, delta: float, *, damped_curvature: float, damping: float
) -> Step:
    r"""Scale a direction to the edge of the ball :math:`\frac12 s'Fs \le \delta`.

    With :math:`x = -(F + \lambda I)^{-1} g` the result :math:`s = \sqrt{2\delta / x'Fx}\; x`
    minimizes :math:`g's` over the ball if :math:`\lambda = 0`. The ball is defined by ``F`` without
    damping, which shapes the direction but does not shorten the step. :math:`x'Fx` is computed from
    the solve as :math:`x'(F + \lambda I)x - \lambda x'x`, without a product.

    Args:
        x: the direction, shape ``(n,)``.
        g: the gradient of the loss, shape ``(n,)``.
        delta: radius of the ball in nats, positive.
        damped_curvature: ``x'(F + damping I)x``, as :func:`cg` returns it.
        damping: :math:`\lambda`.

    Returns:
        The step, or a zero step with status ``ZERO_CURVATURE`` (the difference above is lost in
        rounding, so that the KL does not bound the step), ``NOT_A_DESCENT`` or
        ``NONFINITE_INPUT``.

    Example:
        >>> x, g = torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 0.0])
        >>> kl_ball_step(x, g, 0.01, damped_curvature=2.0, damping=0.0).s
        tensor([-0.1000,  0.0000])

    References:
        Schulman et al., Trust Region Policy Optimization, 2015, appendix C.

    """
    check_radius("delta", delta)
    if not (finite(x) and finite(g)):
        return _no_step(x, Status.NONFINITE_INPUT)
    curvature = damped_curvature - damping * dot(x, x)
    # The recurrence computes x'(F + damping I)x to about k eps; 100 covers the usual k.
    if not curvature > 100 * torch.finfo(x.dtype).eps * damped_curvature:
        return _no_step(x, Status.ZERO_CURVATURE)
    length = math.sqrt(2 * delta / curvature)
    predicted = -length * dot(g, x)
    s = (length * x.double()).to(x.dtype)  # the step can fit float32 even if the length does not
    if not finite(s):
        return _no_step(x, Status.ZERO_CURVATURE)
    if not predicted > 0:
        return _no_step(x, Status.NOT_A_DESCENT, predicted)
    return Step(s=s, status=Status.CONVERGED, predicted_reduction=predicted)


@torch.no_grad()
def kl_penalty_step(
    x: Tensor,
    g: Tensor,
    penalty: float,
    delta: float = math.inf,
    *,
    damped_curvature: float,
    damping: float,
) -> Step:
    r"""Scale a direction to the minimizer of :math:`g's + \frac{C}{2} s'(F + \lambda I)s`.

    With :math:`x = -(F + \lambda I)^{-1} g` the minimizer is :math:`s = x / C`, shortened to the
    edge of the ball :math:`\frac12 s'Fs \le \delta` if it lies outside.

    Args:
        x: the direction, shape ``(n,)``.
        g: the gradient of the loss, shape ``(n,)``.
        penalty: :math:`C`, the penalty per nat, positive.
        delta: radius of the ball in nats, positive or infinite.
        damped_curvature: ``x'(F + damping I)x``, as :func:`cg` returns it.
        damping: :math:`\lambda`.

    Returns:
        The step, or a zero step with one of the statuses of :func:`kl_ball_step`.

    Example:
        >>> x, g = torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 0.0])
        >>> kl_penalty_step(x, g, 5.0, damped_curvature=2.0, damping=0.0).s
        tensor([-0.2000,  0.0000])

    References:
        Schulman et al., Trust Region Policy Optimization, 2015, section 4.

    """
    if delta < math.inf:
        edge = kl_ball_step(x, g, delta, damped_curvature=damped_curvature, damping=damping)
        if edge.status is not Status.CONVERGED or norm(edge.s) * penalty <= norm(x):
            return edge
    if not (finite(x) and finite(g)):
        return _no_step(x, Status.NONFINITE_INPUT)
    s = (x.double() / penalty).to(x.dtype)
    if not finite(s):
        return _no_step(x, Status.ZERO_CURVATURE)
    predicted = -dot(g, x) / penalty
    if not predicted > 0:
        return _no_step(x, Status.NOT_A_DESCENT, predicted)
    return Step(s=s, status=Status.CONVERGED, predicted_reduction=predicted)


def _no_step(x: Tensor, status: Status, predicted: float = 0.0) -> Step:
    """Return the zero step."""
    return Step(s=torch.zeros_like(x), status=status, predicted_reduction=predicted)
