"""The checks that the kernels share: an error says what was given, what was expected."""

from __future__ import annotations

import math

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
    if x0 is not None and (x0.shape != b.shape or x0.dtype != b.dtype):
        raise ValueError(
            f"x0 must have the shape {tuple(b.shape)} and dtype {b.dtype} of b,"
            f" got shape {tuple(x0.shape)} and dtype {x0.dtype}"
        )


def check_tolerances(rtol: object, atol: float) -> None:
    """Refuse negative tolerances and NaN; a callable ``rtol`` is checked when it is called."""
    if not callable(rtol) and not (isinstance(rtol, (int, float)) and rtol >= 0 and atol >= 0):
        raise ValueError(f"rtol and atol must not be negative, got rtol={rtol}, atol={atol}")
    if not atol >= 0:
        raise ValueError(f"atol must not be negative, got {atol}")


def check_count(name: str, value: int | None) -> None:
    """Refuse a limit that is not an integer or is negative; None stands for the default."""
    if value is not None and not (isinstance(value, int) and value >= 0):
        raise ValueError(f"{name} must be an integer and not negative, got {value}")


def check_number(name: str, value: float) -> None:
    """Refuse what is not a finite number."""
    if not (isinstance(value, (int, float)) and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number, got {value}")


def check_radius(name: str, radius: float) -> None:
    """Refuse a radius that is not a positive finite number."""
    if not (isinstance(radius, (int, float)) and radius > 0 and math.isfinite(radius)):
        raise ValueError(f"{name} must be a positive finite number, got {radius}")


def finite(u: Tensor) -> bool:
    """Say whether every entry is finite."""
    return bool(u.isfinite().all())
