"""A stored Krylov space: one set of products, any number of solves."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..arguments import check_count, check_number, check_radius, check_tolerances, finite
from ..operators.base import OperatorLike, as_operator, product
from ..status import Status
from ..vector import dot, norm, scalar_ldexp
from .point import Point
from .region import Ball, no_step, region
from .secular import EPS, minimize_in_eigenbasis
from .solution import LinearSolution, SubproblemSolution
from .stopping import SAFETY, Tolerance, surely_below
from .tridiagonal import Tridiagonalization


class KrylovSpace:
    r"""The space spanned by :math:`Mb, MAMb, (MA)^2 Mb, \ldots`, with a basis of it.

    Made by :func:`lanczos`. The basis is orthonormal in the metric :math:`M^{-1}`, and in it ``A``
    is a tridiagonal matrix ``T`` of size ``k``. :meth:`solve` and :meth:`minimize` work on ``T``
    alone, so that another damping, another radius or a shorter space costs no product with ``A``.
    :meth:`extend` enlarges the space, at one product per vector.

    Memory: ``k + 1`` float64 vectors, twice as many with ``M``. A solve takes one pass over the
    basis, and for each new ``k`` an eigendecomposition of ``T``.

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
        unit = self._given.b if isinstance(self._given, Ball) else torch.zeros_like(b).double()
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
        """Whether the space is invariant under ``MA`` up to rounding, so that it cannot grow."""
        return self._process.exhausted

    @property
    def status(self) -> Status | None:
        """Why the space cannot grow if something failed; None otherwise.

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
        """Add up to ``count`` vectors, and return how many were added."""
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
            size: how many of the first vectors to use; all if None.
            rtol: tolerance relative to the norm of ``b``, for the status.
            atol: absolute tolerance, for the status.
            verify: measure the true residual, at one product, if the status would be ``STAGNATED``.

        Returns:
            The solution, with ``products`` 0 or 1. ``MAX_ITER`` means that the space is too small
            for the tolerance, ``STAGNATED`` that rounding exceeds the tolerance. For
            ``NEGATIVE_CURVATURE`` and ``ZERO_CURVATURE``, ``x`` comes from the part of the space in
            which the matrix is positive definite, and ``direction`` is the first Ritz vector
            outside of it.

        """
        check_number("damping", damping)
        check_tolerances(rtol, atol)
        k = self._checked(size)
        if not isinstance(self._given, Ball) or not self._process.start:
            return self._nothing(self.status or Status.CONVERGED)
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
            spent, residual = int(true is not None), scalar_ldexp(norm(self._given.b), e)
            return self._nothing(Status.NONFINITE_OPERATOR, spent, residual)
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

        The result is the global minimizer over the space, for any symmetric ``A``, and includes the
        hard case. It costs no product. The ball is :math:`\|s\| \le \Delta` with
        :math:`\|s\|^2 = s'M^{-1}s`. For a gradient ``g``, make the space of ``b = -g``. The
        arguments are those of :meth:`solve` and the radius :math:`\Delta`.
        """
        check_radius("radius", radius)
        check_number("damping", damping)
        check_tolerances(rtol, atol)
        k = self._checked(size)
        if not isinstance(self._given, Ball):
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
        """Return whether :meth:`solve` (with a radius :meth:`minimize`) would end as ``MAX_ITER``.

        The test is cheaper, as it does not pass over the basis.
        """
        process, k, tolerance = self._process, self.size, Tolerance(rtol, atol)
        if not isinstance(self._given, Ball) or (self.status is not None):
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
        """Continue an exhausted space from a random vector orthogonal to it.

        Only this finds eigenvectors to which the first vector is orthogonal, such as that of the
        hard case. The generator is a separate one. Cost: one product with ``M``.
        """
        if self.exhausted and self.size < self._zero.numel():
            seed = self.size if self.restarted else 0  # another vector each time
            self.restarted = True
            self._process.restart(torch.Generator("cpu").manual_seed(seed))

    @property
    def coupling(self) -> float:
        """The coupling of the last vector to the next one; 0 if the space is invariant."""
        return self._process.betas[-1] if self.size else 0.0

    def beyond(self) -> Tensor | None:
        """Return the part of ``T`` beyond the last vanishing coupling, or None without one.

        A coupling below the square root of the unit roundoff is noise. The vectors beyond it span
        a separate space that in effect starts from a random vector.
        """
        process = self._process
        floor = math.sqrt(process.eps) * process.norm_A
        small = [j for j, beta in enumerate(process.betas) if beta <= floor]
        if not (small or self.restarted):
            return None
        start = small[-1] + 1 if small else 0
        return process.matrix(self.size)[start:, start:]

    def is_of(self, A: OperatorLike, b: Tensor) -> bool:
        """Return whether this is a space of the same operator object and of ``b``."""
        mine = self._A
        known: list[object] = [mine, getattr(mine, "matrix", mine), getattr(mine, "fn", mine)]
        if not any(A is other for other in known) or b.dtype is not self._zero.dtype:
            return False
        other = region(-b, 1.0)
        if not (isinstance(other, Ball) and isinstance(self._given, Ball)):
            return type(other) is type(self._given)  # both are not finite
        return other.e == self._given.e and torch.equal(other.b, self._given.b)

    def _checked(self, size: int | None) -> int:
        check_count("size", size)
        if size is not None and size > self.size:
            raise ValueError(f"the space has {self.size} vectors, got size={size}: extend it first")
        return self.size if size is None else size

    def _nothing(
        self, status: Status, products: int = 0, size: float | None = None
    ) -> LinearSolution:
        """Return zero, the solution for ``b = 0`` and the result if there is no other."""
        size = (0.0 if status is Status.CONVERGED else math.inf) if size is None else size
        x = torch.zeros_like(self._zero)
        return LinearSolution.none(x, status, products=products, residual_norm=size)

    def _definite(self, k: int, damping: float) -> tuple[int, Status | None, Tensor | None]:
        """Return the size of the definite part of ``T + damping I``, its end, and a direction."""
        process = self._process
        largest = max(map(abs, [*process.alphas, *process.betas, damping]))
        j, _ = process.eliminate(k, damping)
        # A pivot may be positive by rounding only.
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
        """Return ``Q'h`` and its numbers; the residual belongs to ``A + shift M^-1``."""
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

    def _judge(self, point: Point, problem: Ball, tolerance: Tolerance) -> Status:
        """Return whether the coefficients prove that the residual is below the tolerance."""
        bound = self._bound(point, problem, tolerance)
        if point.onward > bound:
            return self.status or Status.MAX_ITER
        lost = self._process.norm_A * norm(problem.rounding(point.x))
        sure = point.onward + SAFETY * (point.rounding + lost) <= bound
        return Status.CONVERGED if sure else Status.STAGNATED

    def _bound(self, point: Point, problem: Ball, tolerance: Tolerance) -> float:
        """Return the tolerance at unit scale; if ``b = 0`` it is relative to ``shift M^-1 x``."""
        if self._process.start or callable(tolerance.rtol):
            return tolerance.of(problem.b, problem.e)
        return max(tolerance.rtol * abs(point.shift) * norm(point.y), tolerance.atol)

    def _measure(self, point: Point, problem: Ball, tolerance: Tolerance) -> tuple[Status, float]:
        """Measure the true residual; return the status and its norm. Cost: one product."""
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
