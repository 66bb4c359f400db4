"""Krylov kernels and trust-region solvers: pure functions of an operator and a vector."""

from .cg import cg
from .constrained import ConstrainedStep, constrained_kl_ball_step
from .dense import trust_region_dense
from .dual import DualSolution, dual_solve
from .dual_cost import dual_is_cheaper
from .fixed import FixedSolution, fixed_cg
from .gltr import gltr
from .kl_ball import Step, kl_ball_step, kl_penalty_step
from .krylov import KrylovSpace
from .lanczos import lanczos
from .least_squares import lsqr
from .line_search import BallSearch, BallTrial, LineSearch, backtracking, ball_search
from .minres import minres
from .multishift import multishift_cg
from .radius import (
    InitialRadius,
    classic_radius,
    gould_radius,
    initial_radius,
    levenberg_marquardt_damping,
    reduction_ratio,
)
from .solution import LinearSolution, SubproblemSolution
from .spectrum import Eigenvalues, diagonal, largest_eigenvalues, trace
from .steihaug import steihaug
from .stopping import eisenstat_walker, forcing_sequence

__all__ = [
    "cg",
    "ConstrainedStep",
    "constrained_kl_ball_step",
    "trust_region_dense",
    "DualSolution",
    "dual_is_cheaper",
    "dual_solve",
    "FixedSolution",
    "fixed_cg",
    "gltr",
    "Step",
    "kl_ball_step",
    "kl_penalty_step",
    "KrylovSpace",
    "lanczos",
    "lsqr",
    "BallSearch",
    "BallTrial",
    "LineSearch",
    "backtracking",
    "ball_search",
    "minres",
    "multishift_cg",
    "InitialRadius",
    "classic_radius",
    "gould_radius",
    "initial_radius",
    "levenberg_marquardt_damping",
    "reduction_ratio",
    "LinearSolution",
    "SubproblemSolution",
    "Eigenvalues",
    "diagonal",
    "largest_eigenvalues",
    "trace",
    "steihaug",
    "eisenstat_walker",
    "forcing_sequence",
]
