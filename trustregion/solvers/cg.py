"""Preconditioned conjugate gradients, for one or several right-hand sides."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..arguments import check_count, check_start, check_tolerances, check_vector
from ..operators.base import LinearOperator, OperatorLike, as_operator
from ..status import Status
from .recurrence import Recurrence, Rules
from .solution import LinearSolution
from .stopping import Progress
from .verified import Asking, Goal, Observer, Solving, drive, solve


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

    Each iterate minimises :math:`\frac12 x'Ax - b'x` over a growing Krylov space. The kernel stops
    when :math:`\|b - Ax\| \le \max(\mathrm{rtol}\,\|b\|, \mathrm{atol})`, and at anything that
    makes the next iterate meaningless: an ``A`` or ``M`` that is not positive definite, or a value
    that is not finite. It never raises for numerical trouble and never returns a NaN.

    How it differs from the textbook, and why:

    1. ``b`` is scaled to unit size by a power of two, so that scaling ``b`` or ``A`` by a power of
       two scales ``x`` bit for bit and nothing overflows early. There are no absolute constants.
    2. Vectors are carried and inner products taken in float64, also for a float32 operator, whose
       products are then the only rounding in float32.
    3. Curvature is judged against the largest ``|Ap|/|p|`` seen, a lower bound of ``|A|``: a value
       below ``eps`` times that is rounding, not curvature.
    4. ``x'Ax`` is returned as ``x'(b - r)``. The shortcut ``x'b``, exact in exact arithmetic, is
       off by up to 3e-3 in float32.
    5. ``CONVERGED`` is a statement on the true residual. Where the recurred one might be off by
       more than the tolerance leaves room for, ``b - Ax`` is measured by one product. If it is
       above the tolerance after all, the solve goes on from it; if going on no longer helps, it
       ends as ``STAGNATED``.

    Several right-hand sides ``(n, k)`` advance together, so that the operator sees blocks; each
    has its own tolerance and stops by itself, and takes no further products then.

    Cost: one product with ``A`` and one with ``M`` an iteration, one more with ``A`` for ``x0``
    and for each measured residual. Memory: five vectors in float64 for each right-hand side, seven
    with ``M``; one more an iteration with ``reorthogonalize`` (two with ``M``).

    Args:
        A: a :class:`LinearOperator`, a square tensor, or a callable ``v -> A v``.
        b: right-hand side, shape ``(n,)`` or ``(n, k)``, float32 or float64.
        x0: starting point, of the shape of ``b``; zero when None. Not written to.
        M: preconditioner, an approximation of the inverse of ``A``, positive definite.
        rtol: tolerance relative to the norm of ``b``, or a rule that makes it from that norm, such
            as :func:`forcing_sequence`.
        atol: absolute tolerance on the residual's norm.
        max_iter: limit on iterations; ``10 n`` when None.
        max_products: limit on products with ``A``, those that measure a residual included; none
            when None. It ends a solve as ``MAX_ITER``. The product for ``x0`` is always spent.
        progress_tol: epsilon of Martens' rule: stop when the model value has improved by less
            than this fraction an iteration (see :class:`Progress`); 5e-4 is his choice.
        reorthogonalize: keep the residuals and orthogonalise each new one against all of them. In
            float32, or at a high condition, this saves the iterations that rounding adds.
        verify: measure the true residual at the end, by one product where it is not known.
        callback: called with the current iterate after each iteration; one vector only.

    Returns:
        The solution and how it ended; see :class:`LinearSolution`.

    Raises:
        TypeError: ``b`` is not a real floating tensor, or ``A`` or ``M`` is not an operator.
        ValueError: shapes or dtypes do not fit, or a tolerance or limit is negative.

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
    if progress_tol is not None and not progress_tol > 0:
        raise ValueError(f"progress_tol must be positive, got {progress_tol}")
    if b.ndim == 2 and callback is not None:
        raise ValueError("callback takes the iterate of one right-hand side: pass b of shape (n,)")
    like = b if b.ndim == 1 else b[:, 0] if b.shape[1] else b.new_empty(b.shape[0])
    A = as_operator(A, like)
    M = None if M is None else as_operator(M, like)
    limit = 10 * like.numel() if max_iter is None else max_iter
    spend = math.inf if max_products is None else max_products
    goal = Goal(rtol, atol, limit, spend, verify, callback)

    def start(
        r: Tensor, tolerance: float, left: int, observe: Observer | None, value: float
    ) -> Asking:
        progress = None if progress_tol is None else Progress(progress_tol, value)
        rules = Rules(tolerance, left, progress, reorthogonalize=reorthogonalize)
        return Recurrence(r, b.dtype, M, rules, observe).iterate()

    if b.ndim == 1:
        return drive(A, solve(b, x0, goal, start))
    starts = [None] * b.shape[1] if x0 is None else x0.unbind(1)
    pairs = zip(b.unbind(1), starts, strict=True)
    return _together(A, b, [solve(*pair, goal, start) for pair in pairs])


def _together(A: LinearOperator, b: Tensor, solves: list[Solving]) -> LinearSolution:
    """Give several solves their products in blocks, and join what they return."""
    ended: dict[int, LinearSolution] = {}
    answers: dict[int, Tensor | None] = dict.fromkeys(range(len(solves)))
    while answers:
        asked: dict[int, Tensor] = {}
        for i, answer in answers.items():
            try:
                asked[i] = solves[i].send(answer)  # type: ignore[arg-type]  # None starts it
            except StopIteration as end:
                ended[i] = end.value
        if not asked:
            break
        V = torch.stack(list(asked.values()), dim=1)
        block = A.mm(V)
        if block.shape != V.shape or block.dtype is not V.dtype:
            raise ValueError(
                f"the operator must map a block of shape {tuple(V.shape)} and dtype {V.dtype} to"
                f" one alike, got shape {tuple(block.shape)} and dtype {block.dtype}"
            )
        answers = dict(zip(asked, block.T.contiguous(), strict=True))
    return join(b, [ended[i] for i in range(len(solves))])


def join(b: Tensor, columns: list[LinearSolution]) -> LinearSolution:
    """Return the account of all columns of ``b``."""
    others = (c.status for c in columns if c.status is not Status.CONVERGED)
    return LinearSolution(
        torch.stack([c.x for c in columns], dim=1) if columns else torch.zeros_like(b),
        next(others, Status.CONVERGED),
        max((c.iterations for c in columns), default=0),
        sum(c.products for c in columns),
        max((c.residual_norm for c in columns), default=0.0),
        math.fsum(c.curvature for c in columns),
        model_value=math.fsum(c.model_value for c in columns),
        norm=max((c.norm for c in columns), default=0.0),
        true_residual_norm=_largest([c.true_residual_norm for c in columns]),
        columns=tuple(columns),
    )


def _largest(norms: list[float | None]) -> float | None:
    """Return the largest, or None if one is not known."""
    known = [size for size in norms if size is not None]
    return max(known) if known and len(known) == len(norms) else None
