"""Preconditioned conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..operators.base import LinearOperator, OperatorLike, as_operator
from ..status import Status
from ..vector import dot, exponent, ldexp, norm, scalar_ldexp
from .solution import LinearSolution


@torch.no_grad()
def cg(
    A: OperatorLike,
    b: Tensor,
    x0: Tensor | None = None,
    *,
    M: OperatorLike | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
    callback: Callable[[Tensor], object] | None = None,
) -> LinearSolution:
    r"""Solve :math:`A x = b` for symmetric positive definite ``A`` by conjugate gradients.

    Each iterate minimises :math:`\frac12 x'Ax - b'x` over a growing Krylov space. The kernel stops
    when :math:`\|b - Ax\| \le \max(\mathrm{rtol}\,\|b\|, \mathrm{atol})`, and at anything that
    makes the next iterate meaningless: an ``A`` or ``M`` that is not positive definite, or a value
    that is not finite. It never raises for numerical trouble and never returns a NaN.

    How it differs from the textbook, and why:

    1. ``b`` is scaled to unit size by a power of two, so that scaling ``b`` or ``A`` by a power of
       two scales ``x`` bit for bit and nothing overflows early. There are no absolute constants.
    2. Inner products are taken in float64, also for float32 vectors.
    3. Curvature is judged against the largest ``|Ap|/|p|`` seen, a lower bound of ``|A|``: a value
       below ``eps`` times that is rounding, not curvature.
    4. ``x'Ax`` is returned as ``x'(b - r)``. The shortcut ``x'b``, exact in exact arithmetic, is
       off by up to 3e-3 in float32.

    Cost: one product with ``A`` and one with ``M`` an iteration, one more with ``A`` for ``x0``;
    O(n) memory (four vectors).

    Args:
        A: a :class:`LinearOperator`, a square tensor, or a callable ``v -> A v``.
        b: right-hand side, shape ``(n,)``, float32 or float64.
        x0: starting point, shape ``(n,)``; zero when None. Not written to.
        M: preconditioner, an approximation of the inverse of ``A``, positive definite.
        rtol: tolerance relative to the norm of ``b``.
        atol: absolute tolerance on the residual's norm.
        max_iter: limit on iterations; ``10 n`` when None.
        callback: called with the current iterate after each iteration.

    Returns:
        The solution and how it ended; see :class:`LinearSolution`.

    Raises:
        TypeError: ``b`` is not a real floating vector, or ``A`` or ``M`` is not an operator.
        ValueError: shapes or dtypes do not fit, or a tolerance or limit is negative.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
        >>> solution = cg(A, torch.ones(3))
        >>> solution.x
        tensor([1.0000, 0.5000, 0.2500])
        >>> solution.status, solution.iterations
        (<Status.CONVERGED: 'converged'>, 3)

    References:
        Hestenes and Stiefel, Methods of Conjugate Gradients, 1952; Nocedal and Wright, Numerical
        Optimization, 2006, Alg. 5.3.

    """
    _check(b, x0, rtol, atol, max_iter)
    A = as_operator(A, b)
    M = None if M is None else as_operator(M, b)
    zero = torch.zeros_like(b)
    start = zero if x0 is None else x0.clone()
    if not (_finite(b) and _finite(start)):
        x = start if _finite(start) else zero
        return LinearSolution(x, Status.NONFINITE_INPUT, 0, 0, math.inf, 0.0)
    e = exponent(b)
    if e is None:  # b = 0, whose solution is 0
        return LinearSolution(zero, Status.CONVERGED, 0, 0, 0.0, 0.0)
    b, start = ldexp(b, -e), ldexp(start, -e)
    tolerance = max(rtol * norm(b), scalar_ldexp(atol, -e))
    limit = 10 * b.numel() if max_iter is None else max_iter
    unscaled = None if callback is None else lambda x: callback(ldexp(x, e))
    solution = _iterate(A, b, start if x0 is not None else None, M, tolerance, limit, unscaled)
    x = ldexp(solution.x, e)
    status = solution.status
    if not _finite(x):  # the solution itself overflows the dtype
        x, status = zero if x0 is None else x0.clone(), Status.NONFINITE_OPERATOR
    return LinearSolution(
        x,
        status,
        solution.iterations,
        solution.products,
        scalar_ldexp(solution.residual_norm, e),
        scalar_ldexp(solution.curvature, 2 * e),
        solution.direction,
    )


def _iterate(
    A: LinearOperator,
    b: Tensor,
    x0: Tensor | None,
    M: LinearOperator | None,
    tolerance: float,
    max_iter: int,
    callback: Callable[[Tensor], object] | None,
) -> LinearSolution:
    """Run Alg. 5.3 of Nocedal and Wright on a system of unit scale, with r = b - Ax."""
    eps, largest = torch.finfo(b.dtype).eps, torch.finfo(b.dtype).max
    x = torch.zeros_like(b) if x0 is None else x0
    r = b.clone() if x0 is None else b - A.mv(x0)
    products, iterations = int(x0 is not None), 0
    rr, rz = dot(r, r), 1.0
    norm_A = 0.0  # largest |Ap|/|p| so far
    reach = norm(x)  # a bound of |x|
    p: Tensor | None = None

    def end(status: Status, direction: Tensor | None = None) -> LinearSolution:
        curvature = dot(x, b - r)
        return LinearSolution(x, status, iterations, products, math.sqrt(rr), curvature, direction)

    if not math.isfinite(rr):
        x, r, rr = torch.zeros_like(b), b, dot(b, b)
        return end(Status.NONFINITE_OPERATOR)
    while True:
        if math.sqrt(rr) <= tolerance:
            return end(Status.CONVERGED)
        if iterations >= max_iter:
            return end(Status.MAX_ITER)
        z = r if M is None else M.mv(r)
        rz, rz_old = (rr if M is None else dot(r, z)), rz
        if not math.isfinite(rz):
            return end(Status.NONFINITE_OPERATOR)
        if rz <= 0:
            return end(Status.INDEFINITE_PRECONDITIONER)
        beta = min(rz / rz_old, largest)
        p = z.clone() if p is None else torch.add(z, p, alpha=beta)
        Ap = A.mv(p)
        products += 1
        pAp, pp, ApAp = _quadratic_forms(p, Ap)
        if not (pp > 0 and math.isfinite(pp + ApAp)):  # pp = 0: p underflowed
            return end(Status.NONFINITE_OPERATOR)
        norm_A = max(norm_A, math.sqrt(ApAp / pp))
        if pAp <= eps * norm_A * pp:
            negative = pAp < -eps * norm_A * pp
            return end(Status.NEGATIVE_CURVATURE if negative else Status.ZERO_CURVATURE, p)
        alpha = rz / pAp
        reach += alpha * math.sqrt(pp)
        if not max(alpha, reach) <= largest:
            return end(Status.NONFINITE_OPERATOR)
        r_next = torch.add(r, Ap, alpha=-alpha)
        rr_next = dot(r_next, r_next)
        if not math.isfinite(rr_next):
            return end(Status.NONFINITE_OPERATOR)
        x, r, rr = torch.add(x, p, alpha=alpha), r_next, rr_next
        iterations += 1
        if callback is not None:
            callback(x)


def _quadratic_forms(p: Tensor, Ap: Tensor) -> tuple[float, float, float]:
    """Return p'Ap, p'p and (Ap)'(Ap), each accumulated in float64; the vectors converted once."""
    p, Ap = p.double(), Ap.double()
    return dot(p, Ap), dot(p, p), dot(Ap, Ap)


def _check(b: Tensor, x0: Tensor | None, rtol: float, atol: float, max_iter: int | None) -> None:
    if not isinstance(b, Tensor) or b.dtype not in (torch.float32, torch.float64):
        given = b.dtype if isinstance(b, Tensor) else type(b).__name__
        raise TypeError(f"b must be a float32 or float64 tensor, got {given}")
    if b.ndim != 1:
        raise ValueError(f"b must be a vector of shape (n,), got shape {tuple(b.shape)}")
    if x0 is not None and (x0.shape != b.shape or x0.dtype != b.dtype):
        raise ValueError(
            f"x0 must have the shape {tuple(b.shape)} and dtype {b.dtype} of b,"
            f" got shape {tuple(x0.shape)} and dtype {x0.dtype}"
        )
    if not (rtol >= 0 and atol >= 0):
        raise ValueError(f"rtol and atol must not be negative, got rtol={rtol}, atol={atol}")
    if max_iter is not None and not (isinstance(max_iter, int) and max_iter >= 0):
        raise ValueError(f"max_iter must be an integer and not negative, got {max_iter}")


def _finite(u: Tensor) -> bool:
    return bool(u.isfinite().all())
