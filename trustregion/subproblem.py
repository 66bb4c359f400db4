"""The step to the edge of the KL ball."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .status import Status
from .vector import dot


@dataclass(frozen=True)
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
    minimises :math:`g's` over the ball when :math:`\lambda = 0`. The ball is the Fisher's own:
    damping shapes the direction and does not shrink the step. :math:`x'Fx` comes from the solve,
    as :math:`x'(F + \lambda I)x - \lambda x'x`, so no product is spent.

    Args:
        x: the direction, shape ``(n,)``.
        g: the gradient of the loss, shape ``(n,)``.
        delta: radius of the ball in nats.
        damped_curvature: ``x'(F + damping I)x``, as :func:`cg` returns it.
        damping: lambda.

    Returns:
        The step, or a zero step with status ``ZERO_CURVATURE`` (the difference above is lost in
        rounding: the KL does not see the direction) or ``NOT_A_DESCENT``.

    Example:
        >>> x, g = torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 0.0])
        >>> kl_ball_step(x, g, 0.01, damped_curvature=2.0, damping=0.0).s
        tensor([-0.1000,  0.0000])

    References:
        Schulman et al., Trust Region Policy Optimization, 2015, appendix C.

    """
    curvature = damped_curvature - damping * dot(x, x)
    # The recurrence carries x'(F + damping I)x to about k eps; 100 covers the usual k.
    if not curvature > 100 * torch.finfo(x.dtype).eps * damped_curvature:
        return Step(torch.zeros_like(x), Status.ZERO_CURVATURE, 0.0)
    length = math.sqrt(2 * delta / curvature)
    predicted = -length * dot(g, x)
    s = (length * x.double()).to(x.dtype)  # a length above float32 can give a step within it
    if not bool(s.isfinite().all()):
        return Step(torch.zeros_like(x), Status.ZERO_CURVATURE, 0.0)
    if not predicted > 0:
        return Step(torch.zeros_like(x), Status.NOT_A_DESCENT, predicted)
    return Step(s, Status.CONVERGED, predicted)
