"""The trust-region subproblem solved in a growing Krylov space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..arguments import check_count, check_radius, check_tolerances, check_vector
from ..operators.base import OperatorLike
from .krylov import KrylovSpace
from .multishift import next_block
from .solution import SubproblemSolution

# A leftmost Ritz value is good to the square of its residual: to 1e-6 for this one.
RESOLVED = 1e-3


@torch.no_grad()
def gltr(
    A: OperatorLike,
    g: Tensor,
    radius: float,
    *,
    M: OperatorLike | None = None,
    rtol: float | Callable[[float], float] = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
    space: KrylovSpace | None = None,
) -> SubproblemSolution:
    r"""Minimize :math:`g's + \frac12 s'As` over :math:`\|s\| \le \Delta`, to a tolerance.

    The Krylov space of ``g`` grows until the minimizer in it satisfies

    .. math:: (A + \lambda M^{-1}) s = -g, \quad \lambda \ge 0, \quad \lambda(\Delta - \|s\|) = 0

    to the tolerance. ``A`` may be indefinite, and the norm is :math:`\|s\|^2 = s'M^{-1}s`. If the
    space becomes invariant, ``g`` is orthogonal to the other eigenvectors. A second space, started
    from a random vector orthogonal to the first, then searches for an eigenvalue below
    :math:`-\lambda`, whose eigenvector completes the step in the hard case.

    Cost: one product with ``A`` and one with ``M`` per iteration, and one more if convergence is in
    doubt in this precision. Memory: one float64 vector per iteration, two with ``M``.

    Args:
        A: a :class:`LinearOperator`, a square tensor or a callable; symmetric, may be indefinite.
        g: the gradient, shape ``(n,)``, float32 or float64.
        radius: :math:`\Delta`, positive.
        M: positive definite preconditioner, an approximation of the inverse of ``A``.
        rtol: tolerance on the residual of the equation above, relative to the norm of ``g``, or a
            rule that makes it from that norm, such as :func:`forcing_sequence`.
        atol: absolute tolerance.
        max_iter: maximum dimension of the space; ``n`` if None.
        space: a space of the same ``A`` (the same object) and ``-g``, made by
            ``lanczos(A, -g, M=M, max_iter=0)``, which holds ``M``. It is reused, and extended if it
            is too small. After a rejection, a step for a smaller radius usually costs no product.

    Returns:
        The step, ``CONVERGED`` inside the region or on its edge; see :class:`SubproblemSolution`.
        ``products`` counts the products of this call. ``CONVERGED`` means that the equation above
        holds and that ``s`` is the minimizer over the space. A space that reaches the tolerance
        well before it is invariant does not reveal an eigenvector to which ``g`` is orthogonal;
        :func:`trust_region_dense` considers all of them.

    Raises:
        TypeError: ``g`` is not a real floating-point vector, or ``A`` or ``M`` is not an operator.
        ValueError: shapes or dtypes do not match, the radius is not positive, a tolerance is
            negative, or the space is that of another gradient.

    Example:
        >>> A, g = torch.diag(torch.tensor([-2.0, 1.0])), torch.tensor([0.0, 3.0])
        >>> step = gltr(A, g, radius=2.0)
        >>> step.hard_case, round(step.multiplier, 6), step.s.abs()
        (True, 2.0, tensor([1.7321, 1.0000]))
        >>> from trustregion import lanczos
        >>> space = lanczos(A, -g, max_iter=0)
        >>> [gltr(A, g, radius, space=space).products for radius in (2.0, 1.0)]
        [2, 0]

    References:
        Gould, Lucidi, Roma and Toint, Solving the Trust-Region Subproblem using the Lanczos Method,
        1999; Lenders, Kirches and Potschka, trlib: a vector-free implementation of the GLTR method,
        2018.

    """
    check_vector("g", g)
    check_radius("radius", radius)
    check_tolerances(rtol, atol)
    check_count("max_iter", max_iter)
    if space is None:
        space = KrylovSpace(A, -g, M)
    elif M is not None:
        raise ValueError("space has its own preconditioner: pass M to lanczos instead")
    elif not space.is_of(A, -g):
        raise ValueError(
            "space is that of another gradient or operator: make one by lanczos(A, -g, max_iter=0),"
            " and pass the same A here"
        )
    limit = g.numel() if max_iter is None else max_iter
    before, grows = space.products, True
    while grows and space.size < limit:
        if not space.is_too_small(radius=radius, rtol=rtol, atol=atol) and not _might_miss(space):
            break
        if space.exhausted:
            space.restart()
        grows = space.extend(next_block(space.size, limit)) > 0
    step = space.minimize(radius, rtol=rtol, atol=atol, verify=True)
    return replace(step, products=step.products + space.products - before)


def _might_miss(space: KrylovSpace) -> bool:
    """Return whether an invariant space may lack an eigenvector that lowers the model.

    A second space beyond its end reveals a lower eigenvalue once its leftmost Ritz value has
    converged.
    """
    if space.status is not None:
        return False
    if space.exhausted:
        return not space.restarted
    beyond = space.beyond()
    if beyond is None:
        return False
    if not len(beyond):
        return True
    theta, U = torch.linalg.eigh(beyond)
    uncertainty = space.coupling * abs(U[-1, 0].item())
    return uncertainty > RESOLVED * theta.abs().max().item()
