"""A preconditioner that is used only while it reduces the work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_positive_count
from ..operators.base import FunctionOperator, Identity, LinearOperator, congruent
from ..solvers.cg import cg
from ..solvers.solution import LinearSolution
from ..status import Status
from .base import Preconditioner

_BROKEN = (Status.NONFINITE_OPERATOR, Status.INDEFINITE_PRECONDITIONER, Status.BREAKDOWN)


class Gated:
    r"""Conjugate gradients with a preconditioner that is tested, and switched off where it loses.

    In a test the system is solved with and without the preconditioner, and the two are compared at
    equal work: ``k`` products without it, and with it as many iterations as that work allows,

    .. math:: k' = \left\lfloor \frac{k - w_b / e}{1 + w_a} \right\rfloor

    where :math:`w_b` is the work of a build, which ``e`` solves share, and :math:`w_a` the work of
    one product with ``M``, both in units of a product with ``A``. Work is counted or declared and
    never timed, so that the decision is reproducible. The preconditioner is used until the next
    test if it reduces the quadratic model further, or, if both solves converge, if it needs less
    work. The better of the two solutions is returned.

    The first solve is a test, then one in every ``retest`` solves, and every solve in which the
    preconditioner breaks down. A test is postponed while there is nothing to compare: while ``M``
    is still the identity, or if the system needs no iteration. A preconditioner that is switched
    off loses its state and is rebuilt in the next test; it observes the solve before that test.

    Cost of a test: the build, and up to two additional solves.

    Args:
        preconditioner: the preconditioner under test.
        retest: the number of solves from one test to the next.

    Attributes:
        enabled: True if the preconditioner is used; None before the first solve.
        gain: the result of the last test: the ratio of the decreases of the model with and without
            the preconditioner at equal work or, if both solves converged, the ratio of the work
            without and with it.

    Raises:
        TypeError: ``preconditioner`` is not a :class:`Preconditioner`.
        ValueError: ``retest`` is not a positive integer.

    Example:
        >>> from trustregion import Jacobi
        >>> from trustregion.operators import DenseOperator
        >>> A, b = DenseOperator(torch.diag(torch.logspace(0, 4, 30))), torch.ones(30)
        >>> gated = Gated(Jacobi(1.0, probes="exact", every=100))
        >>> gated.solve(A, b, 0.0, max_iter=10).iterations, str(gated)
        (1, 'Jacobi on: gain 3.6')

    """

    def __init__(self, preconditioner: Preconditioner, *, retest: int = 50) -> None:
        if not isinstance(preconditioner, Preconditioner):
            raise TypeError(
                f"a Preconditioner is needed, got {type(preconditioner).__name__}: pass an operator"
                " that approximates the inverse to the solver, as M="
            )
        check_positive_count("retest", retest)
        self.preconditioner, self.retest = preconditioner, retest
        self.enabled: bool | None = None
        self.gain = 1.0
        self._left = 0  # solves until the next test
        self._build = 0.0  # work of the last build that was not a reuse

    def __str__(self) -> str:
        """Return the name of the preconditioner and the result of the last test."""
        name = type(self.preconditioner).__name__
        if self.enabled is None:
            return f"{name}: not tested yet"
        return f"{name} {'on' if self.enabled else 'off'}: gain {self.gain:.2g}"

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors and numbers from which an optimizer resumes bit for bit."""
        numbers = {name: getattr(self, name) for name in ("enabled", "gain", "_left", "_build")}
        return {**numbers, "preconditioner": self.preconditioner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved state."""
        numbers = dict(state)
        self.preconditioner.load_state_dict(numbers.pop("preconditioner"))
        for name, value in numbers.items():
            setattr(self, name, value)

    def solve(
        self,
        A: LinearOperator,
        b: Tensor,
        damping: float,
        *,
        rtol: float = 1e-5,
        max_iter: int,
        scale: Tensor | None = None,
        x0: Tensor | None = None,
    ) -> LinearSolution:
        r"""Solve :math:`(D A D + \lambda I) x = b` with ``D = diag(scale)``, the identity if None.

        Args:
            A: the operator, without its damping.
            b: the right-hand side, shape ``(n,)``.
            damping: :math:`\lambda`.
            rtol: tolerance relative to the norm of ``b``.
            max_iter: limit on the iterations.
            scale: the diagonal of ``D``, shape ``(n,)``, not negative. The preconditioner is built
                for ``A``, and multiplied by the inverse of ``D`` on both sides.
            x0: the starting point.

        Returns:
            The solution. Its ``products`` include those of the build and of a test.

        """
        preconditioner, testing = self.preconditioner, self._left == 0
        self._left = max(self._left - 1, 0)
        plain = _System(A, b, damping, scale, None, x0)
        if not testing and not self.enabled:
            due = self._left == 0  # a test comes next
            return self._watched(plain, rtol, max_iter) if due else plain.solve(rtol, max_iter)
        M = preconditioner.build(A, damping)
        spent = preconditioner.products + preconditioner.overhead
        self._build = spent or self._build
        within = plain if isinstance(M, Identity) else replace(plain, M=M)
        solve = self._watched(within, rtol, max_iter)
        known = within is not plain or spent > 0
        if known and (testing or solve.status in _BROKEN):
            return self._test(plain, within, solve, rtol, max_iter)
        return replace(solve, products=solve.products + preconditioner.products)

    def _watched(self, system: _System, rtol: float, max_iter: int) -> LinearSolution:
        """Solve while the preconditioner observes."""
        watched = replace(system, A=self.preconditioner.watch(system.A))
        solve = watched.solve(rtol, max_iter)
        self.preconditioner.observe(solve)
        return solve

    def _test(
        self, without: _System, within: _System, solve: LinearSolution, rtol: float, max_iter: int
    ) -> LinearSolution:
        """Decide, and return the better solution with the products of all solves."""
        preconditioner = self.preconditioner
        build, each = self._build / preconditioner.every, 1 + preconditioner.work(without.A)
        plain = without.solve(rtol, max_iter)
        spent = preconditioner.products + solve.products + plain.products
        if not 0 < -plain.model_value < math.inf:  # there is nothing to compare with
            return replace(plain, products=spent)
        afforded, same = math.floor((plain.products - build) / each), solve
        if 0 < afforded < solve.iterations:  # limited to the work of the plain solve
            same = within.solve(rtol, afforded)
            spent += same.products
        if plain.status is Status.CONVERGED and same.status is Status.CONVERGED:
            self.gain = plain.products / (build + each * same.products)
        elif afforded < 1:
            self.gain = 0.0
        else:
            self.gain = max(same.model_value / plain.model_value, 0.0)
        self.enabled, self._left = self.gain > 1, self.retest - 1
        if not self.enabled:
            preconditioner.load_state_dict({})  # it would be stale by the next test
        better = solve if solve.model_value < plain.model_value else plain
        return replace(better, products=spent)


_EXAMPLES = {
    "kfac": "KFAC(module)",
    "jacobi": "Jacobi()",
    "nystrom": "Nystrom(rank)",
    "recycled": "Recycled()",
    "gated": "Gated(Jacobi())",
}


def check_preconditioner(given: object) -> None:
    """Raise if ``given`` is not a valid ``preconditioner=`` of an optimizer.

    Valid are a :class:`Preconditioner`, a :class:`Gated` one, an approximate inverse as an
    operator, a square matrix or a callable ``v -> M v``, and None.

    Raises:
        TypeError: ``given`` is anything else. For a class or a name, the message suggests an
            instance.

    Example:
        >>> check_preconditioner("kfac")
        Traceback (most recent call last):
        TypeError: preconditioner must be an instance, got the name 'kfac': pass KFAC(module)

    """
    if isinstance(given, (type, str)):
        kind = "name" if isinstance(given, str) else "class"
        shown = repr(given) if isinstance(given, str) else given.__name__
        name = given if isinstance(given, str) else given.__name__
        meant = _EXAMPLES.get(name.lower(), "an instance, such as KFAC(module) or Jacobi()")
        raise TypeError(f"preconditioner must be an instance, got the {kind} {shown}: pass {meant}")
    known = (Preconditioner, Gated, LinearOperator, Tensor)
    if given is not None and not isinstance(given, known) and not callable(given):
        raise TypeError(
            "preconditioner must be a Preconditioner such as KFAC(module) or Jacobi(), or an"
            " approximate inverse: an operator, a square matrix or a callable v -> M v; got"
            f" {type(given).__name__}"
        )
    if isinstance(given, Tensor) and (given.ndim != 2 or given.shape[0] != given.shape[1]):
        raise TypeError(
            "a preconditioner that is a tensor must be a square matrix, got shape"
            f" {tuple(given.shape)}"
        )


@dataclass(frozen=True)
class _System:
    """The system ``(D A D + damping I) x = b``, and a preconditioner of ``A + damping I``."""

    A: LinearOperator
    b: Tensor
    damping: float
    scale: Tensor | None
    M: LinearOperator | None
    x0: Tensor | None

    def solve(self, rtol: float, max_iter: int) -> LinearSolution:
        """Return the solution by ``cg``."""
        A, M, d = self.A, self.M, self.scale
        if d is not None:
            A = congruent(A, d)
            M = None if M is None else between(M, d)
        A = A + self.damping * Identity(A.shape[0], A.dtype, A.device)
        return cg(A, self.b, self.x0, M=M, rtol=rtol, max_iter=max_iter)


def between(M: LinearOperator, d: Tensor) -> LinearOperator:
    """Return ``D^-1 M D^-1`` for ``D = diag(d)``, and the identity where ``d`` is zero.

    There ``D A D`` is zero and couples to no other entry.
    """
    inverse, apart = torch.where(d > 0, 1 / d, 0.0), (d == 0).to(d.dtype)
    return congruent(M, inverse) + FunctionOperator(lambda v: apart * v, len(d), d.dtype, d.device)
