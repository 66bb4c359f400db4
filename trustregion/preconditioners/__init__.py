"""Approximate inverses of a damped curvature operator, as ``M=`` of the kernels."""

from .base import Preconditioner as Preconditioner
from .gate import Gated as Gated
from .jacobi import Jacobi as Jacobi
from .kfac import KFAC as KFAC
from .nystrom import Nystrom as Nystrom
from .recycled import Recycled as Recycled
