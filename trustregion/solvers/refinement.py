"""Solves whose ``CONVERGED`` is a statement on the true residual: iterative refinement.

A run of ``cg`` or ``minres`` starts from zero on a system of unit scale and computes its residual
by a recurrence. If rounding leaves open whether the true residual is below the tolerance, one
product measures it, and the next run solves for the correction. The solution is returned in the
units of the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import finite
from ..status import Status
from ..vector import dot, exponent, ldexp, norm
from .products import Asks
from .solution import LinearSolution
from .stopping import SAFETY, Tolerance, surely_below

# Removing the null-space part of x may change the residual by at most this fraction.
NEARLY_NULL = 0.1
# With these outcomes the true residual may turn out to be below the tolerance.
MAY_BE_BELOW = (Status.CONVERGED, Status.STAGNATED, Status.MAX_ITER)

Observer = Callable[[Tensor], object]


class Line(NamedTuple):
    """The line ``x + tau p`` along which conjugate gradients did not reach a minimum."""

    p: Tensor
    w: Tensor  # M^-1 p
    Ap: Tensor
    rz: float  # r'Mr, minus the slope of the model
    pAp: float
    pp: float


class Shorter(NamedTuple):
    """A candidate of ``minres`` without its part along ``M r``, which ``A`` maps to nearly zero."""

    x: Tensor
    y: Tensor  # M^-1 x
    change: float  # a bound on the relative change of the residual


class Trusted(NamedTuple):
    """The last iterate of ``minres`` before its rounding could exceed its residual."""

    run: Run
    gap: float  # an estimate of that rounding


@dataclass(kw_only=True)
class Run:
    """The state of a run from ``x = 0`` on a system of unit scale; vectors in float64."""

    x: Tensor
    y: Tensor  # M^-1 x; without M it is the tensor x itself
    r: Tensor
    rr: float  # r'r
    metric_norm: float | None = None  # sqrt(r'Mr), if the method minimizes it
    status: Status | None = None
    iterations: int = 0
    products: int = 0
    line: Line | None = None
    direction: Tensor | None = None
    norm_A: float = 0.0  # the largest |Ap|/|p| seen: a lower bound of |A|
    reach: float = 0.0  # the sum of |alpha p|: an upper bound of |x|
    removed: float = 0.0  # by reorthogonalization from r; the true residual still has it
    trusted: Trusted | None = None
    shorter: Shorter | None = None

    @classmethod
    def start(cls, b: Tensor, M: object) -> Run:
        """Return the state at ``x = 0``."""
        x = torch.zeros_like(b)
        y = x if M is None else torch.zeros_like(b)
        return cls(x=x, y=y, r=b.clone(), rr=dot(b, b))

    def ended(self, status: Status) -> Run:
        """Set the reason why the run stops, and return the run."""
        self.status = status
        return self

    def copy(self) -> Run:
        """Return the state with vectors of its own."""
        x = self.x.clone()
        return replace(self, x=x, y=x if self.y is self.x else self.y.clone(), r=self.r.clone())

    def move(self, p: Tensor, w: Tensor, tau: float) -> None:
        """Go to ``x + tau p``; ``w`` is ``M^-1 p``."""
        self.x.add_(p, alpha=tau)
        if self.y is not self.x:
            self.y.add_(w, alpha=tau)

    def gap(self, eps: float) -> float:
        """Return an estimate of ``|r - (b - Ax)|``, from the rounding of the products."""
        return eps * self.norm_A * self.reach + self.removed

    def margin(self, rounding: Tensor, eps: float) -> float:
        """Return a bound of ``|r - (b - Ax)|`` for the returned ``x``, which lacks ``rounding``."""
        return SAFETY * (self.gap(eps) + self.norm_A * norm(rounding))

    def goes_on(self, tolerance: float, max_iter: int, eps: float) -> bool:
        """Return whether another iteration is needed, and set the status if not."""
        if self.status is None:
            # A residual below a tenth of its gap to the true one means nothing.
            size = math.sqrt(self.rr)
            if size <= tolerance or size <= 0.1 * self.gap(eps):
                self.status = Status.CONVERGED
            elif self.iterations >= max_iter:
                self.status = Status.MAX_ITER
        return self.status is None


class Correction(NamedTuple):
    """The system ``A d = r`` of a run, whose solution corrects an earlier ``x``."""

    r: Tensor
    tolerance: float
    max_iter: int
    value: float = 0.0  # the value of the model at x
    observe: Observer | None = None  # called with each d


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """The options of a solve, and the kernel whose runs it consists of."""

    run: Callable[[Correction], Asks[Run]]
    tolerance: Tolerance
    max_iter: int
    max_products: float = math.inf
    verify: bool = False
    callback: Observer | None = None

    def solve(self, b: Tensor, x0: Tensor | None) -> Asks[LinearSolution]:
        """Solve at unit scale, and undo the scaling."""
        zero = torch.zeros_like(b)
        if not (finite(b) and (x0 is None or finite(x0))):
            x = zero if x0 is None or not finite(x0) else x0.clone()
            return LinearSolution.none(x, Status.NONFINITE_INPUT)
        e = exponent(b)
        if e is None:  # b = 0, whose solution is 0
            return LinearSolution.none(zero, Status.CONVERGED, residual_norm=0.0)
        start = None if x0 is None else ldexp(x0.double(), -e)
        system = _System(ldexp(b.double(), -e), b.dtype, e, self)
        solution = yield from system.solve(start)
        solution = solution.in_units(e, b.dtype)
        if finite(solution.x):
            return solution
        # The solution itself overflows the dtype.
        first = system.end(system.first, Status.NONFINITE_OPERATOR).in_units(e, b.dtype)
        return replace(first, x=zero if x0 is None else x0.clone(), direction=solution.direction)


@dataclass(frozen=True)
class _Iterate:
    x: Tensor
    r: Tensor
    y: Tensor  # M^-1 (x - x0)
    measured: bool  # r is b - Ax by a product, not by a recurrence
    metric_norm: float | None = None  # sqrt(r'Mr), as the recurrence carries it


class _System:
    """A system of unit scale on the way to its solution."""

    def __init__(self, b: Tensor, dtype: torch.dtype, e: int, options: Refinement) -> None:
        self.b, self.dtype, self.e, self.options = b, dtype, e, options
        self.eps, self.tolerance = torch.finfo(dtype).eps, options.tolerance.of(b, e)
        self.first = _Iterate(torch.zeros_like(b), b, torch.zeros_like(b), measured=True)
        self.norm_A = 0.0
        self.iterations = self.products = 0

    def solve(self, x0: Tensor | None) -> Asks[LinearSolution]:
        """Run, measure the residual if in doubt, and restart from there as long as that helps."""
        if x0 is not None:
            self.first = replace(self.first, x=x0)
            r = yield from self._residual(x0)
            if not finite(r):
                return self.end(self.first, Status.NONFINITE_OPERATOR)
            self.first = replace(self.first, r=r)
            self.norm_A = norm(self.b - r) / (norm(x0) or 1.0)
        best, aim, doubted = self.first, self.tolerance, False
        while True:
            run = yield from self.options.run(self._correction(best, aim))
            self.iterations += run.iterations
            self.products += run.products
            self.norm_A = max(self.norm_A, run.norm_A)
            if run.products == 0:
                status = run.status or Status.CONVERGED
                below = status is not Status.CONVERGED or self._surely_below(best)
                return self.end(best, status if below else Status.STAGNATED)
            point, status, in_doubt = self._arrive(best, run)
            if not (self.options.verify or in_doubt):
                return self.end(point, status, run.direction)
            if self.products >= self.options.max_products:
                status = Status.MAX_ITER if in_doubt else status
                return self.end(point, status, run.direction)
            measured = yield from self._measure(point, best, run, status)
            if measured is None:
                return self.end(point, Status.NONFINITE_OPERATOR, run.direction)
            point = measured
            if status in MAY_BE_BELOW and self._surely_below(point):
                return self.end(point, Status.CONVERGED)
            if status is not Status.CONVERGED:
                return self.end(point, status, run.direction)
            if doubted and norm(point.r) > 0.5 * norm(best.r):
                return self.end(point, Status.STAGNATED)
            # The next runs aim lower, so that their gain exceeds the doubt.
            best, aim, doubted = point, 0.25 * self.tolerance, True

    def _correction(self, at: _Iterate, tolerance: float) -> Correction:
        options, e, dtype = self.options, self.e, self.dtype
        left = min(options.max_iter - self.iterations, options.max_products - self.products)
        value = -0.5 * dot(at.x, self.b + at.r)
        callback, observe = options.callback, None
        if callback is not None:
            observe = lambda d: callback(ldexp(at.x + d, e).to(dtype))  # noqa: E731
        return Correction(at.r, tolerance, int(max(left, 0)), value, observe)

    def _surely_below(self, at: _Iterate) -> bool:
        return surely_below(norm(at.r), self.eps * self.norm_A * norm(at.x), self.tolerance)

    def _residual(self, x: Tensor) -> Asks[Tensor]:
        Ax = yield x
        self.products += 1
        return self.b - Ax

    def _arrive(self, best: _Iterate, run: Run) -> tuple[_Iterate, Status, bool]:
        """Return the last iterate of a run, its status, and whether its residual is in doubt."""
        status, size = run.status or Status.CONVERGED, math.sqrt(run.rr)
        if status is Status.LEAST_SQUARES:
            x, y, change = run.shorter or Shorter(run.x, run.y, 0.0)
            point, margin = self._at(best, run, x, y)
            if size > margin:
                return point, status, change > NEARLY_NULL
            # The residual is rounding and proves nothing about A.
            return self._at(best, run, run.x, run.y)[0], Status.STAGNATED, True
        point, margin = self._at(best, run, run.x, run.y)
        if status is Status.CONVERGED:
            # With a preconditioner minres may never meet the largest |Ap|/|p|.
            sure = run.metric_norm is None and size + margin <= self.tolerance
            return point, status, not sure
        # No product follows one that is not finite.
        return point, status, run.trusted is not None and status is not Status.NONFINITE_OPERATOR

    def _measure(
        self, point: _Iterate, best: _Iterate, run: Run, status: Status
    ) -> Asks[_Iterate | None]:
        """Measure the residual of the last iterate, and return it or a better earlier iterate.

        Returns None if a product is not finite.
        """
        r = yield from self._residual(point.x)
        point, size = replace(point, r=r, measured=True), norm(r)
        if not math.isfinite(size):
            return None
        other = None
        if status is Status.LEAST_SQUARES and size > (1 + NEARLY_NULL) * math.sqrt(run.rr):
            other = run
        elif status in MAY_BE_BELOW and run.trusted is not None:
            former, gap = run.trusted
            drifted = size > 2 * gap + SAFETY * self.eps * run.norm_A * norm(best.x)
            other = former if drifted else None
        if other is not None:
            earlier, _ = self._at(best, other, other.x, other.y)
            r = yield from self._residual(earlier.x)
            if not finite(r):
                return None
            point = replace(earlier, r=r, measured=True) if norm(r) < size else point
        if status in (Status.CONVERGED, Status.STAGNATED) or run.trusted is not None:
            return best if status in MAY_BE_BELOW and norm(best.r) < norm(point.r) else point
        return point

    def _at(self, best: _Iterate, run: Run, x: Tensor, y: Tensor) -> tuple[_Iterate, float]:
        """Return ``best + x``, and a bound on the error of its recurred residual."""
        exact = best.x + x
        # Rounded as it is returned.
        x = ldexp(ldexp(exact, self.e).to(self.dtype).double(), -self.e)
        margin = run.margin(exact - x, self.eps) + SAFETY * self.eps * run.norm_A * norm(best.x)
        at = _Iterate(
            x if finite(x) else exact,
            run.r,
            best.y + y,
            measured=False,
            metric_norm=run.metric_norm,
        )
        return at, margin

    def end(self, at: _Iterate, status: Status, direction: Tensor | None = None) -> LinearSolution:
        """Return the solution at an iterate, in the units of this system."""
        x, r = at.x, at.r
        size = norm(r)
        return LinearSolution(
            x=x,
            status=status,
            iterations=self.iterations,
            products=self.products,
            residual_norm=size,
            curvature=dot(x, self.b - r),
            direction=direction,
            model_value=-0.5 * dot(x, self.b + r),
            norm=math.sqrt(max(dot(x - self.first.x, at.y), 0.0)),
            true_residual_norm=size if at.measured else None,
            preconditioned_residual_norm=at.metric_norm,
        )
