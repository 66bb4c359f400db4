"""The search of NaturalTrustRegion: measure candidates with the closure and keep the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..solvers.line_search import BallSearch, BallTrial, ball_search
from ..status import Status
from .candidates import Candidate
from .objective import Objective
from .options import NaturalOptions
from .values import Values


@dataclass(frozen=True, kw_only=True)
class _Trial(BallTrial):
    """The value and the size of a trial, and everything that was measured there."""

    measured: Values


def search(
    objective: Objective, candidates: Sequence[Candidate], o: NaturalOptions, fall: float | None
) -> None:
    """Keep the best trial, or leave the parameters as they were, and report the outcome.

    Args:
        objective: The closure.
        candidates: The steps to try, at least one.
        o: The options of the optimizer.
        fall: The reduction of the constraints' violation that the step aims at, if any.

    """
    chosen, found = _choose(objective, candidates, o, fall)
    objective.note(
        predicted_reduction=found.scale * chosen.predicted_reduction,
        damping=chosen.damping,
        scale=found.scale,
        backtracks=found.backtracks,
    )
    if found.accepted:
        theta, measured = objective.theta + found.scale * chosen.s, found.trial.measured
        if objective.keep(theta, measured, chosen.predicted_reduction):
            _report_accepted(objective, measured)
    else:
        _report_rejected(objective, found.trial)
        objective.compare_start(chosen.predicted_reduction)


def _choose(
    objective: Objective, candidates: Sequence[Candidate], o: NaturalOptions, fall: float | None
) -> tuple[Candidate, BallSearch[_Trial]]:
    """Take the best of several candidates and lengths, or search along the only one."""
    start, cap = _start_value(objective, o), o.max_backtracks
    first = o.scales[0]
    if len(candidates) * len(o.scales) > 1:
        best: tuple[Candidate, BallSearch[_Trial]] | None = None
        pairs = [(c, scale) for c in candidates for scale in o.scales]
        for count, (c, scale) in enumerate(pairs, 1):
            trial = _measure(objective, c, scale, o)
            lowest = start if best is None else best[1].trial.value
            if trial.finite and trial.size <= 1 and trial.value < lowest:
                best = (
                    c,
                    BallSearch(
                        accepted=True, scale=scale, trial=trial, evaluations=count, backtracks=0
                    ),
                )
        if best is not None:
            return best
        first, cap = o.backtrack_factor * min(o.scales), max(cap - len(pairs), 0)
    most_damped = max(candidates, key=lambda c: c.damping)
    found = ball_search(
        lambda scale: _measure(objective, most_damped, scale, o),
        start,
        most_damped.predicted_reduction if fall is None else fall,
        factor=o.backtrack_factor,
        max_backtracks=cap,
        goal=_goal(objective, o),
        first=first,
    )
    return most_damped, found


def _goal(objective: Objective, o: NaturalOptions) -> float:
    """Return the fraction of the ball to aim at; 0 where other terms set the length of the step."""
    free = o.penalty is not None or len(objective.constraints) > 0
    return 0.0 if free else min(1.0, (objective.units.lr * min(o.scales)) ** 2)


def _start_value(objective: Objective, o: NaturalOptions) -> float:
    return objective.violation if objective.violation > 0 else o.sign * objective.loss


def _measure(objective: Objective, candidate: Candidate, scale: float, o: NaturalOptions) -> _Trial:
    trial = objective.theta + scale * candidate.s
    measured = objective.at(trial, largest_kl=o.max_kl is not None)
    size = measured.kl / o.delta
    if measured.largest_kl is not None and o.max_kl is not None and not math.isnan(size):
        size = max(size, measured.largest_kl / o.max_kl)
    value = _value(objective, measured, o)
    return _Trial(value=value, size=size, measured=measured)


def _value(objective: Objective, measured: Values, o: NaturalOptions) -> float:
    """Return what is minimized: the violation where there is one at the start, else the loss."""
    loss = o.sign * measured.loss
    if not math.isfinite(loss):
        return math.nan
    if objective.violation > 0:
        return measured.violation
    if any(not c <= 0 for c in measured.constraints):
        return math.inf
    return loss + (o.penalty or 0.0) * measured.kl


def _report_accepted(objective: Objective, measured: Values) -> None:
    recovering = objective.violation > 0
    objective.note(
        status=Status.RECOVERING if recovering else Status.ACCEPTED,
        new_loss=measured.loss,
        kl=measured.kl,
        largest_kl=measured.largest_kl,
        constraints=measured.constraints,
        actual_reduction=objective.sign * (objective.loss - measured.loss),
    )


def _report_rejected(objective: Objective, trial: _Trial) -> None:
    measured, before = trial.measured, objective.info.constraints
    detail = f"at the last trial the loss was {measured.loss} and the KL {measured.kl}"
    if before:
        detail += f", the constraints {', '.join(f'{c:.3g}' for c in measured.constraints)}"
    if not (math.isfinite(measured.loss) and not math.isnan(trial.size)):
        status = Status.NONFINITE_TRIAL
    elif trial.size > 1:
        status = Status.REJECTED_KL
    else:
        kept = measured.violation <= 0 and objective.violation == 0
        status = Status.REJECTED_LOSS if kept else Status.REJECTED_CONSTRAINT
    objective.note(status=status, detail=detail)
