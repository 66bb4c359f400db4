"""Searching along a step with the user's closure: commit the accepted trial or restore."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from ..distributions import Joint
from ..line_search import backtracking
from ..status import Status
from ..vector import ParameterVector
from .closure import Closure, evaluate
from .info import StepInfo
from .options import Options


@dataclass(frozen=True)
class _Trial:
    """One evaluation of the line search, in the direction of minimisation."""

    objective: float
    kl: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.objective) and not math.isnan(self.kl)


def search_along(
    closure: Closure,
    old: Joint,
    vector: ParameterVector,
    theta: Tensor,
    s: Tensor,
    options: Options,
    info: StepInfo,
) -> StepInfo:
    """Backtrack along ``s``; commit the accepted trial or restore ``theta`` bit for bit."""
    start = options.sign * info.loss

    def evaluate_trial(scale: float) -> _Trial:
        trial = theta + scale * s
        if not bool(trial.isfinite().all()):
            return _Trial(math.nan, math.nan)
        vector.assign(trial)
        loss, new = evaluate(closure, graph=False)
        return _Trial(options.sign * loss.item(), old.mean_kl(new).item())

    def accept(trial: _Trial) -> bool:
        return trial.finite and trial.objective < start and trial.kl <= options.delta

    accepted = False
    try:
        search = backtracking(
            evaluate_trial,
            accept,
            factor=options.backtrack_factor,
            max_backtracks=options.max_backtracks,
        )
        accepted = search.accepted
    finally:  # also on KeyboardInterrupt
        if not accepted:
            vector.assign(theta)
    last = search.trial
    info = replace(
        info,
        predicted_reduction=search.scale * info.predicted_reduction,
        scale=search.scale,
        backtracks=search.backtracks,
        evaluations=search.backtracks + 2,
    )
    if accepted:
        return replace(
            info,
            status=Status.ACCEPTED,
            new_loss=options.sign * last.objective,
            kl=last.kl,
            actual_reduction=start - last.objective,
        )
    detail = f"at the last trial the loss was {options.sign * last.objective} and the KL {last.kl}"
    if not last.finite:
        return replace(info, status=Status.NONFINITE_TRIAL, detail=detail)
    left_ball = last.kl > options.delta
    status = Status.REJECTED_KL if left_ball else Status.REJECTED_LOSS
    return replace(info, status=status, detail=detail)
