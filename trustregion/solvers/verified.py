"""From a run of a recurrence to a solution whose ``CONVERGED`` can be trusted.

What ``cg`` and ``minres`` share: the unit scale, warm starts, and the account of how far the
recurred residual may be from the true one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..arguments import finite
from ..operators.base import LinearOperator, product
from ..status import Status
from ..vector import dot, exponent, ldexp, norm, scalar_ldexp
from .solution import LinearSolution

# The estimate of the gap between the recurred and the true residual holds within a factor of 3 on
# all systems tried (dense ones up to n = 3000); this leaves room.
SAFETY = 8.0


@dataclass
class Run:
    """Where a run from ``x = 0`` on a system of unit scale stands; vectors in float64."""

    x: Tensor
    y: Tensor
    """``M^-1 x``; the tensor ``x`` itself without a preconditioner."""
    r: Tensor
    rr: float
    """``r'r``."""
    metric_norm: float | None = None
    """``sqrt(r'Mr)``, where the method works in that norm."""
    status: Status | None = None
    iterations: int = 0
    products: int = 0
    direction: Tensor | None = None
    at_edge: bool = False
    """``x`` has the length of the radius."""
    norm_A: float = 0.0
    """The largest ``|Ap|/|p|`` seen: a lower bound of ``|A|``."""
    reach: float = 0.0
    """The sum of ``|alpha p|``: an upper bound of ``|x|``."""
    removed: float = 0.0
    """What reorthogonalisation took off the residuals, which the true one still has."""

    def gap(self, eps: float) -> float:
        """Return an estimate of ``|r - (b - Ax)|``, from the rounding of the products."""
        return eps * self.norm_A * self.reach + self.removed

    def margin(self, rounding: Tensor, eps: float) -> float:
        """Return a bound of ``|r - (b - Ax)|`` for the ``x`` that is returned, ``rounding`` off."""
        return SAFETY * (self.gap(eps) + self.norm_A * norm(rounding))


T = TypeVar("T")
Asking = Generator[Tensor, Tensor, Run]
Solving = Generator[Tensor, Tensor, LinearSolution]
Observer = Callable[[Tensor], object]
Start = Callable[[Tensor, float, int, Observer | None, float], Asking]
"""``(r, tolerance, max_iter, observe, value)`` -> a run on ``A d = r`` that shows each ``d``.

``value`` is that of the model where the run starts.
"""


def drive(A: LinearOperator, asking: Generator[Tensor, Tensor, T]) -> T:
    """Give a generator the products it asks for, and return what it returns.

    The first product is checked; at small n the check takes a tenth of an iteration.
    """
    try:
        answer = product(A, next(asking))
        while True:
            answer = A.mv(asking.send(answer))
    except StopIteration as end:
        return end.value


def why_no_direction(rz: float) -> Status:
    """Return what ``r'Mr`` that is not positive and finite, for a nonzero ``r``, says of ``M``."""
    if not math.isfinite(rz):
        return Status.NONFINITE_OPERATOR
    return Status.INDEFINITE_PRECONDITIONER if rz < 0 else Status.BREAKDOWN


def shows(size: float, rounding: float, tolerance: float) -> bool:
    """Say whether a measured residual shows that the true one is below the tolerance.

    ``rounding`` is that of the product that measured it, about ``eps |A| |x|``.
    """
    return size + rounding <= tolerance


@dataclass(frozen=True)
class Goal:
    """What a solve is asked to reach."""

    rtol: float | Callable[[float], float]
    atol: float
    max_iter: int = 0
    max_products: float = math.inf
    verify: bool = False
    callback: Observer | None = None

    def tolerance(self, b: Tensor, e: int) -> float:
        """Return the tolerance of the system ``2^e b`` in units of ``2^e``."""
        size = norm(b)
        rtol = self.rtol(scalar_ldexp(size, e)) if callable(self.rtol) else self.rtol
        if not rtol >= 0:
            raise ValueError(f"rtol must return a number that is not negative, got {rtol}")
        return max(rtol * size, scalar_ldexp(self.atol, -e))


def solve(b: Tensor, x0: Tensor | None, goal: Goal, start: Start) -> Solving:
    """Solve at unit scale, and undo the scaling."""
    zero = torch.zeros_like(b)
    if not (finite(b) and (x0 is None or finite(x0))):
        x = zero if x0 is None or not finite(x0) else x0.clone()
        return LinearSolution(x, Status.NONFINITE_INPUT, 0, 0, math.inf, 0.0)
    e = exponent(b)
    if e is None:  # b = 0, whose solution is 0
        return LinearSolution(zero, Status.CONVERGED, 0, 0, 0.0, 0.0)
    system = _System(ldexp(b.double(), -e), b.dtype, e, goal)
    solution = yield from system.solve(x0, start)
    x = ldexp(solution.x, e).to(b.dtype)
    if not finite(x):  # the solution itself overflows the dtype
        x = zero if x0 is None else x0.clone()
        solution = replace(solution, status=Status.NONFINITE_OPERATOR)
    true, metric = solution.true_residual_norm, solution.preconditioned_residual_norm
    return replace(
        solution,
        x=x,
        residual_norm=scalar_ldexp(solution.residual_norm, e),
        curvature=scalar_ldexp(solution.curvature, 2 * e),
        model_value=scalar_ldexp(solution.model_value, 2 * e),
        norm=scalar_ldexp(solution.norm, e),
        true_residual_norm=None if true is None else scalar_ldexp(true, e),
        preconditioned_residual_norm=None if metric is None else scalar_ldexp(metric, e),
    )


@dataclass(frozen=True)
class _Point:
    x: Tensor
    r: Tensor
    y: Tensor
    """``M^-1 (x - x0)``."""
    measured: bool
    """``r`` is ``b - Ax`` by a product, not by a recurrence."""
    metric_norm: float | None = None
    """``sqrt(r'Mr)``, as the recurrence carries it."""


class _System:
    """A system of unit scale on the way to its solution."""

    def __init__(self, b: Tensor, dtype: torch.dtype, e: int, goal: Goal) -> None:
        self.b, self.dtype, self.e, self.goal = b, dtype, e, goal
        self.eps, self.tolerance = torch.finfo(dtype).eps, goal.tolerance(b, e)
        self.x0 = torch.zeros_like(b)
        self.norm_A = 0.0
        self.iterations = self.products = 0

    def solve(self, x0: Tensor | None, start: Start) -> Solving:
        """Run, measure where it matters, and run again from there while that helps."""
        best = _Point(self.x0, self.b, torch.zeros_like(self.b), measured=True)
        if x0 is not None:
            self.x0 = ldexp(x0.double(), -self.e)
            best = replace(best, x=self.x0)
            r = yield from self._residual(self.x0)
            if not finite(r):
                return self._end(best, Status.NONFINITE_OPERATOR)
            best = replace(best, r=r)
            self.norm_A = norm(self.b - r) / (norm(self.x0) or 1.0)
        aim, doubted = self.tolerance, False
        while True:
            value = -0.5 * dot(best.x, self.b + best.r)
            run = yield from start(best.r, aim, self._left(), self._observer(best.x), value)
            self.iterations += run.iterations
            self.products += run.products
            self.norm_A = max(self.norm_A, run.norm_A)
            status = run.status or Status.CONVERGED
            if run.products == 0:
                shown = status is not Status.CONVERGED or self._shown(best)
                return self._end(best, status if shown else Status.STAGNATED)
            point, margin = self._arrive(best, run)
            # behind a preconditioner minres may not get to see the largest |Ap|/|p|
            sure = run.metric_norm is None and math.sqrt(run.rr) + margin <= self.tolerance
            if status is Status.LEAST_SQUARES and math.sqrt(run.rr) <= margin:
                status = Status.STAGNATED  # what is left is rounding, and shows nothing about A
            in_doubt = status is Status.CONVERGED and not sure
            if not (self.goal.verify or in_doubt):
                return self._end(point, status, run.direction)
            if self.products >= self.goal.max_products:
                status = Status.MAX_ITER if in_doubt else status
                return self._end(point, status, run.direction)
            r = yield from self._residual(point.x)
            if not finite(r):
                return self._end(point, Status.NONFINITE_OPERATOR, run.direction)
            point = replace(point, r=r, measured=True)
            if status in (Status.CONVERGED, Status.MAX_ITER) and self._shown(point):
                return self._end(point, Status.CONVERGED)
            if status is not Status.CONVERGED:
                return self._end(point, status, run.direction)
            if norm(r) > 0.5 * norm(best.r):
                point = point if norm(r) <= norm(best.r) else best
                if doubted:
                    return self._end(point, Status.STAGNATED)
            # Lower than asked from now on, so that what is gained is more than the doubt.
            best, aim, doubted = point, 0.25 * self.tolerance, True

    def _left(self) -> int:
        """Return how many iterations, a product each, are left."""
        left = min(self.goal.max_iter - self.iterations, self.goal.max_products - self.products)
        return int(max(left, 0))

    def _shown(self, point: _Point) -> bool:
        return shows(norm(point.r), self.eps * self.norm_A * norm(point.x), self.tolerance)

    def _observer(self, x: Tensor) -> Observer | None:
        callback, dtype = self.goal.callback, self.dtype
        if callback is None:
            return None
        return lambda d: callback(ldexp(x + d, self.e).to(dtype))

    def _residual(self, x: Tensor) -> Generator[Tensor, Tensor, Tensor]:
        Ax = yield x.to(self.dtype)
        self.products += 1
        return self.b - Ax.double()

    def _arrive(self, best: _Point, run: Run) -> tuple[_Point, float]:
        """Return where the run ended, and how far its residual may be from the true one."""
        exact = best.x + run.x
        x = ldexp(ldexp(exact, self.e).to(self.dtype).double(), -self.e)  # as it is returned
        margin = run.margin(exact - x, self.eps) + SAFETY * self.eps * run.norm_A * norm(best.x)
        x = x if finite(x) else exact
        return _Point(x, run.r, best.y + run.y, measured=False, metric_norm=run.metric_norm), margin

    def _end(
        self, point: _Point, status: Status, direction: Tensor | None = None
    ) -> LinearSolution:
        x, r = point.x, point.r
        size = norm(r)
        return LinearSolution(
            x,
            status,
            self.iterations,
            self.products,
            size,
            dot(x, self.b - r),
            direction,
            -0.5 * dot(x, self.b + r),
            math.sqrt(max(dot(x - self.x0, point.y), 0.0)),
            size if point.measured else None,
            point.metric_norm,
        )
