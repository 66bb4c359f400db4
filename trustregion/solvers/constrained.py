"""The step within the KL ball and linear constraints."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..arguments import REAL, as_not_negative, check_radius, check_vector, finite
from ..operators.base import Identity, OperatorLike, as_operator
from ..status import Status
from ..vector import dot, exponent, ldexp, norm, scalar_ldexp
from .cg import cg
from .lowest import TOUCHING, BallPoint, lowest_in_ball

EPS, TINY = torch.finfo(torch.float64).eps, 2.0**-500


@dataclass(frozen=True, kw_only=True, eq=False)
class ConstrainedStep:
    r"""A step ``s`` for the parameters under linear constraints.

    With ``H = F + damping I`` the multipliers satisfy :math:`g + \nu H s + a'\mu = 0`, on the span
    of the computed solutions.

    Attributes:
        s: the step, shape ``(n,)``; finite, and within the ball.
        status: the status of the first linear solve that did not converge. Otherwise
            ``ZERO_CURVATURE`` if the metric vanishes on a solution, ``INFEASIBLE`` if no step in
            the ball satisfies the constraints and ``s`` reduces their violation, ``STAGNATED`` if
            rounding violates a constraint or hides the minimizer, and ``CONVERGED`` if ``s`` is the
            minimizer.
        predicted_reduction: the decrease of the linear model along ``s``, ``-g's``.
        multipliers: :math:`\mu \ge 0`, shape ``(m,)``; zero if ``INFEASIBLE``.
        ball_multiplier: :math:`\nu \ge 0`; zero inside the ball. If the feasible set is a single
            point, it and the multipliers of the active constraints are infinite.
        constraint_values: ``b + a s`` for the returned ``s``, shape ``(m,)``, float64.
        feasible: whether no constraint value is positive, up to the rounding of ``s``.
        kl_model: :math:`\frac12 s'Fs`, at most ``delta``.
        products: the number of products with ``A``.
        iterations: the number of iterations of the longest linear solve.
    """

    s: Tensor
    status: Status
    predicted_reduction: float
    multipliers: Tensor
    ball_multiplier: float
    constraint_values: Tensor
    feasible: bool
    kl_model: float
    products: int
    iterations: int


@torch.no_grad()
def constrained_kl_ball_step(
    A: OperatorLike,
    g: Tensor,
    delta: float,
    a: Tensor,
    b: Tensor | float,
    *,
    M: OperatorLike | None = None,
    damping: float = 0.0,
    rtol: float = 1e-5,
    max_iter: int | None = None,
) -> ConstrainedStep:
    r"""Minimize :math:`g's` subject to :math:`\frac12 s'Hs \le \delta` and :math:`b + as \le 0`.

    The metric of the ball is :math:`H = F + \lambda I`, so that it lies inside the ball of ``F``.
    Scaling up to the ball of ``F``, as :func:`kl_ball_step` does, could violate a constraint.

    The systems :math:`H x = v` for ``g`` and each row of ``a`` are solved together by :func:`cg`.
    The problem is then solved exactly on the span of the solutions, with the computed ``HX`` and
    ``v'X``. The ball and the constraints therefore hold to rounding even if the solves are inexact,
    which only costs descent. Directions of the span below the accuracy of the solves are dropped.

    In the coordinates ``y`` where the ball is the unit ball, :math:`y(t)`, the point of the
    polyhedron nearest to :math:`-tc`, minimizes :math:`c'y` at the ball multiplier
    :math:`1/t`. It is piecewise linear, and its norm grows with ``t``. A bracketed Newton iteration
    finds the piece that meets the sphere, and the crossing follows in closed form. For one
    constraint this is the dual of constrained policy optimization. If no point of the ball is
    feasible, the step goes to the edge along the shortest feasible step. If the constraints
    contradict each other, it goes along the shortest step with the least sum of squared violations,
    each measured as a distance in the metric. Cost: ``m + 1`` solves and ``m + 1`` more products.

    Args:
        A: F, the Fisher matrix or another positive semidefinite operator.
        g: the gradient of the loss, shape ``(n,)``, float32 or float64.
        delta: radius of the ball in nats.
        a: gradients of the constraints, shape ``(m, n)``, or ``(n,)`` for one constraint.
        b: values of the constraints at ``s = 0``, shape ``(m,)``, or a number for one constraint.
            A positive value is a violation.
        M: preconditioner for :func:`cg`.
        damping: :math:`\lambda`.
        rtol: relative tolerance of the solves.
        max_iter: maximum number of iterations of the solves.

    Raises:
        TypeError: ``g`` or ``a`` is not a real floating-point tensor, or ``A`` or ``M`` is not an
            operator.
        ValueError: shapes or dtypes do not match, ``m = 0``, or a number is out of its range.

    Example:
        >>> F, g, a = torch.eye(2), torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])
        >>> constrained_kl_ball_step(F, g, 0.5, a, -0.5).s  # at most half a unit along -g
        tensor([-0.5000,  0.0000])

    References:
        Achiam et al., Constrained Policy Optimization, 2017, eq. 10 to 14 and theorem 2.

    """
    rows, values = _check_constraints(g, a, b)
    check_radius("delta", delta)
    as_not_negative("damping", damping)
    H = as_operator(A, g)
    H = H + damping * Identity(g.numel(), g.dtype, g.device) if damping else H
    problem = _Problem.of(torch.cat([g.unsqueeze(0), rows]), values, delta, damping)
    if not (finite(problem.units) and finite(values)):
        return problem.account(torch.zeros_like(g), _nothing(values, Status.NONFINITE_INPUT))
    solution = cg(H, problem.units.T, M=M, rtol=rtol, max_iter=max_iter)
    X = [ldexp(x, -e) for x in solution.x.T if (e := exponent(x)) is not None]
    costs = solution.products + len(X), solution.iterations
    block = torch.stack(X, dim=1) if X else problem.units.T[:, :0]
    images = H.mm(block) if X else block
    if solution.status is Status.NONFINITE_OPERATOR or not finite(images):
        nothing = _nothing(values, Status.NONFINITE_OPERATOR)
        return problem.account(torch.zeros_like(g), nothing, *costs)
    sizes = [norm(v) or 1.0 for v in problem.units]
    pairs = zip(solution.columns, sizes, strict=True)
    error = max(column.residual_norm / size for column, size in pairs)
    basis = _ball_basis(block.double(), images.double(), torch.finfo(g.dtype).eps, error)
    s, point, slack = problem.solve(basis)
    status = solution.status
    if status is Status.CONVERGED:
        status = point.status if basis.complete else Status.ZERO_CURVATURE
    s = s.to(g.dtype)
    if not finite(s):
        s, point, status = torch.zeros_like(g), _nothing(values), Status.NONFINITE_OPERATOR
    return problem.account(s, replace(point, status=status), *costs, slack)


def _check_constraints(g: Tensor, a: Tensor, b: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the gradients as rows ``(m, n)`` and the values ``(m,)`` in float64 on the CPU."""
    check_vector("g", g)
    if not isinstance(a, Tensor) or a.dtype not in REAL:
        given = a.dtype if isinstance(a, Tensor) else type(a).__name__
        raise TypeError(f"a must be a float32 or float64 tensor, got {given}")
    rows = a.unsqueeze(0) if a.ndim == 1 else a
    if rows.ndim != 2 or rows.shape[1:] != g.shape or rows.dtype != g.dtype:
        raise ValueError(
            f"a must hold the gradients of the constraints, shape (m, {g.numel()}) and dtype"
            f" {g.dtype} as g, got shape {tuple(a.shape)} and dtype {a.dtype}"
        )
    if not len(rows):
        raise ValueError("a holds no constraint: use cg and kl_ball_step without any")
    values = torch.as_tensor(b, dtype=torch.float64, device="cpu").reshape(-1)
    if len(values) != len(rows):
        raise ValueError(
            f"b must hold one value for each of {len(rows)} rows of a, got {len(values)}"
        )
    return rows, values


def _nothing(b: Tensor, status: Status = Status.CONVERGED) -> BallPoint:
    return BallPoint(y=b[:0], multipliers=torch.zeros_like(b), ball_multiplier=0.0, status=status)


@dataclass(frozen=True)
class _Basis:
    """Columns ``P``, shape ``(n, r)``, with ``P'HP = 2^f I``."""

    P: Tensor
    f: int
    complete: bool
    """The metric sees every solution."""


def _ball_basis(X: Tensor, HX: Tensor, eps: float, error: float) -> _Basis:
    """Return a basis of the part of the span of ``X`` that is known, for ``X`` of unit scale.

    Columns are scaled to unit length in the metric; of the eigenvectors of their Gram matrix those
    are kept whose value is above 10 times its rounding, and above what the residuals, ``error``
    relative to the right-hand sides, can make of two parallel solutions.
    """
    f = exponent(HX) or 0
    f += f % 2  # the square root of 2^f is a power of two
    HX = ldexp(HX, -f)
    squares = (X * HX).sum(dim=0)
    before, after = torch.linalg.vector_norm(X, dim=0), torch.linalg.vector_norm(HX, dim=0)
    lengths, largest = before * after, (after / before).max() if X.numel() else 0.0
    seen = squares > eps * torch.maximum(100 * lengths, largest * before**2)
    scale = squares[seen].sqrt()
    X, HX = X[:, seen] / scale, HX[:, seen] / scale
    if not X.shape[1]:
        return _Basis(X, f, bool(seen.all()))
    gram = X.T @ HX
    noise = max(eps * (lengths[seen] / scale**2).max().item(), (gram - gram.T).abs().max().item())
    values, U = torch.linalg.eigh((gram + gram.T) / 2)
    cut = max(10 * noise, min((10 * error) ** 2, 1e-8))
    known = values > cut * values[-1]
    return _Basis(X @ (U[:, known] / values[known].sqrt()), f, bool(seen.all()))


@dataclass(frozen=True)
class _Problem:
    """The objective and the constraints, as the rows ``2^powers units`` and the values ``b``."""

    units: Tensor
    powers: list[int]
    b: Tensor
    delta: float
    damping: float

    @classmethod
    def of(cls, V: Tensor, b: Tensor, delta: float, damping: float) -> _Problem:
        """Scale each row to unit size by a power of two."""
        powers = [(exponent(v) or 0) if finite(v) else 0 for v in V]
        units = [ldexp(v, -e) for v, e in zip(V, powers, strict=True)]
        return cls(torch.stack(units), powers, b, delta, damping)

    def solve(self, basis: _Basis) -> tuple[Tensor, BallPoint, Tensor]:
        """Return the minimizer in the span of the basis in float64, its multipliers, and slack.

        The slack of a constraint is its value at zero where the ball's radius is not known so well.
        """
        P, f = basis.P, basis.f
        V = self.units.double()
        shadows = (V @ P).cpu()
        # P'v is exact to the rounding of its terms; less than that is zero.
        blur = 8 * EPS * math.sqrt(V.shape[1]) * torch.linalg.vector_norm(V, dim=1).cpu()
        blur *= torch.linalg.vector_norm(P, dim=0).max().item() if P.numel() else 1.0
        sizes = torch.linalg.vector_norm(shadows, dim=1)
        live = sizes > blur
        sizes = torch.where(live, sizes, 1.0)
        shadows = torch.where(live.unsqueeze(1), shadows / sizes.unsqueeze(1), 0.0)
        root, shift = math.frexp(math.sqrt(2) * math.sqrt(self.delta))
        shift -= f // 2  # the radius of the ball is root * 2^shift
        bounds = zip(self.b.tolist(), sizes[1:].tolist(), self.powers[1:], strict=True)
        h = self.b.new_tensor([scalar_ldexp(v / c / root, -e - shift) for v, c, e in bounds])
        dead = (h.abs() <= TOUCHING) & live[1:]  # the ball's own radius is not known better
        h = torch.where(dead, 0.0, h.clamp(-1 / TINY, 1 / TINY))
        rounding = (blur[0] / sizes[0]).item()
        point = lowest_in_ball(shadows[0], -shadows[1:], h, rounding)
        s = P @ (root * point.y).to(P)
        if point.status is Status.CONVERGED:  # a basis of long vectors rounds coarsely: once more
            short = h + (V[1:] @ s).cpu() / sizes[1:] / root
            tight = (short.abs() <= math.sqrt(EPS)) & ((short > 0) | (point.multipliers > 0))
            fix = -torch.linalg.pinv(shadows[1:][tight], rtol=math.sqrt(EPS)) @ short[tight]
            s = s + P @ (root * fix).to(P)
        s = ldexp(s, shift)
        first = sizes[0].item()
        ratios = zip(point.multipliers.tolist(), sizes[1:].tolist(), self.powers[1:], strict=True)
        mu = [scalar_ldexp(first * v / c, self.powers[0] - e) for v, c, e in ratios]
        nu = scalar_ldexp(first * point.ball_multiplier / root, self.powers[0] - f - shift)
        point = replace(point, multipliers=h.new_tensor(mu), ball_multiplier=nu)
        return s, point, torch.where(dead, self.b.abs(), 0.0)

    def account(
        self,
        s: Tensor,
        point: BallPoint,
        products: int = 0,
        iterations: int = 0,
        slack: Tensor | float = 0.0,
    ) -> ConstrainedStep:
        """Return the step with what it does, measured on ``s`` as it is returned."""
        e, moved = exponent(s) or 0, bool(s.any())
        V, unit = self.units.double(), ldexp(s.double(), -e)
        along = (V @ unit).tolist() if moved else [0.0] * len(V)
        across = (torch.linalg.vector_norm(V, dim=1) * norm(unit)).tolist() if moved else along
        slopes = [scalar_ldexp(v, p + e) for v, p in zip(along, self.powers, strict=True)]
        extents = [scalar_ldexp(v, p + e) for v, p in zip(across, self.powers, strict=True)]
        b = self.b.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        values = b + b.new_tensor(slopes[1:])
        # the rounding of s itself is eps |a| |s| / 2
        room = 4 * torch.finfo(s.dtype).eps * (b.abs() + b.new_tensor(extents[1:]))
        feasible = bool((values <= room + 2 * slack).all()) and finite(values)
        status = point.status
        if status is Status.CONVERGED and not feasible:
            status = Status.STAGNATED
        excess = 0.5 * self.damping * dot(s, s) if self.damping else 0.0
        return ConstrainedStep(
            s=s,
            status=status,
            predicted_reduction=-slopes[0],
            multipliers=point.multipliers,
            ball_multiplier=point.ball_multiplier,
            constraint_values=values,
            feasible=feasible,
            kl_model=max(self.delta * min(dot(point.y, point.y), 1.0) - excess, 0.0),
            products=products,
            iterations=iterations,
        )
