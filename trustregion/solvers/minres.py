"""Minimal residuals: symmetric systems that may be indefinite or singular."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..arguments import check_count, check_start, check_tolerances, check_vector, finite
from ..operators.base import LinearOperator, OperatorLike, as_operator
from ..status import Status
from ..vector import dot, norm, scalar_ldexp
from .products import Asks, answer
from .refinement import Correction, Refinement, Run, Shorter, Trusted
from .solution import LinearSolution
from .stopping import Tolerance
from .three_term import ThreeTerm

ROUNDING = torch.finfo(torch.float64).eps
# |Ar| below this many eps |A||r| is rounding.
NEGLIGIBLE = 8.0
# Where there is no solution, rounding ends the fall of |Ar| / |A||r| at about a tenth of sqrt(eps)
# (on all systems tried, up to n = 200). An iterate below this may be the last good one.
CANDIDATE = 10.0
# The estimate of what the products add to a residual holds within a factor of 3.
GAP = 4.0


@torch.no_grad()
def minres(
    A: OperatorLike,
    b: Tensor,
    x0: Tensor | None = None,
    *,
    M: OperatorLike | None = None,
    rtol: float | Callable[[float], float] = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
    stop_at_negative_curvature: bool = False,
    verify: bool = False,
    callback: Callable[[Tensor], object] | None = None,
) -> LinearSolution:
    r"""Solve :math:`A x = b` for symmetric ``A``, indefinite or singular too, by minimal residuals.

    Each iterate minimizes :math:`\|b - Ax\|` over a growing Krylov space; with a preconditioner,
    it minimizes :math:`\|r\|_M = \sqrt{r'Mr}`. In both cases the solve stops when the Euclidean
    norm of the residual is at most :math:`\max(\mathrm{rtol}\,\|b\|, \mathrm{atol})`. It never
    raises for numerical trouble and never returns a NaN.

    If ``A`` is singular and ``x0`` is None, the solution is the shortest one (in the metric
    :math:`M^{-1}`). If there is no solution, ``x`` is the shortest least-squares solution and the
    status is ``LEAST_SQUARES``. It is reported if :math:`A r` is negligible and only an ``x`` so
    large that the rounding of ``A x`` exceeds the residual could still reduce it. This takes up to
    twice the iterations, but :math:`A r` alone does not suffice: it is as small on the way to the
    solution of an ill-conditioned system.

    Near a singular ``A`` rounding can make the last iterates worse than earlier ones. The residual
    of the returned ``x`` is then measured, and if an earlier iterate was better, that one is
    returned.

    Scaling, precision, ``CONVERGED`` and ``STAGNATED`` are as for :func:`cg`. In float64 the error
    of ``x`` can grow with the square of the condition number (Sleijpen et al. 2000), so the true
    residual is measured early, and one restart from there repairs it. With a preconditioner it is
    always measured.

    Cost: one product with ``A`` and one with ``M`` per iteration; one more with ``A`` for ``x0``
    and for each measured residual; one more with ``M`` for each restart, for a ``direction``, and
    for ``LEAST_SQUARES``.

    Args:
        A: a :class:`LinearOperator`, a square tensor, or a callable ``v -> A v``.
        b: right-hand side, shape ``(n,)``, float32 or float64.
        x0: starting point, shaped like ``b``; zero if None. It is not modified.
        M: positive definite preconditioner, an approximation of the inverse of :math:`|A|`.
        rtol: tolerance relative to the norm of ``b``, or a function of that norm that returns it.
        atol: absolute tolerance on the norm of the residual.
        max_iter: maximum number of iterations; ``10 n`` if None.
        stop_at_negative_curvature: stop as soon as a residual has :math:`r'Ar` not positive to
            working precision (with ``M``: as soon as ``p = M r`` has such a ``p'Ap``), as Newton-MR
            requires. The test costs no product. The residual is returned as ``direction``, up to a
            power of two, and ``x`` is the iterate with that residual.
        verify: measure the true residual at the end, at one product, unless it is known.
        callback: called with the current iterate after each iteration.

    Returns:
        The solution and how the solve ended; see :class:`LinearSolution`. With a preconditioner,
        ``preconditioned_residual_norm`` is :math:`\|r\|_M` as the recurrence computes it.

    Raises:
        TypeError: ``b`` is not a real floating-point tensor, or ``A`` or ``M`` is not an operator.
        ValueError: shapes or dtypes do not match, or a tolerance or limit is negative.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, -2.0, 0.0]))
        >>> minres(A, torch.tensor([1.0, 1.0, 0.0])).x
        tensor([ 1.0000, -0.5000,  0.0000])
        >>> minres(A, torch.ones(3)).status
        <Status.LEAST_SQUARES: 'least_squares'>

    References:
        Paige and Saunders, Solution of sparse indefinite systems of linear equations, 1975; Choi,
        Paige and Saunders, MINRES-QLP, 2011, for the recurrences of the norms; Liu and Roosta,
        MINRES: from negative curvature detection to monotonicity properties, 2022; Liu, Milzarek
        and Roosta, Obtaining pseudo-inverse solutions with MINRES, 2023; Sleijpen, van der Vorst
        and Modersitzki, Differences in the effects of rounding errors in Krylov solvers for
        symmetric indefinite linear systems, 2000.

    """
    check_vector("b", b)
    check_start(x0, b)
    check_tolerances(rtol, atol)
    check_count("max_iter", max_iter)
    A = as_operator(A, b)
    M = None if M is None else as_operator(M, b)

    def run(system: Correction) -> Asks[Run]:
        return minimal_residuals(system, b.dtype, M, stop_at_negative_curvature)

    refinement = Refinement(
        run=run,
        tolerance=Tolerance(rtol, atol),
        max_iter=10 * b.numel() if max_iter is None else max_iter,
        verify=verify,
        callback=callback,
    )
    return answer(A, refinement.solve(b, x0))


def minimal_residuals(
    system: Correction, dtype: torch.dtype, M: LinearOperator | None, stop_at_curvature: bool
) -> Asks[Run]:
    r"""Run the method of Paige and Saunders from ``x = 0``.

    Reflections ``(cs, sn)`` make the tridiagonal matrix ``T`` of the Lanczos process triangular as
    it grows. The residual follows ``r_k = sn^2 r_{k-1} - (phi / gamma) z``, where ``z`` is the next
    ``u`` before it is normalized, so that nothing is divided by a ``beta`` of zero.

    Memory: eight float64 vectors, five more with a preconditioner, and two or three for each of two
    earlier iterates that may be returned in place of the last one.
    """
    run, lanczos = Run.start(system.r, M), ThreeTerm(system.r, dtype, M)
    watch, step = _Watch(run, lanczos, system, stop_at_curvature), _Direction(system.r, M)
    cs, sn, dbar, epsln, phibar = -1.0, 0.0, 0.0, 0.0, 0.0
    if watch.goes_on():
        found = lanczos.start(run.r)
        if isinstance(found, Status):
            return run.ended(found)
        phibar = found
        run.metric_norm = lanczos.metric_norm(phibar)
    while watch.goes_on():
        Av = yield lanczos.v
        run.products += 1
        found = lanczos.grow(Av)
        if isinstance(found, Status):
            return run.ended(found)
        alfa, beta, z = found
        delta, gbar = cs * dbar + sn * alfa, sn * dbar - cs * alfa  # by the last reflection
        dbar = -cs * beta
        if watch.stops(-cs * gbar, math.hypot(gbar, dbar)):
            break
        gamma = math.hypot(gbar, beta)
        step.turn(lanczos, delta, epsln, gamma)  # gamma w = v - delta w_old - epsln w_older
        epsln = sn * beta
        cs, sn = gbar / gamma, beta / gamma  # the next reflection
        phi, phibar = cs * phibar, sn * phibar
        if not watch.allows(phi, step):
            return run.ended(Status.NONFINITE_OPERATOR)
        step.move(run, phi, lanczos)
        run.r.mul_(sn * sn).sub_(z, alpha=phi / gamma)
        run.rr = dot(run.r, run.r)
        run.metric_norm = lanczos.metric_norm(phibar)
        run.iterations += 1
        watch.account()
        if system.observe is not None:
            system.observe(run.x)
        lanczos.turn()
    return watch.shortest() if run.status is Status.LEAST_SQUARES else run


class _Direction:
    """The direction ``w`` of the next move of ``x``, and ``W = M^-1 w``."""

    def __init__(self, b: Tensor, M: LinearOperator | None) -> None:
        count = 1 if M is None else 2  # without M, W is w
        self.now, self.old = ([torch.zeros_like(b) for _ in range(count)] for _ in range(2))
        self.length = self.length_old = 0.0
        self.growth = 1.0  # of the rounding in w

    def turn(self, lanczos: ThreeTerm, delta: float, epsln: float, gamma: float) -> None:
        """Make the next direction out of the last two and ``v``."""
        # w is a small difference of large terms and inherits their rounding.
        before = epsln * self.length_old + abs(delta) * self.length
        self.growth = max(self.growth, before / lanczos.size_v)
        for older, old, v in zip(self.old, self.now, (lanczos.v, lanczos.u), strict=False):
            older.mul_(-epsln).sub_(old, alpha=delta).add_(v).div_(gamma)
        self.now, self.old = self.old, self.now
        self.length_old, self.length = self.length, norm(self.now[0])

    def move(self, run: Run, phi: float, lanczos: ThreeTerm) -> None:
        """Move ``x`` by ``phi w``, in the units of the caller."""
        alpha = scalar_ldexp(phi, -(lanczos.A_unit or 0))
        run.x.add_(self.now[0], alpha=alpha)
        if len(self.now) > 1:
            run.y.add_(self.now[1], alpha=scalar_ldexp(alpha, -(lanczos.M_unit or 0)))


class _Watch:
    """When a run stops, and which of its iterates is returned."""

    def __init__(
        self, run: Run, lanczos: ThreeTerm, system: Correction, stop_at_curvature: bool
    ) -> None:
        self.run, self.lanczos, self.system = run, lanczos, system
        self.stop_at_curvature = stop_at_curvature
        self.eps, self.largest = lanczos.eps, torch.finfo(lanczos.dtype).max
        self.candidate, self.least, self.stretch = run, math.inf, math.inf
        self.size_b = math.sqrt(run.rr)
        self.reach, self.growth = 0.0, 1.0  # as in `Run`, but in the unit of A
        self.passed = 0  # how many limits of rounding the residual has fallen below

    def goes_on(self) -> bool:
        """Return whether another iteration is needed, and set the status if not."""
        run = self.run
        if run.status is None:
            gap = self.eps * self.lanczos.norm_A * self.reach  # `Run.gap` adds the rounding of w
            # A residual below a tenth of its gap to the true one means nothing. If even the
            # residual of the candidate is below the gap, nothing has been gained since then.
            if self.candidate is not run and math.sqrt(self.candidate.rr) <= gap:
                run.status = Status.LEAST_SQUARES
            elif math.sqrt(run.rr) <= max(self.system.tolerance, 0.1 * gap):
                run.status = Status.CONVERGED
            elif run.iterations >= self.system.max_iter:
                run.status = Status.MAX_ITER
        return run.status is None

    def stops(self, curvature: float, stretch: float) -> bool:
        """Judge the last residual by ``r'Ar / r'r`` and ``|Ar| / |r|``."""
        run, norm_T = self.run, self.lanczos.norm_T
        floor = self.eps * norm_T
        if self.stop_at_curvature and curvature <= floor:
            p = self.lanczos.times_M(run.r)
            if finite(p):
                run.direction = p.clone()
                negative = curvature < -floor
                run.status = Status.NEGATIVE_CURVATURE if negative else Status.ZERO_CURVATURE
            else:
                run.status = Status.NONFINITE_OPERATOR
            return True
        if stretch <= CANDIDATE * math.sqrt(self.eps) * norm_T:
            # The factor prefers a shorter x, which carries less rounding, at the same |Ar|.
            score = stretch * (self.size_b + self.lanczos.norm_A * self.reach)
            if score <= self.least:
                self.candidate, self.least, self.stretch = run.copy(), score, stretch
        if stretch <= NEGLIGIBLE * floor:
            run.status = Status.LEAST_SQUARES
        return run.status is not None

    def allows(self, phi: float, step: _Direction) -> bool:
        """Return whether ``x`` moved by ``phi w`` stays in the range of the dtype."""
        lanczos, self.growth = self.lanczos, step.growth
        self.reach += abs(phi) * step.length
        # From here on the rounding of x may exceed the residual. Two iterates are such limits: the
        # first by the rounding of w, a bound that is seldom attained, the second by the rounding
        # of the products, which is attained. The later one replaces the earlier one.
        size, gap = math.sqrt(self.run.rr), GAP * self.eps * lanczos.norm_A * self.reach
        passed = 2 if size <= gap else 1 if size <= gap * self._factor() else 0
        if passed > self.passed:
            self.run.trusted, self.passed = Trusted(self.run.copy(), max(size, gap)), passed
        unit = -(lanczos.A_unit or 0)
        return max(abs(scalar_ldexp(phi, unit)), scalar_ldexp(self.reach, unit)) <= self.largest

    def account(self) -> None:
        """Record in the run the rounding so far."""
        unit = self.lanczos.A_unit or 0
        self.run.norm_A = scalar_ldexp(self.lanczos.norm_A, unit)
        self.run.reach = scalar_ldexp(self.reach, -unit) * self._factor()

    def _factor(self) -> float:
        """Return the factor by which the rounding of ``w`` may exceed that of the products."""
        return 1 + ROUNDING / self.eps * self.growth

    def shortest(self) -> Run:
        """Return the candidate, also without its part along ``M r``, which ``A`` maps to zero."""
        run, last, lanczos = self.candidate, self.run, self.lanczos
        run.status, run.iterations, run.products = last.status, last.iterations, last.products
        p = lanczos.times_M(run.r)
        if not finite(p):
            run.status = Status.NONFINITE_OPERATOR
            return run
        rMr = dot(run.r, p)
        share = dot(run.x, run.r) / rMr if rMr > 0 else math.inf  # it may underflow
        if math.isfinite(share):
            x = torch.sub(run.x, p, alpha=share)
            y = x if lanczos.M is None else torch.sub(run.y, run.r, alpha=share)
            units = (lanczos.A_unit or 0) + (lanczos.M_unit or 0)
            run.shorter = Shorter(x, y, scalar_ldexp(abs(share) * self.stretch, units))
        return run
