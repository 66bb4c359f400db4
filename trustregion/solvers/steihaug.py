"""The truncated conjugate gradients of Steihaug and Toint for the trust-region subproblem."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..arguments import check_count, check_radius, check_tolerances, check_vector, finite
from ..operators.base import LinearOperator, OperatorLike, as_operator, product
from ..status import Status
from ..vector import dot, norm
from .cg import conjugate_gradients
from .products import answer
from .refinement import Correction, Line, Run
from .region import Ball, region
from .solution import SubproblemSolution
from .stopping import Tolerance, surely_below, why_no_direction


@torch.no_grad()
def steihaug(
    A: OperatorLike,
    g: Tensor,
    radius: float,
    *,
    M: OperatorLike | None = None,
    rtol: float | Callable[[float], float] = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
) -> SubproblemSolution:
    r"""Minimize :math:`g's + \frac12 s'As` over :math:`\|s\| \le \Delta`, approximately.

    Conjugate gradients solve :math:`As = -g` from zero until the residual is small, the path leaves
    the region, or a direction without positive curvature appears. In the second case the step ends
    where the path crosses the edge; in the third it follows the direction to the edge, at the end
    where the model is lower. The norm is :math:`\|s\|^2 = s'M^{-1}s`, in which the iterates grow,
    so that the path crosses the edge only once. For a positive definite ``A`` the model decreases
    by at least half of the optimal reduction. For an indefinite ``A`` prefer :func:`gltr`.

    Cost: one product with ``A`` and one with ``M`` per iteration, and one more if convergence is in
    doubt in this precision. Memory: five float64 vectors, seven with ``M``. The model value and the
    norm cost no product.

    Args:
        A: a :class:`LinearOperator`, a square tensor or a callable; symmetric, may be indefinite.
        g: the gradient, shape ``(n,)``, float32 or float64.
        radius: :math:`\Delta`, positive.
        M: positive definite preconditioner, an approximation of the inverse of ``A``.
        rtol: tolerance on the residual relative to the norm of ``g``, or a function
            of that norm that returns it, such as :func:`forcing_sequence`.
        atol: absolute tolerance on the norm of the residual.
        max_iter: maximum number of iterations; ``10 n`` if None.

    Returns:
        The step: ``CONVERGED`` inside the region, ``BOUNDARY`` or ``NEGATIVE_CURVATURE`` (or
        ``ZERO_CURVATURE``) at its edge; see :class:`SubproblemSolution`.

    Raises:
        TypeError: ``g`` is not a real floating-point vector, or ``A`` or ``M`` is not an operator.
        ValueError: shapes or dtypes do not match, the radius is not positive, or a tolerance is
            negative.

    Example:
        >>> A, g = torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([-2.0, 0.0])
        >>> step = steihaug(A, g, radius=1.0)
        >>> step.s, step.status, step.predicted_reduction
        (tensor([1., 0.]), <Status.BOUNDARY: 'boundary'>, 1.5)

    References:
        Steihaug, The Conjugate Gradient Method and Trust Regions in Large Scale Optimization,
        1983; Conn, Gould and Toint, Trust-Region Methods, 2000, Alg. 7.5.1; Yuan, On the
        Truncated Conjugate Gradient Method, 2000.

    """
    check_vector("g", g)
    check_radius("radius", radius)
    check_tolerances(rtol, atol)
    check_count("max_iter", max_iter)
    A = as_operator(A, g)
    M = None if M is None else as_operator(M, g)
    problem = region(g, radius)
    if isinstance(problem, SubproblemSolution):
        return problem
    tolerance = Tolerance(rtol, atol).of(problem.b, problem.e)
    limit = 10 * g.numel() if max_iter is None else max_iter

    def leaves(run: Run, p: Tensor, w: Tensor, alpha: float) -> bool:
        if not 0 < dot(p, w) < math.inf:
            return True  # M is not positive definite
        return alpha >= to_the_edge(run.x, run.y, p, w, problem.radius)[0]

    system = Correction(problem.b, tolerance, limit)
    run = answer(A, conjugate_gradients(system, g.dtype, M, leaves=leaves))
    status, at_edge = run.status or Status.CONVERGED, False
    if run.line is not None:
        status, at_edge = _follow(run, run.line, status, problem.radius)
    elif status is Status.CONVERGED:
        margin = run.margin(problem.rounding(run.x), problem.eps)
        if math.sqrt(run.rr) + margin > tolerance:
            status = _measure(A, problem, run, tolerance)
    s, r, b = run.x, run.r, problem.b
    return problem.account(
        s,
        status,
        iterations=run.iterations,
        products=run.products,
        size=math.sqrt(max(dot(s, run.y), 0.0)),
        reduction=0.5 * dot(s, b + r),
        curvature=dot(s, b - r),
        residual_norm=norm(r),
        on_boundary=at_edge,
        multiplier=math.nan if status in EDGE else 0.0,
        direction=run.direction,
    )


EDGE = (Status.BOUNDARY, Status.NEGATIVE_CURVATURE, Status.ZERO_CURVATURE)


def _follow(run: Run, line: Line, status: Status, radius: float) -> tuple[Status, bool]:
    """Move along the line to the edge, or to its minimum; return the status and if at the edge."""
    p, w, Ap, rz, pAp, _ = line
    if status is Status.BOUNDARY:
        run.direction = None
    size = dot(p, w)
    if not 0 < size < math.inf:
        return why_no_direction(size), False
    forth, back = to_the_edge(run.x, run.y, p, w, radius)
    taus = [forth]
    if status is not Status.BOUNDARY:
        # A curvature that is positive, if only by rounding, has a minimum before the edge.
        taus += [back, rz / pAp] if 0 < rz < forth * pAp else [back]
    tau = min(taus, key=lambda t: t * (0.5 * t * pAp - rz))  # the change of the model
    run.move(p, w, tau)
    run.r = torch.add(run.r, Ap, alpha=-tau)
    run.iterations += 1
    return status, tau in (forth, back)


def to_the_edge(x: Tensor, y: Tensor, p: Tensor, w: Tensor, radius: float) -> tuple[float, float]:
    """Return both roots ``tau`` of ``|x + tau p| = radius``, the positive one first.

    The norm is that of ``M^-1``, with ``y = M^-1 x`` and ``w = M^-1 p``. The roots are computed in
    units of the radius and without a difference of nearly equal numbers.
    """
    unit = math.sqrt(dot(p, w))
    along = dot(x, w) / unit / radius
    room = max(1 - dot(x, y) / radius / radius, 0.0)
    root = math.sqrt(along * along + room)
    forth = room / (along + root) if along > 0 else root - along
    back = -room / (root - along) if along < 0 else -(root + along)
    return forth * radius / unit, back * radius / unit


def _measure(A: LinearOperator, problem: Ball, run: Run, tolerance: float) -> Status:
    """Replace the recurred residual by the true one, and return the status that it proves."""
    run.products += 1
    r = problem.b - product(A, run.x.to(problem.dtype)).double()
    if not finite(r):
        return Status.NONFINITE_OPERATOR
    run.r = r
    rounding = problem.eps * run.norm_A * norm(run.x)
    below = surely_below(norm(r), rounding, tolerance)
    return Status.CONVERGED if below else Status.STAGNATED
