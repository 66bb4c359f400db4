"""Conjugate gradients as a fixed sequence of tensor operations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import check_count, check_start, check_tolerances, check_vector
from ..operators.base import LinearOperator, OperatorLike, as_operator


class FixedSolution(NamedTuple):
    """The result of :func:`fixed_cg`: tensors only, so that it can be mapped and compiled.

    Attributes:
        x: the last iterate, shape ``(n,)``.
        residual_norm: the norm of ``b - A x``, computed by the recurrence. It and all numbers below
            are float64.
        curvature: ``x'Ax``, computed without a product.
        model_value: ``x'Ax / 2 - b'x``.
        iterations: the number of iterations that moved ``x``.
        converged: whether the residual reached the tolerance; for ``rtol=0``, whether it is exactly
            zero.
        failed: whether a direction without positive curvature or a product that is not finite ended
            the solve, and ``x`` is the iterate before it; or whether an input or the result is not
            finite, and ``x`` is zero.

    """

    x: Tensor
    residual_norm: Tensor
    curvature: Tensor
    model_value: Tensor
    iterations: Tensor
    converged: Tensor
    failed: Tensor


def fixed_cg(
    A: OperatorLike,
    b: Tensor,
    iterations: int,
    *,
    x0: Tensor | None = None,
    M: OperatorLike | None = None,
    rtol: float = 0.0,
) -> FixedSolution:
    r"""Run :func:`cg` for a fixed number of iterations, without a decision in Python.

    The iterates are those of :func:`cg`. A system that has converged or failed is masked: its
    numbers do not change while the loop continues. Therefore :func:`torch.func.vmap` solves many
    systems at once, each with its own end, and ``torch.compile(fullgraph=True)`` accepts the
    function. It is differentiable in ``A`` and ``b``; call it under ``torch.no_grad()`` if no
    gradient is needed.

    Unlike :func:`cg` it does not measure the true residual (``converged`` refers to the recurred
    one), does not reorthogonalize, and reports no :class:`Status`.

    Cost: ``iterations`` products with ``A`` and with ``M``, and one more with ``A`` for ``x0``.

    Args:
        A: a :class:`LinearOperator`, a square tensor, or a callable ``v -> A v``.
        b: right-hand side, shape ``(n,)``, float32 or float64.
        iterations: number of iterations.
        x0: starting point, shape ``(n,)``; zero if None.
        M: positive definite preconditioner, an approximation of the inverse of ``A``.
        rtol: tolerance relative to the norm of ``b``; at 0 no system stops early.

    Raises:
        TypeError: ``b`` is not a real floating-point vector, or ``A`` or ``M`` is not an operator.
        ValueError: shapes or dtypes do not match, or a number is negative.

    Example:
        >>> A = torch.stack([torch.diag(torch.tensor([1.0, 2.0])), torch.eye(2)])
        >>> b = torch.tensor([[1.0, 1.0], [3.0, 4.0]])
        >>> solution = torch.func.vmap(lambda A, b: fixed_cg(A, b, 2, rtol=1e-6))(A, b)
        >>> solution.x
        tensor([[1.0000, 0.5000],
                [3.0000, 4.0000]])
        >>> solution.iterations
        tensor([2, 1])

    References:
        Hestenes and Stiefel, Methods of Conjugate Gradients, 1952.

    """
    check_vector("b", b)
    check_start(x0, b)
    check_count("iterations", iterations)
    check_tolerances(rtol, 0.0)
    A = as_operator(A, b)
    M = None if M is None else as_operator(M, b)
    dtype = b.dtype
    unit = _unit(b)
    b = b.double() / unit
    start = torch.zeros_like(b) if x0 is None else x0.double() / unit
    x = torch.zeros_like(b)
    r = b if x0 is None else b - A.mv(start.to(dtype)).double()
    rr, none = r @ r, torch.zeros((), dtype=torch.float64, device=b.device)
    state = _State(x, r, x, rr, none, none, none.to(torch.int64), ~rr.isfinite())
    tolerance = rtol * rtol * (b @ b)
    for _ in range(iterations):
        state = _iterate(state, A, M, tolerance, dtype)
    x, r = start + state.x, state.r
    returned = (x * unit).to(dtype)
    sound = returned.isfinite().all() & rr.isfinite()
    numbers = (state.rr.sqrt(), x @ (b - r) * unit, -0.5 * (x @ (b + r)) * unit)
    residual, curvature, value = (torch.where(sound, t, 0.0) * unit for t in numbers)
    return FixedSolution(
        x=torch.where(sound, returned, 0.0),
        residual_norm=torch.where(sound, residual, torch.inf),
        curvature=curvature,
        model_value=value,
        iterations=state.steps,
        converged=sound & (state.rr <= tolerance),
        failed=state.failed | ~sound,
    )


class _State(NamedTuple):
    x: Tensor
    r: Tensor
    p: Tensor
    rr: Tensor
    rz: Tensor
    norm_A: Tensor
    steps: Tensor
    failed: Tensor


def _iterate(
    state: _State,
    A: LinearOperator,
    M: LinearOperator | None,
    tolerance: Tensor,
    dtype: torch.dtype,
) -> _State:
    """Return the state after one iteration, or the same one if it has ended."""
    x, r, p, rr, rz_old, norm_A, steps, failed = state
    going = ~failed & (rr > tolerance)
    z = r if M is None else M.mv(r.to(dtype)).double()
    rz = r @ z
    beta = torch.where(steps > 0, rz / torch.where(steps > 0, rz_old, 1.0), 0.0)
    p = z + beta * p
    Ap = A.mv(p.to(dtype)).double()
    pAp, pp = p @ Ap, p @ p
    alpha = rz / torch.where(pAp > 0, pAp, 1.0)
    r_next = r - alpha * Ap
    rr_next = r_next @ r_next
    # |Ap|/|p|, as in the recurrence of cg
    steep = ((rr + rr_next).sqrt() / alpha if M is None else Ap.norm()) / pp.sqrt()
    norm_A = torch.maximum(norm_A, steep)
    sound = (rz > 0) & (pAp > torch.finfo(dtype).eps * norm_A * pp) & rr_next.isfinite()
    moved = _State(x + alpha * p, r_next, p, rr_next, rz, norm_A, steps + 1, failed)
    ended = state._replace(failed=failed | (going & ~sound))
    return _State(*(torch.where(going & sound, a, b) for a, b in zip(moved, ended, strict=True)))


def _unit(b: Tensor) -> Tensor:
    """Return the power of two at the size of ``b``, 1 for ``b = 0``, float64."""
    largest = torch.cat([b.double().abs(), b.new_zeros(1).double()]).amax()  # b may be empty
    _, e = torch.frexp(torch.where((largest > 0) & largest.isfinite(), largest, 1.0))
    return torch.ldexp(torch.ones_like(largest), e)
