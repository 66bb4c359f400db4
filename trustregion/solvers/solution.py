"""The results of the kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..status import Status
from ..vector import ldexp, scalar_ldexp


@dataclass(frozen=True, kw_only=True, eq=False)  # == on tensors is elementwise
class LinearSolution:
    r"""The result of solving ``A x = b``, or several such systems at once.

    For a right-hand side of shape ``(n, k)``, :attr:`columns` holds one solution per column, and
    the other attributes summarize them. ``status`` is ``CONVERGED`` if every column converged, and
    otherwise the status of the first column that did not. Norms and iterations are maxima;
    products, curvature and model value are sums.

    Attributes:
        x: the solution, shaped like ``b``; it is finite if ``x0`` is.
        status: how the solve ended.
        iterations: the number of completed iterations.
        products: the number of products with ``A``: one per iteration, and one more for a warm
            start, for a direction that ended the solve, and for each measurement of the residual.
        residual_norm: the norm of ``b - A x``. It was measured by a product if
            ``true_residual_norm`` is not None, and computed by the recurrence otherwise.
        curvature: ``x'Ax``, computed from the residual without a product.
        direction: for ``NEGATIVE_CURVATURE`` and ``ZERO_CURVATURE``, the direction ``p`` whose
            ``p'Ap`` is not positive to working precision; None otherwise.
        model_value: :math:`\frac12 x'Ax - b'x`, computed without a product.
        norm: the norm of ``x - x0`` in the metric :math:`M^{-1}` of the preconditioner, by
            recurrence; without a preconditioner, the Euclidean norm.
        true_residual_norm: the norm of ``b - A x``, measured by a separate product; None if the
            recurrence was accurate enough and ``verify`` was False.
        preconditioned_residual_norm: :math:`\sqrt{r'Mr}`, if the kernel minimizes that norm.
        columns: one solution per column of ``b``; empty for a vector.

    """

    x: Tensor
    status: Status
    iterations: int
    products: int
    residual_norm: float
    curvature: float = 0.0
    direction: Tensor | None = None
    model_value: float = 0.0
    norm: float = 0.0
    true_residual_norm: float | None = None
    preconditioned_residual_norm: float | None = None
    columns: tuple[LinearSolution, ...] = ()

    @classmethod
    def none(
        cls,
        x: Tensor,
        status: Status,
        *,
        products: int = 0,
        residual_norm: float = math.inf,
        direction: Tensor | None = None,
    ) -> LinearSolution:
        """Return the solution ``x`` of a solve that ended before its first iteration."""
        return LinearSolution(
            x=x,
            status=status,
            iterations=0,
            products=products,
            residual_norm=residual_norm,
            direction=direction,
        )

    def in_units(self, e: int, dtype: torch.dtype) -> LinearSolution:
        """Return the solution for ``2^e b`` with vectors of another dtype."""
        measured, metric = self.true_residual_norm, self.preconditioned_residual_norm
        p = self.direction
        return replace(
            self,
            x=ldexp(self.x, e).to(dtype),
            direction=None if p is None else p.to(dtype, copy=True),
            residual_norm=scalar_ldexp(self.residual_norm, e),
            curvature=scalar_ldexp(self.curvature, 2 * e),
            model_value=scalar_ldexp(self.model_value, 2 * e),
            norm=scalar_ldexp(self.norm, e),
            true_residual_norm=None if measured is None else scalar_ldexp(measured, e),
            preconditioned_residual_norm=None if metric is None else scalar_ldexp(metric, e),
        )


def join(b: Tensor, columns: Sequence[LinearSolution]) -> LinearSolution:
    """Return the solution for ``b`` of shape ``(n, k)`` from the solutions for its columns."""
    others = (c.status for c in columns if c.status is not Status.CONVERGED)
    measured = [c.true_residual_norm for c in columns if c.true_residual_norm is not None]
    return LinearSolution(
        x=torch.stack([c.x for c in columns], dim=1) if columns else torch.zeros_like(b),
        status=next(others, Status.CONVERGED),
        iterations=max((c.iterations for c in columns), default=0),
        products=sum(c.products for c in columns),
        residual_norm=max((c.residual_norm for c in columns), default=0.0),
        curvature=math.fsum(c.curvature for c in columns),
        model_value=math.fsum(c.model_value for c in columns),
        norm=max((c.norm for c in columns), default=0.0),
        true_residual_norm=max(measured) if 0 < len(measured) == len(columns) else None,
        columns=tuple(columns),
    )


@dataclass(frozen=True, kw_only=True, eq=False)  # == on tensors is elementwise
class SubproblemSolution:
    r"""The result of minimizing :math:`g's + \frac12 s'As` over :math:`\|s\| \le \Delta`.

    The norm is :math:`\|s\|^2 = s'M^{-1}s` with a preconditioner ``M``, Euclidean without one.

    Attributes:
        s: the step, shape ``(n,)``; finite, and within the radius up to rounding.
        status: ``CONVERGED`` if the optimality conditions hold to the tolerance; ``BOUNDARY`` or
            ``NEGATIVE_CURVATURE`` if a truncated method stopped at the edge for that reason;
            otherwise the reason for an early end, with the best step found.
        on_boundary: whether the length of the step equals the radius.
        multiplier: :math:`\lambda \ge 0` with :math:`(A + \lambda M^{-1}) s = -g`; zero inside the
            ball. NaN if a truncated method, which does not compute it, stopped at the edge.
        predicted_reduction: the decrease of the model, :math:`-g's - \frac12 s'As \ge 0`.
        iterations: the number of completed iterations.
        products: the number of products with ``A``.
        norm: the length of the step in the norm above.
        curvature: ``s'As``, computed without a separate product.
        residual_norm: the norm of :math:`(A + \lambda M^{-1}) s + g`; if the multiplier is unknown,
            the norm of ``A s + g``.
        hard_case: whether the step was completed by an eigenvector of the leftmost eigenvalue, to
            which the gradient is orthogonal.
        direction: the direction without positive curvature at which :func:`steihaug` stopped.

    """

    s: Tensor
    status: Status
    on_boundary: bool
    multiplier: float
    predicted_reduction: float
    iterations: int
    products: int
    norm: float
    curvature: float
    residual_norm: float
    hard_case: bool = False
    direction: Tensor | None = None
