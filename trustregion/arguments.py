"""The checks that the kernels share: an error says what was given, what was expected."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TypeGuard

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
        if not (is_number(value) and value >= 0):
            raise ValueError(f"{name} must be a number and not negative, got {shown(value)}")


def check_count(name: str, value: object) -> None:
    """Refuse a limit that is not an integer or is negative; None stands for the default."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if value is not None and not (whole and is_number(value) and value >= 0):
        raise ValueError(f"{name} must be an integer and not negative, got {shown(value)}")


def check_number(name: str, value: object) -> None:
    """Refuse what is not a finite number."""
    if not (is_number(value) and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number, got {shown(value)}")


def check_radius(name: str, radius: object) -> None:
    """Refuse a radius that is not a positive finite number."""
    if not (is_number(radius) and radius > 0 and math.isfinite(radius)):
        raise ValueError(f"{name} must be a positive finite number, got {shown(radius)}")


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
    """Say whether every entry is finite."""
    return bool(u.isfinite().all())
