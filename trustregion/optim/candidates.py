"""The steps that NaturalTrustRegion may take, from the gradient and the Fisher matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from ..arguments import finite
from ..operators.base import Identity, LinearOperator, OperatorLike
from ..preconditioners import Gated
from ..preconditioners.gate import between
from ..solvers.cg import cg
from ..solvers.constrained import constrained_kl_ball_step
from ..solvers.kl_ball import Step, kl_ball_step, kl_penalty_step
from ..solvers.lanczos import lanczos
from ..solvers.solution import LinearSolution
from ..status import Status
from ..vector import exponent, ldexp, norm, scalar_ldexp
from .objective import Objective
from .options import NaturalOptions
from .units import Units

Given: TypeAlias = "Gated | OperatorLike | None"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A step that may be taken.

    Attributes:
        s: The step of the parameters, shape ``(n,)``.
        predicted_reduction: The reduction of the linear model of the loss along ``s``.
        damping: The damping that the step was solved with.

    """

    s: Tensor
    predicted_reduction: float
    damping: float


@dataclass(frozen=True, kw_only=True)
class Solve:
    r"""The solution of :math:`(DFD + \lambda I) y = -2^{-e} Dg` for one damping.

    The right-hand side has unit size, so that steps do not depend on the scale of the loss.

    Attributes:
        h: The vector :math:`2^{-e} Dg`.
        e: The exponent of the scale.
        damping: The damping :math:`\lambda`.
        solution: The answer of the linear solver.

    """

    h: Tensor
    e: int
    damping: float
    solution: LinearSolution

    @property
    def x(self) -> Tensor:
        """The solution for the right-hand side ``-Dg``."""
        return ldexp(self.solution.x, self.e)


def solve(
    F: LinearOperator, g: Tensor, units: Units, o: NaturalOptions, M: Given, last: Tensor | None
) -> list[Solve]:
    """Solve for each damping by conjugate gradients, several of them from one Krylov space.

    Args:
        F: The Fisher matrix.
        g: The gradient in the given units, shape ``(n,)``, not zero.
        units: The learning rates.
        o: The options of the optimizer.
        M: The preconditioner.
        last: The solution of the last step, for a warm start.

    """
    e = exponent(g) or 0
    h = ldexp(g, -e)
    rtol, max_iter, damping = o.cg_rtol, o.cg_max_iter, o.dampings[0]
    if len(o.dampings) > 1:
        if M is not None:
            raise ValueError(
                "several dampings are solved from one Krylov space, which a preconditioner would"
                " have to fit all of: give one damping, or no preconditioner"
            )
        space = lanczos(units.operator(F), -h, max_iter=max_iter)
        solutions = [space.solve(damping, rtol=rtol) for damping in o.dampings]
        solutions[0] = replace(solutions[0], products=space.products)
        pairs = zip(o.dampings, solutions, strict=True)
        return [Solve(h=h, e=e, damping=damping, solution=x) for damping, x in pairs]
    x0 = None if last is None else ldexp(o.warm_start * last, -e)
    if x0 is not None and not (bool(x0.any()) and finite(x0)):
        x0 = None
    if isinstance(M, Gated):
        solution = M.solve(F, -h, damping, rtol=rtol, max_iter=max_iter, scale=units.rates, x0=x0)
    else:
        A = units.operator(F) + damping * Identity(h.numel(), h.dtype, h.device)
        solution = cg(A, -h, x0, M=M, rtol=rtol, max_iter=max_iter)
    return [Solve(h=h, e=e, damping=damping, solution=solution)]


def to_the_edge(
    objective: Objective, solves: Sequence[Solve], o: NaturalOptions, M: Given
) -> list[Candidate]:
    """Scale each solution to the edge of the ball, or to the length that the penalty asks for."""
    first = solves[0].solution
    objective.note(
        status=first.status,
        preconditioner=str(M) if isinstance(M, Gated) else "",
        cg_status=first.status,
        cg_iterations=max(solve.solution.iterations for solve in solves),
        cg_residual=first.residual_norm / norm(solves[0].h),
        products=sum(solve.solution.products for solve in solves),
    )
    candidates: list[Candidate] = []
    for solve in solves:
        if not bool(solve.solution.x.any()):
            continue
        step = _scaled(solve, o)
        if step.status is Status.CONVERGED:
            candidates.append(_candidate(objective, step.s, step.predicted_reduction, solve))
        else:
            objective.note(status=step.status)
    return candidates


def _scaled(solve: Solve, o: NaturalOptions) -> Step:
    x, curvature = solve.solution.x, solve.solution.curvature
    if o.penalty is None:
        return kl_ball_step(x, solve.h, o.delta, damped_curvature=curvature, damping=solve.damping)
    price = scalar_ldexp(o.penalty, -solve.e)
    return kl_penalty_step(
        x, solve.h, price, o.delta, damped_curvature=curvature, damping=solve.damping
    )


def _candidate(objective: Objective, y: Tensor, reduction: float, solve: Solve) -> Candidate:
    units = objective.units
    predicted = scalar_ldexp(units.lr * reduction, solve.e)
    return Candidate(s=units.step(y), predicted_reduction=predicted, damping=solve.damping)


def within_constraints(
    objective: Objective,
    F: LinearOperator,
    g: Tensor,
    rows: Tensor,
    o: NaturalOptions,
    M: Given,
) -> tuple[list[Candidate], float | None]:
    """Return the minimizer within the ball and the linearized constraints.

    The second result is the reduction of the violation that the step aims at, or None where no
    constraint is violated at the start.

    Args:
        objective: The closure, at the start of the step.
        F: The Fisher matrix.
        g: The gradient in the given units, shape ``(n,)``.
        rows: The gradients of the constraints in the given units, shape ``(m, n)``.
        o: The options of the optimizer.
        M: The preconditioner.

    """
    if o.penalty is not None or len(o.dampings) > 1:
        raise ValueError(
            "constraints go with the KL ball and one damping: leave penalty= and a tuple of"
            " dampings out, or add the constraints to the loss"
        )
    units, damping, values = objective.units, o.dampings[0], objective.constraints
    e = exponent(g) or 0
    h = ldexp(g, -e)
    built, name = 0, ""
    if isinstance(M, Gated):
        rule, name = M.preconditioner, type(M.preconditioner).__name__
        M = rule.build(F, damping)
        built = rule.products
        M = M if units.rates is None else between(M, units.rates)
    found = constrained_kl_ball_step(
        units.operator(F),
        h,
        o.delta,
        rows,
        values,
        M=M,
        damping=damping,
        rtol=o.cg_rtol,
        max_iter=o.cg_max_iter,
    )
    objective.note(
        status=found.status,
        cg_status=found.status,
        cg_iterations=found.iterations,
        preconditioner=name,
        products=found.products + built,
        multipliers=tuple(scalar_ldexp(mu, e) for mu in found.multipliers.tolist()),
    )
    if not bool(found.s.any()):
        return [], None
    predicted = scalar_ldexp(units.lr * found.predicted_reduction, e)
    before = values.clamp(min=0).sum().item()
    fall = before - found.constraint_values.clamp(min=0).sum().item() if before > 0 else None
    return [Candidate(s=units.step(found.s), predicted_reduction=predicted, damping=damping)], fall
