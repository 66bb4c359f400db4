"""Optimizers with the contract of ``torch.optim``."""

from .info import StepInfo as StepInfo
from .newton import NewtonTrustRegion as NewtonTrustRegion
from .natural import NaturalTrustRegion as NaturalTrustRegion
