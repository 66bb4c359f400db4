"""Checks of arguments, in one wording: an error says what was expected and what was given.

``check_...`` refuses an argument of a function, ``as_...`` also converts an option that a scheduler
may have written as a tensor or a numpy scalar.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
from torch import Tensor

REAL = (torch.float32, torch.float64)


def check_vector(name: str, b: object, *, columns: bool = False) -> None:
    """Refuse what is not a real floating vector, or with ``columns`` a matrix of them."""
    if not isinstance(b, Tensor) or b.dtype not in REAL:
        given = b.dtype if isinstance(b, Tensor) else type(b).__name__
        hint = ""
        if isinstance(b, Tensor) and b.is_complex():
            hint = ": write a complex system as a real one of twice the size"
        raise TypeError(f"{name} must be a float32 or float64 tensor, got {given}{hint}")
    if b.ndim != 1 and not (columns and b.ndim == 2):
        also = " or a matrix of columns (n, k)" if columns else ""
        raise ValueError(f"{name} must be a vector of shape (n,){also}, got shape {tuple(b.shape)}")


def check_start(x0: Tensor | None, b: Tensor) -> None:
    """Refuse a starting point that does not fit the right-hand side."""
    if x0 is not None and not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor like b, got {type(x0).__name__}")
    if x0 is not None and (x0.shape != b.shape or x0.dtype != b.dtype):
        raise ValueError(
            f"x0 must have the shape {tuple(b.shape)} and dtype {b.dtype} of b,"
            f" got shape {tuple(x0.shape)} and dtype {x0.dtype}"
        )


def check_tolerances(rtol: object, atol: object) -> None:
    """Refuse negative tolerances and NaN; a callable ``rtol`` is checked when it is called."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if name == "rtol" and callable(value):
            continue
        require(is_number(value) and value >= 0, name, "be a number and not negative", value)


def check_count(name: str, value: object, least: int = 0) -> None:
    """Refuse what is not an integer of at least ``least``; None stands for the default."""
    if value is not None:
        as_count(name, value, least)


def check_positive_count(name: str, value: object) -> None:
    """Refuse what is not a positive integer."""
    check_count(name, value)
    require(bool(value), name, "be a positive integer", value)


def check_number(name: str, value: object) -> None:
    """Refuse what is not a finite number."""
    require(is_number(value) and math.isfinite(value), name, "be a finite number", value)


def check_radius(name: str, radius: object) -> None:
    """Refuse what is not a positive finite number."""
    fits = is_number(radius) and 0 < radius < math.inf
    require(fits, name, "be a positive finite number", radius)


def check_damping(damping: object) -> None:
    """Refuse a damping that is negative or is not a finite number."""
    fits = is_number(damping) and 0 <= damping < math.inf
    require(fits, "damping", "be a finite number and not negative", damping)


def as_number(name: str, value: Any) -> float:
    """Return a number as a float, also a tensor or numpy scalar that a scheduler has written."""
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor of several
        raise ValueError(f"{name} must be a number, got {value!r}") from error


def as_positive(name: str, value: object, *, infinite: bool = False) -> float:
    """Return a positive number as a float."""
    number = as_number(name, value)
    fits = number > 0 and (infinite or number < math.inf)
    require(fits, name, "be positive" if infinite else "be positive and finite", number)
    return number


def as_not_negative(name: str, value: object, *, infinite: bool = False) -> float:
    """Return a number that is not negative as a float."""
    number = as_number(name, value)
    fits = number >= 0 and (infinite or number < math.inf)
    require(fits, name, "not be negative" if infinite else "be finite and not negative", number)
    return number


def as_number_in(name: str, value: object, interval: str) -> float:
    """Return a number in an interval such as ``"[0, 1)"``, whose round ends are not in it."""
    number = as_number(name, value)
    low, high = map(float, interval[1:-1].split(","))
    above = number > low if interval[0] == "(" else number >= low
    below = number < high if interval[-1] == ")" else number <= high
    require(above and below, name, f"lie in {interval}", number)
    return number


def as_count(name: str, value: object, least: int = 0) -> int:
    """Return an integer of at least ``least``."""
    words = f"of at least {least}" if least else "and not negative"
    count = int(value) if _is_whole(value) else least - 1
    require(count >= least, name, f"be an integer {words}", value)
    return count


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def require(fits: bool, name: str, expected: str, value: object) -> None:
    """Raise the error of an argument that does not fit."""
    if not fits:
        raise ValueError(f"{name} must {expected}, got {shown(value)}")


def is_number(value: object) -> TypeGuard[float]:
    """Say whether a value is a real number of Python's or numpy's."""
    return isinstance(value, Real) and not isinstance(value, bool)


def shown(value: object) -> str:
    """Return a value for an error message, with its type where that is the trouble."""
    if is_number(value):
        return f"{value}"
    hint = ": pass a Python number, for example by .item()" if isinstance(value, Tensor) else ""
    return f"{value!r} of type {type(value).__name__}{hint}"


def finite(u: Tensor) -> bool:
    """Say whether every entry is finite: the largest is, and it is NaN where any is."""
    return u.numel() == 0 or math.isfinite(u.abs().max().item())  # a quarter of isfinite's time
