"""Preconditioned conjugate gradients, for one or several right-hand sides."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..arguments import as_positive, check_count, check_start, check_tolerances, check_vector
from ..operators.base import LinearOperator, OperatorLike, as_operator, product
from ..status import Status
from ..vector import dot, norm
from .basis import Residuals
from .products import Asks, answer, answer_in_blocks
from .refinement import Correction, Line, Refinement, Run
from .solution import LinearSolution, join
from .stopping import Progress, Tolerance, why_no_direction


@torch.no_grad()
def cg(
    A: OperatorLike,
    b: Tensor,
    x0: Tensor | None = None,
    *,
    M: OperatorLike | None = None,
    rtol: float | Callable[[float], float] = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
    max_products: int | None = None,
    progress_tol: float | None = None,
    reorthogonalize: bool = False,
    verify: bool = False,
    callback: Callable[[Tensor], object] | None = None,
) -> LinearSolution:
    r"""Solve :math:`A x = b` for symmetric positive definite ``A`` by conjugate gradients.

    Each iterate minimizes :math:`\frac12 x'Ax - b'x` over a growing Krylov space. The solve stops
    when :math:`\|b - Ax\| \le \max(\mathrm{rtol}\,\|b\|, \mathrm{atol})`, or when the next iterate
    would be meaningless: ``A`` or ``M`` is not positive definite, or a value is not finite. It
    never raises for numerical trouble and never returns a NaN.

    It differs from the textbook in five points:

    1. ``b`` is scaled to unit size by a power of two. Scaling ``b`` or ``A`` by a power of two
       therefore scales ``x`` bit for bit, nothing overflows early, and there are no absolute
       constants.
    2. Vectors and inner products are in float64, also for a float32 operator. Its products are then
       the only rounding in float32.
    3. Curvature is compared with the largest ``|Ap|/|p|`` seen, a lower bound of ``|A|``. A value
       below ``eps`` times that bound is rounding, not curvature.
    4. ``x'Ax`` is returned as ``x'(b - r)``. The shortcut ``x'b``, exact in exact arithmetic, is
       off by up to 3e-3 in float32.
    5. ``CONVERGED`` is a statement about the true residual. If rounding leaves open whether the
       true residual is below the tolerance, one product measures it. If it is above, the solve
       restarts from there; once a restart no longer helps, the status is ``STAGNATED``.

    Several right-hand sides ``(n, k)`` advance together, so that the operator is applied to blocks.
    Each column has its own tolerance and takes no more products once it has stopped.

    Cost: one product with ``A`` and one with ``M`` per iteration, and one more with ``A`` for
    ``x0`` and for each measured residual. Memory: five float64 vectors per right-hand side, seven
    with ``M``; ``reorthogonalize`` adds one vector per iteration, two with ``M``.

    Args:
        A: a :class:`LinearOperator`, a square tensor, or a callable ``v -> A v``.
        b: right-hand side, shape ``(n,)`` or ``(n, k)``, float32 or float64.
        x0: starting point, shaped like ``b``; zero if None. It is not modified.
        M: positive definite preconditioner, an approximation of the inverse of ``A``.
        rtol: tolerance relative to the norm of ``b``, or a function of that norm that returns it,
            such as :func:`forcing_sequence`.
        atol: absolute tolerance on the norm of the residual.
        max_iter: maximum number of iterations; ``10 n`` if None.
        max_products: maximum number of products with ``A``, including those that measure a
            residual; unlimited if None. A solve that reaches it ends as ``MAX_ITER``. The product
            for ``x0`` is always spent.
        progress_tol: epsilon of Martens' rule: stop when the model value has improved by less than
            this fraction per iteration (see :class:`Progress`). Martens uses 5e-4.
        reorthogonalize: store the residuals and orthogonalize each new one against all of them. In
            float32, or for an ill-conditioned ``A``, this saves the iterations that rounding adds.
        verify: measure the true residual at the end, at one product, unless it is known.
        callback: called with the current iterate after each iteration; for one vector only.

    Returns:
        The solution and how the solve ended; see :class:`LinearSolution`.

    Raises:
        TypeError: ``b`` is not a real floating-point tensor, or ``A`` or ``M`` is not an operator.
        ValueError: shapes or dtypes do not match, or a tolerance or limit is negative.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
        >>> solution = cg(A, torch.ones(3))
        >>> solution.x
        tensor([1.0000, 0.5000, 0.2500])
        >>> solution.status, solution.iterations
        (<Status.CONVERGED: 'converged'>, 3)

    References:
        Hestenes and Stiefel, Methods of Conjugate Gradients, 1952; Nocedal and Wright, Numerical
        Optimization, 2006, Alg. 5.3; van der Vorst and Ye, Residual replacement strategies for
        Krylov subspace iterative methods, 2000; Martens, Deep Learning via Hessian-free
        Optimization, 2010.

    """
    check_vector("b", b, columns=True)
    check_start(x0, b)
    check_tolerances(rtol, atol)
    check_count("max_iter", max_iter)
    check_count("max_products", max_products)
    if progress_tol is not None:
        as_positive("progress_tol", progress_tol, infinite=True)
    if b.ndim == 2 and callback is not None:
        raise ValueError("callback takes the iterate of one right-hand side: pass b of shape (n,)")
    like = b if b.ndim == 1 else b[:, 0] if b.shape[1] else b.new_empty(b.shape[0])
    A = as_operator(A, like)
    M = None if M is None else as_operator(M, like)

    def run(system: Correction) -> Asks[Run]:
        progress = None if progress_tol is None else Progress(progress_tol, system.value)
        kept = Residuals(system.r, M is not None) if reorthogonalize else None
        return conjugate_gradients(system, b.dtype, M, progress=progress, kept=kept)

    refinement = Refinement(
        run=run,
        tolerance=Tolerance(rtol, atol),
        max_iter=10 * like.numel() if max_iter is None else max_iter,
        max_products=math.inf if max_products is None else max_products,
        verify=verify,
        callback=callback,
    )
    if b.ndim == 1:
        return answer(A, refinement.solve(b, x0))
    starts = [None] * b.shape[1] if x0 is None else x0.unbind(1)
    pairs = zip(b.unbind(1), starts, strict=True)
    return join(b, answer_in_blocks(A, [refinement.solve(*pair) for pair in pairs]))


Leaves = Callable[[Run, Tensor, Tensor, float], bool]
"""``(run, p, M^-1 p, alpha)`` -> whether ``x + alpha p`` leaves the region of the iterates."""


def conjugate_gradients(
    system: Correction,
    dtype: torch.dtype,
    M: LinearOperator | None,
    *,
    progress: Progress | None = None,
    kept: Residuals | None = None,
    leaves: Leaves | None = None,
) -> Asks[Run]:
    """Run Alg. 5.3 of Nocedal and Wright from ``x = 0``.

    At small ``n`` the cost is the number of torch calls: the common path makes only six.
    """
    eps, largest = torch.finfo(dtype).eps, torch.finfo(dtype).max
    _, tolerance, max_iter, _, observe = system
    run = Run.start(system.r, M)
    p, r_next = torch.zeros_like(run.r), torch.empty_like(run.r)
    w = p if M is None else torch.zeros_like(p)  # M^-1 p
    rz, pp = math.inf, 0.0
    while run.goes_on(tolerance, max_iter, eps):
        r = run.r
        z = r if M is None else product(M, r.to(dtype)).double()
        rz_old, rz = rz, run.rr if M is None else dot(r, z)
        if not 0 < rz < math.inf:
            return run.ended(why_no_direction(rz))
        beta = min(rz / rz_old, largest)
        torch.add(z, p, alpha=beta, out=p)  # p = z + beta p
        if M is not None:
            torch.add(r, w, alpha=beta, out=w)
        # Without M, r and the old p are orthogonal.
        pp = rz + beta * beta * pp if M is None else dot(p, p)
        if not 0 < pp < math.inf:
            return run.ended(Status.BREAKDOWN)
        Ap = yield p
        run.products += 1
        pAp = torch.dot(p, Ap).item()
        if not math.isfinite(pAp):
            return run.ended(Status.NONFINITE_OPERATOR)
        alpha, rr = rz / pAp if pAp > 0 else math.inf, math.inf
        if alpha < math.inf:
            torch.add(r, Ap, alpha=-alpha, out=r_next)  # r_next = r - alpha Ap
            if kept is not None:
                run.removed += kept.take_off(r_next, r, z, rz)
            rr = torch.dot(r_next, r_next).item()
            if not math.isfinite(rr):
                return run.ended(Status.NONFINITE_OPERATOR)
            # Without M, r and r_next are orthogonal: |alpha Ap|^2 = r'r + r_next'r_next.
            norm_Ap = math.sqrt(run.rr + rr) / alpha if M is None else norm(Ap)
            run.norm_A = max(run.norm_A, norm_Ap / math.sqrt(pp))
        if pAp <= eps * run.norm_A * pp or (leaves is not None and leaves(run, p, w, alpha)):
            run.line, run.direction = Line(p, w, Ap, rz, pAp, pp), p
            return run.ended(_why_not_to_the_minimum(run.line, run.norm_A, eps))
        run.reach += alpha * math.sqrt(pp)
        if not max(alpha, run.reach) <= largest:
            return run.ended(Status.NONFINITE_OPERATOR)
        run.move(p, w, alpha)
        run.r, r_next, run.rr = r_next, r, rr
        run.iterations += 1
        if observe is not None:
            observe(run.x)
        if progress is not None and progress.stops_after(0.5 * alpha * rz):
            return run.ended(Status.PROGRESS_BELOW_TOLERANCE)
    return run


def _why_not_to_the_minimum(line: Line, norm_A: float, eps: float) -> Status:
    """Return the status: the model has a minimum along ``p`` only if ``p'Ap`` exceeds rounding."""
    if line.pAp > eps * norm_A * line.pp:
        return Status.BOUNDARY
    norm_A = max(norm_A, math.sqrt(dot(line.Ap, line.Ap) / line.pp))
    negative = line.pAp < -eps * norm_A * line.pp
    return Status.NEGATIVE_CURVATURE if negative else Status.ZERO_CURVATURE
