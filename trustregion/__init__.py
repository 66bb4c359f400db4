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

from ._clash import warn_of_clashes as _warn_of_clashes
from .distributions import Family as Family
from .distributions import mean_kl as mean_kl
from .distributions import register_distribution as register_distribution
from .line_search import LineSearch as LineSearch
from .line_search import backtracking as backtracking
from .operators import DenseOperator as DenseOperator
from .operators import FisherOperator as FisherOperator
from .operators import FunctionOperator as FunctionOperator
from .operators import Identity as Identity
from .operators import KLHessianOperator as KLHessianOperator
from .operators import LinearOperator as LinearOperator
from .operators import to_dense as to_dense
from .optim import NaturalTrustRegion as NaturalTrustRegion
from .optim import StepInfo as StepInfo
from .solvers import LinearSolution as LinearSolution
from .solvers import cg as cg
from .status import Status as Status
from .subproblem import Step as Step
from .subproblem import kl_ball_step as kl_ball_step
from .vector import ParameterVector as ParameterVector

__version__ = "0.1.0"

__all__ = [
    # optimizers
    "NaturalTrustRegion",
    "StepInfo",
    "Status",
    # operators
    "LinearOperator",
    "DenseOperator",
    "FunctionOperator",
    "Identity",
    "FisherOperator",
    "KLHessianOperator",
    "to_dense",
    # kernels
    "cg",
    "LinearSolution",
    "kl_ball_step",
    "Step",
    "backtracking",
    "LineSearch",
    # models
    "ParameterVector",
    "Family",
    "mean_kl",
    "register_distribution",
]

_warn_of_clashes()
