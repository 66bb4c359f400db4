"""The derivatives of one step, as means over the samples of all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributions import Prediction, joint_of
from ..operators.base import LinearOperator, congruent
from ..operators.fisher import FisherOperator
from ..vector import ParameterVector
from .closure import Calls, Evaluation, gradient
from .options import NaturalOptions
from .replicas import Replicas
from .start import Start, require_seen

CurvatureClosure = Callable[[], Prediction]


@dataclass(frozen=True)
class Problem:
    """What the step is made from; it is ``lr D y`` with ``D = diag(rates)``, solved for ``y``."""

    vector: ParameterVector
    replicas: Replicas
    calls: Calls
    start: Start[Evaluation]
    options: NaturalOptions
    lr: float
    rates: Tensor | None

    @property
    def goal(self) -> float:
        """What part of the ball a step should use, where its length is set by the ball alone."""
        free = self.options.penalty is not None or len(self.start.constraints) > 0
        return 0.0 if free else min(1.0, (self.lr * min(self.options.scales)) ** 2)

    def gradient(self) -> Tensor:
        """Return that of the objective to minimise, shape ``(n,)``."""
        return self._mean(self.start.evaluation.loss, self.options.sign, "loss")

    def constraint_gradients(self) -> Tensor:
        """Return those of the constraints, shape ``(m, n)``."""
        with torch.enable_grad():
            values = self.start.evaluation.constraints.unbind()
        rows = [self._mean(c, 1.0, f"constraint {i}") for i, c in enumerate(values)]
        return torch.stack(rows) if rows else self.start.theta.new_zeros(0, self.vector.numel)

    def _mean(self, value: Tensor, sign: float, what: str) -> Tensor:
        def compute() -> Tensor:
            return sign * gradient(value, self.vector, what)

        return self.replicas.mean(compute, self.start.theta, self.start.share)

    def fisher(
        self, curvature: CurvatureClosure | None, slopes: Iterable[Tensor]
    ) -> tuple[FisherOperator, LinearOperator]:
        """Return the Fisher matrix here, and that of the samples of all processes."""
        held: list[FisherOperator] = []

        def build() -> Tensor:
            if curvature is None:
                joint = self.start.evaluation.joint
            else:
                with torch.enable_grad():
                    joint = joint_of(self.calls.beside(curvature))
            held.append(FisherOperator(joint, self.vector))
            sums = like.clone()
            sums[0] = joint.total
            sums[1:][list(held[0].used)] = 1.0
            return sums

        like = self.start.theta.new_zeros(1 + len(self.vector.params), dtype=torch.float64)
        total, *counts = self.replicas.total(build, like).tolist()
        seen = {i for i, count in enumerate(counts) if count > 0}  # by the samples of any process
        require_seen(seen, self.vector, [self.scaled(slope) for slope in slopes])
        return held[0], self.replicas.operator(held[0], held[0].total / total)

    def scaled(self, g: Tensor) -> Tensor:
        """Return one or several gradients in ``y``, but for the factor ``lr``."""
        return g if self.rates is None else self.rates * g

    def metric(self, F: LinearOperator) -> LinearOperator:
        """Return ``D F D``."""
        return F if self.rates is None else congruent(F, self.rates)

    def unscaled(self, y: Tensor) -> Tensor:
        """Return the step of ``y``."""
        return self.lr * y if self.rates is None else self.lr * self.rates * y
