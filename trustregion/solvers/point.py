"""A point of a Krylov space with what its coefficients know about it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from ..vector import dot


@dataclass(frozen=True)
class Point:
    """A point of the space at unit scale, and what its coefficients know about it."""

    x: Tensor
    y: Tensor
    """``M^-1 x``; the tensor ``x`` itself without a preconditioner."""
    shift: float
    size: float
    """The norm of ``x`` in the metric ``M^-1``."""
    curvature: float
    """``x'(A + damping M^-1)x``."""
    linear: float
    """``b'x``."""
    onward: float
    """The norm of ``b - (A + shift M^-1) x``, by the coefficients."""
    rounding: float
    """What the rounding of the products adds to it."""

    def stretched(self, radius: float) -> Point:
        """Return the point at exactly the radius, from one there to rounding."""
        square = dot(self.x / radius, self.y / radius)
        if not 0 < square < math.inf:  # M is not positive definite, which the residual will show
            return self
        factor = 1 / math.sqrt(square)
        x = self.x * factor
        y = x if self.y is self.x else self.y * factor
        return replace(self, x=x, y=y, size=radius)

    @property
    def residual(self) -> float:
        """The norm of the residual with its rounding."""
        return math.hypot(self.onward, self.rounding)
