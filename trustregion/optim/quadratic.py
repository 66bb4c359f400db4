"""The steps of a Newton method: the quadratic model minimised again and again, for few products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from ..operators.base import Identity, LinearOperator
from ..solvers.cg import cg
from ..solvers.gltr import gltr
from ..solvers.krylov import KrylovSpace
from ..solvers.multishift import next_block
from ..solvers.solution import LinearSolution, SubproblemSolution
from ..solvers.steihaug import steihaug
from ..status import Status
from ..vector import dot, norm

Tolerance: TypeAlias = "Callable[[float], float] | float"
PROGRESS = 5e-4  # an iteration of conjugate gradients has to earn this fraction; Martens' value


@dataclass(frozen=True)
class ModelStep:
    r"""A step ``s`` and what the model :math:`g's + \frac12 s'As` says of it.

    Attributes:
        s: the step, shape ``(n,)``.
        status: how the solve ended; ``NEGATIVE_CURVATURE`` also where :math:`s'As` is negative.
        decrease: :math:`-g's`.
        curvature: :math:`s'As`, without the damping.
        norm: the length of the step in the metric of the region.
        on_boundary: the step has the length of the radius.
        iterations: of the solve.
        residual: of the solve, relative to the gradient's norm.

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
        """Return how much the model falls along ``scale`` times the step."""
        return scale * self.decrease - 0.5 * scale**2 * self.curvature


@dataclass(frozen=True)
class Model:
    """The quadratic model of one point, and how exactly it is minimised.

    Attributes:
        A: its matrix, without damping.
        g: the gradient, shape ``(n,)``.
        M: an approximate inverse of ``A``, the inverse of which is the metric; None for Euclidean.
        rtol: tolerance of a solve.
        max_iter: limit on its iterations.

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


Solve = Callable[[float], ModelStep]


def within_radius(model: Model, damping: float) -> Solve:
    """Minimise over the ball of a radius, in a Krylov space that the first solve makes.

    Later ones are for smaller radii and take no product: their trials have written the parameters,
    so that the graph of the products is no more, and the space is large enough.
    """
    A = model.damped(damping)
    space = KrylovSpace(A, -model.g, model.M)

    def solve(radius: float) -> ModelStep:
        if space.size:
            return _region_step(model, space.minimize(radius, rtol=model.rtol), damping)
        max_iter = model.max_iter
        found = gltr(A, model.g, radius, rtol=model.rtol, max_iter=max_iter, space=space)
        return _region_step(model, found, damping)

    return solve


def truncated(model: Model, damping: float) -> Solve:
    """Minimise over the ball by Steihaug's method: a smaller one ends the same path earlier."""
    path = _Remembered(model.damped(damping))

    def solve(radius: float) -> ModelStep:
        path.rewind()
        found = steihaug(path, model.g, radius, M=model.M, rtol=model.rtol, max_iter=model.max_iter)
        return _region_step(model, found, damping)

    return solve


def with_damping(model: Model) -> Solve:
    """Minimise with ``damping M^-1`` added, in a Krylov space that the first solve makes.

    Later ones are for larger dampings and take no product, as for :func:`within_radius`. The step
    is zero where the damping is too small to make the matrix positive definite.
    """
    space = KrylovSpace(model.A, -model.g, model.M)

    def solve(damping: float) -> ModelStep:
        grows = not space.size
        while grows and space.size < model.max_iter:
            enough = not space.is_too_small(damping=damping, rtol=model.rtol)
            grows = not enough and space.extend(next_block(space.size, model.max_iter)) > 0
        found = space.solve(damping, rtol=model.rtol)
        if found.status is Status.NEGATIVE_CURVATURE:
            found = replace(found, x=torch.zeros_like(found.x), curvature=0.0, norm=0.0)
        return _damped_step(model, found, damping * found.norm**2)

    return solve


def hessian_free(model: Model, x0: Tensor | None) -> Solve:
    """Minimise with a damping by conjugate gradients that end by Martens' rule, from ``x0``."""

    def solve(damping: float) -> ModelStep:
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


def _region_step(model: Model, found: SubproblemSolution, damping: float) -> ModelStep:
    curvature = found.curvature - (damping * dot(found.s, found.s) if damping else 0.0)
    bends = found.status is Status.CONVERGED and curvature < 0
    return ModelStep(
        found.s,
        Status.NEGATIVE_CURVATURE if bends else found.status,
        found.predicted_reduction + 0.5 * found.curvature,
        curvature,
        found.norm,
        found.on_boundary,
        found.iterations,
        found.residual_norm / norm(model.g),
    )


def _damped_step(model: Model, found: LinearSolution, excess: float) -> ModelStep:
    """Return the step, of whose curvature the damping has ``excess``."""
    return ModelStep(
        found.x,
        found.status,
        -dot(model.g, found.x),
        found.curvature - excess,
        found.norm,
        False,
        found.iterations,
        found.residual_norm / norm(model.g),
    )


class _Remembered(LinearOperator):
    """An operator that knows the products of a path which is walked again from its start."""

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


class Counted(LinearOperator):
    """An operator that counts its products."""

    def __init__(self, A: LinearOperator) -> None:
        super().__init__(A.shape[0], A.dtype, A.device)
        self.inner, self.count = A, 0

    def mv(self, v: Tensor) -> Tensor:
        """Return the product."""
        self.count += 1
        return self.inner.mv(v)
