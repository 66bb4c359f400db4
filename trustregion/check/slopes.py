"""The order of an error in the step length, estimated between rounding and higher orders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_WINDOW = 4  # The number of successive lengths that a slope is fitted to.
_CLEAR = 10.0  # The logarithm of an error so far above its rounding is accurate to a tenth.


@dataclass(frozen=True)
class Curve:
    """The error of a model of a function, as a function of the step length.

    Attributes:
        lengths: The step lengths, in increasing order.
        errors: The error of the model at each length: the larger one of a step forward and a step
            backward, so that even and odd orders cannot cancel.
        floors: The part of each error that rounding explains.
        changes: The absolute change that the model predicts at each length.

    """

    lengths: Sequence[float]
    errors: Sequence[float]
    floors: Sequence[float]
    changes: Sequence[float]


@dataclass(frozen=True)
class Verdict:
    """Whether an error has the expected order.

    Attributes:
        passed: The outcome; None if rounding leaves too few lengths to decide.
        value: The slope; NaN if none can be fitted.
        words: The result in words, for a table.

    """

    passed: bool | None
    value: float
    words: str


def judge(curve: Curve, order: int, unit: float) -> Verdict:
    """Say whether the error falls with the length to the power ``order``, or faster.

    A wrong derivative leaves an error of one order less. It shows at small lengths, because the
    next order dominates at large ones. Therefore the slope of the logarithms is fitted to the
    smallest four successive lengths at which the error is well above rounding. A slope above
    ``order - 1/2`` passes.

    Rounding may leave fewer than four lengths, and a ReLU network has isolated kinks, which can
    produce any slope at small lengths. An error therefore also passes if at some length it is
    negligible relative to the predicted change. Without a slope, negligible means up to 30 times
    the root of the rounding unit and at most 0.01; against a slope that is too small, a tenth of
    that.

    Args:
        curve: The error.
        order: The order that it should have.
        unit: The relative rounding error of one operation.

    """
    rows = list(zip(curve.lengths, curve.errors, curve.floors, curve.changes, strict=True))
    bound, at = _bound(rows)
    negligible = min(30 * math.sqrt(unit), 0.01)
    agreed = f"agree to {bound:.1e} at t = {at:.1e}"
    for i in range(len(rows) - _WINDOW + 1):
        window = rows[i : i + _WINDOW]
        if all(_CLEAR * floor < error < math.inf for _, error, floor, _ in window):
            slope = _slope([(math.log(t), math.log(error)) for t, error, _, _ in window])
            words = f"slope {slope:.2f} for {order}, t = {window[0][0]:.1e} .. {window[-1][0]:.1e}"
            steep = slope > order - 0.5
            tiny = bound <= negligible / 10
            if tiny and not steep:
                words = f"slope {slope:.2f} for {order}, but they {agreed}"
            return Verdict(steep or tiny, slope, words)
    if bound <= negligible:
        return Verdict(True, math.nan, f"{agreed}, no slope above rounding")
    return Verdict(None, math.nan, "lost in rounding")


def _bound(rows: Sequence[tuple[float, float, float, float]]) -> tuple[float, float]:
    """Return the smallest bound on the relative error over all lengths, and its length."""
    bounds = [
        (max(error, _CLEAR * floor) / change, t)
        for t, error, floor, change in rows
        if 0 < change < math.inf and math.isfinite(error) and math.isfinite(floor)
    ]
    return min(bounds, default=(math.inf, math.nan))


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the least-squares line."""
    x = sum(p[0] for p in points) / len(points)
    y = sum(p[1] for p in points) / len(points)
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
