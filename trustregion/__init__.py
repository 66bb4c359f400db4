"""Optimisers that take a KL radius instead of a learning rate.

>>> import torch
>>> from torch.distributions import Categorical
>>> model, x, y = torch.nn.Linear(2, 2), torch.eye(2), torch.tensor([0, 1])
>>> optimizer = NaturalTrustRegion(model.parameters(), delta=0.1)
>>> def closure():
...     distribution = Categorical(logits=model(x))
...     return -distribution.log_prob(y).mean(), distribution
>>> loss = optimizer.step(closure)
>>> optimizer.info.accepted
True

"""

from . import check, distributions, fit, operators, optim, preconditioners, solvers
from ._clash import warn_of_clashes as _warn_of_clashes
from .check import check_closure
from .distributions import Family, Weighted, mean_kl, register_distribution
from .fit import OptimizeResult, least_squares, minimize
from .operators import (
    FisherOperator,
    GGNOperator,
    HessianOperator,
    Identity,
    KLHessianOperator,
    LinearOperator,
    subsample,
    to_dense,
    to_scipy,
)
from .optim import NaturalTrustRegion, NewtonTrustRegion, StepInfo
from .preconditioners import KFAC, Jacobi, Nystrom
from .solvers import (
    LinearSolution,
    SubproblemSolution,
    cg,
    gltr,
    kl_ball_step,
    lanczos,
    minres,
    multishift_cg,
    steihaug,
)
from .status import Status

__version__ = "0.1.0"

__all__ = [
    # optimizers
    "NaturalTrustRegion",
    "NewtonTrustRegion",
    "StepInfo",
    "Status",
    "check_closure",
    # functions to minimize and residuals to fit
    "minimize",
    "least_squares",
    "OptimizeResult",
    # curvature operators
    "LinearOperator",
    "FisherOperator",
    "GGNOperator",
    "HessianOperator",
    "KLHessianOperator",
    "Identity",
    "to_dense",
    "to_scipy",
    "subsample",
    # solvers
    "cg",
    "minres",
    "multishift_cg",
    "lanczos",
    "steihaug",
    "gltr",
    "kl_ball_step",
    "LinearSolution",
    "SubproblemSolution",
    # preconditioners
    "KFAC",
    "Jacobi",
    "Nystrom",
    # distributions
    "register_distribution",
    "Family",
    "Weighted",
    "mean_kl",
]

_ROOMS = (operators, solvers, preconditioners, distributions, check, optim, fit)


def __getattr__(name: str) -> object:
    """Say where a public name lives that is not exported here."""
    for room in _ROOMS:
        if name in room.__all__:
            raise AttributeError(
                f"trustregion does not export {name} itself: import it from {room.__name__}"
            )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_warn_of_clashes()
