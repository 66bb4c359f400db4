"""Symmetric linear maps on flat vectors."""

from ..linearise import prefer_onednn
from ..subsample import subsample
from ..vector import ParameterVector
from .base import (
    DenseOperator,
    FunctionOperator,
    Identity,
    LinearOperator,
    check_symmetric,
    to_dense,
)
from .base import as_operator as as_operator
from .batches import BatchedOperator
from .fisher import FisherOperator
from .gauss_newton import GaussNewtonOperator
from .ggn import GGNOperator
from .hessian import HessianOperator, KLHessianOperator
from .map import DenseMap, FunctionMap, LinearMap
from .root import FisherRoot
from .sampled import EmpiricalFisherOperator, MonteCarloFisherOperator
from .scipy import to_scipy

__all__ = [
    "prefer_onednn",
    "DenseOperator",
    "FunctionOperator",
    "Identity",
    "LinearOperator",
    "check_symmetric",
    "to_dense",
    "BatchedOperator",
    "FisherOperator",
    "GaussNewtonOperator",
    "GGNOperator",
    "HessianOperator",
    "KLHessianOperator",
    "DenseMap",
    "FunctionMap",
    "LinearMap",
    "FisherRoot",
    "EmpiricalFisherOperator",
    "MonteCarloFisherOperator",
    "to_scipy",
    "subsample",
    "ParameterVector",
]
