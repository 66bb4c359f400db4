"""Optimizers with the contract of ``torch.optim``."""

from .info import StepInfo
from .natural import NaturalTrustRegion
from .newton import NewtonTrustRegion
from .options import Adapt, Region, Search

__all__ = [
    "NaturalTrustRegion",
    "NewtonTrustRegion",
    "StepInfo",
    "Search",
    "Adapt",
    "Region",
]
