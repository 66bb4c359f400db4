"""A trust-region subproblem at unit scale, and its solution in the units of the caller."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..arguments import finite
from ..status import Status
from ..vector import exponent, ldexp, scalar_ldexp
from .solution import SubproblemSolution


@dataclass(frozen=True)
class Ball:
    r"""The problem ``min 1/2 s'As - b's, |s| <= radius`` with ``b`` and ``radius`` over ``2^e``."""

    b: Tensor
    """Minus the gradient, in float64, of unit size."""
    radius: float
    e: int
    dtype: torch.dtype

    @property
    def eps(self) -> float:
        """The relative rounding error of the products."""
        return torch.finfo(self.dtype).eps

    def with_radius(self, radius: float) -> Ball:
        """Return the problem with a radius in the units of the caller.

        The scaled radius stays in the range of float64 for any ratio of radius to gradient.
        """
        unit = min(max(scalar_ldexp(radius, -self.e), sys.float_info.min), sys.float_info.max)
        return replace(self, radius=unit)

    def returned(self, s: Tensor) -> Tensor:
        """Return the step in the units and the dtype of the caller."""
        return ldexp(s, self.e).to(self.dtype)

    def rounding(self, s: Tensor) -> Tensor:
        """Return the rounding error of the returned step, in the units of this problem."""
        return s - ldexp(self.returned(s).double(), -self.e)

    def account(
        self,
        s: Tensor,
        status: Status,
        *,
        iterations: int,
        products: int,
        size: float,
        reduction: float,
        curvature: float,
        residual_norm: float,
        on_boundary: bool = False,
        multiplier: float = 0.0,
        hard_case: bool = False,
        direction: Tensor | None = None,
    ) -> SubproblemSolution:
        """Return the solution from a step at unit scale and its numbers."""
        step = self.returned(s)
        if not finite(step):
            return no_step(step, Status.NONFINITE_OPERATOR, iterations, products)
        return SubproblemSolution(
            s=step,
            status=status,
            on_boundary=on_boundary,
            multiplier=multiplier,
            predicted_reduction=scalar_ldexp(reduction, 2 * self.e),
            iterations=iterations,
            products=products,
            norm=scalar_ldexp(size, self.e),
            curvature=scalar_ldexp(curvature, 2 * self.e),
            residual_norm=scalar_ldexp(residual_norm, self.e),
            hard_case=hard_case,
            direction=None if direction is None else direction.to(self.dtype, copy=True),
        )


def region(g: Tensor, radius: float) -> Ball | SubproblemSolution:
    """Return the problem at unit scale, or a solution without a step if ``g`` is not finite.

    A zero gradient is not scaled.
    """
    if not finite(g):
        return no_step(g, Status.NONFINITE_INPUT)
    e = exponent(g) or 0
    return Ball(ldexp(-g.double(), -e), math.inf, e, g.dtype).with_radius(radius)


def no_step(
    g: Tensor, status: Status, iterations: int = 0, products: int = 0
) -> SubproblemSolution:
    """Return the zero step, for a problem without a step or without a finite solution."""
    residual = 0.0 if status is Status.CONVERGED else math.inf
    return SubproblemSolution(
        s=torch.zeros_like(g),
        status=status,
        on_boundary=False,
        multiplier=0.0,
        predicted_reduction=0.0,
        iterations=iterations,
        products=products,
        norm=0.0,
        curvature=0.0,
        residual_norm=residual,
    )
