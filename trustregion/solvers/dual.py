"""The damped system of ``J'HJ``, solved in the space of the outputs or of the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..arguments import (
    check_count,
    check_damping,
    check_radius,
    check_tolerances,
    check_vector,
    finite,
)
from ..operators.base import LinearOperator, OperatorLike, as_operator, to_dense
from ..operators.map import DenseMap, LinearMap, as_map, wide_mv, wide_rmv
from ..status import Status
from ..vector import dot, exponent, ldexp, norm, scalar_ldexp
from .cg import cg
from .dual_cost import flops
from .solution import LinearSolution
from .stopping import Tolerance

Method = Literal["auto", "dual", "primal"]
Rtol = float | Callable[[float], float]

# Iterations that ``auto`` expects where max_iter does not say: natural-gradient codes take 10
# (Schulman et al. 2015) to 250 (Martens 2010).
EXPECTED_ITERATIONS = 50


@dataclass(frozen=True, kw_only=True, eq=False)
class DualSolution(LinearSolution):
    """A :class:`LinearSolution` of ``(scale J'HJ + damping I) x = J'u``, and the method used.

    ``products`` is the number of products with ``J`` plus the number of products with ``J'``.

    Attributes:
        method: the method used, ``"dual"`` or ``"primal"``.
        primal_flops: the operations of the primal method, as :func:`dual_is_cheaper` counts them.
        dual_flops: the operations of the dual method.

    """

    method: Literal["dual", "primal"] = "primal"
    primal_flops: float = 0.0
    dual_flops: float = 0.0


@torch.no_grad()
def dual_solve(
    J: LinearMap | Tensor,
    u: Tensor,
    *,
    damping: float,
    metric: OperatorLike | None = None,
    scale: float = 1.0,
    method: Method = "auto",
    rtol: Rtol = 1e-5,
    max_iter: int | None = None,
) -> DualSolution:
    r"""Solve :math:`(s J'HJ + \lambda I) x = J'u` in the space of the outputs if that is cheaper.

    ``J`` of shape ``(m, n)`` is the Jacobian of the outputs of a model over all samples, ``H`` of
    shape ``(m, m)`` a positive semidefinite metric on the outputs, and ``u`` the derivative of the
    loss with respect to the outputs, so that ``J'u`` is the gradient. By the push-through identity

    .. math:: (s J'HJ + \lambda I)^{-1} J'u = J'(s H K + \lambda I)^{-1} u, \qquad K = JJ'

    the system has size ``m``, independently of ``n``. That matrix is not symmetric, and LU
    amplifies null vectors of ``K`` by :math:`1/\lambda`: at a damping of 1e-8 in float32, residuals
    reach 1e-1. Therefore ``K = RR'`` is taken from an eigendecomposition without the eigenvalues
    below ``m eps``, and the solution is

    .. math:: (s R'HR + \lambda I) y = R'u, \qquad x = J'(R^+)' y

    The reduced system is symmetric and not worse conditioned: ``y`` holds coordinates in an
    orthonormal basis of the range of ``J'``. All of this is computed in float64 from the rows
    ``J'e_i``, also for float32, and so is the residual of the returned ``x``, on which
    ``CONVERGED`` rests. The part of ``J'u`` along singular values of ``J`` below about ``sqrt(m)``
    1e-8 times the largest is lost. If it matters, the residual shows it, and the status is
    ``STAGNATED``.

    With ``damping = 0`` the solution has minimum length, and eigenvalues of ``R'HR`` below
    ``m eps`` are dropped. The status is ``LEAST_SQUARES`` if ``J'u`` is not in the range of
    ``J'HJ``.

    The primal method is :func:`cg` on the same system. ``"auto"`` follows :func:`dual_is_cheaper`
    at ``min(max_iter, m + 1, n)`` iterations, with 50 for a ``max_iter`` of None. Cost of the dual
    method: ``m`` products with ``J'`` (none for a matrix) and ``m`` with ``H``; memory ``m n`` for
    the rows and :math:`5 m^2` in float64. Cost of the primal method: two products per iteration,
    one for ``J'u``, and two for each measured residual.

    Args:
        J: a :class:`LinearMap` or a matrix ``(m, n)``.
        u: shape ``(m,)``, float32 or float64.
        damping: :math:`\lambda`, not negative.
        metric: ``H``, symmetric positive semidefinite; the identity if None.
        scale: ``s``, positive: one over the number of samples for a mean.
        method: ``"dual"``, ``"primal"``, or ``"auto"``.
        rtol: tolerance relative to the norm of ``J'u``, or a rule, as in :func:`cg`.
        max_iter: maximum number of iterations of the primal method.

    Returns:
        The solution and the method used; see :class:`DualSolution`. If ``H`` is not positive
        semidefinite, the status is ``NEGATIVE_CURVATURE`` or ``ZERO_CURVATURE``, with a direction.

    Raises:
        TypeError: ``u`` is not a real floating-point tensor, ``J`` is not a map, or ``metric`` is
            not an operator.
        ValueError: shapes or dtypes do not match, or a number is out of range.

    Example:
        >>> from torch.distributions import Categorical
        >>> from trustregion import FisherOperator
        >>> model, x, y = torch.nn.Linear(999, 3), torch.randn(8, 999), torch.arange(8) % 3
        >>> d = Categorical(logits=model(x))
        >>> F = FisherOperator(d, model.parameters())
        >>> (u,) = torch.autograd.grad(-d.log_prob(y).mean(), d.logits, retain_graph=True)
        >>> solution = dual_solve(
        ...     F.jacobian, u.flatten(), metric=F.metric, damping=0.1, scale=1 / F.total
        ... )
        >>> solution.method, solution.products, solution.x.shape
        ('dual', 24, torch.Size([3000]))

    References:
        Henderson and Searle, On deriving the inverse of a sum of matrices, 1981; Ren and Goldfarb,
        Efficient subsampled Gauss-Newton and natural gradient methods for training neural
        networks, 2019.

    """
    J = as_map(J)
    _check(J, u, damping, scale, method)
    check_tolerances(rtol, 0.0)
    check_count("max_iter", max_iter)
    H = None if metric is None else as_operator(metric, u)
    system, (m, n) = _DampedSystem(J, u, H, float(scale), float(damping)), J.shape
    limit = EXPECTED_ITERATIONS if max_iter is None else max_iter
    gram = None if isinstance(J, DenseMap) else 3.0 * m * m * n  # products of 2mn and K
    primal, dual = flops(m, n, min(limit, m + 1, n), None, gram)
    if method == "auto":
        method = "dual" if dual < primal else "primal"
    if not finite(u):
        found = _ended(system, Status.NONFINITE_INPUT, 0)
    elif method == "dual":
        found = _dual(system, Tolerance(rtol, 0.0))
    else:
        found = _primal(system, rtol, max_iter)
    return DualSolution(**vars(found), method=method, primal_flops=primal, dual_flops=dual)


def _check(J: LinearMap, u: Tensor, damping: float, scale: float, method: str) -> None:
    check_vector("u", u)
    if u.shape != (J.shape[0],) or u.dtype != J.dtype:
        raise ValueError(
            f"u must have the shape ({J.shape[0]},) and dtype {J.dtype} of the outputs of J,"
            f" got shape {tuple(u.shape)} and dtype {u.dtype}"
        )
    check_damping(damping)
    check_radius("scale", scale)
    if method not in ("auto", "dual", "primal"):
        raise ValueError(f"method must be 'auto', 'dual' or 'primal', got {method!r}")


@dataclass(frozen=True)
class _DampedSystem:
    J: LinearMap
    u: Tensor
    H: LinearOperator | None
    scale: float
    damping: float

    def mv(self, v: Tensor) -> Tensor:
        """Return ``(scale J'HJ + damping I) v``."""
        d = self.J.mv(v)
        d = self.scale * (d if self.H is None else self.H.mv(d)).double()
        return (self.J.rmv(d.to(v.dtype)).double() + self.damping * v.double()).to(v.dtype)


def _ended(
    system: _DampedSystem,
    status: Status,
    products: int,
    size: float = math.inf,
    p: Tensor | None = None,
) -> LinearSolution:
    """Return the zero solution, whose residual has the norm ``size``, and a direction ``p``."""
    x = system.u.new_zeros(system.J.shape[1])
    return LinearSolution.none(x, status, products=products, residual_norm=size, direction=p)


def _primal(system: _DampedSystem, rtol: Rtol, max_iter: int | None) -> LinearSolution:
    k = exponent(system.u) or 0
    g = system.J.rmv(ldexp(system.u, -k))  # at unit scale, where nothing overflows early
    b = ldexp(g, k)
    if not finite(b):
        return _ended(system, Status.NONFINITE_OPERATOR, 1)
    found = cg(system.mv, b, rtol=rtol, max_iter=max_iter)
    found = replace(found, products=2 * found.products + 1)
    if found.status is Status.CONVERGED and not torch.equal(ldexp(b, -k), g):  # J'u underflowed
        return replace(found, status=Status.STAGNATED)
    return found


@dataclass(frozen=True)
class _ScaledSystem:
    """The system at unit scale, in float64: no power of two in the input changes a bit of it."""

    rows: Tensor
    e: int
    """``J`` is ``2^e`` times the map below."""
    u: Tensor
    H: Tensor | None
    weight: float
    damping: float
    q: int
    """The matrix is ``2^q`` times the one below."""

    def adjoint(self, z: Tensor) -> Tensor:
        """Return ``J' z``."""
        return wide_rmv(self.rows, z, self.e)

    def mv(self, x: Tensor) -> Tensor:
        """Return ``(weight J'HJ + damping I) x``."""
        d = self.weight * wide_mv(self.rows, x, self.e)
        return self.adjoint(d if self.H is None else self.H @ d) + self.damping * x


def _unit(system: _DampedSystem, rows: Tensor, e: int, k: int, H: Tensor | None) -> _ScaledSystem:
    h = 0 if H is None else exponent(H)
    s, i = math.frexp(system.scale)
    d, j = math.frexp(system.damping)
    sizes = [] if h is None else [i + 2 * e + h]  # of the metric, unless it is zero
    q = max(sizes + ([j] if d else []), default=0)
    weight = 0.0 if h is None else scalar_ldexp(s, sizes[0] - q)
    H = H if H is None or h is None else ldexp(H, -h)
    return _ScaledSystem(
        rows, e, ldexp(system.u.double(), -k), H, weight, scalar_ldexp(d, j - q), q
    )


def _dual(system: _DampedSystem, stop: Tolerance) -> LinearSolution:
    J, k = system.J, exponent(system.u)
    if k is None:  # u = 0, whose solution is 0
        return _ended(system, Status.CONVERGED, 0, 0.0)
    rows, products = J.rows(), 0 if isinstance(J, DenseMap) else J.shape[0]
    H = None if system.H is None else to_dense(system.H).double()
    if not (finite(rows) and (H is None or finite(H))):
        return _ended(system, Status.NONFINITE_OPERATOR, products)
    e = exponent(rows) or 0
    unit = _unit(system, rows, e, k, H)
    g = unit.adjoint(unit.u)
    t = exponent(g)
    if t is None:
        return _ended(system, Status.CONVERGED, products, 0.0)
    g, f, q = ldexp(g, -t), e + k + t, unit.q  # from here J'u = 2^f g and the solution 2^(f-q) x
    start = scalar_ldexp(norm(g), f)
    try:
        R, T = _square_root(DenseMap(rows).gram(e))
        y, curved, lost = _solve_reduced(R, unit, rows.dtype)
    except torch.linalg.LinAlgError:  # type: ignore[reportPrivateImportUsage]  # no convergence
        return _ended(system, Status.STAGNATED, products, start)
    x = unit.adjoint(T @ y)
    if curved is not None:
        return _ended(system, curved, products, start, x.to(rows.dtype))
    out = ldexp(x, f - t - q).to(rows.dtype)
    if not finite(out):
        return _ended(system, Status.NONFINITE_OPERATOR, products, start)
    x = ldexp(out.double(), q - f)  # as it is returned
    r = g - unit.mv(x)
    size, tolerance = norm(r), stop.of(g, f)
    if not size <= norm(g):
        return _ended(system, Status.STAGNATED, products, start)
    short = size <= math.hypot(scalar_ldexp(lost, -t), tolerance)
    status = Status.LEAST_SQUARES if short else Status.STAGNATED
    found = LinearSolution(
        x=out,
        status=Status.CONVERGED if size <= tolerance else status,
        iterations=0,
        products=products,
        residual_norm=scalar_ldexp(size, f),
        curvature=scalar_ldexp(dot(x, g - r), 2 * f - q),
        model_value=scalar_ldexp(-0.5 * dot(x, g + r), 2 * f - q),
        norm=scalar_ldexp(norm(x), f - q),
    )
    return replace(found, true_residual_norm=found.residual_norm)


def _square_root(K: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``R`` with ``K = RR'`` and full column rank, and the transpose of its inverse."""
    values, V = torch.linalg.eigh(K)
    kept = values > len(K) * torch.finfo(K.dtype).eps * values[-1]
    V, sigma = V[:, kept], values[kept].sqrt()
    return V * sigma, V / sigma


def _solve_reduced(
    R: Tensor, unit: _ScaledSystem, dtype: torch.dtype
) -> tuple[Tensor, Status | None, float]:
    """Solve ``(weight R'HR + damping I) y = R'u``.

    Returns ``y``, or a direction of curvature that is not positive and its status, and the norm of
    the part of ``R'u`` that no ``y`` can reach.
    """
    B = unit.weight * (R.T @ (R if unit.H is None else unit.H @ R))  # its lower triangle is read
    c, damping = R.T @ unit.u, unit.damping
    L, failed = torch.linalg.cholesky_ex(
        B + damping * torch.eye(len(B), dtype=B.dtype, device=B.device)
    )
    if damping > 0 and not failed:
        return torch.cholesky_solve(c[:, None], L)[:, 0], None, 0.0
    values, Q = torch.linalg.eigh(B)
    eps = torch.finfo(torch.float64 if unit.H is None else dtype).eps  # to which H is known
    cut = len(B) * eps * values.abs().max().item()
    leftmost = values[0].item()
    if leftmost < -cut:
        negative = leftmost + damping < -cut
        status = Status.NEGATIVE_CURVATURE if negative else Status.ZERO_CURVATURE
        return Q[:, 0], status, 0.0
    along, kept = Q.T @ c, values > (-math.inf if damping > 0 else cut)
    y = Q[:, kept] @ (along[kept] / (values[kept].clamp(min=0) + damping))
    return y, None, norm(along[~kept])
