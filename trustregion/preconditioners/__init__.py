"""Approximate inverses of a damped curvature operator, for ``M=`` of the solvers."""

from .base import Preconditioner
from .gate import Gated
from .jacobi import Jacobi
from .kfac import KFAC
from .nystrom import Nystrom
from .recycled import Recycled

__all__ = [
    "Preconditioner",
    "Gated",
    "Jacobi",
    "KFAC",
    "Nystrom",
    "Recycled",
]
