"""From the derivatives of a step to the steps that are tried."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

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
from .info import StepInfo
from .problem import CurvatureClosure, Problem
from .search import Candidate

Given: TypeAlias = "Gated | OperatorLike | None"


@dataclass(frozen=True)
class Directions:
    """What a step has to choose from.

    Attributes:
        info: the account so far; its status says why there is nothing to try.
        candidates: the steps to try, none if there is a reason not to move.
        fall: how much of the constraints' violation the step is to remove, where there is one.
        solution: of the linear system, for a warm start; None where it was not reached.

    """

    info: StepInfo
    candidates: tuple[Candidate, ...] = ()
    fall: float | None = None
    solution: Tensor | None = None


def directions(
    problem: Problem, preconditioner: Given, curvature: CurvatureClosure | None, last: Tensor | None
) -> Directions:
    """Return the steps to the edge of the ball, or the reason why there is none."""
    options, vector, start = problem.options, problem.vector, problem.start
    info = StepInfo(
        Status.NONFINITE_LOSS,
        loss=start.loss,
        new_loss=start.loss,
        delta=options.delta,
        penalty=options.penalty,
        constraints=tuple(start.constraints.tolist()),
    )
    if not (math.isfinite(start.loss) and bool(start.constraints.isfinite().all())):
        return Directions(info)
    with torch.autocast(vector.device.type, enabled=False):
        g = problem.gradient()
        nonfinite = vector.name_nonfinite(g)
        if nonfinite is not None:
            detail = f"parameter {nonfinite}"
            return Directions(replace(info, status=Status.NONFINITE_GRADIENT, detail=detail))
        if problem.lr == 0:
            return Directions(replace(info, status=Status.ZERO_LENGTH))
        h = problem.scaled(g)
        e = exponent(h)
        if e is None and not any(c > 0 for c in info.constraints):
            return Directions(replace(info, status=Status.STATIONARY))
        e = e or 0
        h = ldexp(h, -e)  # of unit size: the step does not depend on it
        rows = problem.constraint_gradients()
        fisher, F = problem.fisher(curvature, [g, *rows])
        info = replace(info, backend=fisher.backend)
        if len(rows):
            return _constrained(problem, F, h, e, rows, preconditioner, info)
        solves = _solve(problem, F, h, e, preconditioner, last)
    return _to_the_edge(problem, h, e, solves, preconditioner, info)


def _solve(
    problem: Problem, F: LinearOperator, h: Tensor, e: int, M: Given, last: Tensor | None
) -> list[tuple[float, LinearSolution]]:
    """Solve (D F D + damping I) y = -h, D = diag(rates), for each damping."""
    o = problem.options
    if len(o.dampings) > 1:
        if M is not None:
            raise ValueError(
                "several dampings are solved from one Krylov space, which a preconditioner would"
                " have to fit all of: give one damping, or no preconditioner"
            )
        space = lanczos(problem.metric(F), -h, max_iter=o.cg_max_iter)
        solves = [space.solve(damping, rtol=o.cg_rtol) for damping in o.dampings]
        solves[0] = replace(solves[0], products=space.products)
        return list(zip(o.dampings, solves, strict=True))
    damping, rtol, max_iter = o.dampings[0], o.cg_rtol, o.cg_max_iter
    x0 = None if last is None else ldexp(o.warm_start * last, -e)
    if x0 is not None and not (bool(x0.any()) and bool(x0.isfinite().all())):
        x0 = None
    if isinstance(M, Gated):
        scale = problem.rates
        return [
            (damping, M.solve(F, -h, damping, rtol=rtol, max_iter=max_iter, scale=scale, x0=x0))
        ]
    A = problem.metric(F) + damping * Identity(h.numel(), h.dtype, h.device)
    return [(damping, cg(A, -h, x0, M=M, rtol=rtol, max_iter=max_iter))]


def _to_the_edge(
    problem: Problem,
    h: Tensor,
    e: int,
    solves: list[tuple[float, LinearSolution]],
    M: Given,
    info: StepInfo,
) -> Directions:
    """Return the solutions as steps, to the edge of the ball or as the penalty has them."""
    first = solves[0][1]
    info = replace(
        info,
        status=first.status,
        preconditioner=str(M) if isinstance(M, Gated) else "",
        cg_status=first.status,
        cg_iterations=max(solve.iterations for _, solve in solves),
        cg_residual=first.residual_norm / norm(h),
        products=sum(solve.products for _, solve in solves),
    )
    candidates: list[Candidate] = []
    for damping, solve in solves:
        if not bool(solve.x.any()):
            continue
        step = _step(problem, h, e, damping, solve)
        if step.status is Status.CONVERGED:
            predicted = scalar_ldexp(problem.lr * step.predicted_reduction, e)
            candidates.append(Candidate(problem.unscaled(step.s), predicted, damping))
        else:
            info = replace(info, status=step.status)
    return Directions(info, tuple(candidates), solution=ldexp(first.x, e))


def _step(problem: Problem, h: Tensor, e: int, damping: float, solve: LinearSolution) -> Step:
    o, curvature = problem.options, solve.curvature
    if o.penalty is None:
        return kl_ball_step(solve.x, h, o.delta, damped_curvature=curvature, damping=damping)
    price = scalar_ldexp(o.penalty, -e)
    return kl_penalty_step(solve.x, h, price, o.delta, damped_curvature=curvature, damping=damping)


def _constrained(
    problem: Problem,
    F: LinearOperator,
    h: Tensor,
    e: int,
    rows: Tensor,
    M: Given,
    info: StepInfo,
) -> Directions:
    """Return the step within the ball and the linear constraints."""
    o = problem.options
    if o.penalty is not None or len(o.dampings) > 1:
        raise ValueError(
            "constraints go with the KL ball and one damping: leave penalty= and a tuple of"
            " dampings out, or add the constraints to the loss"
        )
    damping, values = o.dampings[0], problem.start.constraints
    built, name = 0, ""
    if isinstance(M, Gated):
        rule, name = M.preconditioner, type(M.preconditioner).__name__
        M = rule.build(F, damping)
        built = rule.products
        M = M if problem.rates is None else between(M, problem.rates)
    found = constrained_kl_ball_step(
        problem.metric(F),
        h,
        o.delta,
        problem.scaled(rows),
        values,
        M=M,
        damping=damping,
        rtol=o.cg_rtol,
        max_iter=o.cg_max_iter,
    )
    info = replace(
        info,
        status=found.status,
        cg_status=found.status,
        cg_iterations=found.iterations,
        preconditioner=name,
        products=found.products + built,
        multipliers=tuple(scalar_ldexp(mu, e) for mu in found.multipliers.tolist()),
    )
    if not bool(found.s.any()):
        return Directions(info)
    predicted = scalar_ldexp(problem.lr * found.predicted_reduction, e)
    before = values.clamp(min=0).sum().item()
    fall = before - found.constraint_values.clamp(min=0).sum().item() if before > 0 else None
    return Directions(info, (Candidate(problem.unscaled(found.s), predicted, damping),), fall)
