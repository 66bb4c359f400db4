"""Newton's method within a trust region, as a torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..operators.base import LinearOperator, OperatorLike
from ..preconditioners import Gated, Preconditioner
from ..solvers.radius import classic_radius, gould_radius, levenberg_marquardt_damping
from ..solvers.stopping import forcing_sequence
from ..status import Status
from .closure import NewtonClosure, read_newton
from .derivatives import (
    Counted,
    FisherMetric,
    fisher_metric,
    is_finite,
    preconditioned,
    quadratic,
    slope,
    without_autocast,
)
from .objective import Objective
from .optimizer import TrustRegionOptimizer, atomic
from .options import NewtonOptions, Region, flat
from .processes import ProcessGroup
from .quadratic import Minimizer, Model, TrialStep, minimizer
from .trials import FAILED, shorten, shrink

KNOWN = {
    "curvature": ("hessian", "ggn"),
    "solver": ("gltr", "steihaug", "cg"),
    "metric": ("euclidean", "fisher"),
    "rule": ("gould", "classic"),
}


class NewtonTrustRegion(TrustRegionOptimizer):
    r"""Minimize a loss by steps of its quadratic model within a trust region.

    Each step solves, matrix-free,

    .. math:: \min_s\; g's + \tfrac12 s'As \quad \text{subject to} \quad \|s\| \le \Delta

    where ``A`` is the Hessian of the loss or its generalized Gauss-Newton matrix. It then measures
    the loss there: :math:`\rho` is the actual over the predicted reduction. A step with
    :math:`\rho > 0.01` is taken. Otherwise the radius shrinks and the model is minimized again,
    **for no product**, since the Krylov space of the first solve is kept. A good step lets the
    radius grow. Where the Hessian is indefinite, the step follows directions of negative curvature
    to the boundary. A step that does not reduce the loss leaves every parameter bit for bit as it
    was, and :attr:`info` says why.

    The closure returns the loss, without calling ``backward()``. For ``curvature="ggn"`` it returns
    ``(loss, outputs)``, the very tensors that the loss was computed from, for the Gauss-Newton
    matrix of the loss; or ``(loss, distribution)`` for the Fisher matrix, which is the
    Gauss-Newton matrix of a negative log-likelihood in its natural parameters.

    The fit has ended when the status is ``CONVERGED``: no entry of the gradient exceeds ``gtol``,
    or the model predicts a reduction below the rounding of the loss. The parameters are then left
    as they are.

    **Levenberg-Marquardt.** With an infinite radius the damping bounds the step and moves by
    Marquardt's rule::

        NewtonTrustRegion(params, math.inf, curvature="ggn", damping=1e-2,
                          region=Region(damping_factor=4.0))

    To fit a few ill-conditioned parameters, also solve exactly (``rtol=1e-12``) and write the
    parameters in units of a first guess.

    **Hessian-free optimization** (Martens, 2010) is the same with the solver ``"cg"``: conjugate
    gradients start from the last solution and stop by Martens' rule of relative progress, the step
    is shortened until the loss falls, and lambda moves by 3/2::

        NewtonTrustRegion(params, math.inf, curvature="ggn", damping=1.0,
                          region=Region(solver="cg", damping_factor=1.5, warm_start=0.95))

    Cost of a step: one forward and backward pass, one product per iteration, and one forward pass
    per trial; one more after a rejected step, and one more in the first step, to see whether the
    closure repeats. Memory: the Krylov space, one vector in float64 per iteration, or two with a
    metric; the solver ``"cg"`` needs a constant number.

    Args:
        params: Parameters or parameter groups, as for any torch optimizer; float32 or float64.
        radius: :math:`\Delta` of the first step, in the norm of the metric; it then follows
            :math:`\rho`. An infinite radius lets the damping bound the step.
        curvature: ``"hessian"`` or ``"ggn"``.
        lr: The factor on the step, as schedulers write it. The parameters of a group at a fraction
            of the largest rate are measured in units of that fraction.
        damping: lambda, added to ``A``. With an infinite radius it is in units of the metric, as
            :math:`A + \lambda M^{-1}`, except for the solver ``"cg"``.
        max_iter: The limit on the iterations of a solve.
        rtol: The tolerance of a solve; None takes :func:`forcing_sequence`, which is exact near a
            minimum only.
        gtol: The largest absolute gradient entry at which the fit counts as converged.
        preconditioner: As for :class:`NaturalTrustRegion`; it also defines the metric.
        maximize: Maximize the loss instead.
        region: How the model is minimized, and how the region follows :math:`\rho`; see
            :class:`Region`.
        process_group: As for :class:`NaturalTrustRegion`. If the closure returns the loss alone,
            every process counts the same.

    Raises:
        TypeError: The preconditioner is a class or a name.
        ValueError: An option is out of range, or groups disagree on a shared option.

    Example:
        >>> import torch
        >>> x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
        >>> optimizer = NewtonTrustRegion([x], gtol=1e-6)
        >>> def rosenbrock():
        ...     return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
        >>> for _ in range(40):
        ...     loss = optimizer.step(rosenbrock)
        >>> x.detach(), optimizer.info.status
        (tensor([1.0000, 1.0000], dtype=torch.float64), <Status.CONVERGED: 'converged'>)

    References:
        Conn, Gould and Toint, Trust-Region Methods, 2000, Alg. 6.1.1; Martens, Deep Learning via
        Hessian-free Optimization, 2010.

    """

    options_class = NewtonOptions

    def __init__(
        self,
        params: Iterable[Any],
        radius: float = 1.0,
        *,
        curvature: str = "hessian",
        lr: float | Tensor = 1.0,
        damping: float = 0.0,
        max_iter: int = 100,
        rtol: float | None = None,
        gtol: float = 0.0,
        preconditioner: Preconditioner | Gated | OperatorLike | None = None,
        maximize: bool = False,
        region: Region = Region(),  # noqa: B008 # frozen
        process_group: ProcessGroup | bool | None = None,
    ) -> None:
        numbers = flat("region", region, Region)
        words = {name: numbers.pop(name) for name in ("solver", "metric", "rule")}
        for name, word in {"curvature": curvature, **words}.items():
            if word not in KNOWN[name]:
                known = " or ".join(f'"{word}"' for word in KNOWN[name])
                raise ValueError(f"{name} must be {known}, got {word!r}")
        self.curvature, self.solver, self.metric = curvature, words["solver"], words["metric"]
        self.rule = words["rule"]
        if self.solver == "cg" and radius < math.inf:
            raise ValueError(
                'solver="cg" has no radius: the damping bounds its steps. Pass radius=math.inf'
                f" and a positive damping, got radius={radius}"
            )
        if self.metric == "fisher" and preconditioner is not None:
            raise ValueError(
                'metric="fisher" and a preconditioner each define the metric of the region: give'
                " one of them"
            )
        defaults = {
            "lr": lr,
            "radius": radius,
            "damping": damping,
            "max_iter": max_iter,
            "rtol": rtol,
            "gtol": gtol,
            "maximize": maximize,
            **numbers,
        }
        super().__init__(params, defaults, preconditioner, process_group)

    @atomic
    def step(  # pyright: ignore[reportIncompatibleMethodOverride] # the closure may return a pair
        self, closure: NewtonClosure | None = None
    ) -> Tensor | None:
        """Take one step; :attr:`info` then says how it went.

        Args:
            closure: Returns the loss, or ``(loss, outputs)``, or ``(loss, distribution)``. None is
                allowed only where there is nothing to do: every ``.grad`` is None or zero
                (checkpointing libraries call it so).

        Returns:
            The loss before the step, detached; None without a closure. With several processes it is
            the mean over all of them.

        Raises:
            RuntimeError: There are gradients and no closure, inference mode is on, a GradScaler is
                used, the model's graph cannot be differentiated twice, or another process failed.
            TypeError: The closure returned something else, or a distribution that is refused.
            ValueError: Parameters are not finite, the loss has no graph, or the closure does not
                return what the curvature needs.

        """
        if closure is None:
            return self._nothing_to_do("the loss")
        with self._told():
            o = self._options(NewtonOptions)
        with self._objective(closure, read_newton, o) as objective:
            objective.note(radius=o.radius, damping=o.damping)
            if not is_finite(objective):  # info.status says why
                return objective.returned
            with without_autocast(objective):
                raw, A = quadratic(objective, self.curvature)  # linearized once
                g = slope(objective, raw, o.gtol)  # in the units of the learning rates
                if g is None:  # info.status says why
                    return objective.returned
                M = self._metric(objective, A, o)  # the region is s'M^-1 s <= radius^2
            DAD, rtol = objective.units.operator(A), o.rtol
            rtol = forcing_sequence() if rtol is None else rtol
            model = Model(A=DAD, g=g, M=M, rtol=rtol, max_iter=o.max_iter)  # g's + s'As / 2
            last = self._last_solution(objective.vector, o)
            minimize = minimizer(model, self.solver, o, last)  # size of the region -> step
            self._try(objective, minimize, o)  # rho = actual / predicted, and the region follows
            objective.note(products=A.count + (M.count if isinstance(M, FisherMetric) else 0))
        return objective.returned

    def _metric(self, objective: Objective, A: Counted, o: NewtonOptions) -> LinearOperator | None:
        """Return the inverse of the metric of the region; None for the Euclidean one."""
        if self.metric == "fisher":
            return fisher_metric(objective, o)
        return preconditioned(objective, A, self._gated(), o.damping)

    def _try(self, objective: Objective, minimize: Minimizer, o: NewtonOptions) -> None:
        """Keep a step that reduces the loss as the model predicts, and let the region follow."""
        limit, changes = o.max_rejections, {}
        if self.solver == "cg":
            with without_autocast(objective):
                step = minimize(o.damping)
            rho = shorten(objective, step, limit)
            objective.solution = step.s
            changes = self._next_damping(o, rho)
        elif o.radius == math.inf:
            raised = lambda damping, rho, _: _marquardt(damping, rho, o)  # noqa: E731
            size, _ = shrink(objective, minimize, "damping", o.damping, raised, limit)
            changes = {} if o.damping_factor is None else {"damping": size}
        else:
            size, rho = shrink(objective, minimize, "radius", o.radius, self._next_radius, limit)
            changes = {"radius": size, **self._next_damping(o, rho)}
        if objective.info.status in FAILED:
            objective.compare_start(objective.info.predicted_reduction)
        if objective.info.status is not Status.NOT_REPRODUCIBLE:  # Then no trial says anything.
            objective.options.update(changes)

    def _next_radius(self, radius: float, rho: float, step: TrialStep) -> float:
        if self.rule == "gould":
            return gould_radius(radius, rho, length=step.norm)
        return classic_radius(radius, rho, on_boundary=step.on_boundary)

    def _next_damping(self, o: NewtonOptions, rho: float) -> dict[str, float]:
        return {} if o.damping_factor is None else {"damping": _marquardt(o.damping, rho, o)}

    def _settings(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in KNOWN}


def _marquardt(damping: float, rho: float, o: NewtonOptions) -> float:
    return levenberg_marquardt_damping(damping, rho, factor=o.damping_factor or 1.5)
