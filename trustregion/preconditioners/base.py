"""The interface of preconditioners that are rebuilt as the operator changes."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

from ..operators.base import LinearOperator
from ..operators.gauss_newton import GaussNewtonOperator
from ..solvers.solution import LinearSolution


class Preconditioner(abc.ABC):
    r"""A method to build :math:`M \approx (A + \lambda I)^{-1}` for each solve.

    ``M`` is symmetric positive definite for every ``A``, even one that is singular or not finite,
    and for :math:`\lambda = 0`. On a subspace without information it is a multiple of the identity.
    The scale of ``M`` does not affect ``cg``. For each solve an optimizer calls, in this order::

        M = preconditioner.build(A, damping)
        solve = cg(preconditioner.watch(A) + damping * Identity(n), b, M=M)
        preconditioner.observe(solve)

    Only :meth:`build` is abstract. Everything that is kept between solves is in :attr:`state`, as
    tensors and numbers by name, so that a saved optimizer resumes exactly.

    Attributes:
        products: the number of products with ``A`` in the last :meth:`build`; 0 for a reuse.
        overhead: the other work of the last build, in units of one product with ``A``.
        every: the number of solves that share the products of one build.
        state: the tensors and numbers that are kept between solves.

    """

    products: int = 0
    overhead: float = 0.0
    every: int = 1

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    @abc.abstractmethod
    def build(self, A: LinearOperator, damping: float) -> LinearOperator:
        """Return ``M`` for the operator ``A``, without its damping, and the damping.

        It sets :attr:`products`. On numerical failure it returns an identity instead of raising,
        and the status of the solve reports the failure.
        """

    def watch(self, A: LinearOperator) -> LinearOperator:
        """Return ``A``, or an equal operator that records the products of the next solve."""
        return A

    def observe(self, solve: LinearSolution) -> None:  # noqa: B027 # optional
        """Learn from a finished solve."""

    def work(self, A: LinearOperator) -> float:  # noqa: ARG002 # negligible by default
        """Return the cost of one product with ``M``, in units of one product with ``A``."""
        return 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return :attr:`state` for saving: references, not copies, as for torch modules."""
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state saved with the same arguments; an empty one resets."""
        self.state = dict(state)


def product_work(A: LinearOperator) -> float:
    r"""Return an estimate of the number of operations in a product with ``A``.

    It is :math:`8 N n` for a Gauss-Newton operator whose outputs have ``N`` rows, as for four
    matrix products per dense layer, and :math:`2 n^2` otherwise, as for a matrix.
    """
    n = A.shape[0]
    if not isinstance(A, GaussNewtonOperator):
        return max(1.0, 2.0 * n * n)
    return 8.0 * n * max(y.shape[0] if y.ndim else 1 for y in A.outputs)
