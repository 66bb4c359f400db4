"""The quadratic model of a loss at a point, over the samples of all processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..arguments import finite
from ..operators.base import (
    FunctionOperator,
    Identity,
    LinearOperator,
    OperatorLike,
    as_operator,
    congruent,
)
from ..operators.fisher import FisherOperator
from ..operators.ggn import GGNOperator
from ..operators.hessian import HessianOperator
from ..preconditioners import Gated
from ..preconditioners.gate import between
from ..solvers.cg import cg
from ..solvers.stopping import forcing_sequence
from ..status import Status
from ..vector import ParameterVector
from .closure import Judgement, gradient
from .info import StepInfo
from .options import NewtonOptions
from .quadratic import Counted, Model, Solve, hessian_free, truncated, with_damping, within_radius
from .replicas import Replicas
from .start import Start

CURVATURES, METRICS = ("hessian", "ggn"), ("euclidean", "fisher")
SOLVERS = ("gltr", "steihaug", "cg")
INNER = 1e-6  # tolerance of a solve with the metric, which Lanczos takes for a fixed matrix


@dataclass(frozen=True)
class Curvature:
    """What the model is made from; a step is ``lr D y`` with ``D = diag(rates)``."""

    kind: str
    metric: str
    vector: ParameterVector
    replicas: Replicas
    start: Start[Judgement]
    options: NewtonOptions
    lr: float
    rates: Tensor | None
    counters: list[Counted] = field(default_factory=list)

    @property
    def products(self) -> int:
        """Products so far, those with the metric included."""
        return sum(counter.count for counter in self.counters)

    def derivatives(self) -> tuple[Tensor, LinearOperator, str]:
        """Return the gradient of what is minimised, its curvature, and what makes the products."""
        sign, here = self.options.sign, self.start.evaluation
        held: list[LinearOperator] = []

        def compute() -> Tensor:
            if self.kind == "hessian":
                operator = HessianOperator(here.loss, self.vector)
                held.append(sign * operator if sign < 0 else operator)
                return sign * operator.gradient
            held.append(self._gauss_newton(here))
            return sign * gradient(here.loss, self.vector)

        g = self.replicas.mean(compute, self.start.theta, self.start.share)
        return g, self._shared(held[0]), getattr(held[0], "backend", "graph")

    def _gauss_newton(self, here: Judgement) -> LinearOperator:
        if here.joint is not None:
            return FisherOperator(here.joint, self.vector)
        if not here.outputs:
            raise ValueError(
                'curvature="ggn" needs the closure to return (loss, outputs), the tensors that the'
                " loss was computed from, or (loss, distribution); it returned the loss alone"
            )
        sign = self.options.sign
        loss = here.loss
        if sign < 0:
            with torch.enable_grad():
                loss = -here.loss
        return GGNOperator(loss, here.outputs, self.vector)

    def fisher_metric(self) -> LinearOperator:
        """Return the inverse of ``D F D + mu I``, by conjugate gradients."""
        here = self.start.evaluation

        def build() -> Tensor:
            if here.joint is None:
                raise ValueError('metric="fisher" needs the closure to return (loss, distribution)')
            held.append(FisherOperator(here.joint, self.vector))
            return self.start.theta.new_zeros(1)

        held: list[FisherOperator] = []
        self.replicas.total(build, self.start.theta.new_zeros(1))
        F, max_iter = self.scaled(self._shared(held[0])), 10 * self.options.max_iter
        n, like = F.shape[0], self.start.theta
        A = F + self.options.metric_damping * Identity(n, like.dtype, like.device)

        def inverse(v: Tensor) -> Tensor:
            return cg(A, v, rtol=INNER, max_iter=max_iter).x

        return FunctionOperator(inverse, n, like.dtype, like.device)

    def _shared(self, A: LinearOperator) -> LinearOperator:
        """Return the mean over the processes, counted; the operator itself for one process.

        A preconditioner may want to know what it is made from.
        """
        counted = Counted(self.replicas.operator(A, self.start.share))
        self.counters.append(counted)
        return counted

    def scaled(self, A: LinearOperator) -> LinearOperator:
        """Return ``D A D``."""
        return A if self.rates is None else congruent(A, self.rates)

    def unscaled(self, y: Tensor) -> Tensor:
        """Return the step of ``y``, for a rate of 1."""
        return y if self.rates is None else self.rates * y


def quadratic_model(
    curvature: Curvature, preconditioner: Gated | OperatorLike | None
) -> tuple[Model | None, StepInfo]:
    """Return the model, or None and the reason why there is nothing to do."""
    start, options, vector = curvature.start, curvature.options, curvature.vector
    info = StepInfo(
        Status.NONFINITE_LOSS,
        loss=start.loss,
        new_loss=start.loss,
        radius=options.radius,
        damping=options.damping,
    )
    if not math.isfinite(start.loss):
        return None, info
    with torch.autocast(vector.device.type, enabled=False):
        g, A, backend = curvature.derivatives()
        info = replace(info, backend=backend)
        nonfinite = vector.name_nonfinite(g)
        if nonfinite is not None:
            detail = f"parameter {nonfinite}"
            return None, replace(info, status=Status.NONFINITE_GRADIENT, detail=detail)
        if curvature.lr == 0:
            return None, replace(info, status=Status.ZERO_LENGTH)
        h = curvature.unscaled(g)
        if not bool(h.any()):
            return None, replace(info, status=Status.STATIONARY)
        M, name = _metric(curvature, A, preconditioner)
        rtol = forcing_sequence() if options.rtol is None else options.rtol
        model = Model(curvature.scaled(A), h, M, rtol, options.max_iter)
    return model, replace(info, preconditioner=name)


def _metric(
    curvature: Curvature, A: LinearOperator, given: Gated | OperatorLike | None
) -> tuple[LinearOperator | None, str]:
    """Return the inverse of the metric, and what it is."""
    if curvature.metric == "fisher":
        return curvature.fisher_metric(), ""
    if given is None:
        return None, ""
    if isinstance(given, Gated):
        rule = given.preconditioner
        operand = A.inner if isinstance(A, Counted) else A  # it may want to know the network
        M, name = rule.build(operand, curvature.options.damping), type(rule).__name__
        if isinstance(A, Counted):
            A.count += rule.products  # which went past it
    else:
        M, name = as_operator(given, curvature.start.theta), ""
    return M if curvature.rates is None else between(M, curvature.rates), name


def solver(name: str, model: Model, options: NewtonOptions, last: Tensor | None) -> Solve:
    """Return what minimises the model: radius -> step, or damping -> step without a radius."""
    if name == "cg":
        x0 = None if last is None else options.warm_start * last
        usable = x0 is not None and bool(x0.any()) and finite(x0)
        return hessian_free(model, x0 if usable else None)
    if options.radius == math.inf:
        return with_damping(model)
    make: Callable[[Model, float], Solve] = truncated if name == "steihaug" else within_radius
    return make(model, options.damping)
