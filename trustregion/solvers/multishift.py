"""Many dampings of one system, solved in one Krylov space."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..arguments import check_count, check_number, check_tolerances, check_vector
from ..operators.base import OperatorLike
from .krylov import KrylovSpace
from .solution import LinearSolution, join


@torch.no_grad()
def multishift_cg(
    A: OperatorLike,
    b: Tensor,
    shifts: Iterable[float],
    *,
    M: OperatorLike | None = None,
    rtol: float | Callable[[float], float] = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
) -> LinearSolution:
    r"""Solve :math:`(A + \sigma M^{-1}) x = b` for many shifts at the price of one.

    The Krylov space does not depend on the shift, so all systems share the products of the hardest
    one. The basis is stored and fully orthogonalized (:func:`lanczos`); each column is therefore
    the iterate of :func:`cg` for its shift without the delay that rounding causes. If shifts are
    chosen one after another, use :func:`lanczos` and :meth:`KrylovSpace.solve`.

    Cost: one product with ``A`` and one with ``M`` per iteration, and one for each column whose
    convergence is in doubt in this precision. Memory: one float64 vector per iteration, two with
    ``M``.

    Args:
        A: a :class:`LinearOperator`, a square tensor or a callable.
        b: right-hand side, shape ``(n,)``, float32 or float64.
        shifts: the dampings, of either sign; the matrices are expected to be positive definite.
        M: positive definite preconditioner, an approximation of the inverse of ``A``. The shift is
            along its inverse: for a shift along the identity, leave it out.
        rtol: tolerance relative to the norm of ``b``, for every column.
        atol: absolute tolerance.
        max_iter: limit on iterations; the size of ``b`` if None, where the space ends.

    Returns:
        ``x`` of shape ``(n, len(shifts))``, and the account of each shift in ``columns``. A column
        with a matrix that is not positive definite ends as ``NEGATIVE_CURVATURE`` or
        ``ZERO_CURVATURE``; the others go on.

    Raises:
        TypeError: ``b`` is not a real floating-point vector, or ``A`` or ``M`` is not an operator.
        ValueError: shapes or dtypes do not match, a shift is not finite, or there is none.

    Example:
        >>> A, b = torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([6.0, 12.0])
        >>> solution = multishift_cg(A, b, [0.0, 1.0, 4.0])
        >>> solution.x
        tensor([[6.0000, 3.0000, 1.2000],
                [6.0000, 4.0000, 2.0000]])
        >>> solution.products
        2

    References:
        Frommer and Maass, Fast CG-Based Methods for Tikhonov-Phillips Regularization, 1999; van den
        Eshof and Sleijpen, Accurate conjugate gradient methods for families of shifted systems,
        2004.

    """
    check_vector("b", b)
    check_tolerances(rtol, atol)
    check_count("max_iter", max_iter)
    shifts = [float(shift) for shift in shifts]
    if not shifts:
        raise ValueError("shifts is empty: pass at least one damping")
    for shift in shifts:
        check_number("a shift", shift)
    space = KrylovSpace(A, b, M)
    limit = b.numel() if max_iter is None else max_iter
    waiting = list(shifts)
    while waiting and space.extend(next_block(space.size, limit)):
        waiting = [s for s in waiting if space.is_too_small(damping=s, rtol=rtol, atol=atol)]
    columns = [space.solve(s, rtol=rtol, atol=atol, verify=True) for s in shifts]
    return replace(join(b, columns), products=space.products + sum(c.products for c in columns))


def next_block(size: int, limit: int) -> int:
    """Return how many vectors to add to a space before its next convergence test.

    For a radius a test takes an eigendecomposition of ``T``. Small spaces grow by one vector, since
    the test is then cheap next to a product; from 32 on they grow by a sixteenth, so that tests are
    few and at most 6 % of the products superfluous.
    """
    return min(max(1, size // 16), limit - size)
