"""A point of a Krylov space, with the numbers that follow from its coefficients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from ..vector import dot


@dataclass(frozen=True)
class Point:
    """A point of the space at unit scale, with the numbers that follow from its coefficients."""

    x: Tensor
    y: Tensor
    """``M^-1 x``; without a preconditioner it is the tensor ``x`` itself."""
    shift: float
    size: float
    """The norm of ``x`` in the metric ``M^-1``."""
    curvature: float
    """``x'(A + damping M^-1)x``."""
    linear: float
    """``b'x``."""
    onward: float
    """The norm of ``b - (A + shift M^-1) x`` according to the coefficients."""
    rounding: float
    """What the rounding of the products adds to that norm."""

    def stretched(self, radius: float) -> Point:
        """Return the point scaled to the radius exactly."""
        square = dot(self.x / radius, self.y / radius)
        if not 0 < square < math.inf:  # M is not positive definite; the residual shows it
            return self
        factor = 1 / math.sqrt(square)
        x = self.x * factor
        y = x if self.y is self.x else self.y * factor
        return replace(self, x=x, y=y, size=radius)

    @property
    def residual(self) -> float:
        """The norm of the residual, including rounding."""
        return math.hypot(self.onward, self.rounding)
