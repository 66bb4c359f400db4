"""Small dense least squares under inequalities: non-negative, and of least distance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_count, check_vector, finite
from ..status import Status
from ..vector import exponent, ldexp, norm, scalar_ldexp

EPS, LARGEST = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).max
VERIFIED = 1e-10  # relative: the point found meets every bound


@dataclass(frozen=True, kw_only=True, eq=False)
class NonnegativeSolution:
    """The result of a non-negative least squares problem.

    Attributes:
        x: the solution, shape ``(n,)``, finite and not negative.
        status: ``CONVERGED``; ``MAX_ITER`` with the best ``x`` found; ``NONFINITE_INPUT``, or
            ``NONFINITE_OPERATOR`` if ``x`` overflows, both with a zero ``x``.
        residual_norm: the norm of ``A x - b``.
        iterations: the number of least squares problems solved.

    """

    x: Tensor
    status: Status
    residual_norm: float
    iterations: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ShortestPoint:
    r"""The point of a polyhedron :math:`Gx \ge h` nearest to the origin.

    Attributes:
        x: the point, shape ``(n,)``; zero if there is none.
        multipliers: :math:`\lambda \ge 0` with :math:`x = G'\lambda`, shape ``(m,)``; zero if there
            is no point.
        active: a mask of the active constraints, shape ``(m,)``; their rows are independent.
        status: ``CONVERGED``, ``INFEASIBLE``, or ``STAGNATED`` if rounding hides which of the two
            it is; ``NONFINITE_INPUT``, ``NONFINITE_OPERATOR`` and ``MAX_ITER`` as in nnls.

    """

    x: Tensor
    multipliers: Tensor
    active: Tensor
    status: Status


@torch.no_grad()
def nnls(A: Tensor, b: Tensor, *, max_iter: int | None = None) -> NonnegativeSolution:
    r"""Minimize :math:`\|Ax - b\|` over :math:`x \ge 0` for a dense ``A`` of few columns.

    A variable is freed as long as its gradient :math:`A_j'(b - Ax)` exceeds ``10 max(m, n) eps
    |A_j| |b|``, the rounding of that product. All work is in float64, at unit scale.

    Cost: one singular value decomposition of the free columns for each change of the free set;
    about ``n`` changes are usual.

    Args:
        A: the matrix, shape ``(m, n)``, float32 or float64.
        b: the right-hand side, shape ``(m,)``, of the dtype of ``A``.
        max_iter: maximum number of least squares problems; ``10 n`` if None.

    Raises:
        TypeError: ``b`` is not a real floating-point tensor.
        ValueError: shapes or dtypes do not match, or ``max_iter`` is negative.

    Example:
        >>> nnls(torch.eye(2), torch.tensor([1.0, -1.0])).x
        tensor([1., 0.])

    References:
        Lawson and Hanson, Solving Least Squares Problems, 1974, algorithm 23.10.

    """
    check_vector("b", b)
    check_count("max_iter", max_iter)
    _check_matrix("A", A, b)
    zero, e = A.new_zeros(A.shape[1]), exponent(b) or 0
    if not (finite(A) and finite(b)):
        return NonnegativeSolution(
            x=zero, status=Status.NONFINITE_INPUT, residual_norm=math.inf, iterations=0
        )
    unit, powers = _at_unit_scale(A.T)
    target = ldexp(b.double(), -e)
    limit = 10 * A.shape[1] if max_iter is None else max_iter
    unit, target = unit.cpu(), target.cpu()  # small, and no device has this factorization
    y, iterations, done = _active_set(unit.T, target, limit)
    x = zero.new_tensor([scalar_ldexp(v, e - p) for v, p in zip(y.tolist(), powers, strict=True)])
    status = Status.CONVERGED if done else Status.MAX_ITER
    if not finite(x):
        x, y, status = zero, torch.zeros_like(y), Status.NONFINITE_OPERATOR
    size = norm(target - unit.T @ y)
    return NonnegativeSolution(
        x=x, status=status, residual_norm=scalar_ldexp(size, e), iterations=iterations
    )


@torch.no_grad()
def least_distance(G: Tensor, h: Tensor) -> ShortestPoint:
    r"""Minimize :math:`\|x\|` subject to :math:`Gx \ge h`, by one call of :func:`nnls`.

    The residual of :math:`[G, h]' u \approx (0, \ldots, 0, 1)` over :math:`u \ge 0` has the length
    :math:`(1 + \|x\|^2)^{-1/2}`, zero if there is no point. Rows are scaled to unit norm, and the
    unit of length is the distance of the farthest half-space. A point farther than ``eps^-1/2``
    such units counts as none, since without rounding the constraints would contradict each other.

    Cost: a :func:`nnls` of ``m`` columns, one of the active rows, and their factorization.

    Args:
        G: the normals, shape ``(m, n)``, float32 or float64.
        h: the bounds, shape ``(m,)``, of the dtype of ``G``; minus infinity for no bound.

    Raises:
        TypeError: ``h`` is not a real floating-point tensor.
        ValueError: shapes or dtypes do not match.

    Example:
        >>> least_distance(torch.eye(2), torch.tensor([2.0, -1.0])).x
        tensor([2., 0.])

    References:
        Lawson and Hanson, Solving Least Squares Problems, 1974, algorithm 23.27 (LDP).

    """
    check_vector("h", h)
    _check_matrix("G", G, h)
    if not (finite(G) and bool((h < math.inf).all())):
        return _origin(G, h, Status.NONFINITE_INPUT)
    unit, powers = _at_unit_scale(G)
    sizes = torch.linalg.vector_norm(unit, dim=1)
    live = sizes > 0
    if bool((h[~live] > 0).any()):
        return _origin(G, h, Status.INFEASIBLE)
    sizes = torch.where(live, sizes, 1.0)
    rows = unit / sizes.unsqueeze(1)
    bounds = [scalar_ldexp(v, -p) for v, p in zip(h.tolist(), powers, strict=True)]
    distances = torch.where(live, sizes.new_tensor(bounds) / sizes, -math.inf)
    e = exponent(distances.clamp(min=0.0, max=LARGEST))
    if e is None:  # no bound is positive: the origin is in the polyhedron
        return _origin(G, h, Status.CONVERGED)
    heights = ldexp(distances.clamp(max=LARGEST), -e).clamp(min=-1 / math.sqrt(EPS))
    active, status = _active_rows(rows, heights)
    if status is not Status.CONVERGED:
        return _origin(G, h, status)
    y, weights = lowest_point(rows[active], heights[active])
    met = rows @ y >= heights - VERIFIED * (heights.abs() + norm(y))
    if not (bool(met.all()) and bool((weights >= -VERIFIED * weights.abs().max()).all())):
        return _origin(G, h, Status.STAGNATED)
    shares = torch.zeros_like(heights)
    shares[active] = weights.clamp(min=0.0) / sizes[active]
    scaled = [scalar_ldexp(v, e - p) for v, p in zip(shares.tolist(), powers, strict=True)]
    x, multipliers = ldexp(y, e).to(G.dtype), h.new_tensor(scaled)
    if not (finite(x) and finite(multipliers)):
        return _origin(G, h, Status.NONFINITE_OPERATOR)
    return ShortestPoint(x=x, multipliers=multipliers, active=active, status=Status.CONVERGED)


def lowest_point(B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shortest ``x`` with ``B x = h`` and the weights with ``x = B'w``, float64.

    The rows of ``B``, shape ``(k, n)``, are independent.
    """
    Q, R = torch.linalg.qr(B.T)
    z = torch.linalg.solve_triangular(R.T, h.unsqueeze(1), upper=False)
    return (Q @ z).squeeze(1), torch.linalg.solve_triangular(R, z, upper=True).squeeze(1)


def _active_rows(rows: Tensor, heights: Tensor) -> tuple[Tensor, Status]:
    """Return which rows are active at the shortest ``x`` with ``rows x >= heights``, and a status.

    The solution can contain two rows that are parallel up to rounding, of which ``x`` needs one.
    The rows of a non-negative combination that yields ``x`` are independent.
    """
    tower = torch.cat([rows.T, heights.unsqueeze(0)])
    up = torch.zeros_like(tower[:, 0])
    up[-1] = 1.0
    solution = nnls(tower, up)
    active = solution.x > 0
    if solution.status is not Status.CONVERGED:
        return active, solution.status
    if solution.residual_norm <= math.sqrt(EPS):
        return active, Status.INFEASIBLE
    x = rows.T @ solution.x / solution.residual_norm**2  # the last residual, without cancellation
    combination = nnls(rows[active].T, x)
    active[active.clone()] = combination.x > 0
    return active, combination.status


def _origin(G: Tensor, h: Tensor, status: Status) -> ShortestPoint:
    return ShortestPoint(
        x=G.new_zeros(G.shape[1]),
        multipliers=torch.zeros_like(h),
        active=torch.zeros_like(h, dtype=torch.bool),
        status=status,
    )


def _check_matrix(name: str, A: object, b: Tensor) -> None:
    given = type(A).__name__
    if isinstance(A, Tensor):
        if (A.ndim, A.dtype, A.shape[:1]) == (2, b.dtype, b.shape):
            return
        given = f"{tuple(A.shape)}, {A.dtype}"
    raise ValueError(f"{name} must be a matrix of {len(b)} rows of dtype {b.dtype}, got {given}")


def _at_unit_scale(rows: Tensor) -> tuple[Tensor, list[int]]:
    """Return each row in float64 with its largest entry in [1/2, 1), and its power of two."""
    powers = [exponent(row) or 0 for row in rows]
    scaled = [ldexp(row.double(), -p) for row, p in zip(rows, powers, strict=True)]
    return torch.stack(scaled) if scaled else rows.double(), powers


def _active_set(A: Tensor, b: Tensor, limit: int) -> tuple[Tensor, int, bool]:
    """Return ``x``, the number of least squares problems, and whether the optimum was reached."""
    x = A.new_zeros(A.shape[1])
    free = torch.zeros_like(x, dtype=torch.bool)
    barred = torch.zeros_like(free)  # freed in vain: the gradient was positive by rounding only
    floor = 10 * max(A.shape) * EPS * norm(b) * torch.linalg.vector_norm(A, dim=0)
    iterations = 0
    while True:
        gradient = A.T @ (b - A @ x)
        wanted = (gradient > floor) & ~free & ~barred
        if not bool(wanted.any()):
            return x, iterations, True
        j = int(torch.where(wanted, gradient, -math.inf).argmax())
        free[j] = True
        while bool(free.any()):
            if iterations >= limit:
                return x, iterations, False
            z = torch.zeros_like(x)
            fit = torch.linalg.lstsq(A[:, free], b.unsqueeze(1), driver="gelsd")
            z[free] = fit.solution.squeeze(1)
            iterations += 1
            blocking = free & (z <= 0)
            dependent = int(fit.rank) < int(free.sum())
            if x[j] == 0 and (dependent or bool(blocking[j])):
                free[j], barred[j] = False, True
                break
            if not bool(blocking.any()):
                x = z
                barred.zero_()
                break
            reach = torch.where(blocking, x / (x - z), math.inf)
            x = x + reach.min() * (z - x)
            free &= (x > 0) & (reach > reach.min())
            x = torch.where(free, x, 0.0)
