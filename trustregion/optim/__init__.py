"""Optimizers with the contract of ``torch.optim``."""

from .functional import least_squares, minimize
from .info import StepInfo
from .natural import NaturalTrustRegion
from .newton import NewtonTrustRegion
from .options import Adapt, Region, Search
from .result import OptimizeResult

__all__ = [
    "NaturalTrustRegion",
    "NewtonTrustRegion",
    "StepInfo",
    "Search",
    "Adapt",
    "Region",
    "minimize",
    "least_squares",
    "OptimizeResult",
]
