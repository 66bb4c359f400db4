"""What a preconditioner is to an optimizer: built before a solve, told of it afterwards."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any

from ..arguments import check_count, is_number, shown
from ..operators.base import LinearOperator
from ..operators.gauss_newton import GaussNewtonOperator
from ..solvers.solution import LinearSolution


class Preconditioner(abc.ABC):
    r"""A rule that makes :math:`M \approx (A + \lambda I)^{-1}`, once for each solve.

    ``M`` is symmetric positive definite whatever ``A`` is, also where ``A`` is singular or not
    finite and :math:`\lambda = 0`: it is then the identity on what the rule knows nothing of, up to
    a factor. Its scale is of no matter to ``cg``. A solve calls, in this order::

        M = preconditioner.build(A, damping)
        solve = cg(preconditioner.watch(A) + damping * Identity(n), b, M=M)
        preconditioner.observe(solve)

    Only :meth:`build` has to be defined. All that a rule keeps from one solve to the next is in
    :attr:`state`, tensors and numbers by name, so that a saved optimizer goes on as if it had not
    stopped.

    Attributes:
        products: products with ``A`` that the last :meth:`build` spent; 0 where it reused one.
        overhead: other work of the last build, in units of one product.
        every: how many solves share the products of one build.
        state: what is kept between solves.

    """

    products: int = 0
    overhead: float = 0.0
    every: int = 1

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    @abc.abstractmethod
    def build(self, A: LinearOperator, damping: float) -> LinearOperator:
        """Return ``M`` for the operator ``A``, without its damping, and the damping.

        Never raises for numerical trouble: it returns an identity, and the status of the solve
        tells. Sets :attr:`products`.
        """

    def watch(self, A: LinearOperator) -> LinearOperator:
        """Return ``A``, or the same operator with an eye on the products of the coming solve."""
        return A

    def observe(self, solve: LinearSolution) -> None:  # noqa: B027 # most rules learn nothing
        """Take note of a finished solve."""

    def work(self, A: LinearOperator) -> float:  # noqa: ARG002 # most rules cost next to nothing
        """Return the cost of one product with ``M``, in units of one product with ``A``."""
        return 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return :attr:`state`, to be saved: references, not copies, as torch modules do."""
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, made with the same arguments; anew from an empty one."""
        self.state = dict(state)


def product_work(A: LinearOperator) -> float:
    r"""Return roughly how many operations a product with ``A`` takes.

    :math:`8 N n` for a Gauss-Newton operator whose outputs have ``N`` rows: four matrix products a
    layer, as of dense layers; :math:`2 n^2`, as of a matrix, otherwise.
    """
    n = A.shape[0]
    if not isinstance(A, GaussNewtonOperator):
        return max(1.0, 2.0 * n * n)
    return 8.0 * n * max(y.shape[0] if y.ndim else 1 for y in A.outputs)


def check_damping(damping: object) -> None:
    """Refuse a damping that is not a finite number or is negative."""
    if not (is_number(damping) and 0 <= damping < math.inf):
        raise ValueError(f"damping must be a finite number and not negative, got {shown(damping)}")


def check_positive(name: str, value: object) -> None:
    """Refuse a count that is not a positive integer."""
    check_count(name, value)
    if not value:
        raise ValueError(f"{name} must be a positive integer, got {shown(value)}")
