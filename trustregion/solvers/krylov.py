"""A stored Krylov space: one set of products, any number of solves."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..arguments import (
    check_count,
    check_number,
    check_radius,
    check_tolerances,
    finite,
)
from ..operators.base import OperatorLike, as_operator, product
from ..status import Status
from ..vector import dot, norm, scalar_ldexp
from .point import Point
from .region import Region, no_step, region
from .secular import EPS, minimize_in_eigenbasis
from .solution import LinearSolution, SubproblemSolution
from .stopping import SAFETY, Tolerance, surely_below
from .tridiagonal import Tridiagonalization


class KrylovSpace:
    r"""The space spanned by :math:`Mb, MAMb, (MA)^2 Mb, \ldots`, with a basis of it.

    Made by :func:`lanczos`. The basis is orthonormal in the metric :math:`M^{-1}`, and in it ``A``
    is a tridiagonal matrix ``T`` of size ``k``. :meth:`solve` and :meth:`minimize` work on ``T``
    alone: for another damping, another radius or a shorter space they cost no product with ``A``.
    :meth:`extend` makes the space larger, at one product a vector.

    Memory: ``k + 1`` vectors in float64, twice that with ``M``. Time of a solve: one pass over the
    basis, and for each new ``k`` an eigen-decomposition of ``T``.

    Example:
        >>> from trustregion import lanczos
        >>> A, g = torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.tensor([3.0, 2.0, 1.0])
        >>> space = lanczos(A, -g, max_iter=3)
        >>> space.solve(damping=1.0).x
        tensor([-1.5000, -0.6667, -0.2000])
        >>> step = space.minimize(radius=1.0)
        >>> step.on_boundary, step.products, space.products
        (True, 0, 3)

    """

    def __init__(self, A: OperatorLike, b: Tensor, M: OperatorLike | None) -> None:
        b = b.detach()
        self._A, M = as_operator(A, b), None if M is None else as_operator(M, b)
        self._given = region(-b, 1.0)
        unit = self._given.b if isinstance(self._given, Region) else torch.zeros_like(b).double()
        self._zero = torch.zeros_like(b)
        self._process = Tridiagonalization(self._A, unit, M, b.dtype)
        self.restarted = False

    @property
    def size(self) -> int:
        """The dimension ``k``."""
        return self._process.size

    @property
    def products(self) -> int:
        """Products with ``A`` spent on the space."""
        return self._process.products

    @property
    def exhausted(self) -> bool:
        """Whether the space is invariant under ``MA`` to rounding, and so cannot grow."""
        return self._process.exhausted

    @property
    def status(self) -> Status | None:
        """Why the space cannot grow where something went wrong, None where nothing did.

        ``NONFINITE_INPUT``, ``NONFINITE_OPERATOR``, ``INDEFINITE_PRECONDITIONER``, or ``BREAKDOWN``
        for a singular preconditioner.
        """
        if (
            isinstance(self._given, SubproblemSolution)
            and self._given.status is not Status.CONVERGED
        ):
            return self._given.status
        return self._process.status

    @property
    def tridiagonal(self) -> Tensor:
        """The matrix ``T`` of shape ``(k, k)``, float64; its eigenvalues are the Ritz values."""
        return self._process.matrix(self.size)

    @property
    def basis(self) -> Tensor:
        """The basis as rows, shape ``(k, n)``, float64."""
        return self._process.Q.rows[: self.size]

    @torch.no_grad()
    def extend(self, count: int) -> int:
        """Add ``count`` vectors, or as many as there are, and return how many were added."""
        check_count("count", count)
        before = self.size
        while self.size < before + count and self._process.grow():
            pass
        return self.size - before

    @torch.no_grad()
    def solve(
        self,
        damping: float = 0.0,
        *,
        size: int | None = None,
        rtol: float | Callable[[float], float] = 1e-5,
        atol: float = 0.0,
        verify: bool = False,
    ) -> LinearSolution:
        r"""Solve :math:`(A + \lambda M^{-1}) x = b` in the space: the iterate of ``cg``, for free.

        Args:
            damping: :math:`\lambda`, of either sign.
            size: use the first vectors only, as if the space ended there; all if None.
            rtol: tolerance relative to the norm of ``b``, for the status.
            atol: absolute tolerance, for the status.
            verify: measure the true residual, at one product, where ``STAGNATED`` is the answer.

        Returns:
            The solution, with ``products`` 0 or 1. ``MAX_ITER``: the space is too small for the
            tolerance. ``STAGNATED``: it is not, but its rounding is above the tolerance.
            ``NEGATIVE_CURVATURE`` or ``ZERO_CURVATURE``: ``x`` comes from the part of the space in
            which the matrix is positive definite, ``direction`` is the Ritz vector that ends it.

        """
        check_number("damping", damping)
        check_tolerances(rtol, atol)
        k = self._checked(size)
        if not isinstance(self._given, Region) or not self._process.start:
            return self._nothing()
        definite, lowest, direction = self._definite(k, damping)
        theta, U = self._process.spectrum(definite)
        first = U[0] if definite else U.new_zeros(0)
        point = self._point(U @ (self._process.start * first / (theta + damping)), damping)
        tolerance = Tolerance(rtol, atol)
        status, true = lowest or self._judge(point, self._given, tolerance), None
        if verify and status is Status.STAGNATED:
            status, true = self._measure(point, self._given, tolerance)
        e = self._given.e
        x = self._given.returned(point.x)
        if not finite(x):
            x, status = torch.zeros_like(self._zero), Status.NONFINITE_OPERATOR
        return LinearSolution(
            x=x,
            status=status,
            iterations=definite,
            products=int(true is not None),
            residual_norm=scalar_ldexp(point.residual if true is None else true, e),
            curvature=scalar_ldexp(point.curvature, 2 * e),
            direction=direction,
            model_value=scalar_ldexp(0.5 * point.curvature - point.linear, 2 * e),
            norm=scalar_ldexp(point.size, e),
            true_residual_norm=None if true is None else scalar_ldexp(true, e),
        )

    @torch.no_grad()
    def minimize(
        self,
        radius: float,
        *,
        damping: float = 0.0,
        size: int | None = None,
        rtol: float | Callable[[float], float] = 1e-5,
        atol: float = 0.0,
        verify: bool = False,
    ) -> SubproblemSolution:
        r"""Minimize :math:`\frac12 s'(A + \lambda M^{-1}) s - b's` over the space and the ball.

        The global minimizer there, for free, for an ``A`` of any definiteness, hard case included.
        The ball is :math:`\|s\| \le \Delta` with :math:`\|s\|^2 = s'M^{-1}s`. For a gradient
        ``g`` the space is one of ``b = -g``. Arguments as for :meth:`solve`, and the radius
        :math:`\Delta`.
        """
        check_radius("radius", radius)
        check_number("damping", damping)
        check_tolerances(rtol, atol)
        k = self._checked(size)
        if not isinstance(self._given, Region):
            return no_step(self._zero, self._given.status)
        if k == 0:
            rest = Status.MAX_ITER if self._process.start else Status.CONVERGED
            return no_step(self._zero, self.status or rest)
        problem = self._given.with_radius(radius)
        theta, U = self._process.spectrum(k)
        found = minimize_in_eigenbasis(theta + damping, self._process.start * U[0], problem.radius)
        shift, tolerance = damping + found.multiplier, Tolerance(rtol, atol)
        point = self._point(U @ found.h, damping, shift)
        if found.on_boundary:  # h is exactly there, Q'h to the rounding of the basis
            point = point.stretched(problem.radius)
        status, true = self._judge(point, problem, tolerance), None
        if verify and status is Status.STAGNATED:
            status, true = self._measure(point, problem, tolerance)
        return problem.account(
            point.x,
            status,
            iterations=k,
            products=int(true is not None),
            size=point.size,
            reduction=point.linear - 0.5 * point.curvature,
            curvature=point.curvature,
            residual_norm=point.residual if true is None else true,
            on_boundary=found.on_boundary,
            multiplier=found.multiplier,
            hard_case=found.hard_case,
        )

    def is_too_small(
        self,
        *,
        damping: float = 0.0,
        radius: float | None = None,
        rtol: float | Callable[[float], float] = 1e-5,
        atol: float = 0.0,
    ) -> bool:
        """Say whether a larger space is needed: :meth:`solve`, or with a radius :meth:`minimize`,
        would end with ``MAX_ITER``. Cheaper than either: no pass over the basis.
        """
        process, k, tolerance = self._process, self.size, Tolerance(rtol, atol)
        if not isinstance(self._given, Region) or (self.status is not None):
            return False
        if not process.start:  # b = 0, whose tolerance is relative to the step
            if radius is None:
                return False
            step = self.minimize(radius, damping=damping, rtol=rtol, atol=atol)
            return step.status is Status.MAX_ITER
        if k == 0:
            return True
        if radius is None:
            definite, last = process.eliminate(k, damping)
            if definite < k:
                return False
        else:
            theta, U = process.spectrum(k)
            inner = self._given.with_radius(radius).radius
            last = dot(
                U[-1], minimize_in_eigenbasis(theta + damping, process.start * U[0], inner).h
            )
        return process.onward(k, last) > tolerance.of(self._given.b, self._given.e)

    @torch.no_grad()
    def restart(self) -> None:
        """Go on from a random vector orthogonal to an exhausted space, from an own generator.

        What the first vector had no part in, such as the eigenvector of the hard case, is found
        only this way. Cost: one product with ``M``.
        """
        if self.exhausted and self.size < self._zero.numel():
            seed = self.size if self.restarted else 0  # another vector each time
            self.restarted = True
            self._process.restart(torch.Generator("cpu").manual_seed(seed))

    @property
    def coupling(self) -> float:
        """The last entry of the process, from the space to what would extend it; 0 at its end."""
        return self._process.betas[-1] if self.size else 0.0

    def beyond(self) -> Tensor | None:
        """Return the part of ``T`` past the last vanishing coupling, None where there is none.

        Below the root of the rounding unit a coupling carries no information: what lies past it
        is a space of its own, from what is next to a random vector.
        """
        process = self._process
        floor = math.sqrt(process.eps) * process.norm_A
        small = [j for j, beta in enumerate(process.betas) if beta <= floor]
        if not (small or self.restarted):
            return None
        start = small[-1] + 1 if small else 0
        return process.matrix(self.size)[start:, start:]

    def is_of(self, A: OperatorLike, b: Tensor) -> bool:
        """Say whether this is a space of that operator, the same object, and of ``b``."""
        mine = self._A
        known: list[object] = [mine, getattr(mine, "matrix", mine), getattr(mine, "fn", mine)]
        if not any(A is other for other in known) or b.dtype is not self._zero.dtype:
            return False
        other = region(-b, 1.0)
        if not (isinstance(other, Region) and isinstance(self._given, Region)):
            return type(other) is type(self._given)  # both are not finite
        return other.e == self._given.e and torch.equal(other.b, self._given.b)

    def _checked(self, size: int | None) -> int:
        check_count("size", size)
        if size is not None and size > self.size:
            raise ValueError(f"the space has {self.size} vectors, got size={size}: extend it first")
        return self.size if size is None else size

    def _nothing(self) -> LinearSolution:
        """Return zero: the answer for ``b = 0``, and all there is if no vector could be made."""
        status = self.status or Status.CONVERGED
        residual = no_step(self._zero, status).residual_norm
        return LinearSolution.none(torch.zeros_like(self._zero), status, residual_norm=residual)

    def _definite(self, k: int, damping: float) -> tuple[int, Status | None, Tensor | None]:
        """Return how far ``T + damping I`` is positive definite; why it ends, and where to."""
        process = self._process
        largest = max(map(abs, [*process.alphas, *process.betas, damping]))
        j, _ = process.eliminate(k, damping)
        # and where a pivot is positive by rounding only
        while j and process.spectrum(j)[0][0].item() + damping <= EPS * j * largest:
            j -= 1
        if j == k:
            return k, None, None
        theta, U = process.spectrum(j + 1)
        direction = process.Q.rows[: j + 1].T @ U[:, 0]
        negative = theta[0].item() + damping < -process.eps * largest
        why = Status.NEGATIVE_CURVATURE if negative else Status.ZERO_CURVATURE
        return j, why, direction.to(self._zero.dtype)

    def _point(self, h: Tensor, damping: float, shift: float | None = None) -> Point:
        """Return ``Q'h`` and its account; the residual is that of ``A + shift M^-1``."""
        process, k = self._process, len(h)
        x = process.Q.rows[:k].T @ h
        y = x if process.M is None else process.W.rows[:k].T @ h
        size, Th = norm(h), process.matrix(k) @ h
        onward = process.onward(k, h[-1].item() if k else 1.0)
        curvature = dot(h, Th) + damping * size * size
        shift = damping if shift is None else shift
        removed = sum(r * abs(c) for r, c in zip(process.removed, h.tolist(), strict=False))
        rounding = process.eps * (process.norm_A * norm(x) + abs(shift) * norm(y)) + removed
        linear = process.start * h[0].item() if k else 0.0
        return Point(x, y, shift, size, curvature, linear, onward, rounding)

    def _judge(self, point: Point, problem: Region, tolerance: Tolerance) -> Status:
        """Say whether the residual is below the tolerance, as far as the coefficients know."""
        bound = self._bound(point, problem, tolerance)
        if point.onward > bound:
            return self.status or Status.MAX_ITER
        lost = self._process.norm_A * norm(problem.rounding(point.x))
        sure = point.onward + SAFETY * (point.rounding + lost) <= bound
        return Status.CONVERGED if sure else Status.STAGNATED

    def _bound(self, point: Point, problem: Region, tolerance: Tolerance) -> float:
        """Return the tolerance at unit scale; for ``b = 0`` it is relative to ``shift M^-1 x``."""
        if self._process.start or callable(tolerance.rtol):
            return tolerance.of(problem.b, problem.e)
        return max(tolerance.rtol * abs(point.shift) * norm(point.y), tolerance.atol)

    def _measure(self, point: Point, problem: Region, tolerance: Tolerance) -> tuple[Status, float]:
        """Return the status by the true residual, and its norm. Cost: one product."""
        process = self._process
        x = point.x - problem.rounding(point.x)  # as it is returned
        y = x if process.M is None else point.y
        Ax = product(self._A, x.to(self._zero.dtype)).double()
        size = norm(problem.b - Ax - point.shift * y)
        if not math.isfinite(size):
            return Status.NONFINITE_OPERATOR, point.residual
        rounding = process.eps * process.norm_A * norm(x)
        below = surely_below(size, rounding, self._bound(point, problem, tolerance))
        return Status.CONVERGED if below else Status.STAGNATED, size
