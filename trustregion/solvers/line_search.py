"""Searching along a step: by fixed factors, or for the edge of a ball."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Trial = TypeVar("Trial")
BallTrialT = TypeVar("BallTrialT", bound="BallTrial")


@dataclass(frozen=True, kw_only=True)
class LineSearch(Generic[Trial]):
    """The result of a search.

    Attributes:
        accepted: whether the last trial passed the test.
        scale: the scale of the last trial.
        trial: the result of ``evaluate`` at that scale.
        backtracks: the number of reductions of the scale, one less than the evaluations.

    """

    accepted: bool
    scale: float
    trial: Trial
    backtracks: int


def backtracking(
    evaluate: Callable[[float], Trial],
    accept: Callable[[Trial], bool],
    *,
    factor: float,
    max_backtracks: int,
) -> LineSearch[Trial]:
    """Try the scales 1, factor, factor^2, ... and stop at the first accepted one.

    Args:
        evaluate: scale -> trial; called once per scale, in decreasing order.
        accept: trial -> whether to accept it.
        factor: factor between successive scales, in (0, 1).
        max_backtracks: maximum number of reductions, so that there are at most
            ``max_backtracks + 1`` evaluations.

    Example:
        >>> search = backtracking(lambda a: a, lambda a: a < 0.3, factor=0.5, max_backtracks=9)
        >>> search.scale, search.backtracks
        (0.25, 2)

    """
    j = 0
    while True:
        scale = factor**j
        trial = evaluate(scale)
        accepted = accept(trial)
        if accepted or j >= max_backtracks:
            return LineSearch(accepted=accepted, scale=scale, trial=trial, backtracks=j)
        j += 1


@dataclass(frozen=True, kw_only=True)
class BallTrial:
    """One evaluation of a search within a ball.

    Attributes:
        value: the value to minimize.
        size: the measured KL over its bound, at most 1 within the ball.

    """

    value: float
    size: float

    @property
    def finite(self) -> bool:
        """Whether the value is finite and the size not NaN; an infinite KL is outside the ball."""
        return math.isfinite(self.value) and not math.isnan(self.size)


@dataclass(frozen=True, kw_only=True)
class BallSearch(Generic[BallTrialT]):
    """The result of a search within a ball.

    Attributes:
        accepted: whether a trial was within the ball and lowered the value.
        scale: the scale of the best such trial, or of the last trial if there is none.
        trial: the trial at that scale.
        evaluations: the number of trials.
        backtracks: the number of trials before the first acceptable one.

    """

    accepted: bool
    scale: float
    trial: BallTrialT
    evaluations: int
    backtracks: int


AIM, ENOUGH, LOOKS = 0.95, 0.9, 3  # the aimed and the sufficient share of the goal, and trials
LONGEST, SHORTEST = 4.0, 0.1  # limits on the factor between successive scales


def ball_search(
    evaluate: Callable[[float], BallTrialT],
    start: float,
    slope: float,
    *,
    factor: float,
    max_backtracks: int,
    goal: float = 1.0,
    first: float = 1.0,
) -> BallSearch[BallTrialT]:
    r"""Look for a scale that lowers the value, near the edge of the ball.

    A KL grows nearly with the square of the scale. A trial outside the ball is therefore followed
    by one at

    .. math:: a_+ = a \left( \frac{0.95\, t}{q(a)} \right)^{1/p}, \quad p = 2,

    where ``q`` is the measured size and ``t`` the goal. So is an acceptable trial that uses less
    than 0.9 of the goal, within the first three evaluations and unless the parabola through the
    values predicts no lower value there. Once there are two trials, ``p`` fits both. A trial inside
    the ball that does not lower the value is followed by the minimizer of the parabola, kept
    between 0.1 and ``factor`` times its scale, and a trial that is not finite by ``factor`` times
    its scale.

    Args:
        evaluate: scale -> trial.
        start: the value at scale 0.
        slope: minus the derivative of the value at scale 0, positive.
        factor: factor by which a failed trial shrinks at least, in (0, 1).
        max_backtracks: maximum number of evaluations after the first.
        goal: the size to approach, at most 1; 0 to stop at the first acceptable trial.
        first: the first scale.

    Example:
        >>> def evaluate(scale):
        ...     return BallTrial(value=-scale, size=1.5 * scale**2)
        >>> search = ball_search(evaluate, 0.0, 1.0, factor=0.5, max_backtracks=9)
        >>> round(search.trial.size, 3), search.evaluations
        (0.95, 2)

    References:
        Dennis and Schnabel, Numerical Methods for Unconstrained Optimization, 1983, section 6.3.2,
        for the parabola and its limits.

    """
    scale, best, former, outside = first, None, None, None
    count = backtracks = 0
    while True:
        count += 1
        here = _Evaluated(scale, evaluate(scale))
        trial, left = here.trial, here.outside
        lower = trial.value < (best.trial.value if best else start)
        if trial.finite and trial.size <= 1 and lower:
            former, best = best, here
        elif best is None:
            backtracks += 1
        elif not left:
            break  # longer, and no lower
        if count > max_backtracks:
            break
        farther, outside = outside, here if left else outside
        if best is None:
            aim = AIM * (goal or 1.0)
            scale = here.towards(aim, farther) if left else here.shorter(start, slope, factor)
        elif count >= LOOKS or best.trial.size >= ENOUGH * goal:
            break
        else:
            scale = best.towards(AIM * goal, outside or former)
            if outside is None and not best.lower_at(scale, start, slope):
                break
    end = best or here
    return BallSearch(
        accepted=best is not None,
        scale=end.scale,
        trial=end.trial,
        evaluations=count,
        backtracks=backtracks,
    )


@dataclass(frozen=True)
class _Evaluated(Generic[BallTrialT]):
    scale: float
    trial: BallTrialT

    @property
    def outside(self) -> bool:
        return self.trial.finite and 1 < self.trial.size < math.inf

    def towards(self, aim: float, other: _Evaluated[BallTrialT] | None) -> float:
        """Return the scale where the size is ``aim``, by the power law through the points."""
        ratio, power = self.trial.size / aim, 2.0
        if other is not None and other.scale != self.scale and min(ratio, other.trial.size) > 0:
            steps = math.log(other.scale / self.scale)
            power = math.log(other.trial.size / self.trial.size) / steps
        change = ratio ** (-1 / power) if ratio > 0 and power > 0 else LONGEST
        return self.scale * min(max(change, SHORTEST), LONGEST)

    def shorter(self, start: float, slope: float, factor: float) -> float:
        """Return the scale after one at which the value is not lower."""
        lowest = self._lowest(start, slope)
        return self.scale * min(max(lowest, SHORTEST), factor)

    def lower_at(self, scale: float, start: float, slope: float) -> bool:
        """Say whether the parabola is lower at another scale."""
        return scale / self.scale < 2 * self._lowest(start, slope) - 1

    def _lowest(self, start: float, slope: float) -> float:
        """Return where the parabola through the values is lowest, as a factor on the scale."""
        predicted = slope * self.scale
        excess = self.trial.value - start + predicted
        if not (math.isfinite(excess) and excess > 0 and predicted > 0):
            return math.inf
        return 0.5 * predicted / excess
