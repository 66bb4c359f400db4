"""The derivatives of NewtonTrustRegion: the gradient, the curvature and the metric."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators.base import Identity, LinearOperator, OperatorLike, as_operator
from ..operators.fisher import FisherOperator
from ..operators.ggn import GGNOperator
from ..operators.hessian import HessianOperator
from ..preconditioners import Gated
from ..preconditioners.gate import between
from ..solvers.cg import cg
from .objective import Objective, gradient
from .options import NewtonOptions

# The relative tolerance of a solve with the Fisher metric: Lanczos takes the inverse for a fixed
# matrix, which a rougher solve would not be.
INNER = 1e-6


class Counted(LinearOperator):
    """An operator that counts its products."""

    def __init__(self, A: LinearOperator) -> None:
        super().__init__(A.shape[0], A.dtype, A.device)
        self.inner, self.count = A, 0

    def mv(self, v: Tensor) -> Tensor:
        """Return the product, and count it."""
        self.count += 1
        return self.inner.mv(v)


class FisherMetric(LinearOperator):
    r"""The inverse of :math:`DFD + \mu I`, by conjugate gradients."""

    def __init__(self, F: Counted, scaled: LinearOperator, damping: float, max_iter: int) -> None:
        super().__init__(F.shape[0], F.dtype, F.device)
        self._F, self._max_iter = F, max_iter
        self._A = scaled + damping * Identity(F.shape[0], F.dtype, F.device)

    @property
    def count(self) -> int:
        """The products with ``F`` so far."""
        return self._F.count

    def mv(self, v: Tensor) -> Tensor:
        """Return the solution of the system with right-hand side ``v``."""
        return cg(self._A, v, rtol=INNER, max_iter=self._max_iter).x


def derivatives(objective: Objective, curvature: str) -> tuple[Tensor, Counted]:
    """Return the gradient of the minimized loss and its curvature, linearized once.

    Args:
        objective: The closure, at the start of the step.
        curvature: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix.

    """
    here, sign = objective.here, objective.sign

    def build() -> tuple[LinearOperator, Tensor]:
        if curvature == "hessian":
            A = HessianOperator(here.loss, objective.vector)
            return (sign * A if sign < 0 else A), objective.share * (sign * A.gradient)
        g = gradient(here.loss, objective.vector)
        return _gauss_newton(objective), objective.share * (sign * g)

    A, g = objective.processes.total(build, objective.theta)
    objective.note(backend=getattr(A, "backend", "graph"))
    return g, Counted(objective.operator(A))


def _gauss_newton(objective: Objective) -> LinearOperator:
    here = objective.here
    if here.joint is not None:
        return FisherOperator(here.joint, objective.vector)
    if not here.outputs:
        raise ValueError(
            'curvature="ggn" needs the closure to return (loss, outputs), the tensors that the'
            " loss was computed from, or (loss, distribution); it returned the loss alone"
        )
    loss = here.loss
    if objective.sign < 0:
        with torch.enable_grad():
            loss = -here.loss
    return GGNOperator(loss, here.outputs, objective.vector)


def preconditioned(
    objective: Objective, A: Counted, given: Gated | OperatorLike | None, damping: float
) -> LinearOperator | None:
    """Return the preconditioner for ``D A D``, whose inverse is the metric of the region."""
    units = objective.units
    if given is None:
        return None
    if isinstance(given, Gated):
        rule = given.preconditioner
        M = rule.build(A.inner, damping)  # It may need to see the network.
        A.count += rule.products
        objective.note(preconditioner=type(rule).__name__)
    else:
        M = as_operator(given, objective.theta)
    return M if units.rates is None else between(M, units.rates)


def fisher_metric(objective: Objective, o: NewtonOptions) -> FisherMetric:
    """Return the inverse of the Fisher metric of the closure's distribution."""
    here, none = objective.here, objective.theta.new_zeros(1)

    def build() -> tuple[FisherOperator, Tensor]:
        if here.joint is None:
            raise ValueError('metric="fisher" needs the closure to return (loss, distribution)')
        return FisherOperator(here.joint, objective.vector), none

    F, _ = objective.processes.total(build, none)
    counted = Counted(objective.operator(F))
    scaled = objective.units.operator(counted)
    return FisherMetric(counted, scaled, o.metric_damping, 10 * o.max_iter)
