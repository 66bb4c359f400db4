"""The trust-region subproblem by a full eigendecomposition, for small n."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..arguments import check_radius, check_tolerances, check_vector, finite
from ..operators.base import OperatorLike, as_operator, to_dense
from ..status import Status
from ..vector import dot, exponent, ldexp, norm
from .region import no_step, region
from .secular import minimize_in_eigenbasis
from .solution import SubproblemSolution
from .stopping import Tolerance


@torch.no_grad()
def trust_region_dense(
    A: OperatorLike,
    g: Tensor,
    radius: float,
    *,
    M: OperatorLike | None = None,
    rtol: float | Callable[[float], float] = 1e-5,
    atol: float = 0.0,
) -> SubproblemSolution:
    r"""Minimize :math:`g's + \frac12 s'As` over :math:`\|s\| \le \Delta`, globally, for small n.

    The norm is :math:`\|s\|^2 = s'M^{-1}s`. With :math:`M = LL'` and :math:`s = Lz` the problem is
    one in :math:`L'AL` and the Euclidean norm, whose eigenvalues reduce it to one equation in one
    unknown. As the whole spectrum is known, the hard case is always recognized, and for ``g = 0``
    and an indefinite ``A`` the step follows the leftmost eigenvector. All computations are in
    float64.

    Cost: ``n`` products with an operator or a callable, none with a matrix, and about ``10 n^3``
    operations. This is cheaper than :func:`gltr` for up to a few hundred unknowns.

    Args:
        A: a square tensor, a :class:`LinearOperator` or a callable; symmetric, may be indefinite.
        g: the gradient, shape ``(n,)``, float32 or float64.
        radius: :math:`\Delta`, positive.
        M: preconditioner, positive definite; the metric is its inverse.
        rtol: tolerance on the residual relative to the norm of ``g``, or a function
            of that norm that returns it; for the status.
        atol: absolute tolerance, for the status.

    Returns:
        The step, with status ``CONVERGED``, or ``STAGNATED`` if its rounding exceeds the tolerance.

    Raises:
        TypeError: ``g`` is not a real floating-point vector, or ``A`` or ``M`` is not an operator.
        ValueError: shapes or dtypes do not match, the radius is not positive, or a tolerance is
            negative.

    Example:
        >>> A = torch.diag(torch.tensor([-2.0, 1.0]))
        >>> step = trust_region_dense(A, torch.tensor([0.0, 3.0]), radius=2.0)
        >>> step.hard_case, step.multiplier, step.s.abs()
        (True, 2.0, tensor([1.7321, 1.0000]))

    References:
        More and Sorensen, Computing a Trust Region Step, 1983; Conn, Gould and Toint, Trust-Region
        Methods, 2000, section 7.3.

    """
    check_vector("g", g)
    check_radius("radius", radius)
    check_tolerances(rtol, atol)
    problem = region(g, radius)
    if isinstance(problem, SubproblemSolution):
        return problem
    if not g.numel():
        return no_step(g, Status.CONVERGED)
    matrix, products = _matrix(A, g), 0 if isinstance(A, Tensor) else g.numel()
    if not finite(matrix):
        return no_step(g, Status.NONFINITE_OPERATOR, products=products)
    L = None if M is None else _factor(_matrix(M, g))
    if M is not None and L is None:
        return no_step(g, Status.INDEFINITE_PRECONDITIONER, products=products)
    inner, c = (matrix, problem.b) if L is None else (L.T @ matrix @ L, L.T @ problem.b)
    e = exponent(inner) or 0
    theta, V = torch.linalg.eigh(ldexp(inner, -e))
    found = minimize_in_eigenbasis(ldexp(theta, e), V.T @ c, problem.radius)
    z = V @ found.h
    s = z if L is None else L @ z
    y = z if L is None else torch.linalg.solve_triangular(L.T, z[:, None], upper=True)[:, 0]
    if found.on_boundary:  # h is there exactly, its rotation up to rounding
        s = s / math.sqrt(dot(s / problem.radius, y / problem.radius))
    s = s - problem.rounding(s)
    As = matrix @ s
    r, pull = problem.b - As, found.multiplier * y
    residual = norm(r - pull)
    tolerance = Tolerance(rtol, atol).of(problem.b, problem.e)
    if not g.any() and not callable(rtol):  # rtol is then relative to the pull of the multiplier
        tolerance = max(tolerance, rtol * norm(pull))
    below = residual <= tolerance
    return problem.account(
        s,
        Status.CONVERGED if below else Status.STAGNATED,
        iterations=0,
        products=products,
        size=norm(found.h),
        reduction=0.5 * dot(s, problem.b + r),
        curvature=dot(s, As),
        residual_norm=residual,
        on_boundary=found.on_boundary,
        multiplier=found.multiplier,
        hard_case=found.hard_case,
    )


def _matrix(A: OperatorLike, g: Tensor) -> Tensor:
    """Return the symmetric part of an operator as a float64 matrix."""
    matrix = to_dense(as_operator(A, g)).double()
    return (matrix + matrix.T) / 2


def _factor(M: Tensor) -> Tensor | None:
    """Return the Cholesky factor of a positive definite matrix, None for any other."""
    L, info = torch.linalg.cholesky_ex(M)
    return L if info.item() == 0 and finite(L) else None
