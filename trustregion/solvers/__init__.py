"""Krylov kernels: pure functions of an operator and a right-hand side."""

from .cg import cg as cg
from .solution import LinearSolution as LinearSolution
