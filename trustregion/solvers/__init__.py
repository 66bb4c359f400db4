"""Krylov kernels and trust-region solvers: pure functions of an operator and a vector."""

from .cg import cg as cg
from .dense import trust_region_dense as trust_region_dense
from .dual import DualSolution as DualSolution
from .dual import dual_is_cheaper as dual_is_cheaper
from .dual import dual_solve as dual_solve
from .fixed import FixedSolution as FixedSolution
from .fixed import fixed_cg as fixed_cg
from .gltr import gltr as gltr
from .krylov import KrylovSpace as KrylovSpace
from .lanczos import lanczos as lanczos
from .least_squares import lsqr as lsqr
from .minres import minres as minres
from .multishift import multishift_cg as multishift_cg
from .solution import LinearSolution as LinearSolution
from .solution import SubproblemSolution as SubproblemSolution
from .steihaug import steihaug as steihaug
from .stopping import eisenstat_walker as eisenstat_walker
from .stopping import forcing_sequence as forcing_sequence
