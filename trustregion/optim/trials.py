"""The trials of NewtonTrustRegion: shrink the region, or shorten the step, until the loss falls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..solvers.line_search import backtracking
from ..solvers.radius import reduction_ratio
from ..status import Status
from .derivatives import without_autocast
from .objective import Objective
from .quadratic import Minimizer, TrialStep
from .values import Values

ACCEPT = 0.01  # The least rho of an accepted step; every radius rule shrinks below it.
SHORTER = 0.8  # The factor between the trials of Hessian-free optimization.
FAILED = (Status.REJECTED_RATIO, Status.NONFINITE_TRIAL)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One evaluation along a step.

    Attributes:
        values: The values there.
        predicted: The reduction that the model predicts.
        rho: The actual over the predicted reduction.
        lower: The loss is finite and lower than before.
        minimal: The loss did not fall, and at no length of the step should it fall visibly.

    """

    values: Values
    predicted: float
    rho: float
    lower: bool
    minimal: bool

    @property
    def fits(self) -> bool:
        """Whether the step may be taken."""
        return self.lower and self.rho > ACCEPT

    @property
    def within_rounding(self) -> bool:
        """Whether the model predicts less than the rounding of the loss, which did not fall."""
        return not self.lower and self.rho > 0


def measure(objective: Objective, step: TrialStep, scale: float = 1.0) -> Trial:
    """Evaluate the objective at ``scale`` times the step."""
    predicted = step.reduction(scale * objective.units.lr)
    values = objective.at(objective.theta + scale * objective.units.step(step.s))
    number = objective.returned.new_tensor  # in the precision of the closure's loss
    before, after = (objective.sign * number(loss) for loss in (objective.loss, values.loss))
    rho, lower = reduction_ratio(before, after, predicted), bool(after < before)
    minimal = not lower and reduction_ratio(before, after, step.largest_reduction) > 0
    return Trial(values=values, predicted=predicted, rho=rho, lower=lower, minimal=minimal)


def shrink(
    objective: Objective,
    minimize: Minimizer,
    name: str,
    size: float,
    follow: Callable[[float, float, TrialStep], float],
    limit: int,
) -> tuple[float, float]:
    """Minimize the model in one region after another until the loss falls as it predicts.

    Args:
        objective: The closure.
        minimize: Size of the region -> step.
        name: What the size is: ``"radius"`` or ``"damping"``.
        size: The first size.
        follow: (size, rho, step) -> the next size.
        limit: The number of trials that may fail.

    Returns:
        The size for the next step, and rho of the last trial, ``-inf`` if it failed.

    """
    rho, done = -math.inf, False
    for rejections in range(limit + 1):
        with without_autocast(objective):
            step = minimize(size)
        _report_solve(objective, step)
        objective.note(backtracks=rejections, **{name: size})
        if bool(step.s.any()):
            trial = measure(objective, step)
            done = trial.fits or trial.within_rounding  # No other size would show more.
            rho = trial.rho if done else -math.inf
            objective.note(predicted_reduction=trial.predicted, scale=1.0)
            if trial.fits:
                _accept(objective, step, trial)
            else:
                _reject(objective, trial)
        else:
            objective.note(status=step.status)
            if step.status is not Status.NEGATIVE_CURVATURE:  # which a larger damping removes
                break
        size = follow(size, rho, step)
        if done:
            break
    return size, rho


def shorten(objective: Objective, step: TrialStep, limit: int) -> float:
    """Shorten one step until the loss falls, and return rho of the whole step."""
    _report_solve(objective, step)
    if not (bool(step.s.any()) and step.decrease > 0):
        status = step.status if not bool(step.s.any()) else Status.NOT_A_DESCENT
        objective.note(status=status)
        return -math.inf
    measured: list[Trial] = []

    def evaluate(scale: float) -> Trial:
        measured.append(measure(objective, step, scale))
        return measured[-1]

    search = backtracking(evaluate, lambda trial: trial.fits, factor=SHORTER, max_backtracks=limit)
    trial = search.trial
    objective.note(
        predicted_reduction=trial.predicted, backtracks=search.backtracks, scale=search.scale
    )
    if search.accepted:
        _accept(objective, step, trial, search.scale)
    else:
        _reject(objective, trial)
    return measured[0].rho


def _report_solve(objective: Objective, step: TrialStep) -> None:
    objective.note(cg_status=step.status, cg_iterations=step.iterations, cg_residual=step.residual)


def _accept(objective: Objective, step: TrialStep, trial: Trial, scale: float = 1.0) -> None:
    """Keep the parameters of a trial, and report it."""
    theta, values = objective.theta + scale * objective.units.step(step.s), trial.values
    if objective.keep(theta, values, trial.predicted):
        objective.note(
            status=Status.ACCEPTED,
            new_loss=values.loss,
            kl=values.kl,
            actual_reduction=objective.sign * (objective.loss - values.loss),
            detail="",
        )


def _reject(objective: Objective, trial: Trial) -> None:
    """Report a trial that does not fit; its parameters are not kept."""
    detail = f"at the last trial the loss was {trial.values.loss} and rho {trial.rho:.3g}"
    status = Status.REJECTED_RATIO
    if not math.isfinite(trial.values.loss):
        status = Status.NONFINITE_TRIAL
    elif trial.within_rounding:
        status = Status.CONVERGED if trial.minimal else status
        detail = f"the model predicts a reduction of {trial.predicted:.3g}, which is rounding"
    objective.note(status=status, detail=detail)
