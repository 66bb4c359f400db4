"""A preconditioner that is used where it pays."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..operators.base import Identity, LinearOperator, congruent
from ..solvers.cg import cg
from ..solvers.solution import LinearSolution
from ..status import Status
from .base import Preconditioner, check_positive


class Gated:
    r"""Conjugate gradients with a preconditioner that is measured, and switched off where it loses.

    In the first solve and in one of every ``retest`` the system is solved both ways, for the same
    work: ``k`` iterations without, and with the preconditioner as many as

    .. math:: k' = \left\lfloor \frac{k - w_b / e}{1 + w_a} \right\rfloor

    where :math:`w_b` is the work of a build, shared by ``e`` solves, and :math:`w_a` that of one
    product with ``M``, in units of a product with ``A``: counted or declared, never timed, so that
    the answer is reproducible. The preconditioner is used until the next test if the quadratic
    model falls further with it, or as far for less work where both solve the system. The better of
    the two solutions is returned. A test costs one more solve.

    Args:
        preconditioner: what is on trial.
        retest: how many solves go by from one test to the next.

    Attributes:
        enabled: whether the preconditioner is used; None before the first solve.
        gain: the decrease of the model with it over that without, for the same work, in the last
            test; where both solved the system, the work without it over that with it.

    Raises:
        TypeError: ``preconditioner`` is not one.
        ValueError: ``retest`` is not a positive integer.

    Example:
        >>> from trustregion import DenseOperator, Jacobi
        >>> A, b = DenseOperator(torch.diag(torch.logspace(0, 4, 30))), torch.ones(30)
        >>> gated = Gated(Jacobi(1.0, probes="exact", every=100))
        >>> gated.solve(A, b, 0.0, max_iter=10).iterations, str(gated)
        (1, 'Jacobi on: gain 3.6')

    """

    def __init__(self, preconditioner: Preconditioner, *, retest: int = 50) -> None:
        if not isinstance(preconditioner, Preconditioner):
            raise TypeError(
                f"a Preconditioner is needed, got {type(preconditioner).__name__}: pass an operator"
                " that approximates the inverse to the kernel, as M="
            )
        check_positive("retest", retest)
        self.preconditioner, self.retest = preconditioner, retest
        self.enabled: bool | None = None
        self.gain = 1.0
        self._solves = 0

    def __str__(self) -> str:
        """Return the name of the preconditioner and what the last test found."""
        name = type(self.preconditioner).__name__
        if self.enabled is None:
            return f"{name}: not tested yet"
        return f"{name} {'on' if self.enabled else 'off'}: gain {self.gain:.2g}"

    def solve(
        self,
        A: LinearOperator,
        b: Tensor,
        damping: float,
        *,
        rtol: float = 1e-5,
        max_iter: int,
        scale: Tensor | None = None,
    ) -> LinearSolution:
        r"""Solve :math:`(D A D + \lambda I) x = b` with ``D = diag(scale)``, the identity if None.

        Args:
            A: the operator, without its damping.
            b: the right-hand side, shape ``(n,)``.
            damping: :math:`\lambda`.
            rtol: tolerance relative to the norm of ``b``.
            max_iter: limit on the iterations.
            scale: the diagonal of ``D``, shape ``(n,)``, not negative. The preconditioner is that
                of ``A``, between two inverses of ``D``.

        Returns:
            The solution; its ``products`` count those of the build and of a test too.

        """
        testing = self._solves % self.retest == 0
        self._solves += 1
        plain = _System(A, b, damping, scale, None)
        if not testing and not self.enabled:
            return plain.solve(rtol, max_iter)
        rule = self.preconditioner
        M = rule.build(A, damping)
        solve = _System(rule.watch(A), b, damping, scale, M).solve(rtol, max_iter)
        rule.observe(solve)
        if not testing:
            return replace(solve, products=solve.products + rule.products)
        return self._test(A, plain, replace(plain, M=M), solve, rtol, max_iter)

    def _test(
        self,
        A: LinearOperator,
        without: _System,
        within: _System,
        solve: LinearSolution,
        rtol: float,
        max_iter: int,
    ) -> LinearSolution:
        """Decide, and return the better solution with the products of all."""
        rule = self.preconditioner
        build = (rule.products + rule.overhead) / rule.every
        each = 1 + rule.work(A)
        plain = without.solve(rtol, max_iter)
        spent = rule.products + solve.products + plain.products
        afforded, same = math.floor((plain.products - build) / each), solve
        if 0 < afforded < solve.iterations:  # what fits in the work of the plain solve
            same = within.solve(rtol, afforded)
            spent += same.products
        if plain.status is Status.CONVERGED and same.status is Status.CONVERGED:
            self.gain = plain.products / max(build + each * same.products, 1)
        elif afforded < 1 or not same.model_value < 0:
            self.gain = 0.0
        else:
            self.gain = same.model_value / plain.model_value if plain.model_value else math.inf
        self.enabled = self.gain > 1
        better = solve if solve.model_value < plain.model_value else plain
        return replace(better, products=spent)


@dataclass(frozen=True)
class _System:
    """The system ``(D A D + damping I) x = b``, and a preconditioner of ``A + damping I``."""

    A: LinearOperator
    b: Tensor
    damping: float
    scale: Tensor | None
    M: LinearOperator | None

    def solve(self, rtol: float, max_iter: int) -> LinearSolution:
        """Return the answer of ``cg``."""
        A, M, d = self.A, self.M, self.scale
        if d is not None:
            A = congruent(A, d)
            # where D is zero, so is b, and nothing is asked of M
            M = None if M is None else congruent(M, torch.where(d > 0, 1 / d, 0.0))
        A = A + self.damping * Identity(A.shape[0], A.dtype, A.device)
        return cg(A, self.b, M=M, rtol=rtol, max_iter=max_iter)
