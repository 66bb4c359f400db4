"""Measuring the steps of a quadratic model: shrink the region, or shorten the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..distributions import Joint
from ..solvers.line_search import backtracking
from ..solvers.radius import reduction_ratio
from ..status import Status
from ..vector import ParameterVector
from .closure import Calls, read_judgement, why_not_reproducible
from .info import StepInfo
from .quadratic import ModelStep, Solve
from .replicas import Replicas

ACCEPT = 0.01  # of what the model says the loss must fall by; every rule shrinks below it
SHORTER = 0.8  # factor between the trials of Hessian-free optimisation


@dataclass(frozen=True)
class Trial:
    """One evaluation.

    Attributes:
        loss: in the user's direction.
        kl: KL(old || new), where the closure returns a distribution.
        predicted: what the model promised.
        rho: the actual over the predicted reduction.
        lower: the loss is finite and no higher than before.

    """

    loss: float
    kl: float
    predicted: float
    rho: float
    lower: bool

    @property
    def fits(self) -> bool:
        """Whether the step may be taken."""
        return self.lower and self.rho > ACCEPT

    @property
    def within_rounding(self) -> bool:
        """Whether the model promised too little to show: the loss rose, and yet rho says 1."""
        return not self.lower and self.rho > 0


@dataclass(frozen=True)
class Trials:
    """The measurements of one step; the parameters are left where the last one put them.

    Attributes:
        calls: of the closure.
        old: the prediction before the step in float64, where there is one.
        vector: the parameters.
        theta: their values before the step.
        replicas: the processes of the step.
        share: the samples here over those of all.
        loss: before the step, with the dtype of the closure's.
        sign: -1 to maximise.
        lr: factor on the step.
        unscaled: from the solver's coordinates to the parameters'.

    """

    calls: Calls
    old: Joint | None
    vector: ParameterVector
    theta: Tensor
    replicas: Replicas
    share: float
    loss: Tensor
    sign: float
    lr: float
    unscaled: Callable[[Tensor], Tensor]

    def measure(self, step: ModelStep, scale: float = 1.0) -> Trial:
        """Evaluate the loss at ``scale`` times the step."""
        predicted = step.reduction(scale * self.lr)
        trial = self.theta + (scale * self.lr) * self.unscaled(step.s)
        if not bool(trial.isfinite().all()):
            return Trial(math.nan, math.nan, predicted, -math.inf, False)
        loss, kl = self._at(trial)
        before, after = self.sign * self.loss, self.sign * self.loss.new_tensor(loss)
        rho = reduction_ratio(before, after, predicted)
        return Trial(loss, kl, predicted, rho, bool(after <= before))

    def doubted(self, info: StepInfo) -> StepInfo:
        """Return the account of a step that failed, after one more call before the step."""
        if info.status not in (Status.REJECTED_RATIO, Status.REJECTED_LOSS, Status.NONFINITE_TRIAL):
            return info
        first, again = (info.loss, math.inf), self._at(self.theta)
        dtype, promised = self.theta.dtype, info.predicted_reduction
        different = why_not_reproducible(first, again, promised, dtype)
        if not different:
            return info
        return replace(info, status=Status.NOT_REPRODUCIBLE, detail=different)

    def _at(self, theta: Tensor) -> tuple[float, float]:
        """Return the loss and the KL at other parameters."""
        self.vector.assign(theta)
        like = self.theta.new_zeros(2, dtype=torch.float64)
        loss, kl = self.replicas.mean(self._evaluate, like, self.share).tolist()
        return loss, kl

    def _evaluate(self) -> Tensor:
        new = self.calls.trial(read_judgement)
        kl = torch.zeros((), dtype=torch.float64, device=self.theta.device)
        if self.old is not None and new.joint is not None:
            kl = self.old.mean_kl(new.joint)
        return torch.stack([new.loss.detach().reshape(()).to(kl), kl])


def shrink(
    trials: Trials,
    solve: Solve,
    name: str,
    size: float,
    follow: Callable[[float, float, ModelStep], float],
    limit: int,
    info: StepInfo,
) -> tuple[StepInfo, float, float]:
    """Solve and measure for one size of the region after another, until a step will do.

    Args:
        trials: the measurements.
        solve: size -> step.
        name: what the size is called: the radius, or the damping.
        size: the first one.
        follow: (size, rho, step) -> the next size.
        limit: how many trials may fail.
        info: the account so far.

    Returns:
        The account, the size for the next step, and rho of the last trial; ``-inf`` if it failed.

    """
    rho, done = -math.inf, False
    for rejections in range(limit + 1):
        step = solve(size)
        info = replace(_solved(info, step), backtracks=rejections, **{name: size})
        if bool(step.s.any()):
            trial = trials.measure(step)
            done = trial.fits or trial.within_rounding  # no other size would show more
            rho = trial.rho if done else -math.inf
            info = _noted(info, trial, trials.sign, rejections)
        else:
            info = replace(info, status=step.status)
            if step.status is not Status.NEGATIVE_CURVATURE:  # which a larger damping mends
                break
        size = follow(size, rho, step)
        if done:
            break
    return info, size, rho


def shorten(trials: Trials, step: ModelStep, limit: int, info: StepInfo) -> tuple[StepInfo, float]:
    """Shorten one step until the loss falls; return the account, and rho of the whole step."""
    info = _solved(info, step)
    if not (bool(step.s.any()) and step.decrease > 0):
        status = step.status if not bool(step.s.any()) else Status.NOT_A_DESCENT
        return replace(info, status=status), -math.inf
    measured: list[Trial] = []

    def evaluate(scale: float) -> Trial:
        measured.append(trials.measure(step, scale))
        return measured[-1]

    start = trials.sign * trials.loss.item()
    search = backtracking(
        evaluate,
        lambda trial: trial.fits and trials.sign * trial.loss < start,
        factor=SHORTER,
        max_backtracks=limit,
    )
    info = replace(_noted(info, search.trial, trials.sign, search.backtracks), scale=search.scale)
    if not search.accepted and info.accepted:
        info = _rejected(info, Status.REJECTED_LOSS, search.trial)
    return info, measured[0].rho


def _solved(info: StepInfo, step: ModelStep) -> StepInfo:
    return replace(
        info, cg_status=step.status, cg_iterations=step.iterations, cg_residual=step.residual
    )


def _noted(info: StepInfo, trial: Trial, sign: float, rejections: int) -> StepInfo:
    """Return the account with a trial: taken if it may be."""
    info = replace(info, predicted_reduction=trial.predicted, backtracks=rejections, scale=1.0)
    if not math.isfinite(trial.loss):
        return _rejected(info, Status.NONFINITE_TRIAL, trial)
    if not trial.fits:
        return _rejected(info, Status.REJECTED_RATIO, trial)
    return replace(
        info,
        status=Status.ACCEPTED,
        new_loss=trial.loss,
        kl=trial.kl,
        actual_reduction=sign * (info.loss - trial.loss),
        detail="",
    )


def _rejected(info: StepInfo, status: Status, trial: Trial) -> StepInfo:
    detail = f"at the last trial the loss was {trial.loss} and rho {trial.rho:.3g}"
    if trial.within_rounding:
        detail = "the model promises no more than the rounding of the loss"
    return replace(
        info, status=status, new_loss=info.loss, kl=0.0, actual_reduction=0.0, detail=detail
    )
