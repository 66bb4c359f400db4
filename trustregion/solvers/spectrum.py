"""Diagonal, trace and largest eigenvalues of an operator, from its products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import as_count, check_count, check_tolerances
from ..operators.base import LinearOperator, product
from ..status import Status
from ..vector import exponent, ldexp, norm
from .stopping import surely_below
from .tridiagonal import Tridiagonalization

_BLOCK = 64  # unit vectors per block, which takes 64 n of memory
_CHECK = 5  # vectors between two tests of the Ritz values


@torch.no_grad()
def diagonal(A: LinearOperator, *, probes: int | None = None, seed: int = 0) -> Tensor:
    r"""Return the diagonal of ``A``, shape ``(n,)``, exact or estimated.

    The exact diagonal costs ``n`` products. ``probes`` asks for Hutchinson's estimate, the mean of
    :math:`z \odot A z` over vectors ``z`` of random signs. It is unbiased; entry *i* has the
    variance :math:`\sum_{j \ne i} A_{ij}^2` over the number of probes. An estimate can be negative
    even if the diagonal is not.

    Args:
        A: a symmetric operator.
        probes: number of products for an estimate; None for the exact value at ``n`` products.
        seed: seed of the signs, which come from a separate generator.

    Raises:
        ValueError: ``probes`` is not a positive integer.

    Example:
        >>> from trustregion.operators import DenseOperator
        >>> A = DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
        >>> diagonal(A), diagonal(A, probes=1000)
        (tensor([2., 3.]), tensor([2.0260, 3.0260]))

    References:
        Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix, 2007.

    """
    n = A.shape[0]
    if probes is not None:
        as_count("probes", probes, 1)
        total = torch.zeros(n, dtype=torch.float64, device=A.device)
        for z in _signs(A, probes, seed):
            total += z.double() * product(A, z).double()
        return (total / probes).to(A.dtype)
    out = torch.empty(n, dtype=A.dtype, device=A.device)
    for start in range(0, n, _BLOCK):
        width = min(_BLOCK, n - start)
        units = torch.zeros(n, width, dtype=A.dtype, device=A.device)
        units[start : start + width].fill_diagonal_(1.0)
        out[start : start + width] = A.mm(units)[start : start + width].diagonal()
    return out


@torch.no_grad()
def trace(A: LinearOperator, *, probes: int | None = None, seed: int = 0) -> float:
    r"""Return the trace of ``A``, exact or estimated.

    The exact trace costs ``n`` products. ``probes`` asks for Hutchinson's estimate, the mean of
    :math:`z'Az` over vectors of random signs. It is unbiased; its variance is twice the sum of
    squares off the diagonal over the number of probes. For a positive semidefinite ``A`` the
    relative error is at most about ``sqrt(2 / probes)``, and far less if many eigenvalues
    contribute to the trace.

    Args:
        A: a symmetric operator.
        probes: number of products for an estimate; None for the exact value at ``n`` products.
        seed: seed of the signs, which come from a separate generator.

    Raises:
        ValueError: ``probes`` is not a positive integer.

    Example:
        >>> from trustregion.operators import DenseOperator
        >>> trace(DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 3.0]])))
        5.0

    References:
        Hutchinson, A stochastic estimator of the trace of the influence matrix, 1989.

    """
    return float(diagonal(A, probes=probes, seed=seed).double().sum())


@dataclass(frozen=True, kw_only=True, eq=False)  # == on tensors is elementwise
class Eigenvalues:
    r"""The largest eigenvalues of an operator, from a Krylov space.

    Attributes:
        values: the eigenvalues in descending order, shape ``(k,)``, float64.
        vectors: the eigenvectors, of unit length, as columns, shape ``(n, k)``.
        residuals: the measured :math:`\|Av - \theta v\|` of each pair, shape ``(k,)``, float64. An
            eigenvalue lies within that distance of each value. Infinite if a product was not
            finite.
        status: ``CONVERGED`` if every residual is within the tolerance; otherwise ``MAX_ITER``,
            ``STAGNATED`` or the reason why the space could not grow.
        products: the number of products with ``A``.

    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    status: Status
    products: int


@torch.no_grad()
def largest_eigenvalues(
    A: LinearOperator, k: int = 1, *, rtol: float = 1e-3, max_iter: int | None = None, seed: int = 0
) -> Eigenvalues:
    r"""Return the ``k`` largest eigenvalues of ``A`` with their vectors, by the Lanczos method.

    They are Ritz values of the Krylov space of a random vector, whose basis is kept orthogonal. The
    residuals are measured. A Krylov space contains one vector of each eigenspace: a multiple
    eigenvalue is found once, or again by rounding, and the next eigenvalue takes its place. If a
    space ends before it has ``k`` dimensions, a second one continues it. Values much smaller than
    the norm of the operator, such as the largest ones of a negative semidefinite operator, are
    dominated by rounding and end as ``STAGNATED``.

    Cost: up to ``max_iter`` products for the space, and ``k`` to measure. Memory: the space.

    Args:
        A: a symmetric operator of any definiteness.
        k: number of eigenvalues.
        rtol: tolerance on the residuals, relative to the largest absolute value.
        max_iter: maximum dimension of the space; ``10 k + 30`` if None.
        seed: seed of the first vector, which comes from a separate generator.

    Returns:
        ``k`` values; fewer, or none, if the operator is not finite.

    Raises:
        ValueError: ``k`` or ``max_iter`` is not positive, or ``k`` is larger than ``n``.

    Example:
        >>> from trustregion.operators import DenseOperator
        >>> top = largest_eigenvalues(DenseOperator(torch.diag(torch.arange(9.0))), 2)
        >>> top.values.round(decimals=3), top.status
        (tensor([8., 7.], dtype=torch.float64), <Status.CONVERGED: 'converged'>)

    References:
        Parlett, The Symmetric Eigenvalue Problem, 1980, chapter 13.

    """
    n = A.shape[0]
    check_count("k", k)
    check_count("max_iter", max_iter)
    check_tolerances(rtol, 0.0)
    if not 1 <= k <= n:
        raise ValueError(f"k must lie between 1 and the dimension {n}, got {k}")
    limit = min(n, 10 * k + 30 if max_iter is None else max_iter)
    if limit < k:
        raise ValueError(f"max_iter must be at least k = {k}, got {max_iter}")
    generator = torch.Generator("cpu").manual_seed(seed)
    start = torch.randn(n, generator=generator, dtype=torch.float64, device="cpu").to(A.device)
    unit = _UnitScale(A)
    space = Tridiagonalization(unit, start, None, A.dtype)
    while space.size < limit and _too_small(space, k, rtol):
        if space.exhausted:
            if space.size >= k:
                break
            space.restart(generator)  # the one generator makes each start another
        if not space.grow():
            break
    theta, U = space.spectrum(space.size)
    theta = ldexp(theta, unit.exponent or 0)
    size = float(theta.abs().max()) if len(theta) else 0.0
    theta, U = theta.flip(0)[:k], U.flip(1)[:, :k]
    vectors = (space.Q.rows[: space.size].T @ U).to(A.dtype)
    residuals = _residuals(A, theta, vectors)
    tolerance = rtol * float(theta.abs().max()) if len(theta) else 0.0
    rounding = torch.finfo(A.dtype).eps * size
    status = space.status or Status.CONVERGED
    if status is Status.CONVERGED and not all(map(math.isfinite, residuals)):
        status = Status.NONFINITE_OPERATOR
    elif status is Status.CONVERGED and not all(
        surely_below(r, rounding, tolerance) for r in residuals
    ):
        status = Status.MAX_ITER if space.size == limit < n else Status.STAGNATED
    measured = torch.tensor(residuals, dtype=torch.float64, device=A.device)
    return Eigenvalues(
        values=theta,
        vectors=vectors,
        residuals=measured,
        status=status,
        products=space.products + len(theta),
    )


class _UnitScale(LinearOperator):
    """An operator in units of ``2^exponent``, the size of its first product."""

    def __init__(self, A: LinearOperator) -> None:
        super().__init__(A.shape[0], A.dtype, A.device)
        self.A = A
        self.exponent: int | None = None

    def mv(self, v: Tensor) -> Tensor:
        """Return ``2^-exponent A v``."""
        out = product(self.A, v)
        if self.exponent is None:
            self.exponent = exponent(out) or 0
        return ldexp(out, -self.exponent)


def _residuals(A: LinearOperator, theta: Tensor, vectors: Tensor) -> list[float]:
    """Return ``|Av - theta v|`` of each column, infinite where ``Av`` is not finite."""
    if not len(theta):
        return []
    gaps = A.mm(vectors).double() - vectors.double() * theta
    return [norm(gap.nan_to_num(nan=math.inf)) for gap in gaps.T]


def _too_small(space: Tridiagonalization, k: int, rtol: float) -> bool:
    """Return whether a Ritz value has a residual above the tolerance, by the last coupling."""
    if space.size < k or (space.size % _CHECK and not space.exhausted):
        return True
    theta, U = space.spectrum(space.size)
    bounds = space.betas[-1] * U[-1].abs()[-k:]
    return bool((bounds > rtol * theta[-k:].abs().max()).any())


def _signs(A: LinearOperator, probes: int, seed: int) -> Iterator[Tensor]:
    """Yield vectors of random signs."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(probes):
        coins = torch.randint(2, (A.shape[0],), generator=generator, device="cpu")
        yield (2 * coins - 1).to(A.device, A.dtype)
