"""Backtracking along a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Trial = TypeVar("Trial")


@dataclass(frozen=True)
class LineSearch(Generic[Trial]):
    """The result of a search.

    Attributes:
        accepted: whether the last trial passed the test.
        scale: the scale of the last trial.
        trial: what ``evaluate`` returned for it.
        backtracks: how often the scale was reduced: evaluations minus one.

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
        evaluate: scale -> trial; called once a scale, in decreasing order.
        accept: trial -> whether it will do.
        factor: between 0 and 1.
        max_backtracks: how often to reduce; ``max_backtracks + 1`` evaluations at most.

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
            return LineSearch(accepted, scale, trial, j)
        j += 1
