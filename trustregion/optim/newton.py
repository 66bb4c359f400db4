"""Newton's method within a trust region, as a torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..distributions import Prediction
from ..operators.base import OperatorLike
from ..preconditioners import Gated, Preconditioner
from ..solvers.radius import classic_radius, gould_radius, levenberg_marquardt_damping
from ..status import Status
from .base import TrustRegionOptimizer, uncompiled
from .closure import Calls, Judgement, comparable_kernels, read_judgement
from .curvature import CURVATURES, METRICS, SOLVERS, Curvature, quadratic_model, solver
from .info import StepInfo
from .options import NewtonOptions, SharedOptions, shared_options
from .quadratic import Model, ModelStep
from .replicas import ProcessGroup
from .start import enter
from .trials import Trials, shorten, shrink

NewtonClosure = Callable[[], "Tensor | tuple[Tensor, Tensor | tuple[Tensor, ...] | Prediction]"]

RULES = ("gould", "classic")


class NewtonTrustRegion(TrustRegionOptimizer):
    r"""Minimise a loss by steps of its quadratic model within a trust region.

    Each step solves, matrix-free,

    .. math:: \min_s\; g's + \tfrac12 s'As \quad \text{subject to} \quad \|s\| \le \Delta

    where ``A`` is the Hessian of the loss, or its generalised Gauss-Newton matrix, measures the
    loss there, and compares: :math:`\rho` is the actual over the predicted reduction. A step with
    :math:`\rho > 0.01` is taken; otherwise the radius shrinks and the model is minimised again,
    **for no product**, since the Krylov space of the first solve is kept. A good step lets the
    radius grow. Where the Hessian is indefinite, directions of negative curvature are followed to
    the edge. A step that does not reduce the loss leaves every parameter bit for bit as it was;
    :attr:`info` says why.

    The closure returns the loss, without calling ``backward()``. For ``curvature="ggn"`` it returns
    ``(loss, outputs)``, the very tensors that the loss was computed from, for the Gauss-Newton
    matrix of the loss; or ``(loss, distribution)`` for the Fisher matrix, which is the
    Gauss-Newton matrix of a negative log-likelihood in its natural parameters.

    **Levenberg-Marquardt.** With an infinite radius the damping bounds the step, and moves by
    Marquardt's rule::

        NewtonTrustRegion(params, math.inf, curvature="ggn", damping=1e-2, adapt_damping=True,
                          damping_factor=4.0)

    To fit a few, ill-conditioned parameters, solve exactly too, ``rtol=1e-12``, and write them in
    units of a first guess.

    **Hessian-free optimisation** (Martens, 2010) is the same with ``solver="cg"``: conjugate
    gradients start from the last solution and end by Martens' rule of relative progress, the step
    is shortened until the loss falls, and lambda moves by 3/2::

        NewtonTrustRegion(params, math.inf, curvature="ggn", damping=1.0, adapt_damping=True,
                          solver="cg", warm_start=0.95)

    Cost of a step: one forward and backward pass, one product an iteration, and one forward pass a
    trial. Memory: that of the Krylov space, one vector in float64 an iteration, two with a metric;
    ``"cg"`` needs a constant number.

    Args:
        params: parameters or parameter groups, as for any torch optimizer. float32 or float64.
        radius: :math:`\Delta` of the first step, in the norm of ``metric``; it then follows
            :math:`\rho`. Infinite to let the damping bound the step.
        curvature: ``"hessian"`` or ``"ggn"``.
        lr: factor on the step, as schedulers write it. Groups at a fraction of the largest rate
            have their parameters measured in units of that fraction.
        solver: ``"gltr"``: exact over a Krylov space; ``"steihaug"``: truncated conjugate
            gradients; ``"cg"``: the damped system, without a radius.
        metric: the norm of the radius. ``"euclidean"``: or, with a preconditioner ``M``,
            :math:`\sqrt{s'M^{-1}s}`. ``"fisher"``: :math:`\sqrt{s'(F + \mu I)s}`, in which a radius
            of :math:`\sqrt{2\delta}` is to second order a KL of :math:`\delta`; each iteration then
            solves with ``F``, by conjugate gradients of at most ``max_iter`` products.
        damping: lambda, added to ``A``; with an infinite radius in units of the metric, as
            :math:`A + \lambda M^{-1}`, but for ``"cg"``.
        adapt_damping: let lambda follow :math:`\rho` (:func:`levenberg_marquardt_damping`).
        damping_factor: by which it moves.
        max_iter: limit on the iterations of a solve.
        rtol: tolerance of a solve; None for :func:`forcing_sequence`, exact near a minimum only.
        preconditioner: as for :class:`NaturalTrustRegion`; it changes the metric too.
        radius_rule: ``"gould"`` (:func:`gould_radius`) or ``"classic"`` (:func:`classic_radius`).
        max_rejections: how many trials may fail before the step gives up.
        warm_start: for ``"cg"``: start from this factor times the last solution.
        metric_damping: :math:`\mu` of the Fisher metric.
        maximize: maximise the objective instead.
        process_group: as for :class:`NaturalTrustRegion`. Where the closure returns the loss alone,
            every process counts the same.

    Raises:
        ValueError: an option out of range, or groups that disagree on a shared option.

    Example:
        >>> x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
        >>> optimizer = NewtonTrustRegion([x])
        >>> def rosenbrock():
        ...     return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
        >>> for _ in range(40):
        ...     loss = optimizer.step(rosenbrock)
        >>> x.detach()
        tensor([1., 1.], dtype=torch.float64)

    References:
        Conn, Gould and Toint, Trust-Region Methods, 2000, Alg. 6.1.1; Martens, Deep Learning via
        Hessian-free Optimization, 2010.

    """

    options_class = NewtonOptions
    _settings: ClassVar = {
        "curvature": CURVATURES,
        "solver": SOLVERS,
        "metric": METRICS,
        "radius_rule": RULES,
    }

    def __init__(
        self,
        params: Iterable[Any],
        radius: float = 1.0,
        *,
        curvature: str = "hessian",
        lr: float | Tensor = 1.0,
        solver: str = "gltr",
        metric: str = "euclidean",
        damping: float = 0.0,
        adapt_damping: bool = False,
        damping_factor: float = 1.5,
        max_iter: int = 100,
        rtol: float | None = None,
        preconditioner: Preconditioner | Gated | OperatorLike | None = None,
        radius_rule: str = "gould",
        max_rejections: int = 20,
        warm_start: float = 0.0,
        metric_damping: float = 1e-3,
        maximize: bool = False,
        process_group: ProcessGroup | bool | None = None,
    ) -> None:
        self.curvature, self.solver, self.metric = curvature, solver, metric
        self.radius_rule = radius_rule
        for name, known in self._settings.items():
            if getattr(self, name) not in known:
                words = " or ".join(f'"{word}"' for word in known)
                raise ValueError(f"{name} must be {words}, got {getattr(self, name)!r}")
        if solver == "cg" and radius < math.inf:
            raise ValueError(
                'solver="cg" knows no radius: the damping bounds its steps. Pass radius=math.inf'
                f" and a positive damping, got radius={radius}"
            )
        if metric == "fisher" and preconditioner is not None:
            raise ValueError(
                'metric="fisher" and a preconditioner are both the metric of the region: give one'
            )
        defaults = {
            "lr": lr,
            "radius": radius,
            "damping": damping,
            "adapt_damping": adapt_damping,
            "damping_factor": damping_factor,
            "max_iter": max_iter,
            "rtol": rtol,
            "max_rejections": max_rejections,
            "warm_start": warm_start,
            "metric_damping": metric_damping,
            "maximize": maximize,
        }
        super().__init__(params, defaults, preconditioner, process_group)

    @uncompiled
    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride] # the closure may return a pair
        self, closure: NewtonClosure | None = None
    ) -> Tensor | None:
        """Take one step; :attr:`info` then says how it went.

        Args:
            closure: returns the loss, or ``(loss, outputs)``, or ``(loss, distribution)``. None is
                allowed only where there is nothing to do: every ``.grad`` is None or zero
                (checkpointing libraries call it so).

        Returns:
            The loss before the step, detached; None without a closure. The mean over all processes
            where there are several.

        Raises:
            RuntimeError: no closure although there are gradients, inference mode, a GradScaler, a
                model whose graph cannot be differentiated twice, or another process that failed.
            TypeError: the closure returned something else, or a distribution that is refused.
            ValueError: parameters that are not finite, a loss without a graph, or a closure that
                does not return what the curvature needs.

        """
        self._refuse_scaler()
        options = shared_options(self.param_groups, NewtonOptions)
        if closure is None:
            self._require_closure("the loss")
            self._count_step()
            return None
        vector, replicas = self._vector(), self._replicas()
        last = self._last_direction(vector) if options.warm_start else None
        with comparable_kernels():
            calls = Calls(closure, vector.device)
            agreed = self._agreed(options)
            start = enter(calls, read_judgement, _parts, vector, replicas, agreed)
            returned = start.evaluation.loss.detach().clone()  # it may be a parameter itself
            curvature = Curvature(
                self.curvature, self.metric, vector, replicas, start, options, *self._rates(vector)
            )
            model, info = quadratic_model(curvature, self._gated())
            if model is not None:
                joint = start.evaluation.joint
                trials = Trials(
                    calls,
                    None if joint is None else joint.frozen(),
                    vector,
                    start.theta,
                    replicas,
                    start.share,
                    returned.new_tensor(start.loss),
                    options.sign,
                    curvature.lr,
                    curvature.unscaled,
                )
                info = self._search(trials, model, options, last, info)
            self.info = replace(info, products=curvature.products, evaluations=calls.count)
        self._count_step()
        return returned if replicas.size == 1 else returned.new_tensor(info.loss)

    def _search(
        self,
        trials: Trials,
        model: Model,
        options: NewtonOptions,
        last: Tensor | None,
        info: StepInfo,
    ) -> StepInfo:
        """Commit a step that will do, or restore the parameters bit for bit."""
        solve, accepted = solver(self.solver, model, options, last), False
        moved: dict[str, float] = {}  # options that follow what was measured
        try:
            if self.solver == "cg":
                step = solve(options.damping)
                info, rho = shorten(trials, step, options.max_rejections, info)
                if options.warm_start:
                    self._keep_direction(trials.vector, step.s)
                moved |= self._adapted_damping(options, rho)
            elif options.radius == math.inf:
                limit, first = options.max_rejections, options.damping
                follow = self._raised(options)
                info, damping, _ = shrink(trials, solve, "damping", first, follow, limit, info)
                if options.adapt_damping:
                    moved["damping"] = damping
            else:
                limit, first = options.max_rejections, options.radius
                follow = self._next_radius
                info, radius, rho = shrink(trials, solve, "radius", first, follow, limit, info)
                moved |= {"radius": radius, **self._adapted_damping(options, rho)}
            info = trials.doubted(info)
            if info.status is not Status.NOT_REPRODUCIBLE:  # which says nothing of any trial
                for name, value in moved.items():
                    self._write(name, value)
            accepted = info.accepted
        finally:  # also on KeyboardInterrupt
            if not accepted:
                trials.vector.assign(trials.theta)
        return info

    def _agreed(self, options: SharedOptions) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)}" for name in self._settings)
        return f"{super()._agreed(options)}, {settings}"

    def _next_radius(self, radius: float, rho: float, step: ModelStep) -> float:
        if self.radius_rule == "gould":
            return gould_radius(radius, rho, length=step.norm)
        return classic_radius(radius, rho, on_boundary=step.on_boundary)

    def _raised(self, options: NewtonOptions) -> Callable[[float, float, ModelStep], float]:
        factor = options.damping_factor
        return lambda damping, rho, _: levenberg_marquardt_damping(damping, rho, factor=factor)

    def _adapted_damping(self, options: NewtonOptions, rho: float) -> dict[str, float]:
        if not options.adapt_damping:
            return {}
        factor = options.damping_factor
        return {"damping": levenberg_marquardt_damping(options.damping, rho, factor=factor)}

    def __getstate__(self) -> dict[str, Any]:
        """Return what deepcopy and pickle keep."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._settings}}


def _parts(evaluation: Judgement) -> tuple[Tensor, Tensor, float]:
    return evaluation.loss, evaluation.loss.new_zeros(0), evaluation.weight
