"""Minimize a function of a point, or fit residuals by least squares, in one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..arguments import as_count, as_not_negative
from ..operators.base import FunctionOperator
from ..operators.ggn import GGNOperator
from ..status import Status
from ..vector import dot, norm
from .closure import NewtonClosure
from .info import StepInfo
from .newton import NewtonTrustRegion
from .options import Region
from .point import Point
from .result import OptimizeResult, gauss_newton_reduction

Callback: TypeAlias = Callable[[Any, StepInfo], object]
Met: TypeAlias = Callable[[StepInfo, Tensor], str]
LARGEST_JACOBIAN = 1_000, 10_000_000  # columns, entries
TOLERANCE = 1e-12


def minimize(
    fun: Callable[[Any], Tensor],
    x0: Any,
    *,
    gtol: float = 1e-6,
    max_iter: int = 1000,
    radius: float = 1.0,
    callback: Callback | None = None,
) -> OptimizeResult:
    r"""Minimize a smooth function by Newton's method within a trust region.

    It takes the steps of :class:`NewtonTrustRegion` with the Hessian, which may be indefinite. The
    search has converged when :math:`\max_i |g_i| \le \mathrm{gtol}`, or when the model
    predicts a reduction below the rounding of the value.

    Args:
        fun: ``x`` -> the value, one number that torch computes from ``x``.
        x0: The first point: a tensor, numbers or an array, or a dict, list or tuple of them.
            Numbers and arrays are converted to float64. It is not modified.
        gtol: The largest absolute gradient entry at which the search has converged.
        max_iter: The limit on the number of steps.
        radius: The radius of the first step; it then follows the quality of the model.
        callback: Called as ``callback(x, info)`` after each step that moved ``x``, with the
            :class:`StepInfo` of the step. It may raise ``StopIteration`` to end the search.

    Returns:
        The last point, its value and gradient, and how the search ended.

    Raises:
        RuntimeError: Inference mode is on, or ``fun`` cannot be differentiated twice.
        TypeError: ``x0`` is not real, or ``fun`` does not return a real tensor.
        ValueError: ``x0`` is not finite, an option is out of range, or ``fun`` does not return one
            number that depends on ``x``.

    Example:
        >>> result = minimize(lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2, [-1.2, 1])
        >>> result.x, result.success
        (tensor([1.0000, 1.0000], dtype=torch.float64), True)

    """
    point = Point(fun, x0)
    optimizer = NewtonTrustRegion(point.vector.params, radius, gtol=gtol, process_group=False)
    end = _search(optimizer, point.value, point, max_iter, callback)
    value = point.with_graph(point.value)
    g = point.gradient(value)
    slope = point.structured(g)
    return _result(point, end, g, gtol, fun=value.detach(), grad=slope, jac=slope)


def least_squares(
    fun: Callable[[Any], Tensor],
    x0: Any,
    *,
    ftol: float = TOLERANCE,
    xtol: float = TOLERANCE,
    gtol: float = TOLERANCE,
    x_scale: Any = None,
    max_iter: int = 1000,
    callback: Callback | None = None,
) -> OptimizeResult:
    r"""Minimize :math:`F(x) = \frac12 \|r(x)\|^2` by the method of Levenberg and Marquardt.

    It takes the steps of :class:`NewtonTrustRegion` with the matrix :math:`J'J` and an infinite
    radius. Each step solves :math:`(J'J + \lambda D^2) s = -J'r` with
    ``D = diag(1 / x_scale)``. The first :math:`\lambda` is the curvature along the gradient in
    units of ``x_scale``. The fit has converged when one of these holds,

    .. math:: F - F_+ < \mathrm{ftol}\, F \text{ and } \rho > \tfrac14, \qquad
        \|D s\| < \mathrm{xtol}\, (\mathrm{xtol} + \|D x\|), \qquad
        \max_i |(J'r)_i| \le \mathrm{gtol}

    where :math:`\rho` is the actual over the predicted reduction, or when the model predicts a
    reduction below the rounding of the cost. ``ftol`` and ``xtol`` are raised to ten times the
    machine epsilon of ``x`` if they are smaller. The defaults are so strict because a fit with
    large residuals converges linearly: with 1e-8, four digits of NIST's problem MGH09 are right.

    Cost: per step at most ``n`` products, one call of ``fun`` with its derivatives and one call per
    trial. Two more calls, at the first and at the last point, give the first damping and the
    Jacobian. Where the data differ between processes, use :class:`NewtonTrustRegion`: each process
    fits its own residuals here.

    Args:
        fun: ``x`` -> the residuals, a tensor of any shape that torch computes from ``x``.
        x0: The first guess, as for :func:`minimize`.
        ftol: The relative reduction of the cost by a step.
        xtol: The length of a step relative to that of ``x``.
        gtol: The largest absolute entry of the gradient of the cost.
        x_scale: The typical sizes of the parameters: a number, or numbers with the structure of
            ``x0``. The default is the absolute value of ``x0``, or 1 where ``x0`` is zero.
        max_iter: The limit on the number of steps.
        callback: As for :func:`minimize`.

    Returns:
        The last point, its residuals and their Jacobian, how the search ended, and the covariance
        of the parameters.

    Raises:
        RuntimeError: Inference mode is on.
        TypeError: ``x0`` is not real, or ``fun`` does not return a real tensor.
        ValueError: ``x0`` is not finite, an option is out of range, or ``fun`` does not return
            residuals that depend on ``x``.

    Example:
        >>> t = torch.linspace(0, 1, 20, dtype=torch.float64)
        >>> y = 2 * torch.exp(-3 * t)
        >>> fit = least_squares(lambda b: b[0] * torch.exp(-b[1] * t) - y, [1.0, 1.0])
        >>> fit.x, fit.success
        (tensor([2.0000, 3.0000], dtype=torch.float64), True)

    References:
        Marquardt, An algorithm for least-squares estimation of nonlinear parameters, 1963.

    """
    ftol, xtol = as_not_negative("ftol", ftol), as_not_negative("xtol", xtol)
    gtol = as_not_negative("gtol", gtol)
    point = Point(fun, x0)
    D = point.sizes(x_scale).reciprocal()
    optimizer = NewtonTrustRegion(
        point.vector.params,
        math.inf,
        curvature="ggn",
        damping=_first_damping(point, D),
        rtol=1e-12,  # An exact solve takes no more products than there are parameters.
        gtol=2 * gtol,  # The loss is twice the cost.
        preconditioner=FunctionOperator(lambda v: v / D / D, len(D), D.dtype, D.device),
        region=Region(damping_factor=4.0),
        process_group=False,
    )
    floor = 10 * torch.finfo(D.dtype).eps
    met = _tolerances(point, D, max(ftol, floor), max(xtol, floor))
    end = _search(optimizer, point.squares, point, max_iter, callback, met)
    loss, r = point.with_graph(point.squares)
    g = 0.5 * point.gradient(loss)
    J, cost = _jacobian(point, loss, r), 0.5 * loss.item()
    slope, end = point.structured(g), _judged(end, J, g, cost)
    return _result(point, end, g, gtol, fun=r.detach(), cost=cost, grad=slope, jac=J)


def _first_damping(point: Point, D: Tensor) -> float:
    """Return the curvature along the gradient, in the metric of ``D``."""
    loss, r = point.with_graph(point.squares)
    g = point.gradient(loss) / D
    v = g / (norm(g) or 1.0) / D
    curvature = dot(v, GGNOperator(loss, r, point.vector).mv(v))
    return curvature if 0 < curvature < math.inf else 1.0


def _tolerances(point: Point, D: Tensor, ftol: float, xtol: float) -> Met:
    """Return the test of a step on both tolerances, which says what was met."""

    def met(info: StepInfo, before: Tensor) -> str:
        if info.actual_reduction < ftol * info.loss and info.rho > 0.25:
            part = info.actual_reduction / info.loss
            return f"the last step reduced the cost by {part:.2g} of it, and ftol is {ftol:.2g}"
        length, size = norm(D * (point.vector.values() - before)), norm(D * before)
        if length < xtol * (xtol + size):
            lengths = f"the last step has the length {length:.2g} and x {size:.2g}"
            return f"{lengths} in units of x_scale, and xtol is {xtol:.2g}"
        return ""

    return met


def _jacobian(point: Point, loss: Tensor, r: Tensor) -> Tensor | None:
    """Return the Jacobian of the residuals, shape ``(m, n)``, or None if it is too large."""
    columns, entries = LARGEST_JACOBIAN
    n = point.vector.numel
    if n > columns or n * r.numel() > entries:
        return None
    J = GGNOperator(loss, r, point.vector).jacobian
    unit = torch.eye(n, dtype=J.dtype, device=J.device)
    return torch.stack([J.mv(e) for e in unit], dim=1)


def _judged(end: _End, J: Tensor | None, g: Tensor, cost: float) -> _End:
    """Return the end of a fit, as converged if only rounding rejected its last step.

    This is assumed if a Gauss-Newton step predicts a relative reduction of at most the square root
    of the machine epsilon, below which an optimizer takes the losses of two calls for equal.
    """
    if end.status is not Status.REJECTED_RATIO or J is None or not bool(J.isfinite().all()):
        return end
    part = gauss_newton_reduction(J, g) / cost
    if part > math.sqrt(torch.finfo(J.dtype).eps):
        return end
    detail = f"no step reduces the cost, and the model predicts a reduction by {part:.2g} of it"
    return replace(end, status=Status.CONVERGED, detail=detail)


@dataclass(frozen=True, kw_only=True)
class _End:
    """The end of a search.

    Attributes:
        status: The status of the last step; ``CONVERGED`` if it met a tolerance, ``MAX_ITER`` at
            the limit, ``ACCEPTED`` if the callback ended the search.
        detail: What was met or went wrong.
        nit: The number of steps that moved the point.
        products: The number of products in all steps.

    """

    status: Status
    detail: str
    nit: int
    products: int


def _search(
    optimizer: NewtonTrustRegion,
    closure: NewtonClosure,
    point: Point,
    max_iter: int,
    callback: Callback | None,
    met: Met = lambda *_: "",
) -> _End:
    """Take steps until one of them does not move the point or meets a tolerance."""
    max_iter = as_count("max_iter", max_iter)
    status, detail, nit, products = Status.MAX_ITER, "", 0, 0
    while status is Status.MAX_ITER and nit < max_iter:
        before = point.vector.values()
        optimizer.step(closure)
        info = optimizer.info
        assert info is not None
        products += info.products
        if not info.accepted:
            status, detail = info.status, info.detail
            break
        nit += 1
        try:
            if callback is not None:
                callback(point.structured(point.vector.values()), info)
        except StopIteration:
            status = info.status
        tolerance = met(info, before)
        if tolerance:
            status, detail = Status.CONVERGED, tolerance
    return _End(status=status, detail=detail, nit=nit, products=products)


def _result(point: Point, end: _End, g: Tensor, gtol: float, **fields: Any) -> OptimizeResult:
    """Return the result of a search at its last point, where the gradient is ``g``."""
    optimality, status, detail = g.abs().max().item(), end.status, end.detail
    largest = f"the largest entry of the gradient is {optimality:.3g}, and gtol is {gtol:.3g}"
    if status in (Status.CONVERGED, Status.MAX_ITER) and optimality <= gtol:
        status, detail = Status.CONVERGED, largest  # The last step of the limit may have met it.
    elif status is Status.REJECTED_RATIO:
        detail = f"{largest}; {detail}" if detail else largest
    message = f"{status}" + (f" ({detail})" if detail else "")
    if status is Status.CONVERGED:
        message = f"Converged: {detail}."
    elif status is Status.ACCEPTED:
        message = "The callback ended the search."
    return OptimizeResult(
        x=point.structured(point.vector.values()),
        **fields,
        optimality=optimality,
        success=status in (Status.CONVERGED, Status.STATIONARY),
        status=status,
        message=message,
        nit=end.nit,
        nfev=point.calls,
        products=end.products,
    )
