"""The natural gradient within a KL trust region, as a torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..operators.base import OperatorLike
from ..preconditioners import Gated, Preconditioner
from ..solvers.radius import classic_radius, levenberg_marquardt_damping
from ..status import Status
from .base import TrustRegionOptimizer, uncompiled
from .closure import Calls, Closure, Evaluation, comparable_kernels, read_prediction
from .direction import directions
from .info import StepInfo
from .options import NaturalOptions, shared_options
from .problem import CurvatureClosure, Problem
from .replicas import ProcessGroup
from .search import Search
from .start import enter

# A converged loss rejects step after step, and the radius would shrink for ever. A KL so far below
# the target tells nothing more, and is soon left where the loss changes.
SMALLEST = 1e-6


class NaturalTrustRegion(TrustRegionOptimizer):
    r"""Minimise a loss by natural-gradient steps that stay within a KL ball.

    Each step solves, matrix-free,

    .. math:: \min_s\; g's \quad \text{subject to} \quad \tfrac12 s'Fs \le \delta

    where ``g`` is the gradient of the loss and ``F`` the Fisher matrix of the model's predicted
    distribution, then shortens ``s`` until the *measured* loss has fallen and the *measured*
    KL(old || new) is at most ``delta``. A step that cannot have both leaves every parameter bit
    for bit as it was; :attr:`info` says why.

    The closure returns ``(loss, distribution)`` without calling ``backward()``. It is called once
    with grad enabled and then once a trial under ``no_grad``; a closure that differentiates inside
    wraps that part in ``torch.enable_grad()``. It must be reproducible: the same batch in every
    call of one step. Random numbers of torch's generators are the same in every call, so that
    Dropout draws one mask a step; :func:`check_closure` finds what is not reproducible.

    A closure of ``(loss, distribution, constraints)`` has values ``c``, shape ``(m,)``, that should
    not be positive. The step then solves the problem above with :math:`c + \nabla c' s \le 0` and
    is accepted where the measured constraints hold; where one does not hold at the start, the
    step is to reduce the violation first, ``Status.RECOVERING``, and the loss may rise.

    The search ends near the edge: the next trial is interpolated from the measured KL, longer or
    shorter, so that an accepted step uses 0.9 of ``delta`` within three trials where the loss
    allows it (:func:`ball_search`).

    Several parameter groups share one KL ball. ``lr`` multiplies the step's length, so
    learning-rate schedulers work (with ``cycle_momentum=False`` where they would cycle a momentum,
    of which there is none). It is the only option that may differ between groups: the largest one
    multiplies the length; a group at a fraction of it has its parameters measured in units of that
    fraction, which damps it more, and at 0 it stays. ``delta`` may be changed between steps too,
    in all groups.

    Cost of a step: one forward and backward pass, ``cg_max_iter`` Fisher products at most, and one
    forward pass a trial; one more after a step that was rejected, to see whether the closure
    repeats. Memory: at most thirty vectors of the parameters' size, float64 counted twice, and the
    graph.

    Args:
        params: parameters or parameter groups, as for any torch optimizer. float32 or float64.
        delta: KL radius in nats: joint over output dimensions, mean over the batch.
        lr: factor on the length of the step to the ball's edge; 1 goes to the edge.
        damping: lambda in ``(F + lambda I) x = -g``; it shapes the direction, not the length.
            Several, as a tuple, are solved from one Krylov space and measured: the one of least
            loss within the ball is taken, for a forward pass each and no product more.
        cg_max_iter: limit on conjugate-gradient iterations, one Fisher product each.
        cg_rtol: relative residual at which conjugate gradients stop early.
        preconditioner: ``KFAC(module)``, ``Jacobi()``, ``Nystrom(rank)`` or ``Recycled()``, built
            anew in each step and switched off where it does not pay (:class:`Gated`;
            ``info.preconditioner`` says so). Or a fixed approximation of the inverse of
            ``F + lambda I``, positive definite, that is always used: a :class:`LinearOperator`, a
            square tensor or a callable.
        backtrack_factor: largest factor from a trial that did not lower the loss to the next.
        max_backtracks: one more trial of the line search than this at most.
        maximize: maximise the objective instead.
        scales: lengths to measure, as fractions of that to the edge; of several, for each damping,
            the one of least loss is taken.
        max_kl: bound on the KL of every sample, beside the one on their mean.
        penalty: C, to minimise the loss plus C times the KL: the step is then
            :math:`s = -(F + \lambda I)^{-1} g / C`, which ``delta`` still bounds, unless it is
            infinite, and the penalised loss must fall.
        kl_target: double C after a step with more than 1.5 times this KL or a rejected one, and
            halve it after one with less than the 1.5th part. A rejected step with a millionth of
            this KL leaves C as it is.
        max_delta: let ``delta`` follow rho, the actual over the predicted reduction of the loss:
            a quarter of it, down to a millionth of this, after a step with rho below 1/4; twice as
            much, up to this, after one with rho above 3/4 that used 0.8 of it.
        adapt_damping: let ``damping`` follow rho (:func:`levenberg_marquardt_damping`).
        warm_start: start conjugate gradients from this factor times the last solution, whose
            memory then fades over the steps; costs one product.
        process_group: the processes that take the step together, each with samples of its own and
            the same parameters: losses, products and KLs are means over the samples of all. None
            takes the default group of ``torch.distributed`` where it is initialised; False none.

    Options that follow the steps are written to the parameter groups, as a scheduler would.

    Raises:
        ValueError: an option out of range, or groups that disagree on a shared option.

    Example:
        >>> from torch.distributions import Categorical
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> x, y = torch.randn(64, 4), torch.randint(3, (64,))
        >>> optimizer = NaturalTrustRegion(model.parameters(), delta=0.01)
        >>> def closure():
        ...     distribution = Categorical(logits=model(x))
        ...     return -distribution.log_prob(y).mean(), distribution
        >>> loss = optimizer.step(closure)
        >>> optimizer.info.status, optimizer.info.kl <= 0.01
        (<Status.ACCEPTED: 'accepted'>, True)

    References:
        Amari, Natural Gradient Works Efficiently in Learning, 1998; Schulman et al., Trust Region
        Policy Optimization, 2015, section 6 and appendix C; Achiam et al., Constrained Policy
        Optimization, 2017; Schulman et al., Proximal Policy Optimization Algorithms, 2017, section
        4, for the penalty.

    """

    options_class = NaturalOptions

    def __init__(
        self,
        params: Iterable[Any],
        delta: float = 0.01,
        *,
        lr: float | Tensor = 1.0,
        damping: float | tuple[float, ...] = 1e-3,
        cg_max_iter: int = 10,
        cg_rtol: float = 1e-3,
        preconditioner: Preconditioner | Gated | OperatorLike | None = None,
        backtrack_factor: float = 0.7,
        max_backtracks: int = 30,
        maximize: bool = False,
        scales: tuple[float, ...] = (1.0,),
        max_kl: float | None = None,
        penalty: float | None = None,
        kl_target: float | None = None,
        max_delta: float | None = None,
        adapt_damping: bool = False,
        warm_start: float = 0.0,
        process_group: ProcessGroup | bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "delta": delta,
            "damping": damping,
            "cg_max_iter": cg_max_iter,
            "cg_rtol": cg_rtol,
            "backtrack_factor": backtrack_factor,
            "max_backtracks": max_backtracks,
            "maximize": maximize,
            "scales": scales,
            "max_kl": max_kl,
            "penalty": penalty,
            "kl_target": kl_target,
            "max_delta": max_delta,
            "adapt_damping": adapt_damping,
            "warm_start": warm_start,
        }
        super().__init__(params, defaults, preconditioner, process_group)

    @uncompiled
    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride] # the closure returns a pair
        self, closure: Closure | None = None, *, curvature: CurvatureClosure | None = None
    ) -> Tensor | None:
        """Take one step; :attr:`info` then says how it went.

        Args:
            closure: returns ``(loss, distribution)``, and constraints if there are any. None is
                allowed only where there is nothing to do: every ``.grad`` is None or zero
                (checkpointing libraries call it so).
            curvature: returns the prediction for other samples, usually fewer, whose Fisher matrix
                is used: products then cost as much less (:func:`subsample`). Called once.

        Returns:
            The loss before the step, detached; None without a closure. The mean over the samples of
            all processes where there are several.

        Raises:
            RuntimeError: no closure although there are gradients, inference mode, a GradScaler, a
                model whose graph cannot be differentiated twice, or another process that failed.
            TypeError: the closure returned something else, or a distribution that is refused.
            ValueError: parameters that are not finite, a loss or distribution without a graph, or
                another number of constraints in a trial.

        """
        self._refuse_scaler()
        options = shared_options(self.param_groups, NaturalOptions)
        if closure is None:
            self._require_closure("(loss, distribution)")
            self._count_step()
            return None
        vector, replicas = self._vector(), self._replicas()
        last = self._last_direction(vector) if options.warm_start else None
        with comparable_kernels():
            calls = Calls(closure, vector.device)
            agreed = self._agreed(options)
            start = enter(calls, read_prediction, _parts, vector, replicas, agreed)
            returned = start.evaluation.loss.detach().clone()  # it may be a parameter itself
            problem = Problem(vector, replicas, calls, start, options, *self._rates(vector))
            found = directions(problem, self._gated(), curvature, last)
            info = found.info
            if found.candidates:
                old, theta, share = start.evaluation.joint.frozen(), start.theta, start.share
                goal = problem.goal
                del start, problem  # and their graph
                search = Search(
                    calls, old, vector, theta, replicas, share, options, goal, found.fall
                )
                info = search.run(found.candidates, info)
                self._adapt(options, info)
        if options.warm_start and found.solution is not None:
            self._keep_direction(vector, found.solution)
        self.info = info
        self._count_step()
        return returned if replicas.size == 1 else returned.new_tensor(info.loss)

    def _adapt(self, options: NaturalOptions, info: StepInfo) -> None:
        """Let radius, damping and penalty follow what was measured."""
        rho = info.rho if info.accepted else -math.inf
        if info.status in (Status.RECOVERING, Status.NOT_REPRODUCIBLE):
            return  # no statement on the loss
        if options.max_delta is not None:
            edge = info.accepted and info.kl >= 0.8 * options.delta
            radius = classic_radius(
                math.sqrt(options.delta),
                rho,
                on_boundary=edge,
                shrink=0.5,
                grow=math.sqrt(2),
                largest=math.sqrt(options.max_delta),
            )
            floor = min(options.delta, SMALLEST * options.max_delta)
            self._write("delta", max(min(radius**2, options.max_delta), floor))
        if options.adapt_damping:
            self._write("damping", levenberg_marquardt_damping(options.dampings[0], rho))
        if options.kl_target is not None and options.penalty is not None:
            # of a step that was rejected, as the model has it: predicted is s'Fs / C for scale 1
            kl = info.predicted_reduction / (2 * options.penalty * info.scale)
            beyond = SMALLEST if not info.accepted else 1.5
            if (info.kl if info.accepted else kl) > beyond * options.kl_target:
                self._write("penalty", 2 * options.penalty)
            elif info.accepted and info.kl < options.kl_target / 1.5:
                self._write("penalty", options.penalty / 2)


def _parts(evaluation: Evaluation) -> tuple[Tensor, Tensor, float]:
    return evaluation.loss, evaluation.constraints, evaluation.joint.total
