"""The natural gradient within a KL trust region, as a torch optimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..distributions import Joint
from ..operators.base import Identity, OperatorLike, congruent
from ..operators.fisher import FisherOperator
from ..preconditioners import Gated, Preconditioner
from ..solvers.cg import cg
from ..solvers.solution import LinearSolution
from ..status import Status
from ..subproblem import kl_ball_step
from ..vector import ParameterVector, exponent, ldexp, norm, scalar_ldexp
from .closure import Closure, comparable_kernels, evaluate, gradient
from .info import StepInfo
from .options import SHARED, Options, shared_options
from .search import search_along


class NaturalTrustRegion(torch.optim.Optimizer):
    r"""Minimise a loss by natural-gradient steps that stay within a KL ball.

    Each step solves, matrix-free,

    .. math:: \min_s\; g's \quad \text{subject to} \quad \tfrac12 s'Fs \le \delta

    where ``g`` is the gradient of the loss and ``F`` the Fisher matrix of the model's predicted
    distribution, then shortens ``s`` until the *measured* loss has fallen and the *measured*
    KL(old || new) is at most ``delta``. A step that cannot have both leaves every parameter bit
    for bit as it was; :attr:`info` says why.

    The closure returns ``(loss, distribution)`` without calling ``backward()``. It is called once
    with grad enabled and then once a trial under ``no_grad``; a closure that differentiates inside
    wraps that part in ``torch.enable_grad()``. It must be reproducible: the same batch and the
    same noise in every call of one step.

    Several parameter groups share one KL ball. ``lr`` multiplies the step's length, so
    learning-rate schedulers work (with ``cycle_momentum=False`` where they would cycle a momentum,
    of which there is none). It is the only option that may differ between groups: the largest one
    multiplies the length; a group at a fraction of it has its parameters measured in units of that
    fraction, which damps it more, and at 0 it stays. ``delta`` may be changed between steps too,
    in all groups.

    Cost of a step: one forward and backward pass, ``cg_max_iter`` Fisher products at most, and one
    forward pass a trial. Memory: about ten vectors of the parameters' size and the graph.

    Args:
        params: parameters or parameter groups, as for any torch optimizer. float32 or float64.
        delta: KL radius in nats: joint over output dimensions, mean over the batch.
        lr: factor on the length of the step to the ball's edge; 1 goes to the edge.
        damping: lambda in ``(F + lambda I) x = -g``; it shapes the direction, not the length.
        cg_max_iter: limit on conjugate-gradient iterations, one Fisher product each.
        cg_rtol: relative residual at which conjugate gradients stop early.
        preconditioner: ``KFAC(module)``, ``Jacobi()``, ``Nystrom(rank)`` or ``Recycled()``, built
            anew in each step and switched off where it does not pay (:class:`Gated`;
            ``info.preconditioner`` says so). Or a fixed approximation of the inverse of
            ``F + lambda I``, positive definite, that is always used: a :class:`LinearOperator`, a
            square tensor or a callable.
        backtrack_factor: factor between successive trials of the line search.
        max_backtracks: limit on reductions; one more trial than this at most.
        maximize: maximise the objective instead.

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
        Policy Optimization, 2015, section 6 and appendix C.

    """

    info: StepInfo | None = None
    """The account of the last step; None before the first."""

    def __init__(
        self,
        params: Iterable[Any],
        delta: float = 0.01,
        *,
        lr: float | Tensor = 1.0,
        damping: float = 1e-3,
        cg_max_iter: int = 10,
        cg_rtol: float = 1e-3,
        preconditioner: Preconditioner | Gated | OperatorLike | None = None,
        backtrack_factor: float = 0.7,
        max_backtracks: int = 30,
        maximize: bool = False,
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
        }
        self.preconditioner = preconditioner
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options must agree with the others', ``lr`` excepted."""
        super().add_param_group(param_group)
        try:
            shared_options(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride] # the closure returns a pair
        self, closure: Closure | None = None
    ) -> Tensor | None:
        """Take one step; :attr:`info` then says how it went.

        Args:
            closure: returns ``(loss, distribution)``. None is allowed only where there is nothing
                to do: every ``.grad`` is None or zero (checkpointing libraries call it so).

        Returns:
            The loss before the step, detached; None without a closure.

        Raises:
            RuntimeError: no closure although there are gradients, inference mode, or a model whose
                graph cannot be differentiated twice.
            TypeError: the closure returned something else, or a distribution that is refused.
            ValueError: parameters that are not finite, a loss or distribution without a graph.

        """
        options = shared_options(self.param_groups)
        if closure is None:
            self._require_no_gradient()
            self._count_step()
            return None
        vector = self._vector()
        theta = _entry_values(vector)
        with comparable_kernels():
            loss, joint = evaluate(closure, graph=True)
            start = loss.detach().clone()  # a closure may return a parameter itself
            s, info = self._direction(loss, joint, vector, options)
            if s is not None:
                old = joint.frozen()
                del loss, joint  # and their graph
                info = search_along(closure, old, vector, theta, s, options, info)
        self.info = info
        self._count_step()
        return start

    def _direction(
        self, loss: Tensor, joint: Joint, vector: ParameterVector, options: Options
    ) -> tuple[Tensor | None, StepInfo]:
        """Return the step to the edge of the ball, or None and the reason why there is none."""
        info = StepInfo(Status.NONFINITE_LOSS, loss=loss.item(), new_loss=loss.item())
        if not math.isfinite(info.loss):
            return None, info
        with torch.autocast(vector.device.type, enabled=False):
            g = options.sign * gradient(loss, vector)
            nonfinite = vector.name_nonfinite(g)
            if nonfinite is not None:
                detail = f"parameter {nonfinite}"
                return None, replace(info, status=Status.NONFINITE_GRADIENT, detail=detail)
            lr, rates = self._rates(vector)
            if lr == 0:
                return None, replace(info, status=Status.ZERO_LENGTH)
            h = g if rates is None else rates * g  # s = D y, D = diag(rates): solve for y
            e = exponent(h)
            if e is None:
                return None, replace(info, status=Status.STATIONARY)
            h = ldexp(h, -e)  # of unit size: the step does not depend on it

            fisher = FisherOperator(joint, vector)
            _require_seen(fisher, vector, g)
            solve = self._solve(fisher, -h, rates, options)
        gate = self.preconditioner
        info = replace(
            info,
            status=solve.status,
            backend=fisher.backend,
            preconditioner=str(gate) if isinstance(gate, Gated) else "",
            cg_status=solve.status,
            cg_iterations=solve.iterations,
            cg_residual=solve.residual_norm / norm(h),
            products=solve.products,
        )
        if solve.iterations == 0:
            return None, info
        step = kl_ball_step(
            solve.x, h, options.delta, damped_curvature=solve.curvature, damping=options.damping
        )
        if step.status is not Status.CONVERGED:
            return None, replace(info, status=step.status)
        predicted = scalar_ldexp(lr * step.predicted_reduction, e)
        s = lr * step.s if rates is None else lr * rates * step.s
        return s, replace(info, predicted_reduction=predicted)

    def _solve(
        self, F: FisherOperator, b: Tensor, rates: Tensor | None, options: Options
    ) -> LinearSolution:
        """Solve (D F D + damping I) y = b, D = diag(rates), by conjugate gradients."""
        rtol, max_iter, damping = options.cg_rtol, options.cg_max_iter, options.damping
        M = self._gated()
        if isinstance(M, Gated):
            return M.solve(F, b, damping, rtol=rtol, max_iter=max_iter, scale=rates)
        A = F if rates is None else congruent(F, rates)
        A = A + damping * Identity(b.numel(), b.dtype, b.device)
        return cg(A, b, M=M, rtol=rtol, max_iter=max_iter)

    def _gated(self) -> Gated | OperatorLike | None:
        """Return the preconditioner, on trial if it is built anew for each step."""
        if isinstance(self.preconditioner, Preconditioner):
            self.preconditioner = Gated(self.preconditioner)
        return self.preconditioner

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizers do, and that of the preconditioner with it."""
        state, gate = super().state_dict(), self._gated()
        return {**state, "preconditioner": gate.state_dict()} if isinstance(gate, Gated) else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; without a state for it, the preconditioner starts anew."""
        super().load_state_dict(state_dict)
        gate = self._gated()
        if isinstance(gate, Gated) and "preconditioner" in state_dict:
            gate.load_state_dict(copy.deepcopy(state_dict["preconditioner"]))

    def _vector(self) -> ParameterVector:
        """Return the trainable parameters of all groups, with their names if they have any."""
        params: list[Tensor] = []
        names: list[str] = []
        for i, group in enumerate(self.param_groups):
            default = [f"{i}.{j}" for j in range(len(group["params"]))]
            for name, p in zip(group.get("param_names", default), group["params"], strict=True):
                if p.requires_grad:
                    params.append(p)
                    names.append(name)
        if not params:
            raise ValueError("no parameter requires a gradient: all of them are frozen")
        return ParameterVector(params, names)

    def _rates(self, vector: ParameterVector) -> tuple[float, Tensor | None]:
        """Return the largest learning rate and, where the groups differ, the ratios to it."""
        lrs = [float(group["lr"]) for group in self.param_groups]
        largest = max(lrs)
        if min(lrs) == largest:
            return largest, None
        pairs = zip(lrs, self.param_groups, strict=True)
        trainable = ((lr, p) for lr, group in pairs for p in group["params"] if p.requires_grad)
        return largest, vector.ravel([torch.full_like(p, lr / largest) for lr, p in trainable])

    def _require_no_gradient(self) -> None:
        grads = (p.grad for group in self.param_groups for p in group["params"])
        if any(grad is not None and bool(grad.any()) for grad in grads):
            raise RuntimeError(
                "NaturalTrustRegion.step() needs a closure that returns (loss, distribution): the"
                " gradients in .grad do not define a KL"
            )

    def _count_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", torch.zeros(())) + 1

    def __getstate__(self) -> dict[str, Any]:
        """Return what deepcopy and pickle keep: the base class's, and the attributes here."""
        kept = {"info": self.info, "preconditioner": self.preconditioner}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; options that an older state does not know take their defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key in ("lr", *SHARED):
                group.setdefault(key, self.defaults[key])


def _entry_values(vector: ParameterVector) -> Tensor:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "step() cannot run under torch.inference_mode(), where no graph is recorded: leave it,"
            " or use torch.no_grad() around the code that needs it"
        )
    theta = vector.values()
    nonfinite = vector.name_nonfinite(theta)
    if nonfinite is not None:
        raise ValueError(
            f"parameter {nonfinite} holds a NaN or an infinity before the step. This optimizer"
            " never writes one: look at the initialisation, a loaded checkpoint or other code that"
            " writes the parameters"
        )
    return theta


def _require_seen(F: FisherOperator, vector: ParameterVector, g: Tensor) -> None:
    """Refuse parameters that move the loss but not the distribution: no KL bounds them."""
    parts = vector.unravel(g)
    unused = set(range(len(parts))).difference(F.used)
    unseen = [i for i in sorted(unused) if bool(parts[i].any())]
    if unseen:
        names = ", ".join(vector.names[i] for i in unseen)
        raise ValueError(
            f"the loss depends on parameter(s) {names}, the distribution does not, so the KL radius"
            " says nothing about them. Give them to another optimizer, or return a joint"
            " distribution that covers them, for example {'action': ..., 'value': Normal(v, 1)}"
        )
