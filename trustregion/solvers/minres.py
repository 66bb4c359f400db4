"""Minimal residuals: symmetric systems that may be indefinite or singular."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..arguments import check_count, check_start, check_tolerances, check_vector, finite
from ..operators.base import LinearOperator, OperatorLike, as_operator, product
from ..status import Status
from ..vector import dot, exponent, ldexp, norm, scalar_ldexp
from .products import Asks, answer
from .refinement import Observer, Refinement, Run, Start
from .solution import LinearSolution
from .stopping import Tolerance

ROUNDING = torch.finfo(torch.float64).eps
# |Ar| below this many eps |A||r| is rounding.
NEGLIGIBLE = 8.0
# Where there is no solution, rounding ends the fall of |Ar| / |A||r| at about a tenth of sqrt(eps)
# (all tried, n to 200); an iterate below this may be the last good one.
CANDIDATE = 10.0


@dataclass(frozen=True)
class _Rules:
    """When a run stops, in the units of the unit-scale system."""

    tolerance: float
    """On the norm of the recurred residual."""
    max_iter: int
    stop_at_curvature: bool


class _Lanczos:
    r"""The method of Paige and Saunders on ``A x = b`` of unit scale, from ``x = 0``.

    The Lanczos vectors are ``u`` in the space of residuals and ``v = M u`` in that of ``x``, with
    ``u_i'v_j = 1`` where ``i = j`` and else 0. Their tridiagonal matrix ``T`` is made triangular by
    reflections ``(cs, sn)`` as it grows. The residual is carried by
    ``r_k = sn^2 r_{k-1} - (phi / gamma) z``, where ``z`` is the next ``u`` before it is normalised:
    nothing is divided by a ``beta`` that may be zero.

    Products with ``A`` and ``M`` are brought to unit scale by powers of two. Vectors are carried in
    float64 and handed to ``A`` and ``M`` in their own dtype, so that in float32 the products alone
    round. Memory: eight vectors in float64, five more with a preconditioner, and two or three for
    an iterate that may turn out to be the least-squares solution.
    """

    def __init__(
        self,
        b: Tensor,
        dtype: torch.dtype,
        M: LinearOperator | None,
        rules: _Rules,
        observe: Observer | None,
    ) -> None:
        self.dtype, self.M, self.rules, self.observe = dtype, M, rules, observe
        self.eps, self.largest = torch.finfo(dtype).eps, torch.finfo(dtype).max
        self.run = Run.start(b, M)
        self.kept, self.least, self.start = self.run, math.inf, math.sqrt(self.run.rr)
        self.A_unit: int | None = None  # exponents of the units of A and M, once known
        self.M_unit: int | None = None
        self.u = self.v = self.u_old = torch.zeros_like(b)
        self.beta = self.dbar = self.epsln = self.sn = self.phibar = 0.0
        self.cs = -1.0
        count = 1 if M is None else 2  # w, and M^-1 w where that is another vector
        self.w, self.w_old = ([torch.zeros_like(b) for _ in range(count)] for _ in range(2))
        self.length = self.length_old = 0.0  # of w
        self.norm_T = self.norm_A = self.reach = 0.0
        self.growth = 1.0

    def iterate(self) -> Asks[Run]:
        """Run to the end; the ``status`` of what is returned is set."""
        run = self.run
        if self._goes_on():
            run.status = self._begin()
        while self._goes_on():
            Av = yield self.v
            run.products += 1
            run.status = self._step(Av)
        return self._shortest() if run.status is Status.LEAST_SQUARES else run

    def _goes_on(self) -> bool:
        """Say whether another iteration is due, and set the status if not."""
        run = self.run
        if run.status is None:
            gap = self.eps * self.norm_A * self.reach  # as of `Run`, which says more in float64
            # Below a tenth of the gap to the true residual the recurred one means nothing. Where
            # even the residual of the candidate is below it, nothing was gained since.
            if self.kept is not run and math.sqrt(self.kept.rr) <= gap:
                run.status = Status.LEAST_SQUARES
            elif math.sqrt(run.rr) <= max(self.rules.tolerance, 0.1 * gap):
                run.status = Status.CONVERGED
            elif run.iterations >= self.rules.max_iter:
                run.status = Status.MAX_ITER
        return run.status is None

    def _begin(self) -> Status | None:
        r = self.run.r
        found = self._metric(r)
        if isinstance(found, Status):
            return found
        self.phibar = found[1]
        self._normalise(r, *found)
        self.beta = 0.0
        self._account()
        return None

    def _metric(self, z: Tensor) -> tuple[Tensor, float] | Status:
        """Return ``M z`` and ``sqrt(z'Mz)``, or why there is none."""
        if self.M is None:
            size = norm(z)
            return (z, size) if math.isfinite(size) else Status.NONFINITE_OPERATOR
        Mz = product(self.M, z.to(self.dtype)).double()
        if self.M_unit is None:
            self.M_unit = (exponent(Mz) or 0) - (exponent(z) or 0)
        Mz = ldexp(Mz, -self.M_unit)
        zMz, rounding = dot(z, Mz), self.eps * norm(z) * norm(Mz)
        if not math.isfinite(zMz + rounding):
            return Status.NONFINITE_OPERATOR
        if zMz < -rounding:
            return Status.INDEFINITE_PRECONDITIONER
        return (Mz, math.sqrt(zMz)) if zMz > rounding else Status.BREAKDOWN

    def _normalise(self, z: Tensor, Mz: Tensor, beta: float) -> None:
        self.u_old, self.u, self.beta = self.u, z / beta, beta
        self.v = self.u if self.M is None else Mz / beta

    def _step(self, Av: Tensor) -> Status | None:
        """Grow the Krylov space by ``Av`` and move in it; return why to stop, or None."""
        if self.A_unit is None:
            self.A_unit = exponent(Av) or 0
        z = ldexp(Av, -self.A_unit)
        size, size_v = norm(z), 1.0 if self.M is None else norm(self.v)
        if not math.isfinite(size):
            return Status.NONFINITE_OPERATOR
        self.norm_A = max(self.norm_A, size / size_v)
        z.sub_(self.u_old, alpha=self.beta)
        alfa = dot(self.v, z)
        z.sub_(self.u, alpha=alfa)
        invariant = norm(z) <= self.eps * size  # the Krylov space holds A v
        found = (z.zero_(), 0.0) if invariant else self._metric(z)
        if isinstance(found, Status):
            return found
        Mz, beta = found
        self.norm_T = max(self.norm_T, math.hypot(self.beta, alfa, beta))
        delta = self.cs * self.dbar + self.sn * alfa
        gbar = self.sn * self.dbar - self.cs * alfa
        self.dbar = -self.cs * beta
        status = self._stops(-self.cs * gbar, math.hypot(gbar, self.dbar))
        if status is None:
            status = self._advance(z, gbar, delta, beta, size_v)
            if beta > 0:
                self._normalise(z, Mz, beta)
        return status

    def _stops(self, curvature: float, stretch: float) -> Status | None:
        """Judge the last residual by ``r'Ar / r'r`` and ``|Ar| / |r|``; return why to stop."""
        run, floor = self.run, self.eps * self.norm_T
        if self.rules.stop_at_curvature and curvature <= floor:
            p = self._direction(run.r)
            if not finite(p):
                return Status.NONFINITE_OPERATOR
            run.direction = p.clone()
            return Status.NEGATIVE_CURVATURE if curvature < -floor else Status.ZERO_CURVATURE
        if stretch <= CANDIDATE * math.sqrt(self.eps) * self.norm_T:
            # where x has grown, the same |Ar| was had at the price of rounding
            score = stretch * (self.start + self.norm_A * self.reach)
            if score <= self.least:
                x = run.x.clone()
                y = x if self.M is None else run.y.clone()
                self.kept, self.least = replace(run, x=x, y=y, r=run.r.clone()), score
        return Status.LEAST_SQUARES if stretch <= NEGLIGIBLE * floor else None

    def _direction(self, r: Tensor) -> Tensor:
        """Return ``M r``, in the space of ``x``."""
        return r if self.M is None else product(self.M, r.to(self.dtype)).double()

    def _advance(
        self, z: Tensor, gbar: float, delta: float, beta: float, size_v: float
    ) -> Status | None:
        """Move to where the residual is smallest in the grown space."""
        run, unit, gamma = self.run, -(self.A_unit or 0), math.hypot(gbar, beta)
        epsln, self.epsln = self.epsln, self.sn * beta
        self.cs, self.sn = gbar / gamma, beta / gamma
        phi, self.phibar = self.cs * self.phibar, self.sn * self.phibar
        # what w is the small difference of is its rounding
        before = epsln * self.length_old + abs(delta) * self.length
        self.growth = max(self.growth, before / size_v)
        for w_old, w, p in zip(self.w_old, self.w, (self.v, self.u), strict=False):
            w_old.mul_(-epsln).sub_(w, alpha=delta).add_(p).div_(gamma)
        self.w, self.w_old = self.w_old, self.w
        self.length_old, self.length = self.length, norm(self.w[0])
        self.reach += abs(phi) * self.length
        alpha, reach = scalar_ldexp(phi, unit), scalar_ldexp(self.reach, unit)
        if not max(abs(alpha), reach) <= self.largest:
            return Status.NONFINITE_OPERATOR
        run.x.add_(self.w[0], alpha=alpha)
        if self.M is not None:
            run.y.add_(self.w[1], alpha=scalar_ldexp(alpha, -(self.M_unit or 0)))
        run.r.mul_(self.sn * self.sn).sub_(z, alpha=phi / gamma)
        run.rr = dot(run.r, run.r)
        self._account()
        run.iterations += 1
        run.norm_A = scalar_ldexp(self.norm_A, -unit)
        run.reach = reach * (1 + ROUNDING / self.eps * self.growth)
        if self.observe is not None:
            self.observe(run.x)
        return None

    def _account(self) -> None:
        if self.M_unit is not None:
            half, odd = divmod(self.M_unit, 2)
            self.run.metric_norm = scalar_ldexp(self.phibar * math.sqrt(1 + odd), half)

    def _shortest(self) -> Run:
        """Return the candidate less its part along the residual, which ``A`` maps to zero."""
        run, last = self.kept, self.run
        run.status, run.iterations, run.products = last.status, last.iterations, last.products
        p = self._direction(run.r)
        if not finite(p):
            run.status = Status.NONFINITE_OPERATOR
            return run
        rMr = dot(run.r, p)
        share = dot(run.x, run.r) / rMr if rMr > 0 else math.inf  # it may underflow
        if math.isfinite(share):
            run.x.sub_(p, alpha=share)
            if self.M is not None:
                run.y.sub_(run.r, alpha=share)
        return run


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

    Each iterate makes :math:`\|b - Ax\|` as small as it can be in a growing Krylov space; with a
    preconditioner it is :math:`\|r\|_M = \sqrt{r'Mr}`. The kernel stops when the Euclidean norm is
    at most :math:`\max(\mathrm{rtol}\,\|b\|, \mathrm{atol})`, with or without one. It never raises
    for numerical trouble and never returns a NaN.

    On a singular ``A`` and from zero the solution is the shortest one (in the metric
    :math:`M^{-1}`). Where there is none, ``x`` is the shortest least-squares solution, with status
    ``LEAST_SQUARES``. That is said where :math:`A r` is negligible and going on could reduce the
    residual only by an ``x`` so large that the rounding of ``A x`` exceeds it, which costs up to
    as many iterations again: :math:`A r` alone is as small on the way to the solution of an
    ill-conditioned system.

    Scale, precision and what ``CONVERGED`` and ``STAGNATED`` say are as for :func:`cg`. The error
    of ``x`` in float64 can grow with the square of the condition (Sleijpen et al. 2000), so that
    there the true residual is measured early; one more run from there mends it. With a
    preconditioner it is always measured.

    Cost: one product with ``A`` and one with ``M`` an iteration, one more with ``A`` for ``x0`` and
    for each measured residual, one more with ``M`` for each start from such a residual, for a
    ``direction`` and for ``LEAST_SQUARES``.

    Args:
        A: a :class:`LinearOperator`, a square tensor, or a callable ``v -> A v``.
        b: right-hand side, shape ``(n,)``, float32 or float64.
        x0: starting point, of the shape of ``b``; zero when None. Not written to.
        M: preconditioner, an approximation of the inverse of :math:`|A|`, positive definite.
        rtol: tolerance relative to the norm of ``b``, or a rule that makes it from that norm.
        atol: absolute tolerance on the residual's norm.
        max_iter: limit on iterations; ``10 n`` when None.
        stop_at_negative_curvature: stop as soon as a residual has :math:`r'Ar` not positive to
            working precision (with ``M``: ``p = M r`` has ``p'Ap`` so), as Newton-MR asks. Known at
            no product. It is returned as ``direction``, up to a power of two, and ``x`` is the
            iterate with that residual.
        verify: measure the true residual at the end, by one product where it is not known.
        callback: called with the current iterate after each iteration.

    Returns:
        The solution and how it ended; see :class:`LinearSolution`. With a preconditioner its
        ``preconditioned_residual_norm`` is :math:`\|r\|_M` as the recurrence carries it.

    Raises:
        TypeError: ``b`` is not a real floating tensor, or ``A`` or ``M`` is not an operator.
        ValueError: shapes or dtypes do not fit, or a tolerance or limit is negative.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, -2.0, 0.0]))
        >>> minres(A, torch.tensor([1.0, 1.0, 0.0])).x
        tensor([ 1.0000, -0.5000,  0.0000])
        >>> minres(A, torch.ones(3)).status
        <Status.LEAST_SQUARES: 'least_squares'>

    References:
        Paige and Saunders, Solution of sparse indefinite systems of linear equations, 1975; Choi,
        Paige and Saunders, MINRES-QLP, 2011, for the norms known by recurrence; Liu and Roosta,
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

    def run(start: Start) -> Asks[Run]:
        rules = _Rules(start.tolerance, start.max_iter, stop_at_negative_curvature)
        return _Lanczos(start.r, b.dtype, M, rules, start.observe).iterate()

    asked = Refinement(
        run=run,
        tolerance=Tolerance(rtol, atol),
        max_iter=10 * b.numel() if max_iter is None else max_iter,
        verify=verify,
        callback=callback,
    )
    return answer(A, asked.solve(b, x0))
