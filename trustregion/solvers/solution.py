"""What a linear solve returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..status import Status


@dataclass(frozen=True)
class LinearSolution:
    """The result of solving ``A x = b``.

    Attributes:
        x: the last finite iterate, shape ``(n,)``; never holds a NaN when ``x0`` holds none.
        status: how the solve ended.
        iterations: completed iterations.
        products: products with ``A``: one an iteration, one more for a warm start.
        residual_norm: the norm of ``b - A x`` as the recurrence carries it.
        curvature: ``x'Ax``, computed from the residual, without a product.
        direction: for ``NEGATIVE_CURVATURE`` and ``ZERO_CURVATURE`` the direction ``p`` found, with
            ``p'Ap`` not positive to working precision; None otherwise.

    """

    x: Tensor
    status: Status
    iterations: int
    products: int
    residual_norm: float
    curvature: float
    direction: Tensor | None = None
