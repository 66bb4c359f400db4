"""Stopping rules: tolerances, breakdowns, the progress of the model, forcing sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..arguments import as_number_in
from ..status import Status
from ..vector import norm, scalar_ldexp

# The estimate of the gap between the recurred and the true residual is correct to a factor of 3 on
# all systems tried (dense ones up to n = 3000). This factor leaves a margin.
SAFETY = 8.0


@dataclass(frozen=True)
class Tolerance:
    """The tolerance on the norm of a residual: the larger of a relative and an absolute one."""

    rtol: float | Callable[[float], float]
    atol: float

    def of(self, b: Tensor, e: int) -> float:
        """Return the tolerance for the right-hand side ``2^e b``, in units of ``2^e``."""
        size = norm(b)
        rtol = self.rtol(scalar_ldexp(size, e)) if callable(self.rtol) else self.rtol
        if not rtol >= 0:
            raise ValueError(f"rtol must return a number that is not negative, got {rtol}")
        return max(rtol * size, scalar_ldexp(self.atol, -e))


def surely_below(size: float, rounding: float, tolerance: float) -> bool:
    """Return whether a measured residual proves that the true one is below the tolerance.

    ``rounding`` is the error of the product that measured it, about ``eps |A| |x|``.
    """
    return size + rounding <= tolerance


def why_no_direction(rz: float) -> Status:
    """Return what is wrong with ``M``: ``r'Mr`` is not positive and finite for a nonzero ``r``."""
    if not math.isfinite(rz):
        return Status.NONFINITE_OPERATOR
    return Status.INDEFINITE_PRECONDITIONER if rz < 0 else Status.BREAKDOWN


class Progress:
    r"""Martens' rule on the model values :math:`\phi_i` of the iterates.

    Satisfied at iteration ``i`` if, with :math:`k = \max(10, \lceil i / 10 \rceil)`,

    .. math:: i > k, \quad \phi_i < 0, \quad \frac{\phi_i - \phi_{i-k}}{\phi_i} < k \epsilon

    so that the last ``k`` iterations must on average each have gained the fraction ``tol`` of the
    total gain.

    Args:
        tol: epsilon; 5e-4 in the paper.
        start: the model value of the starting point.

    References:
        Martens, Deep Learning via Hessian-free Optimization, 2010, section 4.4.

    """

    def __init__(self, tol: float, start: float = 0.0) -> None:
        self.tol = tol
        self.values = [start]

    def satisfied(self, value: float) -> bool:
        """Append the model value of the next iterate, and return whether to stop there."""
        self.values.append(value)
        i = len(self.values) - 1
        k = max(10, -(-i // 10))
        return i > k and value < 0 and (value - self.values[i - k]) / value < k * self.tol

    def stops_after(self, gain: float) -> bool:
        """Append a model value that is lower by ``gain``, and return whether to stop there."""
        return self.satisfied(self.values[-1] - gain)


def forcing_sequence(kappa: float = 0.5, theta: float = 0.5) -> Callable[[float], float]:
    r"""Return the rule :math:`\|b\| \mapsto \min(\kappa, \|b\|^\theta)`, to be passed as ``rtol``.

    In Newton's method ``b`` is minus the gradient. The systems are solved roughly far from a
    solution and more exactly near it, and the method converges with order ``1 + theta``. The rule
    depends on the scale of the loss, which should be of order one. If it is not, divide by a
    reference norm: ``rtol=lambda size: rule(size / first)``.

    Args:
        kappa: upper limit of the relative tolerance, in (0, 1).
        theta: in (0, 1]: 1/2 gives superlinear, 1 quadratic convergence.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> rule = forcing_sequence()
        >>> rule(100.0), rule(0.01)
        (0.5, 0.1)

    References:
        Dembo, Eisenstat and Steihaug, Inexact Newton Methods, 1982; Conn, Gould and Toint,
        Trust-Region Methods, 2000, section 7.5.1.

    """
    as_number_in("kappa", kappa, "(0, 1)")
    as_number_in("theta", theta, "(0, 1]")
    return lambda size: min(kappa, size**theta)


def eisenstat_walker(
    size: float,
    previous_size: float,
    previous_rtol: float,
    *,
    gamma: float = 0.9,
    alpha: float = (1 + 5**0.5) / 2,
    largest: float = 0.9,
) -> float:
    r"""Return the next relative tolerance of an inexact Newton method, from the decrease of ``g``.

    :math:`\eta_k = \gamma (\|g_k\| / \|g_{k-1}\|)^\alpha`, but at least
    :math:`\gamma \eta_{k-1}^\alpha` if that is above 0.1, and at most ``largest``. Unlike
    :func:`forcing_sequence`, the rule does not depend on the scale of the loss.

    Args:
        size: the norm of the current gradient.
        previous_size: the norm of the gradient one step earlier.
        previous_rtol: the relative tolerance of that step.
        gamma: in (0, 1].
        alpha: order of convergence, in (1, 2].
        largest: upper limit.

    Example:
        >>> eisenstat_walker(0.5, 1.0, 0.1, alpha=2.0)
        0.225

    References:
        Eisenstat and Walker, Choosing the Forcing Terms in an Inexact Newton Method, 1996,
        choice 2 with its safeguard.

    """
    if not (size >= 0 and previous_size > 0 and previous_rtol >= 0):
        raise ValueError(
            "norms and tolerances must not be negative, and the previous norm not zero, got"
            f" size={size}, previous_size={previous_size}, previous_rtol={previous_rtol}"
        )
    rtol = gamma * (size / previous_size) ** alpha
    floor = gamma * previous_rtol**alpha
    return min(max(rtol, floor) if floor > 0.1 else rtol, largest)
