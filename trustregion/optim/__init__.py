"""Optimizers with the contract of ``torch.optim``."""

from .info import StepInfo as StepInfo
from .natural import NaturalTrustRegion as NaturalTrustRegion
