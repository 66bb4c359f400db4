"""Functions to fit: an optimizer and its loop in one call, with the result fields of scipy."""

from .functional import least_squares, minimize
from .result import OptimizeResult

__all__ = [
    "minimize",
    "least_squares",
    "OptimizeResult",
]
