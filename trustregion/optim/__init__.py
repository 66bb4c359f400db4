"""Optimizers with the contract of ``torch.optim``."""

from .check import check_closure as check_closure
from .info import StepInfo as StepInfo
from .natural import NaturalTrustRegion as NaturalTrustRegion
from .newton import NewtonTrustRegion as NewtonTrustRegion
from .report import ClosureReport as ClosureReport
