"""The Lanczos basis of a Krylov space."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_count, check_vector
from ..operators.base import OperatorLike
from .krylov import KrylovSpace


@torch.no_grad()
def lanczos(
    A: OperatorLike, b: Tensor, *, M: OperatorLike | None = None, max_iter: int
) -> KrylovSpace:
    r"""Return the Krylov space of ``A`` and ``b`` in the metric of ``M``, with its basis.

    Cost: ``max_iter`` products with ``A`` and one more with ``M``. Keeping the basis orthogonal to
    rounding takes ``8 n`` operations per pair of vectors; for ``k`` up to 50 and an operator of a
    network on a thousand samples, this is about one hundredth of the cost of the products.

    Args:
        A: a :class:`LinearOperator`, a square tensor or a callable; symmetric, may be indefinite.
        b: the first vector, shape ``(n,)``, float32 or float64.
        M: positive definite preconditioner, an approximation of the inverse of ``A``.
        max_iter: number of vectors; the space can be extended later.

    Raises:
        TypeError: ``b`` is not a real floating-point vector, or ``A`` or ``M`` is not an operator.
        ValueError: shapes or dtypes do not match, or ``max_iter`` is negative.

    References:
        Lanczos, An Iteration Method for the Solution of the Eigenvalue Problem, 1950; Parlett, The
        Symmetric Eigenvalue Problem, 1980, chapter 13; Gould, Lucidi, Roma and Toint, Solving the
        Trust-Region Subproblem using the Lanczos Method, 1999.

    """
    check_vector("b", b)
    check_count("max_iter", max_iter)
    space = KrylovSpace(A, b, M)
    space.extend(max_iter)
    return space
