"""The quadratic model of NewtonTrustRegion, minimized for one size of the region after another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from ..arguments import finite
from ..operators.base import Identity, LinearOperator
from ..solvers.cg import cg
from ..solvers.gltr import gltr
from ..solvers.krylov import KrylovSpace
from ..solvers.multishift import next_block
from ..solvers.solution import LinearSolution, SubproblemSolution
from ..solvers.steihaug import steihaug
from ..status import Status
from ..vector import dot, norm
from .options import NewtonOptions

Tolerance: TypeAlias = "Callable[[float], float] | float"
PROGRESS = 5e-4  # Martens' value: the relative progress that an iteration has to make.


@dataclass(frozen=True, kw_only=True)
class TrialStep:
    r"""A step ``s`` and its values in the model :math:`g's + \frac12 s'As`.

    Attributes:
        s: The step, shape ``(n,)``.
        status: How the solve ended; ``NEGATIVE_CURVATURE`` also where :math:`s'As` is negative.
        decrease: The linear decrease :math:`-g's`.
        curvature: :math:`s'As`, without the damping.
        norm: The length of the step in the metric of the region.
        on_boundary: The step has the length of the radius.
        iterations: The iterations of the solve.
        residual: The residual of the solve, relative to the norm of the gradient.

    """

    s: Tensor
    status: Status
    decrease: float
    curvature: float
    norm: float
    on_boundary: bool
    iterations: int
    residual: float

    def reduction(self, scale: float) -> float:
        """Return the reduction of the model along ``scale`` times the step."""
        return scale * self.decrease - 0.5 * scale**2 * self.curvature

    @property
    def largest_reduction(self) -> float:
        """The largest reduction of the model along the step at any length, which may be infinite.

        Unlike the reduction of the step itself, it does not vanish with the size of the region.
        """
        return self.decrease**2 / (2 * self.curvature) if self.curvature > 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class Model:
    """The quadratic model at one point, and how accurately it is minimized.

    Attributes:
        A: Its matrix, without damping.
        g: The gradient, shape ``(n,)``.
        M: An approximate inverse of ``A``, whose inverse is the metric; None for Euclidean.
        rtol: The tolerance of a solve.
        max_iter: The limit on the iterations of a solve.

    """

    A: LinearOperator
    g: Tensor
    M: LinearOperator | None
    rtol: Tolerance
    max_iter: int

    def damped(self, damping: float) -> LinearOperator:
        """Return ``A + damping I``."""
        n, like = self.A.shape[0], self.A
        return self.A if damping == 0 else self.A + damping * Identity(n, like.dtype, like.device)


Minimizer: TypeAlias = "Callable[[float], TrialStep]"
"""Minimizes the model for one size of the region: a radius, or a damping without a radius."""


def minimizer(model: Model, solver: str, o: NewtonOptions, last: Tensor | None) -> Minimizer:
    """Return the minimizer of a solver.

    Args:
        model: The quadratic model.
        solver: ``"gltr"``, ``"steihaug"`` or ``"cg"``.
        o: The options of the optimizer.
        last: The solution of the last step, for a warm start of ``"cg"``.

    """
    if solver == "cg":
        x0 = None if last is None else o.warm_start * last
        usable = x0 is not None and bool(x0.any()) and finite(x0)
        return hessian_free(model, x0 if usable else None)
    if o.radius == math.inf:
        return with_damping(model)
    return truncated(model, o.damping) if solver == "steihaug" else within_radius(model, o.damping)


def within_radius(model: Model, damping: float) -> Minimizer:
    """Minimize over the ball of a radius, in a Krylov space that the first solve builds.

    Later solves are for smaller radii, for which the space is large enough, and take no product.
    They could not take one: a trial has written the parameters, which invalidates the graph.
    """
    A = model.damped(damping)
    space = KrylovSpace(A, -model.g, model.M)

    def solve(radius: float) -> TrialStep:
        if space.size:
            return _region_step(model, space.minimize(radius, rtol=model.rtol), damping)
        max_iter = model.max_iter
        found = gltr(A, model.g, radius, rtol=model.rtol, max_iter=max_iter, space=space)
        return _region_step(model, found, damping)

    return solve


def truncated(model: Model, damping: float) -> Minimizer:
    """Minimize by Steihaug's method: a smaller ball ends the same path of iterates earlier."""
    A, M = _Remembered(model.damped(damping)), None
    if model.M is not None:
        M = _Remembered(model.M)  # The Fisher metric, too, is read off the graph.

    def solve(radius: float) -> TrialStep:
        A.rewind()
        if M is not None:
            M.rewind()
        found = steihaug(A, model.g, radius, M=M, rtol=model.rtol, max_iter=model.max_iter)
        return _region_step(model, found, damping)

    return solve


def with_damping(model: Model) -> Minimizer:
    """Minimize with ``damping M^-1`` added, in a Krylov space that the first solve builds.

    Later solves are for larger dampings and take no product, as in :func:`within_radius`. The step
    is zero where the damping is too small to make the matrix positive definite.
    """
    space = KrylovSpace(model.A, -model.g, model.M)

    def solve(damping: float) -> TrialStep:
        grows = not space.size
        while grows and space.size < model.max_iter:
            enough = not space.is_too_small(damping=damping, rtol=model.rtol)
            grows = not enough and space.extend(next_block(space.size, model.max_iter)) > 0
        found = space.solve(damping, rtol=model.rtol)
        if found.status is Status.NEGATIVE_CURVATURE:
            found = replace(found, x=torch.zeros_like(found.x), curvature=0.0, norm=0.0)
        return _damped_step(model, found, damping * found.norm**2)

    return solve


def hessian_free(model: Model, x0: Tensor | None) -> Minimizer:
    """Minimize with a damping by conjugate gradients from ``x0`` that stop by Martens' rule."""

    def solve(damping: float) -> TrialStep:
        found = cg(
            model.damped(damping),
            -model.g,
            x0,
            M=model.M,
            rtol=model.rtol,
            max_iter=model.max_iter,
            progress_tol=PROGRESS,
        )
        return _damped_step(model, found, damping * dot(found.x, found.x))

    return solve


def _region_step(model: Model, found: SubproblemSolution, damping: float) -> TrialStep:
    curvature = found.curvature - (damping * dot(found.s, found.s) if damping else 0.0)
    bends = found.status is Status.CONVERGED and curvature < 0
    return TrialStep(
        s=found.s,
        status=Status.NEGATIVE_CURVATURE if bends else found.status,
        decrease=found.predicted_reduction + 0.5 * found.curvature,
        curvature=curvature,
        norm=found.norm,
        on_boundary=found.on_boundary,
        iterations=found.iterations,
        residual=found.residual_norm / norm(model.g),
    )


def _damped_step(model: Model, found: LinearSolution, excess: float) -> TrialStep:
    """Return the solution as a step; ``excess`` is the damping's part of its curvature."""
    return TrialStep(
        s=found.x,
        status=found.status,
        decrease=-dot(model.g, found.x),
        curvature=found.curvature - excess,
        norm=found.norm,
        on_boundary=False,
        iterations=found.iterations,
        residual=found.residual_norm / norm(model.g),
    )


class _Remembered(LinearOperator):
    """An operator that remembers its products, for a path that is walked again from its start."""

    def __init__(self, A: LinearOperator) -> None:
        super().__init__(A.shape[0], A.dtype, A.device)
        self._A, self._next = A, 0
        self._known: list[tuple[Tensor, Tensor]] = []

    def rewind(self) -> None:
        """Go back to the start of the path."""
        self._next = 0

    def mv(self, v: Tensor) -> Tensor:
        if self._next < len(self._known) and torch.equal(self._known[self._next][0], v):
            out = self._known[self._next][1]
        else:
            del self._known[self._next :]
            out = self._A.mv(v)
            self._known.append((v.clone(), out.clone()))
        self._next += 1
        return out.clone()
