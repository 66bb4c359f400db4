"""The length of a natural-gradient step: to the edge of the KL ball, or by the price of a KL."""

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
        status: ``CONVERGED``, or why there is no step.
        predicted_reduction: how much the linear model falls along ``s``: ``-g's``.

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
    minimizes :math:`g's` over the ball when :math:`\lambda = 0`. The ball is the Fisher's own:
    damping shapes the direction and does not shrink the step. :math:`x'Fx` comes from the solve,
    as :math:`x'(F + \lambda I)x - \lambda x'x`, so no product is spent.

    Args:
        x: the direction, shape ``(n,)``.
        g: the gradient of the loss, shape ``(n,)``.
        delta: radius of the ball in nats, positive.
        damped_curvature: ``x'(F + damping I)x``, as :func:`cg` returns it.
        damping: lambda.

    Returns:
        The step, or a zero step with status ``ZERO_CURVATURE`` (the difference above is lost in
        rounding: the KL does not see the direction), ``NOT_A_DESCENT`` or ``NONFINITE_INPUT``.

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
    # The recurrence carries x'(F + damping I)x to about k eps; 100 covers the usual k.
    if not curvature > 100 * torch.finfo(x.dtype).eps * damped_curvature:
        return _no_step(x, Status.ZERO_CURVATURE)
    length = math.sqrt(2 * delta / curvature)
    predicted = -length * dot(g, x)
    s = (length * x.double()).to(x.dtype)  # a length above float32 can give a step within it
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

    With :math:`x = -(F + \lambda I)^{-1} g` that is :math:`s = x / C`, cut back to the edge of the
    ball :math:`\frac12 s'Fs \le \delta` where it is outside.

    Args:
        x: the direction, shape ``(n,)``.
        g: the gradient of the loss, shape ``(n,)``.
        penalty: C, the price of a nat, positive.
        delta: radius of the ball in nats, positive or infinite.
        damped_curvature: ``x'(F + damping I)x``, as :func:`cg` returns it.
        damping: lambda.

    Returns:
        The step, or a zero step with a status as of :func:`kl_ball_step`.

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
