"""Optimizers with the contract of ``torch.optim``."""

from .info import StepInfo
from .natural import NaturalTrustRegion
from .newton import NewtonTrustRegion

__all__ = [
    "StepInfo",
    "NaturalTrustRegion",
    "NewtonTrustRegion",
]
