"""Spectra, preconditioners and the attainable residual for the tests of MINRES."""

import torch

from strategies import POSITIVE

REGULAR = [*POSITIVE, "sign-mixed"]
KINDS = [*REGULAR, "rank-deficient"]


def preconditioner(n, dtype, log_condition=2.0, seed=0):
    """A positive definite matrix with nothing to do with the system."""
    g = torch.Generator().manual_seed(seed)
    P, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    M = (P * torch.logspace(0, -log_condition, n, dtype=torch.float64)) @ P.T
    return ((M + M.T) / 2).to(dtype)


def residual(system, x):
    return system.b.double() - system.exact @ x.double()


def attainable(system, x):
    """The rounding of the products that make up a residual."""
    return system.eps * (system.b.double().norm() + system.scale * x.double().norm()).item()
