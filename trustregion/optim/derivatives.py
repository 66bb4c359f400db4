"""The derivatives of an objective where a step begins, as means over all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..autodiff import differentiate
from ..distributions import Joint, Prediction, joint_of
from ..operators.base import Identity, LinearOperator, OperatorLike, as_operator
from ..operators.fisher import FisherOperator
from ..operators.ggn import GGNOperator
from ..operators.hessian import HessianOperator
from ..preconditioners import Gated
from ..preconditioners.gate import between
from ..solvers.cg import cg
from ..status import Status
from ..vector import ParameterVector, norm
from .objective import Objective
from .options import NewtonOptions

CurvatureClosure = Callable[[], Prediction]

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


def without_autocast(objective: Objective) -> torch.autocast:
    """Return the context in which derivatives are taken, outside of the closure's autocast."""
    return torch.autocast(objective.vector.device.type, enabled=False)


def is_finite(objective: Objective) -> bool:
    """Say whether loss and constraints are finite; if they are not, the status says so."""
    if math.isfinite(objective.loss) and bool(objective.constraints.isfinite().all()):
        return True
    objective.note(status=Status.NONFINITE_LOSS)
    return False


def gradient(objective: Objective) -> Tensor | None:
    """Return the gradient of the minimized loss in the units of the learning rates, ``(n,)``.

    None stands for a step that cannot be taken, and the status then says why.
    """
    alone = objective.processes.size == 1

    def compute() -> Tensor:
        g = gradient_of(objective.here.loss, objective.vector, required=alone)
        return objective.sign * g

    if not is_finite(objective):
        return None
    return slope(objective, objective.processes.mean(compute, objective.theta, objective.share))


def slope(objective: Objective, g: Tensor, gtol: float = 0.0) -> Tensor | None:
    """Return a gradient in the units of the learning rates.

    None stands for a step that cannot or need not be taken, and the status then says why.

    Args:
        objective: The closure, at the start of the step.
        g: The gradient of the minimized loss, shape ``(n,)``.
        gtol: The largest absolute entry that counts as zero.

    """
    nonfinite = objective.vector.name_nonfinite(g)
    if nonfinite is not None:
        objective.note(status=Status.NONFINITE_GRADIENT, detail=f"parameter {nonfinite}")
        return None
    largest = g.abs().max().item() if g.numel() else 0.0
    objective.note(gradient_norm=norm(g), largest_gradient=largest)
    scaled = objective.units.gradient(g)
    if objective.units.lr == 0:
        objective.note(status=Status.ZERO_LENGTH)
    elif objective.violation == 0 and not bool(scaled.any()):
        objective.note(status=Status.STATIONARY)
    elif 0 < largest <= gtol:
        detail = f"the largest entry of the gradient is {largest:.3g}, and gtol is {gtol:.3g}"
        objective.note(status=Status.CONVERGED, detail=detail)
    else:
        return scaled
    return None


def constraint_gradients(objective: Objective) -> Tensor:
    """Return the gradients of the constraints in the same units, shape ``(m, n)``."""
    with torch.enable_grad():  # Taking an element is an operation of the graph.
        values = objective.here.constraints.unbind()
    vector, theta = objective.vector, objective.theta
    rows = [
        objective.processes.mean(
            lambda c=c, i=i: gradient_of(c, vector, f"constraint {i}"), theta, objective.share
        )
        for i, c in enumerate(values)
    ]
    return objective.units.gradient(torch.stack(rows)) if rows else theta.new_zeros(0, len(theta))


def fisher(
    objective: Objective, curvature: CurvatureClosure | None, g: Tensor, rows: Tensor
) -> LinearOperator:
    """Return the Fisher matrix of the prediction.

    Args:
        objective: The closure, at the start of the step.
        curvature: Returns another prediction, whose Fisher matrix is used instead.
        g: The gradient, shape ``(n,)``. It must vanish in every parameter that the Fisher matrix of
            no process sees, since no KL would bound such a parameter.
        rows: The gradients of the constraints, shape ``(m, n)``, of which the same holds.

    """
    vector = objective.vector

    def build() -> tuple[FisherOperator, Tensor]:
        joint = objective.here.prediction
        if curvature is not None:
            joint = objective.beside(partial(_prediction, curvature))
        F = FisherOperator(joint, vector)
        sums = like.clone()
        sums[0] = joint.total
        sums[1:][list(F.used)] = 1.0
        return F, sums

    like = objective.theta.new_zeros(1 + len(vector.params), dtype=torch.float64)
    F, sums = objective.processes.total(build, like)
    total, *counts = sums.tolist()
    seen = {i for i, count in enumerate(counts) if count > 0}
    _require_seen(seen, vector, [g, *rows])
    objective.note(backend=F.backend)
    return objective.processes.operator(F, F.total / total)


def _prediction(curvature: CurvatureClosure) -> Joint:
    return joint_of(curvature())


def quadratic(objective: Objective, curvature: str) -> tuple[Tensor, Counted]:
    """Return the gradient of the minimized loss, shape ``(n,)``, and its curvature.

    Args:
        objective: The closure, at the start of the step.
        curvature: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix.

    """
    here, sign = objective.here, objective.sign

    def build() -> tuple[LinearOperator, Tensor]:
        if curvature == "hessian":
            A = HessianOperator(here.loss, objective.vector)
            return (sign * A if sign < 0 else A), objective.share * (sign * A.gradient)
        g = gradient_of(here.loss, objective.vector)
        return _gauss_newton(objective), objective.share * (sign * g)

    A, g = objective.processes.total(build, objective.theta)
    objective.note(backend=getattr(A, "backend", "graph"))
    return g, Counted(objective.processes.operator(A, objective.share))


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
    counted = Counted(objective.processes.operator(F, objective.share))
    scaled = objective.units.operator(counted)
    return FisherMetric(counted, scaled, o.metric_damping, 10 * o.max_iter)


def gradient_of(
    loss: Tensor, vector: ParameterVector, what: str = "loss", *, required: bool = False
) -> Tensor:
    """Return the gradient of one number, shape ``(n,)``; ``.grad`` is untouched.

    The graph is kept, since the distribution shares it.

    Args:
        loss: One number with its graph.
        vector: The parameters.
        what: The name of the number in errors.
        required: Refuse a graph that leads to none of the parameters.

    """
    if not loss.requires_grad:
        raise ValueError(
            f"the {what} carries no graph, so it has no gradient: compute it from the model's"
            " outputs with grad enabled, without detach() or torch.no_grad()"
        )
    grads = differentiate([loss], vector.params)
    if required and all(grad is None for grad in grads):
        raise ValueError(
            f"the graph of the {what} leads to none of the {len(grads)} parameters given: pass the"
            " parameters of the model that the closure calls, and look for detach(), .item() or"
            " numpy on the way from them"
        )
    return vector.ravel(grads)


def _require_seen(seen: set[int], vector: ParameterVector, slopes: Sequence[Tensor]) -> None:
    """Refuse parameters that move the loss but not the distribution: no KL bounds them."""
    parts = [vector.unravel(g) for g in slopes]
    unused = set(range(len(vector.params))).difference(seen)
    unseen = [i for i in sorted(unused) if any(bool(part[i].any()) for part in parts)]
    if unseen:
        names = ", ".join(vector.names[i] for i in unseen)
        raise ValueError(
            f"the loss depends on parameter(s) {names}, the distribution does not, so the KL radius"
            " says nothing about them. Give them to another optimizer, or return a joint"
            " distribution that covers them, for example {'action': ..., 'value': Normal(v, 1)}"
        )
