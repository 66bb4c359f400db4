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
from .distributions import Weighted as Weighted
from .distributions import mean_kl as mean_kl
from .distributions import register_distribution as register_distribution
from .kl_ball import Step as Step
from .kl_ball import kl_ball_step as kl_ball_step
from .kl_ball import kl_penalty_step as kl_penalty_step
from .line_search import BallSearch as BallSearch
from .line_search import BallTrial as BallTrial
from .line_search import LineSearch as LineSearch
from .line_search import backtracking as backtracking
from .line_search import ball_search as ball_search
from .operators import BatchedOperator as BatchedOperator
from .operators import DenseMap as DenseMap
from .operators import DenseOperator as DenseOperator
from .operators import EmpiricalFisherOperator as EmpiricalFisherOperator
from .operators import FisherOperator as FisherOperator
from .operators import FisherRoot as FisherRoot
from .operators import FunctionMap as FunctionMap
from .operators import FunctionOperator as FunctionOperator
from .operators import GaussNewtonOperator as GaussNewtonOperator
from .operators import GGNOperator as GGNOperator
from .operators import HessianOperator as HessianOperator
from .operators import Identity as Identity
from .operators import KLHessianOperator as KLHessianOperator
from .operators import LinearMap as LinearMap
from .operators import LinearOperator as LinearOperator
from .operators import MonteCarloFisherOperator as MonteCarloFisherOperator
from .operators import check_symmetric as check_symmetric
from .operators import to_dense as to_dense
from .optim import ClosureReport as ClosureReport
from .optim import NaturalTrustRegion as NaturalTrustRegion
from .optim import NewtonTrustRegion as NewtonTrustRegion
from .optim import StepInfo as StepInfo
from .optim import check_closure as check_closure
from .preconditioners import KFAC as KFAC
from .preconditioners import Gated as Gated
from .preconditioners import Jacobi as Jacobi
from .preconditioners import Nystrom as Nystrom
from .preconditioners import Preconditioner as Preconditioner
from .preconditioners import Recycled as Recycled
from .radius import InitialRadius as InitialRadius
from .radius import classic_radius as classic_radius
from .radius import gould_radius as gould_radius
from .radius import initial_radius as initial_radius
from .radius import levenberg_marquardt_damping as levenberg_marquardt_damping
from .radius import reduction_ratio as reduction_ratio
from .solvers import DualSolution as DualSolution
from .solvers import FixedSolution as FixedSolution
from .solvers import KrylovSpace as KrylovSpace
from .solvers import LinearSolution as LinearSolution
from .solvers import SubproblemSolution as SubproblemSolution
from .solvers import cg as cg
from .solvers import dual_is_cheaper as dual_is_cheaper
from .solvers import dual_solve as dual_solve
from .solvers import eisenstat_walker as eisenstat_walker
from .solvers import fixed_cg as fixed_cg
from .solvers import forcing_sequence as forcing_sequence
from .solvers import gltr as gltr
from .solvers import lanczos as lanczos
from .solvers import lsqr as lsqr
from .solvers import minres as minres
from .solvers import multishift_cg as multishift_cg
from .solvers import steihaug as steihaug
from .solvers import trust_region_dense as trust_region_dense
from .spectrum import Eigenvalues as Eigenvalues
from .spectrum import diagonal as diagonal
from .spectrum import largest_eigenvalues as largest_eigenvalues
from .spectrum import to_scipy as to_scipy
from .spectrum import trace as trace
from .status import Status as Status
from .subproblem import ConstrainedStep as ConstrainedStep
from .subproblem import constrained_kl_ball_step as constrained_kl_ball_step
from .subsample import subsample as subsample
from .vector import ParameterVector as ParameterVector

__version__ = "0.1.0"

__all__ = [
    # optimizers
    "NaturalTrustRegion",
    "NewtonTrustRegion",
    "StepInfo",
    "Status",
    "check_closure",
    "ClosureReport",
    # operators
    "LinearOperator",
    "DenseOperator",
    "FunctionOperator",
    "Identity",
    "FisherOperator",
    "GGNOperator",
    "HessianOperator",
    "KLHessianOperator",
    "EmpiricalFisherOperator",
    "MonteCarloFisherOperator",
    "GaussNewtonOperator",
    "BatchedOperator",
    "subsample",
    "to_dense",
    "to_scipy",
    "diagonal",
    "trace",
    "largest_eigenvalues",
    "Eigenvalues",
    "check_symmetric",
    "LinearMap",
    "DenseMap",
    "FunctionMap",
    "FisherRoot",
    # preconditioners
    "KFAC",
    "Jacobi",
    "Nystrom",
    "Recycled",
    "Gated",
    "Preconditioner",
    # linear systems
    "cg",
    "fixed_cg",
    "multishift_cg",
    "minres",
    "lsqr",
    "dual_solve",
    "dual_is_cheaper",
    "LinearSolution",
    "DualSolution",
    "FixedSolution",
    "forcing_sequence",
    "eisenstat_walker",
    # a stored Krylov space
    "lanczos",
    "KrylovSpace",
    # trust regions
    "steihaug",
    "gltr",
    "trust_region_dense",
    "SubproblemSolution",
    "reduction_ratio",
    "classic_radius",
    "gould_radius",
    "levenberg_marquardt_damping",
    "initial_radius",
    "InitialRadius",
    "kl_ball_step",
    "kl_penalty_step",
    "Step",
    "constrained_kl_ball_step",
    "ConstrainedStep",
    "backtracking",
    "LineSearch",
    "ball_search",
    "BallSearch",
    "BallTrial",
    # models
    "ParameterVector",
    "Family",
    "Weighted",
    "mean_kl",
    "register_distribution",
]

_warn_of_clashes()
