"""The order of an error in the length of a step, read between rounding and higher orders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_WINDOW = 4  # successive lengths that a slope is fitted to
_CLEAR = 10.0  # an error this far above its rounding has a logarithm that is right to a tenth


@dataclass(frozen=True)
class Curve:
    """The error of a model of a function, by length of the step.

    Attributes:
        lengths: of the steps, from small to large.
        errors: of the model there, of the larger one of a step forth and back: even and odd orders
            then cannot cancel.
        floors: what rounding explains of them.
        changes: what the model says.

    """

    lengths: Sequence[float]
    errors: Sequence[float]
    floors: Sequence[float]
    changes: Sequence[float]


@dataclass(frozen=True)
class Verdict:
    """Whether an error has the order that it should have.

    Attributes:
        passed: None where rounding leaves too few lengths to tell.
        value: the slope; NaN where none can be fitted.
        words: the same for a table.

    """

    passed: bool | None
    value: float
    words: str


def judge(curve: Curve, order: int, unit: float) -> Verdict:
    """Return whether the error falls with the length to the power ``order``, or faster.

    A wrong derivative leaves an error of one order less. That shows at small lengths, since at
    large ones the next order covers it. So the slope of the logarithms is fitted to the first four
    successive lengths at which the error is clear of rounding, and passes above ``order - 1/2``.

    Rounding may leave no four lengths, and the kinks of ReLU networks are single events at small
    lengths, which make slopes of any size. So an error passes also that is negligible, at some
    length, beside what the model says: up to 30 times the root of the rounding unit, at most 0.01,
    where there is no slope, and a tenth of that against one.

    Args:
        curve: the error.
        order: that it should have.
        unit: relative rounding error of one operation.

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
    """Return the least bound on the relative error that a length gives, and the length."""
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
