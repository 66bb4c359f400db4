"""The natural gradient within a KL trust region, as a torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..operators.base import OperatorLike
from ..preconditioners import Gated, Preconditioner
from ..solvers.radius import classic_radius, levenberg_marquardt_damping
from ..status import Status
from .candidates import solve, to_the_edge, within_constraints
from .closure import NaturalClosure, read_natural
from .derivatives import (
    CurvatureClosure,
    constraint_gradients,
    fisher,
    gradient,
    without_autocast,
)
from .info import StepInfo
from .optimizer import TrustRegionOptimizer, atomic
from .options import Adapt, NaturalOptions, Search, flat
from .processes import ProcessGroup
from .search import search

# A converged loss rejects step after step, and delta or the penalty would move for ever. A KL this
# far below the target carries no information, and the options soon recover where the loss changes.
SMALLEST = 1e-6


class NaturalTrustRegion(TrustRegionOptimizer):
    r"""Minimize a loss by natural-gradient steps that stay within a KL ball.

    Each step solves, matrix-free,

    .. math:: \min_s\; g's \quad \text{subject to} \quad \tfrac12 s'Fs \le \delta

    where ``g`` is the gradient of the loss and ``F`` the Fisher matrix of the model's predicted
    distribution, then shortens ``s`` until the *measured* loss has fallen and the *measured*
    KL(old || new) is at most ``delta``. A step that cannot have both leaves every parameter bit
    for bit as it was, and :attr:`info` says why. A step that raises leaves parameters, buffers,
    torch's random numbers and the state of the optimizer as they were. Ctrl-C, or another signal
    with a handler in Python, ends it inside the closure or at a product; one that comes when the
    parameters have been chosen is handled after the step, which is then whole and counted.

    The closure returns ``(loss, distribution)`` without calling ``backward()``. It is called once
    with grad enabled and then once per trial under ``no_grad``; a closure that differentiates
    inside wraps that part in ``torch.enable_grad()``. It must be reproducible: all calls of one
    step must see the same batch. Torch's random numbers and the buffers of the modules it calls are
    the same in every call, so that Dropout draws one mask per step; :func:`check_closure` finds
    what is not reproducible, and the first step of an optimizer warns about it.

    A closure of ``(loss, distribution, constraints)`` also returns values ``c``, shape ``(m,)``,
    that should not be positive. The step then solves the problem above subject to
    :math:`c + \nabla c' s \le 0` and is accepted only if the measured constraints hold. Where a
    constraint is violated at the start, the step reduces the violation first
    (``Status.RECOVERING``), and the loss may rise.

    The search ends near the edge of the ball: each further trial is interpolated from the measured
    KL, longer or shorter, so that an accepted step uses 0.9 of ``delta`` within three trials where
    the loss allows it (:func:`ball_search`).

    All parameter groups share one KL ball. ``lr`` multiplies the length of the step, so
    learning-rate schedulers work (with ``cycle_momentum=False`` where they would cycle a momentum,
    which this optimizer does not have). It is the only option that may differ between groups. The
    largest rate multiplies the length. The parameters of a group at a fraction of it are measured
    in units of that fraction, which damps them more, and a group at 0 stays put. ``delta`` may be
    changed between steps too, in all groups.

    Cost of a step: one forward and backward pass, at most ``cg_max_iter`` Fisher products, and one
    forward pass per trial; one more after a rejected step, and one more in the first step, to see
    whether the closure repeats. Memory: the graph, and at most thirty vectors of the parameters'
    size, of which one in float64 counts twice.

    Args:
        params: Parameters or parameter groups, as for any torch optimizer; float32 or float64.
        delta: The KL radius in nats: joint over output dimensions, mean over the batch.
        lr: The factor on the length of the step to the edge of the ball; 1 goes to the edge.
        damping: lambda in ``(F + lambda I) x = -g``, which shapes the direction of the step and not
            its length. Several dampings, as a tuple, are solved from one Krylov space and measured,
            and the one of least loss within the ball is taken; each costs a forward pass and no
            product.
        cg_max_iter: The limit on conjugate-gradient iterations, one Fisher product each.
        cg_rtol: The relative residual at which conjugate gradients stop early.
        preconditioner: ``KFAC(module)``, ``Jacobi()``, ``Nystrom(rank)`` or ``Recycled()``, built
            afresh in each step and switched off where it does not pay (:class:`Gated`;
            ``info.preconditioner`` says so). Or a fixed approximation of the inverse of
            ``F + lambda I``, positive definite, that is always used: a :class:`LinearOperator`, a
            square tensor or a callable.
        penalty: C, to minimize the loss plus C times the KL. The step is then
            :math:`s = -(F + \lambda I)^{-1} g / C`, which ``delta`` still bounds unless it is
            infinite, and the penalized loss must fall.
        maximize: Maximize the loss instead.
        search: Options of the line search; see :class:`Search`.
        adapt: Options that follow the steps; see :class:`Adapt`. Their new values are written to
            the parameter groups, as a scheduler would.
        process_group: The processes that take the step together, each with its own samples and the
            same parameters. Losses, products and KLs are means over the samples of all processes.
            None takes the default group of ``torch.distributed`` if it is initialized, False none.

    Raises:
        TypeError: The preconditioner is a class or a name.
        ValueError: An option is out of range, or groups disagree on a shared option.

    Example:
        >>> import torch
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
        penalty: float | None = None,
        maximize: bool = False,
        search: Search = Search(),  # noqa: B008 # frozen
        adapt: Adapt = Adapt(),  # noqa: B008 # frozen
        process_group: ProcessGroup | bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "delta": delta,
            "damping": damping,
            "cg_max_iter": cg_max_iter,
            "cg_rtol": cg_rtol,
            "penalty": penalty,
            "maximize": maximize,
            **flat("search", search, Search),
            **flat("adapt", adapt, Adapt),
        }
        super().__init__(params, defaults, preconditioner, process_group)

    @atomic
    def step(  # pyright: ignore[reportIncompatibleMethodOverride] # the closure returns a pair
        self, closure: NaturalClosure | None = None, *, curvature: CurvatureClosure | None = None
    ) -> Tensor | None:
        """Take one step; :attr:`info` then says how it went.

        Args:
            closure: Returns ``(loss, distribution)``, and constraints if there are any. None is
                allowed only where there is nothing to do: every ``.grad`` is None or zero
                (checkpointing libraries call it so).
            curvature: Returns the prediction for other samples, usually fewer, whose Fisher matrix
                is used instead, so that products cost less (:func:`subsample`). It is called once.

        Returns:
            The loss before the step, detached; None without a closure. With several processes it is
            the mean over the samples of all.

        Raises:
            RuntimeError: There are gradients and no closure, inference mode is on, a GradScaler is
                used, the model's graph cannot be differentiated twice, or another process failed.
            TypeError: The closure returned something else, or a distribution that is refused.
            ValueError: Parameters are not finite, the loss or the distribution has no graph, or the
                number of constraints changed in a trial.

        """
        if closure is None:
            return self._nothing_to_do("(loss, distribution)")
        with self._told():
            o, solves, fall = self._options(NaturalOptions), [], None
        with self._objective(closure, read_natural, o) as objective:
            objective.note(delta=o.delta, penalty=o.penalty)
            with without_autocast(objective):
                g = gradient(objective)  # of the loss, in the units of the learning rates
                if g is None:  # info.status says why
                    return objective.returned
                rows, M = constraint_gradients(objective), self._gated()
                F = fisher(objective, curvature, g, rows)  # linearized once, never run again
                if len(rows):
                    steps, fall = within_constraints(objective, F, g, rows, o, M)
                else:
                    last = self._last_solution(objective.vector, o)
                    solves = solve(F, g, objective.units, o, M, last)  # (F + damping I) x = -g
                    steps = to_the_edge(objective, solves, o, M)  # s'Fs / 2 = delta
            del F
            objective.release()  # the graph, before the search
            if steps:
                search(objective, steps, o, fall)  # a lower loss, and KL(old || new) <= delta
                objective.options.update(_followed(o, objective.info))
            objective.solution = solves[0].x if solves else None
        return objective.returned


def _followed(o: NaturalOptions, info: StepInfo) -> dict[str, float]:
    """Return new values of delta, damping and penalty, from what the search measured."""
    rho, new = info.rho if info.accepted else -math.inf, dict[str, float]()
    if info.status in (Status.RECOVERING, Status.NOT_REPRODUCIBLE):
        return new  # Such a step says nothing about the loss.
    if o.max_delta is not None:
        edge = info.accepted and info.kl >= 0.8 * o.delta
        radius = classic_radius(
            math.sqrt(o.delta),
            rho,
            on_boundary=edge,
            shrink=0.5,
            grow=math.sqrt(2),
            largest=math.sqrt(o.max_delta),
        )
        floor = min(o.delta, SMALLEST * o.max_delta)
        new["delta"] = max(min(radius**2, o.max_delta), floor)
    if o.damping_factor is not None:
        factor = o.damping_factor
        new["damping"] = levenberg_marquardt_damping(o.dampings[0], rho, factor=factor)
    if o.kl_target is not None and o.penalty is not None:
        # The model's KL of a rejected step: its predicted reduction is s'Fs / C at scale 1.
        predicted = info.predicted_reduction / (2 * o.penalty * info.scale)
        kl = info.kl if info.accepted else predicted
        beyond = 1.5 if info.accepted else SMALLEST
        if kl > beyond * o.kl_target:
            new["penalty"] = 2 * o.penalty
        elif info.accepted and kl < o.kl_target / 1.5:
            new["penalty"] = o.penalty / 2
    return new
